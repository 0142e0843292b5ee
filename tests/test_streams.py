"""Orders, generators and manifests: the same hash on every machine, and no sample in two places."""

import functools
import hashlib
import importlib
import inspect
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from clbench.interfaces import UserError
from clbench.streams import datasets, generators, orders
from clbench.streams.images.arrays import Pool
from clbench.streams.manifest import EvalEntry, ExperienceEntry, Manifest, decode_ids, encode_ids
from clbench.streams.scenario import ArrayImages, Dataset, Scenario
from clbench.streams.tokens.texts import synthetic

CONF = Path(__file__).parents[1] / "conf" / "scenario"
DIGITS_MANIFEST = "332b26c07d9d9b74b4f834a079c1f46055017d2de6408bd7737c5b55c795ad22"
TINY = (
    '{"budget":{"epochs":1,"exemplar_bytes":null,"exemplars":null,"sample_visits":null,"stored_bytes":null},'
    '"class_order":[1,0],"dataset":{"name":"tiny","num_samples":9,"sha256":"ab"},"discloses_task":false,'
    '"evals":[{"classes":[1],"first_seen":0,"ids":"8","name":"a","task":null}],'
    '"experiences":[{"classes":[1],"name":"a","task":null,"train":"0-2,5"},{"classes":[0,1],"name":"b","task":null,"train":"4,3"}],'
    '"has_boundaries":true,"kind":"class_incremental","schema":1}'
)


def config(name: str) -> dict:
    loaded = OmegaConf.merge({"data_root": None, "download": False}, {"it": OmegaConf.load(CONF / f"{name}.yaml")})
    return dict(OmegaConf.to_container(loaded.it, resolve=True))  # type: ignore[arg-type]


def build(name: str, **change) -> Scenario:
    arguments = {**config(name), **change}
    return getattr(generators, arguments.pop("_target_").split(".")[-1])(**arguments)


def toy(num_classes: int, num_domains: int = 1, per_cell: int = 6) -> Dataset:
    """Every class of every domain has `per_cell` training and 2 test samples, in mixed order."""
    cells = [(c, d, s) for c in range(num_classes) for d in range(num_domains) for s in [0] * per_cell + [1, 1]]
    random.Random(5).shuffle(cells)
    y, domain, split = (np.array(column) for column in zip(*cells, strict=True))
    images = ArrayImages(np.zeros((len(y), 1, 1, 3), np.uint8))
    names = tuple(f"d{d}" for d in range(num_domains))
    pool = Pool(images, y, split.astype(np.uint8), tuple(str(c) for c in range(num_classes)), domain, names)
    return datasets._finish("toy", pool)


@pytest.fixture
def use_toy(monkeypatch):
    def use(*sizes: int) -> Dataset:
        data = toy(*sizes)
        monkeypatch.setattr(datasets, "load", lambda *_: data)
        return data

    return use


def fails(call, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)


# orders


def test_published_orders_are_the_drawn_ones():
    for name, lists in orders.published().items():
        for number, values in lists.items():
            assert sorted(values) == list(range(number))
            if name.startswith("python"):
                drawn = list(range(number))
                random.Random(int(name[6:])).shuffle(drawn)
            elif name in ("coda_imagenet_r", "cifar100_coarse"):
                continue
            else:
                drawn = np.random.RandomState(int(name[-4:])).permutation(number)
                drawn = (np.argsort(drawn) if name.startswith("mammoth") else drawn).tolist()
            assert values == tuple(drawn), (name, number)
    starts = [orders.order("icarl1993", n)[:8] for n in (100, 200)]
    assert starts == [(68, 56, 78, 8, 23, 84, 90, 65), (168, 136, 51, 9, 183, 101, 171, 99)]
    coda = json.dumps(orders.order("coda_imagenet_r", 200)).encode()
    assert hashlib.sha256(coda).hexdigest().startswith("eb159d465c1e756d")


