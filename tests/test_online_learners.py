"""What the online learners minimise and answer, each against a naive version written from its paper."""

import colorsys
import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from test_closed_forms import Flat
from test_online import online
from torch.nn import functional as F

from clbench.interfaces import Place, UserError
from clbench.learners import agem, derpp, er, er_ace, gdumb, gem, mir, scr
from clbench.learners.slda import Slda
from clbench.models.heads import LOWEST
from clbench.streams import rng
from clbench.streams.images.data import ImageBatch
from clbench.streams.images.pixels import make_profile
from clbench.training.contrastive import blended, cropped, hue_shifted, strong_view, supervised_contrastive
from clbench.training.online import OnlineBatch, replay_loss
from clbench.training.state import fingerprint

SLOW = ("learner.batch_size=6", "learner.lr=0.05", "learner.backbone_lr=0.005")


def batch_of(generator, y, size=32):
    return ImageBatch.of(torch.randn(len(y), 3, size, size, generator=generator), torch.tensor(y))


def started(name, *options, experiences=1, words=SLOW, **stream):
    """A learner after its first experiences, its trial, runtime and pipeline."""
    t = online(f"learner={name}", *words, *options, **stream)
    learner, runtime, pipeline = t.start()
    for i in range(experiences):
        t.learn(learner, runtime, pipeline, i)
    return learner, t, runtime, pipeline


def z_of(learner, batch):
    return learner.head(learner.model.features(batch))


def both_batches(learner):
    g = torch.Generator().manual_seed(3)
    return OnlineBatch(batch_of(g, [1, 2, 1, 0]), batch_of(g, [0, 0, 2]), np.arange(3))


# --- ER, ER-ACE --------------------------------------------------------------------------------------------------------


def test_losses_of_er():
    learner, *_ = started("er")
    batch = both_batches(learner)
    z, y = z_of(learner, torch.cat([batch.new.x, batch.old.x])), torch.tensor([1, 2, 1, 0, 0, 0, 2])
    naive = -z.log_softmax(1)[torch.arange(7), y]
    torch.testing.assert_close(replay_loss(learner, batch, "joint"), naive.mean())
    torch.testing.assert_close(replay_loss(learner, batch, "added"), naive[:4].mean() + naive[4:].mean())


def test_er_without_replay_is_fine_tuning():
    """Bit for bit, but for the memory: from the same weights of the head, in stream order."""
    rates = ("learner.batch_size=6", "learner.lr=0.05", "learner.backbone_lr=0.005")
    er, *_ = started("er", "learner.replay=0", experiences=3, words=rates)
    fine, *_ = started("finetune", "learner.momentum=0", "learner.weight_decay=0", experiences=3, words=rates)
    assert fingerprint(er.model.state_dict()) == fingerprint(fine.model.state_dict())
    assert fingerprint(er.head.inner.state_dict()) == fingerprint(fine.head.state_dict())


@pytest.mark.parametrize(
    "words", ["agem learner.memory=0", "gem learner.memory=0", "derpp learner.online=true learner.alpha=0 learner.beta=0"]
)
def test_without_its_own_term_it_is_fine_tuning(words):
    """No violation where nothing is stored; no draw that counts. Bit for bit, but for the memory."""
    name, *options = words.split()
    rates = ("learner.batch_size=6", "learner.lr=0.05", "learner.backbone_lr=0.005")
    plain = ("learner.augment=both",) if name != "derpp" else ()
    own, *_ = started(name, *options, *plain, experiences=3, words=rates)
    base, *_ = started("er", "learner.replay=0", experiences=3, words=rates)
    assert fingerprint(own.model.state_dict()) == fingerprint(base.model.state_dict())
    assert fingerprint(own.head.state_dict()) == fingerprint(base.head.state_dict())


def test_derpp_without_logits_is_er_with_added_losses(monkeypatch):
    """alpha=0, beta=1, from the draws that derpp makes for its second term."""

    class Labelled(er.OnlineStream):
        def draw(self, key):
            return super().draw(rng.key(key, "labelled"))

    monkeypatch.setattr(er, "OnlineStream", Labelled)
    base, *_ = started("er", "learner.combine=added", experiences=3)
    own, *_ = started("derpp", "learner.online=true", "learner.alpha=0", "learner.beta=1", experiences=3)
    for a, b in zip(own.model.parameters(), base.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_asymmetric_cross_entropy_by_hand():
    z = torch.tensor([[1.0, 2.0, 3.0, 0.5], [0.0, 1.0, -1.0, 2.0]], requires_grad=True)
    y, seen = torch.tensor([1, 0]), torch.tensor([True, True, True, False])
    loss = er_ace.asymmetric_cross_entropy(z, y, seen, "paper")
    e = np.exp
    by_hand = -(np.log(e(2) / (e(1) + e(2))) + np.log(e(0) / (e(0) + e(1)))) / 2
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)
    (grad,) = torch.autograd.grad(loss, z)
    assert (grad[:, 2:] == 0).all() and (grad[:, :2] != 0).all(), "absent rows are not pushed"
    official = er_ace.asymmetric_cross_entropy(z, y, seen, "official")  # leaves column 2, the largest seen class, open
    by_hand = -(np.log(e(2) / (e(1) + e(2) + e(3))) + np.log(e(0) / (e(0) + e(1) + e(-1)))) / 2
    assert official.item() == pytest.approx(by_hand, rel=1e-6)


