"""Folders by domain, and sets in the layout in which their makers publish them: small trees, checked by counts and names."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clbench.interfaces import UserError
from clbench.streams import datasets, generators, splits
from clbench.streams.images import domain_folders, notmnist, time_buckets
from clbench.streams.manifest import Manifest
from clbench.streams.operators import registry
from clbench.streams.scenario import FileImages


def picture(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 4), (value, 0, 0)).save(path)


def fails(call, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text
    return text


def test_folders_by_domain_with_their_own_division(tmp_path: Path):
    root = tmp_path / "mine"
    for d, domain in enumerate(("day", "night")):
        for part, number in (("train", 3), ("test", 2)):
            for c in ("cat", "dog")[: 2 - d]:
                for i in range(number):
                    picture(root / domain / part / c / f"{i}.png", 10 * d + i)
    scenario = generators.domain_incremental("d", str(root))
    data = scenario.dataset
    assert data.domain_names == ("day", "night") and data.class_names == ("cat", "dog") and len(data) == 15
    assert [(e.name, e.classes, len(e.train)) for e in scenario.manifest.experiences] == [
        ("day", (0, 1), 6),
        ("night", (0,), 3),
    ]
    assert [image[0, 0, 0] for image in data.images.raw(scenario.manifest.evals[1].ids)] == [10, 11]
    scenario.manifest.save(tmp_path / "m.json")
    again = generators.from_manifest(str(tmp_path / "m.json"), dataset=str(root))
    assert again.manifest.sha256 == scenario.manifest.sha256
    fails(lambda: generators.domain_incremental("d", str(root), test_share=0.2), "has no effect", "test images of its own")
    (root / "night" / "test").rename(tmp_path / "away")
    fails(lambda: generators.domain_incremental("d", str(root)), str(root / "night"), "train/<class>/ and test/<class>/")


def test_folders_by_domain_without_test_images(tmp_path: Path):
    root = tmp_path / "mine"
    for domain, number in (("b", 10), ("a", 5)):
        for c in ("x", "y"):
            for i in range(number):
                picture(root / domain / c / f"{i}.png")
    fails(lambda: generators.domain_incremental("d", str(root)), "without test images", "scenario.test_share=0.2")
    made = generators.domain_incremental("d", str(root), test_share=0.2, domains=["b", "a"])
    assert [len(e.ids) for e in made.manifest.evals] == [4, 2]
    fails(lambda: generators.domain_incremental("d", str(root), test_share=0.2, domains=["c"]), "unknown domain 'c'")
    (root / "b" / "z").mkdir()
    fails(lambda: generators.domain_incremental("d", str(root), test_share=0.2), str(root / "b" / "z"), "holds no image")


@pytest.fixture
def domainnet(tmp_path: Path, monkeypatch) -> Path:
    """Two domains, three classes whose ids are not in the order of text, lists beside the folders."""
    root, ids = tmp_path / "DomainNet", {"The_Eiffel_Tower": 2, "axe": 0, "bat": 1}
    for domain in ("clipart", "real"):
        lines = {"train": [], "test": []}
        for name, number in ids.items():
            for i in range(3):
                file = f"{domain}/{name}/{domain}_{i}.jpg"
                picture(root / file, 40 * number)
                lines["test" if i == 2 else "train"].append(f"{file} {number}")
        for part, listed in lines.items():
            (root / f"{domain}_{part}.txt").write_text("\n".join(listed) + "\n")
    small = replace(domain_folders.SETS["domainnet"], domains={"clipart": (6, 3), "real": (6, 3)}, classes=3)
    monkeypatch.setitem(domain_folders.SETS, "domainnet", small)
    return root


def test_domainnet_as_it_is_published(domainnet: Path, tmp_path: Path):
    data = datasets.load("domainnet", str(tmp_path))
    assert data.class_names == ("axe", "bat", "The_Eiffel_Tower"), "ids are those of the lists"
    for rows in (data.y == 2, data.y == 0):
        assert len({image[0, 0, 0] // 20 for image in data.images.raw(np.flatnonzero(rows))}) == 1
    assert data.domain is not None and int(data.split.sum()) == 6 and np.bincount(data.domain).tolist() == [9, 9]
    stream = generators.domain_incremental("d", "domainnet", str(tmp_path)).manifest
    assert [len(e.train) for e in stream.experiences] == [6, 6] and [len(e.ids) for e in stream.evals] == [3, 3]
    both = generators.class_incremental("c", "domainnet", str(tmp_path), increment=1).manifest
    assert [len(e.train) for e in both.experiences] == [4, 4, 4]
    (domainnet / "splits").mkdir()
    for path in list(domainnet.glob("*.txt")):
        path.rename(domainnet / "splits" / path.name)
    assert datasets.load("domainnet", str(tmp_path)).sha256 == data.sha256


def test_a_domainnet_that_is_not_it_is_refused(domainnet: Path, tmp_path: Path):
    def load():
        return datasets.load("domainnet", str(tmp_path))

    listed = domainnet / "real_test.txt"
    text = listed.read_text()
    listed.write_text(text.replace("axe/real_2.jpg 0", "axe/real_2.jpg 7"))
    fails(load, "real_test.txt, line 2", "class axe has the id 7")
    listed.write_text(text + "real/axe/real_0.jpg\n")
    fails(load, "real_test.txt, line 4", "a path and a class id")
    listed.write_text("\n".join(text.splitlines()[:2]) + "\n")
    fails(load, "domain real: 6 + 2 images found, 6 + 3 images expected")
    listed.write_text(text.replace("real_2", "gone"))
    fails(load, "gone.jpg", "No such file")
    listed.unlink()
    fails(load, "no real_train.txt and real_test.txt")
    fails(lambda: datasets.load("domainnet", str(domainnet)), "domainnet/<domain>/<class>/", "http://ai.bu.edu/M3SDA")


def test_office_home(tmp_path: Path, monkeypatch):
    """No published division: a fifth of each class of each domain, or the share that is asked for; underscores are accepted."""
    small = replace(domain_folders.SETS["office_home"], domains={"Art": (20, 0), "Real World": (10, 0)}, classes=2)
    monkeypatch.setitem(domain_folders.SETS, "office_home", small)
    root = tmp_path / "OfficeHomeDataset_10072016"
    for domain, number in (("Art", 10), ("Real_World", 5)):
        for c in ("Alarm_Clock", "Bed"):
            for i in range(number):
                picture(root / domain / c / f"{i:05d}.jpg", i)
    data = datasets.load("office_home", str(tmp_path))
    assert data.domain_names == ("Art", "Real World") and data.domain is not None and data.drawn == {}
    assert np.bincount(data.domain[data.split == 1]).tolist() == [4, 2]
    assert datasets.load("office_home", str(tmp_path), test_share=0.2).sha256 == data.sha256
    assert datasets.load("office_home", str(tmp_path), test_share=0.4).split.sum() == 12
    (root / "Art" / "Bed" / "00000.jpg").unlink()
    fails(lambda: datasets.load("office_home", str(tmp_path)), "domain Art: 19 images found, 20 images expected")


def core50(root: Path) -> None:
    for s in range(1, 12):
        for o in range(1, 13):
            picture(root / "core50_128x128" / f"s{s}" / f"o{o}" / f"C_{s:02d}_{o:02d}_000.png", 10 * s)


def test_core50(tmp_path: Path, monkeypatch):
    """Objects are numbered as numbers; three sessions are for testing: one common set of NI, and the test images of NC."""
    names = tuple(f"o{i}" for i in range(1, 13))
    small = replace(domain_folders.SETS["core50"], classes=12, class_names=names, total=(96, 36))
    monkeypatch.setitem(domain_folders.SETS, "core50", small)
    core50(tmp_path)
    ni = generators.domain_incremental("ni", "core50", str(tmp_path))
    assert ni.dataset.class_names == names
    assert [e.name for e in ni.manifest.experiences] == ["s1", "s2", "s4", "s5", "s6", "s8", "s9", "s11"]
    (evaluated,) = ni.manifest.evals
    assert (evaluated.name, len(evaluated.ids), evaluated.first_seen) == ("test", 36, 0)
    assert {image[0, 0, 0] for image in ni.dataset.images.raw(evaluated.ids)} == {30, 70, 100}
    turned = generators.domain_incremental("ni", "core50", str(tmp_path), domains=["s11", "s1"]).manifest
    assert [e.name for e in turned.experiences] == ["s11", "s1"] and len(turned.evals[0].ids) == 36
    fails(lambda: generators.domain_incremental("ni", "core50", str(tmp_path), domains=["s3"]), "s3", "no training samples")
    nc = generators.class_incremental("nc", "core50", str(tmp_path), base=10, increment=1).manifest
    assert [(len(e.train), len(e.classes)) for e in nc.experiences] == [(80, 10), (8, 1), (8, 1)]
    (tmp_path / "core50_128x128" / "s1" / "o1" / "C_01_01_000.png").rename(tmp_path / "lost.png")
    picture(tmp_path / "core50_128x128" / "s3" / "o1" / "new.png")
    (tmp_path / "core50_128x128" / "s1" / "o1").rmdir()
    fails(lambda: datasets.load("core50", str(tmp_path)), "all domains: 95 + 37 images found, 96 + 36 images expected")


def test_a_run_on_core50_ni(clbench, monkeypatch):
    """Several experiences, one evaluation set: the table and the metrics hold."""
    rows = [f"s{s}/o{o}.png,o{o},{'test' if s == 3 else 'train'},s{s}" for s in (1, 2, 3) for o in (1, 2)]
    for row in rows:
        picture(clbench.folder / row.split(",")[0], 90 * int(row[4]))
    (clbench.folder / "t.csv").write_text("\n".join(["path,label,split,domain", *rows]) + "\n")
    clbench("run", "scenario=dil_folder", "scenario.dataset=t.csv", "learner=ncm", "feature_store=off")
    (record,) = clbench.records()
    assert record["n"] == [2] and record["correct"] == [[2], [2]] and record["scenario"]["eval_names"] == ["test"]
    clbench("report", "--strict")
    clbench("verify")


def test_tiny_imagenet_is_counted(tmp_path: Path, monkeypatch):
    full = splits.FOLDERS["tiny_imagenet@official"]
    assert (full.classes, full.train, full.test) == (200, 100_000, 10_000)
    root = tmp_path / "tiny-imagenet-200"
    for c in ("n01", "n02"):
        picture(root / "train" / c / "images" / f"{c}_0.JPEG")
        picture(root / "val" / "images" / f"val_{c}.JPEG")
    picture(root / "test" / "images" / "test_0.JPEG")
    (root / "val" / "val_annotations.txt").write_text("val_n01.JPEG\tn01\t0\t0\t7\t7\nval_n02.JPEG\tn02\t0\t0\t7\t7\n")
    fails(lambda: datasets.load("tiny_imagenet@official", str(tmp_path)), "2 classes found, 200 expected")
    monkeypatch.setitem(splits.FOLDERS, "tiny_imagenet@official", replace(full, classes=2, train=2, test=2))
    data = datasets.load("tiny_imagenet@official", str(tmp_path))
    assert data.name == "tiny_imagenet@official" and data.class_names == ("n01", "n02") and data.split.tolist() == [0, 0, 1, 1]
    fails(lambda: datasets.load("tiny_imagenet", str(tmp_path)), "tiny_imagenet@official")
    fails(lambda: datasets.load("tiny_imagenet@official", str(root)), "2 + 2 images", "tiny-imagenet-200.zip")


def cub(root: Path) -> None:
    """Two species of three images, in the lists of CUB-200-2011: numbers from 1, the second image of each for testing."""
    folder = root / "CUB_200_2011"
    files = [f"{c}/{c[4:]}_{i}.jpg" for c in ("001.Auk", "002.Jay") for i in (7, 3, 5)]
    lines: dict[str, list[str]] = {"images": [], "train_test_split": [], "image_class_labels": []}
    for number, file in enumerate(files, 1):
        picture(folder / "images" / file, 20 * number)
        for name, word in zip(lines, (file, str(int(number % 3 != 2)), str(1 + (number > 3))), strict=True):
            lines[name].append(f"{number} {word}")
    for name, text in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(text) + "\n")


def test_cub_as_it_is_published(tmp_path: Path, monkeypatch):
    """Lists beside one folder of images: the same samples, ids and identity as in train/ and test/."""
    small = replace(splits.FOLDERS["cub@official"], classes=2, train=4, test=2)
    monkeypatch.setitem(splits.FOLDERS, "cub@official", small)
    cub(tmp_path / "a")
    data = datasets.load("cub@official", str(tmp_path / "a"))
    assert data.class_names == ("001.Auk", "002.Jay") and data.y.tolist() == [0, 0, 1, 1, 0, 1]
    assert np.allclose([image[0, 0, 0] for image in data.images.raw(np.arange(6))], [60, 20, 120, 80, 40, 100], atol=3)
    assert data.source_order is not None and data.source_order.tolist() == [1, 0, 3, 2], "images 1, 3, 4, 6 of the list"
    for part, ids in (("train", (0, 1, 2, 3)), ("test", (4, 5))):
        for i in ids:
            source: Path = data.images.paths[i]  # type: ignore[attr-defined]
            place = tmp_path / "b" / "cub@official" / part / source.parent.name
            place.mkdir(parents=True, exist_ok=True)
            (place / source.name).write_bytes(source.read_bytes())
    assert datasets.load("cub@official", str(tmp_path / "b")).sha256 == data.sha256

    lists = tmp_path / "a" / "CUB_200_2011"
    labels = (lists / "image_class_labels.txt").read_text()
    for wrong, words in (("1 1\n2 1\n", ("image 3", "alone")), (labels.replace("4 2", "4 1"), ("class 1 is 001.Auk and 002",))):
        (lists / "image_class_labels.txt").write_text(wrong)
        fails(lambda: datasets.load("cub@official", str(tmp_path / "a")), str(lists), *words)
    (lists / "image_class_labels.txt").write_text(labels + "4 2\n")
    fails(lambda: datasets.load("cub@official", str(tmp_path / "a")), "image_class_labels.txt, line 7", "'4 2'")
    (lists / "image_class_labels.txt").write_text(labels)
    (lists / "images" / "001.Auk" / "Auk_3.jpg").unlink()
    fails(lambda: datasets.load("cub@official", str(tmp_path / "a")), "Auk_3.jpg", "missing")
    fails(lambda: datasets.load("cub@official", str(lists)), "CUB_200_2011 as published", "data.caltech.edu")


def test_mini_imagenet_as_it_is_published(tmp_path: Path, monkeypatch):
    """One folder of images and two tables; index files name a class's folder that this layout does not have."""
    small = replace(splits.FOLDERS["mini_imagenet@fscil"], classes=3, train=9, test=3)
    monkeypatch.setitem(splits.FOLDERS, "mini_imagenet@fscil", small)
    root, classes = tmp_path / "miniimagenet", ("n03", "n01", "n02")
    for part, number in (("train", 3), ("test", 1)):
        rows = [f"{c}{part}{i}.jpg,{c}" for c in classes for i in range(number)]
        for k, row in enumerate(rows):
            picture(root / "images" / row.split(",")[0], 20 * k)
        (root / "split").mkdir(exist_ok=True)
        (root / "split" / f"{part}.csv").write_text("\n".join(["filename,label", *rows]) + "\n")
    data = datasets.load("mini_imagenet@fscil", str(tmp_path))
    assert data.class_names == classes and data.y.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 1, 2]
    (tmp_path / "lists").mkdir()
    lines = [f"MINI-ImageNet/train/{c}/{c}train{i}.jpg" for c in classes[1:] for i in (2, 0)]
    (tmp_path / "lists" / "session_2.txt").write_text("\n".join(lines) + "\n")
    few = [{"shots": {"base": 1, "way": 1, "shot": 2, "support": "lists"}}]
    made = generators.class_incremental("f", "mini_imagenet@fscil", str(tmp_path), base=1, increment=1, operators=few)
    assert [e.train.tolist() for e in made.manifest.experiences] == [[0, 1, 2], [3, 5], [6, 8]]
    (tmp_path / "lists" / "session_2.txt").write_text("MINI-ImageNet/train/n01/n02train0.jpg\n")
    fails(lambda: registry.apply(made, few, str(tmp_path)), "0 training files", "n01/n02train0.jpg")
    (root / "split" / "test.csv").write_text("filename,label\nn01test0.jpg,n09\n")
    fails(lambda: datasets.load("mini_imagenet@fscil", str(tmp_path)), "no training image is of class n09")
    fails(lambda: datasets.load("mini_imagenet", str(tmp_path)), "choose mini_imagenet@fscil")


