"""The online protocol: memories that are filled step by step, updates on the batches of a stream, classes that appear late."""

import copy
import itertools
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from clbench.config.compose import compose, load_target
from clbench.interfaces import Capabilities, UserError, declared, mismatch
from clbench.learners import er
from clbench.learners.agem import Agem
from clbench.learners.bn_adapt import BnAdapt
from clbench.learners.cbp import Cbp
from clbench.learners.cotta import Cotta
from clbench.learners.er_ace import ErAce
from clbench.learners.finetune import Finetune
from clbench.learners.l2_init import L2Init
from clbench.learners.mir import Mir
from clbench.learners.scr import Scr
from clbench.learners.shrink_perturb import ShrinkPerturb
from clbench.learners.tent import Tent
from clbench.models.heads import LOWEST, OnlineHead
from clbench.streams import rng
from clbench.streams.images.data import ImageBatch, ImageData, open_experience
from clbench.streams.images.pixels import Pipeline, make_profile
from clbench.testing.contract import Trial, small_stream
from clbench.training import looks
from clbench.training.checkpoint import Journal
from clbench.training.memory import exemplar_means
from clbench.training.online import OnlineStream, per_batch, places
from clbench.training.runtime import Interrupted
from clbench.training.state import fingerprint
from clbench.training.stream_memory import Remembered, StreamMemory

PIPELINE = Pipeline(make_profile("unit", 2), "cpu", "none")


def samples(y, first=0):
    """Images of 2 x 2 pixels, each of the value of its id, with labels `y` and ids from `first`."""
    ids = np.arange(first, first + len(y))
    images = [np.full((2, 2, 3), i % 256, np.uint8) for i in ids]
    return ImageData.of_arrays(images, np.array(y), ids, PIPELINE)


def fill(memory, parts, batch=3):
    """Offer the labels of each experience in small batches; ids are numbers of visits."""
    first, trace = 0, []
    for experience, y in enumerate(parts):
        data = samples(y, first)
        for i in range(0, len(y), batch):
            rows = np.arange(i, min(i + batch, len(y)))
            memory.insert(data, rows, data.batch(rows), experience)
            trace.append(sorted(memory.ids.tolist()))
            for image, number in zip(memory.images, memory.ids, strict=True):
                assert (image == number % 256).all(), "pixels of another sample"
        first += len(y)
    return trace


def test_a_reservoir_holds_the_visits_with_the_smallest_keys_at_every_step():
    for seed in range(4):
        memory = StreamMemory("reservoir", 7, seed)
        trace = fill(memory, [[0] * 40, [1] * 20])
        keys = rng.bits(rng.key(seed, "reservoir"), np.arange(60))
        for step, ids in enumerate(trace):
            n = min(60, 3 * step + 3) if 3 * step + 3 <= 39 else min(60, 40 + 3 * (step - 13)) if step >= 14 else 40
            assert ids == sorted(np.argsort(keys[:n])[:7].tolist())
        assert memory.visited == 60 and (memory.experience == (memory.ids >= 40)).all()


def test_the_distribution_is_that_of_algorithm_r():
    """Every visit is in with probability m / n: chi-squared over 3,000 seeds, 39 degrees of freedom, and a joint count."""
    n, m, seeds = 40, 8, 3000
    found, pairs = np.zeros(n), 0
    data = samples([0] * n)
    batch = data.batch(np.arange(n))
    for seed in range(seeds):
        memory = StreamMemory("reservoir", m, seed)
        memory.insert(data, np.arange(n), batch, 0)
        found[memory.ids] += 1
        pairs += {0, n - 1} <= set(memory.ids.tolist())
    expected = seeds * m / n
    assert ((found - expected) ** 2 / (expected * (1 - m / n))).sum() < 72  # p = 0.001
    assert abs(pairs / seeds - m / n * (m - 1) / (n - 1)) < 4 * (0.035 / seeds) ** 0.5


