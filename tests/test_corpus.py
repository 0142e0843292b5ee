"""Corpora on disk: documents out of files, splits, checksums, bounded memory, kills, and every kind of damage."""

import gzip
import json
import lzma
import math
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.cli.main import answer
from clbench.interfaces import UserError
from clbench.streams.tokens import corpus_build, documents
from clbench.streams.tokens.corpus import MANIFEST, Shards
from clbench.streams.tokens.corpus_build import CorpusRecipe, build
from clbench.streams.tokens.tokenizers import Bytes, TokenizerFile

TEXT = "<|doc|>one\nFirst line.\n\nLast line.\n<|doc|>two\nzwei drüben\n<|doc|>empty\n<|doc|>three\nx\n"
HALF = CorpusRecipe(validation=0.5)


def write(path: Path, text: str = TEXT) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def texts(shards: Shards, split: str) -> dict[str, bytes]:
    tokens = shards.split(split)
    return {
        n: bytes(tokens[a : b - 1].astype(np.uint8))
        for n, (a, b) in zip(shards.names(split), shards.documents(split), strict=True)
    }


def test_documents_and_splits_by_hand(tmp_path):
    shards, there = build([write(tmp_path / "a.txt")], tmp_path / "out", Bytes(), CorpusRecipe(validation=0.3))
    assert not there and shards.vocab == 256 and shards.end == 0
    held, rest = texts(shards, "validation"), texts(shards, "train")
    assert len(held) == 1 and len(rest) == 2
    assert held | rest == {"one": b"First line.\n\nLast line.", "two": "zwei drüben".encode(), "three": b"x"}
    assert list(held) == [min(("one", "two", "three"), key=CorpusRecipe().place)]
    assert shards.split("train").dtype == np.uint8 and isinstance(shards.split("train"), np.memmap)
    assert shards.bytes_per_token("train") == 1
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    again, there = build([tmp_path / "a.txt"], tmp_path / "out", Bytes(), CorpusRecipe(validation=0.3))
    assert there and again.sha256 == shards.sha256