@pytest.mark.parametrize(
    ("name", "folder"),
    [("objectnet", "objectnet"), ("omnibenchmark", "omnibenchmark"), ("vtab", "vtab"), ("vtab", "vtab-cil/vtab")],
)
def test_sets_of_revisiting_in_the_folders_of_its_archives(tmp_path: Path, monkeypatch, name: str, folder: str):
    """train/ and test/ below the archive's folder, proved by counts; class ids are positions among the sorted names."""
    known = splits.FOLDERS[f"{name}@revisiting"]
    for part, number in (("train", 2), ("test", 1)):
        for c in ("10", "2"):
            for i in range(number):
                picture(tmp_path / folder / part / c / f"{i}.jpg")
    fails(lambda: datasets.load(f"{name}@revisiting", str(tmp_path)), "2 classes found", f"{known.classes} expected")
    monkeypatch.setitem(splits.FOLDERS, f"{name}@revisiting", replace(known, classes=2, train=4, test=2))
    data = datasets.load(f"{name}@revisiting", str(tmp_path))
    assert data.name == f"{name}@revisiting" and data.class_names == ("10", "2") and data.split.tolist() == [0] * 4 + [1] * 2
    picture(tmp_path / folder / "test" / "2" / "more.jpg")
    fails(lambda: datasets.load(f"{name}@revisiting", str(tmp_path)), "3 test images found, 2 expected")


