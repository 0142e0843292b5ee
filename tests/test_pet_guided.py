"""`pet=corda` and `pet=adalora`: what they do around a training, against their equations written naively."""

import copy

import numpy as np
import pytest
import torch
from test_pet import images, nano, runtime, shake

from clbench.config.compose import compose
from clbench.interfaces import Place, UserError
from clbench.models.pet_adalora import adalora
from clbench.models.pet_corda import corda, decomposed
from clbench.training.steps import guided


class Images:
    """Images [N, 3, 32, 32] as data; `asked` are the rows that were read."""

    def __init__(self, n=40, seed=3):
        self.x, self.asked = images(n, seed=seed), []

    def __len__(self):
        return len(self.x)

    def batch(self, rows, key=None):
        assert key is None, "the test transform"
        self.asked += [int(row) for row in rows]
        return self.x[torch.as_tensor(np.asarray(rows))]


@pytest.mark.parametrize("smallest", [True, False])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_the_components_of_corda(shape, smallest):
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=shape), rng.normal(size=(50, shape[1]))
    c = x.T @ x / 50
    b, a = (m.numpy() for m in decomposed(torch.tensor(w), torch.tensor(c), 2, smallest, 0.01))
    c = c + 0.01 * np.mean([c[i, i] for i in range(shape[1])]) * np.eye(shape[1])
    u, s, v = np.linalg.svd(w @ c)
    want = sum(s[j] * np.outer(u[:, j], v[j] @ np.linalg.inv(c)) for j in (range(min(shape))[-2:] if smallest else range(2)))
    np.testing.assert_allclose(b @ a, want, atol=1e-10)
    np.testing.assert_allclose(np.linalg.norm(b, axis=0), np.linalg.norm(a @ c, axis=1), atol=1e-10)
    whole = decomposed(torch.tensor(w), torch.tensor(x.T @ x / 50), min(shape), smallest, 0.01)
    np.testing.assert_allclose((whole[0] @ whole[1]).numpy(), w, atol=1e-9)


def test_a_singular_covariance_is_damped_until_it_has_an_inverse():
    """One direction is used, and 1e-18 of the diagonal is below its last bit."""
    eye, ones = torch.eye(4, dtype=torch.float64), torch.ones(4, 4, dtype=torch.float64)
    b, a = decomposed(eye, ones, 3, True, 1e-18)
    assert bool(b.isfinite().all() and a.isfinite().all())
    b, a = decomposed(eye, ones, 3, True, 1e-3)
    torch.testing.assert_close(b @ a, eye - 0.25, atol=1e-9, rtol=0)  # the three other directions


def test_corda_is_calibrated_once_on_inputs_of_the_bare_network():
    model, data, x = nano(), Images(), images()
    model.train(False)
    bare = model.features(x).detach()
    pet = corda(model, runtime(), rank=3, targets=["k", "v", "fc2"], samples=30)
    seen = {}
    shake(pet)
    pet.guide.begin(data)
    assert len(set(data.asked)) == len(data.asked) == 30 and torch.equal(model.features(x), bare)
    layers = {
        f"{i}/{t}": layer
        for i, block in enumerate(model.net.blocks)
        for t, layer in (("k", block.attn.qkv), ("v", block.attn.qkv), ("fc2", block.mlp.fc2))
    }
    for layer in layers.values():
        layer.register_forward_pre_hook(lambda layer, args: seen.__setitem__(layer, args[0].double().flatten(0, -2)))
    with torch.no_grad(), pet.off():
        model.tokens(data.x[data.asked])
    for site, layer in layers.items():
        rows = {"k": slice(160, 320), "v": slice(320, 480)}.get(site[-1], slice(None))
        cov = seen[layer].T @ seen[layer] / len(seen[layer])
        b, a = decomposed(layer.weight[rows].detach().double(), cov, 3, True, 0.01)
        own = pet.values[f"{site}/b"].detach() @ pet.values[f"{site}/a"].detach()
        torch.testing.assert_close(own.double(), b @ a, atol=2e-3 * float((b @ a).abs().max()), rtol=1e-2)
    before, told = copy.deepcopy(pet.state_dict()), len(data.asked)
    pet.guide.begin(data)
    assert len(data.asked) == told and all(torch.equal(v, before[k]) for k, v in pet.state_dict().items())
    other = nano()
    again = corda(other, runtime(), rank=3, targets=["k", "v", "fc2"], samples=30)
    again.load_state_dict(before)
    again.guide.begin(data)
    assert len(data.asked) == told, "a state says that it is calibrated"
    with torch.no_grad():
        torch.testing.assert_close(other.features(x), bare, atol=1e-6, rtol=1e-6)


