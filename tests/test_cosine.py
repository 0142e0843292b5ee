"""LUCIR, GPM, CLS-ER and PASS against naive versions of their formulas."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clbench.config.compose import compose
from clbench.interfaces import Capabilities, Place, UserError, declared
from clbench.learners import cls_er, gpm, lucir, pass_prototypes
from clbench.models.backbone import build_backbone
from clbench.models.heads import LOWEST
from clbench.streams import rng
from clbench.streams.images.data import ImageBatch
from clbench.testing.contract import Trial, small_stream
from clbench.training.state import detached, fingerprint

MLP = ("model=mlp", "model.kwargs.img_size=8", "model.kwargs.hidden=[12]")
FAST = ("learner.lr=0.1", "learner.backbone_lr=0.1", "learner.batch_size=8")


def trial(*words, kind="class_incremental", **stream):
    (config,) = compose([*MLP, *words])
    return Trial(config, small_stream(kind, **stream), Capabilities())


def learned(*words, experiences=1, **stream):
    t = trial(*words, **stream)
    learner, runtime, pipeline = t.start()
    for i in range(experiences):
        t.learn(learner, runtime, pipeline, i)
    return t, learner, runtime, pipeline


class Stopped(Exception):
    pass


def before_training(monkeypatch, module, t, learner, runtime, pipeline, index):
    """What `fit` is given in an experience, which then does not train: loss, batches and hooks."""

    def fit(runtime, name, learner, groups, loss, batches, recipe, **hooks):
        raise Stopped(SimpleNamespace(loss=loss, batches=batches, groups=groups, **hooks))

    with monkeypatch.context() as patch:
        patch.setattr(module, "fit", fit)
        with pytest.raises(Stopped) as stopped:
            t.learn(learner, runtime, pipeline, index)
    return stopped.value.args[0]


def moved(model, size=0.1):
    """Weights elsewhere."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(size * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))


def weights_of(model):
    return detached(dict(model.named_parameters()))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("lucir learner.hardest=0", r"learner\.hardest must be at least 1, got 0"),
        ("lucir learner.balance_epochs=-1", r"learner\.balance_epochs must be at least 0"),
        ("lucir learner.eta=0", r"learner\.eta must be above 0"),
        ("gpm learner.energy=0", r"learner\.energy must lie in \(0, 1\]"),
        ("gpm learner.energy=1.1", r"learner\.energy must lie in \(0, 1\]"),
        ("gpm learner.rise=-0.1", r"learner\.rise be at least 0"),
        ("gpm learner.samples=0", r"learner\.samples must be at least 1"),
        ("gpm learner.head=both", r"learner\.head must be"),
        ("cls_er learner.answer=slow", r"learner\.answer=slow: choose stable, plastic, working"),
        ("cls_er learner.stable_rate=1.5", r"learner\.stable_rate must lie between 0 and 1, got 1\.5"),
        ("cls_er learner.plastic_decay=-1", r"learner\.plastic_decay must lie between 0 and 1"),
        ("pass learner.variant=paper", r"learner\.variant=paper: choose official or pycil"),
        ("pass learner.rotations=2", r"learner\.rotations=2: choose 1 or 4"),
        ("pass learner.reduction=norm", r"learner\.reduction=norm: choose sum or mean"),
        ("pass learner.temperature=0", r"learner\.temperature must be above 0"),
    ],
)
def test_bad_options_are_named(words, said):
    with pytest.raises(UserError, match=said):
        trial(*f"learner={words}".split()).start()


# --- LUCIR


def naive_margin(cosines, y, known, margin, hardest):
    parts = []
    for row, label in zip(cosines, y, strict=True):
        if label < known:
            parts += [max(0.0, margin - row[label] + rival) for rival in sorted(row[known:], reverse=True)[:hardest]]
    return np.mean(parts) if parts else 0.0