def test_counts_of_the_published_sets_add_up():
    """As published: 586,575 images of DomainNet (409,832 + 176,743), 15,588 of Office-Home, 164,866 of CORe50."""
    counts = {name: [c for c in known.domains.values() if c] for name, known in domain_folders.SETS.items()}
    assert [sum(c[part] for c in counts["domainnet"]) for part in (0, 1)] == [409_832, 176_743]
    assert sum(c[0] for c in counts["office_home"]) == 15_588
    assert sum(domain_folders.SETS["core50"].total or ()) == 164_866


@pytest.mark.parametrize(
    "name",
    "cil_cars cil_core50 cil_domainnet cil_imagenet cil_tiny_imagenet dil_clear10 dil_clear100 dil_core50 dil_domainnet "
    "dil_office_home nic_core50".split(),
)
def test_presets_of_published_sets_say_where_their_data_comes_from(name: str, tmp_path: Path):
    from clbench.config import compose, registry

    (job,) = compose.compose([f"scenario={name}", f"data_root={tmp_path}"])
    registry.check(job)
    assert job["scenario"]["dataset"] in datasets.names() and job["scenario"]["name"] == name
    fails(lambda: compose.build(job["scenario"]), job["scenario"]["dataset"], "not found", str(tmp_path), "http")