def test_tasks_of_super_classes(use_toy):
    """CIFAR-100's own division: an experience that is one super-class bears its name, any other its number."""
    use_toy(100)
    assert len(orders.GROUPS["cifar100_coarse"]) == 20 == len(set(orders.GROUPS["cifar100_coarse"]))
    made = generators.task_incremental("s", "toy", increment=5, order="cifar100_coarse").manifest
    assert [e.name for e in made.experiences] == list(orders.GROUPS["cifar100_coarse"]) == [e.name for e in made.evals]
    assert made.experiences[1].classes == (1, 32, 67, 73, 91) and made.experiences[14].classes == (2, 11, 35, 46, 98)
    halves = generators.class_incremental("s", "toy", sizes=[5, 3, 7, 85], order="cifar100_coarse").manifest
    assert [e.name for e in halves.experiences] == ["aquatic_mammals", "exp1", "exp2", "exp3"]
    few = generators.class_incremental("s", "toy", increment=5, order="cifar100_coarse", classes=[*range(0, 100, 2)]).manifest
    assert few.experiences[0].name == "exp0" and few.experiences[0].classes == (4, 30, 72, 32, 54)
    spelled = generators.class_incremental("s", "toy", increment=50, order=list(range(100))).manifest
    assert [e.name for e in spelled.experiences] == ["exp0", "exp1"]


def test_orders_by_name_and_list():
    assert orders.order("natural", 5) == (0, 1, 2, 3, 4)
    assert orders.order("random", 10, 0) == orders.order("random", 10, 0) != orders.order("random", 10, 1)
    full = orders.order("icarl1993", 100)
    assert orders.order("icarl1993", 100, keep=20) == tuple(c for c in full if c < 20)
    assert (
        orders.order([2, 0, 1], 3) == (2, 0, 1) == orders.order([3, 2, 0, 1], 4, keep=3) == orders.order([2, 0, 1], 4, keep=3)
    )
    fails(lambda: orders.order("icarl1994", 100), "icarl1993")
    fails(lambda: orders.order("icarl1993", 7), "10, 50, 100, 196, 200, 300", "not for 7")
    fails(lambda: orders.order([0, 1, 1], 3), "[1]")
    fails(lambda: orders.order([0, 1], 3), "0..2", "2 entries")
    fails(lambda: orders.order([0, 1.5, 2], 3), "1.5")


# manifests


def test_default_manifest_is_pinned():
    manifest = build("cil_digits").manifest
    assert manifest.sha256 == DIGITS_MANIFEST == hashlib.sha256(manifest.to_json().encode()).hexdigest()
    arguments = "'any', 'digits', increment=2, augment='none', budget={'exemplars': 200, 'epochs': 5}"
    code = f"from clbench.streams import generators as g; print(g.class_incremental({arguments}).manifest.sha256)"
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == DIGITS_MANIFEST


def tiny(**change) -> Manifest:
    entries = (ExperienceEntry("a", None, (1,), np.array([0, 1, 2, 5])), ExperienceEntry("b", None, (0, 1), np.array([4, 3])))
    body = json.loads(TINY)
    values = {
        **body,
        "experiences": entries,
        "evals": (EvalEntry("a", None, (1,), np.array([8]), 0),),
        "class_order": (1, 0),
        **change,
    }
    return Manifest(**values)


def test_canonical_text(tmp_path: Path):
    manifest = tiny()
    assert manifest.to_json() == TINY
    assert Manifest.from_json(TINY) == manifest and hash(Manifest.from_json(TINY)) == hash(manifest)
    assert manifest.renumber == {1: 0, 0: 1} and [manifest.num_seen(i) for i in (0, 1)] == [1, 2]
    assert manifest.evaluable(0, 0)
    manifest.save(tmp_path / "deep" / "m.json")
    (tmp_path / "plain").touch()
    assert (tmp_path / "deep" / "m.json").stat().st_mode == (tmp_path / "plain").stat().st_mode, "readable like any file"
    assert Manifest.load(tmp_path / "deep" / "m.json") == manifest
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["m.json"]


@given(st.lists(st.integers(0, 60), unique=True, max_size=40))
@settings(max_examples=60, deadline=None)
def test_ids_round_trip(ids: list[int]):
    assert decode_ids(encode_ids(np.array(ids, np.int64)), 61).tolist() == ids


