"""BELL's sequences: pictures, labels and samples of every problem against a plain loop; refusals; the transfer numbers."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_operators import fails, stream, toy

from clbench.evaluation import setting_metrics
from clbench.report import paired
from clbench.report.runs import Run
from clbench.streams import rng, transforms
from clbench.streams.manifest import Manifest
from clbench.streams.operators.bell import LONG, SEQUENCES, bell

WANTED = {  # methods_more 30.2: (domain, task, size)
    "pl": "11a 22a 33a 44a 55a 66a",
    "minus": "11a 22i 33i 44i 55i 11i",
    "plus": "11i 22i 33i 44i 55i 11a",
    "in": "11a 22a 33a 44a 55a 61p",
    "out": "11a 22i 33i 44i 55i 16i",
    "out_star": "11i 12a 33i 44i 55i 16i",
    "out_star2": "11i 12a 33i 44i 55i 11i",
    "few": "10a 20a 31i 12i 43i 22o",
}
SMALL = {"images": 17, "patterns": 5, "points": 6}


def options(sequence: Any, **more: int) -> dict[str, Any]:
    """The options that have an effect on a sequence."""
    sizes = {size for *_, size in SEQUENCES.get(sequence, [(0, 0, name) for name in SMALL])}
    return {"sequence": sequence} | {name: value for name, value in SMALL.items() if name in sizes} | more


def turn_of(entry, ids) -> list[int]:
    """Quarter turns of samples, read from the steps of an entry."""
    turns = dict.fromkeys(ids.tolist(), 0)
    for step in entry.transform:
        if "turn" in step:
            listed = transforms.decode_ids(step["turn"]["ids"], 1 << 20).tolist()
            turns |= dict.fromkeys(listed, int(step["turn"]["first"]) // 90)
    return [turns[i] for i in ids.tolist()]


def pictures(made, entry, ids) -> np.ndarray:
    return np.stack(transforms.transformed(made.dataset.images.raw(ids), entry.transform, ids.tolist()))


@pytest.mark.parametrize("sequence", WANTED)
def test_sequences_are_those_of_the_specification(sequence: str):
    letters = {"all": "a", "images": "i", "patterns": "p", "points": "o"}
    assert " ".join(f"{d}{t}{letters[size]}" for d, t, size in SEQUENCES[sequence]) == WANTED[sequence]
    made = bell(stream(toy(3, (4, 4), 8), increment=3), **options(sequence)).manifest
    assert (made.kind, made.discloses_task, len(made.experiences)) == ("task_incremental", True, 6)
    assert [e.task for e in made.experiences] == [e.task for e in made.evals] == [*range(6)]
    assert [e.first_seen for e in made.evals] == [*range(6)]
    for e, (domain, task, _) in zip(made.experiences, SEQUENCES[sequence], strict=True):
        assert e.classes == ((0, 1, 2) if task == 0 else (3 * task, 3 * task + 1))
        assert e.transform[-1] == {"permute": {"seed": 0, "number": domain}}
    assert Manifest.from_json(made.to_json()) == made


@given(st.integers(2, 4), st.integers(4, 9), st.integers(0, 3), st.sampled_from(["in", "out", "few"]))
@settings(max_examples=15, deadline=None)
def test_every_problem_equals_a_plain_loop(classes: int, per_class: int, seed: int, sequence: str):
    base = stream(toy(classes, (4, 4), per_class), increment=classes)
    sizes = {"images": 4 * classes, "patterns": 2 * classes, "points": classes}
    given_ = {name: value for name, value in sizes.items() if name in {size for *_, size in SEQUENCES[sequence]}}
    try:
        made = bell(base, sequence, seed=seed, **given_)
    except ValueError as error:
        assert re.search("labels; choose another seed, or more", str(error))
        return
    y, split = base.dataset.y, base.dataset.split
    tables: dict[int, dict] = {}
    turned: dict[int, int] = {}
    for i, (e, (domain, task, size)) in enumerate(zip(made.manifest.experiences, SEQUENCES[sequence], strict=True)):
        test = made.manifest.evals[i]
        for entry, ids in ((e, e.train), (test, test.ids)):
            turns, labels = turn_of(entry, ids), made.labels(entry).tolist()
            for k, turn, label in zip(ids.tolist(), turns, labels, strict=True):
                assert turned.setdefault(k, turn) == turn, "a sample is turned alike in all problems"
                assert tables.setdefault(task, {}).setdefault((y[k], turn), label) == label, "a pattern has one label in a task"
            source = rng.permutation(rng.key("permute pixels", seed, domain), 16)
            plain = [np.rot90(base.dataset.images.raw(ids[[k]])[0], turn) for k, turn in enumerate(turns)]
            flat = np.stack([one.reshape(16, 3)[source] for one in plain])
            assert (pictures(made, entry, ids) == flat.reshape(-1, 4, 4, 3)).all()
        assert test.ids.tolist() == np.flatnonzero(split == 1).tolist()
        patterns = set(zip(y[e.train].tolist(), turn_of(e, e.train), strict=True))
        every = np.flatnonzero(split == 0).tolist()
        if size == "all":
            assert e.train.tolist() == every
        elif size == "patterns":
            assert len(patterns) == sizes["patterns"] and {c for c, _ in patterns} == set(range(classes))
            assert e.train.tolist() == [k for k in every if (y[k], turned[k]) in patterns], "all images of these patterns"
        else:
            assert len(e.train) == sizes[size]
            assert len(patterns) == (4 * classes if size == "images" else classes), "spread over patterns"
    for task, table in tables.items():
        found = list(table.values())
        if task and len(table) == 4 * classes:
            assert found.count(found[0]) == 2 * classes
        assert task or table == {pattern: pattern[0] for pattern in table}


def test_a_problem_solved_again_has_the_same_inputs_and_labels():
    made = bell(stream(toy(4, (4, 4), 12), increment=4), "minus", images=20)
    first, *_, last = made.manifest.experiences
    assert first.classes == last.classes and set(last.train.tolist()) < set(first.train.tolist())
    labels = dict(zip(first.train.tolist(), made.labels(first).tolist(), strict=True))
    assert made.labels(last).tolist() == [labels[k] for k in last.train.tolist()]
    shared = last.train
    assert (pictures(made, first, shared) == pictures(made, last, shared)).all()


def test_the_long_sequence_draws_sizes_by_halves():
    made = bell(stream(toy(3, (4, 4), 12), increment=3), "long", seed=1, **SMALL).manifest
    parts = [re.fullmatch(r"problem(\d+)_D([1-6])_T([1-6])_(\w+)", e.name) for e in made.experiences]
    sizes = [part[4] for part in parts if part]
    assert len(sizes) == LONG and set(sizes[:50]) == {"all", "images", "patterns"}
    assert set(sizes[50:]) == {"images", "patterns", "points"}
    assert 15 <= sizes[:50].count("all") <= 35 and 3 <= sizes.count("points") <= 18


def test_refusals():
    base = stream(toy(3, (4, 4), 8), increment=3)
    fails(lambda: bell(base, "sideways"), "bell.sequence must be one of pl, minus", "sideways")  # type: ignore[arg-type]
    fails(lambda: bell(base, images=1), "bell.images must be a whole number from 2")
    fails(lambda: bell(base, "pl", images=9), "bell.images has no effect with bell.sequence=pl")
    fails(lambda: bell(base, patterns=13), "bell.patterns=13: 3 classes have 4 patterns each")
    fails(lambda: bell(base, "out", images=25), "bell.images=25: the stream has 24 training samples")
    fails(lambda: bell(stream(toy(3, (4, 4), 3), increment=3), patterns=5), "class toy-0 has 3 training", "needed are 4 and 1")
    fails(lambda: bell(stream(toy(1, (4, 4), 8), increment=1), patterns=3), "needs two classes")


def a_run(learner: str, seed: int, value: float, stream_: str = "s"):
    own: dict[str, Any] = dict.fromkeys(Run.__dataclass_fields__, "") | {
        "status": "ok",
        "legacy": False,
        "marks": (),
        "loss": None,
    }
    own |= {"learner": learner, "seed": seed, "stream": stream_, "settings": {}}
    return Run(**own | {"values": {"final_problem": value}})


def test_transfer_is_the_last_problem_minus_a_network_alone():
    record = {"scenario": {"operators": ["bell"]}, "correct": [[4, None], [3, 8]], "n": [8, 10], "first_seen": [0, 1]}
    assert setting_metrics.summary(record) == {"final_problem": 0.8}
    runs = [a_run("isolated", 0, 0.5), a_run("isolated", 1, 0.7), a_run("picle", 0, 0.9), a_run("picle", 5, 0.9)]
    found = [run.values.get("transfer") for run in paired.join([*runs, a_run("picle", 0, 0.9, "other")])]
    assert found == [None, None, pytest.approx(0.4), pytest.approx(0.3), None]