def test_two_lists_of_imagenet_100(tmp_path: Path, monkeypatch):
    """One keeps the first hundred folder names, the other names its classes."""
    from clbench.config import compose
    from clbench.streams.images import vision

    (cmc,), (podnet,) = (compose.compose([f"scenario=cil_imagenet100_{name}"]) for name in ("cmc", "podnet"))
    listed = cmc["scenario"]["classes"]
    assert len(set(listed)) == 100 and {"n02869837", "n02090622"} <= set(listed) and podnet["scenario"]["num_classes"] == 100
    names = sorted({*listed, *(f"n0144{i:04d}" for i in range(60))})
    content = tmp_path / "one.png"
    picture(content)
    for part in ("train", "val"):
        for name in names:
            (tmp_path / "imagenet" / part / name).mkdir(parents=True)
            (tmp_path / "imagenet" / part / name / "0.png").write_bytes(content.read_bytes())
    known = vision.TABLE["imagenet"]
    assert known.sizes == (1000, 1_281_167, 50_000)
    monkeypatch.setitem(vision.TABLE, "imagenet", replace(known, sizes=(len(names),) * 3))
    for job, expected in ((cmc, sorted(listed)), (podnet, names[:100])):
        made = compose.build(job["scenario"] | {"data_root": str(tmp_path)})
        assert list(made.class_names().values()) == expected and len(made.manifest.experiences) == 10


