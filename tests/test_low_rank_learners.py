"""InfLoRA, SD-LoRA, CoFiMA, TUNA and alignment that follows the drift, against naive versions of their formulas."""

import math

import numpy as np
import pytest
import torch
from conftest import NARROW

from clbench.config.compose import compose
from clbench.interfaces import Capabilities, Place, UserError
from clbench.learners import cofima, inflora, sd_lora, tuna
from clbench.models.pet_modules import lora
from clbench.models.pet_sites import linear_of
from clbench.streams.eval_sets import open_eval
from clbench.streams.images.data import shuffled
from clbench.testing.contract import Trial, small_stream
from clbench.training.state import detached


def trial(*overrides, narrow=NARROW, **stream):
    (config,) = compose([*narrow, *overrides])
    return Trial(config, small_stream(**stream), Capabilities())


def learned(*overrides, experiences=2, **stream):
    t = trial(*overrides, **stream)
    learner, runtime, pipeline = t.start()
    return t, learner, runtime, pipeline, [t.learn(learner, runtime, pipeline, i) for i in range(experiences)]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("inflora pet=adapter", "choose pet=lora"),
        ("inflora learner.pet.learn_scale=true", "choose pet=lora"),
        ("inflora learner.pet.targets=[k,fc1]", "choose pet=lora"),
        ("inflora learner.pet.rank=33", r"learner\.pet\.rank=33"),
        ("inflora learner.energy=0", r"learner\.energy"),
        ("inflora learner.energy_end=0.9", r"learner\.energy"),
        ("inflora learner.experiences=0", r"learner\.experiences"),
        ("inflora learner.variant=code", r"learner\.variant=code"),
        ("sd_lora pet=adapter", "choose pet=lora"),
        ("sd_lora pet=lora_lae", "choose pet=lora"),
        ("sd_lora learner.variant=code", r"learner\.variant=code"),
        ("sd_lora learner.reduce_at=[4]", r"learner\.reduce_at"),
        ("sd_lora learner.reduce_at=[4,2] learner.reduce_to=[8,6]", r"learner\.reduce_at"),
        ("sd_lora learner.reduce_at=[4] learner.reduce_to=[11]", r"learner\.reduce_to"),
        ("sd_lora learner.redundant=0", r"learner\.redundant"),
        ("cofima learner.share=1.5", r"learner\.share"),
        ("cofima learner.fisher=false learner.official_new_head=true", r"learner\.official_new_head"),
        ("tuna pet=lora", "choose pet=adapter"),
        ("tuna learner.variant=code", r"learner\.variant=code"),
        ("tuna learner.start=old", r"learner\.start=old"),
        ("tuna learner.covariance=multi-centroid", r"learner\.covariance"),
    ],
)
def test_bad_options_are_named(words, said):
    with pytest.raises(UserError, match=said):
        trial(*f"learner={words}".split()).start()


# --- InfLoRA


def covariance(seed, d=12, spread=0.6):
    """Of inputs whose energy falls geometrically, in directions of the seed."""
    q = torch.linalg.qr(drawn(d, d, seed=seed)).Q
    return (q * spread ** torch.arange(d).double()) @ q.T


def naive_gpm(cov, used, share, power, first):
    """DualGPM as one growing basis of directions in use: columns one by one."""
    whole = (torch.linalg.svdvals(cov) ** power).sum()
    if first:
        u, s, _ = torch.linalg.svd(cov)
        held, m = 0.0, 0
        for i in range(len(s)):
            held += float(s[i] ** power / whole)
            if held >= share:
                break
            m += 1
        return u[:, : max(1, m)]
    u, s, _ = torch.linalg.svd(cov - used @ used.T @ cov)
    held = float(1 - (s**power).sum() / whole)
    for i in range(len(s)):
        if held >= share:
            break
        used = torch.cat([used, u[:, i : i + 1]], dim=1)
        held += float(s[i] ** power / whole)
    return used