def test_margin_between_old_and_new_classes():
    cosines = torch.rand(9, 7, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    y = torch.tensor([0, 1, 2, 3, 4, 5, 6, 3, 0])
    for known, hardest in ((4, 2), (4, 3), (6, 2), (4, 9)):
        found = lucir.margin_term(cosines, y, known, 0.5, hardest)
        assert float(found) == pytest.approx(naive_margin(cosines.tolist(), y.tolist(), known, 0.5, hardest)) and found > 0
    assert lucir.margin_term(cosines[4:7], y[4:7], 4, 0.5, 2) == 0, "no old sample"
    assert lucir.margin_term(cosines, y, 7, 0.5, 2) == 0, "no new class"


def test_loss_of_lucir(monkeypatch):
    words = ("learner=lucir", "learner.less_forget=3", "learner.ranking=2", "learner.margin=0.4", "learner.eta=4", *FAST)
    t, learner, runtime, pipeline = learned(*words, experiences=2)
    old, rows = copy.deepcopy(learner.model), torch.cat([block.weight for block in learner.head.blocks]).detach()
    found = before_training(monkeypatch, lucir, t, learner, runtime, pipeline, 2)
    batch = next(b for b in map(found.batches, range(found.batches.steps)) if 0 < (b.y < 4).sum() < len(b))
    eta = float(learner.head.sigma.detach())
    all_rows = torch.cat([block.weight for block in learner.head.blocks]).detach()
    assert torch.equal(all_rows[:4], rows) and len(all_rows) == 6
    for step in range(2):
        f, before = (m.features(batch).detach().double() for m in (learner.model, old))
        cosines = F.normalize(f, dim=1) @ F.normalize(all_rows.double(), dim=1).T
        entropy = -(eta * cosines).log_softmax(1)[torch.arange(len(f)), batch.y].mean()
        pairs = zip(f.numpy(), before.numpy(), strict=True)
        apart = np.mean([1 - np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs])
        assert (apart > 1e-3) == (step == 1), "the network has not moved yet"
        naive = entropy + 3 * np.sqrt(4 / 2) * apart + 2 * naive_margin(cosines.tolist(), batch.y.tolist(), 4, 0.4, 2)
        assert float(found.loss(batch).detach()) == pytest.approx(float(naive), rel=1e-4)
        moved(learner.model)


def test_imprinted_rows_and_rows_that_stand_still(monkeypatch):
    t, learner, runtime, pipeline = learned("learner=lucir", *FAST)
    first = detached(learner.head.blocks[0].weight)
    before_training(monkeypatch, lucir, t, learner, runtime, pipeline, 1)
    data = t.open(1, pipeline).train
    f = torch.cat([learner.model.features(b) for b in data.test_batches(5)]).detach().double().numpy()
    mean = np.mean([row / np.linalg.norm(row) for row in f], axis=0)
    wanted = mean / np.linalg.norm(mean) * np.mean([np.linalg.norm(row) for row in first.double().numpy()])
    np.testing.assert_allclose(learner.head.blocks[1].weight.detach().double().numpy()[0], wanted, rtol=1e-4, atol=1e-6)
    t, learner, runtime, pipeline = learned("learner=lucir", *FAST, experiences=2)
    assert torch.equal(learner.head.blocks[0].weight, first), "weight decay and momentum do not move old rows"
    f = learner.model.features(next(data.test_batches(5)))
    torch.testing.assert_close(learner.head(7 * f), learner.head(f))


def test_balanced_steps_train_the_head_alone(monkeypatch):
    words = ("learner=lucir", *FAST)
    plain = learned(*words, experiences=2)[1]
    t, learner, runtime, pipeline = learned(*words)
    learner.balance_epochs, learner.balance_lr, seen, rates = 4, 0.05, [], []
    real = lucir.fit

    def fit(runtime, name, own, groups, loss, batches, recipe):
        if name == "balance":
            rates.extend(groups[0]["lr"] * recipe.schedule(Place(1, i, batches.steps, i)) for i in range(batches.steps))
            seen.extend(batches(i) for i in range(batches.steps))
        return real(runtime, name, own, groups, loss, batches, recipe)

    monkeypatch.setattr(lucir, "fit", fit)
    used = runtime.meter.visits["replayed"]
    t.learn(learner, runtime, pipeline, 1)
    y = torch.cat([batch.y for batch in seen])
    assert y.bincount().tolist() == [12] * 4, "three samples of each class, four times"
    assert rates == pytest.approx([0.05] * 4 + [0.005] * 4)
    assert all(batch.replayed == len(batch) for batch in seen) and runtime.meter.visits["replayed"] >= used + 48
    assert fingerprint(learner.model.state_dict()) == fingerprint(plain.model.state_dict())
    assert not torch.equal(learner.head.blocks[0].weight, plain.head.blocks[0].weight), "old rows train too"


def test_the_last_relu_goes():
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for name, options, known in (("mlp", {"img_size": 32}, True), ("resnet18_slim", {}, True), ("convnet", {}, False)):
        model = build_backbone("m", name, options, profile="small", stem="small" if known and name != "mlp" else None)
        moved(model)  # the last residual branch is 0 at the start
        model.eval()
        assert (model.features(x) >= 0).all() and lucir.drop_last_relu(model.net) == known
        assert (model.features(x) < 0).any() == known
    for keep in (True, False):
        model = learned("learner=lucir", f"learner.last_relu={keep}", *FAST)[1].model
        assert (model.features(x[..., :8, :8]) >= 0).all() == keep


# --- GPM


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(5, 4), nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, (3, 2), stride=2, padding=(2, 1), dilation=(1, 2))],
    ids=["linear", "conv", "strided"],
)
def test_inputs_are_what_weights_are_multiplied_with(layer):
    g = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Linear):
        x = torch.randn(2, 3, 5, generator=g)
        assert torch.equal(gpm.inputs(layer, x), x.reshape(6, 5))
        return
    x = torch.randn(2, layer.in_channels, 7, 6, generator=g)
    padded, out, rows = F.pad(x, [layer.padding[1]] * 2 + [layer.padding[0]] * 2), layer(x), []
    for image in padded:
        for i in range(out.shape[2]):
            for j in range(out.shape[3]):
                top, left = i * layer.stride[0], j * layer.stride[1]
                patch = [
                    image[c, top + a * layer.dilation[0], left + b * layer.dilation[1]]
                    for c in range(layer.in_channels)
                    for a in range(layer.kernel_size[0])
                    for b in range(layer.kernel_size[1])
                ]
                rows.append(torch.stack(patch))
    found = gpm.inputs(layer, x)
    assert torch.equal(found, torch.stack(rows))
    product = (found @ layer.weight.flatten(1).T + layer.bias).detach()
    torch.testing.assert_close(product, out.permute(0, 2, 3, 1).flatten(0, 2).detach(), atol=1e-5, rtol=1e-5)


