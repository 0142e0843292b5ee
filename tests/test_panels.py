"""The tables of results/pretraining/README.md are the committed ones, and those are what the committed records say."""

import csv
import re

import pytest
from conftest import ROOT

from clbench.records import loss_facts, record
from clbench.report import table
from clbench.report.columns import LOSS

WHERE = ROOT / "results" / "pretraining" / "README.md"
TEXT = WHERE.read_text()
TABLES = {m[1]: m[2].strip().splitlines() for m in re.finditer(r"<!-- (\w+):start -->\n(.*?)<!-- \1:end -->", TEXT, re.S)}
RATES = TABLES.pop("rates")
COLUMNS = {"old sets": "retained_loss", "newest set": "newest_loss", "forgetting": "forgetting_after"}
COLUMNS |= {"gap depth": "gap_depth", "recovery": "recovery_ratio", "probe_own": "probe_own", "probe_seen": "probe_seen"}


def test_the_panels_of_the_plan_are_there():
    """{re-warm cosine, infinite, WSD branch, constant} x {0, 1, 5, 25 %} x 5 seeds; texts with 3 seeds for the main rows."""
    rows = {
        name: [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]] for name, lines in TABLES.items()
    }
    found = {(r[0], r[1]): int(r[2]) for r in rows["cpt_synthetic"]}
    for learner in ("rewarm_replay", "infinite", "wsd_branch", "constant_lr"):
        for share in ("0 %", "1 %", "5 %", "25 %"):
            assert found[learner, share] == 5
    for name in ("cpt_text_strong", "cpt_text_weak"):
        found = {(r[0], r[1]): int(r[2]) for r in rows[name]}
        assert all(found["rewarm_replay", share] >= 3 for share in ("0 %", "1 %", "5 %", "25 %"))
        assert all(found["infinite", share] >= 3 for share in ("0 %", "5 %")) and found["joint_union (reference)", "0 %"] >= 3


@pytest.mark.parametrize("scenario", TABLES)
def test_tables_are_the_committed_numbers(scenario):
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in TABLES[scenario])
    with (ROOT / "results" / "leaderboard_loss.csv").open() as file:
        known = {}
        for r in csv.DictReader(file):
            whole = r["manifest"] == "a80bc860" and r["n_seeds"] == "5"  # the others are of cpt_synthetic_rates
            if r["scenario"] == scenario and (scenario != "cpt_synthetic" or whole):
                share = f"{100 * float(r['replay']):g} %" if r["replay"] else ""
                known.setdefault((r["learner"], share), []).append(r)
    assert len(lines) == sum(map(len, known.values()))
    for line in lines:
        shown = dict(zip(head, line, strict=True))
        rows = known[shown["learner"].removesuffix(" (reference)"), shown["replay"]]
        mean = shown["final loss [95 %]"].split()[0]
        row = next(r for r in rows if f"{float(r['final_loss_mean']):.3f}" == mean)
        assert shown["seeds"] == row["n_seeds"]
        if row["final_loss_low"]:
            ends = [float(row[f"final_loss_{end}"]) for end in ("low", "high")]
            assert shown["final loss [95 %]"] == f"{mean} [{ends[0]:.3f}, {ends[1]:.3f}]"
        for column, name in COLUMNS.items():
            value = row[f"{name}_mean"] if column in shown else ""
            assert shown.get(column, "") == (f"{float(value):.3f}" if value else ""), (line, column)


def test_rates_are_committed_numbers():
    with (ROOT / "results" / "leaderboard_loss.csv").open() as file:
        known = [r for r in csv.DictReader(file) if r["scenario"] == "cpt_synthetic" and r["learner"] == "rewarm_replay"]
    found = {tuple(f"{float(r[f'{n}_mean']):.3f}" for n in ("final_loss", "retained_loss", "newest_loss")) for r in known}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in RATES[2:]]
    assert len(rows) == 8 and len({tuple(r[:3]) for r in rows}) == 8
    assert all((r[4].split()[0], r[5], r[6]) in found and int(r[3]) >= 3 for r in rows)


def test_figures_are_there():
    for name in re.findall(r"\]\(([\w.-]+\.svg)\)", TEXT):
        assert (WHERE.parent / name).is_file(), name
    assert list(WHERE.parent.glob("losses-cpt_text_strong-*.svg")) and list(WHERE.parent.glob("losses-cpt_synthetic-*.svg"))


def test_the_committed_table_is_what_the_records_say():
    entries = [e for e in record.read_all(ROOT / "results" / "records")[0] if loss_facts.is_loss(e)]
    made = table.csv_of(table.rows(entries, board=LOSS), LOSS)
    assert made == (ROOT / "results" / "leaderboard_loss.csv").read_text(), "run `clbench report` and commit its tables"