@pytest.mark.parametrize("power", [1, 2])
def test_dual_gpm_is_one_growing_basis(power):
    kept, used, switched = (torch.zeros(12, 0).double(), False), None, []
    for t in range(8):
        cov, share = covariance(t % 5, spread=0.5), 0.9 + 0.1 * t / 8
        before = kept
        kept = inflora.dual_gpm(cov, kept, share, power)
        used = naive_gpm(cov, used, share, power, t == 0)
        basis, is_free = kept
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]).double(), atol=1e-10, rtol=0)
        assert basis.shape[1] <= 6, "the smaller of both subspaces is kept"
        free = basis @ basis.T if is_free else torch.eye(12).double() - basis @ basis.T
        torch.testing.assert_close(free, torch.eye(12).double() - used @ used.T, atol=1e-7, rtol=0)
        a = inflora.design(covariance(40 + t), kept, 4)
        outside = basis.T @ a.T if not is_free else a.T - basis @ (basis.T @ a.T)
        assert outside.abs().max() < 1e-6, "A reads no direction in use"
        switched.append(is_free and not before[1])
    assert sum(switched) == 1, "the other subspace was kept from some experience on"


def test_first_experience_and_energies_by_hand():
    cov = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0, 1.0, 1.0]).double())  # shares of S: .4 .2 .1 ..; of S^2: 2/3, 1/6, ..
    none = (torch.zeros(6, 0).double(), False)
    for share, power, m in ((0.5, 2, 1), (0.8, 2, 1), (0.85, 2, 2), (0.65, 1, 2), (0.35, 1, 1)):
        basis, is_free = inflora.dual_gpm(cov, none, share, power)
        assert (basis.shape[1], is_free) == (m, False)
    basis, is_free = inflora.dual_gpm(cov, none, 0.95, 1)  # .4 .6 .7 .8 .9 are below it
    assert (basis.shape[1], is_free) == (1, True), "five of six directions are in use: the one that is free is kept"
    a = inflora.design(cov, none, 2)
    torch.testing.assert_close(a.abs(), torch.eye(6).double()[:2] / math.sqrt(3))


def test_where_no_direction_is_free_the_term_is_nothing():
    cov = covariance(1)
    for kept in ((torch.zeros(12, 0).double(), True), (torch.eye(12).double(), False)):
        assert torch.equal(inflora.design(cov, kept, 3), torch.zeros(3, 12).double())
        basis, is_free = inflora.dual_gpm(cov, kept, 1.0, 2)
        assert is_free and basis.shape == (12, 0)


def test_inflora_rate_falls_once_an_epoch():
    rates = [inflora.falling(Place(0, step, 12, step), 3) for step in (0, 3, 4, 8, 11)]
    assert rates == pytest.approx([1, 1, math.cos(0.2475 * math.pi), math.cos(0.495 * math.pi), math.cos(0.495 * math.pi)])
    assert rates[-1] == pytest.approx(0.0157, abs=1e-4) and inflora.falling(Place(0, 2, 5, 2), 1) == 1


def qkv_inputs(learner, data):
    """Inputs of every block's attention over all training images [N, D], by a hook of the test's own."""
    seen = {i: [] for i in learner.layers}
    hooks = [
        layer.register_forward_hook(lambda _, args, out, i=i: seen[i].append(args[0].flatten(0, 1)))
        for i, layer in learner.layers.items()
    ]
    with torch.no_grad(), learner.pet.off():
        for batch in data.test_batches(5):
            learner.model.features(batch.x)
    for hook in hooks:
        hook.remove()
    return {i: torch.cat(parts) for i, parts in seen.items()}