def clear(root: Path, known, train: str = "train_image_only") -> None:
    """Ten buckets; a picture says its bucket, class and part. Bucket 10 comes before 2 as text."""
    for part, number in ((train, 3), ("test", 2)):
        for bucket in range(1, 11):
            for c, name in enumerate(known):
                for i in range(number):
                    path = root / part / "labeled_images" / str(bucket) / name / f"{i}.jpg"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (5, 4), (20 * bucket, 80 * c, 0)).save(path, "PNG")
        (root / part / "class_names.txt").write_text("\n".join(known))


@pytest.fixture
def clear10(tmp_path: Path, monkeypatch) -> Path:
    names = ("BACKGROUND", "bus", "camera")
    monkeypatch.setitem(
        time_buckets.SETS, "clear10", replace(time_buckets.SETS["clear10"], classes=3, names=("bus", "camera", "BACKGROUND"))
    )
    clear(tmp_path / "clear10", names)
    return tmp_path


def test_clear_as_it_is_published(clear10: Path):
    from clbench.config import compose

    (job,) = compose.compose(["scenario=dil_clear10", f"data_root={clear10}"])
    made = compose.build(job["scenario"])
    buckets = [str(i) for i in range(1, 11)]
    assert [e.name for e in made.manifest.experiences] == buckets == [e.name for e in made.manifest.evals]
    assert made.dataset.class_names == ("BACKGROUND", "bus", "camera")
    for i, (entry, tested) in enumerate(zip(made.manifest.experiences, made.manifest.evals, strict=True)):
        assert (len(entry.train), len(tested.ids), tested.first_seen) == (9, 6, i)
        for ids in (entry.train, tested.ids):
            shown = [image[0, 0].tolist() for image in made.dataset.images.raw(ids)]
            assert [[20 * (i + 1), 80 * c, 0] for c in made.dataset.y[ids]] == shown
    (clear10 / "clear10" / "train_image_only").rename(clear10 / "clear10" / "train")
    assert len(datasets.load("clear10", str(clear10))) == 150, "the archive with metadata has another folder name"
    clear_names = clear10 / "clear10" / "train" / "class_names.txt"
    clear_names.write_text("bus\ncamera\nBACKGROUND\n")
    assert datasets.load("clear10", str(clear10)).class_names[0] == "bus", "ids are those of the list"


