"""MNIST-360: who is shown when and at which angle, by hand and against a plain loop with a counter for each class."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_operators import PIPELINE, fails, pictures, stream, toy

from clbench.interfaces import UserError
from clbench.streams import generators, transforms
from clbench.streams.eval_sets import open_eval
from clbench.streams.manifest import Manifest
from clbench.streams.operators import registry
from clbench.streams.operators.mnist_360 import mnist_360


def angles(entry) -> dict[int, float]:
    """Sample -> degrees, read from the steps of an entry."""
    found = {}
    for step in entry.transform:
        turn = step["turn"]
        for place, sample in enumerate(transforms.decode_ids(turn["ids"], 1 << 20).tolist()):
            found[sample] = (turn["first"] + place * turn["by"]) % 360
    return found


def test_three_classes_of_four_by_hand():
    """Two parts each, the last first; class 0 begins at -60 degrees, class 1 at 0, class 2 at 60; a quarter turn a sample."""
    base = stream(toy(3, (4, 4), 4), increment=3)
    y = base.dataset.y
    ids = {c: np.flatnonzero((y == c) & (base.dataset.split == 0)).tolist() for c in range(3)}
    made = mnist_360(base, classes=3, rounds=1)
    entries = made.manifest.experiences
    assert [e.classes for e in entries] == [(0, 1), (1, 2), (2, 0)] and [e.name for e in entries] == ["pair0", "pair1", "pair2"]
    last, first = slice(2, 4), slice(0, 2)
    wanted = [((0, last), (1, last)), ((1, first), (2, last)), ((2, first), (0, first))]
    for entry, pair in zip(entries, wanted, strict=True):
        assert sorted(entry.train.tolist()) == sorted(i for c, part in pair for i in ids[c][part])
        assert y[entry.train].tolist() == [pair[0][0], pair[1][0]] * 2, "the two alternate"
    starts = {0: [300, 30, 120, 210], 1: [0, 90, 180, 270], 2: [60, 150, 240, 330]}
    for c, degrees in starts.items():
        assert [round(angles(e)[i]) for e in entries for i in e.train.tolist() if y[i] == c] == degrees
    evals = made.manifest.evals
    assert [(e.name, e.classes, e.first_seen) for e in evals] == [
        ("toy-0", (0,), 0),
        ("toy-1", (1,), 0),
        ("toy-2", (2,), 1),
    ]
    assert all(list(angles(e).values()) == [0, 180] for e in evals), "two test samples share one turn"


@given(st.integers(2, 5), st.integers(1, 3), st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_every_picture_equals_a_plain_loop(classes: int, rounds: int, seed: int):
    """Every sample of the circle once, in 2 x rounds parts that differ by one sample at most; a counter for each class."""
    per_class = 2 * rounds + seed
    base = stream(toy(6, (5, 4), per_class, seed=seed))
    made = mnist_360(base, classes, rounds, seed)
    data, counts, shown = base.dataset, Counter(), []
    assert len(made.manifest.experiences) == classes * rounds
    for i, entry in enumerate(made.manifest.experiences):
        found = pictures(made, i)
        assert set(entry.classes) == {i % classes, (i + 1) % classes}
        sizes = Counter(data.y[entry.train].tolist())
        assert all(n in (per_class // (2 * rounds), -(-per_class // (2 * rounds))) for n in sizes.values())
        for sample, image in zip(entry.train.tolist(), found, strict=True):
            c = int(data.y[sample])
            degrees = (c - 1) * 60 + counts[c] * 360 / per_class
            (raw,) = data.images.raw(np.array([sample]))
            assert np.array_equal(image, np.asarray(Image.fromarray(raw).rotate(round(degrees, 6) % 360)))
            counts[c] += 1
        shown += entry.train.tolist()
    assert sorted(shown) == np.flatnonzero((data.split == 0) & (data.y < classes)).tolist()
    assert Manifest.from_json(made.manifest.to_json()) == made.manifest
    again = mnist_360(base, classes, rounds, seed + 1).manifest
    assert again != made.manifest or per_class == 2 * rounds


def test_test_pictures_turn_too():
    made = mnist_360(stream(toy(3, (4, 4), 4)), classes=3, rounds=1)
    shown = open_eval(made, 1, PIPELINE).data
    upright = made.dataset.images.raw(made.manifest.evals[1].ids)
    assert [np.array_equal(a, b) for a, b in zip(shown.raw(np.arange(2)), upright, strict=True)] == [True, False]
    assert np.array_equal(shown.raw(np.array([1]))[0], np.rot90(upright[1], 2))
    ids = np.concatenate([open_eval(made, j, PIPELINE).data.ids for j in range(3)])
    assert not np.isin(ids, np.arange(len(made.dataset))).any(), "turned pictures are others than those in the data set"


def test_what_cannot_turn_is_refused():
    fails(lambda: mnist_360(stream(toy(4)), 5), "mnist_360.classes=5", "has 4 classes")
    fails(lambda: mnist_360(stream(toy(4)), 3, 2), "class toy-0 has 3 training and 2 test samples", "needed are 4 and 1")
    fails(lambda: registry.apply(stream(toy(4)), ["blur", "mnist_360"]), "both deal")
    fails(lambda: registry.apply(stream(toy(4)), ["rotate", "mnist_360"]), "put mnist_360 before it")
    made = mnist_360(stream(toy(4)), 3, 1)
    with pytest.raises(UserError, match="discloses tasks"):
        tasks = replace(made.manifest, discloses_task=True)
        mnist_360(replace(made, manifest=tasks), 3, 1)


def test_steps_that_name_no_samples_are_refused():
    for ids in ("", "3-1", "0-999999999999", "5,5", "x", 7):
        fails(lambda ids=ids: transforms.checked([{"turn": {"first": 0, "by": 1, "ids": ids}}], "here"), "turn needs")
    for first in (361, "0", True, float("nan")):
        fails(lambda first=first: transforms.checked([{"turn": {"first": first, "by": 1, "ids": "0"}}], "here"), "turn needs")


def test_digits_are_pinned():
    """Nine digits of the embedded data in 27 pairs, the same stream everywhere."""
    chain = ["mnist_360", {"single_pass": {"shuffle": False}}, "hide_boundaries"]
    made = generators.class_incremental("s", "digits", increment=10, operators=chain)
    assert len(made.manifest.experiences) == 27 and made.manifest.class_order == tuple(range(9))
    facts = made.facts()
    assert not facts.has_boundaries and not facts.discloses_task and facts.budget.in_order
    total = int(((made.dataset.split == 0) & (made.dataset.y < 9)).sum())
    assert sum(len(e.train) for e in made.manifest.experiences) == total
    assert made.manifest.sha256.startswith("8645cfb66db42f7b"), made.manifest.sha256
    assert max(len(line) for line in made.text().splitlines()) < 300, "lists of samples are cut in what people read"


def test_a_circle_of_digits_runs(clbench):
    small = ("scenario.dataset=digits", "scenario.limit_train=6", "scenario.limit_test=2", "arithmetic=reference")
    few = "scenario.operators=[{mnist_360:{classes:3,rounds:1}},{single_pass:{shuffle:false}},hide_boundaries]"
    clbench("run", "scenario=mnist_360", "learner=ncm", "learner.streaming=true", "num_threads=1", few, *small)
    (record,) = clbench.records()
    assert record["status"] == "ok" and len(record["correct"]) == 3 and record["n"] == [2] * 3
    assert record["scenario"]["operators"] == ["mnist_360", "single_pass", "hide_boundaries"]
