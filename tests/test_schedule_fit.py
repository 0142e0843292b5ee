"""Schedules from data: laws fitted to curves, schedules refined from gradient norms, and what the command says of records."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.cli import schedule_fit
from clbench.cli.main import answer
from clbench.config.compose import compose
from clbench.interfaces import Place, UserError
from clbench.records import rates, record
from clbench.run.runner import run_job
from clbench.training import gradient_norms, schedules
from clbench.training.pretraining import law_fits, refinement, scaling_laws
from clbench.training.pretraining.law_fits import Curve

RECORDS = Path(__file__).parent.parent / "results" / "records"
COSINE = ("1e72bf5c09da093e", "5eb33976d11d6af0", "9542ed943479ced4")  # of cpt_synthetic, lr 0.003
WSD = ("247319c959ae77a4", "4f66d3a972941c3c", "69af596b38d609d2")


def path(run_id):
    found = RECORDS / f"{run_id}.json"
    if not found.exists():
        pytest.skip("the records of the repository are not here")
    return str(found)


N = 10_000
n = np.arange(N)
SHAPES = {
    "constant": np.full(N, 2e-4),
    "cosine": 2e-4 * (0.1 + 0.45 * (1 + np.cos(np.pi * n / N))),
    "wsd": 2e-4 * np.where(n < 8000, 1, 1 - 0.9 * (n - 8000) / 2000),
}
LOOKS = np.arange(294, N + 1, 99)
TRUTH = scaling_laws.AnnealingLaw(2.5, 0.5, 0.5, 2.0)


def curve(shape, noise=0.0, seed=0):
    losses = np.array([TRUTH(SHAPES[shape][:s]) for s in LOOKS])
    return Curve(
        shape, shape, SHAPES[shape], LOOKS, losses * np.exp(noise * np.random.default_rng(seed).standard_normal(len(LOOKS)))
    )


def test_one_exact_cosine_identifies_the_annealing_law():
    found = law_fits.fit("annealing", [curve("cosine")])
    truth = {"base": 2.5, "scale": 0.5, "gain": 2.0, "power": 0.5}
    assert found.constants == pytest.approx(truth, rel=1e-5)
    assert found.final(SHAPES["wsd"]) == pytest.approx(TRUTH(SHAPES["wsd"]), rel=1e-6) == pytest.approx(2.6663, abs=5e-5)
    again = law_fits.loaded(json.loads(json.dumps(found.state_dict())))
    assert again.final(SHAPES["cosine"]) == found.final(SHAPES["cosine"])


def test_noisy_curves_predict_another_schedule_and_the_control_does_not():
    curves = [curve("constant", 0.003, 1), curve("cosine", 0.003, 2)]
    law, control = (law_fits.fit(name, curves) for name in ("annealing", "steps"))
    truth = TRUTH(SHAPES["wsd"])
    assert abs(law.final(SHAPES["wsd"]) - truth) < 0.005 < abs(control.final(SHAPES["wsd"]) - truth)


def test_the_control_finds_a_power_of_the_updates():
    made = Curve("", "", SHAPES["constant"], LOOKS, 2 + 3 * LOOKS**-0.4)
    assert law_fits.fit("steps", [made]).constants == pytest.approx({"base": 2, "scale": 3, "power": 0.4}, rel=1e-4)


def test_multi_power_against_its_equation():
    eta = np.array([1.0, 1.0, 0.6, 0.6, 0.2])
    made = Curve("", "", eta, np.array([1, 2, 3, 4, 5]), np.ones(5))
    units = law_fits.units_of([made], 0.999)
    fit = law_fits.Fit("multi_power", 0.999, units, np.array([2.0, 0.5, 0.7, 0.4, 3.0, 0.5, 0.6]))
    c = fit.constants
    for s, found in zip(made.steps, fit(made), strict=True):
        lost = sum(
            (eta[k - 1] - eta[k]) * (1 - (1 + c["speed"] * eta[k] ** -c["bend"] * eta[k:s].sum()) ** -c["decay"])
            for k in range(1, s)
        )
        assert found == pytest.approx(c["base"] + c["scale"] * eta[:s].sum() ** -c["power"] - c["gain"] * lost)
    short, steps = SHAPES["cosine"][::25], np.arange(20, 401, 10)
    truth = scaling_laws.AnnealingLaw(2.5, 0.1, 0.5, 5.0)
    other = Curve("", "", short, steps, np.array([truth(short[:s]) for s in steps]))
    assert np.abs(law_fits.fit("multi_power", [other])(other) - other.losses).max() < 0.005


def test_sums_and_warm_up():
    first, second = law_fits.sums(np.array([1, 1, 0.5, 0.25, 0]), 0.5)
    assert first.tolist() == [1, 2, 2.5, 2.75, 2.75] and second.tolist() == [0, 0, 0.5, 1, 1.5]
    assert law_fits.sums(np.array([1, 1, 0.5, 0.25, 0]), 0.999)[1][3:] == pytest.approx([1.2495, 2.248251])
    for s in (1, 3, 5):
        assert second[s - 1] == pytest.approx(scaling_laws.areas(np.array([1, 1, 0.5, 0.25, 0])[:s], 0.5).annealed)
    warm = Curve("", "", np.array([0.0, 0.5, 1, 1, 0.5]), np.array([1, 2, 3, 5]), np.arange(4.0)).kept
    assert warm.rates.tolist() == [1, 1, 1, 1, 0.5] and warm.steps.tolist() == [3, 5] and warm.losses.tolist() == [2, 3]


@pytest.mark.parametrize("shape", ["constant", "wsd"])
def test_an_anneal_cannot_be_learned_without_one(shape):
    with pytest.raises(UserError, match=r"the rates hardly fall in these curves \(S2 is at most [05]\.\d% of S1"):
        law_fits.fit("annealing", [curve(shape)])
    few = Curve("a", "b", SHAPES["cosine"], np.array([5000, 6000, N]), np.ones(3))
    with pytest.raises(UserError, match="annealing has 4 constants: the curves have too few looks"):
        law_fits.fit("annealing", [few])
    with pytest.raises(UserError, match=r"record b \(a\) has no look after warm-up"):
        law_fits.fit("steps", [Curve("a", "b", np.arange(1.0, 9.0), np.array([7]), np.ones(1))])


GOLDEN = [
    ([1, 1, 1, 1, 1], "l1", [1, 0.75, 0.5, 0.25, 0]),
    ([1, 1, 1, 1, 1], "l2", [1, 0.75, 0.5, 0.25, 0]),
    ([4, 2, 1, 1, 2], "l2", [0.125, 0.45, 1, 0.2, 0]),
    ([4, 2, 1, 1, 2], "l1", [0.5, 0.83333, 1, 0.33333, 0]),
    ([8, 5, 3, 2, 2, 2, 2, 2, 3, 4], "l1", [0.35, 0.52903, 0.79570, 1, 0.80645, 0.61290, 0.41935, 0.22581, 0.06452, 0]),
    ([8, 5, 3, 2, 2, 2, 2, 2, 3, 4], "l2", [0.08386, 0.20923, 0.53912, 1, 0.78698, 0.57396, 0.36095, 0.14793, 0.02367, 0]),
]


@pytest.mark.parametrize(("norms", "kind", "want"), GOLDEN)
def test_refinement_against_the_golden_table(norms, kind, want):
    np.testing.assert_allclose(refinement.multipliers(np.array(norms), kind), want, atol=6e-6)


def test_refinement_by_parts():
    assert refinement.smoothed(np.array([9, 1, 2, 8, 2, 2, 7, 2, 3, 1]), 0.5).tolist() == [9, 8, 2, 2, 2, 2, 2, 2, 3, 2]
    assert refinement.cleaned(np.array([1, np.nan, 2, 3, 4, np.inf, 5, 6])).tolist() == [3, 4]
    falling = 1 + 9 * np.exp(-np.arange(200) / 20)
    assert [int(np.argmax(refinement.multipliers(falling, kind))) for kind in ("l1", "l2")] == [79, 92]
    vanishing = refinement.multipliers(np.array([1.0, 1, 1, 0, 0]), "l2")
    assert np.isfinite(vanishing).all() and vanishing[-1] == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=8), st.sampled_from(["l1", "l2"]), st.floats(0.1, 10))
def test_refinement_by_its_equation(norms, kind, scale):
    w = [g ** (-1 if kind == "l1" else -2) for g in norms]
    naive = np.array([w[i] * sum(w[i + 1 :]) for i in range(len(w))])
    found = refinement.multipliers(np.array(norms), kind)
    np.testing.assert_allclose(found, naive / naive.max(), atol=1e-9)
    np.testing.assert_allclose(refinement.multipliers(scale * np.array(norms), kind), found, atol=1e-9)


def test_constant_norms_give_linear_decay():
    table = refinement.refined(np.full(104, 3.0), "l1", 33)
    for step in range(50):
        place = Place(0, step, 50, step)
        assert schedules.table(place, values=table.tolist()) == pytest.approx(schedules.linear(place), abs=1e-12)
    for wrong, why in (([1.0] * 13, "needs 14 gradient norms or more"), ([0.0] * 20, "gradient norms above 0")):
        with pytest.raises(UserError, match=why):
            refinement.refined(np.array(wrong), "l1", 3)


SMALL = (
    *("scenario=cpt_synthetic", "scenario.symbols=8", "scenario.states=8", "scenario.order=[0,1]", "scenario.tokens=1280"),
    *("scenario.context=8", "scenario.batch=8", "scenario.eval_tokens=320", "scenario.probe_sequences=2"),
    *("scenario.probe_evenly=2", "model.width=16", "model.depth=1", "model.heads=2", "num_threads=1", "device=cpu"),
    *("learner=infinite", "checkpoint_seconds=0", "gradient_norms=l1"),
)  # two experiences of 20 steps, of which the last 3 are a branch


def small(folder, *words):
    (job,) = compose([*SMALL, *words, f"results_dir={folder}"])
    outcome = run_job(job, command=["clbench", "run"])
    return outcome, record.read(outcome.path)


def test_norms_are_in_the_record_also_of_a_run_that_went_on(tmp_path, monkeypatch, capsys):
    outcome, straight = small(tmp_path / "a")
    noted = straight["gradient_norms"]
    assert noted["kind"] == "l1" and noted["updates"] == {"0": 20, "1": 20}
    assert "gradient_norms" not in straight["config"]
    real = gradient_norms.GradientNorms.add

    def failing(self, place, params):
        real(self, place, params)
        if (place.experience, place.step) == (1, 18):
            raise ValueError("a disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(gradient_norms.GradientNorms, "add", failing)
        assert small(tmp_path / "b")[1]["status"] == "failed"
    again = small(tmp_path / "b")[1]
    assert again["gradient_norms"] == noted and again["curves"] == straight["curves"] and again["resumed"] == 1
    plain = small(tmp_path / "c", "gradient_norms=none")[1]
    assert "gradient_norms" not in plain and plain["curves"] == straight["curves"] and plain["run_id"] == straight["run_id"]

    capsys.readouterr()
    assert answer(["schedule", "fit", str(outcome.path), "--refine", "--experience", "1", "--values", "5"]) == 0
    words = capsys.readouterr().out.splitlines()[-1]
    assert words.startswith("schedule=table 'schedule.values=[") and words.count(",") == 4
    refined = [word.strip("'") for word in words.split(" ")]
    other = small(tmp_path / "d", "learner=constant_lr", *refined)[1]
    values = [float(x) for x in refined[1].partition("[")[2][:-1].split(",")]
    assert other["curves"]["lr"][0] == pytest.approx(0.003 * values[0], rel=1e-5)
    assert answer(["schedule", "fit", str(small(tmp_path / "c")[0].path), "--refine"]) == 2
    assert "holds no gradient norms of experience 0" in capsys.readouterr().err


def test_rates_of_a_record_are_those_of_its_schedule():
    entry = record.read(Path(path(WSD[0])))
    eta = rates.rates(entry, 390)
    held = entry["curves"]
    looks = [(n, lr) for k, n, lr in zip(held["experience"], held["step"], held["lr"], strict=True) if k == 0 and n < 390]
    np.testing.assert_allclose([eta[n] for n, _ in looks], [lr for _, lr in looks], rtol=1e-5)
    assert rates.schedule_label(entry) == "wsd lr=0.0015"
    entry["config"]["learner"]["schedule"]["_target_"] = "somewhere.else"
    lines = rates.rates(entry, 390)
    assert lines[looks[5][0]] == looks[5][1] and np.abs(lines - eta).max() < 4e-4


def test_fit_of_committed_records(tmp_path, capsys):
    files, held, out = [path(one) for one in COSINE], [path(one) for one in WSD], tmp_path / "law.json"
    assert answer(["schedule", "fit", *files, "--held-out", *held, "--json", "--out", str(out)]) == 0
    said = capsys.readouterr()
    made = json.loads(said.out)
    assert said.err == f"written {out}\n" and made["scenario"] == "cpt_synthetic" and made["sets"] == ["language_0"]
    law = made["fits"]["annealing"]
    assert [row["part"] for row in made["rows"]] == ["fitted"] * 2 + ["held out"] * 2
    judged = next(row for row in made["rows"] if row["part"] == "held out")
    curves = [rates.curve(record.read(Path(one))) for one in held]
    fitted = law_fits.loaded(law)
    assert judged["error"] == pytest.approx(np.mean([fitted(c)[-1] - c.losses[-1] for c in curves]))
    assert judged["low"] <= judged["error"] <= judged["high"] and judged["runs"] == 3
    noted = "largest rates 0.0015, 0.003: a law takes less rate for less training; --peak 0.003 fits one alone"
    assert made["most_exact"] == "wsd lr=0.0015 n=390" and made["notes"] == [noted]
    assert answer(["schedule", "show", "cosine", "linear", "--steps", "390", "--lr", "0.003", "--fitted", str(out)]) == 0
    shown = capsys.readouterr().out.split("\n\n")[-1]
    assert shown.startswith("fitted law 'annealing' after experience 0") and shown.count("\n") == 3
    assert answer(["schedule", "fit", *files]) == 0
    text = capsys.readouterr().out
    assert "nothing is held out: these are runs of one schedule" in text and "fitted to these" in text


def test_a_law_of_one_peak_is_exact_and_another_peak_spoils_it(capsys):
    """All committed runs of cpt_synthetic: schedules held out in turn, the law against its control."""
    made = {}
    for name, words in (("one", ("--peak", "0.003")), ("several", ())):
        assert answer(["schedule", "fit", str(RECORDS), "--scenario", "cpt_synthetic", *words, "--json"]) == 0
        made[name] = json.loads(capsys.readouterr().out)
    errors = {name: found["held_out_error"] for name, found in made.items()}
    assert errors["one"]["annealing"] < 0.002 and errors["one"]["steps"] > 4 * errors["one"]["annealing"]
    assert errors["several"]["annealing"] > errors["several"]["steps"], "the law loses"
    held = [row for row in made["several"]["rows"] if row["part"] == "held out" and "lr=0.001 " in row["schedule"]]
    off = {law: [abs(row["error"]) for row in held if row["law"] == law] for law in ("annealing", "steps")}
    assert len(off["annealing"]) == 2 and min(off["annealing"]) > 2 * max(off["steps"]), "at a third of the rate"
    assert all("has nearly the rates of" in note for note in made["one"]["notes"])
    assert sum(note.startswith("largest rates 0.001, 0.0015, 0.003:") for note in made["several"]["notes"]) == 1
    assert not any("lr=0.001" in row["schedule"] for row in made["one"]["rows"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["COSINE", "--peak", "0.1"], "no run with --peak 0.1: the largest rates are 0.003"),
        (["COSINE", "--refine", "--peak", "0.1"], "--peak has no effect with --refine"),
        (["nowhere.json"], "nowhere.json does not exist"),
        (["COSINE", "--fade", "0"], "--fade must be above 0 and at most 1, got 0"),
        (["COSINE", "--out", "a.txt"], "--out a.txt: the name must end in .json, .svg, .png or .pdf"),
        (["COSINE", "--held-out", "COSINE"], "record 1e72bf5c09da093e is given to be fitted and to be held out"),
        (["COSINE", "--values", "3"], "--values has no effect without --refine"),
        (["COSINE", "--refine", "--law", "annealing"], "--law has no effect with --refine"),
        (["COSINE", "--refine"], "record 1e72bf5c09da093e holds no gradient norms of experience 0: run it with"),
        (["COSINE", "--scenario", "cpt_iid"], "no finished run of pre-training of scenario cpt_iid in "),
        (["COSINE", "--law", "power"], "argument --law: invalid choice: 'power'"),
    ],
)
def test_mistakes_are_one_line(capsys, words, message):
    code = answer(["schedule", "fit", *(path(COSINE[0]) if word == "COSINE" else word for word in words)])
    err = capsys.readouterr().err
    assert code == 2 and err.startswith(f"clbench: {message}") and err.count("\n") == 1


def test_a_held_out_run_that_is_a_fitted_one_so_far(tmp_path, capsys):
    other = record.load(Path(path(COSINE[0]))) | {"run_id": "0" * 16}
    other.pop("checksum")
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert answer(["schedule", "fit", path(COSINE[0]), "--held-out", str(tmp_path / "other.json")]) == 2
    said = f"clbench: record {'0' * 16} is held out, but the same as {COSINE[0]} until its first experience ends"
    assert capsys.readouterr().err.startswith(said)
    constant = "constant"
    near = schedule_fit._near(
        {"a": [curve("cosine")], constant: [curve(constant)]}, {"b": [curve("cosine")], "w": [curve("wsd")]}
    )
    assert near == ["a has nearly the rates of b: that it is predicted from it says little"]


def test_records_that_do_not_belong_together(tmp_path, capsys):
    entry = record.load(Path(path(COSINE[0])))
    entry["config"]["learner"]["weight_decay"] = 0.2
    other = entry | {"run_id": "0" * 16}
    other.pop("checksum")
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert answer(["schedule", "fit", path(COSINE[0]), str(tmp_path / "other.json")]) == 2
    err = capsys.readouterr().err
    assert "differ in learner.weight_decay: 0.1 and 0.2; a law holds for one stream" in err and err.count("\n") == 1
    (tmp_path / "law.json").write_text("{}")
    assert answer(["schedule", "show", "cosine", "--fitted", str(tmp_path / "law.json")]) == 2
    assert "holds no fitted law: clbench schedule fit RECORD" in capsys.readouterr().err