def test_tampering_is_seen(tmp_path: Path):
    path = tmp_path / "m.json"
    tiny().save(path)
    good = path.read_text()
    for old, new in (("0-2,5", "0-2,6"), ('"epochs": 1', '"epochs": 2'), ("[\n  1,\n  0\n ]", "[\n  1.0,\n  0\n ]")):
        assert old in good
        path.write_text(good.replace(old, new))
        fails(lambda: Manifest.load(path), str(path), "changed")
    for old, new in (
        ("0-2,5", "0-2,9"),
        ("0-2,5", "0-2,2"),
        ("0-2,5", "2-0"),
        ("0-2,5", "0-2,8"),
        ("0-2,5", ""),
        ("0-2,5", "0-999999999999"),
        ('"0-2,5"', "7"),
        ('"class_order"', '"klass_order"'),
        ('"schema": 1', '"schema": 2'),
        ('"first_seen": 0', '"first_seen": 2'),
        ('"epochs": 1', '"epochs": -1'),
        ('"num_samples": 9', '"num_samples": 1e9'),
        ('"discloses_task": false', '"discloses_task": 0'),
        ('"name": "tiny"', '"name": 3'),
        ("[\n  1,\n  0\n ]", "[\n  0,\n  1\n ]"),
        ("[\n  1,\n  0\n ]", '["x"]'),
        ('"kind"', "kind"),
    ):
        assert old in good, old
        path.write_text(good.replace(old, new, 1))
        fails(lambda: Manifest.load(path), str(path))
    for text in ("", "[]", "null", "[" * 100_000, "\xff"):
        path.write_bytes(text.encode("latin-1"))
        fails(lambda: Manifest.load(path), str(path))
    fails(lambda: Manifest.load(tmp_path / "none.json"), "none.json")
    fails(lambda: tiny().save(path / "below" / "a_file.json"), "cannot write")


def nodes(part, path=()):
    """Paths to everything in plain JSON."""
    yield path
    items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    for key, value in items:
        yield from nodes(value, (*path, key))


def spans() -> Manifest:
    return synthetic(name="s", order=[0, 1], tokens=320, context=8, batch=4, eval_tokens=80).manifest


WRONG = (None, True, -1, 3, 10**30, 1.5, float("nan"), "", "x", "0-3", [], [1], [[1]], {}, {"a": 1})


@given(st.sampled_from([TINY, spans().to_json()]), st.randoms(use_true_random=False), st.sampled_from(WRONG))
@settings(max_examples=300, deadline=None)
def test_a_malformed_manifest_is_refused_in_one_line(text: str, chance: random.Random, value: object):
    body = json.loads(text)
    *above, last = chance.choice([path for path in nodes(body) if path])
    part = functools.reduce(lambda inner, key: inner[key], above, body)
    if isinstance(part, dict) and chance.random() < 0.3:
        part.pop(last)
    else:
        part[last] = value
    try:
        made = Manifest.from_json(json.dumps(body))
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert Manifest.from_json(made.to_json()) == made and made.text()


def test_streams_describe_themselves_for_the_record():
    scenario = build("cil_digits")
    told = scenario.describe()
    assert told["scenario"]["manifest_sha256"] == DIGITS_MANIFEST and told["first_seen"] == [0, 1, 2, 3, 4]
    assert list(map(sum, told["class_n"])) == told["n"] == [len(e.ids) for e in scenario.manifest.evals]
    assert scenario.text() == scenario.manifest.text(scenario.class_name)
    made = spans()
    assert Manifest.from_json(made.to_json()) == made and (made.form, made.asks, made.unit) == ("spans", "loss", "tokens")
    assert dict(made.experiences[0]) == json.loads(made.to_json())["experiences"][0]
    fails(lambda: replace(made, discloses_task=True), "discloses_task", "samples are spans")
    fails(lambda: replace(made, looks=((1, 40), ())), "manifest: looks have no place", "spans")


# generators


@cache
def options(module: str, target: str) -> list[str]:
    return list(inspect.signature(getattr(importlib.import_module(module), target)).parameters)


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_yaml_has_every_option(path: Path):
    body = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(body, dict)
    assert path.read_text().startswith("# ")
    module, _, target = str(body.pop("_target_")).rpartition(".")
    defaults = body.pop("defaults", None)  # scenarios of losses, edits and text tasks bring their own model and learner
    assert sorted(body) == sorted(options(module, target)) and (
        defaults is None or path.stem.startswith(("cpt_", "edit_", "text_"))
    )
    for name in ("data_root", "download"):
        assert body.get(name, f"${{{name}}}") == f"${{{name}}}"
    assert body["name"] == (path.stem if target != "from_manifest" else None)
    if module == generators.__name__ and target != "from_manifest":
        budget = body["budget"]
        assert isinstance(budget, dict) and len(budget) == 5 and budget["exemplars"] and budget["epochs"]
        assert body["dataset"] in (*datasets.names(), "???")