def test_er_ace_with_all_classes_present_is_er_with_added_losses():
    learner, *_ = started("er_ace", "learner.head=linear")
    batch = both_batches(learner)  # its new samples show all three classes
    own = er_ace.asymmetric_cross_entropy(z_of(learner, batch.new), batch.new.y, learner.head.seen_K, "paper")
    torch.testing.assert_close(
        own + F.cross_entropy(z_of(learner, batch.old), batch.old.y), replay_loss(learner, batch, "added")
    )


# --- A-GEM, GEM --------------------------------------------------------------------------------------------------------


def test_projection_by_hand():
    g, h = torch.tensor([1.0, -2.0, 0.0]).double(), torch.tensor([1.0, 1.0, 0.0]).double()
    assert agem.projected(g, h).tolist() == [1.5, -1.5, 0.0]  # g.h = -1, h.h = 2
    assert agem.projected(-g, h) is None, "agreement changes nothing"
    assert agem.projected(torch.tensor([1.0, -1.0, 5.0]).double(), h) is None, "nor does a right angle"
    assert (agem.projected(-h, h) == 0).all()


def steps_of(monkeypatch, module, name, *options):
    """(gradient before, gradient used, memory rows' gradient by task) of each step of the second experience, float64."""
    learner, t, runtime, pipeline = started(name, *options, sizes=[2, 2, 2])
    t.learn(learner, runtime, pipeline, 1)
    found, real = [], module.fit

    def spied(*args, before_step, **options):
        own, stream = args[2], args[5]

        def watched(params, grads):
            before = torch.cat([g.reshape(-1).double() for g in grads])
            batch = stream(len(found))
            tasks = {}
            for k in np.unique(own.memory.experience[batch.rows]):
                rows = torch.from_numpy(np.flatnonzero(own.memory.experience[batch.rows] == k))
                part = batch.old.select(rows)
                past = torch.autograd.grad(F.cross_entropy(z_of(own, part.x), part.y), params)
                tasks[int(k)] = torch.cat([g.reshape(-1).double() for g in past])
            before_step(params, grads)
            found.append((before, torch.cat([p.grad.reshape(-1).double() for p in params]), tasks))

        return real(*args, before_step=watched, **options)

    monkeypatch.setattr(module, "fit", spied)
    t.learn(learner, runtime, pipeline, 2)
    return found


def test_agem_never_steps_against_its_memory(monkeypatch):
    found = steps_of(monkeypatch, agem, "agem", "learner.replay=256", "learner.augment=none")
    assert len(found) == 4 and all(set(tasks) == {0, 1} for _, _, tasks in found), "of earlier experiences alone"
    moved = 0
    for before, used, tasks in found:
        # all stored samples, 6 a task: the mean over the batch is the mean of the tasks' means
        reference = (tasks[0] + tasks[1]) / 2
        assert used @ reference >= -1e-5 * used.norm() * reference.norm()
        if before @ reference < 0:
            moved += 1
            naive = before - (before @ reference) / (reference @ reference) * reference
            torch.testing.assert_close(used, naive, rtol=1e-3, atol=1e-5)
        else:
            assert torch.equal(used, before)
    assert moved


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_gem_solves_its_programme(monkeypatch, variant):
    found = steps_of(monkeypatch, gem, "gem", f"learner.variant={variant}")
    moved = 0
    for before, used, tasks in found:
        rows = torch.stack([tasks[k] for k in sorted(tasks)])
        if ((rows @ before) >= 0).all():
            assert torch.equal(used, before)
            continue
        moved += 1
        v = programme((rows @ rows.T).numpy(), (rows @ before).numpy(), 0.5, variant, gem.EPS)
        torch.testing.assert_close(used, before + torch.from_numpy(v) @ rows, rtol=1e-3, atol=1e-4)
    assert moved


