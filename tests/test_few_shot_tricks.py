"""Tricks of few-shot class-incremental learning, and fast and slow weights, against naive versions."""

import copy
import itertools

import numpy as np
import pytest
import torch
from small_networks import SmallTrial, backbone, images, mlp

from clbench.interfaces import BudgetExceeded, UserError
from clbench.learners.fast_slow import FastSlow
from clbench.learners.finetune import Finetune
from clbench.learners.incremental_frozen import IncrementalFrozen
from clbench.models.heads import CosineHead, LinearHead
from clbench.streams.images.data import open_experience, shuffled
from clbench.training.checkpoint import Journal
from clbench.training.contrastive import strong_view
from clbench.training.few_shot import BaseSession, least_important, mixed, pairs, rotated, simplex
from clbench.training.runtime import Runtime
from clbench.training.state import fingerprint


def started(kind, make=lambda: mlp(10), **options):
    t = SmallTrial(make, kind, batch_size=8, **options)
    learner, learn, pipeline = t.begin()
    return t, learner, learn, pipeline


def log_softmax(z):
    return z - np.log(np.exp(z).sum())


# --- the pieces


def test_the_simplex_has_equal_angles():
    for classes, features in ((2, 2), (5, 5), (6, 20)):
        rows = simplex(classes, features, 3).double()
        gram = (rows @ rows.T).numpy()
        np.testing.assert_allclose(gram, np.where(np.eye(classes), 1.0, -1 / (classes - 1)), atol=1e-6)
    assert torch.equal(simplex(4, 9, 3), simplex(4, 9, 3)) and not torch.equal(simplex(4, 9, 3), simplex(4, 9, 4))
    for classes in (1, 8):
        with pytest.raises(UserError, match=rf"learner\.etf={classes}"):
            simplex(classes, 7, 0)


def test_pairs_and_mixtures_by_hand():
    every = pairs(4, 6, torch.Generator().manual_seed(0)).tolist()
    assert sorted(every) == [list(p) for p in itertools.combinations(range(4), 2)]
    with pytest.raises(UserError, match=r"learner\.virtual=4: 3 base classes have 3 pairs"):
        pairs(3, 4, torch.Generator())
    x, y, chosen = images(12).x, torch.tensor([0, 1, 2, 3] * 3), torch.tensor([[1, 3], [0, 2]])
    found, which = mixed(x, y, chosen, torch.Generator().manual_seed(5))
    partner = torch.randperm(12, generator=torch.Generator().manual_seed(5)).tolist()
    naive = []
    for i, j in enumerate(partner):
        pair = sorted((int(y[i]), int(y[j])))
        if pair in chosen.tolist():
            naive.append((0.5 * x[i] + 0.5 * x[j], chosen.tolist().index(pair)))
    assert len(naive) >= 2 and which.tolist() == [v for _, v in naive]
    torch.testing.assert_close(found, torch.stack([image for image, _ in naive]))
    assert len(mixed(x[:1], y[:1], chosen, torch.Generator())[0]) == 0, "one image has no partner of another class"


def test_turns_by_hand():
    x = images(3).x
    found, turn = rotated(x)
    assert turn.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    for k in range(4):
        for i in range(3):
            assert np.array_equal(found[3 * k + i].numpy(), np.rot90(x[i].numpy(), k, (1, 2)))


def test_the_least_important_over_all_tensors():
    masks = least_important({"a": torch.tensor([[5.0, 1.0], [4.0, 2.0]]), "b": torch.tensor([3.0, 6.0])}, 0.5)
    assert masks["a"].tolist() == [[False, True], [False, True]] and masks["b"].tolist() == [True, False]
    assert not any(m.any() for m in least_important({"a": torch.ones(3)}, 0.0).values())


# --- the base session


@pytest.mark.parametrize("options", [{}, {"supcon": 0.3}, {"virtual": 3}, {"rotation": 0.7},
                                     {"supcon": 0.3, "virtual": 2, "rotation": 0.7}])  # fmt: skip