def naive_grown(basis, r, share):
    """Left singular vectors of what is left of R join one by one, until the share of |R|^2 is held."""
    basis, r = basis.numpy(), r.numpy()
    left = r - basis @ (basis.T @ r)
    u, s, _ = np.linalg.svd(left)
    whole, held, count = (r**2).sum(), (r**2).sum() - (left**2).sum(), 0
    while held < share * whole:
        held, count = held + s[count] ** 2, count + 1
    return np.concatenate([basis, u[:, :count]], axis=1)


def test_directions_join_until_the_energy_is_held():
    basis = torch.zeros(9, 0).double()
    for t in range(5):
        g, sizes = torch.Generator().manual_seed(t), 0.7 ** torch.arange(9).double()
        mix = torch.linalg.qr(torch.randn(9, 9, generator=g, dtype=torch.float64)).Q
        r, share = mix @ (sizes[:, None] * torch.randn(9, 30, generator=g, dtype=torch.float64)), 0.8 + 0.04 * t
        wanted, wide = naive_grown(basis, r, share), basis.shape[1]
        basis = gpm.grown(basis, r @ r.T, share)
        np.testing.assert_allclose((basis @ basis.T).numpy(), wanted @ wanted.T, atol=1e-9)
        assert wide <= basis.shape[1] == wanted.shape[1] <= 9
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]).double(), atol=1e-10, rtol=0)
    assert gpm.grown(basis, r @ r.T, 1.0).shape == (9, 9) and gpm.grown(torch.eye(9).double(), r @ r.T, 1.0).shape == (9, 9)
    low = r[:, :3] @ r[:, :3].T  # three inputs
    assert gpm.grown(torch.zeros(9, 0).double(), low, 1.0).shape == (9, 3)
    assert gpm.grown(torch.zeros(9, 0).double(), 0 * low, 0.9).shape == (9, 0), "no input at all"