def check_partition(scenario: Scenario, data: Dataset, kept: int) -> None:
    """Every kept sample in exactly one place; training ids are training samples, evaluation ids test samples."""
    for part, entries in ((0, [e.train for e in scenario.manifest.experiences]), (1, [e.ids for e in scenario.manifest.evals])):
        ids = np.sort(np.concatenate(entries))
        assert np.array_equal(ids, np.flatnonzero((data.split == part) & (data.y < kept)))


@given(st.integers(1, 9), st.data())
@settings(max_examples=25, deadline=None)
def test_class_streams_are_partitions(num_classes: int, draw: st.DataObject):
    data = toy(num_classes)
    kept = draw.draw(st.integers(1, num_classes))
    base, increment = draw.draw(st.integers(0, kept)), draw.draw(st.integers(1, kept))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", lambda *_: data)
        seed = draw.draw(st.integers(0, 9))
        arguments = {"base": base, "increment": increment, "num_classes": kept, "order": "random", "order_seed": seed}
        one, two = (generators.class_incremental("s", "toy", **arguments) for _ in range(2))
        task = generators.task_incremental("s", "toy", **arguments)
    assert one.manifest == two.manifest != task.manifest
    check_partition(one, data, kept)
    sizes = [len(e.classes) for e in one.manifest.experiences]
    assert sum(sizes) == kept and sizes[0] == (base or min(increment, kept)) and set(sizes[1:-1]) <= {increment}
    assert sorted(one.manifest.class_order) == list(range(kept))
    assert [e.task for e in task.manifest.experiences] == list(range(len(sizes))) == [e.task for e in task.manifest.evals]
    assert Manifest.from_json(task.manifest.to_json()) == task.manifest
    assert task.facts().discloses_task and one.facts().every_experience_has_new_classes


def test_class_set_does_not_depend_on_the_order(use_toy):
    use_toy(10)
    for order in ("natural", "random", "icarl1993", "python2"):
        manifest = generators.class_incremental("s", "toy", increment=2, num_classes=4, order=order).manifest
        assert sorted(manifest.class_order) == [0, 1, 2, 3]
    explicit = generators.class_incremental("s", "toy", sizes=[1, 3], num_classes=4, order=[3, 0, 2, 1]).manifest
    assert [e.classes for e in explicit.experiences] == [(3,), (0, 2, 1)]
    assert [e.first_seen for e in explicit.evals] == [0, 1]
    assert not explicit.evaluable(1, 0) and explicit.evaluable(0, 1)


def test_domain_streams(use_toy):
    data = use_toy(3, 4)
    scenario = generators.domain_incremental("s", "toy")
    check_partition(scenario, data, 3)
    assert [e.name for e in scenario.manifest.experiences] == ["d0", "d1", "d2", "d3"]
    assert {e.classes for e in scenario.manifest.experiences} == {(0, 1, 2)}
    assert all(scenario.manifest.evaluable(j, 0) for j in range(4))
    assert not scenario.facts().every_experience_has_new_classes and data.domain is not None
    some = generators.domain_incremental("s", "toy", domains=["d3", "d1"], limit_train=2, num_classes=2).manifest
    assert [len(e.train) for e in some.experiences] == [4, 4]
    assert set(data.domain[some.experiences[0].train].tolist()) == {3}
    fails(lambda: generators.domain_incremental("s", "toy", domains=["d9"]), "d9", "did you mean d")
    fails(lambda: generators.domain_incremental("s", "toy", domains=["d1", "d1"]), "once")