def programme(gram, products, strength, variant, eps):
    """The dual by a general bounded solver."""
    matrix, low = gram + eps * np.eye(len(gram)), strength if variant == "official" else 0.0
    start = np.full(len(gram), low + 1.0)
    found = minimize(
        lambda v: 0.5 * v @ matrix @ v + products @ v,
        start,
        jac=lambda v: matrix @ v + products,
        bounds=[(low, None)] * len(gram),
        method="L-BFGS-B",
        options={"ftol": 1e-16, "gtol": 1e-12, "maxiter": 10_000},
    )
    return found.x + (0.0 if variant == "official" else strength)


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_dual_variables_against_a_bounded_solver_and_by_hand(variant):
    for seed in range(60):
        made = np.random.default_rng(seed)
        rows, g = made.normal(size=(1 + seed % 6, 12)), made.normal(size=12)
        v = gem.dual_variables(rows @ rows.T, rows @ g, 0.5, variant)
        np.testing.assert_allclose(v, programme(rows @ rows.T, rows @ g, 0.5, variant, gem.EPS), atol=1e-4)
        assert (v >= 0.5).all()
    # one task, g.h = -1, h.h = 2: v = 1/2 without eps; official is not below gamma, paper adds it
    v = gem.dual_variables(np.array([[2.0]]), np.array([-1.0]), 0.2, variant, eps=0.0)
    assert v[0] == pytest.approx(0.5 if variant == "official" else 0.7)


def test_gem_of_two_tasks_without_strength_is_agem():
    for seed in range(20):
        made = torch.Generator().manual_seed(seed)
        g, h = (torch.randn(9, generator=made).double() for _ in range(2))
        product = float(g @ h)
        v = gem.dual_variables(np.array([[float(h @ h)]]), np.array([product]), 0.0, "official", eps=1e-14)
        expected = agem.projected(g, h)
        torch.testing.assert_close(g + v[0] * h, g if expected is None else expected)


# --- MIR ---------------------------------------------------------------------------------------------------------------


def test_the_virtual_step_by_hand():
    learner, *_ = started("mir", "learner.replay=2")
    g = torch.Generator().manual_seed(1)
    new, drawn = batch_of(g, [0, 1, 1]), batch_of(g, [2, 0, 1, 2, 0])
    learner.model.train()
    before = fingerprint(learner.state_dict())
    rows = np.arange(5)
    found = learner.interfered(drawn, rows, F.cross_entropy(z_of(learner, new.x), new.y), 0.5)
    assert fingerprint(learner.state_dict()) == before, "a virtual step leaves no trace"
    real = copy.deepcopy(learner)
    params = [*real.model.parameters(), *real.head.inner.parameters()]
    rates = [0.005 * 0.5] * len(list(real.model.parameters())) + [0.05 * 0.5] * len(list(real.head.inner.parameters()))
    grads = torch.autograd.grad(F.cross_entropy(z_of(real, new.x), new.y), params)
    with torch.no_grad():
        old = F.cross_entropy(z_of(real, drawn.x), drawn.y, reduction="none")
        for p, d, eta in zip(params, grads, rates, strict=True):
            p -= eta * d
        rise = F.cross_entropy(z_of(real, drawn.x), drawn.y, reduction="none") - old
    top = sorted(rise.argsort(descending=True)[:2].tolist())
    assert found.tolist() == top and rise.abs().max() > 1e-4
    still = learner.interfered(drawn, rows, F.cross_entropy(z_of(learner, new.x), new.y), 0.0)
    assert still.tolist() == [0, 1], "no step, no rise: those that were drawn first"


def test_the_score_against_the_best_loss_by_hand():
    """Without a step the score is CE - min(CE, best): those come first that were once answered best, relative to now."""
    learner, t, runtime, pipeline = started("mir", "learner.replay=2", "learner.score=best")
    assert learner.best_M.shape == (12,) and bool((learner.best_M < torch.inf).any()), "what was drawn has a loss"
    g = torch.Generator().manual_seed(1)
    new, drawn = batch_of(g, [0, 1, 1]), batch_of(g, [2, 0, 1, 2, 0])
    learner.model.train()
    with torch.no_grad():
        ce = F.cross_entropy(z_of(learner, drawn.x), drawn.y, reduction="none")
    rows, past = np.array([7, 2, 4, 0, 9]), ce + torch.tensor([0.1, -0.2, torch.inf, -0.5, 0.0])
    learner.best_M[rows] = past
    loss = F.cross_entropy(z_of(learner, new.x), new.y)
    assert learner.interfered(drawn, rows, loss, 0.0).tolist() == [1, 3]
    torch.testing.assert_close(learner.best_M[rows], torch.minimum(ce, past))
    again = t.start()[0]
    again.load_state_dict(copy.deepcopy(learner.state_dict()))
    assert torch.equal(again.best_M, learner.best_M)
    kept, before = learner.best_M.clone(), learner.memory.visits.copy()
    learner.lr = learner.backbone_lr = 0.0
    t.learn(learner, runtime, pipeline, 1)
    changed = learner.memory.visits != before
    assert changed.any() and (learner.best_M[~changed] <= kept[~changed] + 1e-6).all(), "a new sample has no past"
    assert "best_M" not in started("mir")[0].state_dict()