def test_weights_leave_earlier_inputs_alone():
    words = ("learner=gpm", "learner.lr=0.05", "learner.backbone_lr=0.05", "learner.batch_size=8", "learner.energy=0.9")
    t, learner, runtime, pipeline = learned(*words, "model=convnet", "model.kwargs.img_size=8", "model.kwargs.maps=[3]",
                                            "model.kwargs.hidden=6", kind="task_incremental", sizes=[2, 2, 2])  # fmt: skip
    for i in (1, 2):
        bases, before, state = dict(learner.bases), weights_of(learner.model), detached(learner.model.state_dict())
        energies = learner.energies(t.open(0, pipeline)) if i == 1 else {}
        t.learn(learner, runtime, pipeline, i)
        for name, layer in learner.layers.items():
            step = (layer.weight.detach() - before[f"{name}.weight"]).flatten(1)
            assert 0 < bases[name].shape[1] < len(bases[name]) and step.norm() > 1e-3, name
            assert (step @ bases[name]).abs().max() < 1e-6
            if i == 1:  # outputs for the first task's inputs move by what was left out at most
                left = (1 - 0.9) * energies[name].trace() * torch.linalg.matrix_norm(step.double(), 2) ** 2
                assert 0 < (step.double() @ energies[name] @ step.double().T).trace() <= left
            assert bases[name].shape[1] <= learner.bases[name].shape[1] <= len(bases[name])
        rest = [name for name in state if name.removesuffix(".weight") not in learner.layers]
        assert len(rest) > 6 and all(torch.equal(state[name], learner.model.state_dict()[name]) for name in rest)


def test_what_is_held_whole_is_not_forgotten():
    """All directions of all training images: their answers stay, while the second task is learned."""
    words = ("learner=gpm", "learner.energy=1", "learner.lr=0.2", "learner.backbone_lr=0.2", "learner.batch_size=6")
    t, learner, runtime, pipeline = learned(*words, "model.kwargs.hidden=[60]", kind="task_incremental", limit_train=5)
    data = t.open(0, pipeline).train
    before = torch.cat([learner.predict(b) for b in data.test_batches(15)]).detach()[:, :3]
    weight = detached(learner.layers["net.layers.0.0"].weight)
    t.learn(learner, runtime, pipeline, 1)
    t.learn(learner, runtime, pipeline, 2)
    after = torch.cat([learner.predict(b) for b in data.test_batches(15)]).detach()[:, :3]
    torch.testing.assert_close(after, before, atol=2e-5, rtol=0)
    assert (learner.layers["net.layers.0.0"].weight - weight).abs().max() > 1e-3


def test_one_head_is_a_layer():
    words = ("learner=gpm", "learner.head=single", "learner.energy=0.8", *FAST)
    t, learner, runtime, pipeline = learned(*words)
    (block,), basis = learner.head.blocks, learner.bases["head"]
    before = detached(block.state_dict())
    t.learn(learner, runtime, pipeline, 1)
    step = block.weight.detach() - before["weight"]
    assert step.norm() > 1e-3 and (step @ basis).abs().max() < 1e-6 and 0 < basis.shape[1] < 12
    assert torch.equal(block.bias, before["bias"]) and learner.head.blocks[1].bias.abs().sum() > 0
    assert declared(gpm.Gpm, {}).needs_task_id and not declared(gpm.Gpm, {"head": "single"}).needs_task_id


# --- CLS-ER

ONCE = {"operators": ["single_pass"], "budget": {"epochs": 1, "exemplars": 9}}
SLOW = ("learner.batch_size=6", "learner.lr=0.05", "learner.backbone_lr=0.05")


def test_without_its_own_term_the_working_network_is_er():
    _, own, *_ = learned("learner=cls_er", "learner.strength=0", "learner.answer=working", *SLOW, experiences=3, **ONCE)
    _, er, *_ = learned("learner=er", *SLOW, experiences=3, **ONCE)
    assert fingerprint(own.model.state_dict()) == fingerprint(er.model.state_dict())
    assert fingerprint(own.head.state_dict()) == fingerprint(er.head.state_dict())


