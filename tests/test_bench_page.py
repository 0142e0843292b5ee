"""results/bench/README.md shows what the committed files hold, and those measured what the project set out to reach."""

import csv
import json
import re

import pytest
from conftest import ROOT

from clbench.bench import online, presets, scaling, startup, table, tokens

WHERE = ROOT / "results" / "bench"
BLOCKS = dict(
    re.findall(r"<!-- (\w+):start -->\n```text\n(.*?)\n```\n<!-- \1:end -->", (WHERE / "README.md").read_text(), re.S)
)
TEXTS = {
    "cpu_targets": lambda found: table.cases_text(found, found["targets"]),
    "online": online.text,
    "online_resnet32": online.text,
    "scaling": scaling.text,
    "startup": startup.text,
    "tokens": tokens.text,
    "tokens_10gb": tokens.text,
    "tokens_busy": tokens.text,
}


def found(name):
    return json.loads((WHERE / f"{name}.json").read_text())


@pytest.mark.parametrize("path", sorted(WHERE.glob("*.json")), ids=lambda path: path.stem)
def test_the_page_shows_the_file(path):
    assert BLOCKS[path.stem] == TEXTS[path.stem](json.loads(path.read_text()))


def test_the_loop_of_tokens_is_fast_and_its_memory_flat():
    rows = {row["row"]: row for row in found("tokens")["loop"]}
    assert rows["clbench"]["of_bare"] >= 0.95 and rows["clbench with probes"]["of_bare"] >= 0.95  # looks and ledger on
    large = found("tokens_10gb")
    assert large["options"]["corpus_gb"] == 10 and large["memory"][0]["grown_mb"] < 64


def test_the_targets_file_is_whole():
    """Every case in both precisions beside its naive version, its floor and its counts of passes; nothing made of noise."""
    measured, preset = found("cpu_targets"), presets.PRESETS["cpu_targets"]
    assert measured["complete"] and not measured["quick"] and not measured["stand_ins"]
    assert [(r["case"], r["precision"]) for r in measured["cases"]] == [
        (c.name, p) for c in preset.cases for p in ("fp32", "bf16")
    ]
    for r in measured["cases"]:
        assert (
            r["naive"]["seconds"] > 0
            and r["floor"] > 0
            and r["passes"]["train"] == r["needed"]["full"] + r["needed"]["adapter"]
        )
        assert r["passes"]["eval"] == r["needed"]["forward"] and min(r["repeats"]) == pytest.approx(r["seconds"])
    assert measured["sweep"]["seeds"] == 10 and len(measured["sweep"]["runs"]) == 30
    assert measured["targets"] == table.targets_of(preset, measured), "what is met is what the numbers say"


def test_the_growth_file_is_whole():
    measured = found("scaling")
    sizes = {(r["against"], r["size"]) for r in measured["rows"]}
    assert sizes == {("experiences", t) for t in (5, 10, 20, 50, 100)} | {("classes", k) for k in (10, 30, 100, 300, 1000)}
    assert not measured["quick"]
    for said, again in zip(measured["exponents"], scaling.exponents(measured["rows"]), strict=True):
        for name, value in again.items():
            assert said[name] == (
                value if value is None or isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-3)
            ), name


@pytest.mark.parametrize(("name", "model", "batch"), [("online", "resnet18_slim", 10), ("online_resnet32", "resnet32", 128)])
def test_the_loop_costs_at_most_a_tenth(name, model, batch):
    measured = found(name)
    assert not measured["quick"] and measured["model"] == model and measured["batch"] == batch
    ours = [row for row in measured["rows"] if row["loop"] == "clbench"]
    assert len(ours) == 4 and all(row["ratio_cpu"] <= online.MOST for row in ours)
    with open(WHERE / f"{name}.csv") as file:
        rows = list(csv.DictReader(file))
    assert [{k: str(row[k]) for k in online.COLUMNS[5:]} for row in measured["rows"]] == [
        {k: row[k] for k in online.COLUMNS[5:]} for row in rows
    ]
