"""`continues=RECORD`: a learner goes on in a longer stream as if that had been its stream from the beginning; refusals."""

import signal

import pytest
from test_resume import RUN, kill_when, reached

from clbench.config.compose import compose
from clbench.config.registry import conf_dir
from clbench.interfaces import UserError
from clbench.records import record
from clbench.records.rows import rows_of
from clbench.records.variant import variant
from clbench.report import cards
from clbench.run.runner import prepare, run_job

SMALL = [
    *("num_threads=1", "arithmetic=reference", "scenario.limit_train=8", "scenario.limit_test=10"),
    *("scenario.budget.epochs=1", "save_model=true"),
]
FOUR, SIX = "scenario.num_classes=4", "scenario.num_classes=6"


def config(folder, *words):
    (job,) = compose([*SMALL, *words, f"results_dir={folder}"])
    return job


def finished(folder, *words):
    outcome = run_job(config(folder, *words))
    assert outcome.status == "ok", outcome.text
    return outcome.path, record.read(outcome.path)


HAT = ("learner=hat", "scenario=til_digits", "model=mlp", "model.kwargs.img_size=8")
LEARNERS = [("learner=ncm",), ("learner=replay", "learner.memory=12"), ("learner=joint",), ("learner=slca",), HAT]


@pytest.mark.parametrize("words", LEARNERS, ids=lambda words: words[0])
def test_it_is_the_run_that_a_longer_stream_would_have_been(tmp_path, words):
    path, short = finished(tmp_path, *words, FOUR)
    _, whole = finished(tmp_path / "whole", *words, SIX)
    _, on = finished(tmp_path, *words, SIX, f"continues={path}")
    assert on["run_id"] != whole["run_id"] and on["config"]["continues"].startswith(short["run_id"])
    assert on["final_state_sha256"] == whole["final_state_sha256"]
    assert rows_of(on)["rows"] == rows_of(whole)["rows"] and rows_of(on)["sets"] == rows_of(whole)["sets"]
    assert on["experiences"] == whole["experiences"] and on["resumed"] == 0
    assert on["visits"]["new"] < whole["visits"]["new"] or not whole["visits"]["new"]


def test_other_data_behind_it_and_a_repeat(clbench, small):
    """The command line: digits, then a data set of one's own; `verify` repeats what came after."""
    clbench("run", "learner=ncm", "save_model=true", *small)
    (first,) = clbench.records()
    longer = ("scenario.operators=[{concatenate: {datasets: [digits], limit_train: 5, limit_test: 5, increment: 5}}]",)
    words = ("run", "learner=ncm", *small, *longer, f"continues=results/records/{first['run_id']}.json")
    assert "goes on after experience" in (done := clbench(*words)).stdout + done.stderr
    both = {r["run_id"]: r for r in clbench.records()}
    (second,) = (r for r in both.values() if r["run_id"] != first["run_id"])
    done, more = len(first["experiences"]), len(second["experiences"])
    assert more == done + 2 and len(second["correct"]) == more
    assert [row[:done] for row in second["correct"][:done]] == first["correct"]
    assert all(row[done:] == [None] * 2 for row in second["correct"][:done])
    assert None not in second["correct"][-1]
    said = clbench("verify", "--rerun", f"results/records/{second['run_id']}.json").stdout
    assert "1 repeated: 1 verified" in said, said
    assert "is done already" in clbench(*words).stdout


def test_seeds_are_one_row(tmp_path):
    made = []
    for seed in (0, 1):
        path, _ = finished(tmp_path, "learner=ncm", FOUR, f"seed={seed}")
        made.append(finished(tmp_path, "learner=ncm", SIX, f"seed={seed}", f"continues={path}")[1])
    assert variant(made[0]) == variant(made[1]) and made[0]["config"]["continues"] != made[1]["config"]["continues"]
    assert variant(made[0]) != variant(finished(tmp_path, "learner=ncm", SIX)[1])
    said = cards.command(made[1], ["0", "1"], conf_dir()).split()
    assert said[:2] == ["clbench", "run"] and "-m" not in said and said[-1] == "seed=1"
    assert f"continues=results/records/{path.stem}.json" in said


def test_a_killed_one_goes_on(clbench):
    """Inside the first new experience: the same final state as without the kill."""
    words = (*RUN, "learner=finetune", "scenario.budget.epochs=6")
    finals = []
    for results in ("straight", "killed"):
        clbench(*words, "scenario.num_classes=4", "save_model=true", f"results_dir={results}")
        (first,) = clbench.records(results)
        on = (*words, f"continues={results}/records/{first['run_id']}.json")
        if results == "killed":
            process, _, _ = kill_when(clbench, on, results, reached("fit-0.pt"))
            assert process.returncode == -signal.SIGKILL
        clbench(*on, f"results_dir={results}")
        finals += [r for r in clbench.records(results) if r["run_id"] != first["run_id"]]
    straight, killed = finals
    assert straight["status"] == killed["status"] == "ok" and straight["run_id"] == killed["run_id"]
    assert killed["final_state_sha256"] == straight["final_state_sha256"] and killed["correct"] == straight["correct"]
    assert killed["visits"] == straight["visits"]


def test_what_is_refused_before_anything_is_trained(tmp_path):
    path, _ = finished(tmp_path, "learner=ncm", FOUR)
    gone, _ = finished(tmp_path / "bare", "learner=ncm", FOUR, "save_model=false")

    def refused(why, *words, of=path):
        with pytest.raises(UserError, match=why):
            prepare(config(tmp_path, "learner=ncm", *words, f"continues={of}"))

    refused("has learned 2 experiences, this stream has 2", FOUR)
    refused(r"begins in another way \(experiences", SIX, "scenario.order=random")
    refused(r"begins in another way \(experiences\)", SIX, "scenario.limit_train=7")
    refused(r"begins in another way \(evaluation sets\)", SIX, "scenario.limit_test=7")
    refused("has learner ncm, this run another", SIX, "learner=slda")
    refused("began with other weights than this run", SIX, "model=nano_random")
    refused("save_predictions=True does not go with continues", SIX, "save_predictions=true")
    refused("run it with save_model=true", SIX, of=gone)
    refused("nowhere", SIX, of=tmp_path / "nowhere.json")
    with pytest.raises(UserError, match="it is for labelled images"):
        prepare(compose(["scenario=cpt_synthetic", f"results_dir={tmp_path}", f"continues={path}"])[0])