def test_averages_follow_step_by_step(monkeypatch):
    """From the working weights of every step; a rate of 1 without memory is the working network itself."""
    found, real = [], cls_er.fit

    def fit(runtime, name, learner, groups, loss, batches, recipe, after_step):
        if len(found) == 0:
            found.append((runtime.key("follow", "plastic"), weights_of(learner.plastic.model)))

        def after(place, batch):
            after_step(place, batch)
            found.append((runtime.key("follow", "plastic"), place.step, weights_of(learner.model)))
            same = fingerprint(learner.stable.model.state_dict()) == fingerprint(learner.model.state_dict())
            assert same and fingerprint(learner.stable.classifier.state_dict()) == fingerprint(learner.head.inner.state_dict())

        return real(runtime, name, learner, groups, loss, batches, recipe, after_step=after)

    monkeypatch.setattr(cls_er, "fit", fit)
    words = ("learner.stable_rate=1", "learner.stable_decay=0", "learner.plastic_rate=0.6", "learner.plastic_decay=0.7")
    _, learner, *_ = learned("learner=cls_er", *words, *SLOW, experiences=2, **ONCE)
    average, followed = found[0][1], 0
    for number, (key, step, weights) in enumerate(found[1:], 1):
        if rng.uniform(key, np.array(step)) < 0.6:
            keep, followed = min(1 - 1 / (number + 1), 0.7), followed + 1
            average = {name: keep * average[name] + (1 - keep) * w for name, w in weights.items()}
    assert 0 < followed < len(found) - 1 == learner.steps == 8
    torch.testing.assert_close(weights_of(learner.plastic.model), average)


def test_loss_of_cls_er(monkeypatch):
    t, learner, runtime, pipeline = learned("learner=cls_er", "learner.strength=0.7", *SLOW, **ONCE)
    found = before_training(monkeypatch, cls_er, t, learner, runtime, pipeline, 1)
    batch = found.batches(1)
    moved(learner.plastic.model)
    moved(learner.stable.model, -0.2)
    moved(learner.plastic.classifier, 0.5)
    z_p, z_s = (one.classifier(one.model.features(batch.old)).detach() for one in (learner.plastic, learner.stable))
    wanted, chosen = [], set()
    for p, s, label in zip(z_p, z_s, batch.old.y, strict=True):
        chosen.add(is_stable := bool(s.softmax(0)[label] > p.softmax(0)[label]))
        wanted.append(s if is_stable else p)
    assert chosen == {True, False}
    x = torch.cat([batch.new.x, batch.old.x])
    z, y = learner.head(learner.model.features(x)), torch.cat([batch.new.y, batch.old.y])
    naive = -z.log_softmax(1)[torch.arange(len(y)), y].mean()
    naive = naive + 0.7 * ((z[len(batch.new) :] - torch.stack(wanted)) ** 2).mean()
    assert z.shape[1] == 4 and float(found.loss(batch).detach()) == pytest.approx(float(naive.detach()), rel=1e-5)