def test_batches_do_not_matter_and_a_restored_memory_goes_on():
    y = rng.integers(5, 50, 6).tolist()
    for policy, batch in itertools.product(("reservoir", "balanced", "ring", "task_ring"), (1, 4, 50)):
        whole, parts = StreamMemory(policy, 9, 3), StreamMemory(policy, 9, 3)
        fill(whole, [y[:30], y[30:]], 50)
        fill(parts, [y[:30]], batch)
        again = StreamMemory(policy, 9, 3)
        again.load_state_dict(parts.state_dict())
        data = samples(y[30:], 30)
        again.insert(data, np.arange(20), data.batch(np.arange(20)), 1)
        assert fingerprint(again.state_dict()) == fingerprint(whole.state_dict()), (policy, batch)
        assert len(again) == 9 and again.num_bytes() == 9 * 12


def naive_balanced(y, m, seed):
    """GDumb's algorithm 1 with lists of visits by class."""
    stored = {}
    for v, c in enumerate(y):
        share = m // len(stored) if stored else m
        if c in stored and len(stored[c]) >= share:
            continue
        if sum(map(len, stored.values())) == m:
            largest = max(sorted(stored), key=lambda k: len(stored[k]))
            order = stored[largest]
            order.remove(order[rng.key(seed, "remove", v) % len(order)])
            if not order:
                del stored[largest]
        stored.setdefault(c, []).append(v)
    return {c: sorted(v) for c, v in stored.items()}


def test_the_greedy_sampler_is_balanced_and_as_published():
    for seed in range(20):
        y = np.sort(rng.integers(seed, 120, 6)).tolist() if seed % 2 else rng.integers(seed, 120, 6).tolist()
        memory = StreamMemory("balanced", 13, seed)
        fill(memory, [y], 5)
        naive = naive_balanced(y, 13, seed)
        counts = np.bincount(memory.y, minlength=6)
        assert counts.tolist() == [len(naive.get(c, [])) for c in range(6)]
        assert counts.max() - counts.min() <= 1 and 12 <= len(memory) <= 13  # 6 x floor(13 / 6), or one from before


def test_a_small_memory_of_many_classes():
    memory = StreamMemory("balanced", 2, 0)
    fill(memory, [[0, 1, 2, 3, 4]], 1)
    assert len(memory) == 2 and 4 in memory.y


@pytest.mark.parametrize(("policy", "share", "kept"), [("task_ring", None, 5), ("task_ring", 3, 3), ("ring", None, 2)])
def test_rings_keep_the_newest(policy, share, kept):
    memory = StreamMemory(policy, 10, 0, share)
    y = [0, 1] * 8
    fill(memory, [y, [2, 3] * 8], 3)
    cells = memory.experience if policy == "task_ring" else memory.y
    for cell in np.unique(cells):
        every = np.repeat([0, 1], 16) if policy == "task_ring" else np.array(y + [2, 3] * 8)
        own = np.flatnonzero(every == cell)
        size = int((cells == cell).sum())
        assert size >= kept and sorted(memory.ids[cells == cell].tolist()) == own[-size:].tolist()


def test_draws_are_without_replacement_and_may_be_restricted():
    memory = StreamMemory("reservoir", 20, 0)
    fill(memory, [[0] * 12, [1] * 12])
    for key in range(50):
        rows = memory.rows(key, 8)
        assert len(set(rows.tolist())) == 8
        assert (memory.experience[memory.rows(key, 8, memory.experience < 1)] == 0).all()
    assert len(memory.rows(1, 50)) == 20 and memory.rows(3, None).tolist() == list(range(20))
    batch = memory.batch(memory.rows(4, 5), samples([0]), None)
    assert (batch.x[:, 0, 0, 0] * 255).round().int().tolist() == batch.ids.tolist() and batch.replayed == 5


def test_what_is_remembered_does_not_depend_on_slots():
    """GDumb: the same set of samples in other slots gives the same batches."""
    a = StreamMemory("reservoir", 6, 0)
    fill(a, [[0, 1, 2, 0, 1, 2]])
    b = copy.deepcopy(a)
    order = [3, 1, 5, 0, 2, 4]
    b.images = [a.images[i] for i in order]
    b.y, b.ids, b.visits, b.experience = (getattr(a, name)[order] for name in ("y", "ids", "visits", "experience"))
    made = [Remembered(memory, samples([0]), 4, 2, 9, False) for memory in (a, b)]
    for step in range(4):
        x, y = (one(step) for one in made)
        assert x.ids.tolist() == y.ids.tolist() and torch.equal(x.x, y.x) and x.replayed == len(x)


