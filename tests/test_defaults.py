"""Configuration files and Python defaults cannot disagree: files say what differs, the signature says the rest."""

import functools
import hashlib
import inspect
import json
import pathlib
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence

import pytest
import yaml

from clbench.cli import schedule_command
from clbench.config import compose, defaults
from clbench.config.definitions import definition
from clbench.config.moved import first_edition
from clbench.config.registry import choices, details, load_target
from clbench.config.signatures import UNKNOWN, signature

GOLDEN = pathlib.Path(__file__).parent / "golden" / "options.json"
FILES = [(group, name) for group in defaults.GROUPS for name in choices(group)]
HOST = {"learner": "", "schedule": "learner=slca", "pet": "learner=lae"}


def composed(group, name):
    (job,) = compose.compose([f"{group}={name}", *([HOST[group]] if HOST[group] else [])])
    return job["learner"] if group == "learner" else job["learner"][group]


def named_as_first(node):
    """A node with the targets that the first edition names, as the identity of a run has them."""
    if isinstance(node, dict):
        return {k: first_edition(v) if k == "_target_" else named_as_first(v) for k, v in node.items()}
    return [named_as_first(one) for one in node] if isinstance(node, list) else node


def digest(node):
    """Of the values and of their order, which the user sees."""
    return hashlib.sha256(json.dumps(named_as_first(node)).encode()).hexdigest()[:16]


def nodes(node):
    """All nodes with a target in a configuration file."""
    if isinstance(node, dict):
        yield from [node] if "_target_" in node else []
        for value in node.values():
            yield from nodes(value)


def targets():
    found = {"clbench.training.pretraining.data_mixture.Replay", "clbench.training.pretraining.weight_averaging.Average"}
    for group in ("scenario", "learner", "model", "schedule", "pet"):
        for paths in choices(group).values():
            found |= {n["_target_"] for path in paths for n in nodes(yaml.safe_load(path.read_text()))}
    return sorted(found)


@pytest.mark.parametrize(("group", "name"), FILES)
def test_composed_options_are_what_records_know(group, name):
    """The digest of the composed node, as it was when the files listed every option: run ids depend on it.

    An option that is added or changed on purpose changes it: `python tests/test_defaults.py` writes the file anew.
    """
    assert digest(composed(group, name)) == json.loads(GOLDEN.read_text())[f"{group}/{name}"]


@pytest.mark.parametrize(("group", "name"), FILES)
def test_no_file_repeats_a_default(group, name):
    (path, *_) = choices(group)[name]

    def check(node, where):
        told = signature(node["_target_"])
        for key, value in node.items():
            if key in ("_target_", "_partial_"):
                continue
            assert key in told.parameters, f"{path}: {where}{key} is no argument of {node['_target_']}"
            if isinstance(value, dict) and "_target_" in value:
                check(value, f"{where}{key}.")
                value = defaults.filled(value)
            assert value != defaults.shown(told.parameters[key].default), f"{path}: {where}{key} is the default"

    check(defaults.numbers(yaml.safe_load(path.read_text())), "")


def plain(value):
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def same_default(told, real):
    if isinstance(told, dict) and "_target_" in told:
        if not told.get("_partial_"):
            return compose.build(told) == real
        made = load_target(told["_target_"])
        options = {key: plain(value) for key, value in told.items() if not key.startswith("_")}
        return made is real if not options else (made, options) == (real.func, {k: plain(v) for k, v in real.keywords.items()})
    return told == plain(real)


def same_hint(told, real):
    """The annotation as `get_type_hints` gives it, reduced to what a configuration can hold."""

    def reduced(hint):
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            parts = [reduced(arg) for arg in args]
            return inspect.Parameter.empty if inspect.Parameter.empty in parts else typing.Union[tuple(parts)]  # noqa: UP007
        if origin is typing.Literal:
            return hint
        if hint in (int, float, bool, str, type(None)):
            return hint
        if origin is not Callable and (origin or hint) in (list, tuple, Sequence, Iterable, set, frozenset):
            return list
        return dict if (origin or hint) in (dict, Mapping) else str if hint is pathlib.Path else inspect.Parameter.empty

    return told == reduced(real)


