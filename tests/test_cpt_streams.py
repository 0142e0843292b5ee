"""Streams of texts: order without tables, experiences that do not overlap, splits by document, manifests."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.interfaces import Budget, UserError
from clbench.streams.manifest import Manifest
from clbench.streams.tokens import sequences
from clbench.streams.tokens.scenario import Domain, Probing, content_sha256, eval_windows, scenario
from clbench.streams.tokens.texts import split_documents, synthetic, text

TINY = {"tokens": 320, "context": 8, "batch": 4, "eval_tokens": 160, "symbols": 8, "states": 8}


def domain(name="d", train=900, validation=200, start=0):
    tokens = (np.arange(start, start + train) % 251).astype(np.uint8)
    held = (np.arange(validation) % 251).astype(np.uint8)
    return Domain(name, tokens, held, content_sha256(tokens, held))


def stream(order=(0, 1), domains=2, **changes):
    options = {"vocab": 256, "tokens": 320, "context": 8, "batch": 4, "eval_tokens": 80} | changes
    return scenario("s", [domain(f"d{i}", start=7 * i) for i in range(domains)], order, **options)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**64 - 1), st.integers(1, 3000))
def test_a_keyed_permutation_is_one(key, n):
    assert sorted(sequences.permuted(key, n, np.arange(n)).tolist()) == list(range(n))


def test_permutations_mix_and_keys_differ():
    n = 10_000
    one, other = (sequences.permuted(key, n, np.arange(n)) for key in (1, 2))
    assert (one == other).mean() < 0.01 and (one == np.arange(n)).mean() < 0.01
    assert abs(np.corrcoef(one, np.arange(n))[0, 1]) < 0.05 and abs((one[: n // 2] < n // 2).mean() - 0.5) < 0.05
    far = sequences.permuted(3, 10**11, np.array([0, 10**11 - 1]))
    assert far.max() < 10**11 and far[0] != far[1]


def test_passes_visit_everything_once_each_in_other_orders():
    found = sequences.passes(5, 10, np.arange(30))
    parts = [found[:10].tolist(), found[10:20].tolist(), found[20:].tolist()]
    assert all(sorted(part) == list(range(10)) for part in parts) and len({tuple(part) for part in parts}) == 3
    assert sequences.passes(5, 10, np.arange(10), first_in_order=True).tolist() == list(range(10))
    assert sequences.passes(5, 10, np.array([25])).tolist() == [found[25]]


def test_windows_share_a_token_with_the_next():
    tokens = np.arange(10, dtype=np.uint16)
    assert sequences.count(10, 3) == 3 and sequences.count(9, 3) == 2 and sequences.count(1, 3) == 0
    assert sequences.windows(tokens, np.array([0, 2]), 3).tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]


def test_experiences_of_one_text_read_different_parts_of_it():
    made = stream(order=(0, 1, 0), domains=2)
    first, third = made.data(0), made.data(2)
    ids = [set(data.ids(np.arange(len(data))).tolist()) for data in (first, third)]
    assert len(ids[0]) == len(first) == 40 and not ids[0] & ids[1]
    assert [e["name"] for e in made.manifest.experiences] == ["d0_1", "d1", "d0_2"]
    assert [(e["name"], e["first_seen"]) for e in made.manifest.evals] == [("d0", 0), ("d1", 1)]
    again = first.ids(np.arange(40, 80))
    assert set(again.tolist()) == ids[0] and again.tolist() != first.ids(np.arange(40)).tolist()
    assert first.read(np.array([3])).shape == (1, 9)
    assert not made.iid and stream(order=(0, 0)).iid


def test_experiences_of_different_lengths():
    made = stream(tokens=[320, 640])
    assert [e["steps"] for e in made.manifest.experiences] == [10, 20]
    with pytest.raises(UserError, match="2 experiences"):
        stream(tokens=[320, 640, 320])


def test_a_short_text_is_read_several_times_and_a_shorter_one_refused():
    assert len(stream(tokens=8000).data(0)) == sequences.count(900, 8) and stream(tokens=8000).data(0).steps == 250
    with pytest.raises(UserError, match="too short: 0 sequences for a batch of 4"):
        scenario("s", [domain(train=8)], [0], vocab=256, tokens=320, context=8, batch=4, eval_tokens=8)
    with pytest.raises(UserError, match="validation text of d is shorter"):
        scenario("s", [domain(validation=8)], [0], vocab=256, tokens=320, context=8, batch=4, eval_tokens=8)


@pytest.mark.parametrize("changes", [{"tokens": 31}, {"context": 1}, {"batch": 0}, {"order": ()}, {"order": (2,)}])
def test_numbers_out_of_range(changes):
    with pytest.raises(UserError, match=r"scenario\.(tokens|context|batch|order) must"):
        stream(**changes)


def test_evaluation_is_the_same_text_wherever_it_is_cut():
    held = np.arange(1000, dtype=np.uint16)
    few, many = eval_windows(held, 5, 10), eval_windows(held, 50, 10)
    assert (many[:5] == few).all() and len({row[0] for row in many}) == 50
    assert eval_windows(held, 10**9, 10).shape == (99, 11)


def test_synthetic_languages_have_exact_floors():
    made = synthetic(name="s", **TINY)
    entries = made.manifest.evals
    assert len(made.domains) == 3 and all(0 < e["floor"] < np.log(8) for e in entries)
    from clbench.streams.tokens.languages import synthetic as language

    source = language(8, 8, "markov", 1.0, 1, 0)
    by_hand = [-np.log(source.probabilities[a, b]) for row in made.evaluation(1) for a, b in itertools.pairwise(row)]
    assert entries[1]["floor"] == pytest.approx(np.mean(by_hand), abs=1e-8) and len(by_hand) == entries[1]["tokens"] == 160
    same = synthetic(name="s", order=[0, 1], shift=0.0, **TINY)
    assert same.domains[0].sha256 != same.domains[1].sha256  # one language, other text


def test_manifests_hold_everything_that_changes_the_stream(tmp_path):
    made = synthetic(name="s", **TINY)
    path = tmp_path / "m.json"
    made.manifest.save(path)
    assert Manifest.load(path).sha256 == made.manifest.sha256 == synthetic(name="t", **TINY).manifest.sha256
    for changes in ({"language_seed": 1}, {"batch": 5}, {"context": 9}, {"shift": 0.5}, {"budget": {"processed": 999}}):
        assert synthetic(name="s", **(TINY | changes)).manifest.sha256 != made.manifest.sha256
    body = json.loads(path.read_text())
    assert body["sha256"] == made.manifest.sha256
    for change, words in (
        ({"batch": 5}, "was changed"),
        ({"kind": "class_incremental"}, "no manifest of kind"),
        ({"context": "8"}, "context must be"),
        ({"evals": []}, "no evaluation sets"),
        ({"evals": [body["evals"][0] | {"tokens": 7}]}, "has 7 tokens"),
        ({"experiences": [body["experiences"][0] | {"sequences": 10**6}]}, "past the end"),
        ({"experiences": 3}, "not a manifest"),
    ):
        path.write_text(json.dumps(body | change))
        with pytest.raises(UserError, match=words):
            Manifest.load(path)
    for content in ("[]", "{", '"x"', "{}"):
        path.write_text(content)
        with pytest.raises(UserError):
            Manifest.load(path)


def test_budgets_are_checked():
    for value in (-1, True, 1.5, "x"):
        with pytest.raises(UserError, match=r"budget\.processed must be (a whole number|at least 0)"):
            Budget(processed=value)


def test_looks_are_geometric_then_even():
    assert Probing(evenly=4).steps(40) == [0, 1, 2, 4, 8, 10, 16, 20, 30, 32, 40]
    assert Probing(evenly=0).steps(5) == [0, 1, 2, 4, 5]


DOCUMENTS = b"".join(b"<|doc|>title %d\n" % i + bytes([97 + i]) * (100 + i) + b"\n" for i in range(20))


def test_documents_are_split_whole_and_wherever_they_stand():
    train, held = (array.tobytes() for array in split_documents(DOCUMENTS, 0.2))
    assert len(train) + len(held) == sum(100 + i for i in range(20)) + 20
    assert abs(len(held) / len(train + held) - 0.2) < 0.04
    assert not set(train.replace(b"\0", b"")) & set(held.replace(b"\0", b""))
    turned = b"<|doc|>" + b"<|doc|>".join(reversed(DOCUMENTS.split(b"<|doc|>")[1:]))
    assert set(split_documents(turned, 0.2)[1].tolist()) == set(held)
    assert b"title" not in train + held


def test_texts_from_files(tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_bytes(DOCUMENTS)
    (tmp_path / "two.txt").write_bytes(DOCUMENTS.upper().replace(b"<|DOC|>", b"<|doc|>"))
    options = {"tokens": 320, "context": 8, "batch": 4, "eval_tokens": 80, "validation": 0.2, "data_root": str(tmp_path)}
    made = text(name="t", corpora=["one", "two", "one"], **options)
    assert made.manifest.vocab == 256 and [e["bytes_per_token"] for e in made.manifest.evals] == [1.0, 1.0]
    assert chr(made.data(0).read(np.array([0]))[0, 0]).islower() and chr(made.data(1).read(np.array([0]))[0, 0]).isupper()
    with pytest.raises(UserError, match=r"no text none: neither .*none\.txt nor a folder of shards"):
        text(name="t", corpora=["none"], **options)
    monkeypatch.delenv("CLBENCH_DATA", raising=False)
    with pytest.raises(UserError, match="set data_root or CLBENCH_DATA"):
        text(name="t", corpora=["one"], **(options | {"data_root": None}))
    (tmp_path / "single.txt").write_bytes(b"<|doc|>a\nonly one\n")
    with pytest.raises(UserError, match="needs at least two documents"):
        text(name="t", corpora=["single"], **options)
    with pytest.raises(UserError, match="validation must lie between 0 and 1"):
        text(name="t", corpora=["one"], **(options | {"validation": 1.0}))


def test_the_identity_of_tokens_does_not_depend_on_their_width():
    a = np.arange(200, dtype=np.uint8)
    assert content_sha256(a, a) == content_sha256(a.astype(np.uint32), a.astype(np.uint16))
    assert content_sha256(a[:100], a[100:]) != content_sha256(a[:99], a[99:])
    made = stream()
    assert replace(made, name="other").manifest.sha256 == made.manifest.sha256
