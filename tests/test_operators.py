"""Operators: what they do to samples, labels, pictures and budgets, by hand and against plain loops; and what they refuse."""

import json
import logging
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clbench.config import registry as choices
from clbench.config.compose import compose
from clbench.interfaces import Budget, Capabilities, Facts, UserError, mismatch
from clbench.records import record
from clbench.run import provenance
from clbench.streams import datasets, generators, rng, transforms
from clbench.streams.eval_sets import open_eval
from clbench.streams.id_runs import decode_labels, encode_labels
from clbench.streams.images.arrays import Pool
from clbench.streams.images.data import open_experience, shuffled, streamed
from clbench.streams.images.pixels import Pipeline, make_profile
from clbench.streams.manifest import EvalEntry, ExperienceEntry, Manifest
from clbench.streams.operators import copies, registry
from clbench.streams.operators.concatenate import concatenate
from clbench.streams.operators.permute import permute
from clbench.streams.operators.relabel import relabel
from clbench.streams.operators.rotate import rotate
from clbench.streams.operators.single_pass import single_pass
from clbench.streams.pools import concatenated
from clbench.streams.scenario import ArrayImages, Dataset, Scenario
from clbench.testing import contract

RESULTS = Path(__file__).parents[1] / "results"
PIPELINE = Pipeline(make_profile("unit", 8), "cpu", "none")


def fails(call, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)


def toy(classes: int = 4, size: tuple[int, int] = (3, 2), per_class: int = 3, name: str = "toy", seed: int = 0) -> Dataset:
    """Random pixels; `per_class` training and 2 test samples of every class, in mixed order."""
    y = np.repeat(np.arange(classes), per_class + 2)
    split = np.tile(np.array([0] * per_class + [1, 1], np.uint8), classes)
    order = rng.permutation(seed, len(y))
    pixels = rng.integers(seed + 1, len(y) * size[0] * size[1] * 3, 256).astype(np.uint8)
    images = ArrayImages(pixels.reshape(len(y), *size, 3))
    return datasets._finish(name, Pool(images, y[order], split[order], tuple(f"{name}-{c}" for c in range(classes))))


@pytest.fixture
def load(monkeypatch):
    """The data sets that names stand for."""
    known: dict[str, Dataset] = {"toy": toy()}
    monkeypatch.setattr(datasets, "load", lambda name, *_: known[name])
    return known


def stream(data: Dataset | None = None, increment: int = 2, **options) -> Scenario:
    data = toy() if data is None else data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", lambda *_: data)
        return generators.class_incremental("s", data.name, increment=increment, **options)


def pictures(scenario: Scenario, index: int) -> np.ndarray:
    data = open_experience(scenario, index, PIPELINE, exempt=True).train
    return np.stack(data.raw(np.arange(len(data))))


# pictures by hand


def test_permutation_of_a_2x2_image():
    """The order is pinned: a pixel p shows what was at `order[p]`, its three channels together."""
    order = transforms.permutation(0, 4, 4).tolist()
    assert order == [2, 0, 1, 3]
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    (out,) = transforms.transformed([image], ({"permute": {"seed": 0, "number": 4}},))
    assert out.tolist() == [[[6, 7, 8], [0, 1, 2]], [[3, 4, 5], [9, 10, 11]]]


def test_rotation_of_a_3x3_image():
    """By 90 degrees counter-clockwise; by 45 the centre and the edges' middles go to the corners' places, nothing comes in."""
    image = np.repeat(np.arange(1, 10, dtype=np.uint8).reshape(3, 3, 1), 3, axis=2)
    steps = [({"rotate": {"degrees": a, "interpolation": "nearest"}},) for a in (90.0, 180.0, -90.0)]
    turned = [transforms.transformed([image], s)[0][..., 0].tolist() for s in steps]
    assert turned == [[[3, 6, 9], [2, 5, 8], [1, 4, 7]], [[9, 8, 7], [6, 5, 4], [3, 2, 1]], [[7, 4, 1], [8, 5, 2], [9, 6, 3]]]
    own = np.asarray(Image.fromarray(image).rotate(30.0, Image.Resampling.BILINEAR))
    (bilinear,) = transforms.transformed([image], ({"rotate": {"degrees": 30.0, "interpolation": "bilinear"}},))
    assert np.array_equal(bilinear, own) and bilinear[1, 1, 0] == 5