def test_a_class_that_has_not_appeared_has_the_lowest_score_and_no_gradient():
    head = OnlineHead(4, "cosine10")
    head.grow(2, torch.Generator().manual_seed(0))
    head.see(torch.tensor([0]))
    head.grow(2, torch.Generator().manual_seed(1))
    head.see(torch.tensor([3, 3]))
    f = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    z = head(f)
    assert (z[:, [1, 2]] == LOWEST).all() and z[:, [0, 3]].abs().max() <= 10
    rows = torch.cat([block.weight for block in head.inner.blocks])
    torch.testing.assert_close(z[:, 3], 10 * torch.cosine_similarity(f, rows[3][None]))
    torch.nn.functional.cross_entropy(z, torch.tensor([0, 3, 0, 3, 3])).backward()
    grads = torch.cat([block.weight.grad for block in head.inner.blocks])
    assert (grads[[1, 2]] == 0).all() and (grads[[0, 3]] != 0).any() and not head.inner.sigma.requires_grad
    again = OnlineHead(4, "cosine10")
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(f), z) and again.seen_K.tolist() == [True, False, False, True]
    with pytest.raises(UserError, match=r"learner\.head=sine"):
        OnlineHead(4, "sine")  # type: ignore[arg-type]


# --- streams -----------------------------------------------------------------------------------------------------------


def online(*overrides, operators=("single_pass",), **stream):
    (config,) = compose(list(overrides))
    scenario = small_stream(operators=list(operators), **({"budget": {"epochs": 1, "exemplars": 12}} | stream))
    return Trial(config, scenario, Capabilities(stores_exemplars=True, anytime=True))


def spied(t, monkeypatch, number=1):
    """Ids of every update of the first experiences, (new, drawn); learner, runtime."""
    seen, real = [], er.replay_loss

    def spy(learner, batch, combine):
        seen.append((batch.new.ids.tolist(), [] if batch.old is None else batch.old.ids.tolist()))
        return real(learner, batch, combine)

    monkeypatch.setattr(er, "replay_loss", spy)
    learner, runtime, pipeline = t.start()
    for i in range(number):
        t.learn(learner, runtime, pipeline, i)
    return seen, learner, runtime