def test_the_loss_of_the_base_session(options):
    """Sample by sample: classes and pseudo-classes, pairs of views, turns."""
    model = backbone(mlp(10)).eval()
    runtime, head = Runtime(0, torch.device("cpu"), None), CosineHead(10)
    torch.nn.init.constant_(head.sigma, 4.0)
    session = BaseSession(runtime, model, head, **({"supcon": 0.0, "virtual": 0, "rotation": 0.0} | options), mirror=True)
    session.begin(4, 0)
    session.step = 2
    batch = images(12, y=[0, 1, 2, 3] * 3)
    loss = float(session.loss(batch).detach())

    def features(x):
        return model.features(x).detach().double().numpy()

    def unit(f):
        return f / np.linalg.norm(f, axis=1, keepdims=True)

    rows = unit(torch.cat([b.weight for b in head.blocks]).detach().double().numpy())
    assert len(rows) == 4 + options.get("virtual", 0)
    f, labels = features(batch.x), batch.y.tolist()
    if "virtual" in options:
        x, which = mixed(batch.x, batch.y, session.pairs_V2, runtime.generator("mix", 2))
        assert len(x) > 0
        f, labels = np.concatenate([f, features(x)]), labels + [4 + v for v in which.tolist()]
    expected = np.mean([-log_softmax(4.0 * rows @ u)[c] for u, c in zip(unit(f), labels, strict=True)])
    if "supcon" in options:
        view = strong_view(batch.x, runtime.key("view", 2), model.profile, True)
        two, y, total = unit(np.concatenate([features(batch.x), features(view)])), [0, 1, 2, 3] * 6, 0.0
        for i in range(24):
            others = [j for j in range(24) if j != i]
            log_p = dict(zip(others, log_softmax(two[others] @ two[i] / 0.07), strict=True))
            total -= np.mean([log_p[j] for j in others if y[j] == y[i]]) / 24
        expected += options["supcon"] * total
    if "rotation" in options:
        weight, bias = (getattr(session.turns.blocks[0], n).detach().double().numpy() for n in ("weight", "bias"))
        turned = [(np.rot90(x.numpy(), k, (1, 2)).copy(), k) for k in range(4) for x in batch.x]
        parts = [-log_softmax(weight @ features(torch.from_numpy(x)[None])[0] + bias)[k] for x, k in turned]
        expected += options["rotation"] * np.mean(parts)
    assert loss == pytest.approx(expected, rel=1e-4)


def test_what_only_the_base_session_needs_is_dropped_and_fixed_rows_stay():
    _, learner, learn, _ = started(IncrementalFrozen, etf=6, virtual=1, rotation=0.5, supcon=0.5)
    learn(0)
    assert learner.base_head.num_classes == 2 and len(learner.session.turns.blocks) == 0
    assert torch.equal(learner.base_head.blocks[0].weight.detach(), simplex(6, 10, 0)[:2])
    _, plain, learn, _ = started(IncrementalFrozen)
    learn(0)
    assert set(plain.state_dict()) == {"model", "base_head", "prototypes"}, "as it was before there were tricks"
    assert fingerprint(plain.model.state_dict()) != fingerprint(learner.model.state_dict())


# --- later sessions