def test_inflora_designs_trains_and_adds(monkeypatch):
    """On images without augmentation: C by a loop, both terms one A, trained B, the sum in the weights, k and v unchanged."""
    options = ("learner.lr=0.05", "learner.energy=0.7")
    t, learner, runtime, pipeline, (first,) = learned("learner=inflora", *options, sizes=[2, 2, 2], experiences=1)
    x = {i: f.double() for i, f in qkv_inputs(learner, first.train).items()}
    again = learner.covariances(first, "again")
    for i, f in x.items():
        torch.testing.assert_close(again[i], sum(row[:, None] * row for row in f) / len(f), atol=1e-4, rtol=1e-4)
        m, n = learner.kept[i][0], inflora.dual_gpm(again[i], (torch.zeros(32, 0).double(), False), 0.7, 2)[0]
        torch.testing.assert_close(m @ m.T, n @ n.T, atol=1e-3, rtol=0)
    start = {name: weight.clone() for name, weight in learner.weights.items()}
    before, kept, seen = detached(learner.model.state_dict()), dict(learner.kept), {}
    real = inflora.fit

    def spy(*args, **options):
        log = real(*args, **options)
        seen.update(learner.pet.state())
        batch = first.train.batch(range(6)).x
        seen["unmerged"] = learner.model.features(batch).detach()
        return log

    monkeypatch.setattr(inflora, "fit", spy)
    second = t.learn(learner, runtime, pipeline, 1)
    for name, weight in learner.weights.items():
        a, b = seen[f"{name}/a"], seen[f"{name}/b"]
        assert torch.equal(a, seen[name.split("/")[0] + "/k/a"]) and b.abs().max() > 0
        torch.testing.assert_close(weight, start[name] + b @ a)
        m, is_free = kept[name.split("/")[0]]
        assert not is_free and (a.double() @ m).abs().max() < 1e-6
        inside = drawn(5, m.shape[1]) @ m.T  # inputs that lie in the directions in use
        torch.testing.assert_close(inside @ weight.double().T, inside @ start[name].double().T, atol=1e-5, rtol=0)
    changed = {name for name, value in learner.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"net.blocks.{i}.attn.qkv.weight" for i in learner.layers}
    for i in learner.layers:
        assert torch.equal(learner.layers[i].weight[:32], before[f"net.blocks.{i}.attn.qkv.weight"][:32]), "queries stay"
    with torch.no_grad(), learner.pet.off():
        torch.testing.assert_close(
            learner.model.features(first.train.batch(range(6)).x), seen["unmerged"], atol=1e-5, rtol=1e-4
        )
    assert second.index == 1 and learner.head.widths == [2, 2]


# --- SD-LoRA


def naive_sum(pairs, magnitudes, product):
    """Sum of s_i B_i A_i, all but the last divided by their norms, as one matrix."""
    total = torch.zeros(len(pairs[0][1]), pairs[0][0].shape[1], dtype=torch.float64)
    for i, (a, b) in enumerate(pairs):
        matrix = b @ a
        if i < len(pairs) - 1:
            size = matrix.square().sum().sqrt() if product else a.square().sum().sqrt() * b.square().sum().sqrt()
            matrix = matrix / size
        total = total + magnitudes[i] * matrix
    return total


@pytest.mark.parametrize("product", [False, True])
def test_all_terms_are_one_term(product):
    pairs = [(drawn(r, 7, seed=r), drawn(5, r, seed=10 + r)) for r in (4, 3, 2)]
    s = drawn(3, seed=5)
    old = sd_lora.no_directions(*pairs[0])
    for pair in pairs[:2]:
        old = sd_lora.with_direction(old, *pair, product, None)
    a, b = sd_lora.joined(old, *pairs[2], s)
    assert a.shape == (9, 7) and b.shape == (5, 9)
    torch.testing.assert_close(b @ a, naive_sum(pairs, s, product), atol=1e-9, rtol=0)
    scaled = sd_lora.no_directions(*pairs[0])
    for p, q in pairs[:2]:
        scaled = sd_lora.with_direction(scaled, p, 7.5 * q, product, None)
    other = sd_lora.joined(scaled, *pairs[2], s)
    torch.testing.assert_close(other[1] @ other[0], b @ a, atol=1e-9, rtol=0)
    product_by_factors, whole = sd_lora.size_of(*pairs[0], True), (pairs[0][1] @ pairs[0][0]).norm()
    torch.testing.assert_close(product_by_factors, whole)