@pytest.mark.parametrize("name", ["gem", "agem", "mir"])
def test_columns_of_the_task(name, monkeypatch):
    """The losses of new and stored samples are those over the classes of their own tasks; others get no gradient."""
    learner, t, runtime, pipeline = started(name, "learner.columns=task", sizes=[2, 1, 3], kind="task_incremental")
    t.learn(learner, runtime, pipeline, 1)
    learner.columns.see(t.open(2, pipeline))
    assert learner.columns.classes == {0: [0, 1], 1: [2], 2: [3, 4, 5]}
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y, own = torch.tensor([1, 2, 5, 0]), ([0, 1], [2], [3, 4, 5], [0, 1])
    loss = F.cross_entropy(learner.columns.of_experiences(z, np.array([0, 1, 2, 0])), y)
    naive = torch.stack([F.cross_entropy(row[c], torch.tensor(c.index(int(i)))) for row, i, c in zip(z, y, own, strict=True)])
    torch.testing.assert_close(loss, naive.mean())
    (grad,) = torch.autograd.grad(loss, z)
    assert all((row[[c for c in range(6) if c not in inside]] == 0).all() for row, inside in zip(grad, own, strict=True))
    rows = torch.tensor([[True, True, False, False], [False, False, True, False]])
    with torch.no_grad():
        for task, inside in enumerate(rows):
            learner.columns.classes[2] = [3]
            found = learner.columns.of_task(torch.ones(2, 4), task)
            assert torch.equal(found[0] == 1, inside) and (found[:, ~inside] == LOWEST).all()
        assert torch.equal(learner.columns.of_task(torch.ones(2, 4), 9), torch.ones(2, 4)), "a task that was not learned"
        batch = batch_of(torch.Generator().manual_seed(4), [0, 1])
        batch.task = 1
        assert (learner.predict(batch)[:, :2] == LOWEST).all()
    again = t.start()[0]
    again.load_state_dict(copy.deepcopy(learner.state_dict()))
    assert vars(again.columns) == vars(learner.columns) and "columns" not in started(name)[0].state_dict()


def test_gem_trains_over_the_columns_of_each_task(monkeypatch):
    """One step of the second task with the task's own columns: gradient and constraint against a naive version."""
    learner, t, runtime, pipeline = started(
        "gem", "learner.columns=task", "learner.strength=0", sizes=[2, 2], num_classes=4, kind="task_incremental"
    )
    real, seen = gem.fit, []

    def spied(*args, before_step, **options):
        own, stream = args[2], args[5]

        def watched(params, grads):
            batch = stream(len(seen))
            losses = []
            for part, c in ((batch.new, [2, 3]), (batch.old, [0, 1])):
                losses.append(F.cross_entropy(z_of(own, part.x)[:, c], part.y - c[0]))
            g, h = (torch.cat([x.reshape(-1).double() for x in mir.gradients(loss, params)]) for loss in losses)
            torch.testing.assert_close(torch.cat([x.reshape(-1).double() for x in grads]), g, rtol=1e-3, atol=1e-5)
            before_step(params, grads)
            used = torch.cat([p.grad.reshape(-1).double() for p in params])
            v = max(0.0, -float(g @ h) / (float(h @ h) + gem.EPS))
            torch.testing.assert_close(used, g + v * h, rtol=1e-3, atol=1e-4)
            seen.append(v)

        return real(*args, before_step=watched, **options)

    monkeypatch.setattr(gem, "fit", spied)
    t.learn(learner, runtime, pipeline, 1)
    assert len(seen) == 4


def test_scoring_does_not_move_batch_normalisation():
    learner, *_ = started("mir", "model=resnet32", sizes=[2], num_classes=2, limit_train=6)
    learner.model.train()
    g = torch.Generator().manual_seed(1)
    new, drawn = batch_of(g, [0, 1, 1]), batch_of(g, [1, 0, 1, 0, 0])
    loss = F.cross_entropy(z_of(learner, new.x), new.y)
    buffers = fingerprint(learner.model.state_dict())
    weights = {id(p): p.detach() + 0.01 for p in learner.model.parameters()}
    rise = mir.losses_under((learner.model, learner.head), weights, drawn, lambda z: z)
    assert torch.isfinite(rise).all() and fingerprint(learner.model.state_dict()) == buffers and loss.requires_grad