def test_the_identity_is_that_of_the_content(tmp_path):
    first, _ = build([write(tmp_path / "a.txt")], tmp_path / "1", Bytes(), HALF)
    second, _ = build([write(tmp_path / "b.txt")], tmp_path / "2", Bytes(), HALF)
    assert first.sha256 == second.sha256
    other, _ = build([write(tmp_path / "c.txt", TEXT + "y")], tmp_path / "3", Bytes(), HALF)
    assert other.sha256 != first.sha256


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_random_documents_come_back(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("corpus")
    alphabet = st.text(st.sampled_from("ab\nü𝄞 \r<|"), max_size=30)
    made = data.draw(st.lists(alphabet.filter(lambda t: "<|doc|>" not in t and t.strip("\n")), min_size=2, max_size=6))
    file = folder / "a.txt"
    file.write_bytes("".join(f"<|doc|>d{i}\n{text}\n" for i, text in enumerate(made)).encode())
    piece = data.draw(st.sampled_from([1, 3, 1000]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", data.draw(st.sampled_from([12, 1000])))  # names are up to 9 bytes
        patch.setattr(corpus_build, "PIECE", piece)
        patch.setattr(corpus_build, "BATCH", data.draw(st.sampled_from([1, 1000])))
        shards, _ = build([file], folder / "out", Bytes(), HALF)
    found = texts(shards, "train") | texts(shards, "validation")
    assert found == {f"d{i}": text.encode() for i, text in enumerate(made)}
    Shards.open(folder / "out", verify=True)


def test_share_and_seed_of_the_split(tmp_path):
    file = write(tmp_path / "a.txt", "".join(f"<|doc|>{i}\ntext {i}\n" for i in range(200)))
    held = []
    for seed in (0, 1):
        shards, _ = build([file], tmp_path / f"{seed}", Bytes(), CorpusRecipe(validation=0.1, seed=seed))
        held.append(set(shards.names("validation")))
        assert len(held[-1]) == 20 and held[-1].isdisjoint(shards.names("train"))
    assert len(held[0] & held[1]) < 10
    backwards = write(tmp_path / "b.txt", "".join(f"<|doc|>{i}\nother {i}\n" for i in reversed(range(200))))
    shards, _ = build([backwards], tmp_path / "b", Bytes(), CorpusRecipe(validation=0.1))
    assert set(shards.names("validation")) == held[0]  # the name decides, not place or content


def test_files_without_marks_are_documents(tmp_path):
    files = [write(tmp_path / f"{name}.txt", f"\n\ntext of {name}\n") for name in "ab"]
    shards, _ = build(files, tmp_path / "out", Bytes(), HALF)
    assert texts(shards, "train") | texts(shards, "validation") == {"a": b"\n\ntext of a".lstrip(b"\n"), "b": b"text of b"}


def test_compressed_files_and_jsonl(tmp_path):
    lines = [json.dumps({"id": f"d{i}", "body": f"text\n{i}"}) for i in range(4)]
    for name, opener in (("a.jsonl.gz", gzip.open), ("b.jsonl.xz", lzma.open)):
        with opener(tmp_path / name, "wt") as file:
            file.write("\n".join([lines[0], "", *lines[1:]]))
    one, _ = build([tmp_path / "a.jsonl.gz"], tmp_path / "1", Bytes(), CorpusRecipe(0.5, field="body", name_field="id"))
    two, _ = build([tmp_path / "b.jsonl.xz"], tmp_path / "2", Bytes(), CorpusRecipe(0.5, field="body", name_field="id"))
    assert texts(one, "train") | texts(one, "validation") == {f"d{i}": f"text\n{i}".encode() for i in range(4)}
    assert one.sha256 == two.sha256
    plain, _ = build([tmp_path / "a.jsonl.gz"], tmp_path / "3", Bytes(), CorpusRecipe(0.5, field="body"))
    assert sorted(plain.names("train") + plain.names("validation")) == [f"a.jsonl.gz:{n}" for n in (1, 3, 4, 5)]


@pytest.fixture
def tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra: text)")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT] * 3, trainer)
    made.enable_truncation(4)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_tokenizer_file(tmp_path, tokenizer):
    text = TEXT.replace("Last", "<|endoftext|> Last")
    encoder = TokenizerFile(tokenizer)
    assert encoder.end == 0 and encoder.vocab > 258
    shards, _ = build([write(tmp_path / "a.txt", text)], tmp_path / "out", encoder, HALF)
    assert shards.split("train").dtype == np.uint16 and shards.manifest["tokenizer"]["end"] == "<|endoftext|>"
    from tokenizers import Tokenizer

    made, found = Tokenizer.from_file(str(tokenizer)), {}
    for split in ("train", "validation"):
        for name, (a, b) in zip(shards.names(split), shards.documents(split), strict=True):
            ids = shards.split(split)[a:b].tolist()
            assert ids[-1] == 0 and 0 not in ids[:-1]  # the mark that is spelled out is text
            found[name] = made.decode(ids[:-1], skip_special_tokens=False)
    assert found == {"one": "First line.\n\n<|endoftext|> Last line.", "two": "zwei drüben", "three": "x"}
    sizes = sum(shards.manifest["splits"][s]["bytes"] for s in ("train", "validation"))
    assert sizes == len("".join(found.values()).encode()) + 3
    assert max(shards.bytes_per_token(s) for s in ("train", "validation")) > 1
    Shards.open(tmp_path / "out", verify=True)
    other, there = TokenizerFile(tokenizer, "<pad>"), False
    with pytest.raises(UserError, match="made from other files or in another way"):
        build([tmp_path / "a.txt"], tmp_path / "out", other, HALF)
    assert not there and other.end == 1


def test_tokenizer_files_that_are_none(tmp_path, tokenizer):
    with pytest.raises(UserError, match="has no token '<end>': --end names"):
        TokenizerFile(tokenizer, "<end>")
    with pytest.raises(UserError, match=r"cannot read .*nothing.json: No such file"):
        TokenizerFile(tmp_path / "nothing.json")
    for content in ("{}", "hello", '{"version": "1.0"}'):
        with pytest.raises(UserError, match=r"bad.json is no tokenizer file: "):
            TokenizerFile(write(tmp_path / "bad.json", content))
    body = json.loads(tokenizer.read_text())
    body["added_tokens"] = []
    body["model"]["vocab"] = {"a": 0, "b": 1}
    body["model"]["merges"] = []
    with pytest.raises(UserError, match=re.escape("has none of <|endoftext|>")):
        TokenizerFile(write(tmp_path / "small.json", json.dumps(body)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"<|doc|>a\nx\xff\n<|doc|>b\ny", "a.txt is not UTF-8 text"),
        ("a.txt", b"<|doc|>a\nx\n<|doc|>b\ny\xc3", "a.txt is not UTF-8 text"),
        ("a.txt", b"<|doc|>a\nx\0\n<|doc|>b\ny", "holds a zero byte"),
        ("a.txt", b"", "0 documents: at least two are needed"),
        ("a.txt", b"<|doc|>a\n<|doc|>b\nx", "1 documents: at least two"),
        ("a.txt", b"<|doc|>a\nx\n<|doc|>a\ny", "every document is in the validation split"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}', "a.jsonl, line 2 has no text under 'text' .*it has text"),
        ("a.jsonl", b"[1]", "line 1 has no text under"),
        ("a.jsonl", b'{"text": "x"\n', "a.jsonl, line 1 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: the text holds half a surrogate pair"),
        ("a.jsonl", b'{"text": "\xff"}\n', "is not UTF-8"),
        ("a.txt.gz", b"hello", "cannot (read|be unpacked)|cannot read"),
        ("a.txt.xz", b"hello", "a.txt.xz cannot be unpacked"),
        ("a.txt.gz", gzip.compress(TEXT.encode(), mtime=0)[:-12], "a.txt.gz cannot be unpacked"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        build([tmp_path / name], tmp_path / "out", Bytes(), HALF)
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


def test_places_that_are_none(tmp_path):
    file = write(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"cannot read .*nothing.txt: No such file"):
        build([tmp_path / "nothing.txt"], tmp_path / "out", Bytes())
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        build([tmp_path], tmp_path / "out", Bytes())
    with pytest.raises(UserError, match=r"cannot write .*a.txt/out: "):
        build([file], file / "out", Bytes(), HALF)
    (tmp_path / "full").mkdir()
    with pytest.raises(UserError, match="made from other files"):
        build([file], tmp_path / "full", Bytes(), HALF)
    for share in (0, 1, math.nan):
        with pytest.raises(UserError, match="--validation must lie between 0 and 1"):
            CorpusRecipe(validation=share)


def damage(out: Path, what: str) -> None:
    tokens, path = out / "train.tokens", out / MANIFEST
    body = json.loads(path.read_text())
    if what == "bit":
        content = bytearray(tokens.read_bytes())
        content[0] ^= 1
        tokens.write_bytes(content)
    elif what == "cut":
        tokens.write_bytes(tokens.read_bytes()[:-1])
    elif what == "lacking":
        (out / "validation.documents").unlink()
    elif what == "names":
        (out / "train.names").write_text("other\n")
    elif what == "no manifest":
        path.unlink()
    elif what == "no json":
        path.write_text("{")
    elif what == "foreign":
        path.write_text('{"kind": "another"}')
    elif what == "schema":
        path.write_text(json.dumps(body | {"schema": 2}))
    elif what == "changed":
        path.write_text(json.dumps(body | {"vocab": 300}))
    elif what == "types":
        body["splits"]["train"]["tokens"] = "7"
        path.write_text(json.dumps(body))
    elif what == "half":
        del body["splits"]["train"]["sha256"]["names"]
        path.write_text(json.dumps(body))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("bit", "train.tokens is damaged or was changed: its SHA-256"),
        ("cut", r"train.tokens has \d+ bytes, .* says \d+: it is cut or foreign"),
        ("lacking", "lacks validation.documents: No such file"),
        ("names", "train.names is damaged or was changed"),
        ("no manifest", "is no folder of shards: it has no manifest.json"),
        ("no json", "manifest.json is not JSON"),
        ("foreign", "is no manifest of shards"),
        ("schema", "has schema 2, this clbench reads 1"),
        ("changed", "manifest.json was changed"),
        ("types", "manifest.json is damaged: something is missing or of another type"),
        ("half", "manifest.json is damaged"),
    ],
)
def test_damage(tmp_path, what, message):
    out = tmp_path / "out"
    build([write(tmp_path / "a.txt")], out, Bytes(), HALF)
    damage(out, what)
    with pytest.raises(UserError, match=message) as error:
        Shards.open(out)
    assert "\n" not in str(error.value)


def test_large_files_are_hashed_only_when_asked(tmp_path, monkeypatch):
    out = tmp_path / "out"
    build([write(tmp_path / "a.txt")], out, Bytes(), HALF)
    damage(out, "bit")
    monkeypatch.setattr("clbench.streams.tokens.corpus.HASHED_WHEN_OPENED", 10)
    Shards.open(out)
    with pytest.raises(UserError, match="damaged"):
        Shards.open(out, verify=True)
    with pytest.raises(UserError, match=r"no folder of shards .*nowhere: clbench manifest corpus build"):
        Shards.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not 'test'"):
        Shards.open(out, verify=False).split("test")


def test_memory_is_bounded(tmp_path):
    """40 MB, most of it one document: the peak must not grow with the file."""
    file = tmp_path / "large.txt"
    line = b"word " * 199 + b"end.\n"
    with file.open("wb") as out:
        for i in range(40):
            out.write(b"<|doc|>%d\n" % i + line * (30_000 if i == 7 else 250))
    assert file.stat().st_size > 39e6
    build([write(tmp_path / "warm.txt")], tmp_path / "warm", Bytes(), HALF)
    tracemalloc.start()
    shards, _ = build([file], tmp_path / "out", Bytes(), CorpusRecipe(validation=0.1))
    total = sum(len(shards.split(split)) for split in ("train", "validation"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == file.stat().st_size - sum(len(f"<|doc|>{i}\n") for i in range(40))  # an end mark for each last line end
    assert peak < 16e6


def test_a_killed_build_leaves_nothing_in_the_way(tmp_path):
    file = write(tmp_path / "a.txt", "".join(f"<|doc|>{i}\n{'text ' * 20_000}\n" for i in range(300)))
    words = ["manifest", "corpus", "build", str(file), "--out", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-m", "clbench", *words], stdout=subprocess.DEVNULL)
    part = tmp_path / ".out.part"
    deadline = time.monotonic() + 30
    while not (part / "train.tokens").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "out").exists()
    assert part.exists()
    assert answer(words) == 0
    assert not part.exists() and Shards.open(tmp_path / "out", verify=True).manifest["splits"]["train"]["documents"] == 285


def test_two_builds_at_once(tmp_path):
    from filelock import FileLock

    with FileLock(tmp_path / ".out.part.lock"), pytest.raises(UserError, match="another process builds"):
        build([write(tmp_path / "a.txt")], tmp_path / "out", Bytes(), HALF)


def test_the_command_line(tmp_path, capsys):
    file, out = str(write(tmp_path / "a.txt")), str(tmp_path / "out")
    assert answer(["manifest", "corpus", "build", file, "--out", out, "--validation", "0.3", "--seed", "4"]) == 0
    text = capsys.readouterr().out
    assert "bytes, 256 token ids" in text and "2 documents" in text and "1.000 bytes a token" in text
    assert answer(["manifest", "corpus", "build", file, "--out", out, "--validation", "0.3", "--seed", "4"]) == 0
    assert "was there already" in capsys.readouterr().out
    assert answer(["manifest", "corpus", "check", out]) == 0
    assert capsys.readouterr().out == f"{out}: ok, sha256 {Shards.open(out).sha256}\n"
    assert answer(["manifest", "corpus", "show", out]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: bytes")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "a.txt"], "say where to: clbench manifest corpus build FILE ... --out FOLDER"),
        (["build", "a.txt", "--out", "o", "--end", "x"], "--end has no effect without --tokenizer"),
        (["build", "a.txt", "--out", "o", "--field", "x"], "--field has no effect: none of the files is named .jsonl"),
        (["build", "a.txt", "--out", "o", "--name-field", "x"], "--name-field has no effect"),
        (["build", "a.txt", "--out", "o", "--validation", "2"], "--validation must lie between 0 and 1, got 2.0"),
        (["build", "nothing.txt", "--out", "o"], "cannot read nothing.txt: No such file"),
        (["check", "nothing"], "no folder of shards nothing"),
        (["check", "nothing", "--seed", "1"], "--seed has no effect with manifest corpus check"),
        (["build"], "the following arguments are required: FILE | FOLDER"),
        (["buidl", "a.txt"], "argument action: invalid choice: 'buidl'"),
        (["build", "a.txt", "--ot", "o"], "no option --ot; did you mean '--out'?"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt")
    assert answer(["manifest", "corpus", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"clbench: {message}") and err.count("\n") == 1