def test_clear_without_the_test_archive(clear10: Path):
    fails(lambda: datasets.load("clear10", str(clear10), test_share=0.3), "no effect", "test images of its own")
    (clear10 / "clear10" / "test").rename(clear10 / "away")
    fails(lambda: datasets.load("clear10", str(clear10)), "is missing", "clear10-test.zip", "scenario.test_share=0.3")
    drawn = datasets.load("clear10", str(clear10), test_share=0.3)
    assert drawn.domain is not None and np.bincount(drawn.domain[drawn.split == 1]).tolist() == [3] * 10


def test_a_clear_that_is_not_it_is_refused(clear10: Path):
    def load():
        return datasets.load("clear10", str(clear10))

    top = clear10 / "clear10"
    fails(lambda: datasets.load("clear100", str(clear10)), "clear100/train_image_only/labeled_images", "clear100-test.zip")
    bus = top / "test" / "labeled_images" / "4" / "bus"
    bus.rename(top / "bus")
    fails(load, "labeled_images/4 has other classes", "bus")
    bus.mkdir()
    fails(load, str(bus), "holds no image")
    shutil.rmtree(bus)
    (top / "bus").rename(bus)
    seventh = top / "train_image_only" / "labeled_images" / "7"
    seventh.rename(top / "7")
    fails(load, "bucket 7 of 1..10 is missing")
    (top / "7").rename(seventh)
    (seventh.parent / "11").mkdir()
    fails(load, "it has no bucket 11")
    (seventh.parent / "11").rmdir()
    listed = top / "train_image_only" / "class_names.txt"
    listed.write_text("BACKGROUND\nbus\n")
    fails(load, "class_names.txt", "differ in camera")
    for place in top.glob("*/labeled_images/*/camera"):
        shutil.rmtree(place)
    fails(load, "is not clear10: 2 classes found (BACKGROUND, bus), 3 classes")
    (top / "test").rename(top / "gone")
    fails(lambda: datasets.load("clear10", str(top)), "not found", "get it from https://huggingface.co")


# lists of batches


