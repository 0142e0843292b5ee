"""`clbench effects`: claims judged by hand, the files checked, the real command."""

import csv
import json

import pytest
from conftest import ROOT

from clbench.interfaces import UserError
from clbench.studies import effects


def values(**runs):
    return {name: {seed: {"last_macro": v} for seed, v in enumerate(vs)} for name, vs in runs.items()}


def test_more_and_less_are_paired_by_seed():
    claim = {"number": "last_macro", "more": "a", "less": "b"}
    row = effects.judged(claim, values(a=[0.5, 0.6, 0.9], b=[0.4, 0.5, 0.7]), 3)
    assert row["value"] == pytest.approx(0.4 / 3) and row["verdict"] == "holds" and row["seeds"] == 3
    assert effects.judged(claim, values(a=[0.4, 0.5], b=[0.5, 0.7]), 2)["verdict"] == "fails"
    assert effects.judged(claim, values(a=[0.4, 0.7], b=[0.5, 0.5]), 2)["verdict"] == "not shown"
    assert effects.judged(claim, values(a=[0.5], b=[0.4]), 1)["verdict"] == "holds (1 seed)"
    assert effects.judged(claim, values(a=[0.5], b=[]), 1)["verdict"] == "no value"
    assert effects.judged(claim, values(a=[0.5, 0.5], b=[0.5, 0.5]), 2)["verdict"] == "fails"


def test_pairs_are_gains_over_a_reference():
    given = values(a=[0.9, 0.8], b=[0.5, 0.5], c=[0.6, 0.5], d=[0.4, 0.4])
    row = effects.judged({"number": "last_macro", "more": ["a", "b"], "less": ["c", "d"]}, given, 2)
    assert row["claim"] == "a - b > c - d" and row["value"] == pytest.approx(((0.4 - 0.2) + (0.3 - 0.1)) / 2)
    missing = {"number": "last_macro", "more": ["a", "b"], "less": ["c", "e"]}
    assert effects.judged(missing, given | values(e=[]), 2)["value"] is None


def test_above_and_below():
    given = values(a=[0.2, 0.4])
    above = effects.judged({"number": "last_macro", "run": "a", "above": 0.1}, given, 2)
    assert above["value"] == pytest.approx(0.2) and above["verdict"] == "holds" and above["claim"] == "a > 0.1"
    assert effects.judged({"number": "last_macro", "run": "a", "below": 0.1}, given, 2)["verdict"] == "fails"


def test_spread_over_orders_by_hand():
    # seeds 0 and 1, orders 0 and 1: keys seed + 2 * order
    found = {0: 0.1, 1: 0.2, 2: 0.7, 3: 0.6}
    over_seeds = (0.005**0.5 + 0.005**0.5) / 2
    assert effects.spread(found, 2) == pytest.approx([0.18**0.5 - over_seeds, 0.08**0.5 - over_seeds])
    assert effects.spread({0: 0.1, 1: 0.3}, 1) == []


@pytest.mark.parametrize("name", effects.names())
def test_every_file_composes_and_claims_numbers_that_exist(name):
    from clbench.report.numbers import check_metric

    effect = effects.load(name)
    jobs = dict(effects._jobs(effect, [], 0))
    assert list(jobs) == list(effect["runs"]) and effect["claims"] and len(effect["about"]) > 20
    for claim in effect["claims"]:
        check_metric(claim["number"])


def test_wrong_files_and_words_are_one_line(tmp_path, monkeypatch, clbench):
    with pytest.raises(UserError, match="did you mean 'noise'"):
        effects.load("noises")
    (tmp_path / "effect").mkdir()
    monkeypatch.setattr(effects.registry, "conf_dir", lambda: tmp_path)
    for text, word in (
        ("# x\nruns: {a: []}\nclaims: [{number: n, more: a}]", "a claim has number and more"),
        ("# x\nruns: {a: []}\nclaims: [{number: n, more: a, less: b}]", "run 'b', which is not there"),
        ("# x\nruns: {a: []}\nclaims: [{number: n, more: [a], less: a}]", "a claim has number and more"),
        ("# x\nclaims: []", "an effect has common, runs, claims"),
    ):
        (tmp_path / "effect" / "wrong.yaml").write_text(text)
        with pytest.raises(UserError, match=word):
            effects.load("wrong")
    assert "--seeds must be" in clbench("effects", "noise", "--seeds", "0", code=2).stderr
    assert "effect noise, run 0 %" in clbench("effects", "noise", "scenario.nope=1", code=2).stderr


def test_the_command(clbench, small):
    words = ("effects", "noise", "--seeds", "1", "num_threads=1", *small)
    out = clbench(*words).stdout
    made = json.loads((clbench.folder / "results" / "effects" / "digits" / "noise.json").read_text())
    assert [claim["number"] for claim in made["claims"]] == ["plasticity"] * 2 and made["lost"] == 0
    assert "(1 seed)" in out and len(clbench.records()) == 3
    rows = (clbench.folder / "results" / "effects" / "digits" / "noise.csv").read_text().splitlines()
    assert len(rows) == 4 and rows[1].startswith("0 %,0,")
    assert clbench(*words).stdout == out
    assert "noise" in clbench("effects", "--list").stdout


COMMITTED = sorted((ROOT / "results" / "effects").rglob("*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_committed_verdicts_follow_from_the_committed_numbers(path):
    """Every claim of the present file of the effect, judged again from the numbers of the runs; the page shows each."""
    made, effect = json.loads(path.read_text()), effects.load(path.stem)
    assert made["about"] == effect["about"] and made["seeds"] >= 5 and made["lost"] == 0
    found, places = {name: {} for name in effect["runs"]}, {}
    for row in csv.DictReader(path.with_suffix(".csv").read_text().splitlines()):
        place = places.setdefault(row["order"], len(places))
        numbers = {k: float(row[k]) for k in {claim["number"] for claim in effect["claims"]} if row[k]}
        found[row["run"]][int(row["seed"]) + place * made["seeds"]] = numbers
    assert made["claims"] == json.loads(json.dumps([effects.judged(c, found, made["seeds"]) for c in effect["claims"]]))
    page = (ROOT / "results" / "effects" / "README.md").read_text()
    for claim in made["claims"]:
        shown = f"| {claim['number']} | {claim['claim']} | {claim['value']:.3f} | {claim['95 %']} | {claim['verdict']} |"
        assert shown in page, f"{shown} is not in results/effects/README.md"


def test_every_effect_is_committed_and_within_two_minutes_a_seed():
    at_hand = {path.stem: path for path in COMMITTED if path.parent.name in ("digits", "cpt_synthetic")}
    assert set(at_hand) == set(effects.names())
    for path in at_hand.values():
        seconds: dict[str, float] = {}
        for row in csv.DictReader(path.with_suffix(".csv").read_text().splitlines()):
            seconds[row["seed"]] = seconds.get(row["seed"], 0.0) + float(row["seconds"])
        assert max(seconds.values()) < 120, path.stem
