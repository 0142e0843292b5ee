"""Operators that deal, mix, thin out and order samples: counts worked by hand, plain loops, and what they refuse."""

import itertools
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_operators import fails, pictures, stream, toy

from clbench.interfaces import UserError
from clbench.streams import datasets, generators, orders
from clbench.streams.images.arrays import Pool
from clbench.streams.images.data import open_experience
from clbench.streams.manifest import Manifest
from clbench.streams.operators import composition, registry, repeat, similarity
from clbench.streams.operators.blur import blur
from clbench.streams.operators.corrupt import ORDERS, corrupt
from clbench.streams.operators.drift import drift
from clbench.streams.operators.evaluate import evaluate
from clbench.streams.operators.hide_boundaries import hide_boundaries
from clbench.streams.operators.label_noise import label_noise
from clbench.streams.operators.long_tail import counts, long_tail
from clbench.streams.operators.looks import looks
from clbench.streams.operators.order import order
from clbench.streams.operators.relabel import relabel
from clbench.streams.operators.shots import shots
from clbench.streams.operators.shuffle import shuffle
from clbench.streams.operators.single_pass import single_pass
from clbench.streams.operators.test_time import test_time as adapted_to
from clbench.streams.scenario import ArrayImages, Dataset, Scenario
from clbench.streams.transforms import CORRUPTIONS

HERE = Path(__file__).parent


def by_class(scenario: Scenario) -> list[Counter]:
    """How many training samples of each class every experience has: the count table."""
    return [Counter(scenario.labels(e).tolist()) for e in scenario.manifest.experiences]


def shown(scenario: Scenario) -> list[int]:
    return [i for e in scenario.manifest.experiences for i in e.train.tolist()]


def held_out(scenario: Scenario) -> list[int]:
    return sorted(i for e in scenario.manifest.evals for i in e.ids.tolist())


def grey(values: list[int], per_class: int = 3) -> Dataset:
    """Plain pictures of one pixel, a grey level for each class: distances of class means are known."""
    y = np.repeat(np.arange(len(values)), per_class + 1)
    split = np.tile(np.array([0] * per_class + [1], np.uint8), len(values))
    pixels = np.array(values, np.uint8)[y].reshape(-1, 1, 1, 1).repeat(3, 3)
    return datasets._finish("grey", Pool(ArrayImages(pixels), y, split, tuple(map(str, range(len(values))))))


# corrupt


def test_corrupted_copies():
    made = corrupt(stream(toy(size=(8, 8))), kinds=["fog", "contrast"], severity=2, rounds=2, seed=4)
    names = ["clean", "fog2", "contrast2", "fog2#2", "contrast2#2"]
    assert [e.name for e in made.manifest.experiences] == names == [e.name for e in made.manifest.evals]
    step = {"corrupt": {"kind": "fog", "severity": 2, "seed": 4, "table": "auto"}}
    assert [e.transform for e in made.manifest.experiences[:2]] == [(), (step,)]
    assert [e.transform for e in made.manifest.evals][3] == (step,)
    assert not np.array_equal(pictures(made, 0), pictures(made, 1))
    assert np.array_equal(pictures(made, 1), pictures(made, 3)), "the noise is that of the sample and the step"
    turns = corrupt(stream(toy(6)), kinds=["fog", "snow"], to="stream").manifest
    assert [tuple(s["corrupt"]["kind"] for s in e.transform) for e in turns.experiences] == [(), ("fog",), ("snow",)]
    every = corrupt(stream(toy(6)), to="stream", clean_first=False).manifest
    assert [e.transform[0]["corrupt"]["kind"] for e in every.experiences] == list(CORRUPTIONS[:3])


def test_gradual_severities_and_published_orders():
    made = corrupt(stream(toy()), kinds=["fog", "snow"], severity=3, gradual=True, clean_first=False).manifest
    levels = [e.transform[0]["corrupt"]["severity"] for e in made.experiences]
    assert levels == [3, 2, 1, 1, 2, 3, 2, 1], "the first one begins at the top"
    assert all(sorted(one) == list(range(15)) for one in ORDERS) and len(set(ORDERS)) == 10
    third = [e.transform[0]["corrupt"]["kind"] for e in corrupt(stream(toy()), order=2, clean_first=False).manifest.experiences]
    assert third[:3] == ["contrast", "defocus_blur", "gaussian_noise"]
    assert len(third) == 15


def test_sets_to_adapt_to():
    base = stream(toy(), increment=2)
    made = adapted_to(corrupt(base, kinds=["fog", "snow"], gradual=True, severity=2, rounds=2), batch_size=3).manifest
    assert sorted(made.experiences[0].train.tolist()) == sorted(np.concatenate([e.train for e in base.manifest.experiences]))
    names = ["fog2", "fog1", "snow1", "snow2", "snow1#2", "fog1#2", "fog2#2", "fog1#3", "snow1#3", "snow2#2", "snow1#4"]
    assert [e.name for e in made.evals] == ["clean", *names, "clean after"], "what comes again is a set of its own"
    assert all(e.order == "given" and e.batch_size == 3 and e.first_seen == 0 for e in made.evals)
    assert all(sorted(e.ids.tolist()) == held_out(base) for e in made.evals)


# long_tail


def test_long_tailed_sizes_by_hand():
    assert counts(16, 5, 1 / 16, "exp") == [16, 8, 4, 2, 1]
    assert counts(10, 5, 0.2, "step") == [10, 10, 10, 2, 2]
    assert counts(3, 4, 0.01, "exp") == [3, 1, 1, 1], "no class is empty"
    cifar = counts(500, 100, 0.01, "exp")
    assert sum(cifar) == 10_847 and sum(cifar[:50]) == 9_901 and (cifar[0], cifar[-1]) == (500, 5)


