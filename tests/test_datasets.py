"""Reading data: what is accepted, and one clear line for everything that is wrong."""

import hashlib
import subprocess
import sys
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clbench.interfaces import UserError
from clbench.streams import datasets, splits
from clbench.streams.images import arrays, folders, vision
from clbench.streams.scenario import ArrayImages

DIGITS = "2ba0b77e47b9e8f65c5dbce14982d6b5a415a0b0b13a033e84bc1fb79af13049"


def npz(path: Path, drop: tuple[str, ...] = (), **change) -> str:
    x = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
    y = np.repeat(np.arange(3), 4)
    stored = {"train_x": x, "train_y": y, "test_x": x[::2], "test_y": y[::2], **change}
    np.savez(path, **{k: v for k, v in stored.items() if k not in drop})
    return str(path)


def fails(call, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text
    return text


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "my_set"
    for part, number in (("train", 3), ("test", 2)):
        for c, name in enumerate(("cat", "dog")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(number):
                size = (8 + i, 6 + c)
                Image.new("L" if i == 0 else "RGB", size, 10 * c if i == 0 else (i, c, 7)).save(folder / f"{part}{i}.png")
    return root


def test_digits_are_the_same_everywhere():
    data = datasets.load("digits")
    assert data.sha256 == DIGITS
    assert (len(data), data.num_classes, data.images.shape, int(data.split.sum())) == (1797, 10, (8, 8), 359)
    raw = data.images.raw(np.array([0, 5]))
    assert raw[0].shape == (8, 8, 3) and raw[0].dtype == np.uint8 and raw[0].max() == 239
    assert isinstance(data.images, ArrayImages) and data.images.array.max() == 255
    with pytest.raises(ValueError):
        data.y[0] = 3


def test_streams_import_no_torch():
    code = "import sys, clbench.streams.generators as g; g.datasets.load('digits'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_npz_forms_agree(tmp_path: Path):
    data = datasets.load(npz(tmp_path / "a.npz"))
    assert (data.name, len(data), data.class_names, data.domain) == ("a", 18, ("0", "1", "2"), None)
    assert data.split.tolist() == [0] * 12 + [1] * 6
    x = np.load(tmp_path / "a.npz")
    floats = {k: x[k] / np.float32(255) for k in ("train_x", "test_x")}
    assert datasets.load(npz(tmp_path / "b.npz", **floats)).sha256 == data.sha256
    assert datasets.load(npz(tmp_path / "c.npz", train_y=x["train_y"].astype(np.uint8))).sha256 == data.sha256
    grey = {k: x[k][..., 0] for k in ("train_x", "test_x")}
    column = {k: v[..., None] for k, v in grey.items()}
    d, e = (datasets.load(npz(tmp_path / f"{n}.npz", **g)) for n, g in (("d", grey), ("e", column)))
    assert d.sha256 == e.sha256 != data.sha256
    changed = x["train_x"].copy()
    changed[3, 1, 1, 0] ^= 1
    assert datasets.load(npz(tmp_path / "f.npz", train_x=changed)).sha256 != data.sha256


def test_npz_domains_names_and_single_part(tmp_path: Path):
    extra = {"domain_train": np.tile([0, 1], 6), "domain_test": np.tile([1, 0], 3), "classes": np.array(["a", "b", "c"])}
    data = datasets.load(npz(tmp_path / "a.npz", **extra, domains=np.array(["day", "night"])))
    assert data.domain_names == ("day", "night") and data.class_names == ("a", "b", "c")
    assert data.domain is not None and data.domain[12:].tolist() == [1, 0, 1, 0, 1, 0]
    fails(lambda: datasets.load(npz(tmp_path / "b.npz", domain_train=extra["domain_train"])), "domain_test")
    y, domain = np.repeat(np.arange(2), 20), np.tile(np.arange(2), 20)
    x = np.zeros((40, 2, 2), np.uint8)
    np.savez(tmp_path / "one.npz", x=x, y=y.astype(np.uint8), domain=domain)
    one = datasets.load(str(tmp_path / "one.npz"))
    assert one.domain is not None
    counts = [int(one.split[(one.y == c) & (one.domain == d)].sum()) for c in (0, 1) for d in (0, 1)]
    assert counts == [2, 2, 2, 2]
    np.savez(tmp_path / "given.npz", x=x, y=y, split=domain)
    assert datasets.load(str(tmp_path / "given.npz")).split.tolist() == domain.tolist()


def test_found_by_name_below_the_data_root(tmp_path: Path, monkeypatch):
    npz(tmp_path / "mine.npz")
    assert len(datasets.load("mine", str(tmp_path))) == 18
    assert datasets.load("mine.npz", str(tmp_path)).name == "mine"
    monkeypatch.setenv("CLBENCH_DATA", str(tmp_path))
    assert len(datasets.load("mine")) == 18


X = np.zeros((12, 4, 4, 3), np.uint8)
Y = np.repeat(np.arange(3), 4)
NAN = X.astype(np.float32)
NAN[2, 1, 0, 2] = np.nan
WRONG = {
    "nan": ({"train_x": NAN}, ("train_x[2, 1, 0, 2]", "nan")),
    "inf": ({"test_x": np.full((6, 4, 4, 3), np.inf)}, ("test_x[0, 0, 0, 0]", "inf")),
    "range": ({"train_x": X.astype(np.float64) + 7}, ("train_x", "0..1")),
    "integers": ({"train_x": X.astype(np.int64)}, ("train_x", "uint8", "int64")),
    "ndim": ({"train_x": np.zeros((12, 4), np.uint8)}, ("train_x", "[12, 4]")),
    "channels": ({"train_x": np.zeros((12, 4, 4, 4), np.uint8)}, ("train_x", "[12, 4, 4, 4]")),
    "empty": ({"test_x": X[:0], "test_y": Y[:0]}, ("test_x", "empty")),
    "sizes": ({"test_x": np.zeros((6, 5, 4, 3), np.uint8)}, ("train_x", "test_x", "pixels")),
    "length": ({"train_y": Y[:-1]}, ("train_y", "11", "12")),
    "float labels": ({"train_y": Y * 0.5}, ("train_y", "whole", "float64")),
    "2-d labels": ({"train_y": Y[:, None]}, ("train_y", "[12, 1]")),
    "negative": ({"train_y": Y - 1}, ("train_y[0]", "-1")),
    "unknown class": ({"test_y": Y[::2] + 1}, ("training", "[3]")),
    "class without test": ({"test_y": np.zeros(6, int)}, ("test", "[1, 2]")),
    "gap": ({"train_y": Y + (Y > 1), "test_y": Y[::2] + (Y[::2] > 1)}, ("[2]", "0..3")),
    "huge label": ({"train_y": Y * 10**9, "test_y": Y[::2] * 10**9}, ("[1, 2, 3, 4, 5]",)),
    "names": ({"classes": np.array(["a"])}, ("classes", "3")),
    "objects": ({"train_x": np.array([object()] * 12, dtype=object)}, ("Python objects",)),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_arrays(tmp_path: Path, case: str):
    change, words = WRONG[case]
    path = npz(tmp_path / "bad.npz", **change)
    fails(lambda: datasets.load(path), path, *words)


def test_bad_files(tmp_path: Path):
    path = tmp_path / "x.npz"
    good = Path(npz(path)).read_bytes()
    fails(lambda: datasets.load(npz(path, drop=("test_y",))), "test_y", "missing")
    fails(lambda: datasets.load(str(tmp_path / "nothing.npz")), "nothing.npz", "train_x")
    flipped = bytearray(good)
    flipped[200] ^= 0xFF
    for content in (b"", b"no zip", good[: len(good) // 2], good[:-30], bytes(flipped)):
        path.write_bytes(content)
        fails(lambda: datasets.load(str(path)), str(path), "damaged")
    np.save(tmp_path / "plain.npy", X)
    (tmp_path / "plain.npy").rename(path)
    fails(lambda: datasets.load(str(path)), "single array")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    fails(lambda: datasets.load(str(path)), "missing")


def test_checksums(tmp_path: Path):
    path = npz(tmp_path / "a.npz")
    of_file = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    content = datasets.load(path).sha256
    assert datasets.load(path, sha256=content).sha256 == datasets.load(path, sha256=of_file.upper()).sha256
    assert datasets.load("a", str(tmp_path), sha256=of_file).sha256 == content
    fails(lambda: datasets.load(path, sha256="0" * 64), content, of_file, "0" * 64)
    fails(lambda: datasets.load("digits", sha256="beef"), DIGITS, "beef")


def test_names_that_do_not_work(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("CLBENCH_DATA", raising=False)
    fails(lambda: datasets.load("imagenet_r"), "imagenet_r@coda or imagenet_r@l2p or imagenet_r@revisiting")
    fails(lambda: datasets.load("cub", str(tmp_path)), "cub@official or cub@revisiting")
    fails(lambda: datasets.load("cub@offical"), "cub@official or cub@revisiting")
    fails(lambda: datasets.load("cifar1000"), "did you mean cifar100?")
    fails(lambda: datasets.load("cifar1000", str(tmp_path)), "did you mean cifar100?", str(tmp_path))
    fails(lambda: datasets.load("cifar100"), "CLBENCH_DATA", "data_root")
    fails(lambda: datasets.load("pacs", str(tmp_path)), "pacs.npz", "https://")
    fails(lambda: datasets.load("cub@official", str(tmp_path)), "5994 + 5794", "https://")
    fails(lambda: datasets.load(""), "name or a path")


def test_folders(tree: Path):
    (tree / "train" / "cat" / ".hidden.png").write_bytes(b"x")
    (tree / "train" / "cat" / "notes.txt").write_text("x")
    (tree / "train" / ".thumbs").mkdir()
    data = datasets.load(str(tree))
    assert (data.name, data.class_names, len(data), data.images.shape) == ("my_set", ("cat", "dog"), 10, None)
    assert data.y.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1] and int(data.split.sum()) == 4
    raw = data.images.raw(np.arange(2))
    assert [r.shape for r in raw] == [(6, 8, 3), (6, 9, 3)] and raw[1][0, 0].tolist() == [1, 0, 7]
    (tree / "test").rename(tree / "val")
    assert datasets.load("my_set", str(tree.parent)).class_names == ("cat", "dog")
    image = tree / "train" / "dog" / "train1.png"
    image.write_bytes(image.read_bytes()[:45])
    assert datasets.load(str(tree)).sha256 != data.sha256
    fails(lambda: datasets.load(str(tree)).images.raw(np.array([4])), str(image), "decode")


def test_bad_folders(tree: Path):
    for path in (tree / "test" / "dog").iterdir():
        path.unlink()
    fails(lambda: datasets.load(str(tree)), str(tree / "test" / "dog"))
    (tree / "test" / "dog").rmdir()
    fails(lambda: datasets.load(str(tree)), str(tree / "test" / "dog"), "missing")
    (tree / "test" / "eel").mkdir()
    fails(lambda: datasets.load(str(tree)), "eel")
    fails(lambda: datasets.load(str(tree / "train")), "train/<class>/")


def test_tiny_imagenet_as_it_is_published(tmp_path: Path):
    """Training images under <class>/images, validation images in one folder with a list, test images without labels."""
    root, classes = tmp_path / "tiny-imagenet-200", ("n01", "n02")
    files = [f"train/{c}/images/{c}_{i}.JPEG" for c in classes for i in range(3)]
    files += [f"val/images/val_{i}.JPEG" for i in range(4)] + ["test/images/test_0.JPEG"]
    for i, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(root / name)
    listed = [f"val_{i}.JPEG\t{classes[i % 2]}\t0\t0\t7\t7" for i in (3, 0, 1, 2)]
    (root / "val" / "val_annotations.txt").write_text("\n".join(listed) + "\n")
    data = datasets.load("tiny-imagenet-200", str(tmp_path))
    assert data.class_names == classes and data.y.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1] and int(data.split.sum()) == 4
    assert np.allclose([image[0, 0, 0] for image in data.images.raw(np.arange(6, 10))], [120, 160, 140, 180], atol=3)
    (root / "val" / "val_annotations.txt").write_text("val_9.JPEG\tn01\n")
    fails(lambda: datasets.load("tiny-imagenet-200", str(tmp_path)), "val_annotations.txt, line 1", "val_9.JPEG")
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn07\n")
    fails(lambda: datasets.load("tiny-imagenet-200", str(tmp_path)), "n07")


def test_named_splits_are_proved(tree: Path, monkeypatch):
    root = tree.parent
    names = folders.names_sha256(folders.read_tree(tree))
    joined = "cat/test0.png\ncat/test1.png\ndog/test0.png\ndog/test1.png"
    assert names[1] == hashlib.sha256(joined.encode()).hexdigest()
    right = splits.FolderSplit(2, 6, 4, "here", names)
    monkeypatch.setitem(splits.FOLDERS, "my_set@a", right)
    monkeypatch.setitem(splits.FOLDERS, "my_set@b", replace(right, names_sha256=None))
    assert datasets.load("my_set@a", str(root)).name == "my_set@a"
    fails(lambda: datasets.load("my_set", str(root)), "my_set@a or my_set@b")
    fails(lambda: datasets.load("my_set@b", str(root)), "my_set@b/train")
    tree.rename(root / "my_set@b")
    fails(lambda: datasets.load("my_set@b", str(root)), "holds the split my_set@a")
    monkeypatch.setitem(splits.FOLDERS, "my_set@a", replace(right, names_sha256=("0" * 64, "1" * 64)))
    assert datasets.load("my_set@b", str(root)).name == "my_set@b"
    monkeypatch.setitem(splits.FOLDERS, "my_set@b", replace(right, names_sha256=("0" * 64, "1" * 64)))
    fails(lambda: datasets.load("my_set@b", str(root)), names[0][:12], "000000000000")
    monkeypatch.setitem(splits.FOLDERS, "my_set@b", replace(right, train=7))
    fails(lambda: datasets.load("my_set@b", str(root)), "6 training images", "7 expected")


class Fake:
    """Stands in for a torchvision set: constructed as torchvision's are."""

    url, tgz_md5 = "https://example.org/data.tar.gz", "abc"
    missing = False

    def __init__(self, root, train=True, download=False, split="train"):
        if self.missing and not download:
            raise RuntimeError("Dataset not found.\nUse download=True")
        number = 6 if train and split == "train" else 4
        rng = np.random.default_rng(int(train))
        self.data, self.targets = rng.integers(0, 256, (number, 3, 4, 4), dtype=np.uint8), [0, 1] * (number // 2)
        self.samples = [(f"{root}/x/{split}_{9 - i}.png", i % 2) for i in range(number)]
        self.classes = ["cat", ("dog", "hound")]


def test_torchvision_sets(tmp_path: Path, monkeypatch):
    module = types.ModuleType("torchvision.datasets")
    module.Fake = Fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    sys.modules["torchvision"].datasets = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    monkeypatch.setitem(vision.TABLE, "fake", vision.Vision("Fake", (2, 6, 4)))
    data = datasets.load("fake", str(tmp_path))
    assert data.class_names == ("cat", "dog") and data.images.shape == (4, 4) and int(data.split.sum()) == 4
    entry = vision.Vision("Fake", (2, 6, 4), vision._TRAIN, vision._TEST, "samples", None)
    pool = vision.read("fake", tmp_path, False)
    assert isinstance(pool.images, ArrayImages)
    monkeypatch.setitem(vision.TABLE, "fake", entry)
    pool = vision.read("fake", tmp_path, False)
    assert pool.files[:3] == ["x/train_5.png", "x/train_7.png", "x/train_9.png"] and pool.y.tolist()[:4] == [0, 0, 0, 1]
    monkeypatch.setitem(vision.TABLE, "fake", replace(entry, sizes=(2, 6, 5)))
    monkeypatch.setattr(Fake, "missing", True)
    fails(lambda: datasets.load("fake", str(tmp_path)), "https://example.org", "abc", "download=true", str(tmp_path))


def test_torchvision_table():
    import torchvision.datasets

    assert [entry.cls for entry in vision.TABLE.values() if not hasattr(torchvision.datasets, entry.cls)] == []


def test_cifar_does_not_depend_on_storage_order(tmp_path: Path):
    x = np.random.default_rng(1).integers(0, 256, (8, 2, 2, 3), dtype=np.uint8)
    y, split, rows = np.tile([0, 1], 4), np.repeat([0, 1], 4).astype(np.uint8), np.array([2, 1, 0, 3, 6, 7, 4, 5])
    a = datasets._canonical(arrays.Pool(ArrayImages(x.copy()), y, split, ("a", "b")), x)
    b = datasets._canonical(arrays.Pool(ArrayImages(x[rows]), y[rows], split, ("a", "b")), x[rows])
    assert datasets.content_sha256(a) == datasets.content_sha256(b)


def test_drawn_shares():
    y = np.repeat(np.arange(4), [1, 2, 7, 100])
    split = splits.stratified(y)
    assert [int(split[y == c].sum()) for c in range(4)] == [0, 1, 1, 20]
    assert not np.array_equal(split, splits.stratified(y, None, splits.Share(seed=1)))


@pytest.mark.data
def test_real_data_has_the_known_content():
    import os

    root = os.environ.get("CLBENCH_DATA")
    if not root or not (Path(root) / "cifar100.npz").is_file():
        pytest.skip("no cifar100.npz under CLBENCH_DATA")
    data = datasets.load("cifar100")
    assert data.sha256 == "29ce60870ee70830a4761a764a2f55227fe0e001fe4ffda02bdb6018aa6a488e"
    assert data.class_names[:2] == ("apple", "aquarium_fish")
