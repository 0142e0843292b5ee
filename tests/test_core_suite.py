"""The core suite: orders that are what they claim, hashes that hold, parts of it, runs that are not repeated, the table."""

import dataclasses
import json
from pathlib import Path

import pytest

from clbench.config import compose, registry, suite
from clbench.interfaces import UserError
from clbench.report import suites
from clbench.streams.operators import similarity
from clbench.studies import core, core_choice

CORE = suite.load("core_v1")
NODES = core.streams_of("core_v1")


def seeded(value: float, seed: int) -> float:
    """A number of a made-up run: the learner's value and a little of its own for each seed."""
    return value + 0.01 * ((7 * seed) % 5 - 2)


def filled(values: dict[str, float], stream: str = "digits_online", orders: int = 5) -> dict:
    """Rows of the suite in which some learners of a stream have runs."""
    made = suites.rows(CORE, [])
    for k, (learner, value) in enumerate(values.items()):
        row = made[stream, learner]
        for order in row.stream.orders[:orders]:
            row.values[order.name], row.seconds[order.name] = seeded(value, order.seed + k), 3.0
    suites.rank([row for row in made.values() if row.stream.name == stream])
    return made


def test_five_orders_of_every_stream_and_no_two_alike():
    for stream in CORE.streams.values():
        assert [order.seed for order in stream.orders] == [0, 1, 2, 3, 4], stream.name
        assert len({order.sha256 for order in stream.orders}) == 5, stream.name
        assert stream.entries and not stream.entries.keys() & stream.left_out.keys()


@pytest.mark.parametrize("name", ["digits_classes", "digits_few_shot", "digits_reoccurring", "pretraining_languages"])
def test_orders_and_hashes_are_what_the_recipe_makes(name):
    node, stream = NODES[name], CORE.streams[name]
    made = core.recipe(node)
    assert list(made) == [order.name for order in stream.orders]
    for order in stream.orders:
        assert made[order.name] == order.overrides, order.name
        assert core.stream(node, made[order.name]).manifest.sha256 == order.sha256, order.name


def test_extreme_orders_are_extreme():
    node, stream = NODES["digits_classes"], CORE.streams["digits_classes"]
    built = core.stream(node, {"scenario.order": "natural"})
    train = built.dataset.split == 0
    d = similarity.distances(built.dataset, [((built.dataset.y == c) & train).nonzero()[0] for c in range(10)], ())

    def within(order: suite.Order) -> int:
        """Distances of the classes that share an experience, together."""
        classes = core.stream(node, order.overrides).manifest.class_order
        return int(sum(d[a, b] for a, b in zip(classes[::2], classes[1::2], strict=True)))

    sums = {order.name: within(order) for order in stream.orders}
    assert max(sums, key=lambda k: sums[k]) == "edge_easy" and min(sums, key=lambda k: sums[k]) == "edge_hard", sums


def test_a_changed_stream_is_an_error_that_says_so(clbench):
    order = CORE.streams["digits_online"].orders[0]
    words = ["scenario=cil_digits", "scenario.operators=[single_pass]", f"manifest_sha256={order.sha256}", "learner=ncm"]
    assert "1 new" in clbench("plan", *words, "learner.streaming=true").stdout
    error = clbench("plan", *words, "learner.streaming=true", "scenario.limit_train=50", code=2).stderr
    assert "manifest_sha256 asks for" in error and "frozen stream" in error and error.count("\n") == 1
    assert "64 hexadecimal digits" in clbench("plan", "learner=ncm", "manifest_sha256=12", code=2).stderr


def test_parts_of_the_suite():
    every = suite.jobs(CORE)
    shards = [suite.jobs(CORE, shard=f"{k}/7") for k in range(1, 8)]
    assert sum(map(len, shards)) == len(every) and {id(j.entry) for s in shards for j in s} == {id(j.entry) for j in every}
    some = suite.jobs(CORE, {"streams": ["digits_on*"], "learners": ["ncm", "er"], "orders": ["natural", "random"]})
    assert [(job.entry.learner, job.order.name) for job in some] == [
        (learner, order) for learner in ("er", "ncm") for order in ("natural", "random")
    ]
    for wanted, shard, message in (
        ({"streams": ["digits_onlin"]}, None, "did you mean 'digits_online'"),
        ({"learners": ["text_lora"]}, None, "no learner 'text_lora'"),
        ({}, "8/7", "1 <= K <= N"),
        ({}, "a", "such as 3/40"),
    ):
        with pytest.raises(UserError, match=message):
            suite.jobs(CORE, wanted, shard)


