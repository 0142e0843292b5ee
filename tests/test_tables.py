"""Tables of paths and labels, saved Arrow folders, and files that are no data set: read, or told what they are."""

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clbench.interfaces import UserError
from clbench.streams import datasets, generators
from clbench.streams.images import damage, foreign_files, tables

arrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow: pip install 'clbench[tables]'")
ROWS = [  # path, label, split, domain
    ("a/0.png", "dog", "train", "photo"),
    ("a/1.png", "cat", "Training", "photo"),
    ("a/2.png", "cat", "test", "photo"),
    ("b/0.png", "dog", "test", "photo"),
    ("b/1.png", "cat", "train", "clipart"),
    ("b/2.png", "dog", "train", "clipart"),
    ("c d/é.png", "cat", "TEST", "clipart"),
    ("c d/1.png", "dog", "testing", "clipart"),
]


def fails(call, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text
    return text


def write(path: Path, head: str, rows, separator: str = ",") -> str:
    for i, row in enumerate(rows):
        file = path.parent / row[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5), (10 * i, 0, 0)).save(file)
    lines = [head.replace(",", separator), *(separator.join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_a_table_with_splits_and_domains(tmp_path: Path):
    data = datasets.load(write(tmp_path / "t.csv", "path,label,split,domain", ROWS))
    assert data.name == "t" and data.class_names == ("cat", "dog") and data.domain_names == ("photo", "clipart")
    assert data.y.tolist() == [1, 0, 0, 1, 0, 1, 0, 1] and data.split.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert data.domain is not None and data.domain.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [image[0, 0, 0] for image in data.images.raw(np.arange(8))] == [10 * i for i in range(8)]
    stream = generators.domain_incremental("d", str(tmp_path / "t.csv"), domains=["clipart", "photo"]).manifest
    assert [e.name for e in stream.experiences] == ["clipart", "photo"] and stream.experiences[0].train.tolist() == [4, 5]
    assert generators.class_incremental("c", str(tmp_path / "t.csv"), increment=1).manifest.experiences[0].train.tolist() == [
        1,
        4,
    ]


def test_forms_of_one_table_agree(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [row[:3] for row in ROWS]
    expected = datasets.load(write(tmp_path / "t.csv", "path,label,split", rows))
    quoted = [(f'"{path}"', label, split) for path, label, split in rows]
    text = "\ufeff" + "\n".join(["File_Name, Class ,SUBSET,remark", *(",".join((*row, "x")) for row in quoted)])
    (tmp_path / "u.csv").write_text(text.replace(", ", ",").replace(" ,", ","), encoding="utf-8")
    write(tmp_path / "v.tsv", "image_path,category,partition", rows, "\t")
    for name in ("t.csv", "./u.csv", "v.tsv"):
        found = datasets.load(name)
        assert found.sha256 == expected.sha256 and found.class_names == expected.class_names
    assert datasets.load("t.csv", test_share=None).sha256 == expected.sha256


def test_numbers_are_ordered_as_numbers_and_texts_as_texts(tmp_path: Path):
    def named(labels):
        rows = [(f"{part}{label}.png", label, part) for label in labels for part in ("train", "test")]
        return datasets.load(write(tmp_path / "t.csv", "path,label,split", rows)).class_names

    assert named([10, 2, 0]) == ("0", "2", "10") and named(["10", "2", "x"]) == ("10", "2", "x")
    assert tables.numbered(["b", "a", "b"])[0].tolist() == [1, 0, 1]


def test_validation_rows(tmp_path: Path, caplog):
    datasets.say.cache_clear()
    rows = [(f"{c}{s}.png", c, s) for c in "ab" for s in ("train", "val")]
    data = datasets.load(write(tmp_path / "t.csv", "path,label,split", rows))
    assert data.split.tolist() == [0, 1, 0, 1] and "passed over" not in caplog.text
    rows += [(f"{c}x.png", c, "test") for c in "ab"]
    data = datasets.load(write(tmp_path / "t.csv", "path,label,split", rows))
    assert data.split.tolist() == [0, 0, 1, 1] and "passed over 2 validation rows" in caplog.text


def test_a_table_without_a_split(tmp_path: Path):
    rows = [(f"{c}{i}.png", c) for c in "ab" for i in range(5)]
    path = write(tmp_path / "t.csv", "path,label", rows)
    fails(lambda: datasets.load(path), "t.csv has no column split", "scenario.test_share=0.2")
    data = datasets.load(path, test_share=0.4)
    assert [int(data.split[data.y == c].sum()) for c in (0, 1)] == [2, 2]
    assert datasets.load(path, test_share=0.4, test_seed=1).sha256 != data.sha256
    by_domain = [(*row, "de"[i % 5 > 2]) for i, row in enumerate(rows)]
    data = datasets.load(write(tmp_path / "u.csv", "path,label,domain", by_domain), test_share=0.5)
    assert data.domain is not None
    assert [int(data.split[(data.y == c) & (data.domain == d)].sum()) for c in (0, 1) for d in (0, 1)] == [2, 1, 2, 1]


BAD = {
    "no label": ("path,colour", [("a.png", "x")], ("column", "path, colour")),
    "two labels": ("path,label,class,split", [("a.png", "x", "y", "train")], ("label and class", "both be the label")),
    "split": ("path,label,split", [("a.png", "x", "trian")], ("row 1", "'trian'", "train")),
    "twice": ("path,label,split", [("a.png", "x", "train"), ("a.png", "x", "test")], ("a.png", "rows 1 and 2", "x (test)")),
    "empty label": ("path,label,split", [("a.png", "x", "train"), ("b.png", "", "test")], ("row 2", "no label")),
    "no test": ("path,label,split", [("a.png", "x", "train")], ("no test samples",)),
    "one class": (
        "path,label,split",
        [(f"{c}{s}", c, s) for c, s in (("x", "train"), ("y", "train"), ("x", "test"))],
        ("['y']",),
    ),
    "no rows": ("path,label", [], ("no rows",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables(tmp_path: Path, case: str):
    head, rows, words = BAD[case]
    path = tmp_path / "t.csv"
    path.write_text("\n".join([head, *(",".join(row) for row in rows)]) + "\n")
    fails(lambda: datasets.load(str(path)), "t.csv", *words)


def test_bad_files(tmp_path: Path):
    path = tmp_path / "t.csv"
    for content in (b"", b"path,label\n\xff\xfe,x\n", b"path,label\na,b,c,d\n", b'path,label\n"a,b\n'):
        path.write_bytes(content)
        fails(lambda: datasets.load(str(path)), "t.csv", "cannot read")
    path.write_text("path,label,split\n,x,train\ny.png,x,test\n")
    fails(lambda: datasets.load(str(path)), "row 1", "no path")
    path.write_text("path,label,split\nx.png,x,train\ny.png,x,test\n")
    fails(lambda: datasets.load(str(path)), "x.png", "No such file")
    fails(lambda: datasets.load(write(path, "path,label,split", [r[:3] for r in ROWS]), test_share=0.2), "has no effect")


@pytest.mark.parametrize("suffix", foreign_files.KINDS)
def test_files_that_are_no_data_set_say_what_they_are(tmp_path: Path, suffix: str, monkeypatch):
    monkeypatch.chdir(tmp_path)
    what, _ = foreign_files.KINDS[suffix]
    for name in (f"x{suffix}", f"x{suffix.upper()}"):
        Path(name).write_bytes(b"content")
        for given in (name, f"./{name}", str(tmp_path / name)):
            text = fails(lambda given=given: datasets.load(given), f"{name} is {what}: ")
            assert "{" not in text and len(text) < 400


def test_foreign_files_by_double_suffix_and_by_content(tmp_path: Path):
    cases = {
        "x.tar.gz": (b"", "a tar archive", "tar -xf x.tar.gz"),
        "x.csv.zst": (b"", "compressed with Zstandard", "zstd -d x.csv.zst"),
        "data": (b"PK\x03\x04", "a zip archive", "unzip data"),
        "blob.bin": (b"\x28\xb5\x2f\xfd", "Zstandard", "zstd -d blob.bin"),
        "photo.JPG": (b"", "one image", "folder"),
        "what.ever": (b"abc", "no data set that is read", ".parquet"),
    }
    for name, (content, *words) in cases.items():
        (tmp_path / name).write_bytes(content)
        fails(lambda name=name: datasets.load(str(tmp_path / name)), name, *words)


def test_archives_are_answered_by_the_command(clbench):
    (clbench.folder / "x.zip").write_bytes(b"PK\x03\x04")
    words = ("scenario=cil_folder", "scenario.dataset=./x.zip", "scenario.increment=2")
    for command in (("run",), ("plan",), ("manifest", "show")):
        err = clbench(*command, *words, code=2).stderr
        assert err.startswith("clbench: x.zip is a zip archive: unpack it (unzip x.zip)") and err.count("\n") == 1


def test_a_run_on_a_table(clbench):
    rows = [(f"{c}{s}{i}.png", c, s) for c in "ab" for s in ("train", "test") for i in range(2)]
    write(clbench.folder / "my table.csv", "path,label,split", rows)
    clbench("run", "scenario=cil_folder", "scenario.dataset=./my table.csv", "scenario.increment=1", "learner=ncm")
    (record,) = clbench.records()
    assert record["status"] == "ok" and record["scenario"]["class_names"] == ["a", "b"]


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def saved(folder: Path, rows, names: list[str] | None, parts: int = 1, split: str = "train") -> Path:
    """One split as `datasets` writes it: rows of (encoded image or None, path, label)."""
    import pyarrow as pa

    folder.mkdir(parents=True)
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    files = []
    for part in range(parts):
        own = rows[part::parts]
        table = pa.table(
            {
                "image": pa.array([{"bytes": b, "path": p} for b, p, _ in own], image),
                "label": pa.array([r[2] for r in own], pa.int64()),
            }
        )
        files.append({"filename": f"data-{part:05d}-of-{parts:05d}.arrow"})
        with pa.OSFile(str(folder / files[-1]["filename"]), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    label = {"dtype": "int64", "_type": "Value"} if names is None else {"names": names, "_type": "ClassLabel"}
    info = {"features": {"image": {"_type": "Image"}, "label": label}, "citation": ""}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_fingerprint": "f", "_split": split}))
    return folder


def rows_of(labels, first: int = 0):
    return [(png(first + i), f"{i}.png", label) for i, label in enumerate(labels)]


@arrow
@pytest.mark.parametrize("parts", [1, 2])
def test_a_saved_folder_with_splits(tmp_path: Path, parts: int):
    root = tmp_path / "saved"
    saved(root / "train", rows_of([0, 2, 2, 0, 2]), ["ant", "bee", "cow"], parts)
    saved(root / "test", rows_of([2, 0], 100), ["ant", "bee", "cow"], 1, "test")
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    data = datasets.load(str(root))
    assert data.class_names == ("ant", "cow"), "a class without a sample is left out"
    assert data.split.tolist() == [0] * 5 + [1] * 2 and data.y[-2:].tolist() == [1, 0]
    order = [0, 1, 2, 3, 4] if parts == 1 else [0, 2, 4, 1, 3]
    assert [image[0, 0, 0] for image in data.images.raw(np.arange(7))] == [*order, 100, 101]
    assert datasets.load("saved", str(tmp_path)).sha256 == data.sha256
    other = saved(tmp_path / "other", rows_of([0, 1, 0, 1]), None)
    fails(lambda: datasets.load(str(other)), "no column split", "scenario.test_share")
    assert datasets.load(str(other), test_share=0.5).class_names == ("0", "1")


@arrow
def test_damaged_and_odd_saved_folders(tmp_path: Path):
    root = saved(tmp_path / "a", [(png(0), "0.png", 0), (png(1)[:50], "b.png", 0), (png(2), None, 1), (png(3), None, 1)], None)
    stream = generators.class_incremental("a", str(root), increment=1, test_share=0.5)
    found = damage.check(stream, print)
    assert found.number == 4 and len(found.damaged) == 1 and "row 2 (b.png)" in found.damaged[0]
    fails(lambda: damage.look(stream), "row 2 (b.png)")
    fails(lambda: datasets.load(str(saved(tmp_path / "b", [(None, "x.png", 0)] * 2, None)), test_share=0.5), "not embedded")
    fails(lambda: datasets.load(str(saved(tmp_path / "c", rows_of([0, 5]), ["x"])), test_share=0.5), "row 2 is 5", "no name")
    state = json.loads((root / "state.json").read_text())
    for change, word in (
        ({"_indices_files": [{"filename": "i"}]}, "flatten_indices"),
        ({"_data_files": []}, "names no data files"),
    ):
        (root / "state.json").write_text(json.dumps(state | change))
        fails(lambda: datasets.load(str(root), test_share=0.5), word)
    (root / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../x"}]}))
    fails(lambda: datasets.load(str(root), test_share=0.5), "names no data files")
    (root / "state.json").write_text(json.dumps(state))
    (root / "data-00000-of-00001.arrow").write_bytes(b"no arrow")
    fails(lambda: datasets.load(str(root), test_share=0.5), "cannot read the data files")


@arrow
def test_parquet_of_paths_and_of_images(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    expected = datasets.load(write(tmp_path / "t.csv", "path,label,split", [row[:3] for row in ROWS]))
    columns = list(zip(*[row[:3] for row in ROWS], strict=True))
    pq.write_table(pa.table(dict(zip(("path", "label", "split"), columns, strict=True))), tmp_path / "t.parquet")
    found = datasets.load(str(tmp_path / "t.parquet"))
    assert found.sha256 == expected.sha256 and found.class_names == expected.class_names
    content = [(tmp_path / row[0]).read_bytes() for row in ROWS]
    pq.write_table(pa.table({"image": content, "label": columns[1], "split": columns[2]}), tmp_path / "u.parquet")
    inside = datasets.load(str(tmp_path / "u.parquet"))
    assert all(
        np.array_equal(a, b) for a, b in zip(inside.images.raw(np.arange(8)), expected.images.raw(np.arange(8)), strict=True)
    )
    (tmp_path / "u.parquet").write_bytes(b"PAR1 no")
    fails(lambda: datasets.load(str(tmp_path / "u.parquet")), "u.parquet", "no Parquet file")


@arrow
def test_a_run_on_a_saved_folder(clbench):
    saved(clbench.folder / "s", rows_of([0, 1] * 6), ["x", "y"])
    words = (
        "scenario=cil_folder",
        "scenario.dataset=./s",
        "scenario.increment=1",
        "scenario.test_share=0.25",
        "learner=finetune",
    )
    clbench("run", *words, "scenario.budget.epochs=1")
    clbench("manifest", "check", *words)
    (record,) = clbench.records()
    assert record["status"] == "ok" and record["config"]["scenario"]["test_share"] == 0.25


def test_without_pyarrow_it_says_what_to_install(tmp_path: Path, monkeypatch):
    from clbench.streams.images import arrow as module

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(module.importlib, "import_module", missing)
    (tmp_path / "t.parquet").write_bytes(b"")
    fails(lambda: datasets.load(str(tmp_path / "t.parquet")), "pip install 'clbench[tables]'")
    (tmp_path / "s").mkdir()
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / "s" / name).write_text("{}")
    fails(lambda: datasets.load(str(tmp_path / "s")), "pip install 'clbench[tables]'")
