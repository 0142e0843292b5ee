"""What is given as text and is none, or another form of it: JSON lines by any name, packed files, tables, archives."""

import bz2
import gzip
import io
import json
import lzma
import sqlite3
import tarfile
import zipfile

import numpy as np
import pandas as pd
import pytest
import zstandard

from clbench.cli.main import answer
from clbench.interfaces import UserError
from clbench.streams.tokens import corpus_build, documents
from clbench.streams.tokens.corpus import Shards
from clbench.streams.tokens.texts import open_text
from clbench.streams.tokens.tokenizers import Bytes

TEXTS = [f"document {i} " + "ab cd " * i for i in range(5)]
LINES = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS))


def texts_of(folder):
    shards = Shards.open(folder)
    return sorted(
        bytes(part).decode()
        for split in ("train", "validation")
        for part in bytes(np.asarray(shards.split(split)[:], np.uint8)).split(b"\0")
        if part
    )


def build(tmp_path, *files, out="c"):
    corpus_build.build([tmp_path / name for name in files], tmp_path / out, Bytes(), corpus_build.CorpusRecipe(0.3))
    return texts_of(tmp_path / out)


def refusal(tmp_path, *files):
    with pytest.raises(UserError) as error:
        build(tmp_path, *files)
    assert "\n" not in str(error.value) and not (tmp_path / "c").exists()
    return str(error.value).removeprefix(f"{tmp_path}/")


@pytest.mark.parametrize("name", ["part1.json", "part1.jsonl", "part1.ndjson", "part.1.json"])
def test_json_lines_by_any_name(tmp_path, name):
    (tmp_path / name).write_text(LINES)
    assert build(tmp_path, name) == sorted(TEXTS)


PACK = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("suffix", PACK)
def test_packed_texts_are_read(tmp_path, suffix):
    (tmp_path / f"a.json{suffix}").write_bytes(PACK[suffix](LINES.encode()))
    (tmp_path / f"b.txt{suffix}").write_bytes(PACK[suffix](b"<|doc|>one\nfirst\n<|doc|>two\nsecond\n"))
    assert build(tmp_path, f"a.json{suffix}", f"b.txt{suffix}") == sorted([*TEXTS, "first", "second"])
    whole = PACK[suffix](b"text " * 9999)
    (tmp_path / f"cut.txt{suffix}").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / f"odd.txt{suffix}").write_bytes(b"plain text, not packed at all")
    for name in ("cut", "odd"):
        with pytest.raises(UserError, match=f"^{tmp_path}/{name}.txt{suffix} cannot be unpacked: .") as error:
            list(documents.read(tmp_path / f"{name}.txt{suffix}"))
        assert "\n" not in str(error.value)


def test_several_frames_of_zstd_are_one_file(tmp_path):
    first, second = LINES.splitlines(keepends=True)[:2], LINES.splitlines(keepends=True)[2:]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zstandard.compress("".join(part).encode()) for part in (first, second)))
    assert build(tmp_path, "a.jsonl.zst") == sorted(TEXTS)


def test_zst_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    import sys

    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(LINES.encode()))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    wanted = "a.jsonl.zst is compressed by zstd: pip install 'clbench[zst]' reads it, zstd -d unpacks it"
    assert refusal(tmp_path, "a.jsonl.zst") == wanted


@pytest.mark.parametrize(
    "content", ['[{"text": "a"}, {"text": "b"}]', '{\n "text": "a"\n}', '[\n{"text": "a"},\n{"text": "b"}]', "3"]
)
def test_one_json_document_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    wanted = "a.json is one JSON document, not JSON lines: write an object on each line (jq -c '.[]' a.json > a.jsonl)"
    assert refusal(tmp_path, "a.json") == wanted


def test_a_later_line_that_is_no_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text(LINES + "{nothing\n")
    assert refusal(tmp_path, "a.json").startswith("a.json, line 6 is not JSON: ")
    (tmp_path / "a.json").write_text(LINES + "[1]\n")
    assert refusal(tmp_path, "a.json").startswith("a.json, line 6 has no text under 'text'")