def test_mir_that_replays_all_candidates_is_er_with_added_losses():
    own, *_ = started("mir", "learner.candidates=4", "learner.replay=4", experiences=2)
    plain, *_ = started("er", "learner.replay=4", "learner.combine=added", experiences=2)
    for a, b in zip(own.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    with pytest.raises(UserError, match=r"learner\.candidates=3 must be at least as many"):
        started("mir", "learner.candidates=3", "learner.replay=4")


# --- SCR ---------------------------------------------------------------------------------------------------------------


def test_supervised_contrastive_loss_is_the_double_loop():
    for seed in range(5):
        made = torch.Generator().manual_seed(seed)
        f = F.normalize(torch.randn(12, 5, generator=made).double(), dim=1)
        y = torch.randint(0, 4, (12,), generator=made)
        y[-1] = 9  # a class of one: no positive
        total = 0.0
        for i in range(12):
            positives = [p for p in range(12) if p != i and y[p] == y[i]]
            below = sum(torch.exp(f[i] @ f[a] / 0.1) for a in range(12) if a != i)
            if positives:
                total -= sum(torch.log(torch.exp(f[i] @ f[p] / 0.1) / below) for p in positives) / len(positives)
        torch.testing.assert_close(supervised_contrastive(f, y, 0.1), total / 12, rtol=1e-9, atol=1e-9)


def test_the_second_view():
    profile = make_profile("cifar", 16)
    made = torch.Generator().manual_seed(0)
    pixels = torch.rand(64, 3, 16, 16, generator=made)
    mean, std = (torch.tensor(v)[:, None, None] for v in (profile.mean, profile.std))
    x = (pixels - mean) / std
    view = strong_view(x, 7, profile)
    assert torch.equal(view, strong_view(x, 7, profile)) and not torch.equal(view, strong_view(x, 8, profile))
    shown = view * std + mean
    assert shown.min() > -1e-4 and shown.max() < 1 + 1e-4
    greyish = ((shown - shown.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-4).sum()
    assert 4 <= greyish <= 24  # a fifth of 64, far from none and all
    # one image's draws do not depend on the others
    torch.testing.assert_close(strong_view(x[:10], 7, profile), view[:10])
    ramp = torch.linspace(0, 1, 16).expand(64, 3, 16, 16)
    crop = cropped(ramp, 3)
    assert crop.min() >= 0 and crop.max() <= 1 and (crop.diff(dim=3) >= -1e-6).all(), "left stays left"
    share = (crop[:, 0, 0, -1] - crop[:, 0, 0, 0]).numpy()
    assert share.min() > 0.3 and share.max() > 0.9, "boxes have a fifth of the area at least"


def test_hue_and_blends_by_hand():
    pixels = torch.rand(50, 3, 1, 1, generator=torch.Generator().manual_seed(1))
    shift = torch.linspace(-0.1, 0.1, 50)[:, None, None, None]
    turned = hue_shifted(pixels, shift)
    for i in range(50):
        h, s, v = colorsys.rgb_to_hsv(*pixels[i, :, 0, 0].tolist())
        expected = colorsys.hsv_to_rgb((h + float(shift[i])) % 1, s, v)
        torch.testing.assert_close(turned[i, :, 0, 0], torch.tensor(expected), atol=1e-5, rtol=1e-4)
    x = torch.tensor([0.2, 0.4, 0.6])[None, :, None, None]
    luma = 0.299 * 0.2 + 0.587 * 0.4 + 0.114 * 0.6
    factor = torch.full((1, 1, 1, 1), 0.5)
    torch.testing.assert_close(blended(x, "brightness", factor).flatten(), torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(blended(x, "saturation", factor).flatten(), 0.5 * x.flatten() + 0.5 * luma)
    torch.testing.assert_close(blended(x, "contrast", factor).flatten(), 0.5 * x.flatten() + 0.5 * luma)


@pytest.mark.parametrize("name", ["er_ace", "mir", "scr"])
@pytest.mark.parametrize("words", [("learner.start=second_experience",), ("learner.past=true",)])
def test_when_and_what_is_replayed(monkeypatch, name, words):
    """Nothing in the first experience; in the second from its first batch on, or samples of the first alone."""
    module, found = {"er_ace": er_ace, "mir": mir, "scr": scr}[name], []
    real = module.OnlineStream

    class Watched(real):
        def __call__(self, step):
            batch = super().__call__(step)
            found.append((self.index, step, set() if batch.old is None else set(self.memory.experience[batch.rows].tolist())))
            return batch

    monkeypatch.setattr(module, "OnlineStream", Watched)
    whole = "learner.candidates=12" if name == "mir" else "learner.replay=12"
    started(name, *words, whole, experiences=2)
    first, second = ([drawn for index, _, drawn in found if index == i] for i in (0, 1))
    assert not any(first) and all(second)
    past = words == ("learner.past=true",)
    assert second[0] == {0} and all(drawn == {0} for drawn in second) == past


def test_scr_official_makes_no_step_on_the_first_batch_and_reviews(monkeypatch):
    first = {}
    for variant in ("paper", "official"):
        learner, *_ = started("scr", f"learner.variant={variant}", sizes=[1, 2], num_classes=3, limit_train=6)
        first[variant] = fingerprint(learner.model.state_dict())  # the six samples of one class are one batch
        fresh = online("learner=scr", sizes=[1, 2], num_classes=3, limit_train=6).start()[0]
        assert (first[variant] == fingerprint(fresh.model.state_dict())) == (variant == "official")
    calls, real = {}, scr.fit

    def spied(runtime, name, learner, groups, loss, batches, recipe, **options):
        calls[name] = batches.steps
        if name == "review":
            params = [torch.zeros(3)]
            grads = [torch.ones(3), None]
            options["before_step"](params, grads)
            torch.testing.assert_close(grads[0], torch.full((3,), 0.1))
        return real(runtime, name, learner, groups, loss, batches, recipe, **options)

    monkeypatch.setattr(scr, "fit", spied)
    started("scr", "learner.review=true", "learner.replay=5")
    assert calls == {"train": 6, "review": 3}  # 36 samples in sixes; 12 stored ones in fives


# --- SLDA --------------------------------------------------------------------------------------------------------------


def data_of(seed, n=80, classes=4):
    made = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (n,), generator=made)
    return torch.randn(n, 6, generator=made) + y[:, None] * torch.arange(6) / 3, y


def slda(x, y, sizes, **options):
    found = Slda(Flat(), None, **options)
    found.counts_K, found.means_KD = torch.zeros(4).double(), torch.zeros(4, 6).double()
    for xs, ys in zip(x.split(sizes), y.split(sizes), strict=True):
        found.update(xs, ys)
    return found


def test_slda_after_single_updates_is_the_batch_formula_in_any_order():
    for seed in range(5):
        x, y = data_of(seed)
        means = torch.stack([x[y == c].double().mean(0) for c in range(4)])
        within = x.double() - means[y]
        for order, size in itertools.product((torch.arange(80), torch.randperm(80, generator=torch.Generator())), (1, 7, 80)):
            found = slda(x[order], y[order], size)
            torch.testing.assert_close(found.means_KD, means, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found.covariance(), within.T @ within / 80, rtol=1e-10, atol=1e-12)
        precision = torch.linalg.pinv((1 - 1e-4) * found.covariance() + 1e-4 * torch.eye(6).double())
        naive = x.double() @ precision @ means.T - 0.5 * (means @ precision * means).sum(1)
        torch.testing.assert_close(found.predict(x), naive.float(), rtol=1e-4, atol=1e-3)


def test_slda_official_is_the_released_recursion_one_at_a_time():
    x, y = data_of(9)
    sigma, means, counts = torch.zeros(6, 6).double(), torch.zeros(4, 6).double(), torch.zeros(4)
    for n, (row, c) in enumerate(zip(x.double(), y, strict=True)):
        gap = row - means[c]
        sigma = (n * sigma + n / (n + 1) * torch.outer(gap, gap)) / (n + 1)
        means[c] += gap / (counts[c] + 1)
        counts[c] += 1
    found = slda(x, y, 16, variant="official")
    torch.testing.assert_close(found.covariance(), sigma, rtol=1e-9, atol=1e-10)
    assert torch.trace(sigma) > 1.02 * torch.trace(slda(x, y, 16).covariance()), "the first samples inflate it"


def test_slda_with_full_shrinkage_is_the_nearest_mean_and_unseen_classes_never_win():
    x, y = data_of(2, classes=3)
    found = slda(x, y, 10, shrinkage=1.0)
    z = found.predict(x)
    assert (z[:, 3] == LOWEST).all()
    assert torch.equal(z.argmax(1), torch.cdist(x.double(), found.means_KD[:3]).argmin(1))
    with pytest.raises(UserError, match=r"learner\.shrinkage"):
        Slda(Flat(), None, shrinkage=0.0)


def test_slda_is_sklearns_up_to_priors():
    x, y = data_of(4)
    found = slda(x, y, 80, shrinkage=1e-9)
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(x.double().numpy(), y.numpy())
    scores = theirs.decision_function(x.double().numpy()) - np.log(theirs.priors_)
    np.testing.assert_allclose(found.predict(x).numpy(), scores, rtol=1e-4, atol=1e-4)


def test_streaming_means_are_those_of_ncm_for_any_batch():
    plain, *_ = started("ncm", experiences=3, words=())
    for size in (1, 5, 128):
        own, _, runtime, _ = started("ncm", "learner.streaming=true", f"learner.batch_size={size}", experiences=3, words=())
        torch.testing.assert_close(own.head.sums_KD, plain.head.sums_KD, rtol=1e-6, atol=1e-4)
        assert torch.equal(own.head.counts_K, plain.head.counts_K) and runtime.used_new == 24


# --- GDumb -------------------------------------------------------------------------------------------------------------


def test_warm_restarts_by_hand():
    rates = [gdumb.warm_restarts(Place(0, step, 32, step), passes=16) for step in range(32)]
    assert rates[::2] == rates[1::2], "constant within a pass of two steps"

    def half(share):
        return 0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * share))

    cycles = [half(i / n) for n in (1, 2, 4, 8) for i in range(n)]
    assert rates[::2] == pytest.approx([0.1, *cycles])