def test_a_direction_that_others_explain_is_dropped():
    pairs = [(drawn(3, 7, seed=i), drawn(5, 3, seed=10 + i)) for i in range(2)]
    old = sd_lora.no_directions(*pairs[0])
    for pair in pairs:
        old = sd_lora.with_direction(old, *pair, True, 9e-4)
    assert len(old["owner"]) == 6, "random directions explain nothing"
    d = [b @ a / (b @ a).norm() for a, b in pairs]
    u, sing, v = torch.linalg.svd(0.6 * d[0] - 1.1 * d[1])
    mix = (v[:5], u * sing)
    size = (0.6 * d[0] - 1.1 * d[1]).norm()
    for new, alpha in ((pairs[1], [0, 1]), (mix, [0.6 / size, -1.1 / size])):
        less, more = (sd_lora.with_direction(old, *new, True, limit) for limit in (9e-4, None))
        assert len(less["owner"]) == 6 and len(more["owner"]) == 6 + len(new[0])
        torch.testing.assert_close(less["share"][:2, 2], torch.as_tensor(alpha).double(), atol=1e-9, rtol=0)
        zero, s = (drawn(1, 7), torch.zeros(5, 1).double()), drawn(4, seed=8)
        x, y = (sd_lora.joined(one, *zero, s) for one in (less, more))
        torch.testing.assert_close(x[1] @ x[0], y[1] @ y[0], atol=1e-9, rtol=0)
    a, b = drawn(3, 7, seed=30), drawn(5, 3, seed=31)
    unit = b / (b @ a).norm()
    alpha, rest = sd_lora.explained(old, a, unit)
    columns = torch.stack([one.flatten() for one in d], dim=1)
    exact = torch.linalg.lstsq(columns, (unit @ a).flatten()[:, None])
    torch.testing.assert_close(alpha, exact.solution[:, 0])
    assert rest == pytest.approx(float((columns @ exact.solution - (unit @ a).flatten()[:, None]).square().sum()))


def test_sd_lora_in_a_stream():
    options = ("learner.lr=0.05", "learner.pet.rank=4", "learner.reduce_at=[1,2]", "learner.reduce_to=[3,2]")
    t, learner, runtime, pipeline, seen = learned("learner=sd_lora", *options, sizes=[2, 2, 2], experiences=1)
    state = learner.pet.state()
    assert len(learner.magnitudes) == 1 and learner.magnitudes[0] != 0.8 and learner.directions["0/q"]["owner"].numel() == 0
    seen.append(t.learn(learner, runtime, pipeline, 1))
    assert list(learner.directions) == [f"{i}/{target}" for i in range(len(learner.model.net.blocks)) for target in "qv"]
    for name, found in learner.directions.items():
        a, b = state[f"{name}/a"], state[f"{name}/b"]
        torch.testing.assert_close(found["a"], a)
        torch.testing.assert_close(found["b"], b / (a.norm() * b.norm()))
    own = learner.pet.state()
    assert own["0/q/b"][:, :3].abs().min() > 0 and own["0/q/b"][:, 3].abs().max() == 0, "rank 3 from experience 1 on"
    before = detached(learner.directions), learner.head.blocks[0].weight.clone()
    log_rank = t.learn(learner, runtime, pipeline, 2) and len(learner.terms()["0/q/a"])
    assert log_rank == 4 + 3 + 2 and len(learner.magnitudes) == 3
    assert torch.equal(learner.directions["1/v"]["a"][:4], before[0]["1/v"]["a"]), "directions stand still"
    assert torch.equal(learner.head.blocks[0].weight, before[1]), "so do rows of classes that are not there"
    x = seen[0].train.batch(range(4)).x
    terms = {name: value.detach().double() for name, value in learner.terms().items()}
    merged = trial("learner=ncm").start()[0].model
    with torch.no_grad():
        for name in learner.layers:
            i, target = name.split("/")
            layer, rows = linear_of(merged.net.blocks[int(i)], target)
            rows.of(layer.weight).add_((terms[f"{name}/b"] @ terms[f"{name}/a"]).float())
        one = learner.predict(seen[0].train.batch(range(4)))
        torch.testing.assert_close(learner.head(merged.eval().features(x)), one, atol=1e-5, rtol=1e-4)


