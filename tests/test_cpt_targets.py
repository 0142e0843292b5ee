"""The seven findings: each on runs made up so that it holds, fails, or cannot be told."""

import pytest

from clbench.report import targets
from clbench.report.runs import Run
from clbench.report.targets import Found, judged

BASE = {"learner.replay.share": 0, "learner.lr": 3e-3, "learner.schedule.warmup": 0.01, "scenario.shift": 1.0}


def made(seed=0, learner="rewarm_replay", scenario="cpt_synthetic", values=None, iid=False, rise=0.1, **settings):
    settings = BASE | {key.replace("__", "."): value for key, value in settings.items()}
    given = {"final_loss": 2.0, "newest_loss": 1.5, "forgetting_after": 0.5} | (values or {})
    variant = f"{sorted(settings.items())}{learner}{scenario}"
    loss = {"usable": True, "iid": iid, "rise": rise}
    return Run("", "ok", scenario, learner, "m", seed, variant, "", "s", (), False, given, {}, settings, "", loss)


def lines(runs, letter):
    return [row for row in targets.table(runs).rows if row["target"].startswith(f"({letter})")]


def test_without_runs_every_target_says_what_it_needs():
    rows = targets.table([]).rows
    assert len(rows) == 7 and all(row["verdict"].startswith("no runs to tell: ") for row in rows)


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [((0.1, 0.2), "holds"), ((-0.1, 0.2), "not shown"), ((-0.2, 0.0), "fails"), ((0.2, 0.6), "not shown")],
)
def test_an_interval_is_judged(interval, verdict):
    assert judged(Found("", "", (), low=0, high=0.5), *interval) == verdict


def test_a_shift():
    runs = [
        made(s, values={"forgetting_after": f + 0.01 * s}, scenario__shift=x)
        for s in range(3)
        for x, f in ((0.3, 0.2), (1.0, 0.9))
    ]
    (row,) = lines(runs, "a")
    assert row["value"] == pytest.approx(0.7) and row["verdict"] == "holds" and row["seeds"] == 3
    runs = [
        made(s, scenario=n, values={"forgetting_after": f})
        for s in range(2)
        for n, f in (("cpt_text_strong", 0.1), ("cpt_text_weak", 0.4))
    ]
    (row,) = lines(runs, "a")
    assert row["verdict"] == "fails" and row["value"] == pytest.approx(-0.3)


def test_b_recovery_and_c_cost():
    runs = [made(s, values={"recovery_ratio": 0.6 + 0.1 * s}, learner__replay__share=0.01) for s in range(2)]
    assert lines(runs, "b")[0]["verdict"] == "holds"
    assert lines([made(values={"recovery_ratio": 0.4}, learner__replay__share=0.01)], "b")[0]["verdict"] == "fails (1 seed)"
    runs = [
        made(s, values={"newest_loss": 1.5 + d}, learner__replay__share=x) for s in range(2) for x, d in ((0, 0), (0.05, 0.004))
    ]
    assert lines(runs, "c")[0]["value"] == pytest.approx(0.004) and lines(runs, "c")[0]["verdict"] == "holds"
    assert "no runs" in lines(runs[:1], "c")[0]["verdict"]


def test_d_warmup_and_e_rate():
    runs = [
        made(s, values={"final_loss": 2 + d}, learner__schedule__warmup=x)
        for s in range(2)
        for x, d in ((0.01, 0), (0.1, -0.01))
    ]
    assert lines(runs, "d")[0]["verdict"] == "holds" and lines(runs, "d")[0]["value"] == pytest.approx(0.01)
    runs = [
        made(s, values={"forgetting_after": f, "newest_loss": n}, learner__lr=x)
        for s in range(2)
        for x, f, n in ((1e-3, 0.2, 1.6), (3e-3, 0.4, 1.5))
    ]
    assert [(round(row["value"], 9), row["verdict"]) for row in lines(runs, "e")] == [(0.2, "holds"), (0.1, "holds")]
    other = [made(values={"final_loss": 9}, learner__lr=1, learner__schedule__warmup=0.5)]  # differs in two settings: no pair
    assert len(lines([*runs, *other], "e")) == 2 and "no runs" in lines([*runs, *other], "d")[0]["verdict"]


def test_f_bump_and_g_alike():
    runs = [made(s, iid=True, rise=0.05 + 0.01 * s, scenario="cpt_iid") for s in range(2)]
    assert lines(runs, "f")[0]["verdict"] == "holds"
    runs += [made(s, "infinite", iid=True, scenario="cpt_iid", values={"final_loss": 2.05}) for s in range(2)]
    (row,) = lines(runs, "g")
    assert row["verdict"] == "fails" and row["value"] == pytest.approx(0.05)
    assert "no runs" in lines([made(iid=False)], "f")[0]["verdict"]
