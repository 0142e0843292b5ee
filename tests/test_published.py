"""Corrupted test sets as they are published: which rows, which labels, what is refused, and a run that adapts to them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_operators import PIPELINE, fails, stream, toy

from clbench.streams import datasets, generators, pools
from clbench.streams.eval_sets import open_eval
from clbench.streams.images import published
from clbench.streams.operators import registry
from clbench.streams.operators.corrupt import ORDERS, corrupt
from clbench.streams.scenario import Dataset, FileImages, Scenario
from clbench.streams.transforms import CORRUPTIONS

SIDE, CLASSES, EACH = 8, 4, 5  # pixels, classes, test images of a class


def row(c: int, k: int, kind: int, severity: int) -> np.ndarray:
    """An image that says what it is: class and number, corruption (15: none), severity."""
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[:] = 16 * c + k, kind, severity
    return image


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """mine.npz, whose samples are in one order, and mine-C, whose rows are in another."""
    random = np.random.default_rng(0)
    train_y = np.repeat(np.arange(CLASSES), 6)[random.permutation(6 * CLASSES)]
    test = [(c, k) for c in range(CLASSES) for k in range(EACH)]
    train = np.stack([row(c, 8 + i % 6, 15, 0) for i, c in enumerate(train_y.tolist())])
    first = [test[i] for i in random.permutation(len(test))]
    test_x, test_y = np.stack([row(c, k, 15, 0) for c, k in first]), np.array([c for c, _ in first])
    np.savez(tmp_path / "mine.npz", train_x=train, train_y=train_y, test_x=test_x, test_y=test_y)
    (tmp_path / "mine-C").mkdir()
    second = [test[i] for i in random.permutation(len(test))]
    np.save(tmp_path / "mine-C" / "labels.npy", np.array([c for c, _ in second] * 5, np.uint8))
    for number, kind in enumerate(published.KINDS):
        rows = np.stack([row(c, k, number, severity) for severity in range(1, 6) for c, k in second])
        np.save(tmp_path / "mine-C" / f"{kind}.npy", rows)
    return tmp_path


def made(root: Path, *operators: dict, **options) -> Scenario:
    options = {"increment": 2, **options}
    return generators.class_incremental("s", "mine.npz", str(root), operators=list(operators), **options)


def seen(scenario: Scenario, j: int) -> list[list[int]]:
    """Class, number, corruption and severity that every picture of set j shows, and its label."""
    data, entry = open_eval(scenario, j, PIPELINE).data, scenario.manifest.evals[j]
    shown = [image[0, 0].tolist() for image in data.raw(np.arange(len(data)))]
    assert data.y.tolist() == [scenario.manifest.renumber[c] for c in scenario.labels(entry).tolist()]
    return [[*divmod(a, 16), b, c, y] for (a, b, c), y in zip(shown, scenario.labels(entry).tolist(), strict=True)]


def test_the_right_labels_meet_the_right_images(root: Path):
    scenario = made(root, {"corrupt": {"published": "mine-C", "severity": 3}})
    names = [e.name for e in scenario.manifest.evals]
    assert names == ["clean", *(f"{kind}3" for kind in CORRUPTIONS)]
    (experience,) = scenario.manifest.experiences
    assert len(experience.train) == 24 and (scenario.dataset.split[experience.train] == 0).all()
    every = [[c, k] for c in range(CLASSES) for k in range(EACH)]
    for j, name in enumerate(names):
        found = seen(scenario, j)
        assert sorted(one[:2] for one in found) == every, "every test image once"
        assert all(c == y for c, *_, y in found), "what a picture shows is what it is called"
        assert {(kind, severity) for _, _, kind, severity, _ in found} == {(j - 1, 3) if j else (15, 0)}, name
    assert scenario.class_names() == made(root).class_names(), "classes have the names of the stream's own data"


def test_orders_severities_extra_kinds_and_limits(root: Path):
    ordered = made(root, {"corrupt": {"published": "mine-C", "order": 4, "severity": 1}}).manifest
    assert [e.name for e in ordered.evals[1:]] == [f"{CORRUPTIONS[k]}1" for k in ORDERS[4]]
    wanted = {"published": "mine-C", "kinds": ["fog", "spatter"], "severity": 2, "gradual": True, "rounds": 2}
    gradual = made(root, {"corrupt": wanted})
    names = ["fog2", "fog1", "spatter1", "spatter2", "spatter1#2", "fog1#2", "fog2#2", "fog1#3"]
    assert [e.name for e in gradual.manifest.evals[1:9]] == names and len(gradual.manifest.dataset["parts"]) == 5
    assert [seen(gradual, j)[0][2:4] for j in (1, 2, 4)] == [[9, 2], [9, 1], [published.KINDS.index("spatter"), 2]]
    few = made(root, {"corrupt": {"published": "mine-C", "kinds": ["snow"]}}, classes=[1, 3], limit_test=2, increment=1)
    assert [sorted(one[0] for one in seen(few, j)) for j in (0, 1)] == [[1, 1, 3, 3]] * 2
    y = np.load(root / "mine-C" / "labels.npy")[:20]
    rows = [r for c in (1, 3) for r in np.flatnonzero(y == c)[:2].tolist()]
    first = len(few.dataset) - 20
    assert few.manifest.evals[1].ids.tolist() == sorted(first + r for r in rows), "the first rows of each class"


def test_published_sets_to_adapt_to(root: Path):
    chain = [{"corrupt": {"published": "mine-C", "order": 0}}, {"test_time": {"batch_size": 6}}]
    scenario = made(root, *chain)
    manifest = scenario.manifest
    names = [f"{CORRUPTIONS[k]}5" for k in ORDERS[0]]
    assert manifest.kind == "test_time" and [e.name for e in manifest.evals] == ["clean", *names, "clean after"]
    assert all(e.batch_size == 6 and e.order == "given" for e in manifest.evals)
    assert {one[2] for one in seen(scenario, 1)} == {ORDERS[0][0]} and {one[2] for one in seen(scenario, 16)} == {15}
    after = made(root, {"corrupt": {"published": "mine-C"}}, {"test_time": {"clean": "after", "rounds": 2}}).manifest
    assert len(after.evals) == 31 and after.evals[15].name == "gaussian_noise5 (2)" and after.evals[-1].name == "clean after"
    once = made(root, {"corrupt": {"published": "mine-C", "kinds": ["fog"], "rounds": 2}}, {"test_time": {"clean": "none"}})
    assert [e.name for e in once.manifest.evals] == ["fog5", "fog5#2"], "what comes again is a set of its own"


def test_the_hash_includes_the_files(root: Path):
    one = {"corrupt": {"published": "mine-C", "kinds": ["fog"], "severity": 4}}
    scenario = made(root, one)
    again = made(root, {"corrupt": {"published": str(root / "mine-C"), "kinds": ["fog"], "severity": 4}})
    assert again.manifest.sha256 == scenario.manifest.sha256, "where they lie is no part of the stream"
    scenario.manifest.save(root / "m.json")
    loaded = generators.from_manifest(str(root / "m.json"), data_root=str(root))
    assert loaded.manifest == scenario.manifest and seen(loaded, 1) == seen(scenario, 1)
    path = root / "mine-C" / "fog.npy"
    x = np.load(path)
    x[0] += 1
    np.save(path, x)
    assert made(root, one).manifest == scenario.manifest, "another severity is not read"
    x[3 * 20, 0, 0, 0] += 1
    np.save(path, x)
    assert made(root, one).manifest != scenario.manifest
    fails(lambda: generators.from_manifest(str(root / "m.json"), data_root=str(root)), "SHA-256")


def test_what_is_wrong_with_files(root: Path):
    def load(**options):
        return made(root, {"corrupt": {"published": "mine-C", "kinds": ["fog"], **options}})

    folder = root / "mine-C"
    x, y = np.load(folder / "fog.npy"), np.load(folder / "labels.npy")
    for wrong, words in (
        (x[:-1], ("five severities", "[99, 8, 8, 3]")),
        (x.astype(np.float32), ("float32",)),
        (x[..., 0], ("uint8 [5 N, H, W, 3]",)),
        (x[:, :4], ("(4, 8)", "(8, 8) pixels")),
    ):
        np.save(folder / "fog.npy", wrong)
        fails(load, *words)
    np.save(folder / "fog.npy", x)
    for labels, words in (
        (y[:20], ("labels.npy has 20 entries for 100 images",)),
        (np.sort(y), ("labels of the 20 test images five times",)),
        (np.maximum(y, 1) - 1, ("3 classes", "4")),
        (y.astype(float), ("whole numbers",)),
    ):
        np.save(folder / "labels.npy", labels)
        fails(load, *words)
    (folder / "labels.npy").unlink()
    fails(load, "labels.npy is missing")
    np.save(folder / "labels.npy", y)
    (folder / "fog.npy").write_bytes(b"no array")
    fails(load, "cannot read", "fog.npy")
    (folder / "fog.npy").unlink()
    fails(load, str(folder / "fog.npy"), "is missing")
    fails(lambda: made(root, {"corrupt": {"published": "gone-C"}}), "no published set at gone-C", "cifar10_c")


def test_what_cannot_be_combined(root: Path):
    one = {"published": "mine-C", "kinds": ["fog"]}
    for options, word in (({"to": "stream"}, "to"), ({"seed": 1}, "seed"), ({"table": "cifar"}, "table")):
        fails(lambda o=options: made(root, {"corrupt": one | o}), f"corrupt.{word}", "has no effect with corrupt.published")
    fails(lambda: made(root, {"corrupt": one | {"clean_first": False}}), "corrupt.clean_first=False has no effect")
    fails(lambda: made(root, {"corrupt": one | {"published": 3}}), "a name or a folder")
    fails(lambda: made(root, {"corrupt": {"kinds": ["spatter"]}}), "corrupt.kinds")
    fails(lambda: made(root, {"permute": {"experiences": None}}, {"corrupt": one}), "put corrupt before")
    fails(lambda: made(root, {"relabel": {"rate": 1.0}}, {"corrupt": one}), "put corrupt before relabel")
    joined = {"concatenate": {"datasets": [str(root / "mine.npz")]}}
    fails(lambda: made(root, joined, {"corrupt": one}), "the stream has several")
    fails(lambda: made(root, {"corrupt": one}, joined), "the stream has several data sets; put it first")
    fails(lambda: made(root, {"corrupt": one}, validation=0.2, evaluate_on="validation"), "evaluate_on=test")
    fails(lambda: datasets.load("cifar10_c", str(root)), "no training images", "published: cifar10_c")


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """A folder of the size and form of CIFAR-10-C, all black."""
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    begins = published.SETS["cifar10_c"].begins
    rest = np.repeat(np.arange(10), 1000 - np.bincount(begins, minlength=10))
    np.save(folder / "labels.npy", np.tile(np.concatenate([begins, rest]), 5))
    np.lib.format.open_memmap(folder / "fog.npy", "w+", np.uint8, (50_000, 32, 32, 3)).flush()
    return tmp_path


def named(data: Dataset, name: str) -> Dataset:
    return Dataset(name, data.images, data.y, data.split, data.class_names, data.sha256)


def test_cifar_10_c_is_checked_against_what_is_known_of_it(cifar: Path):
    base = stream(named(toy(10, (32, 32)), "cifar10"))

    def load(of=base, kinds=("fog",), **options):
        return corrupt(of, kinds=list(kinds), published="cifar10_c", data_root=str(cifar), **options)

    assert [len(e.ids) for e in load().manifest.evals] == [20, 20]
    whole = datasets.load("cifar10_c@fog5", str(cifar))
    assert len(whole) == 10_000 and whole.y[:3].tolist() == [3, 8, 8] and whole.images.shape == (32, 32)
    fails(lambda: load(kinds=("snow",)), "snow.npy is missing", "https://zenodo.org/records/2535967")
    fails(lambda: load(stream(named(toy(10, (32, 32)), "svhn"))), "shows the test images of cifar10", "svhn")
    fails(lambda: load(stream(toy(9, (32, 32)))), "cifar10_c has 10 classes", "toy has 9")
    path = cifar / "CIFAR-10-C" / "labels.npy"
    y = np.load(path)
    np.save(path, np.tile(np.sort(y[:10_000]), 5))
    fails(load, "labels.npy begins with [0, 0", "[3, 8, 8, 0, 6, 6, 1, 6, 3, 1]")
    np.save(path, np.tile(np.concatenate([y[:10], np.zeros(9_990, np.int64)]), 5))
    fails(load, "is not CIFAR-10-C", "10 classes of 1000 expected")
    np.save(cifar / "CIFAR-10-C" / "fog.npy", np.zeros((50, 32, 32, 3), np.uint8))
    fails(load, "must be uint8 [50000, 32, 32, 3]")
    shutil.rmtree(cifar / "CIFAR-10-C")
    fails(load, "CIFAR-10-C not found", str(cifar / "CIFAR-10-C"), "https://zenodo.org/records/2535967")
    fails(lambda: datasets.load("imagenet_c@fog5", str(cifar)), "https://zenodo.org/records/2235448", "weather.tar")


def tree(root: Path, test: Path, grouped: bool) -> None:
    """train/ and test/ of two synsets, and their test images under two corruptions at severities 4 and 5."""
    for c, name in enumerate(("n01440764", "n01443537")):
        for k in range(3):
            for place, kind, severity in (
                (root / "mini" / "train", 15, 0),
                (root / "mini" / "val", 15, 0),
                *((test / ("weather/" * grouped + f"fog/{s}"), 9, s) for s in (4, 5)),
                *((test / ("blur/" * grouped + f"zoom_blur/{s}"), 6, s) for s in (4, 5)),
            ):
                (place / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(row(c, k, kind, severity)).save(place / name / f"{k}.png")


@pytest.mark.parametrize("grouped", [False, True])
def test_folders_as_of_imagenet_c(tmp_path: Path, grouped: bool):
    tree(tmp_path, tmp_path / "mini-C", grouped)
    chain = [{"corrupt": {"published": "mini-C", "kinds": ["zoom_blur", "fog"]}}, {"test_time": {"batch_size": 4}}]
    scenario = generators.class_incremental("s", "mini", str(tmp_path), increment=1, operators=chain)
    assert [e.name for e in scenario.manifest.evals] == ["clean", "zoom_blur5", "fog5", "clean after"]
    for j, expected in ((1, (6, 5)), (2, (9, 5))):
        found = seen(scenario, j)
        assert len(found) == 6 and all(one[0] == one[4] and tuple(one[2:4]) == expected for one in found)
    place = tmp_path / "mini-C" / ("weather" if grouped else "") / "fog" / "5"
    fails(lambda: datasets.load("mini-C@fog3", str(tmp_path)), "3 is missing")
    (place / "n01443537").rename(place / "n09999999")

    def load():
        return generators.class_incremental("s", "mini", str(tmp_path), increment=1, operators=chain)

    fails(load, "other classes: n01443537, n09999999")
    shutil.rmtree(place / "n09999999")
    fails(load, "has 1 classes")
    (place / "n09999999").mkdir()
    fails(load, "n09999999 holds no image")
    (tmp_path / "ImageNet-C").symlink_to(tmp_path / "mini-C")
    fails(lambda: datasets.load("imagenet_c@zoom_blur5", str(tmp_path)), "is not ImageNet-C", "1000 classes of 50 expected")


def test_classes_that_are_the_same_in_all_parts():
    parts = [toy(3, name="a"), toy(3, name="b", seed=4)]
    joined = pools.concatenated(parts, "same")
    assert joined.class_names == parts[0].class_names and joined.y.tolist() == [*parts[0].y, *parts[1].y]
    assert joined.sha256 not in {pools.concatenated(parts, other).sha256 for other in ("disjoint", "named")}
    fails(lambda: pools.concatenated([toy(3), toy(4)], "same"), "as many classes in every data set")
    assert not isinstance(parts[0].images, FileImages)


def test_a_run_that_adapts_to_published_corruptions(root: Path, clbench):
    words = ["scenario=cil_npz", "scenario.dataset=mine.npz", "scenario.increment=2", f"data_root={root}", "model=convnet"]
    words += ["model.kwargs.img_size=8", "scenario.augment=none", "scenario.budget.epochs=1", "learner=bn_adapt"]
    chain = "scenario.operators=[{corrupt:{published:mine-C,order:2}},{test_time:{batch_size:10}}]"
    out = clbench("run", *words, "num_threads=1", "device=cpu", chain).stdout
    (found,) = clbench.records()
    names = found["scenario"]["eval_names"]
    assert names == ["clean", *(f"{CORRUPTIONS[k]}5" for k in ORDERS[2]), "clean after"] and found["n"] == [20] * 17
    assert "mean_error" in out and found["scenario"]["kind"] == "test_time"
    assert registry.without_folders([{"corrupt": {"published": "a/b"}}]) == [{"corrupt": {"published": "b"}}]