def test_one_experience_is_plain_lora_with_a_scale():
    """T = 1: the released terms of `pet=lora` with a scale to learn, shared by all layers, are the same function."""
    _, learner, *_, (e,) = learned("learner=sd_lora", "learner.lr=0.05", experiences=1)
    bare, runtime, _ = trial("learner=ncm").start()
    plain = lora(bare.model, runtime, rank=10, targets=("q", "v"), scale=float(learner.magnitudes[0].detach()))
    plain.insert(learner.pet.state())
    x = e.train.batch(range(4))
    with torch.no_grad():
        torch.testing.assert_close(bare.model.eval().features(x.x), features(learner, x), atol=1e-5, rtol=1e-4)


def features(learner, batch):
    with torch.no_grad(), learner.pet.use(learner.terms()):
        return learner.model.eval().features(batch.x)


def test_sd_lora_drops_nothing_by_default_and_all_of_one_layer_where_it_may():
    _, learner, *_ = learned("learner=sd_lora", "learner.redundant=1e9", "learner.lr=0.05", experiences=3)
    assert all(len(found["owner"]) == 10 and found["share"].shape == (2, 2) for found in learner.directions.values())
    assert np.isfinite(learner.magnitudes.detach().numpy()).all()


# --- CoFiMA


def test_average_of_weights_by_hand_and_at_its_ends():
    old, new = drawn(40, seed=1), drawn(40, seed=2)
    f_old, f_new = drawn(40, seed=3).square(), drawn(40, seed=4).square()
    f_old[:5], f_new[3:8] = 0, 0
    for share in (0.0, 0.3, 0.5, 1.0):
        found = cofima.weighted(old, new, f_old, f_new, share)
        for i in range(40):
            a, b = (1 - share) * float(f_old[i]), share * float(f_new[i])
            expected = (a * old[i] + b * new[i]) / (a + b) if a + b > 0 else (1 - share) * old[i] + share * new[i]
            assert float(found[i]) == pytest.approx(float(expected), abs=1e-12)
        scaled = cofima.weighted(old, new, 7 * f_old, 7 * f_new, share)
        torch.testing.assert_close(found, scaled, atol=1e-12, rtol=0)
        flat = cofima.weighted(old, new, torch.full((40,), 3.0), torch.full((40,), 3.0), share)
        torch.testing.assert_close(flat, (1 - share) * old + share * new, atol=1e-12, rtol=0)
    assert torch.equal(cofima.weighted(old, new, f_old, f_new, 0.0), old)
    assert torch.equal(cofima.weighted(old, new, f_old, f_new, 1.0), new)
    tiny = torch.full((1,), 1e-38)
    assert float(cofima.weighted(torch.zeros(1), torch.ones(1), tiny, 3 * tiny, 0.5)) == pytest.approx(0.75)


def fisher_by_loop(learner, data, key):
    """Mean over batches of the squared gradient of the mean cross-entropy over all classes, at most 1e-4."""
    batches = shuffled(data, learner.batch_size, 1, key)
    named = {**{f"model.{n}": p for n, p in learner.model.named_parameters()}}
    named |= {f"heads.{n}": p for n, p in learner.aligned.named_parameters()}
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    for step in range(batches.steps):
        batch = batches(step)
        f = learner.model.features(batch)
        z = torch.cat([f @ block.weight.T + block.bias for block in learner.aligned.blocks], dim=1)
        (-z.log_softmax(1)[torch.arange(len(f)), batch.y].mean()).backward()
        for name, p in named.items():
            total[name] += p.grad**2 / batches.steps
            p.grad = None
    return {name: value.clamp(max=1e-4) for name, value in total.items()}