def test_who_answers_and_for_which_classes(monkeypatch):
    t, learner, runtime, pipeline = learned("learner=cls_er", *SLOW, **ONCE)
    batch = ImageBatch.of(torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    f = {name: getattr(learner, name) for name in ("stable", "plastic")}
    z = {name: one.classifier(one.model.features(batch)) for name, one in f.items()}
    z["working"] = learner.head(learner.model.features(batch))
    for learner.answer in ("stable", "plastic", "working"):
        torch.testing.assert_close(learner.predict(batch), z[learner.answer])
    assert not torch.allclose(z["stable"], z["working"])
    before_training(monkeypatch, cls_er, t, learner, runtime, pipeline, 1)
    for learner.answer in ("stable", "plastic", "working"):
        assert (learner.predict(batch)[:, 3] == LOWEST).all(), "its first sample has not come"


# --- PASS


def test_orientations_are_classes():
    x, y = torch.arange(8.0).reshape(2, 1, 2, 2), torch.tensor([3, 0])
    views, labels = pass_prototypes.turned(x, y, 4)
    assert labels.tolist() == [12, 13, 14, 15, 0, 1, 2, 3]
    for i in range(8):
        np.testing.assert_array_equal(views[i, 0].numpy(), np.rot90(x[i // 4, 0].numpy(), i % 4))
    views, labels = pass_prototypes.turned(x, y, 1)
    assert torch.equal(views, x) and torch.equal(labels, y)


@pytest.mark.parametrize("variant", ["official", "pycil"])
def test_means_and_radius(variant):
    t, learner, _, pipeline = learned("learner=pass", f"learner.variant={variant}", *FAST)
    data, spread = t.open(0, pipeline).train, []
    f = torch.cat([learner.model.features(b) for b in data.test_batches(9)]).detach().double().numpy()
    for c in range(3):
        own = f[data.y == c]
        np.testing.assert_allclose(learner.means_KD[c].numpy(), own.mean(0), rtol=1e-4, atol=1e-6)
        spread.append(np.trace(np.cov(own.T)) / 12)
    assert learner.radius == pytest.approx(np.sqrt(np.mean(spread)), rel=1e-4)
    assert len(learner.head.blocks[0].weight) == 12
    learner.spread_K = torch.cat([learner.spread_K, torch.tensor([100.0])])
    wanted = spread if variant == "official" else [*spread, 100.0]
    assert learner.radius == pytest.approx(np.sqrt(np.mean(wanted)), rel=1e-4)


def test_noisy_means():
    _, learner, *_ = learned("learner=pass", *FAST)
    learner.means_KD, learner.spread_K = torch.randn(3, 12, generator=torch.Generator().manual_seed(0)), torch.full((3,), 4.0)
    noisy, c = learner.noisy_means(torch.tensor([0, 2]), 4000, 5)
    assert c.bincount(minlength=3).tolist()[1] == 0 and abs(int((c == 0).sum()) - 2000) < 200
    noise = noisy - learner.means_KD[c]
    assert float(noise.std()) == pytest.approx(2, rel=0.02) and abs(float(noise.mean())) < 0.05
    learner.spread_K.zero_()
    noisy, c = learner.noisy_means(torch.tensor([0, 2]), 7, 5)
    assert torch.equal(noisy, learner.means_KD[c]), "without a radius they are the means"


@pytest.mark.parametrize(("variant", "reduction"), [("official", "sum"), ("pycil", "mean")])
def test_loss_of_pass(monkeypatch, variant, reduction):
    words = (
        f"learner.variant={variant}",
        f"learner.reduction={reduction}",
        "learner.distillation=0.3",
        "learner.augmentation=2",
    )
    t, learner, runtime, pipeline = learned("learner=pass", *words, *FAST, experiences=2)
    found, old = before_training(monkeypatch, pass_prototypes, t, learner, runtime, pipeline, 2), copy.deepcopy(learner.model)
    batch, drawn, real = found.batches(3), [], learner.noisy_means
    monkeypatch.setattr(learner, "noisy_means", lambda *args: drawn.append(real(*args)) or drawn[-1])
    moved(learner.model)
    found.at_place(Place(2, 3, found.batches.steps, 3))
    loss = float(found.loss(batch).detach())
    x = torch.stack([torch.rot90(image, k, (1, 2)) for image in batch.x for k in range(4)])
    y = [4 * int(label) + k for label in batch.y for k in range(4)]
    f, before = learner.model.features(x), old.features(x)
    (noisy, c), rows = drawn[0], torch.arange(len(x))
    assert len(noisy) == 8 * (1 if variant == "official" else 4 // 2) and set(c.tolist()) <= {0, 1, 2, 3}
    naive = -(learner.head(f) / 0.1).log_softmax(1)[rows, y].mean()
    naive = naive + 0.3 * ((f - before) ** 2).sum().sqrt() / (1 if reduction == "sum" else np.sqrt(len(x)))
    naive = naive - 2 * (learner.head(noisy) / 0.1).log_softmax(1)[torch.arange(len(c)), 4 * c].mean()
    assert loss == pytest.approx(float(naive.detach()), rel=1e-4)
    found.at_place(Place(2, 4, found.batches.steps, 4))
    found.loss(batch)
    assert not torch.equal(drawn[1][0], noisy), "each step has means of its own"


def test_answers_are_those_of_upright_classes(monkeypatch):
    t, learner, runtime, pipeline = learned("learner=pass", *FAST)
    batch = ImageBatch.of(torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(learner.predict(batch), learner.head(learner.model.features(batch))[:, [0, 4, 8]])
    t, learner, runtime, pipeline = learned("learner=pass", "learner.rotations=1", *FAST)
    assert torch.equal(learner.predict(batch), learner.head(learner.model.features(batch)))
    found = before_training(monkeypatch, pass_prototypes, t, learner, runtime, pipeline, 0)
    learner.head.blocks = learner.head.blocks[:1]
    batch = found.batches(0)
    plain = F.cross_entropy(learner.head(learner.model.features(batch)) / 0.1, batch.y)
    assert torch.equal(found.loss(batch), plain)