def test_the_smallest_components_leave_alone_what_calibration_uses():
    """One step down the same gradient: what the terms of the smallest components change on the data is less."""
    data, moved = Images(), {}
    for components in ("smallest", "largest"):
        model = nano()
        bare = model.features(data.x).detach()
        pet = corda(model, runtime(), rank=4, components=components)
        pet.guide.begin(data)
        with torch.no_grad():
            for name, value in pet.values.items():
                value += 0.1 * getattr(pet, f"{name}_start")
        moved[components] = float((model.features(data.x) - bare).detach().norm())
    assert 0 < moved["smallest"] < 0.2 * moved["largest"]


def test_the_budget_of_adalora():
    guide = adalora(nano(), runtime(), rank=12, target=8, targets=["k"], blocks=[0, 1], warm_up=2, hold=3).guide
    cubic = [int(8 * (1 - (s - 2) / 5) ** 3 + 16) for s in range(3, 7)]
    assert [guide.budget(s, 10) for s in range(1, 11)] == [24, 24, *cubic, 16, 16, 16, 16] and cubic == [20, 17, 16, 16]


def naive_adalora(values, grads, shapes, rank, target, warm_up, hold, every, beta):
    """Steps of e alone, number by number -> e after each, the scores at the end."""
    steps, layers = len(grads), list(shapes)
    mean = {name: np.zeros_like(v) for name, v in values.items()}
    spread = {name: np.zeros_like(v) for name, v in values.items()}
    kept, seen = {layer: np.ones(rank) for layer in layers}, []
    for s, grad in enumerate(grads, 1):
        for name, v in values.items():
            v -= 0.1 * grad[name]
            now = abs(v * grad[name])
            mean[name] = beta * mean[name] + (1 - beta) * now
            spread[name] = beta * spread[name] + (1 - beta) * abs(now - mean[name])
        start, end = rank * len(layers), target * len(layers)
        free = steps - hold - warm_up
        budget = (
            start if s <= warm_up else end if s >= steps - hold else int((start - end) * (1 - (s - warm_up) / free) ** 3 + end)
        )
        if s == steps - hold or (s < steps - hold and s % every == 0):
            score = []
            for layer in layers:
                both = {part: mean[f"{layer}/{part}"] * spread[f"{layer}/{part}"] for part in "abe"}
                score += [(both["e"][j] + both["a"][j].mean() + both["b"][:, j].mean(), layer, j) for j in range(rank)]
            kept = {layer: np.ones(rank) for layer in layers}
            for _, layer, j in sorted(score, key=lambda item: item[0])[: start - budget]:
                kept[layer][j] = 0
        if s >= steps - hold or s % every == 0:
            for layer in layers:
                values[f"{layer}/e"] *= kept[layer]
        seen.append({layer: values[f"{layer}/e"].copy() for layer in layers})
    return seen