@pytest.mark.parametrize("words", [(), ("learner.official_new_head=true",), ("learner.fisher=false",)])
def test_cofima_averages_what_was_deployed_with_what_was_trained(monkeypatch, words):
    options = ("learner=cofima", "learner.align_epochs=1", "learner.batch_size=16", "learner.slow=0.5", "learner.share=0.4")
    t = trial(*options, *words, sizes=[2, 2, 2])
    learner, runtime, pipeline = t.start()
    t.learn(learner, runtime, pipeline, 0)
    deployed, old_fisher = detached(learner.deployed.state_dict()), dict(learner.fisher)
    assert not old_fisher or old_fisher["heads.blocks.0.bias"].max() <= torch.tensor(1e-4)
    trained_to, real = {}, cofima.Slca._slow_learning

    def spy(self, experience, first):
        log = real(self, experience, first)
        trained_to.update(detached(self.deployed.state_dict()))
        trained_to["fisher"] = fisher_by_loop(self, experience.train, self.runtime.key("fisher"))
        return log

    monkeypatch.setattr(cofima.Slca, "_slow_learning", spy)
    monkeypatch.setattr(cofima.Slca, "_alignment", lambda self, experience: {})
    t.learn(learner, runtime, pipeline, 1)
    fisher = trained_to.pop("fisher")
    assert bool(learner.fisher) == (words != ("learner.fisher=false",))
    for name, now in learner.deployed.state_dict().items():
        if learner.fisher:
            torch.testing.assert_close(learner.fisher[name], fisher[name], atol=1e-9, rtol=1e-3)
        new = trained_to[name]
        f = learner.fisher.get(name, torch.ones(()))
        if name in deployed:
            expected = cofima.weighted(deployed[name], new, old_fisher.get(name, torch.ones(())), f, 0.4)
            assert name.startswith("heads") or not torch.equal(deployed[name], new), "slow learning moves the whole backbone"
        else:
            assert name.startswith("heads.blocks.1")
            expected = f * new if words == ("learner.official_new_head=true",) else new
        torch.testing.assert_close(now, expected)
    assert torch.equal(learner.head.blocks[1].weight, trained_to["heads.blocks.1.weight"]), "training goes on from it"


# --- TUNA


def test_universal_adapter_entry_by_entry():
    states = [{"0/up": drawn(3, 4, seed=i), "0/up_bias": drawn(3, seed=9 + i)} for i in range(4)]
    found = tuna.universal(states)
    for name in states[0]:
        for index in np.ndindex(*states[0][name].shape):
            values = [float(state[name][index]) for state in states]
            sign = 1 if sum(values) > 0 else -1
            agreeing = [abs(v) for v in values if v * sign > 0]
            assert float(found[name][index]) == pytest.approx(sign * max(agreeing, default=0))
    for other in ([states[i] for i in (2, 0, 3, 1)], [{n: -v for n, v in state.items()} for state in states]):
        again, flip = tuna.universal(other), other[0]["0/up"].equal(-states[0]["0/up"])
        assert all(torch.equal(again[name], -found[name] if flip else found[name]) for name in found)
    assert all(torch.equal(tuna.universal([states[1]] * n)[name], states[1][name]) for n in (1, 3) for name in found)
    hand = [{"x": torch.tensor([1.0, -3.0, 2.0, 0.0, -1.0])}, {"x": torch.tensor([2.0, 1.0, -1.0, 0.0, 1.0])}]
    assert tuna.universal(hand)["x"].tolist() == [2.0, -3.0, 2.0, 0.0, -1.0]