def test_jobs_are_composed_with_the_options_of_the_table():
    found = compose.read(["sweep=core", "core.streams=digits_online,mnist_tasks", "core.learners=[er,hat]", "num_threads=1"])
    assert found.multirun and len(found.jobs) == 15 and found.suite is not None
    for job, config in zip(found.suite.jobs, found.jobs, strict=True):
        registry.check(config)
        assert config["seed"] == job.order.seed and config["num_threads"] == 1
        assert config["manifest_sha256"] == job.order.sha256 and not {"core", "shard", "suite"} & config.keys()
    online = found.jobs[-1]
    assert online["learner"]["backbone_lr"] == 0.03 and online["names"] == {
        "scenario": "cil_digits",
        "learner": "er",
        "model": "nano",
    }
    for words in (["learner=ncm"], ["scenario.limit_train=5"], ["core.seeds=1"], ["seed=3"]):
        with pytest.raises(UserError):
            compose.read(["sweep=core", *words])


def test_every_row_can_be_composed_and_its_options_exist():
    known = {name: core.defaults.read(files[0]) for name, files in registry.choices("learner").items()}
    for stream in CORE.streams.values():
        assert stream.scenario in registry.choices("scenario") and stream.model in registry.choices("model")
        for entry in stream.entries.values():
            assert entry.seconds > 0
            for key in entry.overrides:
                node = known[entry.learner]
                for part in key.split(".")[1:]:
                    assert part in node, f"{stream.name} {entry.learner}: {key}"
                    node = node[part]


def test_options_come_from_the_cards_with_their_cost():
    results = Path(__file__).parent.parent / "results"
    known = core.cards.load(results / "cards.yaml")
    for name, stream in CORE.streams.items():
        for entry in stream.entries.values():
            given, tuning = core.options(known, entry.learner, NODES[name]["cards"])
            if entry.tuning is not None:
                assert (dict(entry.overrides), dict(entry.tuning)) == (given, tuning), f"{name} {entry.learner}"
                assert entry.tuning["runs"] > 0 and entry.tuning["seconds"] > 0 and entry.tuning["on"]


def test_one_shard_end_to_end_and_nothing_twice(clbench):
    words = (
        "sweep=core",
        "core.streams=digits_online",
        "core.learners=ncm",
        "core.orders=[natural,edge_hard]",
        "num_threads=1",
    )
    plan = clbench("plan", *words).stdout
    assert "2 jobs, 2 open" in plan and "digits_online" in plan
    first = clbench("run", *words, "shard=2/2", fresh=True).stdout
    assert "1 jobs: 1 ok" in first, first
    (made,) = clbench.records("results/core")
    stream = CORE.streams["digits_online"]
    assert made["seed"] == 4 and made["scenario"]["manifest_sha256"] == stream.orders[4].sha256
    assert "2 jobs, 1 open" in clbench("plan", *words).stdout
    second = clbench("run", *words, fresh=True).stdout
    assert "1 of 2 jobs of this part are done" in second and "1 jobs: 1 ok" in second
    assert "are done (clbench report core" in clbench("run", *words).stdout
    table = clbench("report", "core").stdout
    assert "2/5" in table and "no learner has all 5 orders yet" in table
    missing = clbench("report", "core", "--part", "missing", "--format", "json").stdout
    line = next(row for row in json.loads(missing) if (row["stream"], row["learner"]) == ("digits_online", "ncm"))
    assert line["missing"] == "published random edge_easy" and line["why"] == "not run"
    clbench("report")
    written = (clbench.folder / "results" / "core" / "core_v1.csv").read_text()
    row = next(text for text in written.splitlines() if text.startswith("digits_online,ncm"))
    assert row.startswith("digits_online,ncm,last_macro,2,5,,,"), row  # two of five runs: no mean