@pytest.mark.parametrize("options", [{}, {"subnet": 0.4}, {"etf": 6}])
def test_finetune_against_a_naive_version(options):
    t, learner, learn, pipeline = started(IncrementalFrozen, finetune=1, finetune_lr=0.3, **options)
    learn(0)
    twin, means = copy.deepcopy(learner.model), learner.prototypes.means_KD.clone()
    twin.unfreeze()
    base, train = (open_experience(t.scenario, i, pipeline).train for i in (0, 1))
    names, weights = zip(*twin.named_parameters(), strict=True)
    squares = [torch.zeros_like(w) for w in weights]
    for first in range(0, len(base), 8):
        batch = base.batch(np.arange(first, min(first + 8, len(base))))
        loss = torch.nn.functional.cross_entropy(learner.base_head(twin.eval().features(batch)), batch.y)
        for total, g in zip(squares, torch.autograd.grad(loss, weights), strict=True):
            total += g**2
    flat = np.sort(torch.cat([s.flatten() for s in squares]).numpy())
    limit = flat[int(0.4 * len(flat)) - 1] if "subnet" in options else np.inf
    with torch.no_grad():
        f = torch.cat([twin.features(b) for b in train.test_batches(50)]).double()
        new = torch.stack([f[torch.as_tensor(train.y) == c].mean(0) for c in (2, 3)])
    rows = simplex(6, 10, 0)[:4] if "etf" in options else torch.nn.functional.normalize(torch.cat([means, new]), dim=1).float()
    sgd, before = torch.optim.SGD(weights, lr=0.3, momentum=0.9), [w.detach().clone() for w in weights]
    learner.runtime.experience = 1
    for step in range((batches := shuffled(train, 8, 1, learner.runtime.key("finetune"))).steps):
        batch = batches(step)
        z = 16.0 * torch.nn.functional.normalize(twin.features(batch), dim=1) @ rows.T
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(z, batch.y).backward()
        for w, s in zip(weights, squares, strict=True):
            w.grad[s > limit] = 0
        sgd.step()
    learn(1)
    mine = dict(learner.model.named_parameters())
    for name, w in zip(names, weights, strict=True):
        torch.testing.assert_close(mine[name].detach(), w.detach(), atol=1e-5, rtol=1e-3)
    changed = torch.cat([(mine[n].detach() != b).flatten() for n, b in zip(names, before, strict=True)]).float().mean()
    assert 0 < float(changed) <= (0.41 if "subnet" in options else 1.0)
    assert not any(p.requires_grad for p in learner.model.parameters()) and learner.model.frozen
    with torch.no_grad():
        f = torch.cat([twin.features(b) for b in train.test_batches(50)]).double()
    torch.testing.assert_close(learner.prototypes.means_KD[2], f[torch.as_tensor(train.y) == 2].mean(0), atol=1e-4, rtol=1e-3)
    assert torch.equal(learner.prototypes.means_KD[:2], means), "means of the base classes stay"


def test_a_killed_session_goes_on(tmp_path):
    """After each step of the base session and of fine-tuning."""
    options = {"finetune": 1, "finetune_lr": 0.3, "subnet": 0.5, "virtual": 1, "rotation": 0.5, "supcon": 0.5}
    t, learner, learn, _ = started(IncrementalFrozen, **options)
    learn(0)
    middle = copy.deepcopy(learner.state_dict())
    learn(1)
    expected = [fingerprint(middle), fingerprint(learner.state_dict())]
    for index, start in enumerate((None, middle)):
        for attempt in range(2):
            again, runtime, pipeline = t.start(tmp_path / str(index))
            runtime.journal = Journal(tmp_path / str(index), 0.0)
            if start is not None:
                again.load_state_dict(copy.deepcopy(start))
            if attempt == 0:
                runtime.progress = lambda name, step, steps, loss, runtime=runtime: setattr(runtime, "stop", step == 2)
                with pytest.raises(KeyboardInterrupt):
                    t.learn(again, runtime, pipeline, index)
            else:
                t.learn(again, runtime, pipeline, index)
        assert fingerprint(again.state_dict()) == expected[index]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"supcon": -1.0}, r"learner\.supcon"),
        ({"rotation": float("inf")}, r"learner\.rotation"),
        ({"virtual": -1}, r"learner\.virtual"),
        ({"subnet": 0.5}, r"learner\.subnet=0\.5 has no effect without steps"),
        ({"subnet": 1.5, "finetune": 1}, r"learner\.subnet must"),
        ({"etf": 11}, r"learner\.etf=11"),
        ({"etf": 3, "finetune": 1}, r"learner\.etf=3: the stream has shown 4 classes"),
        ({"virtual": 2}, r"learner\.virtual=2: 2 base classes have 1 pairs"),
    ],
)
def test_tricks_are_refused_in_one_line(options, words):
    with pytest.raises(UserError, match=words) as caught:
        _, _, learn, _ = started(IncrementalFrozen, **options)
        learn(0)
        learn(1)
    assert "\n" not in str(caught.value)


def test_more_passes_than_the_budget_are_refused():
    with pytest.raises(BudgetExceeded, match="9 epochs"):
        started(IncrementalFrozen, finetune=9)


# --- fast and slow weights


def test_rho_1_without_a_penalty_is_finetune():
    _, one, learn, _ = started(FastSlow, rho=1.0, strength=0.0, lr=0.1, backbone_lr=0.05)
    _, two, learn_too, _ = started(Finetune, masking="local", lr=0.1, backbone_lr=0.05)
    for i in range(3):
        learn(i)
        learn_too(i)
    same = [fingerprint({"model": x.model.state_dict(), "head": x.head.state_dict()}) for x in (one, two)]
    assert same[0] == same[1]