def test_limits_and_validation(use_toy):
    data = use_toy(2, 1, 20)
    limited = generators.class_incremental("s", "toy", increment=1, limit_train=5, limit_test=1).manifest
    first = limited.experiences[0].train
    assert first.tolist() == np.flatnonzero((data.y == 0) & (data.split == 0))[:5].tolist()
    assert [len(e.ids) for e in limited.evals] == [1, 1]
    arguments = {"increment": 1, "validation": 0.25, "validation_seed": 3}
    tuned = generators.class_incremental("s", "toy", evaluate_on="validation", **arguments).manifest
    tested = generators.class_incremental("s", "toy", **arguments).manifest
    for a, b in zip(tuned.experiences, tested.experiences, strict=True):
        assert len(a.train) == 15 and np.array_equal(a.train, b.train)
    for experience, evaluation in zip(tuned.experiences, tuned.evals, strict=True):
        assert len(evaluation.ids) == 5 and not np.intersect1d(experience.train, evaluation.ids).size
        assert not data.split[evaluation.ids].any()
    assert data.split[tested.evals[0].ids].all()
    other = generators.class_incremental("s", "toy", **{**arguments, "validation_seed": 4}).manifest
    assert len({m.sha256 for m in (limited, tuned, tested, other)}) == 4


BAD = {
    "negative limit": ({"limit_train": -1}, ("limit_train", "-1")),
    "no limit": ({"limit_test": 0}, ("limit_test", "0")),
    "fraction": ({"limit_train": 2.5}, ("limit_train", "2.5")),
    "too many classes": ({"num_classes": 11}, ("num_classes", "1..10", "11")),
    "validation 1": ({"validation": 1.0}, ("validation", "1.0")),
    "validation nan": ({"validation": float("nan")}, ("validation", "nan")),
    "no validation": ({"evaluate_on": "validation"}, ("evaluate_on=validation", "0.0001")),
    "validation seed": ({"validation_seed": 3}, ("validation_seed", "no effect")),
    "evaluate on": ({"evaluate_on": "train"}, ("evaluate_on", "train")),
    "increment": ({"increment": 11}, ("increment", "11")),
    "zero increment": ({"increment": 0}, ("increment", "0")),
    "base": ({"base": 12}, ("base", "0..10", "12")),
    "both": ({"sizes": [5, 5]}, ("sizes", "increment=null")),
    "sum": ({"sizes": [5, 4], "increment": None}, ("sizes", "10", "9")),
    "neither": ({"increment": None}, ("increment", "missing")),
    "order seed": ({"order_seed": 1}, ("order_seed", "natural")),
    "order": ({"order": "icarl193"}, ("icarl1993",)),
    "augment": ({"augment": "no"}, ("augment", "none")),
    "budget key": ({"budget": {"epoch": 1}}, ("budget.epoch", "budget.epochs")),
    "budget value": ({"budget": {"exemplars": -5}}, ("budget.exemplars", "-5")),
    "budget type": ({"budget": 3}, ("budget", "mapping")),
    "checksum": ({"sha256": "00"}, ("SHA-256", "00")),
    "dataset": ({"dataset": "digit"}, ("digits",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case: str):
    change, words = BAD[case]
    fails(lambda: build("cil_digits", **change), *words)


def test_stored_manifest_runs(tmp_path: Path):
    scenario = build("cil_digits", limit_train=3)
    path = tmp_path / "small.json"
    scenario.manifest.save(path)
    again = build("manifest", path=str(path))
    assert (again.name, again.manifest, again.budget) == ("small", scenario.manifest, scenario.budget)
    other = tmp_path / "other.npz"
    x, y = np.zeros((4, 2, 2), np.uint8), np.array([0, 0, 1, 1])
    np.savez(other, train_x=x, train_y=y, test_x=x, test_y=y)
    fails(lambda: build("manifest", path=str(path), dataset=str(other)), "SHA-256", "made for")
    spans().save(tmp_path / "spans.json")
    fails(lambda: build("manifest", path=str(tmp_path / "spans.json")), "spans.json", "of tokens")
    entries = scenario.manifest.experiences
    swapped = replace(scenario.manifest, experiences=(replace(entries[0], train=entries[1].train), *entries[1:]))
    fails(lambda: replace(scenario, manifest=swapped), "exp0", "[2, 3]")


def test_experience_without_test_samples_is_refused(use_toy, monkeypatch):
    data = toy(2, 1, 1)
    monkeypatch.setattr(datasets, "load", lambda *_: data)
    arguments = {"increment": 1, "validation": 0.5, "evaluate_on": "validation"}
    fails(lambda: generators.class_incremental("s", "toy", **arguments), "exp0", "evaluate")
    monkeypatch.setattr(datasets, "load", lambda *_: replace(data, domain=None))
    fails(lambda: generators.domain_incremental("s", "toy"), "no domains")