def lists(root: Path, name: str = "NIC_v2_3", run: int = 0) -> dict[str, str]:
    """Three batches of objects o1..o12 in sessions: o1 and o2 of s1; o2 of s2 and o11; o1 of s2, backwards. Texts by file."""

    def lines(*pairs):
        return "".join(f"s{s}/o{o}/C_{s:02d}_{o:02d}_000.png {o - 1}\n" for s, o in pairs)

    texts = {
        "train_batch_00_filelist.txt": lines((1, 1), (1, 2)),
        "train_batch_01_filelist.txt": lines((2, 2), (1, 11)),
        "train_batch_02_filelist.txt": lines((4, 1), (2, 1)),
        "test_filelist.txt": lines(*((s, o) for s in (3, 7, 10) for o in range(1, 13) if (s, o) != (7, 1))),
    }
    folder = root / name / f"run{run}"
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        (folder / file).write_text(text)
    return texts


@pytest.fixture
def small50(tmp_path: Path, monkeypatch) -> Path:
    names = tuple(f"o{i}" for i in range(1, 13))
    small = replace(domain_folders.SETS["core50"], classes=12, class_names=names, total=(96, 36))
    monkeypatch.setitem(domain_folders.SETS, "core50", small)
    core50(tmp_path)
    lists(tmp_path)
    return tmp_path


def test_batches_of_new_instances_and_classes(small50: Path):
    def made(then=(), folder="NIC_v2_3", run=0, **options):
        listed = {"file_lists": {"folder": folder, "run": run}}
        options |= {"data_root": str(small50), "increment": 1, "operators": [listed, *then]}
        return generators.class_incremental("nic", "core50", **options)

    stream = made()
    manifest, data = stream.manifest, stream.dataset
    assert [(e.name, e.classes) for e in manifest.experiences] == [("batch0", (0, 1)), ("batch1", (1, 10)), ("batch2", (0,))]
    assert isinstance(data.images, FileImages)
    paths = [[data.images.paths[i] for i in e.train] for e in manifest.experiences]
    shown = [[p.parent.parent.name + p.parent.name for p in one] for one in paths]
    assert shown == [["s1o1", "s1o2"], ["s2o2", "s1o11"], ["s4o1", "s2o1"]], "in the order of the lists"
    assert [(e.classes, e.first_seen, len(e.ids)) for e in manifest.evals] == [((0, 1), 0, 5), ((10,), 1, 3)]
    facts = stream.facts()
    assert not facts.every_experience_has_new_classes and not facts.every_class_comes_once
    assert Manifest.from_json(manifest.to_json()) == manifest
    few = made(classes=["o2", "o11"], limit_test=2).manifest
    assert [e.classes for e in few.experiences] == [(1,), (1, 10)] and [len(e.ids) for e in few.evals] == [3, 3]
    once = made(["single_pass"]).manifest
    assert next(iter(once.operators[1])) == "single_pass" and once.budget["in_order"]
    lists(small50, run=4)
    batch = small50 / "NIC_v2_3" / "run4" / "train_batch_00_filelist.txt"
    batch.write_text("s5/o3/C_05_03_000.png 2\n")
    assert made(run=4).manifest.experiences[0].classes == (2,)
    (small50 / "NIC_v2_3").rename(small50 / "core50_lists")
    other = made(folder=str(small50 / "core50_lists")).manifest
    assert replace(other, operators=manifest.operators) == manifest, "a path serves as well"
    assert other.operators == ({"file_lists": {"folder": "core50_lists", "run": 0}},), "where it lies is not part of the stream"