def test_cut_and_mixed_images():
    made = torch.Generator().manual_seed(0)
    x, y = torch.rand(6, 3, 10, 12, generator=made), torch.arange(6)
    shares = []
    for key in range(40):
        mixed, others, share = gdumb.cut_and_mixed(x, y, key)
        assert sorted(others.tolist()) == list(range(6))
        from_other = (mixed == x[others]).all(1) & (x != x[others]).any(1)
        for i in range(6):
            if others[i] != i:
                assert from_other[i].float().mean().item() == pytest.approx(1 - share)
        assert ((mixed == x) | (mixed == x[others])).all()
        shares.append(share)
    assert min(shares) < 0.4 and max(shares) > 0.9


def test_gdumb_depends_on_its_memory_alone():
    """Two streams that leave the same memory give the same network: one in two experiences, one in one, reordered."""
    ended = []
    for stream in ({"sizes": [2, 2]}, {"sizes": [4]}, {"sizes": [4], "operators": [{"single_pass": {"seed": 5}}]}):
        options = {"num_classes": 4, "limit_train": 5, "budget": {"epochs": 1, "exemplars": 20}} | stream
        words = ("learner.passes=2", "learner.batch_size=8")
        learner, *_ = started("gdumb", words=words, experiences=len(stream["sizes"]), **options)
        assert len(learner.memory) == 20, "room for all"
        ended.append(fingerprint([learner.model.state_dict(), learner.head.state_dict()]))
    assert ended[0] == ended[1] == ended[2]