@pytest.mark.parametrize(("warm_up", "hold", "every"), [(0, 0, 1), (1, 2, 1), (0, 3, 2)])
def test_adalora_leaves_out_the_lowest_scores(warm_up, hold, every):
    options = {"rank": 4, "target": 2, "warm_up": warm_up, "hold": hold, "every": every}
    pet = adalora(nano(), runtime(), targets=["k", "fc1"], blocks=[0, 2], **options).double()
    pet.guide.begin(None)
    rng = np.random.default_rng(1)
    grads = [{name: rng.normal(size=v.shape) for name, v in pet.values.items()} for _ in range(8)]
    values = {name: v.detach().numpy().copy() for name, v in pet.values.items()}
    want = naive_adalora(values, grads, pet.guide.names, beta=0.85, **options)
    optimizer = torch.optim.SGD(pet.parameters(), lr=0.1)
    for step, grad in enumerate(grads):
        for name, value in pet.values.items():
            value.grad = torch.tensor(grad[name])
        optimizer.step()
        pet.guide.after_step(Place(0, step, 8, step))
        for name, e in want[step].items():
            np.testing.assert_allclose(pet.values[f"{name}/e"].detach().numpy(), e, atol=1e-12, err_msg=f"{name} {step}")
    left = torch.cat([pet.values[f"{name}/e"].detach() for name in pet.guide.names])
    assert int((left != 0).sum()) == 8 and pet.kept.sum() == 8
    pet.guide.begin(None)
    assert bool(pet.kept.all()) and float(pet.guide.score("0/k").sum()) == 0, "the next experience starts with all"


def test_the_penalty_of_adalora_joins_the_loss():
    pet = adalora(nano(), runtime(), rank=3, target=2, targets=["k", "fc2"], blocks=[1], orthogonal=0.25)
    shake(pet)
    far = []
    for name in ("1/k", "1/fc2"):
        a, b = (pet.values[f"{name}/{part}"].detach().double().numpy() for part in "ab")
        far += [np.sqrt(((m @ m.T - np.eye(3)) ** 2).sum()) for m in (a, b.T)]
    called = []
    hooks = {"after_step": lambda place, batch: called.append(int(pet.kept.sum()))}
    total, hooks = guided(pet, None, lambda batch: torch.tensor(2.0), hooks)
    assert float(total(None).detach()) == pytest.approx(2.0 + 0.25 * np.mean(far), rel=1e-5)
    hooks["after_step"](Place(0, 0, 1, 0), None)
    assert called == [6] and int(pet.kept.sum()) == 4, "a learner's own hook comes first"
    bare = adalora(nano(), runtime(), orthogonal=0.0)
    assert float(guided(bare, None, lambda batch: torch.tensor(2.0))[0](None)) == 2.0


@pytest.mark.parametrize("make", [corda, adalora])
def test_a_learner_that_tells_nothing(make):
    model = nano()
    pet = make(model, runtime())
    pet.train()
    with pytest.raises(UserError, match=f"pet={pet.kind} must be told before it is trained"):
        model.features(images(2))
    with torch.no_grad():
        model.features(images(2))


@pytest.mark.parametrize("learner", ["ease", "lae", "merge", "ssiat"])
def test_learners_that_refuse(learner):
    from clbench.config.compose import build

    (job,) = compose([f"learner={learner}", "pet=adalora", "model=nano"])
    with pytest.raises(UserError, match=f"pet=adalora .* which {learner} does not"):
        build(job["learner"], model=build(job["model"]), runtime=runtime())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: corda(m, runtime(), components="middle"), "unknown components='middle' of pet=corda"),
        (lambda m: corda(m, runtime(), samples=0), "samples must be at least 1"),
        (lambda m: corda(m, runtime(), rank=161), "rank=161 is above a side of 0/k of 160 x 160"),
        (lambda m: adalora(m, runtime(), rank=4, target=5), "target must lie in 1 to rank=4, got 5"),
        (lambda m: adalora(m, runtime(), every=0), "every at least 1"),
        (
            lambda m: adalora(m, runtime(), warm_up=2, hold=2).guide.after_step(Place(0, 0, 4, 0)),
            "warm_up=2 and hold=2 need more steps than an experience has, 4",
        ),
    ],
)
def test_wrong_options(make, words):
    with pytest.raises(UserError, match=words):
        make(nano())
