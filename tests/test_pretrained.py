"""Methods on pre-trained models against naive versions of what their papers say."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clbench.config.compose import compose
from clbench.interfaces import Capabilities, UserError
from clbench.learners.ease import complete
from clbench.learners.mos import orthogonality, pulled
from clbench.learners.ssiat import margin_logits
from clbench.models.pet import average, distance
from clbench.streams.eval_sets import open_eval
from clbench.streams.images.data import open_experience
from clbench.testing.contract import Trial, small_stream
from clbench.training.drift import shifted
from clbench.training.ridge import RidgeRoot, RidgeSums
from clbench.training.state import detached


def trial(*overrides, **stream):
    (config,) = compose(list(overrides))
    return Trial(config, small_stream(**stream), Capabilities())


def learned(*overrides, experiences=2, **stream):
    t = trial(*overrides, **stream)
    learner, runtime, pipeline = t.start()
    seen = [t.learn(learner, runtime, pipeline, i) for i in range(experiences)]
    return t, learner, runtime, pipeline, seen


def spy_on_steps(learner, monkeypatch, module, watch):
    """Call watch(place) before every optimiser step's `after_step`, as the learner's own fit runs."""
    real = module.fit

    def fit(*args, after_step=None, **kwargs):
        def both(place, batch):
            watch("before", place)
            if after_step is not None:
                after_step(place, batch)
            watch("after", place)

        return real(*args, after_step=both, **kwargs)

    monkeypatch.setattr(module, "fit", fit)


# --- LAE


def test_lae_online_offline_and_freeze(monkeypatch):
    from clbench.learners import lae

    t = trial("learner=lae", "learner.decay=0.9", "learner.batch_size=8", sizes=[3, 2, 1], budget={"epochs": 5, "exemplars": 0})
    learner, runtime, pipeline = t.start()
    t.learn(learner, runtime, pipeline, 0)
    assert learner.offline == {}, "there is no offline module in the first experience"
    start = learner.pet.state()
    naive, log = {k: v.clone() for k, v in start.items()}, []

    def watch(when, place):
        if when == "before":
            online = learner.pet.state()
            for name in naive:
                naive[name] = 0.9 * naive[name] + 0.1 * online[name]
            log.append(distance(online, start)[0] == 0)

    spy_on_steps(learner, monkeypatch, lae, watch)
    t.learn(learner, runtime, pipeline, 1)
    steps = len(log) // 5
    assert all(log[: 3 * steps]) and not any(log[3 * steps :]), "frozen for 3 of 5 epochs"
    for name, value in learner.offline.items():
        torch.testing.assert_close(value, naive[name])


def test_lae_learns_in_a_single_epoch_too():
    t = trial("learner=lae", "learner.batch_size=8", sizes=[3, 2, 1], budget={"epochs": 1, "exemplars": 0})
    learner, runtime, pipeline = t.start()
    t.learn(learner, runtime, pipeline, 0)
    start = learner.pet.state()
    t.learn(learner, runtime, pipeline, 1)
    assert distance(learner.pet.state(), start)[0] > 0, "0.6 of one epoch is not the whole epoch"


def lae_steps(monkeypatch, visited=0, **changes):
    """Whether the online module stands still, step by step of the second experience, and the module in the end."""
    from clbench.learners import lae

    words = ("learner=lae", "learner.batch_size=5", "learner.lr=0.01")
    t = trial(*words, sizes=[3, 2, 1], budget={"epochs": 2, "exemplars": 0})
    learner, runtime, pipeline = t.start()
    runtime.exempt = True  # what is counted besides is not the learner's training
    t.learn(learner, runtime, pipeline, 0)
    begin, still = runtime.begin, []
    monkeypatch.setattr(runtime, "begin", lambda *args: (begin(*args), setattr(runtime, "used_new", visited)))
    for name, value in changes.items():
        learner.recipe = replace(learner.recipe, **{name: value})
    start = learner.pet.state()

    def watch(when, place):
        if when == "after":
            still.append(distance(learner.pet.state(), start)[0] == 0)

    spy_on_steps(learner, monkeypatch, lae, watch)
    t.learn(learner, runtime, pipeline, 1)
    monkeypatch.undo()
    return still, learner.pet.state()


def test_lae_freezes_by_the_place_and_not_by_what_was_visited(monkeypatch):
    """24 samples in batches of 5, the incomplete one dropped: 8 steps, of which 4 (0.6 * 8 = 4.8) stand still."""
    still, alone = lae_steps(monkeypatch)
    assert still == [True] * 4 + [False] * 4
    visited, other = lae_steps(monkeypatch, visited=1000)
    assert visited == still and all(torch.equal(alone[name], other[name]) for name in alone)
    gathered, _ = lae_steps(monkeypatch, accumulate=2)
    assert gathered == [True] * 2 + [False] * 2


def test_lae_answers_with_the_larger_of_two_softmaxes():
    t, learner, _, pipeline, _ = learned(
        "learner=lae", "learner.lr=0.05", "learner.decay=0.5", "learner.freeze=0", sizes=[3, 2, 1]
    )
    batch = open_eval(t.scenario, 0, pipeline).data.batch(np.arange(6))
    with torch.no_grad():
        on = learner.head(learner.model.features(batch)).softmax(1)
        with learner.pet.use(learner.offline):
            off = learner.head(learner.model.features(batch)).softmax(1)
        answer = learner.predict(batch)
    assert not torch.allclose(on, off)
    torch.testing.assert_close(answer["ensemble"], torch.stack([on, off]).max(0).values)


@pytest.mark.parametrize("pet", ["none"])
@pytest.mark.parametrize("name", ["lae", "ease", "ssiat", "mos"])
def test_methods_that_need_a_module_say_so(name, pet):
    with pytest.raises(UserError, match=r"pet=none|tunes a module|pet=adapter"):
        trial(f"learner={name}", f"pet={pet}").start()


# --- APER


@pytest.mark.parametrize("pet", ["adapter", "none"])
def test_aper_is_the_nearest_mean_of_two_networks(pet):
    t, learner, _, pipeline, seen = learned("learner=aper", f"pet={pet}", "learner.lr=1.0", experiences=3)
    bare = trial("learner=ncm").start()[0].model
    adapted = learner.adapted

    def describe(batch):
        return torch.cat([bare.features(batch.x), adapted.features(batch.x)], 1)

    assert not torch.allclose(*(m.features(seen[0].train.batch(range(3)).x) for m in (bare, adapted)), atol=1e-3), (
        "nothing was adapted"
    )
    with torch.no_grad():
        f = torch.cat([describe(b) for e in seen for b in e.train.test_batches(50)])
        y = torch.cat([torch.as_tensor(e.train.y) for e in seen])
        means = torch.stack([f[y == c].mean(0) for c in range(6)])
        x = describe(open_eval(t.scenario, 1, pipeline).data.batch(np.arange(6)))
    naive = F.cosine_similarity(x[:, None], means[None], dim=2)
    torch.testing.assert_close(t.scores(learner, pipeline, 1, 6), naive, atol=1e-5, rtol=1e-4)


def test_aper_and_ranpac_train_in_the_first_experience_only():
    for name in ("aper", "ranpac"):
        t, learner, runtime, pipeline, _ = learned(f"learner={name}", experiences=1)
        before, steps = learner.pet.state(), runtime.meter.steps
        assert steps > 0
        t.learn(learner, runtime, pipeline, 1)
        assert distance(learner.pet.state(), before)[0] == 0 and runtime.meter.steps == steps


# --- RanPAC


@pytest.mark.parametrize("projection", [0, 50, 400])
def test_ranpac_is_one_ridge_regression_on_everything(projection):
    options = ("learner=ranpac", "pet=none", f"learner.projection={projection}", "learner.ridge=10.0")
    t, learner, _, pipeline, seen = learned(*options, experiences=3)
    with torch.no_grad():
        f = torch.cat([learner.model.features(b) for e in seen for b in e.train.test_batches(50)])
        x = learner.model.features(open_eval(t.scenario, 2, pipeline).data.batch(np.arange(6)))
    y = torch.cat([torch.as_tensor(e.train.y) for e in seen])
    if projection:
        f, x = (torch.relu(v @ learner.projection) for v in (f, x))
    h, target = f.double(), F.one_hot(y, 6).double()
    w = torch.linalg.solve(h.T @ h + 10.0 * torch.eye(h.shape[1], dtype=torch.float64), h.T @ target)
    torch.testing.assert_close(t.scores(learner, pipeline, 2, 6)[:6].double(), x.double() @ w, atol=1e-5, rtol=1e-4)


def test_the_projection_is_the_seeds_and_never_changes():
    a, b = (trial("learner=ranpac", "learner.projection=30").start()[0] for _ in range(2))
    assert torch.equal(a.projection, b.projection)
    _, learner, *_ = learned("learner=ranpac", "learner.projection=30", experiences=2)
    assert torch.equal(learner.projection, a.projection)


def test_ridge_root_becomes_sums_without_a_jump():
    rng = torch.Generator().manual_seed(0)
    h, y = torch.rand(60, 40, generator=rng), torch.randint(0, 3, (60,), generator=rng)
    root = RidgeRoot(40)
    for last in (10, 39, 40, 60):
        first = {10: 0, 39: 10, 40: 39, 60: 40}[last]
        root.update(h[first:last], y[first:last], 3)
        sums = RidgeSums(40)
        sums.update(h[:last], y[:last], 3)
        assert (root.sums is None) == (last < 40)
        for ridge in (1e-3, 1.0, 1e4):
            torch.testing.assert_close(root.solve(ridge), sums.solve(ridge), atol=1e-6, rtol=1e-6)
        again = RidgeRoot(40)
        again.load_state_dict(root.state_dict())
        assert torch.equal(again.solve(1.0), root.solve(1.0))


# --- EASE


def test_semantic_completion_by_hand_and_against_loops():
    rng = torch.Generator().manual_seed(1)
    owner = [0, 0, 1, 2, 2, 2]
    means = torch.randn(6, 3, 5, generator=rng)
    full = complete(means, torch.tensor(owner))
    for c, j in itertools.product(range(6), range(3)):
        i = owner[c]
        if j <= i:
            assert torch.equal(full[c, j], means[c, j]), "true means stay"
            continue
        later = [k for k in range(6) if owner[k] >= j]
        likeness = [float(F.cosine_similarity(means[c, i], means[k, i], dim=0)) for k in later]
        share = np.exp(likeness) / np.exp(likeness).sum()
        naive = sum(float(s) * means[k, j] for s, k in zip(share, later, strict=True))
        torch.testing.assert_close(full[c, j], naive, atol=1e-5, rtol=1e-5)
    two = torch.zeros(3, 2, 2)
    two[0, 0] = torch.tensor([1.0, 0.0])
    two[1, 0], two[1, 1] = torch.tensor([1.0, 0.0]), torch.tensor([5.0, 0.0])
    two[2, 0], two[2, 1] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])
    torch.testing.assert_close(complete(two, torch.tensor([0, 1, 1]))[0, 1], torch.tensor([2.5, 1.5]))


def test_ease_weights_subspaces_and_alpha_zero():
    t, learner, _, pipeline, _ = learned("learner=ease", "learner.lr=0.1", experiences=3)
    batch = open_eval(t.scenario, 0, pipeline).data.batch(np.arange(4))
    owner, full = learner.experience_of_class, complete(learner.means_KSD, torch.tensor(learner.experience_of_class))
    with torch.no_grad():
        f = []
        for state in learner.bank:
            with learner.pet.use(state):
                f.append(learner.model.features(batch.x))
    for alpha in (0.1, 0.0):
        learner.alpha = alpha
        z = t.scores(learner, pipeline, 0, 4)[:4]
        for c in range(6):
            naive = sum((1.0 if j == owner[c] else alpha / 2) * F.cosine_similarity(f[j], full[c, j][None]) for j in range(3))
            torch.testing.assert_close(z[:, c], naive, atol=1e-5, rtol=1e-4)
    assert len({float(state["0/down"].sum()) for state in learner.bank}) == 3, "every experience has a fresh adapter"


# --- SSIAT


def test_drift_follows_the_samples_nearby():
    rng = torch.Generator().manual_seed(0)
    means, old = torch.randn(2, 3, generator=rng), torch.randn(7, 3, generator=rng)
    new = old + torch.randn(7, 3, generator=rng)
    moved = shifted(means, old, new, 4.0)
    for c in range(2):
        w = [np.exp(-float((old[i] - means[c]).square().sum()) / 32) + 1e-5 for i in range(7)]
        naive = means[c] + sum(w[i] / sum(w) * (new[i] - old[i]) for i in range(7))
        torch.testing.assert_close(moved[c], naive.float(), atol=1e-5, rtol=1e-5)
    assert torch.equal(shifted(means, old, old, 4.0), means), "no drift, no shift"


def test_ssiat_moves_old_means_and_no_covariance():
    t, learner, runtime, pipeline, _ = learned("learner=ssiat", "learner.lr=0.1", experiences=1)
    before = detached(learner.gaussians.state_dict())
    t.learn(learner, runtime, pipeline, 1)
    after = learner.gaussians.state_dict()
    assert not torch.allclose(after["mean_KD"][:3], before["mean_KD"])
    assert torch.equal(after["cov_KDD"][:3], before["cov_KDD"])
    unpaired = trial("learner=ssiat", "learner.compat_unpaired=true", "learner.lr=0").start()
    paired = trial("learner=ssiat", "learner.lr=0").start()
    drift = []
    for one in (paired, unpaired):
        t.learn(*one, 0)
        one[1].begin(1)
        from clbench.streams.images.data import open_experience

        e = open_experience(t.scenario, 1, one[2])
        drift.append(float((one[0]._features(e, "new") - one[0]._features(e, "old")).norm()))
    assert drift[0] == 0 and drift[1] > 0.1, "an unchanged network has no drift, unless rows are of different images"


def test_margin_lowers_the_own_class_only():
    z = margin_logits(torch.tensor([[0.5, 0.2], [0.1, 0.9]]), torch.tensor([0, 1]), 20.0, 0.3)
    torch.testing.assert_close(z, torch.tensor([[4.0, 4.0], [2.0, 12.0]]))


# --- MOS


def test_merging_in_closed_form_is_the_merging_step_by_step():
    rng = torch.Generator().manual_seed(0)
    state = {f"{block}/down": torch.randn(2, 3, generator=rng) for block in range(12)}
    mean = {name: torch.randn(2, 3, generator=rng) for name in state}
    current = {name: value.clone() for name, value in state.items()}
    seen = {}
    for block in range(12):  # a forward pass: every block merges all blocks, then uses its own
        current = {name: 0.9 * value + 0.1 * mean[name] for name, value in current.items()}
        seen[f"{block}/down"] = current[f"{block}/down"]
    for name, value in pulled(state, mean, 0.9, per_block=True).items():
        torch.testing.assert_close(value, seen[name])
    for name, value in pulled(state, mean, 0.9, calls=12).items():
        torch.testing.assert_close(value, current[name])
    for _ in range(2):
        for block in range(12):
            current = {name: 0.9 * value + 0.1 * mean[name] for name, value in current.items()}
            seen[f"{block}/down"] = current[f"{block}/down"]
    for name, value in pulled(state, mean, 0.9, per_block=True, calls=24).items():
        torch.testing.assert_close(value, seen[name])


@pytest.mark.parametrize("variant", ["paper", "official_effective"])
def test_mos_merges_once_or_in_every_block(monkeypatch, variant):
    from clbench.learners import mos

    t = trial("learner=mos", f"learner.variant={variant}", "learner.lr=0.0", "learner.align_epochs=0")
    learner, runtime, pipeline = t.start()
    t.learn(learner, runtime, pipeline, 0)
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in learner.pet.values.values():
            value.add_(torch.randn(value.shape, generator=rng))
    start, mean, steps = learner.pet.state(), learner.mean(1), []
    spy_on_steps(learner, monkeypatch, mos, lambda when, place: steps.append(when == "after"))
    t.learn(learner, runtime, pipeline, 1)
    merges = sum(steps) * (1 if variant == "paper" else 1 + learner.blocks)
    share = 0.9**merges  # without learning, training only merges
    for name, value in learner.bank[1].items():
        torch.testing.assert_close(value, mean[name] + share * (start[name] - mean[name]), atol=1e-5, rtol=1e-4)


def test_mos_deploys_what_its_variant_says():
    for variant in ("paper", "official_effective"):
        _, learner, *_ = learned("learner=mos", f"learner.variant={variant}", "learner.lr=0.1", experiences=3)
        deployed = learner.deployed()
        for j, state in enumerate(deployed):
            wanted = learner.bank[j] if variant == "paper" or j == 0 else average(learner.bank[:j])
            assert distance(state, wanted)[0] == 0


def test_orthogonality_wants_every_row_most_like_itself():
    means, batch = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    rows = torch.cat([means, batch])
    naive = torch.stack([-torch.log_softmax(rows @ rows[i] / 0.8, 0)[i] for i in range(3)]).mean()
    torch.testing.assert_close(orthogonality(means, batch), naive)


@pytest.mark.parametrize("variant", ["paper", "official_effective"])
def test_lazy_retrieval_is_the_loop_over_the_whole_bank(variant):
    options = ("learner=mos", f"learner.variant={variant}", "learner.lr=0.3", "learner.align_epochs=2")
    t, learner, _, pipeline, _ = learned(*options, experiences=3)
    owner, deployed = learner.experience_of_class, learner.deployed()
    rounds = []
    for j in range(3):
        data = open_eval(t.scenario, j, pipeline).data
        z = t.scores(learner, pipeline, j, 7)
        for i in range(len(data)):
            x = data.batch([i]).x
            with torch.no_grad():
                logits, features = [], []
                for state in deployed:
                    with learner.pet.use(state):
                        features.append(learner.model.features(x))
                    logits.append(learner.head(features[-1])[0])
                q = F.cosine_similarity(features[0], learner.prototypes.means_KD.float(), dim=1)
            now, count = owner[int(q.argmax())], 0
            while True:
                count += 1
                then = owner[int(logits[now].argmax())]
                if then == now or count == 4:
                    break
                now = then
            rounds.append(count)
            naive = logits[now].softmax(0) + (3 * q).softmax(0)
            torch.testing.assert_close(z[i], naive, atol=1e-4, rtol=1e-3)
    assert max(rounds) > 1, "no sample ever moved: the test says nothing"


def test_raw_evaluation_changes_the_state_and_the_others_do_not():
    for variant, changes in (("official_raw", True), ("official_effective", False)):
        t, learner, _, pipeline, _ = learned("learner=mos", f"learner.variant={variant}", "learner.lr=0.3")
        first, second = t.scores(learner, pipeline, 1, 6), t.scores(learner, pipeline, 1, 6)
        assert torch.equal(first, second) != changes
    limit = learner.deployed()
    raw = trial("learner=mos", "learner.variant=official_raw").start()[0]
    raw.bank, raw.evaluated = learner.bank, [10_000] * 2
    assert distance(raw.deployed()[1], limit[1])[0] < 1e-6, "in the limit the raw variant deploys the mean"


def test_raw_statistics_are_taken_in_three_batches_at_once():
    """12 images of one class, batch_size 2: the release's loader gives 6 and 6, and every block of a pass merges once more."""
    options = ("learner.variant=official_raw", "learner.lr=0.3", "learner.batch_size=2")
    t, learner, _, pipeline, _ = learned("learner=mos", *options)
    own, mean = learner.bank[1], learner.bank[0]
    for name, value in learner.pet.state().items():
        torch.testing.assert_close(value, mean[name] + 0.9 ** (2 * 4) * (own[name] - mean[name]), atol=1e-6, rtol=1e-5)
    data, parts = open_experience(t.scenario, 1, pipeline).train, []
    for first in (0, 6):
        merged = {}
        for name, value in own.items():
            times = int(name.split("/")[0]) + 1 + (4 if first else 0)
            merged[name] = mean[name] + 0.9**times * (value - mean[name])
        with torch.no_grad(), learner.pet.use(merged):
            parts.append(learner.model.eval().features(data.batch(range(first, first + 6))))
    torch.testing.assert_close(learner.gaussians.centres()[3].float(), torch.cat(parts).mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "words", [("learner=mos",), ("learner=mos", "learner.variant=paper"), ("learner=ease",), ("learner=aper",)]
)
def test_no_test_image_passes_twice_under_a_module_that_stands(words, monkeypatch):
    """Over a whole run, evaluated after every experience: training in between does not make the model forget."""
    from clbench.models.feature_memory import FeatureMemory

    kept, keep = [], FeatureMemory.keep
    monkeypatch.setattr(FeatureMemory, "keep", lambda self, fresh, group: (kept.extend(fresh), keep(self, fresh, group))[1])
    t = trial(*words, "learner.lr=0.3")
    learner, runtime, pipeline = t.start()
    for index in range(3):
        t.learn(learner, runtime, pipeline, index)
        for j in range(index + 1):
            t.scores(learner, pipeline, j, 6)
    assert len(kept) == len(set(kept)) > 0


def test_retrieval_runs_only_the_adapters_that_are_visited():
    t, learner, _, pipeline, _ = learned("learner=mos", "learner.lr=0.3", experiences=3)
    learner.model.remember(False)
    data = open_eval(t.scenario, 0, pipeline).data
    before = learner.model.passes["eval"]
    t.scores(learner, pipeline, 0, 6)
    assert 2 * len(data) <= learner.model.passes["eval"] - before <= 5 * len(data)
    before, owner = learner.model.passes["eval"], torch.tensor(learner.experience_of_class)
    from clbench.models.pet import stack

    with torch.no_grad():
        learner.head.blocks[0].bias.add_(1e4)  # every sample belongs to the first experience at once
        learner.retrieve(data.batch(range(len(data))), stack(learner.deployed()), owner, torch.zeros(len(data)).long())
    assert learner.model.passes["eval"] - before == len(data), "settled samples are not run again"
