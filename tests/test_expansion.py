"""Networks that grow: DER, MEMO and FOSTER against naive versions, and what may not move in them."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clbench.config.compose import build, compose
from clbench.interfaces import Capabilities, Place, UserError
from clbench.learners import der_expand, foster, memo
from clbench.models.expansion import Columns, WideHead, fork_last_stage
from clbench.testing.trial import Trial, small_stream
from clbench.training import expansion
from clbench.training.state import detached, fingerprint

MLP = ("model=mlp", "model.kwargs.img_size=8", "model.kwargs.hidden=[12,8]")
CONVNET = ("model=convnet", "model.kwargs.img_size=8", "model.kwargs.maps=[3,4]", "model.kwargs.hidden=6")
VIT = ("model=nano_random", "model.kwargs.embed_dim=16", "model.kwargs.num_heads=2", "model.kwargs.depth=2")
NETS = [MLP, CONVNET, (*CONVNET, "model.norm=none"), VIT, ("model=resnet32",)]


def trial(*words, **stream):
    return Trial(compose(list(words))[0], small_stream(**stream), Capabilities())


def begun(monkeypatch, module, *words, at=1, **stream):
    """A learner after experience `at`, and what its calls of `fit` there were given: name -> (learner before, arguments)."""
    t, calls = trial(*words, **stream), {}
    learner, runtime, pipeline = t.start()
    for i in range(at):
        t.learn(learner, runtime, pipeline, i)
    real = module.fit

    def spy(runtime, name, learner, groups, loss, batches, recipe, **hooks):
        batch = batches(0)
        counts = copy.deepcopy(getattr(learner, "model", None) and learner.model.passes)
        calls[name] = {
            "loss": float(loss(batch).detach()), "batch": batch, "steps": batches.steps, "recipe": recipe, "groups": groups,
            "state": detached(learner.state_dict()),
        }  # fmt: skip
        if counts:
            learner.model.passes.update(counts)
        return real(runtime, name, learner, groups, loss, batches, recipe, **hooks)

    monkeypatch.setattr(module, "fit", spy)
    experience = t.learn(learner, runtime, pipeline, at)
    return t, learner, calls, experience, pipeline


def softmax(z):
    e = np.exp(np.asarray(z, np.float64))
    return e / e.sum()


def cross_entropy(z, y):
    return np.mean([-math.log(softmax(row)[c]) for row, c in zip(np.asarray(z), np.asarray(y), strict=True)])


def linear(state, f):
    return (f.double() @ state["weight"].double().T + state["bias"].double()).numpy()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("der_expand learner.balance=bic", r"learner\.balance=bic: choose weight_align, finetune or none"),
        ("der_expand learner.classifier=new", r"learner\.classifier=new: choose kept or fresh"),
        ("der_expand learner.reset=1", r"learner\.reset=1 from 0 to below 1"),
        ("memo learner.balance=finetune", r"learner\.balance=finetune: choose weight_align or none"),
        ("memo learner.auxiliary=-1", r"learner\.auxiliary=-1 must be at least 0"),
        ("memo model=mlp model.kwargs.hidden=[4]", "model mlp has no last stage to copy"),
        ("foster learner.deploy=both", r"learner\.deploy=both: choose compressed or boosted"),
        ("foster learner.new_on_old=az", r"learner\.new_on_old=az: choose free or zero"),
        ("foster learner.beta=1", r"learner\.beta=1 and learner\.student_beta=0\.97 must lie from 0 to below 1"),
        ("foster learner.epochs=2", r"learner\.epochs=2 and learner\.compress_epochs=1 .* at most the budget's 2 together"),
    ],
)
def test_refused_options(words, message):
    name, *rest = words.split()
    with pytest.raises(UserError, match=message):
        trial(f"learner={name}", *(() if "model=mlp" in rest else MLP), *rest).start()


def test_a_classifier_grows_around_what_it_knows():
    draw, head, f = torch.Generator().manual_seed(0), WideHead(), torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    head.grow(3, 2, draw)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([1.0, 2, 3]))
    old, state = head(f[:, :2]).detach(), detached(head.state_dict())
    head.grow(5, 4, draw)
    assert torch.equal(head.weight[:3, :2], state["weight"]) and head.bias.tolist() == [1, 2, 3, 0, 0]
    fresh = head.weight.detach()[:, 2:].abs()
    assert 0.4 < fresh.max() < math.sqrt(3 / 4) and fresh.min() > 0
    with torch.no_grad():
        head.weight[:3, 2:] = 0
    torch.testing.assert_close(head(f)[:, :3], old)
    with torch.no_grad():
        head.weight[3:] *= 2
    rows = head.weight.detach().double().numpy()
    norms = [math.sqrt(sum(v * v for v in row)) for row in rows]
    factor = head.align(3)
    assert factor == pytest.approx(np.mean(norms[:3]) / np.mean(norms[3:]), rel=1e-5)
    assert abs(factor - 1) > 0.1
    np.testing.assert_allclose(head.weight.detach().numpy(), np.concatenate([rows[:3], rows[3:] * factor]), rtol=1e-5)
    other = WideHead()
    other.load_state_dict(head.state_dict())
    weight = other.weight
    other.load_state_dict({name: 2 * value for name, value in head.state_dict().items()})
    assert other.weight is weight and torch.equal(weight, 2 * head.weight), "not filled in place"


def test_labels_of_the_auxiliary_head_and_balanced_rows():
    y = torch.tensor([4, 0, 7, 9, 4, 2])
    assert expansion.own_or_other(y, (7, 4)).tolist() == [2, 0, 1, 0, 2, 0]
    y = torch.tensor([0] * 9 + [3] * 2 + [5] * 4)
    rows = expansion.balanced_rows(y, 3)
    assert sorted(y[rows].tolist()) == [0, 0, 3, 3, 5, 5] and len(set(rows.tolist())) == 6
    assert len({tuple(expansion.balanced_rows(y, key).tolist()) for key in range(9)}) > 4, "always the same ones"


@pytest.mark.parametrize("name", ["der_expand", "memo"])
def test_loss_of_an_expanding_network(monkeypatch, name):
    module = {"der_expand": der_expand, "memo": memo}[name]
    words = (f"learner={name}", *MLP, "learner.auxiliary=0.7", "learner.batch_size=36", "learner.lr=0.05")
    t, _, calls, experience, _ = begun(monkeypatch, module, *words, sizes=[3, 2], num_classes=5)
    call, (fresh, *_) = calls["train"], t.start()
    fresh.load_state_dict(call["state"])
    y, network = call["batch"].y, fresh.columns if name == "der_expand" else fresh.model
    assert len(y) == 36 and call["batch"].replayed == 12 and call["recipe"].weight_decay == 2e-4
    with torch.no_grad():
        f = network.eval().features(call["batch"].x)
    assert f.shape == (36, 16) and torch.equal(f[:, :8], f[:, 8:]), "a new part starts as a copy of the one before"
    others = [0 if c < 3 else 1 + experience.classes.index(c) for c in y.tolist()]
    auxiliary = cross_entropy(linear(call["state"]["auxiliary"], f[:, 8:]), others)
    assert call["loss"] == pytest.approx(cross_entropy(linear(call["state"]["head"], f), y) + 0.7 * auxiliary, rel=1e-4)


@pytest.mark.parametrize("name", ["der_expand", "memo"])
def test_parts_of_earlier_experiences_stand_still(name):
    t = trial(f"learner={name}", *CONVNET, "learner.lr=0.05", *(["learner.train_base=false"] if name == "memo" else []))
    learner, runtime, pipeline = t.start()
    general = size = count = 0
    before, seen = [], torch.zeros(0)
    for i in range(3):
        if name == "memo" and i:
            count = sum(p.numel() for p in learner.fork.parts[0].parameters())
            general = sum(p.numel() for p in learner.model.parameters()) - i * count
        t.learn(learner, runtime, pipeline, i)
        parts = learner.fork.parts if name == "memo" else learner.columns.nets
        network = learner.model if name == "memo" else learner.columns
        now = [fingerprint(part.state_dict()) for part in parts]
        with torch.no_grad():
            x = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
            f = network.eval().features(x)
        if i:
            assert now[:i] == before[:i] and now[i] not in before and len(now) == i + 1
            assert torch.equal(f[:, : 6 * i], seen), "features of earlier experiences moved"
            assert any("running_mean" in key for key in parts[0].state_dict()), "no statistics that could move"
            assert not any(p.requires_grad for part in parts[:-1] for p in part.parameters())
            if name == "memo":
                assert sum(p.numel() for p in learner.model.parameters()) == general + (i + 1) * count
        before, seen, size = now, f, f.shape[1]
    assert size == 18 and learner.auxiliary.weight.numel() == 0
    assert learner.head.weight.shape == (6, 18) and len(learner.memory) == 12


def test_shared_layers_train_unless_told_otherwise():
    for base in ("true", "false"):
        t = trial("learner=memo", *CONVNET, f"learner.train_base={base}", sizes=[3, 2], num_classes=5)
        learner, runtime, pipeline = t.start()
        t.learn(learner, runtime, pipeline, 0)
        shared = {k: v for k, v in detached(learner.model.state_dict()).items() if ".parts." not in k}
        old = fingerprint(learner.fork.parts[0].state_dict())
        t.learn(learner, runtime, pipeline, 1)
        moved = [k for k, v in shared.items() if not torch.equal(v, learner.model.state_dict()[k])]
        assert len(shared) > 8 and len(moved) == (len(shared) if base == "true" else 0)
        assert fingerprint(learner.fork.parts[0].state_dict()) == old


@pytest.mark.parametrize("words", NETS, ids=lambda words: words[0][6:] + words[-1][-4:])
def test_a_forked_network_gives_every_parts_features(words):
    (config,) = compose(["learner=memo", *words])
    plain, forked = (build(config["model"]).eval() for _ in range(2))
    x = torch.linspace(-2, 2, 2 * 3 * 32 * 32).view(2, 3, 32, 32)[..., : plain.profile.size, : plain.profile.size]
    fork = fork_last_stage(forked)
    with torch.no_grad():
        expected = plain.features(x)
        assert torch.equal(forked.features(x), expected) and float(expected.std()) > 0
        fork.resize(2)
        forked.train()
        assert not any(m.training for m in fork.parts[0].modules()) and all(m.training for m in fork.parts[1].modules())
        forked.eval()
        for p in fork.parts[1].parameters():
            p.mul_(0.5)
        both = forked.features(x)
    assert both.shape[1] == 2 * plain.num_features and torch.equal(both[:, : plain.num_features], expected)
    assert not torch.equal(both[:, plain.num_features :], expected)


def test_the_split_of_a_resnet32_is_memos():
    (config,) = compose(["learner=memo", "model=resnet32"])
    model = build(config["model"])
    own = sum(p.numel() for p in fork_last_stage(model).parameters())
    shortcuts = [32 * 64 + 2 * 64, 16 * 32 + 2 * 32]  # convolutions and norms that PyCIL's network does without
    assert own == 351_488 + shortcuts[0] == 353_664
    assert sum(p.numel() for p in model.parameters()) - own == 112_016 + shortcuts[1] == 466_256 - own


def test_columns_are_restored_in_both_directions():
    (config,) = compose(["learner=der_expand", *MLP])
    columns = Columns(build(config["model"]))
    one = detached(columns.state_dict())
    columns.add()
    with torch.no_grad():
        next(columns.newest.parameters()).add_(1)
    two, other = detached(columns.state_dict()), Columns(build(config["model"]))
    other.load_state_dict(two)
    assert fingerprint(other.state_dict()) == fingerprint(two) and other.nets[0].frozen and not other.newest.frozen
    other.load_state_dict(one)
    assert fingerprint(other.state_dict()) == fingerprint(one) and not other.newest.frozen
    assert all(p.requires_grad for p in other.parameters())


def test_der_balances_its_classifier(monkeypatch):
    words = ("learner=der_expand", *MLP, "learner.lr=0.05", "learner.batch_size=16")
    heads, logs = {}, {}
    for balance in ("none", "weight_align", "finetune"):
        t = trial(*words, f"learner.balance={balance}", "learner.balance_epochs=40", sizes=[3, 2], num_classes=5)
        learner, runtime, pipeline = t.start()
        t.learn(learner, runtime, pipeline, 0)
        runtime.begin(1, 24)
        logs[balance] = learner.learn(t.open(1, pipeline))
        heads[balance] = learner.head.weight.detach().double().numpy()
        columns = fingerprint(learner.columns.state_dict())
        assert heads.get("columns", columns) == columns, "balancing moved a column"
        heads["columns"] = columns
    norms = np.linalg.norm(heads["none"], axis=1)
    factor = norms[:3].mean() / norms[3:].mean()
    assert logs["weight_align"]["factor"] == pytest.approx(factor, rel=1e-5) and "factor" not in logs["none"]
    scale = np.array([1, 1, 1, factor, factor])[:, None]
    np.testing.assert_allclose(heads["weight_align"], heads["none"] * scale, rtol=1e-5)
    assert logs["finetune"]["balance_steps"] == 40 * -(-5 * 4 // 16), "4 samples of each class are stored"
    assert logs["finetune"]["balance_loss"] < math.log(5) and np.abs(heads["finetune"] - heads["none"]).max() > 0.1


def test_refit_starts_anew_and_divides_the_logits():
    t = trial("learner=der_expand", *MLP)
    learner, runtime, _ = t.start()
    f, y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0] * 8 + [1] * 4)
    learner.head.grow(2, 4, runtime.generator("x"))
    with torch.no_grad():
        learner.head.weight.fill_(100.0)
    options = {"lr": 0.0, "epochs": 1, "batch_size": 8, "weight_decay": 0.0}
    log = expansion.refit(runtime, learner, learner.head, f, y, **options)
    assert float(learner.head.weight.detach().abs().max()) < 1
    rows = expansion.balanced_rows(y, runtime.key("balance"))
    z = linear(learner.head.state_dict(), f[rows]) / 5
    assert log["balance_loss"] == pytest.approx(cross_entropy(z, y[rows]), rel=1e-4)


def test_a_fresh_classifier_starts_again_after_a_share_of_the_steps(monkeypatch):
    found = {}
    for reset in ("0", "0.5"):
        words = ("learner=der_expand", *MLP, "learner.lr=0", "learner.batch_size=12", f"learner.reset={reset}")
        for classifier in ("kept", "fresh"):
            t = trial(*words, f"learner.classifier={classifier}", "learner.balance=none", sizes=[3, 2], num_classes=5)
            learner, runtime, pipeline = t.start()
            t.learn(learner, runtime, pipeline, 0)
            first = learner.head.weight.detach().clone()
            t.learn(learner, runtime, pipeline, 1)
            found[classifier, reset] = learner.head.weight.detach().clone()
            assert torch.equal(found[classifier, reset][:3, :8], first) == (classifier == "kept")
    assert torch.equal(found["kept", "0"], found["kept", "0.5"])
    assert not torch.equal(found["fresh", "0"], found["fresh", "0.5"]), "drawn once, not twice"


def test_class_weights_by_hand():
    n, beta = np.array([20, 500, 3]), 0.96
    raw = [(1 - beta) / (1 - beta**k) for k in n]
    np.testing.assert_allclose(foster.class_weights(n, beta), [3 * r / sum(raw) for r in raw], rtol=1e-6)
    assert foster.class_weights(n, 0.0).tolist() == [1, 1, 1]
    assert torch.equal(foster.class_weights(np.array([0, 5]), 0.9), foster.class_weights(np.array([1, 5]), 0.9))


def test_losses_of_foster(monkeypatch):
    words = (
        "learner=foster",
        *MLP,
        "learner.strength=0.8",
        "learner.temperature=3",
        "learner.lr=0.05",
        "learner.batch_size=36",
    )
    t, learner, calls, _, _ = begun(monkeypatch, foster, *words, sizes=[3, 2], num_classes=5)
    w = 5 * (raw := np.array([(1 - 0.96) / (1 - 0.96**n) for n in (4, 4, 4, 12, 12)])) / raw.sum()
    v = 5 * (raw := np.array([(1 - 0.97) / (1 - 0.97**n) for n in (4, 4, 4, 12, 12)])) / raw.sum()
    assert [call["recipe"].weight_decay for call in calls.values()] == [5e-4, 0.0] and list(calls) == ["boost", "compress"]
    assert w[0] > 1.5 * w[3]
    call, (fresh, *_) = calls["boost"], t.start()
    fresh.load_state_dict(call["state"])
    heads, y = call["state"], call["batch"].y
    with torch.no_grad():
        f, one = fresh.columns.eval().features(call["batch"].x), fresh.model.eval().features(call["batch"].x)
    assert torch.equal(f[:, :8], one) and torch.equal(f[:, 8:], one)
    z, old = linear(heads["head"], f), linear(heads["student_head"], one)[:, :3]
    assert np.array_equal(heads["head"]["weight"][:3, :8], heads["student_head"]["weight"][:3])
    kd = np.mean([-(softmax(b / 3) * np.log(softmax(a / 3))).sum() for a, b in zip(z[:, :3], old, strict=True)])
    naive = cross_entropy(z / w, y) + cross_entropy(linear(heads["auxiliary"], f[:, 8:]), y) + 0.8 * kd
    assert call["loss"] == pytest.approx(naive, rel=1e-4)

    call = calls["compress"]
    fresh.load_state_dict(call["state"])
    with torch.no_grad():
        answer = fresh.predict(call["batch"])
    assert list(answer) == ["compressed", "boosted"]
    naive = []
    for target, z in zip(answer["boosted"].numpy(), answer["compressed"].numpy(), strict=True):
        q = softmax(target / 3) * v
        naive.append(-(q / q.sum() * np.log(softmax(z / 3))).sum())
    assert call["loss"] == pytest.approx(np.mean(naive), rel=1e-4)
    assert fingerprint(learner.columns.state_dict()) == fingerprint(call["state"]["columns"]), "compression moved the teacher"
    assert not torch.equal(learner.student_head.weight, call["state"]["student_head"]["weight"])


def test_an_empty_boost_is_the_old_network(monkeypatch):
    t = trial("learner=foster", *MLP, "learner.lr=0", sizes=[3, 2], num_classes=5)
    learner, runtime, pipeline = t.start()
    t.learn(learner, runtime, pipeline, 0)
    before = learner.student_head.weight.detach().clone()
    t.learn(learner, runtime, pipeline, 1)
    with torch.no_grad():
        learner.head.weight[:, 8:] = 0
        batch = t.open(1, pipeline).train.batch([0, 3, 9])
        z = learner.predict(batch)
        torch.testing.assert_close(z["boosted"][:, :3], z["compressed"][:, :3])
        old = F.linear(learner.model.features(batch), before)
    kd = foster.prediction_distillation(z["boosted"][:, :3], old, 2.0, squared=False)
    p = (old / 2).softmax(1)
    torch.testing.assert_close(kd, -(p * p.log()).sum(1).mean())


@pytest.mark.parametrize("kind", ["free", "zero"])
def test_weights_of_new_classes_on_old_features(kind):
    t = trial("learner=foster", *MLP, f"learner.new_on_old={kind}", "learner.lr=0.05", "learner.batch_size=8")
    learner, runtime, pipeline = t.start()
    for i in range(3):
        t.learn(learner, runtime, pipeline, i)
        if i:
            known = 3 if i == 1 else 4
            block = learner.head.weight.detach()[known:, :8]
            assert bool((block == 0).all()) == (kind == "zero") and (learner.head.weight[known:, 8:] != 0).all()


def test_fosters_epochs_and_answers(monkeypatch):
    words = ("learner=foster", *MLP, "learner.batch_size=12")
    budget = {"epochs": 10, "exemplars": 12}
    t, learner, calls, _, pipeline = begun(monkeypatch, foster, *words, "learner.deploy=boosted", budget=budget)
    assert calls["boost"]["steps"] == 6 * 2 and calls["compress"]["steps"] == 4 * 2, "24 samples: 12 new, 12 stored"
    batch = t.open(1, pipeline).train.batch([0, 5])
    with torch.no_grad():
        z = learner.predict(batch)
    assert list(z) == ["boosted", "compressed"] and not torch.equal(z["boosted"], z["compressed"])
    assert {len(value) for value in z.values()} == {2}
    assert calls["boost"]["recipe"].schedule(Place(1, 6, 12, 6)) == pytest.approx(0.5), "no cosine"
    assert trial(*words, "learner.compress_epochs=3", budget=budget).start()[0].epochs == {
        "first": 10,
        "boost": 7,
        "compress": 3,
    }
    own = trial(*words, "learner.epochs=4", "learner.compress_epochs=3", budget=budget).start()[0].epochs
    assert own == {"first": 4, "boost": 4, "compress": 3}