def test_records_of_other_options_do_not_belong(clbench):
    order = CORE.streams["digits_online"].orders[0]
    words = ["run", "scenario=cil_digits", "scenario.operators=[single_pass]", "num_threads=1"]
    clbench(*words, "learner=slda", "learner.shrinkage=0.5")  # not the chosen options
    clbench(*words, "learner=slda", "learner.shrinkage=0.0001")
    wrong, right = sorted(clbench.records(), key=lambda r: r["config"]["learner"]["shrinkage"] == 0.0001)
    stream = CORE.streams["digits_online"]
    assert stream.entries["slda"].overrides["learner.shrinkage"] == 0.0001
    assert suites.belongs(right, stream, order) and not suites.belongs(wrong, stream, order)
    assert not suites.belongs(right | {"config": right["config"] | {"precision": "bf16"}}, stream, order)


def test_a_row_with_four_runs_has_no_mean_and_no_rank():
    made = filled({"er": 0.8, "ncm": 0.5}, orders=4)
    matrix, every, missing = suites.tables(CORE, made)
    assert next(row for row in matrix.rows if row["learner"] == "er")["digits_online"] == "4/5"
    line = next(row for row in every.rows if (row["stream"], row["learner"]) == ("digits_online", "er"))
    assert line["runs"] == 4 and line.get("mean") is None and line.get("rank_from") is None
    assert any((row["stream"], row["learner"]) == ("digits_online", "er") for row in missing.rows)


def test_ranks_have_ties_and_the_sentence_names_them():
    made = filled({"er": 0.90, "er_ace": 0.895, "mir": 0.7, "ncm": 0.3})
    row = {name: made["digits_online", name] for name in ("er", "er_ace", "mir", "ncm")}
    assert row["er"].rank == (1, 2) == row["er_ace"].rank and row["mir"].rank == (3, 3) and row["ncm"].rank == (4, 4)
    assert row["er"].word == "best" and row["er_ace"].word == "not distinguishable" and row["ncm"].word == "worse"
    sentence = next(note for note in suites.tables(CORE, made)[0].notes if note.startswith("digits_online:"))
    assert "er has the best mean of 4; cannot be told from it: er_ace" in sentence


def test_learners_that_the_table_does_not_know_are_named():
    known = set(CORE.learners) | {name for s in CORE.streams.values() for name in s.left_out}
    assert not set(suites.newer(CORE)) & known and {"text_lora", "rome"}.isdisjoint(suites.newer(CORE))
    some = dataclasses.replace(CORE, streams={"digits_online": dataclasses.replace(CORE.streams["digits_online"], left_out={})})
    assert {"slca", "rewarm_replay"} <= set(suites.newer(some))
    assert "newer than the table" in suites.tables(some, suites.rows(some, []))[2].notes[1]


def test_losses_rank_the_other_way_round():
    made = filled({"infinite": 2.0, "rewarm_replay": 3.0}, "pretraining_languages")
    assert made["pretraining_languages", "infinite"].rank == (1, 1)


def test_how_well_streams_tell_methods_apart():
    wide = {f"l{k}": {s: seeded(0.1 * k, s + k) for s in range(5)} for k in range(5)}
    flat = {f"l{k}": {s: seeded(0.5, 3 * s + k) for s in range(5)} for k in range(5)}
    turned = {f"l{k}": {s: seeded(-0.1 * k, s + k) for s in range(5)} for k in range(5)}
    lines = {line["stream"]: line for line in core_choice.measured({"a": wide, "b": wide, "flat": flat}, {})}
    assert lines["a"]["ratio"] > 5 > 1.5 > lines["flat"]["ratio"]
    assert lines["a"]["told apart"] == 1.0 and lines["flat"]["told apart"] < 0.5 and lines["a"]["rho"] > 0.9
    both = core_choice.measured({"a": wide, "turned": turned}, {})
    assert [line["rho"] for line in both] == pytest.approx([-1, -1])