def test_pictures_have_ids_of_their_own():
    steps = ({"permute": {"seed": 0, "number": 1}},)
    ids = np.array([0, 5, 7])
    found = transforms.picture_ids(ids, steps)
    assert np.array_equal(found & ((1 << 27) - 1), ids) and (found >= 1 << 27).all() and found.dtype == np.int64
    assert np.array_equal(transforms.picture_ids(ids, ()), ids)
    other = transforms.picture_ids(ids, ({"permute": {"seed": 0, "number": 2}},))
    assert not np.intersect1d(found, other).size


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 3), st.integers(2, 4))
@settings(max_examples=20, deadline=None)
def test_every_permuted_sample_equals_a_plain_loop(height: int, width: int, seed: int, number: int):
    base = stream(toy(size=(height, width), seed=seed))
    made = permute(base, experiences=number, seed=seed)
    assert len(made.manifest.experiences) == len(made.manifest.evals) == number
    for i, entry in enumerate(made.manifest.experiences):
        found = pictures(made, i)
        order = rng.permutation(rng.key("permute pixels", seed, i), height * width)
        for k, sample in enumerate(entry.train.tolist()):
            plain = made.dataset.images.raw(np.array([sample]))[0]
            for p in range(height * width):
                source = p if i == 0 else int(order[p])
                assert np.array_equal(found[k][p // width, p % width], plain[source // width, source % width])
        experience = open_experience(made, i, PIPELINE)
        assert experience.train.y.tolist() == [made.manifest.renumber[c] for c in made.dataset.y[entry.train].tolist()]
        test = open_eval(made, i, PIPELINE).data
        assert np.array_equal(test.raw([0])[0].reshape(-1, 3), _moved(made, made.manifest.evals[i].ids[0], i, order))


def _moved(scenario: Scenario, sample: int, i: int, order: np.ndarray) -> np.ndarray:
    flat = scenario.dataset.images.raw(np.array([sample]))[0].reshape(-1, 3)
    return flat if i == 0 else flat[order]


def test_a_batch_sees_the_same_pictures_as_raw():
    """Through the pipeline: x of a batch is what the pipeline makes of the transformed pixels."""
    made = rotate(stream(toy(size=(8, 8))), angles=[0, 90, 37])
    for i in range(3):
        data = open_experience(made, i, PIPELINE).train
        expected = PIPELINE(pictures(made, i), data.ids, None)
        assert (data.batch(np.arange(len(data))).x == expected).all()
        assert np.array_equal(
            pictures(made, i)[0],
            transforms.transformed(
                made.dataset.images.raw(made.manifest.experiences[0].train[:1]), made.manifest.experiences[i].transform
            )[0],
        )
    assert made.manifest.experiences[0].transform == ()


def test_remembered_features_are_those_of_the_picture():
    """A frozen network remembers features by id: a turned image is another picture of the same sample."""
    config = compose(["learner=ncm", "model=nano_random"])[0]
    turned = contract.small_stream(operators=[{"rotate": {"angles": [0, 180]}}], limit_train=3, limit_test=3)
    trial = contract.Trial(config, turned, Capabilities())

    def features(learner: Any, pipeline: Pipeline, index: int) -> np.ndarray:
        data = open_experience(turned, index, pipeline).train
        return learner.model.features(data.batch(np.arange(len(data)))).numpy()

    learner, _, pipeline = trial.start()
    learner.model.eval()
    plain, again = features(learner, pipeline, 0), features(learner, pipeline, 1)
    other, _, pipeline = trial.start()
    other.model.eval()
    assert learner.model.frozen and len(plain) == 18
    assert np.array_equal(again, features(other, pipeline, 1)) and not np.allclose(again, plain)


# purity and order


OPERATORS = st.lists(
    st.sampled_from(
        [
            "single_pass",
            {"single_pass": {"seed": 3}},
            {"relabel": {"identity_first": False}},
            {"permute": {"experiences": None}},
            {"rotate": {"experiences": None, "largest": 90.0}},
            {"permute": {"experiences": None, "size": 4}},
        ]
    ),
    max_size=3,
)


@given(OPERATORS)
@settings(max_examples=25, deadline=None)
def test_the_same_list_gives_the_same_hash(operators: list):
    base = stream()
    one, two = (registry.apply(base, operators) for _ in range(2))
    assert one.manifest == two.manifest and len(one.manifest.operators) == len(operators)
    assert Manifest.from_json(one.manifest.to_json()) == one.manifest
    assert (one.manifest == base.manifest) == (not operators)
    assert base.manifest == stream().manifest, "the stream that went in is as it was"
    for entry, old in zip(one.manifest.experiences, base.manifest.experiences, strict=True):
        assert sorted(entry.train.tolist()) == sorted(old.train.tolist())
        assert sorted(one.labels(entry).tolist()) == sorted(old_labels(base, old)), "labels are permuted, not lost"


def old_labels(scenario: Scenario, entry: ExperienceEntry) -> list[int]:
    return scenario.dataset.y[entry.train].tolist()


def test_order_of_operators_matters_where_it_should():
    base = stream()
    turn, mix = {"rotate": {"experiences": None}}, {"permute": {"experiences": None}}
    a, b = registry.apply(base, [turn, mix]), registry.apply(base, [mix, turn])
    assert a.manifest != b.manifest and not np.array_equal(pictures(a, 1), pictures(b, 1))
    c, d = registry.apply(base, ["relabel", "single_pass"]), registry.apply(base, ["single_pass", "relabel"])
    for left, right in zip(c.manifest.experiences, d.manifest.experiences, strict=True):
        assert left.train.tolist() == right.train.tolist() and c.labels(left).tolist() == d.labels(right).tolist()


def test_names_and_spellings_are_noted_alike():
    base = stream()
    spelled = [["permute"], [{"permute": None}], [{"permute": {}}], [{"permute": {"experiences": 10, "seed": 0}}]]
    assert len({registry.apply(base, one).manifest.sha256 for one in spelled}) == 1
    noted = registry.apply(base, ["permute"]).manifest.operators
    options = {"experiences": 10, "seed": 0, "identity_first": True, "classes": "shared", "size": None}
    assert noted == ({"permute": options},)


# one operator after the other


def test_copies_join_the_whole_stream():
    made = permute(stream(), experiences=3)
    first, *others = made.manifest.experiences
    assert first.classes == (0, 1, 2, 3) and len(first.train) == 12 and made.manifest.kind == "domain_incremental"
    assert all(np.array_equal(e.train, first.train) for e in others)
    assert [e.name for e in made.manifest.experiences] == ["permuted0", "permuted1", "permuted2"]
    assert [e.first_seen for e in made.manifest.evals] == [0, 1, 2] and not made.facts().every_experience_has_new_classes
    longer = permute(stream(), experiences=5)
    assert longer.manifest.experiences[2].transform == made.manifest.experiences[2].transform
    every = permute(stream(), experiences=2, identity_first=False).manifest.experiences
    assert [e.transform[0]["permute"]["number"] for e in every] == [0, 1]


def test_permuted_classes_of_their_own():
    made = permute(stream(), experiences=3, classes="new")
    assert made.manifest.class_order == tuple(range(12)) and made.manifest.kind == "class_incremental"
    assert made.facts().every_experience_has_new_classes
    last = open_experience(made, 2, PIPELINE)
    assert last.classes == last.new_classes == (8, 9, 10, 11) and last.num_seen == 12
    assert last.train.y.tolist() == (made.dataset.y[made.manifest.experiences[2].train] + 8).tolist()
    assert not made.manifest.evaluable(1, 0) and made.manifest.evaluable(1, 1)
    assert [made.class_name(c) for c in (0, 3, 4, 11)] == ["toy-0", "toy-3", "toy-0 (2)", "toy-3 (3)"]
    assert "4=toy-0 (2)" in made.manifest.text(made.class_name)


def test_tasks_are_told_apart_where_they_are_disclosed():
    data = toy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", lambda *_: data)
        made = generators.task_incremental("s", "toy", increment=2, operators=[{"permute": {"experiences": 3}}])
    assert [e.task for e in made.manifest.experiences] == [0, 1, 2] == [e.task for e in made.manifest.evals]
    assert made.manifest.kind == "task_incremental" and made.facts().discloses_task


@pytest.mark.parametrize(("draw", "seed"), [("evenly", 0), ("bins", 4), ("uniform", 4)])
def test_angles(draw: Any, seed: int):
    made = rotate(stream(), experiences=4, draw=draw, seed=seed, largest=80.0)
    angles = [e.transform[0]["rotate"]["degrees"] if e.transform else 0.0 for e in made.manifest.experiences]
    if draw == "evenly":
        assert angles == [0.0, 20.0, 40.0, 60.0]
    if draw == "bins":
        assert all(20 * i <= a <= 20 * (i + 1) for i, a in enumerate(angles))
    assert all(0 <= a <= 80 and a == round(a, 2) for a in angles) and len(set(angles)) == 4
    listed = rotate(stream(), angles=[0, 10, -10], interpolation="bilinear").manifest
    assert [e.transform for e in listed.evals] == [
        (),
        ({"rotate": {"degrees": 10.0, "interpolation": "bilinear"}},),
        ({"rotate": {"degrees": -10.0, "interpolation": "bilinear"}},),
    ]


def test_relabel_by_hand():
    """Two classes an experience: the second experience swaps its two; its evaluation set follows, the first stays."""
    base = stream()
    made = relabel(base)
    one, two = made.manifest.experiences
    assert one.labels is None and made.manifest.evals[0].labels is None
    assert made.labels(two).tolist() == [{2: 3, 3: 2}[c] for c in base.dataset.y[two.train].tolist()]
    test = made.manifest.evals[1]
    assert made.labels(test).tolist() == [{2: 3, 3: 2}[c] for c in base.dataset.y[test.ids].tolist()]
    experience = open_experience(made, 1, PIPELINE)
    assert experience.train.y.tolist() == [{2: 3, 3: 2}[c] for c in base.dataset.y[two.train].tolist()]
    assert made.manifest.class_order == (0, 1, 2, 3)


@given(st.integers(2, 9), st.floats(0.05, 1.0), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_relabel_moves_the_stated_share(classes: int, rate: float, seed: int):
    base = stream(toy(classes, (1, 1)), increment=classes)
    number = int(rate * classes + 0.5)
    if number < 2:
        fails(lambda: relabel(base, experiences=3, rate=rate, seed=seed), "relabel", "needs two")
        return
    made = relabel(base, experiences=3, rate=rate, seed=seed)
    tables = []
    for entry in made.manifest.experiences:
        pairs = dict(zip(base.dataset.y[entry.train].tolist(), made.labels(entry).tolist(), strict=True))
        assert sorted(pairs) == sorted(pairs.values()) == list(range(classes)), "one to one"
        tables.append(pairs)
    assert [sum(a != b for a, b in table.items()) for table in tables] == [0, number, number]


def test_single_pass_keeps_samples_and_their_labels():
    made = registry.apply(stream(), [{"relabel": {"identity_first": False}}, {"single_pass": {"seed": 1}}])
    old = relabel(stream(), identity_first=False)
    for new, entry in zip(made.manifest.experiences, old.manifest.experiences, strict=True):
        assert new.train.tolist() != entry.train.tolist() and sorted(new.train.tolist()) == entry.train.tolist()
        pairs = dict(zip(entry.train.tolist(), old.labels(entry).tolist(), strict=True))
        assert made.labels(new).tolist() == [pairs[i] for i in new.train.tolist()]
    assert made.budget == Budget(epochs=1, in_order=True) == Budget(**made.manifest.budget) == made.facts().budget
    assert (
        single_pass(stream(), shuffle=False).manifest.experiences[0].train.tolist()
        == old.manifest.experiences[0].train.tolist()
    )
    seeds = {single_pass(stream(), seed=s).manifest.sha256 for s in range(3)}
    assert len(seeds) == 3


def test_samples_come_once_in_stream_order():
    data = open_experience(single_pass(stream(toy(per_class=5))), 0, PIPELINE).train
    order = single_pass(stream(toy(per_class=5))).manifest.experiences[0].train
    fails(lambda: data.y, "experience 0 (exp0)", "stream order")
    fails(lambda: data.ids, "stream order")
    fails(lambda: data.raw([0]), "stream order")
    batches = shuffled(data, 4, 1, 7)
    assert batches.steps == 3 and len(data) == 10 and batches.visits == 10
    assert batches(0).ids.tolist() == order[:4].tolist()
    assert len(data.raw([0, 3])) == 2, "pixels of the batch at hand may be kept"
    fails(lambda: data.raw([4]), "stream order")
    fails(lambda: batches(0), "stream order")
    assert batches(2).ids.tolist() == order[8:].tolist(), "a killed pass goes on from the middle"
    for rows in ([0], [4, 5], [9, 8], [], [10]):
        fails(lambda rows=rows: data.batch(rows), "stream order")
    fails(lambda: list(data.test_batches(4)), "stream order")
    fails(lambda: shuffled(data, 4, 2, 7), "2 epochs")
    again = open_experience(single_pass(stream(toy(per_class=5))), 0, PIPELINE).train
    assert [i for b in again.test_batches(3) for i in b.ids.tolist()] == order.tolist()
    free = open_experience(stream(toy(per_class=5)), 0, PIPELINE).train
    assert [i for s in range(3) for i in streamed(free, 4, 7)(s).ids.tolist()] == free.ids.tolist()
    exempt = open_experience(single_pass(stream(toy(per_class=5))), 0, PIPELINE, exempt=True).train
    assert exempt.y.shape == (10,)


def test_several_data_sets(load):
    load |= {"a": toy(3, (2, 2), name="a"), "b": toy(2, (5, 4), name="b", seed=9)}
    base = stream(load["a"], increment=3)
    made = concatenate(base, ["b", "a"], increment=2)
    assert [e.name for e in made.manifest.experiences] == ["exp0", "b0", "a0", "a1"]
    assert [e.classes for e in made.manifest.experiences] == [(0, 1, 2), (3, 4), (5, 6), (7,)]
    names = ["a#0/a-0", "a#0/a-1", "a#0/a-2", "b-0", "b-1", "a#2/a-0", "a#2/a-1", "a#2/a-2"]
    assert list(made.dataset.class_names) == names and made.dataset.name == "a+b+a"
    begin = len(load["a"])
    for i, part, first in ((1, load["b"], begin), (2, load["a"], begin + len(load["b"]))):
        ids = made.manifest.experiences[i].train - first
        assert np.array_equal(pictures(made, i), part.images.raw(ids)) and (part.split[ids] == 0).all()
        assert np.array_equal(made.dataset.images.raw(ids + first), part.images.raw(ids))
    both = np.array([0, begin + 1, 1, begin])
    for image, (part, i) in zip(made.dataset.images.raw(both), [("a", 0), ("b", 1), ("a", 1), ("b", 0)], strict=True):
        assert np.array_equal(image, load[part].images.raw(np.array([i]))[0])
    again, other = concatenate(base, ["b", "a"], increment=2), concatenate(base, ["a", "b"], increment=2)
    assert again.manifest == made.manifest != other.manifest and again.dataset.sha256 != other.dataset.sha256
    assert concatenated([load["a"], load["b"]]).sha256 != concatenated([load["a"], load["b"]], "named").sha256
    few = concatenate(base, ["b"], limit_train=1, limit_test=2).manifest
    assert (len(few.experiences[1].train), len(few.evals[1].ids)) == (2, 4)


def test_classes_of_one_name_are_one(load):
    load |= {"a": toy(3, name="a")}
    load["b"] = replace(toy(2, name="b", seed=9), class_names=("new", "a-1"))
    made = concatenate(stream(load["a"], increment=3), ["b"], classes="named")
    assert made.dataset.class_names == ("a-0", "a-1", "a-2", "new")
    assert made.manifest.experiences[1].classes == (1, 3) and made.manifest.class_order == (0, 1, 2, 3)
    ids = made.manifest.experiences[1].train
    assert made.dataset.y[ids].tolist() == [{0: 3, 1: 1}[c] for c in load["b"].y[ids - len(load["a"])].tolist()]


def test_names_are_shown_wherever_one_differs_from_its_id():
    """Folders are numbered in the order of their sorted names, so class "10" of twelve has the id 2."""
    data = replace(toy(3), class_names=("0", "10", "2"))
    lines = stream(data, increment=3).manifest.text(stream(data).class_name).splitlines()
    assert lines[1].endswith("classes 0=0 1=10 2=2")
    plain = replace(toy(3), class_names=("0", "1", "2"))
    assert stream(plain, increment=3).manifest.text(stream(plain).class_name).splitlines()[1].endswith("classes 0 1 2")


def test_a_chosen_subset_of_classes():
    kept = stream(toy(6), classes=[5, "toy-1", 3], increment=1).manifest
    assert [e.classes for e in kept.experiences] == [(1,), (3,), (5,)]
    assert stream(toy(6), classes=[5, 1, 3], order=[5, 1, 3], increment=1).manifest.class_order == (5, 1, 3)
    assert stream(toy(6), classes=[5, 1], order=[2, 5, 0, 1, 3, 4], increment=1).manifest.class_order == (5, 1)
    full = stream(toy(6), order="random", order_seed=2, increment=1).manifest.class_order
    some = stream(toy(6), classes=[0, 4, 5], order="random", order_seed=2, increment=3).manifest
    assert some.class_order == tuple(c for c in full if c in (0, 4, 5))
    assert stream(toy(6), classes=[0, 1, 2]).manifest == stream(toy(6), num_classes=3).manifest
    for classes, words in [
        ([7], ("classes", "0..5")),
        (["toy-9"], ("toy-9", "did you mean toy-")),
        ([1, "toy-1"], ("toy-1", "twice")),
        ([], ("list",)),
        ([True], ("whole number",)),
    ]:
        fails(lambda classes=classes: stream(toy(6), classes=classes), *words)
    fails(lambda: stream(toy(6), classes=[1], num_classes=3), "excludes")


# the manifest


def test_committed_manifests_and_run_ids_stay():
    """Every stored image manifest has the hash that it had, and a default stream the identity that its records have."""
    read = 0
    for path in sorted((RESULTS / "manifests").glob("*.json")):
        if "experiences" not in (body := json.loads(path.read_text())) or "evals" not in body:
            continue
        if "class_order" in body:
            assert Manifest.load(path).sha256 == path.stem
            read += 1
    assert read >= 3
    for name in ("0c8ac8d221d16c13", "132953abc0ae067a"):  # joint and lae on cil_digits with the default options
        entry = json.loads((RESULTS / "records" / f"{name}.json").read_text())
        rate = ["learner.backbone_lr=0.01"] if entry["learner"]["name"] == "joint" else []  # its default then
        config = compose([f"learner={entry['learner']['name']}", f"seed={entry['seed']}", *rate])[0]
        assert config["scenario"]["operators"] == [] and config["scenario"]["classes"] is None
        identity = provenance.identity(config)
        assert identity["scenario"] == entry["config"]["scenario"]
        manifest, weights = entry["scenario"]["manifest_sha256"], entry["model"]["state_sha256"]
        assert record.run_id(identity, manifest, weights, None, entry["numbers_version"]) == name
    with_one = compose(["scenario.operators=[{concatenate:{datasets:[./some/where.npz]}}]", "scenario.classes=[1,2]"])[0]
    kept = provenance.identity(with_one)["scenario"]
    assert kept["operators"] == [{"concatenate": {"datasets": ["where.npz"]}}] and kept["classes"] == [1, 2]


@given(st.lists(st.integers(0, 20), max_size=40))
def test_labels_are_written_and_read(labels: list[int]):
    text = encode_labels(np.array(labels, np.int64))
    assert decode_labels(text, len(labels)).tolist() == labels


def test_labels_by_hand():
    assert encode_labels(np.array([3, 3, 7, 3])) == "3*2,7,3" and decode_labels("3*2,7,3", 4).tolist() == [3, 3, 7, 3]
    for text in ("3*2", "3*5", "a*4", "-1*4", "3*2,,7,3", "3*999999999999"):
        fails(lambda text=text: decode_labels(text, 4), "label")


def entries(**change) -> Manifest:
    """Two experiences of two samples and one set, with optional fields of the first experience, the set or the manifest."""
    first = ExperienceEntry("a", None, (0, 1), np.array([0, 1]), **change.get("experience", {}))
    second = ExperienceEntry("b", None, (0, 1), np.array([2, 3]))
    test = EvalEntry("a", None, (0, 1), np.array([4, 5]), 0, **change.get("eval", {}))
    body = {"budget": Budget(**change.get("budget", {})).rules()} | change.get("manifest", {})
    dataset = {"name": "t", "sha256": "ab", "num_samples": 9}
    return Manifest("x", dataset, (0, 1), (first, second), (test,), False, True, **body)


STEP = ({"permute": {"seed": 0, "number": 1}},)
FIELDS = {
    "labels": {"experience": {"labels": np.array([1, 0])}},
    "labelled": {"experience": {"labelled": False}},
    "budget": {"experience": {"budget": {"sample_visits": 3}}},
    "in order": {"experience": {"budget": {"in_order": True}}},
    "boundary": {"experience": {"boundary": False}},
    "transform": {"experience": {"transform": STEP}},
    "set labels": {"eval": {"labels": np.array([1, 0])}},
    "set transform": {"eval": {"transform": STEP}},
    "set order": {"eval": {"order": "given", "batch_size": 7}},
    "looks": {"manifest": {"looks": [[1, 2], []]}},
    "evaluators": {"manifest": {"evaluators": ["accuracy"]}},
    "operators": {"manifest": {"operators": [{"mine": {"strength": 2}}]}},
    "whole budget": {"budget": {"in_order": True}},
}


def test_every_field_is_in_the_hash_and_comes_back(tmp_path: Path):
    plain = entries()
    assert not set(json.loads(plain.to_json())) & {"looks", "evaluators", "operators"}
    assert sorted(json.loads(plain.to_json())["experiences"][0]) == ["classes", "name", "task", "train"]
    seen = {plain.sha256}
    for name, change in FIELDS.items():
        made = entries(**change)
        made.save(tmp_path / f"{name}.json")
        again = Manifest.load(tmp_path / f"{name}.json")
        assert again == made and again.to_json() == made.to_json() and again.text(), name
        seen.add(made.sha256)
    assert len(seen) == len(FIELDS) + 1


BAD = {
    "label of no class": ({"experience": {"labels": np.array([1, 2])}}, ("experience 0", "labels")),
    "too few labels": ({"experience": {"labels": np.array([1])}}, ("1 labels for 2",)),
    "labelled": ({"experience": {"labelled": 1}}, ("labelled",)),
    "budget": ({"experience": {"budget": {"epoch": 1}}}, ("epoch",)),
    "budget value": ({"experience": {"budget": {"epochs": 0}}}, ("epochs",)),
    "two passes in order": ({"experience": {"budget": {"epochs": 2, "in_order": True}}}, ("one pass",)),
    "empty budget": ({"experience": {"budget": {}}}, ("budget",)),
    "step": ({"experience": {"transform": ({"permut": {}},)}}, ("permut", "did you mean permute")),
    "option": ({"eval": {"transform": ({"permute": {"seed": 1}},)}}, ("seed, number",)),
    "value": ({"eval": {"transform": ({"rotate": {"degrees": 999.0, "interpolation": "nearest"}},)}}, ("rotate",)),
    "no steps": ({"eval": {"transform": "permute"}}, ("list of steps",)),
    "importable": ({"eval": {"transform": ({"os.system": {"command": "true"}},)}}, ("unknown transform",)),
    "order": ({"eval": {"order": "some"}}, ("order",)),
    "batch": ({"eval": {"batch_size": 3}}, ("no effect",)),
    "looks": ({"manifest": {"looks": [[1]]}}, ("looks",)),
    "falling": ({"manifest": {"looks": [[2, 1], []]}}, ("rising",)),
    "late": ({"manifest": {"looks": [[3], []]}}, ("1..2",)),
    "evaluators": ({"manifest": {"evaluators": ["a", "a"]}}, ("twice",)),
    "operators": ({"manifest": {"operators": ["permute"]}}, ("operators",)),
    "span of an experience": ({"experience": {"steps": 3}}, ("experience 0", "steps", "samples are ids")),
    "span of a set": ({"eval": {"floor": 0.5}}, ("evaluation set 0", "floor")),
    "shape": ({"manifest": {"context": 3}}, ("manifest", "context")),
    "tokens": ({"manifest": {"budget": Budget().rules() | {"processed": 3}}}, ("budget", "processed")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_manifests(case: str):
    change, words = BAD[case]
    fails(lambda: entries(**change), *words)


def test_rules_of_one_experience_reach_the_learner():
    base = stream(toy(), budget={"epochs": 3, "sample_visits": 50})
    rules = [{"sample_visits": 5}, {"epochs": 2}]
    steps = tuple(replace(e, budget=b) for e, b in zip(base.manifest.experiences, rules, strict=True))
    made = replace(base, manifest=replace(base.manifest, experiences=steps))
    assert [made.budget_of(i).sample_visits for i in (0, 1)] == [5, 50]
    assert [open_experience(made, i, PIPELINE).budget.epochs for i in (0, 1)] == [3, 2]
    assert made.facts().budget.epochs == 2, "what every experience allows"
    hidden = replace(base, manifest=replace(base.manifest, experiences=(replace(steps[0], boundary=False), steps[1])))
    assert not hidden.facts().has_boundaries and base.facts().has_boundaries
    bare = replace(base, manifest=replace(base.manifest, experiences=(replace(steps[0], labelled=False), steps[1])))
    assert set(open_experience(bare, 0, PIPELINE).train.y.tolist()) == {-1}
    assert set(open_experience(bare, 1, PIPELINE).train.y.tolist()) == {2, 3}
    assert "needs_labels" in str(mismatch("x", Capabilities(), bare.facts(), True))


def test_capabilities_of_a_single_pass():
    facts = Facts("s", "predict", False, True, True, Budget(in_order=True))
    assert mismatch("x", Capabilities(), facts, True) is None
    assert "needs_random_access" in str(mismatch("x", Capabilities(needs_random_access=True), facts, True))
    exempt = Capabilities(needs_random_access=True, stores_all_data=True)
    assert mismatch("x", exempt, facts, True) is None
    fails(lambda: Budget(epochs=2, in_order=True), "one pass")
    fails(lambda: Budget(in_order=1), "true or false")  # type: ignore[arg-type]


# what is refused


REFUSED = {
    "name": (["permut"], ("did you mean 'permute'",)),
    "no list": ("permute", ("list",)),
    "item": ([["permute"]], ("must hold names",)),
    "two in one": ([{"permute": {}, "rotate": {}}], ("must hold names",)),
    "options": ([{"permute": 3}], ("must hold names",)),
    "option": ([{"permute": {"experience": 3}}], ("experiences",)),
    "zero": ([{"permute": {"experiences": 0}}], ("permute.experiences", "0")),
    "seed": ([{"permute": {"seed": -1}}], ("permute.seed",)),
    "no effect": ([{"permute": {"experiences": 1}}], ("no effect",)),
    "classes": ([{"permute": {"classes": "old"}}], ("shared, new", "old")),
    "new in place": ([{"permute": {"classes": "new", "experiences": None}}], ("permute.experiences",)),
    "size": ([{"permute": {"size": 0}}], ("permute.size",)),
    "twice": (["permute", "rotate"], ("rotate", "experiences: null")),
    "angles": ([{"rotate": {"angles": [0, "a"]}}], ("degrees", "'a'")),
    "no angles": ([{"rotate": {"angles": []}}], ("rotate.angles",)),
    "angle number": ([{"rotate": {"angles": [0], "experiences": None}}], ("2 experiences", "got 1")),
    "draw": ([{"rotate": {"draw": "even"}}], ("evenly",)),
    "largest": ([{"rotate": {"largest": 0}}], ("rotate.largest",)),
    "rotate seed": ([{"rotate": {"seed": 1}}], ("no effect",)),
    "interpolation": ([{"rotate": {"interpolation": "cubic"}}], ("nearest, bilinear",)),
    "rate": ([{"relabel": {"rate": 0}}], ("relabel.rate",)),
    "rate above": ([{"relabel": {"rate": 1.5}}], ("relabel.rate",)),
    "small rate": ([{"relabel": {"rate": 0.1}}], ("needs two",)),
    "one experience": ([{"relabel": {"experiences": 1}}], ("no effect",)),
    "flag": ([{"single_pass": {"shuffle": 1}}], ("true or false",)),
    "no data": ([{"concatenate": {"datasets": []}}], ("concatenate.datasets",)),
    "one data set": ([{"concatenate": {"datasets": "digits"}}], ("list",)),
    "missing option": (["concatenate"], ("concatenate", "datasets")),
    "kind of classes": ([{"concatenate": {"datasets": ["toy"], "classes": "joint"}}], ("disjoint, named",)),
    "after new classes": (
        [{"permute": {"experiences": 2, "classes": "new"}}, {"concatenate": {"datasets": ["toy"]}}],
        ("put concatenate before",),
    ),
    "concatenate twice": ([{"concatenate": {"datasets": ["toy"]}}] * 2, ("name all data sets in one",)),
    "module": (["no_module_here.flip"], ("no module no_module_here",)),
    "function": (["clbench.streams.orders.flip"], ("flip",)),
    "no scenario": (["builtins.repr"], ("builtins.repr", "must return a Scenario", "str")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, load):
    operators, words = REFUSED[case]
    fails(lambda: registry.apply(stream(), operators), *words)


def test_rules_of_experiences_are_not_lost_in_copies():
    base = stream()
    own = replace(base.manifest, experiences=tuple(replace(e, boundary=False) for e in base.manifest.experiences))
    fails(lambda: copies.copied(replace(base, manifest=own), 2, "x", "permute"), "rules of their own")
    fails(lambda: copies.copied(copies.copied(base, 2, "x", "permute"), 2, "y", "rotate"), "more than once")


# from the command line


SMALL = ("scenario.num_classes=4", "scenario.limit_train=12", "scenario.limit_test=6", "scenario.budget.epochs=1")
EXACT = ("num_threads=1", "arithmetic=reference", "device=cpu")


def test_wrong_words_are_answered_before_torch(clbench):
    words = "scenario.operators=[permut,{rotate:{angle:3}},{relabel:{rate:high}}]"
    code = f"import sys; from clbench.cli.main import answer; c = answer(['run', {words!r}]); "
    code += "sys.exit('torch' in sys.modules or c)"
    done = subprocess.run([sys.executable, "-c", code], cwd=clbench.folder, env=clbench.env, capture_output=True, text=True)
    assert done.returncode == 2
    first, second, third = done.stderr.splitlines()
    assert first.startswith("clbench: no operator 'permut'; did you mean 'permute'?")
    assert second == "clbench: operator rotate.angle: rotate has no argument 'angle'; did you mean 'angles'?"
    assert third == "clbench: operator relabel.rate must be float or list, got 'high'"


def test_a_pass_over_permuted_digits(clbench):
    """One pass in stream order, on other pictures in each experience; the record and its manifest can be verified."""
    operators = "scenario.operators=[{permute:{experiences:2}},single_pass]"
    out = clbench("run", "learner=finetune", *SMALL, *EXACT, operators).stdout
    assert "permuted0" in out and "permuted1" in out
    (entry,) = clbench.records()
    assert entry["visits"] == {"new": 96, "replayed": 0} and entry["scenario"]["budget"]["in_order"] is True
    manifest = Manifest.load(clbench.folder / "results" / "manifests" / f"{entry['scenario']['manifest_sha256']}.json")
    assert [next(iter(one)) for one in manifest.operators] == ["permute", "single_pass"]
    assert clbench("verify").stdout
    path = f"scenario.path=results/manifests/{manifest.sha256}.json"
    clbench("run", "learner=finetune", "scenario=manifest", path, "scenario.augment=none", *EXACT, "results_dir=again")
    (other,) = clbench.records("again")
    assert other["correct"] == entry["correct"] and other["final_state_sha256"] == entry["final_state_sha256"]


def test_a_killed_pass_goes_on_in_the_middle():
    """Stopped after any third step and started again, it ends in the same state, bit by bit: the order is the stream's."""
    config = compose(["learner=finetune", "learner.batch_size=4", "model=nano_random"])[0]
    once = contract.small_stream(operators=["single_pass"], budget={"epochs": 1})
    trial = contract.Trial(config, once, Capabilities())
    contract.check_resume_in_mid_learn(trial)
    learner, runtime, pipeline = trial.start()
    trial.learn(learner, runtime, pipeline, 0)
    assert runtime.meter.steps == 9 and runtime.meter.visits["new"] == 36


def test_learners_that_look_again_are_refused_before_they_start(clbench):
    for learner in ("replay", "slca"):
        err = clbench("run", f"learner={learner}", *SMALL, "scenario.operators=[single_pass]", code=2).stderr
        assert "needs_random_access" in err and len(err.splitlines()) == 1
        assert "needs_random_access" in clbench("plan", f"learner={learner}", "scenario.operators=[single_pass]", code=2).stderr
    clbench("run", "learner=ranpac", "pet=none", *SMALL, *EXACT, "scenario.operators=[single_pass]")


def test_own_folders_and_arrays(clbench):
    """Images of other sizes, a folder and an npz file, one after another; names of classes are shown."""
    rng = np.random.default_rng(0)
    for part, number in (("train", 5), ("test", 2)):
        for name in ("zebra", "ape"):
            folder = clbench.folder / "mine" / part / name
            folder.mkdir(parents=True)
            for k in range(number):
                pixels = rng.integers(0, 255, (9 + k, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{k}.png")
    x, y = rng.integers(0, 255, (8, 10, 10), dtype=np.uint8), np.array([0, 1] * 4)
    np.savez(clbench.folder / "other.npz", train_x=x, train_y=y, test_x=x[:4], test_y=y[:4])
    own = ("scenario=cil_folder", "scenario.dataset=./mine", "scenario.increment=1")
    joined = "scenario.operators=[{concatenate:{datasets:[other.npz,digits],increment:5,limit_train:6,limit_test:3}}]"
    shown = clbench("manifest", "show", *own, joined).stdout
    assert "0=ape" in shown and "1=zebra" in shown and "mine+other+digits" in shown and "classes 2=" in shown
    out = clbench("run", "learner=finetune", "scenario.budget.epochs=1", *own, *EXACT, joined).stdout
    assert "other0" in out and "digits1" in out
    for operators in (
        "[{rotate:{experiences:2}},single_pass]",
        "[{permute:{experiences:2,size:8}}]",
        "[{relabel:{experiences:2}}]",
    ):
        clbench("run", "learner=ncm", *own, *EXACT, f"scenario.operators={operators}")
    assert len(clbench.records()) == 4 and all(r["status"] == "ok" for r in clbench.records())
    kept = clbench("manifest", "show", "scenario=cil_folder", "scenario.dataset=./mine", "scenario.classes=[zebra]",
                   "scenario.increment=1").stdout  # fmt: skip
    assert "1=zebra" in kept and "ape" not in kept
    sha = next(r for r in clbench.records() if len(r["scenario"]["eval_names"]) > 2)["scenario"]["manifest_sha256"]
    stored = f"scenario.path=results/manifests/{sha}.json"
    again = clbench("manifest", "show", "scenario=manifest", stored, "scenario.dataset=[./mine,other.npz,digits]").stdout
    assert sha in again
    err = clbench("manifest", "show", "scenario=manifest", stored, "scenario.dataset=[./mine,digits,other.npz]", code=2).stderr
    assert "SHA-256" in err


OUTSIDE = """
    import torch  # heavy: naming the operator must not import it

    from dataclasses import replace


    def halve(stream, part: int = 2):
        \"\"\"Every second sample alone.\"\"\"
        steps = tuple(replace(e, train=e.train[::part]) for e in stream.manifest.experiences)
        return replace(stream, manifest=replace(stream.manifest, experiences=steps))
"""


def test_operators_from_outside(clbench, tmp_path):
    """By dotted path from a file in this folder, and by the name that an installed package gives it."""
    (clbench.folder / "mine.py").write_text(textwrap.dedent(OUTSIDE))
    shown = clbench("manifest", "show", *SMALL, "scenario.operators=[mine.halve]").stdout
    assert "exp0            12 samples" in shown and '{"mine.halve": {"part": 2}}' in shown
    (clbench.folder / "three.py").write_text("number = 3\n")
    err = clbench("plan", "learner=ncm", "scenario.operators=[three.number]", code=2).stderr
    assert err == "clbench: operator three.number must be a function stream -> stream, got int\n"
    err = clbench("run", "scenario.operators=[{mine.halve:{prt:3}}]", code=2).stderr
    assert err == "clbench: operator mine.halve.prt: halve has no argument 'prt'; did you mean 'part'?\n"
    site = tmp_path / "site packages"
    (site / "op_pkg").mkdir(parents=True)
    (site / "op_pkg" / "__init__.py").write_text("")
    (site / "op_pkg" / "ops.py").write_text(textwrap.dedent(OUTSIDE))
    info = site / "op_pkg-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: op_pkg\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[clbench.operators]\nhalve = op_pkg.ops:halve\n")
    clbench.env["PYTHONPATH"] += f":{site}"
    assert "halve              Every second sample alone.  [op_pkg]" in clbench("list", "operators").stdout
    assert "did you mean 'halve'?" in clbench("run", "scenario.operators=[halv]", code=2).stderr
    shown = clbench("manifest", "show", *SMALL, "scenario.operators=[{halve:{part:3}}]").stdout
    assert "exp0             8 samples" in shown


def test_all_built_in_operators_are_there():
    assert set(registry.BUILT_IN) <= set(registry.targets())
    for name, target in registry.BUILT_IN.items():
        assert callable(choices.load_target(target)) and f"  {name} " in "\n".join(choices.operators_listing())


def test_what_repeat_leaves_out_is_said_and_shares_of_blur_are_in_per_cent(caplog):
    datasets.say.cache_clear()
    caplog.set_level(logging.WARNING, "clbench")
    logging.getLogger("clbench").propagate = True
    stream = generators.class_incremental("few", "digits", increment=2, num_classes=4, limit_train=20)
    made = registry.apply(stream, [{"repeat": {"how": "sampling", "experiences": 10, "samples": 5}}])
    gone = 10 - len(made.manifest.experiences)
    assert gone and f"operator repeat: no class came in {gone} of the 10 experiences, which are left out" in caplog.text
    registry.apply(stream, [{"repeat": {"how": "tasks", "experiences": 3, "samples": 500}}])
    assert "operator repeat: 3 experiences have fewer than 1000 samples; the least has 40" in caplog.text
    for options in ({"disjoint": 0.5}, {"blurred": 0.1}):
        with pytest.raises(UserError, match="is in per cent: a half is 50"):
            registry.apply(stream, [{"blur": options}])
    for severity in (0, 6, 2.5, True):
        with pytest.raises(UserError, match=r"corrupt.severity must be a whole number in 1\.\.5, got"):
            registry.apply(stream, [{"corrupt": {"severity": severity}}])