def others(folder):
    frame = pd.DataFrame({"text": TEXTS})
    frame.to_csv(folder / "a.csv"), frame.to_csv(folder / "a.tsv", sep="\t")
    (folder / "b.csv.gz").write_bytes(gzip.compress(b"text\na\n"))
    (folder / "a.parquet").write_bytes(b"PAR1" + bytes(20) + b"PAR1")
    (folder / "a.feather").write_bytes(b"ARROW1" + bytes(20))
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    for name in ("a.docx", "a.xlsx", "c.csv.zip"):
        (folder / name).write_bytes((folder / "a.zip").read_bytes())
    held = io.BytesIO(b"text")
    for name, mode in (("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.txt.xz", "w:xz")):
        with tarfile.open(folder / name, mode) as archive:
            info = tarfile.TarInfo("a.txt")
            info.size = 4
            held.seek(0)
            archive.addfile(info, held)
    (folder / "a.tar.zst").write_bytes(zstandard.compress((folder / "a.tar").read_bytes()))
    np.save(folder / "a.npy", np.zeros(3)), np.savez(folder / "a.npz", x=np.zeros(3))
    sqlite3.connect(folder / "a.db").execute("create table t (x)").connection.close()
    (folder / "a.pdf").write_bytes(b"%PDF-1.7\n")
    (folder / "packed.txt").write_bytes(gzip.compress(b"text"))
    (folder / "packed.jsonl").write_bytes(zstandard.compress(b"text"))
    (folder / "a.7z").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(20))
    (folder / "a.txt").write_bytes(b"PK\x03\x04" + bytes(20))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (
            "a.csv",
            "a table (CSV): write its texts as JSON lines: python -c \"import pandas; pandas.read_csv('a.csv').to_json('a.js",
        ),
        (
            "a.tsv",
            "a table (TSV): write its texts as JSON lines: python -c \"import pandas; pandas.read_csv('a.tsv', sep='\\t')",
        ),
        ("b.csv.gz", "a table (CSV): "),
        (
            "a.parquet",
            "a table (Parquet): write its texts as JSON lines: python -c \"import pandas; pandas.read_parquet('a.parq",
        ),
        ("a.feather", "a table (Feather): "),
        ("a.zip", "a zip archive: unpack it (unzip a.zip) and give the files in it"),
        ("c.csv.zip", "a zip archive: unpack it (unzip c.csv.zip)"),
        ("a.docx", "a word processor's file: save it as plain text"),
        ("a.xlsx", "a spreadsheet: "),
        ("a.tar", "a tar archive: unpack it (tar -xf a.tar) and give the files in it"),
        ("a.tar.gz", "a tar archive: unpack it (tar -xf a.tar.gz)"),
        ("a.tar.zst", "a tar archive: unpack it (tar -xf a.tar.zst)"),
        ("a.txt.xz", "a tar archive: "),
        ("a.npy", "a NumPy array: "),
        ("a.npz", "a file of NumPy arrays: "),
        ("a.db", "an SQLite database: "),
        ("a.pdf", "a PDF: turn it into text (pdftotext a.pdf a.txt)"),
        ("packed.txt", "compressed by gzip: name it packed.txt.gz"),
        ("packed.jsonl", "compressed by zstd: name it packed.jsonl.zst"),
        ("a.7z", "a 7z archive: "),
        ("a.txt", "a zip archive: "),
    ],
)
def test_what_is_no_text_is_named_with_what_to_do(tmp_path, name, what):
    others(tmp_path)
    (tmp_path / "good.jsonl").write_text(LINES)
    assert refusal(tmp_path, "good.jsonl", name).startswith(f"{name} is {what}")


def test_the_command_for_a_table_works(tmp_path, monkeypatch):
    import subprocess
    import sys

    others(tmp_path)
    command = refusal(tmp_path, "a.tsv").partition('python -c "')[2].removesuffix('"')
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True)
    assert build(tmp_path, "a.jsonl") == sorted(TEXTS)


def test_a_zero_byte_is_found_in_its_file(tmp_path, capsys):
    (tmp_path / "good.txt").write_text("<|doc|>a\nx\n<|doc|>b\ny")
    (tmp_path / "zero.txt").write_bytes(b"<|doc|>first\nfine\n<|doc|>second\nnot\0fine")
    (tmp_path / "zero.jsonl").write_text('{"text": "fine"}\n{"text": "not \\u0000"}\n')
    assert refusal(tmp_path, "good.txt", "zero.txt").startswith("zero.txt, document second: a text holds a zero byte")
    assert refusal(tmp_path, "good.txt", "zero.jsonl").startswith("zero.jsonl, document zero.jsonl:2: a text holds a zero byte")
    code = answer(
        ["manifest", "corpus", "build", str(tmp_path / "zero.txt"), str(tmp_path / "good.txt"), "--out", str(tmp_path / "c")]
    )
    assert code == 2 and capsys.readouterr().err.startswith(f"clbench: {tmp_path}/zero.txt, document second: ")
    with pytest.raises(UserError, match=r"zero\.txt holds a zero byte at 35, which is the mark between documents"):
        open_text("zero", str(tmp_path), 0.3)


def test_field_has_an_effect_on_json(tmp_path, capsys):
    (tmp_path / "a.json").write_text(LINES.replace('"text"', '"body"'))
    out = ["--out", str(tmp_path / "c")]
    assert answer(["manifest", "corpus", "build", str(tmp_path / "a.json"), "--field", "body", *out]) == 0
    assert texts_of(tmp_path / "c") == sorted(TEXTS)
    (tmp_path / "a.txt").write_text("x")
    assert answer(["manifest", "corpus", "build", str(tmp_path / "a.txt"), "--field", "body", *out]) == 2
    assert "none of the files is named .jsonl, .ndjson or .json" in capsys.readouterr().err