@pytest.mark.parametrize("target", targets())
def test_signatures_read_from_the_source_are_those_of_inspect(target):
    told, made = signature(target), load_target(target)
    real = inspect.signature(made)
    hints = typing.get_type_hints(made.__init__ if isinstance(made, type) else made, vars(sys.modules[made.__module__]))
    assert [(p.name, p.kind) for p in told.parameters.values()] == [(p.name, p.kind) for p in real.parameters.values()]
    for name, one in told.parameters.items():
        theirs = real.parameters[name].default
        assert (one.default is one.empty) == (theirs is inspect.Parameter.empty), name
        assert one.default is not UNKNOWN, f"{target}: a configuration cannot say the default of {name}"
        assert one.default is one.empty or same_default(one.default, theirs), name
        if one.kind is not one.VAR_KEYWORD and name not in ("model", "runtime", "place"):
            assert same_hint(one.annotation, hints[name]), (name, one.annotation, hints[name])


SOURCE = """
    from dataclasses import dataclass, field
    from functools import partial
    from json import dumps

    from clbench.training.schedules import cosine, multistep

    WIDTH = 7
    PARTS = (1, (2.5, None))
    DROPS = partial(multistep, milestones=(0.5,))

    @dataclass
    class Part:
        size: int = WIDTH
        items: list = field(default_factory=list)

    SMALL = Part(size=1)

    class Base:
        def __init__(
            self, model, runtime, /, lr, *, a=-1, b=PARTS, schedule=cosine, drops=DROPS, part=SMALL, text=dumps, c=1 / 3
        ):
            pass

    class Child(Base):
        pass
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "filled_part.py").write_text(textwrap.dedent(SOURCE))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("target", ["filled_part.Child", "filled_part.py:Child"])
def test_a_node_is_filled_by_hand(package, target):
    """What is not said plainly (`dumps`, 1 / 3, a field's factory) is left out; a function's options are not opened."""
    where = target[: -len("Child")]
    assert defaults.filled({"_target_": target, "drops": None, "lr": 2, "zzz": 1}) == {
        "_target_": target,
        "lr": 2,
        "a": -1,
        "b": [1, [2.5, None]],
        "schedule": {"_target_": "clbench.training.schedules.cosine", "_partial_": True},
        "drops": None,
        "part": {"_target_": f"{where}Part", "size": 1},
        "zzz": 1,
    }
    schedule = {"_target_": "clbench.training.schedules.cosine", "_partial_": True}
    made = defaults.filled({"_target_": target, "schedule": schedule})
    assert list(made) == ["_target_", "a", "b", "schedule", "drops", "part"]
    assert made["schedule"] == {**schedule, "warmup": 0.0, "end": 0.0}
    assert made["drops"] == {
        "_target_": "clbench.training.schedules.multistep",
        "_partial_": True,
        "milestones": [0.5],
        "gamma": 0.1,
    }
    assert "filled_part" not in sys.modules


@pytest.mark.parametrize("target", ["nowhere.Mine", "filled_part.Nobody", "filled_part.WIDTH", "json.dumps", 3, None])
def test_a_target_without_a_signature_fills_nothing(package, target):
    node = {"_target_": target, "lr": 2}
    assert {key: value for key, value in defaults.filled(node).items() if key in node} == node
    if target != "json.dumps":
        assert defaults.filled(node) == node


def test_a_filled_option_needs_no_plus_and_an_unknown_one_is_named():
    (job,) = compose.compose(["learner=ncm", "learner.metric=cosine"])
    assert job["learner"]["metric"] == "cosine"
    (job,) = compose.compose(["learner=infinite", "learner.replay.window=0.5", "learner.schedule.end=0"])
    assert job["learner"]["replay"]["window"] == 0.5 and job["learner"]["schedule"]["end"] == 0
    (job,) = compose.compose(["learner=ncm", "~learner.batch_size"])
    assert "batch_size" not in job["learner"]


def test_schedules_shown_have_all_options():
    assert schedule_command.chosen(["cosine", "warmup=0.5"])["cosine"].keywords == {"warmup": 0.5, "end": 0.0}


def test_numbers_are_read_as_hydra_reads_them(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text("a: 1e-3\nb: [-2E5, '1e', .5e1]\nc: {d: 1_0e}\n")
    assert defaults.read(path) == {"a": 0.001, "b": [-2e5, "1e", 5.0], "c": {"d": "1_0e"}}


def test_definitions_follow_imports():
    found = definition("clbench.learners.slca.multistep")
    assert found.target == "clbench.training.schedules.multistep" and found.node.name == "multistep"
    assert "ICCV 2023" in details(choices("learner")["slca"][0])[0]
    assert functools.reduce(getattr, ["node", "name"], definition("clbench.learners.slca.Slca")) == "Slca"


if __name__ == "__main__":
    made = {f"{group}/{name}": digest(composed(group, name)) for group, name in FILES}
    GOLDEN.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