def test_lists_that_are_none(small50: Path):
    digits = generators.class_incremental("nic", "digits", increment=10)
    base = generators.class_incremental("nic", "core50", str(small50), increment=1)

    def made(stream=base, **options):
        return registry.apply(stream, [{"file_lists": {"folder": "NIC_v2_3", **options}}], data_root=str(small50))

    fails(lambda: made(digits), "digits is no folder")
    fails(lambda: made(folder="NIC_v2_79"), "no lists of batches at NIC_v2_79", "batches_filelists_NICv2.zip")
    fails(lambda: made(run=3), "file_lists.run=3", "has the runs 0")
    fails(lambda: made(run=-1), "file_lists.run")
    folder, texts = small50 / "NIC_v2_3" / "run0", lists(small50)
    first, second = "train_batch_00_filelist.txt", "train_batch_01_filelist.txt"
    for file, text, words in (
        (first, "s1/o1/C_01_01_000.png\n", ("line 1", "a path and a label")),
        (first, texts[first] + "s1/o1/C_01_01_999.png 0\n", ("line 3", "no training image of data set core50")),
        (first, texts[first] + "s3/o1/C_03_01_000.png 0\n", ("line 3", "no training image")),
        (second, texts[second].replace(" 1\n", " 7\n"), ("line 1", "class o2 has the label 7, elsewhere 1")),
        (second, texts[second].replace(" 10\n", " 0\n"), ("two classes have the same label",)),
        (second, texts[second] + texts[first], ("listed before", "NIC_v2_79")),
        (second, "", ("is empty",)),
        ("test_filelist.txt", texts[first], ("test_filelist.txt, line 1", "no test image")),
    ):
        (folder / file).write_text(text)
        fails(made, *words)
        lists(small50)
    (folder / "train_batch_03_filelist.txt").write_text(texts[first])
    fails(made, "has 4 lists of training images, 3 expected")
    (folder / "train_batch_03_filelist.txt").unlink()
    (folder / second).unlink()
    fails(made, "train_batch_01_filelist.txt is missing, 3 lists expected")
    lists(small50)
    (folder / "test_filelist.txt").unlink()
    fails(made, "cannot read", "test_filelist.txt")


# notMNIST and 5-datasets


@pytest.fixture
def letters(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(notmnist, "IMAGES", 50)
    for part, number in (("Train", 3), ("Test", 2)):
        for c, letter in enumerate("ABCDEFGHIJ"):
            for i in range(number):
                picture(tmp_path / "notMNIST" / part / letter / f"{i}.png", 20 * c)
    (tmp_path / "notMNIST" / "Train" / notmnist.BROKEN[1]).write_bytes(b"")
    return tmp_path


def test_notmnist_without_its_broken_files(letters: Path, caplog):
    data = datasets.load("notmnist", str(letters))
    assert data.class_names == tuple("ABCDEFGHIJ") and np.bincount(data.split).tolist() == [30, 20]
    assert [image[0, 0, 0] // 20 for image in data.images.raw(np.arange(50))] == data.y.tolist()
    assert "1 file(s) known to be broken" in caplog.text
    (letters / "notMNIST" / "Train" / "A" / "0.png").unlink()
    fails(lambda: datasets.load("notmnist", str(letters)), "49 images found, 50 expected")
    shutil.rmtree(letters / "notMNIST" / "Train" / "C")
    fails(lambda: datasets.load("notmnist", str(letters)), "A to J: C is missing")
    fails(lambda: datasets.load("notmnist", str(letters / "notMNIST")), "not found", "data/notMNIST.zip")


def test_five_datasets(letters: Path, monkeypatch):
    """Ten classes from each; the one that is missing is named with where it comes from."""
    from clbench.config import compose
    from clbench.streams.images import vision

    for name in ("cifar10", "mnist", "fashion_mnist", "svhn"):
        monkeypatch.setitem(vision.TABLE, name, replace(vision.TABLE[name], sizes=(10, 20, 10)))
        side = 32 if name in ("cifar10", "svhn") else 28
        y = {"train": np.repeat(np.arange(10), 2), "test": np.arange(10)}
        x = {
            part: np.random.default_rng(len(name)).integers(0, 256, (len(ids), side, side), np.uint8) for part, ids in y.items()
        }
        np.savez(letters / f"{name}.npz", train_x=x["train"], train_y=y["train"], test_x=x["test"], test_y=y["test"])
    for preset in ("cil_5datasets", "til_5datasets"):
        (job,) = compose.compose([f"scenario={preset}", f"data_root={letters}"])
        made = compose.build(job["scenario"])
        names = [e.name for e in made.manifest.experiences]
        assert names == ["exp0", "mnist", "fashion_mnist", "svhn", "notmnist"]
        assert [e.classes for e in made.manifest.experiences] == [tuple(range(10 * i, 10 * i + 10)) for i in range(5)]
        assert [len(e.train) for e in made.manifest.experiences] == [20, 20, 20, 20, 30]
        assert made.manifest.discloses_task == (preset[:3] == "til")
    (letters / "notMNIST").rename(letters / "away")
    fails(lambda: compose.build(job["scenario"]), "data set notmnist not found", "data/notMNIST.zip")
    (letters / "svhn.npz").unlink()
    fails(lambda: compose.build(job["scenario"]), "data set svhn not found", "`download=true` gets it")