@pytest.mark.parametrize("updates", [1.0, 2, 0.5, 0.3, 1.5])
def test_updates_on_each_batch(monkeypatch, updates):
    t = online("learner=er", f"learner.updates={updates}", "learner.batch_size=4", "learner.memory=12", "learner.replay=3")
    seen, learner, runtime = spied(t, monkeypatch)
    stream = t.scenario.manifest.experiences[0].train.tolist()
    batches = [stream[i : i + 4] for i in range(0, 36, 4)]
    exact = per_batch(updates)
    expected = [batches[int(s / exact)] for s in range(-(-9 * exact.numerator // exact.denominator))]
    assert [new for new, _ in seen] == expected
    for step, (_, old) in enumerate(seen):
        arrived = stream[: 4 * int(step / exact)]
        assert set(old) <= set(arrived) and len(old) == min(3, len(arrived))
    assert learner.memory.visited == 36, "every sample was offered to the memory"
    assert runtime.used_new == 36 and runtime.meter.visits["new"] == 36
    extra = sum(len(new) for (new, _), (before, _) in zip(seen[1:], seen, strict=False) if new == before)
    assert runtime.meter.visits["replayed"] == extra + sum(len(old) for _, old in seen)


@pytest.mark.parametrize("updates", ["0.25", "0.3", "1/3", "0.9"])
def test_updates_below_one_are_counted_over_the_run_whatever_its_experiences(updates):
    """The places of all updates are those of the same samples in one experience."""
    exact, rng = Fraction(updates), np.random.default_rng(3)
    for size in (1, 4, 10):
        sizes, before, found = rng.integers(1, 30, 25).tolist(), 0, []
        for n in sizes:
            each = -(-n // size)
            numbers = places(before, n, each, size, exact)
            assert len(set(numbers)) == len(numbers) and all(0 <= k < each for k in numbers), "at most one update a batch"
            found += [(before + k * size, before + min(n, (k + 1) * size)) for k in numbers]
            before += n
        due = [math.floor(t * size / exact) for t in range(math.ceil(before * exact / size))]
        assert len(found) == len(due) and all(start <= place < end for (start, end), place in zip(found, due, strict=True))
    assert places(0, 6, 4, 4, Fraction(1, 2)) == [0, 2], "two passes of 4 + 2 samples: 12 samples, one update for each 8"


def test_experiences_without_an_update_fill_the_memory_and_looks_fall_between_batches(monkeypatch):
    t = online("learner=er", "learner.updates=0.25", "learner.batch_size=10")
    sizes = [len(e.train) for e in t.scenario.manifest.experiences]

    class Looking(looks.Observer):
        def at_step(self, name, place, lr, visits):
            at.append((runtime.experience, visits))
            return 0.0

    at: list[tuple[int, int]] = []
    learner, runtime, pipeline = t.start()
    with looks.observed_by(Looking()):
        for i, _ in enumerate(sizes):
            t.learn(learner, runtime, pipeline, i)
    assert learner.memory.visited == sum(sizes) and runtime.meter.by_name["train"] == -(-sum(sizes) // 40)
    for i, n in enumerate(sizes):
        seen = {visits for experience, visits in at if experience == i}
        assert seen >= {*range(0, n, 10), n}, "after every batch, with an update or without"


@pytest.mark.parametrize("word", ["scr", "icarl learner.online=true"])
def test_looks_between_batches_without_an_update_see_the_memory_of_that_moment(word):
    t = online(f"learner={word.split()[0]}", *word.split()[1:], "learner.updates=0.25", "learner.batch_size=4")

    class Looking(looks.Observer):
        def at_step(self, name, place, lr, visits):
            if not visits:  # no look falls before the first sample
                return 0.0
            shown = learner._means()
            learner._means.forget()
            torch.testing.assert_close(shown, learner._means(), rtol=0, atol=0, equal_nan=True)
            at.append(learner.memory.visited)
            return 0.0

    at: list[int] = []
    learner, runtime, pipeline = t.start()
    with looks.observed_by(Looking()):
        for i in range(2):
            t.learn(learner, runtime, pipeline, i)
    assert len(set(at)) > runtime.meter.by_name["train"] + 2, "most looks fall between updates"


@pytest.mark.parametrize("word", ["0", "-1", ".inf", "true"])
def test_no_updates_are_refused(word):
    t = online("learner=er", f"learner.updates={word}")
    learner, runtime, pipeline = t.start()
    with pytest.raises(UserError, match=r"^learner\.updates must be a number above 0"):
        t.learn(learner, runtime, pipeline, 0)


def test_a_batch_never_replays_itself_and_a_memory_for_all_holds_what_came_before(monkeypatch):
    t = online("learner=er", "learner.batch_size=5", "learner.memory=100", "learner.replay=1000", budget={"epochs": 1})
    seen, _, _ = spied(t, monkeypatch, 2)
    arrived = []
    for new, old in seen:
        assert sorted(old) == sorted(arrived)
        arrived += new
    assert arrived == [i for e in t.scenario.manifest.experiences[:2] for i in e.train.tolist()]


@pytest.mark.parametrize(("option", "first"), [("learner.start=second_experience", 8), ("learner.past=true", 8), ("", 1)])
def test_where_replay_begins(monkeypatch, option, first):
    t = online("learner=er", "learner.batch_size=5", *([option] if option else []))
    seen, _, _ = spied(t, monkeypatch, 2)
    assert next(i for i, (_, old) in enumerate(seen) if old) == first
    if "past" in option:
        own = set(t.scenario.manifest.experiences[1].train.tolist())
        assert not any(own & set(old) for _, old in seen[8:])


class Watch(looks.Observer):
    """Asks after every step; keeps the columns that could be answered with, and the classes that the stream has shown."""

    def __init__(self, trial, learner, pipeline):
        self.trial, self.learner, self.pipeline, self.found = trial, learner, pipeline, []

    def at_step(self, name, place, lr, visits):
        if visits:
            with looks.modes_kept(self.learner):
                z = self.trial.scores(self.learner, self.pipeline, 0, 6)
            self.found.append((visits, z.shape[1], (z > LOWEST / 2).all(0).nonzero()[:, 0].tolist()))
        return 0.0


@pytest.mark.parametrize(
    "name",
    [
        "er", "er_ace", "mir", "scr", "slda", "ncm learner.streaming=true", "derpp learner.online=true",
        "randumb learner.gamma=0.01", "klda", "acil", "figmn", "air", "qda",
        "losse_ftl",
        "naive_bayes",
        "online_ensemble",
        "cls_er",
        "onpro",
        "hdc",
        "homeostatic",
    ],
)  # fmt: skip
def test_a_class_may_appear_in_the_middle_of_an_experience(name):
    """Sorted by class: the learner answers with the classes that have come, and with columns for all of the experience."""
    words = [f"learner={name.split()[0]}", *name.split()[1:], "learner.batch_size=6"]
    t = online(*words, budget={"epochs": 1, "exemplars": 36})
    manifest = t.scenario.manifest
    first = manifest.experiences[0]
    rows = np.argsort(t.scenario.labels(first), kind="stable")
    sorted_one = replace(first, train=first.train[rows])
    t.scenario = replace(t.scenario, manifest=replace(manifest, experiences=(sorted_one, *manifest.experiences[1:])))
    learner, runtime, pipeline = t.start()
    watch = Watch(t, learner, pipeline)
    with looks.observed_by(watch):
        t.learn(learner, runtime, pipeline, 0)
    assert [visits for visits, _, _ in watch.found] == [6, 12, 18, 24, 30, 36]
    assert all(width == 3 for _, width, _ in watch.found)
    assert [len(columns) for _, _, columns in watch.found] == [1, 1, 2, 2, 3, 3]


def hidden(scenario):
    """The stream without announced boundaries."""
    steps = tuple(replace(e, boundary=False) for e in scenario.manifest.experiences)
    return replace(scenario, manifest=replace(scenario.manifest, experiences=steps))


def test_boundaries_announced_and_hidden():
    facts = hidden(small_stream(operators=["single_pass"], budget={"epochs": 1})).facts()
    assert not facts.has_boundaries and facts.budget.in_order
    fits = {
        "er": True, "er learner.past=true": False, "er learner.start=second_experience": False, "er_ace": True, "agem": False,
        "agem learner.policy=reservoir": True, "gem": False, "gdumb": True, "mir": True, "mir learner.past=true": False,
        "scr": True, "scr learner.review=true": False, "slda": True, "ncm": True, "ncm learner.streaming=true": True,
        "randumb": True, "klda": True, "acil": True, "dsal": False, "fetril learner.train_first=false": False, "figmn": True,
        "air": True, "qda": True, "icl": False, "gkeal": False,
        "derpp": False, "derpp learner.online=true": True, "icarl learner.online=true": False,
        "losse_ftl": True,
        "naive_bayes": True,
        "online_ensemble": True,
        "cls_er": True,
        "onpro": False, "onpro learner.start=second_batch": True,
        "hdc": True,
        "homeostatic": True,
    }  # fmt: skip
    for words, expected in fits.items():
        (config,) = compose([f"learner={words.split()[0]}", *words.split()[1:]])
        can = declared(load_target(config["learner"]["_target_"]), config["learner"])
        why = mismatch(words, can, facts, True)
        assert (why is None) == expected, (words, why)
        if why and words.split()[0] != "derpp":
            assert "needs_boundaries" in why
        announced = mismatch(words, can, replace(facts, has_boundaries=True), True)
        assert (announced is None) == (words != "derpp"), words


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        (Finetune, {}, False), (Finetune, {"masking": "local"}, True), (BnAdapt, {}, False), (Tent, {}, True),
        (Cotta, {}, True), (Cbp, {}, False), (Cbp, {"masking": "local"}, True), (L2Init, {}, True),
        (L2Init, {"masking": "seen"}, False), (ShrinkPerturb, {}, True), (ShrinkPerturb, {"variant": "official"}, False),
        (ShrinkPerturb, {"variant": "official", "masking": "local"}, True), (ErAce, {}, False), (ErAce, {"past": True}, True),
        (Mir, {"start": "second_experience"}, True), (Mir, {"columns": "task"}, True), (Scr, {"past": True}, True),
        (Agem, {"policy": "reservoir"}, False), (Agem, {"policy": "reservoir", "columns": "task"}, True),
    ],
)  # fmt: skip
def test_who_must_be_told_where_an_experience_ends(kind, options, told):
    """Also whoever takes a softmax over an experience's classes, or over a task's."""
    can = declared(kind, options)
    assert can.needs_boundaries == told and can.needs_task_id == (options.get("columns") == "task")
    assert declared(Finetune, {"masking": "batch"}).needs_boundaries is False


RESUMED = [
    "er learner.updates=2", "er learner.updates=0.5", "er_ace", "agem", "gem", "mir", "scr", "derpp learner.online=true",
    "derpp learner.online=true learner.updates=0.5", "icarl learner.online=true", "gdumb learner.passes=2", "slda",
    "acil", "figmn", "air", "qda",
    "losse_ftl",
    "naive_bayes",
    "online_ensemble",
    "cls_er",
    "homeostatic learner.recent=6 learner.lr=0.05 learner.step=0.9",
    "onpro learner.replay=6 learner.mix_p=1",
]  # fmt: skip


@pytest.mark.parametrize("words", RESUMED)
def test_killed_in_the_middle_of_a_pass_it_ends_the_same(tmp_path, words):
    """At the first, a middle and the last step of the second pass: stopped, started anew in another's place, gone on."""
    t = online(f"learner={words.split()[0]}", *words.split()[1:], "learner.batch_size=6", sizes=[1, 2], num_classes=3)
    learner, runtime, pipeline = t.start()
    t.learn(learner, runtime, pipeline, 0)
    before = copy.deepcopy(learner.state_dict())
    steps = []
    runtime.progress = lambda *where: steps.append(where)
    t.learn(learner, runtime, pipeline, 1)
    expected = fingerprint(learner.state_dict())
    for stop_at in sorted({1, len(steps) // 2, len(steps) - 1} - {0}):
        folder, done = tmp_path / f"{stop_at}", 0
        for _ in range(2):
            again, its_runtime, its_pipeline = t.start(folder)
            its_runtime.journal = Journal(folder, 0.0)
            again.load_state_dict(copy.deepcopy(before))

            def count(*where, its_runtime=its_runtime, stop_at=stop_at):
                nonlocal done
                done += 1
                its_runtime.stop = done == stop_at

            its_runtime.progress = count
            try:
                t.learn(again, its_runtime, its_pipeline, 1)
            except Interrupted:
                continue
            break
        assert fingerprint(again.state_dict()) == expected, f"stopped at step {stop_at}"
        assert done == len(steps), "it went on from where it was"
        assert its_runtime.used_new == runtime.used_new and its_runtime.used_visits == runtime.used_visits


def test_means_of_the_moment_are_those_of_a_direct_computation():
    t = online("learner=scr", "learner.batch_size=6", "learner.backbone_lr=0.01")
    learner, runtime, pipeline = t.start()
    found = []

    class Look(looks.Observer):
        def at_step(self, name, place, lr, visits):
            if visits:
                with looks.modes_kept(learner), torch.no_grad():
                    learner.predict(ImageBatch.of(torch.zeros(1, 3, 32, 32)))
                    data = learner.memory.data(open_experience(t.scenario, 0, pipeline).train)
                    features = learner.model.eval().features(data.batch(np.arange(len(data))))
                    naive = exemplar_means(features, torch.as_tensor(data.y), 3)
                found.append((learner._means(), naive))
            return 0.0

    with looks.observed_by(Look()):
        t.learn(learner, runtime, pipeline, 0)
    assert len(found) == 6 and not torch.equal(found[1][0].nan_to_num(), found[-1][0].nan_to_num())
    for means, naive in found:
        torch.testing.assert_close(means, naive, equal_nan=True, atol=1e-5, rtol=1e-4)


def test_a_place_says_the_same_batch_whatever_was_asked_before():
    """A step's batch depends on the step and the memory, so that any of them can be the first."""
    t = online("learner=er", "learner.updates=1.5", "learner.batch_size=5")
    learner, runtime, pipeline = t.start()
    t.learn(learner, runtime, pipeline, 0)
    for step in (0, 1, 2):
        made = []
        for asked in ([step], range(step + 1)):
            runtime.begin(1, 12)
            stream = OnlineStream(learner, t.open(1, pipeline), replay=4)
            stream.head = None
            for one in asked:
                batch = stream(one)
            made.append((batch.new.ids.tolist(), batch.rows.tolist(), batch.key, batch.again, batch.last))
        assert made[0] == made[1]