def test_recipes_of_gdumb_in_other_suites(monkeypatch):
    """Constant rates, Adam, no cutmix, no clipping: the steps are those of the plain loop over the memory's batches."""
    rates, losses, real = [], [], gdumb.fit

    def spied(runtime, name, learner, groups, loss, batches, recipe, **options):
        steps = batches.steps
        rates[:] = [recipe.schedule(Place(0, step, steps, step)) for step in range(steps)]
        twin, head = copy.deepcopy(learner.model), copy.deepcopy(learner.head)
        sides = ((twin, learner.backbone_lr), (head, learner.lr))
        adam = torch.optim.Adam([{"params": list(m.parameters()), "lr": lr} for m, lr in sides], weight_decay=1e-6)
        log = real(runtime, name, learner, groups, loss, batches, recipe, **options)
        for step in range(steps):
            batch = batches(step)
            adam.zero_grad()
            F.cross_entropy(head(twin.features(batch)), batch.y).backward()
            adam.step()
        losses[:] = [(a, b) for a, b in zip(learner.head.parameters(), head.parameters(), strict=True)]
        return log

    monkeypatch.setattr(gdumb, "fit", spied)
    recipe = ("learner.optimizer=adam", "schedule=constant", "learner.cutmix=0", "learner.clip=null", "learner.passes=2")
    learner, *_ = started("gdumb", words=(*recipe, "learner.batch_size=6", "learner.lr=0.01"))
    assert rates == [1.0] * 4 and learner.recipe.clip is None
    for a, b in losses:
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_gdumb_with_nothing_to_keep_says_so():
    with pytest.raises(UserError, match=r"learner\.memory above 0"):
        started("gdumb", "learner.memory=0", words=())


# --- DER++, iCaRL ------------------------------------------------------------------------------------------------------


def test_stored_logits_are_those_before_the_step(monkeypatch):
    """The logits in a slot equal a trace of the step in which its sample came, on the classes that had appeared."""
    trace, real = {}, derpp.scores

    def spied(learner, batch):
        z = real(learner, batch)
        if not batch.replayed:
            for i, row in zip(batch.ids.tolist(), z.detach(), strict=True):
                trace[i] = row.masked_fill(row == LOWEST, torch.nan)
        return z

    monkeypatch.setattr(derpp, "scores", spied)
    learner, *_ = started("derpp", "learner.online=true", experiences=3)
    assert learner.logits_MK.shape == (12, 6) and set(learner.memory.experience) == {0, 1, 2}
    for i, row in zip(learner.memory.ids.tolist(), learner.logits_MK, strict=True):
        assert (
            torch.equal(row[: len(trace[i])].nan_to_num(-1.0), trace[i].nan_to_num(-1.0)) and row[len(trace[i]) :].isnan().all()
        )


