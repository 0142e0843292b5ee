"""What a user's folder may hold ends as samples, in one counted line, or in a named file and one line."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clbench.interfaces import UserError
from clbench.streams import datasets, generators
from clbench.streams.images import class_folders
from clbench.streams.manifest import Manifest


def picture(path: Path, value: int = 0, mode: str = "RGB", size=(6, 5)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 0)).save(path)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "mine"
    for part, number in (("train", 3), ("test", 2)):
        for c in ("cat", "dog"):
            for i in range(number):
                picture(root / part / c / f"{i}.png", 10 * i)
    return root


def fails(call, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text
    return text


@pytest.fixture
def said(caplog):
    datasets.say.cache_clear()
    caplog.set_level(logging.WARNING, "clbench")
    logging.getLogger("clbench").propagate = True
    return lambda: [record.message for record in caplog.records if "passed over" in record.message]


def test_a_clean_folder_is_read_without_a_word(tree: Path, said):
    assert len(datasets.load(str(tree))) == 10 and said() == []


def test_links_are_followed(tree: Path, said):
    pool = tree.parent / "pool"
    for i in range(4):
        picture(pool / "deep" / f"p{i}.png", 50 + i)
    picture(tree.parent / "one.png", 99)
    before = datasets.load(str(tree))
    os.symlink(pool, tree / "train" / "cat" / "more")
    os.symlink(tree.parent / "one.png", tree / "train" / "dog" / "one.png")
    data = datasets.load(str(tree))
    assert np.bincount(data.y[data.split == 0]).tolist() == [7, 4] and said() == [] and data.sha256 != before.sha256
    assert [image[0, 0, 0] for image in data.images.raw(np.arange(7))] == [0, 10, 20, 50, 51, 52, 53]
    assert data.images.raw(np.array([10]))[0][0, 0, 0] == 99
    (tree / "test" / "dog").rename(tree.parent / "elsewhere")
    os.symlink(tree.parent / "elsewhere", tree / "test" / "dog")
    assert datasets.load(str(tree)).sha256 == data.sha256, "a class folder may be a link"
    os.symlink(tree, tree.parent / "link")
    assert datasets.load(str(tree.parent / "link")).sha256 == data.sha256, "so may the whole folder"


def test_links_in_a_circle_and_twice_to_one_folder_are_counted(tree: Path, said):
    cat = tree / "train" / "cat"
    before = datasets.load(str(tree)).sha256
    os.symlink(cat, cat / "again")
    os.symlink(tree / "train", tree / "train" / "dog" / "up")
    data = datasets.load(str(tree))
    (line,) = said()
    assert line.startswith(f"{tree}: passed over ") and "2 link(s) in a circle or to folders read already" in line
    assert data.sha256 == before
    (cat / "deep").mkdir()
    os.symlink(cat / "deep", tree / "train" / "dog" / "a")
    os.symlink(cat / "deep", tree / "train" / "dog" / "b")
    picture(cat / "deep" / "0.png")
    datasets.say.cache_clear()
    assert np.bincount(datasets.load(str(tree)).y).tolist() == [6, 6] and "3 link(s)" in said()[-1]


def test_two_links_that_lead_to_each_other_end(tree: Path):
    for a, b in (("a", "b"), ("b", "a")):
        (tree.parent / a).mkdir(exist_ok=True)
        (tree.parent / b).mkdir(exist_ok=True)
        os.symlink(tree.parent / b, tree.parent / a / "x")
    picture(tree.parent / "b" / "p.png")
    os.symlink(tree.parent / "a", tree / "train" / "cat" / "a")
    data = datasets.load(str(tree))
    assert int(((data.y == 0) & (data.split == 0)).sum()) == 4


def test_what_is_passed_over_is_counted_in_one_line(tree: Path, said):
    sha256 = datasets.load(str(tree)).sha256
    for name in ("notes.txt", "more.txt", "Thumbs.db", "desktop.ini", "README"):
        (tree / "train" / "cat" / name).write_text("x")
    for name in (".DS_Store", "._0.png", ".hidden.png"):
        (tree / "test" / "dog" / name).write_text("x")
    picture(tree / "train" / "__MACOSX" / "cat" / "._0.png")
    picture(tree / "train" / "loose.png")
    picture(tree / "val" / "cat" / "0.png")
    assert datasets.load(str(tree)).sha256 == sha256
    (line,) = said()
    assert "5 file(s) that are no image (.txt, .db, .ini, no suffix)" in line
    assert "4 hidden or of the system" in line and "1 file(s) beside the class folders" in line
    assert "1 folder val/ (the test images are those of test/)" in line


def test_upper_case_more_kinds_mixed_modes_and_sizes(tree: Path, said):
    for i, name in enumerate(("A.PNG", "b.Jpg", "c.TIFF", "d.gif", "e.pgm")):
        picture(tree / "train" / "cat" / name, 7, "L", (4 + i, 9))
    data = datasets.load(str(tree))
    assert np.bincount(data.y[data.split == 0]).tolist() == [8, 3] and said() == []
    raw = data.images.raw(np.flatnonzero(data.y == 0))
    assert {image.shape[2] for image in raw} == {3} and len({image.shape for image in raw}) == 6
    assert ".png" in class_folders.EXTENSIONS and ".txt" not in class_folders.EXTENSIONS


def test_broken_folders_end_in_one_line_with_a_name(tree: Path):
    os.symlink(tree / "nowhere.png", tree / "train" / "cat" / "gone.png")
    fails(lambda: datasets.load(str(tree)), "gone.png", "No such file")
    (tree / "train" / "cat" / "gone.png").unlink()
    (tree / "train" / "eel").mkdir()
    fails(lambda: datasets.load(str(tree)), str(tree / "train" / "eel"), "holds no image")
    picture(tree / "train" / "eel" / "0.png")
    fails(lambda: datasets.load(str(tree)), str(tree / "test" / "eel"), "missing")
    (tree / "train" / "eel" / "0.png").unlink()
    (tree / "train" / "eel").rmdir()
    picture(tree / "test" / "fox" / "0.png")
    fails(lambda: datasets.load(str(tree)), "classes that", "lacks", "fox")


def test_folders_that_cannot_be_read_are_named(tree: Path, monkeypatch):
    """Where the system refuses, also deep in a class."""
    picture(tree / "train" / "dog" / "deep" / "0.png")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(class_folders.os, "scandir", refusing)
    fails(lambda: datasets.load(str(tree)), str(tree / "train" / "dog" / "deep"), "Permission denied")


def test_names_that_are_no_utf8(tree: Path):
    """Of a file: read; of a class, whose name must be written: refused."""
    os.rename(tree / "train" / "cat" / "0.png", os.fsencode(tree / "train" / "cat") + b"/\xff.png")
    data = datasets.load(str(tree))
    assert len(data) == 10 and len(data.images.raw(np.arange(3))) == 3
    os.rename(tree / "train" / "dog", os.fsencode(tree / "train") + b"/d\xfcg")
    fails(lambda: datasets.load(str(tree)), "not UTF-8", "d\\xfcg")


def numbered(root: Path) -> Path:
    for part, number in (("train", 2), ("test", 1)):
        for c in range(12):
            for i in range(number):
                picture(root / part / str(c) / f"{i}.png", 20 * c)
    return root


def test_class_ids_are_positions_among_names_sorted_as_text(tmp_path: Path, clbench):
    root = numbered(tmp_path / "numbered")
    names = sorted(map(str, range(12)))
    assert names[2] == "10" and datasets.load(str(root)).class_names == tuple(names)
    words = ("scenario=cil_folder", f"scenario.dataset={root}", "scenario.increment=4", "learner=ncm", "feature_store=off")
    shown = clbench("manifest", "show", *words).stdout
    assert "classes 0=0 1=1 2=10 3=11\n" in shown
    chosen = clbench("manifest", "show", *words, "scenario.increment=1", "scenario.classes=[3,'3']").stdout
    assert "classes 3=11\n" in chosen and "classes 5=3\n" in chosen, "a number is an id, a text is a name"
    planned = clbench("plan", *words).stdout
    assert f"classes of cil_folder: {' '.join(f'{i}={name}' for i, name in enumerate(names))}\n" in planned
    clbench("manifest", "write", *words, "--out", "m.json")
    text = (tmp_path / "m.json").read_text()
    assert '"2": "10"' in text and Manifest.load(tmp_path / "m.json").sha256 in shown
    clbench("run", *words, "scenario.order=random")
    (record,) = clbench.records()
    scenario = record["scenario"]
    assert [names[c] for c in scenario["class_order"]] == scenario["class_names"]
    clbench("verify")
    clbench("report", "html")
    page = (tmp_path / "results" / "report.html").read_text()
    brings = [", ".join(names[c] for c in scenario["experiences"][i]["classes"]) for i in range(3)]
    assert all(one in page for one in brings)


def test_records_of_classes_named_by_their_ids_say_nothing_of_names(clbench, small):
    clbench("run", "learner=ncm", *small)
    (record,) = clbench.records()
    assert "class_names" not in record["scenario"]
    clbench("manifest", "write", *small, "--out", "m.json")
    assert "class_names" not in (clbench.folder / "m.json").read_text()


def undivided(root: Path, below: str = "") -> Path:
    for c, number in (("cat", 10), ("dog", 5), ("eel", 2)):
        for i in range(number):
            picture(root / below / c / f"{i}.png", i)
    return root


@pytest.mark.parametrize("below", ["", "train"])
def test_a_share_is_drawn_on_request(tmp_path: Path, below: str):
    root = undivided(tmp_path / "mine", below)
    fails(lambda: datasets.load(str(root)), "train/<class>/ and test/<class>/", "scenario.test_share=0.2")
    data = datasets.load(str(root), test_share=0.2)
    assert [int(data.split[data.y == c].sum()) for c in range(3)] == [2, 1, 1]
    again, other = (datasets.load(str(root), test_share=0.2, test_seed=s) for s in (0, 1))
    assert np.array_equal(again.split, data.split) and again.sha256 == data.sha256
    assert other.split.sum() == 4 and other.sha256 != data.sha256
    half = datasets.load(str(root), test_share=0.5)
    assert [int(half.split[half.y == c].sum()) for c in range(3)] == [5, 3, 1]
    assert datasets.load("mine", str(tmp_path), test_share=0.2).sha256 == data.sha256


def test_the_draw_is_in_the_manifest_and_repeated_from_it(tmp_path: Path):
    root = undivided(tmp_path / "mine")
    made = [generators.class_incremental("m", str(root), increment=1, test_share=0.3, test_seed=s) for s in (0, 7)]
    assert made[0].manifest.sha256 != made[1].manifest.sha256
    assert made[1].manifest.dataset["test_share"] == 0.3 and made[1].manifest.dataset["test_seed"] == 7
    made[1].manifest.save(tmp_path / "m.json")
    again = generators.from_manifest(str(tmp_path / "m.json"), dataset=str(root))
    assert again.manifest.sha256 == made[1].manifest.sha256 and again.dataset.sha256 == made[1].dataset.sha256
    operators = [{"concatenate": {"datasets": ["digits"]}}]
    both = generators.class_incremental("m", str(root), increment=1, test_share=0.3, operators=operators).manifest
    both.save(tmp_path / "both.json")
    again = generators.from_manifest(str(tmp_path / "both.json"), dataset=[str(root), "digits"])
    assert again.manifest.sha256 == both.sha256


def test_a_share_without_effect_or_sense_is_refused(tree: Path, tmp_path: Path):
    fails(lambda: datasets.load(str(tree), test_share=0.2), "scenario.test_share has no effect", "test images of its own")
    fails(lambda: datasets.load("digits", test_share=0.2), "scenario.test_share has no effect")
    fails(lambda: datasets.load("mnist", str(tmp_path), test_share=0.2), "scenario.test_share has no effect")
    x, y = np.zeros((20, 2, 2), np.uint8), np.repeat([0, 1], 10)
    np.savez(tmp_path / "two.npz", train_x=x, train_y=y, test_x=x, test_y=y)
    fails(lambda: datasets.load(str(tmp_path / "two.npz"), test_share=0.2), "two.npz", "scenario.test_share has no effect")
    np.savez(tmp_path / "one.npz", x=x, y=y)
    assert int(datasets.load(str(tmp_path / "one.npz"), test_share=0.4).split.sum()) == 8
    for share in (0, 1, -0.1, True, "half", 0.00001):
        fails(lambda share=share: datasets.load(str(tree), test_share=share), "scenario.test_share must be a share")
    fails(lambda: datasets.load(str(tree), test_seed=3), "scenario.test_seed=3 has no effect")
    fails(lambda: datasets.load(str(tree), test_share=0.2, test_seed=-1), "scenario.test_seed must be")
    one = picture(tmp_path / "few" / "cat" / "0.png").parent.parent
    undivided(one)
    (one / "fox").mkdir()
    picture(one / "fox" / "0.png")
    fails(lambda: datasets.load(str(one), test_share=0.2), "no test samples", "fox")


def test_identity_of_runs_without_a_share_is_what_it_was():
    from clbench.config import compose
    from clbench.run import provenance

    (plain,), (drawn,) = compose.compose([]), compose.compose(["scenario.test_share=0.2", "scenario.test_seed=1"])
    assert not {"test_share", "test_seed"} & set(provenance.identity(plain)["scenario"])
    assert provenance.identity(drawn)["scenario"]["test_seed"] == 1


@pytest.mark.parametrize(
    "name", ["it's", 'a "b"', 'it\'s "b"', "ü m", "a=b", "~x", "x'", "(x)", "[x]", "a#b", "x\\y", "50%", "$x", "a b"]
)
def test_paths_are_taken_as_they_are(tree: Path, name: str, monkeypatch):
    from clbench.config import compose

    monkeypatch.chdir(tree.parent)
    tree.rename(tree.parent / name)
    for given in (f"./{name}", *([name] if "'" in name or name == "ü m" else [])):
        (job,) = compose.compose(["scenario=cil_folder", f"scenario.dataset={given}", "scenario.increment=1"])
        assert len(compose.build(job["scenario"]).dataset) == 10


def test_manifest_paths_with_quotes_and_umlauts(tree: Path, clbench):
    words = ("scenario=cil_folder", f"scenario.dataset={tree}", "scenario.increment=1")
    for out in ("ü m.json", "it's.json"):
        clbench("manifest", "write", *words, "--out", out)
        shown = clbench("manifest", "show", "scenario=manifest", f"scenario.path={out}", f"scenario.dataset={tree}").stdout
        assert "exp1" in shown


def test_what_cannot_be_read_as_one_path_says_what_to_quote():
    from clbench.config import compose

    text = fails(lambda: compose.compose(["scenario=cil_folder", "scenario.dataset=./a,b"]), "add -m")
    assert text.endswith("""for one value with a comma, write "scenario.dataset='./a,b'\"""")
    (job,) = compose.compose(["scenario=cil_folder", "scenario.dataset='./a,b'"])
    assert job["scenario"]["dataset"] == "./a,b"
    fails(lambda: compose.compose(["learner.lr=0.1,"]), "cannot read 'learner.lr=0.1,'", "learner.lr='0.1,'")
    fails(lambda: compose.compose(["scenario=cil_folder", "scenario.dataset=./${x}"]), "nterpolation", "\\${...}")


def test_a_stream_of_long_names_is_shown_in_columns(tree: Path):
    for part in ("train", "test"):
        (tree / part / "cat").rename(tree / part / "a very long name of a cat")
    shown = generators.class_incremental("long", str(tree), increment=1).text().splitlines()[1:]
    assert shown[0].endswith("classes 0=a very long name of a cat")
    both = generators.class_incremental("long", str(tree), increment=2).text().splitlines()[1]
    assert both.endswith("classes 0=a very long name of a cat, 1=dog")
    every = generators.domain_incremental("long", str(_domains(tree.parent))).text().splitlines()[1:]
    assert len({line.index(" samples") for line in every if "evaluate" not in line}) == 1
    assert len({line.index(" samples") for line in every if "evaluate" in line}) == 1


def _domains(folder: Path) -> Path:
    for name in ("a", "photographs of 2014"):
        for part in ("train", "test"):
            for label in ("cat", "dog"):
                for i in range(2):
                    picture(folder / "domains" / name / part / label / f"{i}.png", 10 * i)
    return folder / "domains"