def test_likeness_of_adapters_against_loops():
    new, old = ({f"{i}/up": drawn(5, 3, seed=i + s) for i in range(2)} | {"0/down": drawn(3, 5)} for s in (0, 7))
    for absolute in (False, True):
        parts = []
        for i in range(2):
            u, v = new[f"{i}/up"], old[f"{i}/up"]
            cosines = [float(u[j] @ v[k] / (u[j].norm() * v[k].norm())) for j in range(5) for k in range(5)]
            parts.append(np.mean(np.abs(cosines)) if absolute else abs(np.mean(cosines)))
        assert float(tuna.likeness(new, old, absolute)) == pytest.approx(np.mean(parts))


def test_entropy_of_sure_and_even_answers():
    assert tuna.entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]])).tolist() == pytest.approx([0, math.log(2)])


def test_tuna_answers_with_the_surest_adapter_and_the_universal_one():
    options = ("learner=tuna", "learner.lr=0.3", "learner.align_epochs=1", "learner.pet.scale=1", "learner.pet.bottleneck=4")
    t, learner, runtime, pipeline, seen = learned(*options, sizes=[2, 2, 2], experiences=1, narrow=())
    x = seen[0].train.batch(range(5))
    only = learner.predict(x)
    assert torch.equal(only["both"], only["universal"]) and len(learner.bank) == 1
    seen += [t.learn(learner, runtime, pipeline, i) for i in (1, 2)]
    assert len({float(state["0/down"].sum()) for state in learner.bank}) == 3, "every experience has a fresh adapter"
    with torch.no_grad(), learner.pet.use(learner.bank[2]):
        f = torch.cat([learner.model.features(b.x) for b in seen[2].train.test_batches(8)]).double()
    y = torch.as_tensor(seen[2].train.y)
    torch.testing.assert_close(learner.gaussians.mean_KD[4].double(), f[y == 4].mean(0), atol=1e-4, rtol=1e-4)
    centred = f[y == 5] - f[y == 5].mean(0)
    expected = centred.T @ centred / (len(centred) - 1) + 1e-4 * torch.eye(f.shape[1]).double()
    torch.testing.assert_close(learner.gaussians.cov_KDD[5].double(), expected, atol=1e-4, rtol=1e-3)
    learner.bank = [
        {n: v + 0.05 * drawn(*v.shape, seed=40 * i + k).float() for k, (n, v) in enumerate(state.items())}
        for i, state in enumerate(learner.bank)
    ]
    learner.load_state_dict(detached(learner.state_dict()))
    common, chosen = tuna.universal(learner.bank), []
    rows = torch.nn.functional.normalize(torch.cat([block.weight for block in learner.head.blocks]), dim=1)

    def answer(state, image):
        with torch.no_grad(), learner.pet.use(state):
            f = learner.model.eval().features(image)[0]
        return (20 * rows @ f / f.norm()).softmax(0).detach()

    for i in range(3):
        data = open_eval(t.scenario, i, pipeline).data
        z = t.scores(learner, pipeline, i, 6)
        for j in range(len(data)):
            image = data.batch([j]).x
            answers = [answer(state, image) for state in learner.bank]
            spread = [-sum(float(p) * math.log(float(p)) for p in one if p > 0) for one in answers]
            chosen.append(int(np.argmin(spread)))
            torch.testing.assert_close(z[j], answers[chosen[-1]] + answer(common, image), atol=1e-4, rtol=1e-3)
    assert len(set(chosen)) > 1, "no adapter was ever chosen over another"


def test_tuna_may_go_on_from_the_adapter_before(monkeypatch):
    options = ("learner=tuna", "learner.lr=0", "learner.align_epochs=0", "learner.pet.bottleneck=4")
    for start, same in (("fresh", False), ("previous", True)):
        _, learner, *_ = learned(*options, f"learner.start={start}", sizes=[2, 2, 2])
        assert torch.equal(learner.bank[0]["0/down"], learner.bank[1]["0/down"]) == same