@given(st.integers(2, 7), st.integers(2, 9), st.floats(0.05, 0.9), st.sampled_from(["exp", "step"]), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_tails_fall_and_test_sets_stay(classes: int, per_class: int, ratio: float, kind: Any, seed: int):
    base = stream(toy(classes, (1, 1), per_class), increment=1)
    sizes = counts(per_class, classes, ratio, kind)
    if sizes == [per_class] * classes:
        fails(lambda: long_tail(base, kind, ratio), "long_tail", "no effect")
        return
    made = long_tail(base, kind, ratio)
    assert [dict(c) for c in by_class(made)] == [{k: n} for k, n in enumerate(sizes)] and sizes == sorted(sizes)[::-1]
    for new, old in zip(made.manifest.experiences, base.manifest.experiences, strict=True):
        assert new.train.tolist() == old.train.tolist()[: len(new.train)], "the first in the order of the data"
    drawn = long_tail(base, kind, ratio, order="shuffled", subset="seeded", seed=seed)
    assert sorted(len(e.train) for e in drawn.manifest.experiences) == sorted(sizes)
    assert held_out(made) == held_out(drawn) == held_out(base) and set(shown(drawn)) <= set(shown(base))


def test_largest_class_of_a_tail():
    base = stream(uneven(), increment=7)
    assert by_class(long_tail(base, ratio=0.5))[0] == Counter(dict(enumerate(counts(3, 7, 0.5, "exp"))))
    assert by_class(long_tail(stream(toy(per_class=8)), largest=6, ratio=0.1))[0][0] == 6
    fails(lambda: long_tail(base, largest=9, ratio=0.9), "long_tail.largest=9", "has 3 samples, not 9")


def uneven() -> Dataset:
    """Seven classes of 3 to 15 training samples, 2 test samples each."""
    sizes = [3 + 2 * c for c in range(7)]
    y = np.concatenate([np.repeat(c, n + 2) for c, n in enumerate(sizes)])
    split = np.concatenate([np.array([0] * n + [1, 1], np.uint8) for n in sizes])
    pixels = np.arange(len(y) * 12, dtype=np.int64).astype(np.uint8).reshape(len(y), 2, 2, 3)
    return datasets._finish("uneven", Pool(ArrayImages(pixels), y, split, tuple(f"c{c}" for c in range(7))))


# label_noise


@given(st.floats(0.05, 0.9), st.sampled_from(["symmetric", "asymmetric"]), st.integers(0, 4), st.integers(2, 4))
@settings(max_examples=25, deadline=None)
def test_the_stated_share_of_every_class_is_wrong(share: float, kind: Any, seed: int, increment: int):
    base = stream(toy(6, (1, 1), 12), increment=increment)
    number = int(share * 12 + 0.5)
    try:
        made = label_noise(base, share, kind, seed=seed)
    except UserError as error:
        assert "is left with label" in str(error) or (number == 0 and "no effect" in str(error))
        return
    for new, old in zip(made.manifest.experiences, base.manifest.experiences, strict=True):
        assert new.train.tolist() == old.train.tolist()
        pairs = Counter(zip(base.labels(old).tolist(), made.labels(new).tolist(), strict=True))
        ids = sorted(old.classes)
        for c in ids:
            wrong = {b: n for (a, b), n in pairs.items() if a == c and b != c}
            assert sum(wrong.values()) == (number if len(ids) > 1 else 0) and set(wrong) <= set(ids)
            if kind == "asymmetric" and wrong:
                assert list(wrong) == [ids[(ids.index(c) + 1) % len(ids)]]
    assert all(e.labels is None for e in made.manifest.evals)


def test_pairs_of_labels():
    base = stream(toy(4, (1, 1), 10))
    made = label_noise(base, 0.3, "asymmetric", pairs={"toy-0": "toy-1", "2": "1"})
    assert by_class(made) == [Counter({0: 7, 1: 13}), Counter({2: 10, 3: 10})], "class 1 is no label of the second experience"
    assert made.manifest.experiences[1].labels is None
    again = open_experience(made, 0, _pipeline())
    assert Counter(again.train.y.tolist()) == Counter({0: 7, 1: 13})
    fails(lambda: label_noise(base, 0.3, "asymmetric", pairs={"2": "1"}), "no effect")
    fails(lambda: label_noise(base, 0.3, "asymmetric", pairs={"cat": "1"}), "'cat' is no class")
    fails(lambda: label_noise(base, 0.96, "asymmetric", pairs={"0": "1"}), "is left with label toy-0")
    fails(lambda: label_noise(stream(toy(), increment=1)), "no effect")


def _pipeline() -> Any:
    from clbench.streams.images.pixels import Pipeline, make_profile

    return Pipeline(make_profile("unit", 8), "cpu", "none")


# shots


def test_sessions_of_a_few_shots():
    base = stream(toy(9, (1, 1), 8), increment=3)
    made = shots(base, base=4, way=2, shot=3)
    assert by_class(made) == [
        Counter(dict.fromkeys(range(4), 8)),
        Counter(dict.fromkeys((4, 5), 3)),
        Counter(dict.fromkeys((6, 7), 3)),
    ], "the ninth class fills no session"
    assert [e.name for e in made.manifest.evals] == ["base", "session1", "session2"]
    assert [len(e.ids) for e in made.manifest.evals] == [8, 4, 4] and made.facts().every_experience_has_new_classes
    assert [len(e.train) for e in shots(base, 4, 2, 3, sessions=1).manifest.experiences] == [32, 6]
    draws = {tuple(shots(base, 4, 2, 3, seed=s).manifest.experiences[1].train.tolist()) for s in range(5)}
    assert len(draws) == 5
    for options, words in [
        ({"base": 9}, ("more than the stream's 9",)),
        ({"base": 4, "way": 2, "shot": 9}, ("has 8 training samples", "shots.shot=9")),
        ({"base": 4, "way": 2, "sessions": 3}, ("4 base classes and 3 x 2 more",)),
    ]:
        fails(lambda options=options: shots(base, **options), *words)


def test_supports_that_are_read(tmp_path: Path):
    data = toy(4, (1, 1), 6)
    base = stream(data)
    train = np.flatnonzero(data.split == 0)
    chosen = {c: [int(np.flatnonzero(train == i)[0]) for i in train[data.y[train] == c][2:4]] for c in (2, 3)}
    for c, name in ((2, "session_2.txt"), (3, "session_10.txt")):
        (tmp_path / name).write_text("".join(f"{i}\n" for i in chosen[c]))
    made = shots(base, base=2, way=1, shot=2, support=str(tmp_path))
    assert made.manifest.experiences[1].train.tolist() == train[chosen[2]].tolist()
    assert made.manifest.experiences[2].train.tolist() == train[chosen[3]].tolist()
    again = shots(base, base=2, way=1, shot=2, support=tmp_path.name, data_root=str(tmp_path.parent))
    assert again.manifest == made.manifest
    one = registry.apply(base, [{"shots": {"base": 2, "way": 1, "shot": 2, "support": str(tmp_path)}}])
    assert one.manifest.operators[0]["shots"]["support"] == tmp_path.name, "where it lies is no part of what it is"
    fails(lambda: shots(base, 2, 1, 3, support=str(tmp_path)), "shots.support names 2 training samples of class toy-2")
    (tmp_path / "test_2.txt").write_text("0\n1\n")
    assert shots(base, base=2, way=1, shot=2, support=str(tmp_path)).manifest == made.manifest, "test samples are no supports"
    (tmp_path / "session_2.txt").write_text("99\n")
    fails(lambda: shots(base, 2, 1, 2, support=str(tmp_path)), "24 training samples", "99")
    (tmp_path / "session_2.txt").write_text("cats/1.png\n")
    fails(lambda: shots(base, 2, 1, 2, support=str(tmp_path)), "cats/1.png", "does not lie in files")
    fails(lambda: shots(base, 2, 1, 2, support=str(tmp_path / "no")), "no such file")
    fails(lambda: shots(base, 2, 1, 2, support=str(tmp_path), seed=1), "shots.seed=1 has no effect")


def cifar_folder(root: Path, per_class: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-100 as torchvision reads it, with a few random images in mixed order -> training images [N, 32, 32, 3], labels."""
    rng = np.random.default_rng(5)
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    kept = {}
    for part, number in (("train", per_class), ("test", 1)):
        y = rng.permutation(np.repeat(np.arange(100), number))
        x = rng.integers(0, 256, (len(y), 3 * 32 * 32), dtype=np.uint8)
        (folder / part).write_bytes(pickle.dumps({"data": x, "fine_labels": y.tolist()}))
        kept[part] = x.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), y
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"c{c:02d}" for c in range(100)]}))
    return kept["train"]


def test_published_positions_name_the_images_of_the_published_array(tmp_path: Path, monkeypatch):
    """The pool orders CIFAR by content; a position of an index file is one of torchvision's training array all the same."""
    import torchvision.datasets

    from clbench.streams.images import vision

    x, y = cifar_folder(tmp_path / "published")
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "_load_meta", lambda self: setattr(self, "classes", []))
    monkeypatch.setitem(vision.TABLE, "cifar100", replace(vision.TABLE["cifar100"], sizes=(100, 600, 100)))
    data = datasets.load("cifar100", str(tmp_path / "published"))
    chosen = [int(i) for c in (61, 63) for i in np.flatnonzero(y == c)[[4, 1]]]
    (tmp_path / "session_2.txt").write_text("".join(f"{i}\n" for i in chosen))
    base = stream(data, increment=10)
    fails(lambda: shots(base, 61, 3, 2, 1, str(tmp_path)), "shots.support names 0 training samples of class 62")
    listed = generators.class_incremental("s", "cifar100", str(tmp_path / "published"), increment=1, classes=[0, 61, 63])
    made = shots(listed, 1, 2, 2, None, str(tmp_path)).manifest.experiences[1]
    shown = {image.tobytes() for image in data.images.raw(made.train)}
    assert made.classes == (61, 63) and shown == {x[i].tobytes() for i in chosen}
    train = np.flatnonzero(data.split == 0)
    assert {image.tobytes() for image in data.images.raw(train[chosen])} != shown, "places in the pool are others"
    assert data.source_order is not None and sorted(data.source_order) == train.tolist()

    copy = tmp_path / "copy"
    copy.mkdir()
    parts = {name: data.images.raw(np.flatnonzero(data.split == part)) for part, name in enumerate(("train_x", "test_x"))}
    np.savez(copy / "cifar100.npz", train_y=data.y[data.split == 0], test_y=data.y[data.split == 1], **parts)
    other = datasets.load("cifar100", str(copy))
    assert other.sha256 == data.sha256 and other.source_order is None
    fails(lambda: shots(stream(other), 1, 1, 2, None, str(tmp_path)), "an order of its own", "torchvision's folder")


# blur


def test_blurred_by_hand():
    """Ten classes of 20: five stay, of each of the others 2 samples are dealt, 2 to every experience."""
    base = stream(toy(10, (1, 1), 20))
    made = blur(base, 50, 10)
    table = by_class(made)
    assert [sum(row.values()) for row in table] == [40] * 5 and sorted(shown(made)) == sorted(shown(base))
    apart = [c for c in range(10) if sum(c in row for row in table) == 1 and max(row[c] for row in table) == 20]
    homes = [max(range(5), key=lambda t, c=c: table[t][c]) for c in range(10)]
    assert len(apart) >= 5 and Counter(homes) == Counter(dict.fromkeys(range(5), 2))
    blurry = [c for c in range(10) if c not in apart]
    assert all(table[homes[c]][c] >= 18 for c in range(10)) and len(blurry) <= 5
    assert all(sum(row[c] for c in blurry if homes[c] != t) <= 2 for t, row in enumerate(table))
    for i, entry in enumerate(made.manifest.evals):
        assert set(entry.classes) <= set(made.manifest.experiences[entry.first_seen].classes)
        seen = {c for e in made.manifest.evals[: i + 1] for c in e.classes}
        assert seen == {c for e in made.manifest.experiences[: entry.first_seen + 1] for c in e.classes}
    assert held_out(made) == held_out(base)


def test_at_home_is_the_expected_share():
    """1 - M / 100 (1 - 1 / T) = 0.76 of a blurry class, over ten seeds of ten classes of 20."""
    home = total = 0
    for seed in range(10):
        table = by_class(blur(stream(toy(10, (1, 1), 20)), 0, 30, seed=seed))
        for c in range(10):
            home, total = home + max(row[c] for row in table), total + 20
    assert abs(home / total - 0.76) < 0.025


@given(st.integers(2, 7), st.integers(0, 100), st.integers(0, 100), st.booleans(), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_blurred_streams_lose_nothing(number: int, disjoint: int, stray: int, stochastic: bool, seed: int):
    base = stream(uneven(), increment=7)
    stray = 0 if disjoint == 100 else stray
    made = blur(base, disjoint, stray, number, stochastic, seed)
    assert sorted(shown(made)) == sorted(shown(base)) and held_out(made) == held_out(base)
    assert len(made.manifest.experiences) == number or stochastic
    spread = sum(sum(c in row for row in by_class(made)) > 1 for c in range(7))
    assert spread <= 7 - 7 * disjoint // 100 // number * number and (stray or spread == 0)
    if not stochastic:
        plain = blur(base, disjoint, 0, number, False, seed)
        assert [len(e.train) for e in made.manifest.experiences] == [len(e.train) for e in plain.manifest.experiences]


# repeat


def test_slots_by_hand():
    """Six experiences of two slots over four classes of 9: three slots of 3 samples each, all of them used."""
    base = stream(toy(4, (1, 1), 9))
    made = repeat.repeat(base, experiences=6, classes=2)
    table = by_class(made)
    assert all(set(row.values()) <= {3, 6} and sum(row.values()) == 6 for row in table)
    assert sum(table, Counter()) == Counter(dict.fromkeys(range(4), 9)) and sorted(shown(made)) == sorted(shown(base))
    apart = by_class(repeat.repeat(base, experiences=2, classes=2))
    assert all(sorted(row.values()) == [9, 9] for row in apart) and not set(apart[0]) & set(apart[1]), "N K = C is disjoint"
    every = by_class(repeat.repeat(base, experiences=3, classes=4))
    assert every == [Counter(dict.fromkeys(range(4), 3))] * 3, "K = C is domain-incremental"
    rest = by_class(repeat.repeat(stream(toy(4, (1, 1), 8)), experiences=3, classes=4))
    assert sum(rest, Counter()) == Counter(dict.fromkeys(range(4), 6)), "8 = 3 x 2 and 2 left over"


@given(st.integers(2, 12), st.integers(1, 7), st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_all_slots_are_used(number: int, each: int, seed: int):
    base = stream(uneven(), increment=7)
    slots = [number * each // 7 + (k < number * each % 7) for k in range(7)]
    if number * each < 7:
        fails(lambda: repeat.repeat(base, "slots", number, each, seed=seed), "fewer than the 7 classes")
        return
    try:
        made = repeat.repeat(base, "slots", number, each, seed=seed)
    except UserError as error:
        assert "slots" in str(error) and max(slots) > 3
        return
    table = by_class(made)
    assert len(table) == number and len(set(shown(made))) == len(shown(made))
    per = {c: sum(row[c] for row in table) for c in range(7)}
    found = sorted(n for c in range(7) for n in {(3 + 2 * c) // s * s: s for s in set(slots)}.items() if n[0] == per[c])
    assert len(found) >= 7, "floor(n / slots) samples in each slot"
    assert all(len(row) <= each for row in table)


def test_when_classes_first_come():
    assert repeat._arrival({"geometric": 0.5}, 3).tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert repeat._arrival({"zipf": 1}, 3).tolist() == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert repeat._arrival({"poisson": 2}, 3).tolist() == pytest.approx([1 / 5, 2 / 5, 2 / 5])
    assert repeat._arrival({"uniform_alpha": 0.5}, 5).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0, 0])
    assert repeat._arrival({"uniform": 0}, 4).tolist() == [0.25] * 4
    assert repeat._arrival(None, 300).sum() == pytest.approx(1) and repeat._arrival({"poisson": 900}, 1000).max() < 0.02


def test_sampling_by_hand():
    base = stream(toy(4, (1, 1), 20))
    first = {"uniform_alpha": 0.001}
    every = by_class(repeat.repeat(base, "sampling", 5, samples=10, first=first, again=1))
    assert every == [Counter({0: 3, 1: 3, 2: 2, 3: 2})] * 5, "all classes come at once and always; 10 = 3 + 3 + 2 + 2"
    once = by_class(repeat.repeat(base, "sampling", 5, samples=10, first=first, again=0))
    assert once == [Counter({0: 3, 1: 3, 2: 2, 3: 2})], "none comes again: what is empty is left out"
    few = by_class(repeat.repeat(base, "sampling", 5, samples=200, first=first, again=0))
    assert few == [Counter(dict.fromkeys(range(4), 20))], "a class gives what it has"
    shares = [len(row) for seed in range(30) for row in by_class(
        repeat.repeat(base, "sampling", 20, samples=8, first=first, again=0.3, seed=seed)) if row]  # fmt: skip
    assert abs(sum(shares) / (30 * 20 * 4) - (0.05 + 0.95 * 0.3)) < 0.03


def test_tasks_of_a_long_stream():
    base = stream(toy(5, (1, 1), 4), increment=5)
    made = repeat.repeat(base, "tasks", 200, 2)
    table = by_class(made)
    assert len(table) == 200 and all(sorted(row.values()) == [4, 4] for row in table)
    times = sum((Counter(list(row)) for row in table), Counter())
    assert all(abs(times[c] - 80) < 30 for c in range(5)) and held_out(made) == held_out(base)
    assert sum(len(e.classes) for e in made.manifest.evals) == 5 and len(made.manifest.evals) <= 5
    some = by_class(repeat.repeat(base, "tasks", 50, 3, samples=2))
    assert all(sorted(row.values()) == [2, 2, 2] for row in some)
    skewed = by_class(repeat.repeat(base, "tasks", 400, 1, skew=2))
    often = sorted(sum((Counter(list(row)) for row in skewed), Counter()).values(), reverse=True)
    weights = [1 / k**2 for k in range(1, 6)]
    assert all(abs(n / 400 - w / sum(weights)) < 0.08 for n, w in zip(often, weights, strict=False))


# drift


def test_ramps_keep_sizes_and_samples():
    base = stream(toy(6, (1, 1), 100))
    made = drift(base, 0.5, seed=3)
    table = by_class(made)
    assert [len(e.train) for e in made.manifest.experiences] == [200] * 3 and sorted(shown(made)) == sorted(shown(base))
    strangers = [[row[c] for c in range(6) if c // 2 != i] for i, row in enumerate(table)]
    # each ramp is 50 + 50 samples; a quarter of them changes sides: 12.5 each way
    assert [sum(row) for row in strangers] == pytest.approx([12.5, 25, 12.5], abs=8)
    assert table[0][4] == table[0][5] == table[2][0] == table[2][1] == 0, "only neighbours mix"
    homes = base.dataset.y[made.manifest.experiences[0].train] // 2
    assert (homes[:150] == 0).all() and homes[150:175].sum() < homes[175:].sum(), "ever more of the later one"
    assert [e.first_seen for e in made.manifest.evals] == [0, 1, 2] and held_out(made) == held_out(base)
    assert Manifest.from_json(made.manifest.to_json()) == made.manifest


def test_drift_between_concepts():
    """Labels of a shifted concept travel with their samples."""
    base = relabel(stream(toy(4, (1, 1), 40)))
    made = drift(base, 1.0)
    old = {i: y for e in base.manifest.experiences for i, y in zip(e.train.tolist(), base.labels(e).tolist(), strict=True)}
    for entry in made.manifest.experiences:
        assert made.labels(entry).tolist() == [old[i] for i in entry.train.tolist()]
    fails(lambda: drift(relabel(stream(), experiences=3)), "drift", "the same samples")
    fails(lambda: drift(stream(increment=4)), "needs two experiences")


# order


def test_orders_by_similarity():
    """Grey levels 0, 10, 12, 200: the nearest neighbours are 10, 2, 2 and 188 levels away."""
    base = stream(grey([0, 10, 12, 200]))
    assert order(base, "easy_first").manifest.class_order == (3, 0, 1, 2)
    assert order(base, "hard_first").manifest.class_order == (1, 2, 0, 3)
    near = {frozenset(e.classes) for e in order(base, "edge_hard").manifest.experiences}
    far = {frozenset(e.classes) for e in order(base, "edge_easy").manifest.experiences}
    # within pairs: {0,1} {2,3} 10 + 188; {0,2} {1,3} 12 + 190; {0,3} {1,2} 200 + 2: all but the first are 202
    assert near == {frozenset({0, 1}), frozenset({2, 3})} and near != far
    d = similarity.distances(base.dataset, [np.flatnonzero(base.dataset.y == c) for c in range(4)], ())
    assert d[0].tolist() == [round(v / 255 * 3**0.5 * 1e4) for v in (0, 10, 12, 200)] and (d == d.T).all()


@given(st.integers(2, 6), st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_the_designers_score_is_that_of_plain_loops(count: int, seed: int):
    d = np.abs(np.subtract.outer(*2 * (np.random.default_rng(seed).permutation(200)[:count],))).astype(np.int64)
    rows = [[v / sum(row) for v in row] for row in d.tolist()]
    variance = [float(np.var([v for k, v in enumerate(row) if k != i])) for i, row in enumerate(rows)]
    best: tuple[float, Any] = (-1e9, None)
    for one in itertools.permutations(range(count)):
        score = 1 - (variance[one[0]] / sum(variance) if sum(variance) else 0)
        for i in range(1, -(-(count - 1) // 2) + 1):
            score += 1 - rows[one[i - 1]][one[count - i]] + rows[one[i - 1]][one[i]]
        assert similarity.designer_scores(d, np.array([one]))[0] == pytest.approx(score)
        best = max(best, (round(score, 9), [-k for k in one]))
    assert similarity.designed(d, 0, 5, True) == [-k for k in best[1]]


def test_named_and_listed_orders():
    base = stream(toy(6, (1, 1), 4))
    made = order(base, [5, 3, 1, 0, 2, 4])
    assert (
        [e.classes for e in made.manifest.experiences] == [(5, 3), (1, 0), (2, 4)] == [e.classes for e in made.manifest.evals]
    )
    assert order(base, seed=4).manifest.class_order == orders.order("random", 6, 4)
    assert order(made, "natural").manifest.experiences[0].classes == (0, 1)
    assert sorted(shown(made)) == sorted(shown(base)) and held_out(made) == held_out(base)
    ten = order(stream(toy(10, (1, 1), 2)), "icarl1993").manifest.class_order
    assert ten == orders.order("icarl1993", 10)
    fails(lambda: order(base, [0, 1]), "order.by", "6 classes")
    assert order(base, "natural").manifest.experiences[0].train.tolist() == base.manifest.experiences[0].train.tolist()


def test_experiences_move_with_their_sets():
    base = looks(stream(toy(6, (1, 1), 4)), number=1)
    base = replace(base, manifest=replace(base.manifest, looks=((1,), (2,), (3,))))
    made = order(base, [2, 0, 1], of="experiences")
    assert [e.name for e in made.manifest.experiences] == ["exp2", "exp0", "exp1"] == [e.name for e in made.manifest.evals]
    assert [e.first_seen for e in made.manifest.evals] == [0, 1, 2] and made.manifest.class_order == (4, 5, 0, 1, 2, 3)
    assert made.manifest.looks == ((3,), (1,), (2,))
    plain = stream(grey([0, 200, 10]), increment=1)
    assert order(plain, "easy_first", "experiences").manifest.class_order == (1, 0, 2)
    shifted = relabel(stream(), experiences=3)
    assert [e.name for e in order(shifted, [1, 2, 0], "experiences").manifest.experiences] == [
        "concept1",
        "concept2",
        "concept0",
    ]


# shuffle, hidden boundaries, rates, evaluations


def test_shuffled_samples_keep_their_labels():
    base = label_noise(stream(toy(per_class=9)), 0.3)
    made = shuffle(base, 5)
    for new, old in zip(made.manifest.experiences, base.manifest.experiences, strict=True):
        pairs = [sorted(zip(e.train.tolist(), base.labels(e).tolist(), strict=True)) for e in (new, old)]
        assert pairs[0] == pairs[1] and new.train.tolist() != old.train.tolist()
    kept = single_pass(made, shuffle=False).manifest.experiences[0]
    assert kept.train.tolist() == made.manifest.experiences[0].train.tolist()


def test_hidden_boundaries():
    made = hide_boundaries(stream())
    assert not made.facts().has_boundaries and all(not e.boundary for e in made.manifest.experiences)
    fails(lambda: hide_boundaries(made), "no effect")
    told = replace(stream().manifest, discloses_task=True)
    fails(lambda: hide_boundaries(replace(stream(), manifest=told)), "discloses tasks")


def test_concepts_that_shift_at_a_changing_rate():
    base = stream(toy(10, (1, 1), 2), increment=10)
    made = relabel(base, experiences=4, rate=[0.2, 0, 1])
    moved = [int((made.labels(e) != base.dataset.y[e.train]).sum()) // 2 for e in made.manifest.experiences]
    assert moved == [0, 2, 0, 10]
    same = relabel(base, experiences=3, rate=0.4).manifest
    listed = relabel(base, experiences=3, rate=[0.4, 0.4]).manifest
    assert same.sha256 == listed.sha256
    assert len(relabel(base, experiences=2, rate=[0.5, 1], identity_first=False).manifest.experiences) == 2
    fails(lambda: relabel(base, experiences=4, rate=[0.2, 1]), "3 experiences after the first", "got 2")
    fails(lambda: relabel(stream(), rate=[0.2, 1]), "1 experiences after the first")
    fails(lambda: relabel(base, experiences=3, rate=[0, 0]), "no effect")
    fails(lambda: relabel(base, experiences=3, rate=[0.5, 2]), "list of rates in 0..1")


def test_fewer_evaluations():
    base = stream(toy(5, (1, 1), 4), increment=1)
    made = evaluate(base, 2).manifest
    assert [made.is_evaluated(i) for i in range(5)] == [False, True, False, True, True] and made.rows == 3
    about = evaluate(base, 2).describe()
    assert about["scenario"]["num_experiences"] == 3 and about["scenario"]["learned"] == 5
    assert [e["name"] for e in about["scenario"]["experiences"]] == ["exp0..exp1", "exp2..exp3", "exp4"]
    assert [e["classes"] for e in about["scenario"]["experiences"]] == [[0, 1], [2, 3], [4]]
    assert [e["num_train"] for e in about["scenario"]["experiences"]] == [8, 8, 4]
    assert about["first_seen"] == [0, 0, 1, 1, 2]
    assert Manifest.from_json(made.to_json()) == made != base.manifest and "evaluated after every 2" in made.text()
    assert "evaluate_every" not in base.manifest.to_json()
    fails(lambda: evaluate(base, 6), "5 experiences")
    fails(lambda: evaluate(looks(base, number=1), 2), "looks")
    fails(lambda: replace(made, looks=((1,),) * 5), "evaluate_every")


# together

MANY: list[Any] = [
    {"corrupt": {"kinds": ["fog", "contrast"]}},
    {"corrupt": {"kinds": ["snow"], "to": "stream"}},
    {"long_tail": {"ratio": 0.3}},
    {"label_noise": {"share": 0.3}},
    {"shots": {"base": 3, "way": 2, "shot": 2}},
    "blur",
    {"blur": {"stochastic": True, "experiences": 3}},
    {"repeat": {"experiences": 4}},
    {"repeat": {"how": "sampling", "experiences": 6, "samples": 9}},
    {"repeat": {"how": "tasks", "experiences": 12, "samples": 2}},
    {"drift": {"width": 0.8}},
    "order",
    {"order": {"of": "experiences", "seed": 3}},
    {"order": {"by": "designer_worst", "candidates": 20}},
    "shuffle",
    "single_pass",
    "hide_boundaries",
    {"looks": {"number": 1}},
    {"evaluate": {"every": 2}},
    {"relabel": {"rate": 1.0}},
    {"relabel": {"experiences": 3, "rate": [0.5, 1]}},
    {"permute": {"experiences": 2}},
    {"rotate": {"experiences": None}},
    {"mnist_360": {"classes": 4, "rounds": 1}},
    {"bell": {"sequence": "plus", "images": 20}},
]


@given(st.lists(st.sampled_from(MANY), min_size=1, max_size=4))
@settings(max_examples=120, deadline=None)
def test_any_chain_is_a_stream_or_one_line(chain: list):
    base = stream(uneven(), increment=3)
    lines = list(composition.misplaced([registry.parsed(one) for one in chain]))
    try:
        made = registry.apply(base, chain)
    except UserError as error:
        assert "\n" not in str(error) and (not lines or str(error) == lines[0])
        return
    assert not lines, "what is refused before data is read is refused by the stream too"
    assert registry.apply(base, chain).manifest == made.manifest and len(made.manifest.operators) == len(chain)
    assert Manifest.from_json(made.manifest.to_json()) == made.manifest
    assert set(shown(made)) <= set(shown(base)) and set(held_out(made)) <= set(held_out(base))
    assert base.manifest == stream(uneven(), increment=3).manifest, "the stream that went in is as it was"
    for i, entry in enumerate(made.manifest.experiences):
        labels = made.labels(entry)
        assert len(set(entry.train.tolist())) == len(entry.train) == len(labels) and set(labels.tolist()) == set(entry.classes)
        data = open_experience(made, i, _pipeline(), exempt=True).train
        assert data.y.tolist() == [made.manifest.renumber[c] for c in labels.tolist()]
    for j, entry in enumerate(made.manifest.evals):
        assert made.manifest.evaluable(j, entry.first_seen)


REFUSED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "pixels": ({"permute": {"size": 10_000}}, ("permute.size", "1..4096")),
    "severity": ({"corrupt": {"severity": 6}}, ("corrupt.severity", "1..5")),
    "kind": ({"corrupt": {"kinds": ["rain"]}}, ("corrupt.kinds", "rain")),
    "kinds": ({"corrupt": {"kinds": []}}, ("corrupt.kinds",)),
    "order number": ({"corrupt": {"order": 10}}, ("corrupt.order", "0..9")),
    "order and kinds": ({"corrupt": {"order": 1, "kinds": ["fog"]}}, ("corrupt.order excludes",)),
    "gradual": ({"corrupt": {"gradual": True, "severity": 1}}, ("corrupt.gradual has no effect",)),
    "to": ({"corrupt": {"to": "set"}}, ("copies, stream",)),
    "table": ({"corrupt": {"table": "mnist"}}, ("corrupt.table",)),
    "ratio": ({"long_tail": {"ratio": 1}}, ("long_tail.ratio",)),
    "tail": ({"long_tail": {"kind": "linear"}}, ("exp, step",)),
    "tail seed": ({"long_tail": {"seed": 2}}, ("long_tail.seed=2 has no effect",)),
    "share": ({"label_noise": {"share": 1.5}}, ("label_noise.share",)),
    "pairs": ({"label_noise": {"pairs": {"a": "b"}}}, ("label_noise.pairs", "asymmetric")),
    "shot": ({"shots": {"shot": 0}}, ("shots.shot",)),
    "support": ({"shots": {"support": "no/such/folder"}}, ("no such file or folder",)),
    "blurred": ({"blur": {"blurred": 101}}, ("blur.blurred", "0..100")),
    "nothing blurry": ({"blur": {"disjoint": 100}}, ("blur.blurred=10 has no effect",)),
    "one experience": ({"blur": {"experiences": 1}}, ("blur.experiences",)),
    "how": ({"repeat": {"how": "often"}}, ("slots, sampling, tasks",)),
    "slots take no samples": ({"repeat": {"samples": 9}}, ("repeat.samples has no effect with repeat.how=slots",)),
    "tasks take no rate": ({"repeat": {"how": "tasks", "again": 0.5}}, ("repeat.again has no effect",)),
    "first": ({"repeat": {"how": "sampling", "first": {"normal": 1}}}, ("repeat.first", "geometric")),
    "p": ({"repeat": {"how": "sampling", "first": {"geometric": 2}}}, ("repeat.first.geometric",)),
    "width": ({"drift": {"width": 0}}, ("drift.width",)),
    "by": ({"order": {"by": "easy"}}, ("order.by", "easy_first")),
    "order seed": ({"order": {"by": "natural", "seed": 2}}, ("order.seed=2 has no effect",)),
    "candidates": ({"order": {"candidates": 5}}, ("order.candidates has no effect",)),
    "edge of experiences": ({"order": {"by": "edge_hard", "of": "experiences"}}, ("order.of=classes",)),
    "every": ({"evaluate": {"every": 1}}, ("evaluate.every",)),
    "circle": ({"mnist_360": {"classes": 1}}, ("mnist_360.classes", "from 2")),
    "rounds": ({"mnist_360": {"rounds": 0}}, ("mnist_360.rounds",)),
    "sequence": ({"bell": {"sequence": "out*"}}, ("bell.sequence", "out_star")),
    "starved by nothing": ({"bell": {"images": 50}}, ("bell.images has no effect with bell.sequence=in",)),
    "rates": ({"relabel": {"experiences": 3, "rate": [1, 1, 1]}}, ("2 experiences after the first",)),
}
MISPLACED: dict[str, tuple[list[Any], tuple[str, ...]]] = {
    "blurred pictures": (["permute", "blur"], ("blur cannot stand after permute", "put blur before")),
    "dealt twice": (["blur", {"repeat": {}}], ("repeat cannot stand after blur",)),
    "joined again": (["blur", "rotate"], ("blur has no effect", "experiences: null")),
    "turning pictures": (["mnist_360", "permute"], ("mnist_360 has no effect", "experiences: null")),
    "joined by angles": (["order", {"rotate": {"angles": [0, 9]}}], ("order has no effect",)),
    "concepts": (["relabel", "shots"], ("put shots before",)),
    "undone": (["drift", "order"], ("undo the drift",)),
    "looks": ([{"looks": {"number": 2}}, "long_tail"], ("put long_tail before",)),
    "looks and evaluate": (["evaluate", {"looks": {"number": 2}}], ("evaluation after each",)),
    "hidden": (["hide_boundaries", "blur"], ("rules of their own",)),
    "adapted twice": (["test_time", "test_time"], ("already",)),
    "dealt after adapting": (["test_time", "blur"], ("sets to adapt to", "put blur before")),
    "twice": (["hide_boundaries", "hide_boundaries"], ("already",)),
    "corrupted copies": (["shuffle", "corrupt"], ("shuffle has no effect", "to: stream")),
    "shuffled again": (["shuffle", "single_pass"], ("single_pass makes an order of its own",)),
    "shuffled and dealt": (["shuffle", "blur"], ("blur makes an order of its own",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_are_refused_before_the_stream_is_looked_at(case: str):
    one, words = REFUSED[case]
    ((name, options),) = one.items()
    why = composition.refused(name, options)
    assert why is not None and "\n" not in why and all(word in why for word in words), why
    fails(lambda: registry.apply(stream(), [one]), *words)


@pytest.mark.parametrize("case", MISPLACED)
def test_lists_are_refused_before_the_stream_is_looked_at(case: str):
    chain, words = MISPLACED[case]
    fails(lambda: registry.apply(stream(), chain), *words)


def test_every_operator_with_its_defaults_waits_for_the_stream():
    """Options are checked without data; nothing else is."""
    needed: dict[str, Any] = {"concatenate": {"datasets": ["toy"]}, "looks": {"number": 2}, "evaluators": {"names": ["a.b"]}}
    assert [composition.refused(name, needed.get(name, {})) for name in registry.BUILT_IN] == [None] * len(registry.BUILT_IN)
    assert composition.refused("mine.halve", {}) is None


# on every kind of data


def folder_of_seven(folder: Path) -> Path:
    """Seven classes of 4 to 16 training images and 3 test images, of several sizes."""
    rng = np.random.default_rng(0)
    for c in range(7):
        for part, number in (("train", 4 + 2 * c), ("test", 3)):
            place = folder / part / f"kind{c}"
            place.mkdir(parents=True)
            for k in range(number):
                tint = rng.normal(30 * c, 20, (8 + k % 3, 9, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(tint).save(place / f"{k}.png")
    return folder


SINGLE: list[list[Any]] = [
    [{"corrupt": {"kinds": ["fog", "glass_blur"], "severity": 2}}],
    [{"corrupt": {"order": 4}}, {"test_time": {"batch_size": 5}}],
    [{"long_tail": {"ratio": 0.25}}],
    [{"label_noise": {"share": 0.2}}],
    [{"label_noise": {"share": 0.4, "kind": "asymmetric"}}],
    [{"shots": {"base": 3, "way": 2, "shot": 3}}],
    [{"blur": {"blurred": 20}}],
    [{"blur": {"stochastic": True}}],
    [{"repeat": {"experiences": 7, "classes": 2}}],
    [{"repeat": {"how": "sampling", "experiences": 8, "samples": 12, "first": {"geometric": 0.5}}}],
    [{"repeat": {"how": "tasks", "experiences": 12, "samples": 3}}, {"evaluate": {"every": 5}}],
    [{"drift": {"width": 0.6}}, {"single_pass": {"shuffle": False}}],
    ["order"],
    [{"order": {"by": "edge_hard"}}],
    [{"order": {"by": "designer_worst", "candidates": 50}}],
    [{"order": {"of": "experiences", "by": "hard_first"}}],
    ["shuffle", {"single_pass": {"shuffle": False}}, "hide_boundaries"],
    [{"relabel": {"experiences": 3, "rate": [0.5, 1]}}],
    [
        "blur",
        {"label_noise": {"share": 0.2}},
        {"corrupt": {"kinds": ["snow"], "to": "stream"}},
        "single_pass",
        "hide_boundaries",
    ],
    [{"mnist_360": {"classes": 4, "rounds": 1}}, {"single_pass": {"shuffle": False}}],
    [{"bell": {"sequence": "minus", "images": 20}}],
]


def hashes(*scenarios: Scenario) -> list[str]:
    return [registry.apply(one, chain).manifest.sha256 for one in scenarios for chain in SINGLE]


def test_the_same_hash_in_two_processes(tmp_path: Path):
    """On digits and on a folder of seven uneven classes, whatever the seed of Python's own hashes."""
    import os
    import subprocess
    import sys

    folder = folder_of_seven(tmp_path / "mine")
    code = (
        "import sys; from test_stream_operators import *\n"
        "made = [generators.class_incremental('s', d, increment=2) for d in ('digits', sys.argv[1])]\n"
        "print('\\n'.join(hashes(*made)))"
    )
    found = []
    for seed in ("1", "77"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
        done = subprocess.run([sys.executable, "-c", code, str(folder)], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    assert found[0] == found[1] and len(set(found[0])) == 2 * len(SINGLE)


@pytest.mark.data("cifar100.npz")
def test_published_protocols_on_cifar100():
    """60 base classes and 8 sessions of 5 x 5; 50 base classes with a long tail of 10,847 images."""
    import os

    root = os.environ["CLBENCH_DATA"]
    data = datasets.load("cifar100", root)
    each = int((data.split == 0).sum()) // 100
    one = generators.class_incremental("s", "cifar100", root, increment=10, operators=["shots"])
    assert [len(e.train) for e in one.manifest.experiences] == [60 * each] + [25] * 8
    assert [len(e.classes) for e in one.manifest.evals] == [60] + [5] * 8
    tail = generators.class_incremental("s", "cifar100", root, base=50, increment=10, operators=["long_tail"])
    assert sum(len(e.train) for e in tail.manifest.experiences) == (
        10_847 if each == 500 else sum(counts(each, 100, 0.01, "exp"))
    )
    base = generators.class_incremental("s", "cifar100", root, increment=10, limit_train=20, limit_test=5)
    skip = ([{"repeat": {"experiences": 7, "classes": 2}}],)
    assert len({registry.apply(base, chain).manifest.sha256 for chain in SINGLE if chain not in skip}) == len(SINGLE) - 1


# from the command line

EXACT = ("num_threads=1", "arithmetic=reference", "device=cpu", "scenario.budget.epochs=1")


def written(chain: list[Any]) -> str:
    """A list of operators as a person types it."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ",".join(f"{k}:{text(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ",".join(map(text, value)) + "]"
        return str(value).lower() if isinstance(value, bool) else str(value)

    return f"scenario.operators={text(chain)}"


def test_runs_on_digits_with_every_operator(clbench):
    """Nearest means everywhere, finetuning where it differs; every record is verified."""
    small = ("scenario.num_classes=7", "scenario.limit_train=12", "scenario.limit_test=4", *EXACT)
    for chain in SINGLE:
        clbench("run", "learner=ncm", *small, written(chain))
    for chain in (SINGLE[10], SINGLE[18]):
        clbench("run", "learner=finetune", *small, written(chain))
    entries = clbench.records()
    assert len(entries) == len(SINGLE) + 2 and all(e["status"] == "ok" for e in entries)
    out = clbench("verify").stdout
    assert f"{len(entries)} verified, 0 self-reported, 0 failed" in out
    few = next(e for e in entries if e["scenario"].get("learned") == 12)
    assert few["scenario"]["num_experiences"] == 3 == len(few["correct"]) and len(few["experiences"]) == 12
    assert "task_confusion" not in few
    assert clbench("report").stdout
    assert "verified" in clbench("verify", "--rerun", "1").stdout


def test_runs_on_a_folder_of_seven_classes(clbench):
    folder_of_seven(clbench.folder / "mine")
    own = ("scenario=cil_folder", "scenario.dataset=./mine", "scenario.augment=none", *EXACT)
    for chain in (SINGLE[0], SINGLE[2], SINGLE[5], SINGLE[7], SINGLE[10], SINGLE[13], SINGLE[18]):
        clbench("run", "learner=ncm", *own, written(chain))
    assert [e["status"] for e in clbench.records()] == ["ok"] * 7
    supports = clbench.folder / "sessions"
    supports.mkdir()
    (supports / "session_2.txt").write_text("".join(f"mine/train/kind{c}/{k}.png\n" for c in (3, 4) for k in (1, 2)))
    listed = "scenario.operators=[{shots:{base:3,way:2,shot:2,sessions:1,support:./sessions}}]"
    assert "session1         4 samples" in clbench("manifest", "show", *own, listed).stdout.replace("  evaluate", "")
    assert (
        clbench("check", *own, "scenario.operators=[{blur:{blurred:30}},single_pass,hide_boundaries]").stdout.count("ok ") == 4
    )
    assert "7 classes" not in clbench("plan", "learner=ncm", *own, written(SINGLE[7])).stdout


def test_a_record_grows_with_its_evaluations(clbench):
    """Three evaluations each: ninety more experiences are a number of seconds of training each, and no row."""
    sizes = []
    for number in (30, 120):
        chain = written(
            [{"repeat": {"how": "tasks", "experiences": number, "samples": 2}}, {"evaluate": {"every": number // 3}}]
        )
        clbench("run", "learner=ncm", *EXACT, chain, f"results_dir=r{number}")
        (path,) = (clbench.folder / f"r{number}" / "records").glob("*.json")
        sizes.append(path.stat().st_size)
    assert len(clbench.records("r120")[0]["correct"]) == 3 and 0 < (sizes[1] - sizes[0]) / 90 < 60


def test_refused_before_torch(clbench):
    import subprocess
    import sys

    words = written(["blur", {"rotate": {"largest": 400}}, {"corrupt": {"severity": 9}}, "hide_boundaries"])
    code = f"import sys; from clbench.cli.main import answer; c = answer(['run', {words!r}]); "
    code += "sys.exit('torch' in sys.modules or c)"
    done = subprocess.run([sys.executable, "-c", code], cwd=clbench.folder, env=clbench.env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert lines[:2] == [
        "clbench: rotate.largest must be in (0, 360], got 400",
        "clbench: corrupt.severity must be a whole number in 1..5, got 9",
    ]
    assert [line.split(":")[1] for line in lines[2:]] == [
        " operator rotate cannot stand after blur",
        " operator corrupt cannot stand after blur",
    ]
    err = clbench("plan", "learner=replay", "scenario.operators=[hide_boundaries]", code=2).stderr
    assert "needs_boundaries" in err and len(err.splitlines()) == 1


def test_a_stopped_long_stream_goes_on(clbench):
    """Between two evaluations too: rows, and the final state, are those of a run in one go."""
    from clbench.config.compose import compose
    from clbench.run import runner

    chain = written([{"repeat": {"how": "tasks", "experiences": 9, "samples": 2}}, {"evaluate": {"every": 4}}])
    small = ("scenario.num_classes=4", "scenario.limit_train=8", "scenario.limit_test=4", *EXACT, chain)
    clbench("run", "learner=finetune", *small)
    (whole,) = clbench.records()
    config = compose(["learner=finetune", *small, f"results_dir={clbench.folder}/again"])[0]
    job = runner.prepare(config)
    loop, stop = runner.Loop, runner.Loop.learn

    def learn(self: Any, index: int) -> None:
        stop(self, index)
        if index == 5:
            raise RuntimeError("the power went")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "learn", learn)
        assert runner.run_job(config).status == "failed"
    assert job.run_id == whole["run_id"]
    clbench("run", "learner=finetune", *small, "results_dir=again")
    (other,) = clbench.records("again")
    assert other["correct"] == whole["correct"] and other["final_state_sha256"] == whole["final_state_sha256"]
    assert other["resumed"] == 1 and len(other["correct"]) == 3


def test_what_is_left_out_is_said(caplog):
    base = stream(uneven(), increment=3)
    datasets.say.cache_clear()
    shots(base, base=3, way=3, shot=1)
    assert "1 of the classes are left out, too few for another session of 3" in caplog.text
    repeat.repeat(base, "sampling", 5, samples=10_000)
    assert "fewer than 10000 samples" in caplog.text
    fails(lambda: shots(base, base=20, way=5, shot=1), "20 base classes and 5 more are more than the stream's 7")