def test_loss_of_online_derpp_and_its_two_draws(monkeypatch):
    learner, t, runtime, pipeline = started("derpp", "learner.online=true", "learner.alpha=0.7", "learner.beta=0.3")
    seen = []

    def stop(runtime_, name, own, groups, loss, batches, recipe, **options):
        made = batches(0)
        seen.append((made, loss(made).detach(), own.logits_MK[made.rows]))
        return {}

    monkeypatch.setattr(derpp, "fit", stop)
    t.learn(learner, runtime, pipeline, 1)
    ((batch, loss, stored),) = seen
    assert len(batch.old) == len(batch.labelled) == 6 and batch.old.ids.tolist() != batch.labelled.ids.tolist()
    assert len(batch) == 18 and batch.replayed == 12
    with torch.no_grad():
        squares = (z_of(learner, batch.old.x)[:, :3] - stored).square()
        naive = F.cross_entropy(z_of(learner, batch.new.x), batch.new.y) + 0.7 * squares[~squares.isnan()].mean()
        naive = naive + 0.3 * F.cross_entropy(z_of(learner, batch.labelled.x), batch.labelled.y)
    torch.testing.assert_close(loss, naive, rtol=1e-4, atol=1e-5)


def test_icarl_online_is_balanced_and_answers_with_the_means_of_the_end():
    learner, t, _, pipeline = started("icarl", "learner.online=true", experiences=3)
    assert np.bincount(learner.memory.y).tolist() == [2] * 6
    data = learner.memory.data(t.open(0, pipeline).train)
    f = F.normalize(torch.cat([learner.model.eval().features(b) for b in data.test_batches(50)]).detach(), dim=1)
    naive = torch.stack([F.normalize(f[torch.as_tensor(data.y) == c].mean(0), dim=0) for c in range(6)])
    torch.testing.assert_close(learner.means_KD, naive, atol=1e-5, rtol=1e-4)


# --- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("er learner.combine=sum", "learner.combine=sum"),
        ("er learner.start=first", "learner.start=first"),
        ("er learner.memory=-1", "learner.memory=N"),
        ("er_ace learner.variant=code", "learner.variant=code"),
        ("er_ace learner.start=first", "learner.start=first"),
        ("mir learner.start=first", "learner.start=first"),
        ("mir learner.score=least", "learner.score=least"),
        ("gem learner.columns=own", "learner.columns=own"),
        ("agem learner.head=cosine", "learner.head=cosine"),
        ("agem learner.policy=herding", "learner.policy=herding"),
        ("agem learner.policy=reservoir learner.per_class=3", "learner.per_class=3"),
        ("gem learner.variant=code", "learner.variant=code"),
        ("gem learner.strength=-1", "learner.strength=-1"),
        ("scr learner.variant=code", "learner.variant=code"),
        ("scr learner.start=first", "learner.start=first"),
        ("scr learner.variant=official learner.start=second_experience", "no draw at first"),
        ("slda learner.variant=code", "learner.variant=code"),
        ("gdumb learner.passes=0", "learner.passes=0"),
        ("derpp learner.updates=2", "learner.online=true"),
        ("icarl learner.replay=2", "learner.online=true"),
        ("icarl learner.online=true learner.head_init=kaiming_uniform", "learner.head_init"),
    ],
)
def test_bad_options_are_one_line(words, line):
    name, *options = words.split()
    with pytest.raises(UserError, match=line.replace(".", r"\.")) as caught:
        online(f"learner={name}", *options).start()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["er", "er_ace", "agem", "gem", "mir", "scr", "gdumb", "derpp learner.online=true"])
def test_an_unlimited_budget_needs_a_number(name):
    with pytest.raises(UserError, match=r"learner\.memory=N"):
        online(*f"learner={name}".split(), budget={"epochs": 1}).start()


def test_slda_sums_on_the_cpu_after_a_restore_whatever_the_network_runs_on():
    x, y = data_of(0)
    found = slda(x, y, 10)
    found.runtime = SimpleNamespace(device=torch.device("meta"))  # of the network
    found.load_state_dict(slda(x, y, 7).state_dict())
    found.update(x, y)
    assert {t.device.type for t in (found.counts_K, found.means_KD, found.scatter_DD)} == {"cpu"}
    assert found.counts_K.sum() == 160