def test_rho_0_keeps_the_base_network_and_learns_rows():
    _, learner, learn, _ = started(FastSlow, rho=0.0, lr=0.1, backbone_lr=0.05)
    learn(0)
    base, row = fingerprint(learner.model.state_dict()), learner.head.blocks[0].weight.detach().clone()
    learn(1)
    assert fingerprint(learner.model.state_dict()) == base and torch.equal(learner.head.blocks[0].weight.detach(), row)
    assert len(learner.head.blocks) == 2 and any(not torch.equal(v, dict(learner.model.named_parameters())[n].detach())
                                                 for n, v in learner.fast.items())  # fmt: skip


def squared_gradients(model, rows, bias, train, first):
    """Mean over samples of the squared gradient of each one's own cross-entropy over the experience's classes."""
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i in range(len(train)):
        batch = train.batch([i])
        loss = torch.nn.functional.cross_entropy(model.features(batch) @ rows.T + bias, batch.y - first)
        for n, g in zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            total[n] += g**2 / len(train)
    return total


@pytest.mark.parametrize("importance", ["fisher", "uniform"])
def test_fast_slow_against_a_naive_version(importance):
    """Three experiences: fast weights from slow ones, held by the last fast ones, then interpolation; importance is summed."""
    rates = {"lr": 0.1, "backbone_lr": 0.05, "momentum": 0.0, "weight_decay": 0.0}
    t, learner, learn, pipeline = started(FastSlow, rho=0.3, strength=40.0, importance=importance, **rates)
    twin = copy.deepcopy(learner.model)
    params, fast, total, gaps = dict(twin.named_parameters()), None, None, []
    for index in range(3):
        learn(index)
        train, head = open_experience(t.scenario, index, pipeline).train, LinearHead(10)
        head.grow(2, learner.runtime.generator("head"))
        slow = {n: p.detach().clone() for n, p in params.items()}
        batches = shuffled(train, 8, learner.epochs, learner.runtime.key("train"))
        for step in range(batches.steps):
            batch = batches(step)
            loss = torch.nn.functional.cross_entropy(head(twin.features(batch)), batch.y - 2 * index)
            for n, p in params.items():
                if fast is not None:
                    weight = total[n] if importance == "fisher" else 1.0
                    loss = loss + 40.0 / 2 * (weight * (p - fast[n]) ** 2).sum()
            trained = [*params.values(), *head.parameters()]
            with torch.no_grad():
                for i, (p, g) in enumerate(zip(trained, torch.autograd.grad(loss, trained), strict=True)):
                    p -= (0.05 if i < len(params) else 0.1) * g
        block = head.blocks[0]
        found = squared_gradients(twin, block.weight, block.bias, train, 2 * index)
        total = {n: f + (0 if total is None else total[n]) for n, f in found.items()}
        fast = {n: p.detach().clone() for n, p in params.items()}
        with torch.no_grad():
            for n, p in params.items():
                p.copy_(0.7 * slow[n] + 0.3 * fast[n] if index else fast[n])
        for n, p in learner.model.named_parameters():
            torch.testing.assert_close(p.detach(), params[n].detach(), atol=1e-5, rtol=1e-3)
            torch.testing.assert_close(learner.fast[n], fast[n], atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(learner.head.blocks[index].weight.detach(), block.weight.detach(), atol=1e-5, rtol=1e-3)
        gaps.append(sum(float((fast[n] - slow[n]).abs().sum()) for n in fast))
    assert min(gaps) > 1e-2
    if importance == "fisher":
        for n, f in total.items():
            torch.testing.assert_close(learner.fisher[n], f, atol=1e-6, rtol=1e-2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rho": 1.5}, r"learner\.rho must"),
        ({"strength": -1.0}, r"learner\.strength"),
        ({"importance": "mas"}, r"learner\.importance=mas: choose fisher or uniform"),
    ],
)
def test_fast_slow_refuses_in_one_line(options, words):
    with pytest.raises(UserError, match=words):
        started(FastSlow, **options)
