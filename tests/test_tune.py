"""Tuning: the grammar, the streams and what they share, trials that fail or are done, one evaluation, marks, budget."""

import json
from argparse import Namespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clbench.config import compose
from clbench.interfaces import UserError
from clbench.records import record
from clbench.report import table
from clbench.streams.manifest import Manifest
from clbench.tuning import options as tuning_options
from clbench.tuning import space as tuning_space
from clbench.tuning import streams as tuning_streams
from clbench.tuning import study as tuning_study
from clbench.tuning import trials as tuning_trials
from clbench.tuning.space import Variable, begin, variables

TINY = (
    "scenario.num_classes=4",
    "scenario.limit_train=20",
    "scenario.limit_test=10",
    "scenario.budget.epochs=1",
    "num_threads=1",
    "feature_store=off",
)
NCM = ("learner=ncm", "learner.metric=euclidean,cosine", "tune.sampler=grid")


@pytest.fixture
def direct(monkeypatch):
    """Runs in this process, so that a trial is a matter of a tenth of a second -> the jobs that were run, as they come."""
    torch = pytest.importorskip("torch")
    jobs = []

    def alone(work, job, command, told):
        jobs.append((job, command, told))
        try:
            return {**work(job, command, told), "stopped": False}
        except SystemExit:
            return {"run_id": "", "status": "died", "text": "left", "stopped": False}

    for module in (tuning_study, tuning_trials):
        monkeypatch.setattr(module, "run_alone", alone)
    monkeypatch.setattr(tuning_trials, "show_log", lambda shown: None)
    threads, exact = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield jobs
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(exact)


def tune(results, *words: str) -> int:
    return tuning_study.run(Namespace(overrides=[*TINY, *words, f"results_dir={results}"]), ["clbench", "tune", *words])


def study_of(results) -> dict:
    (path,) = (results / "tuning").glob("*.json")
    return json.loads(path.read_text())


def records(results) -> list[dict]:
    return record.read_all(results / "records")[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["learner.lr=intervall(0.1,1)"], "no function 'intervall'; did you mean 'interval'?"),
        (["learner.lr=tag(lgo,interval(0.1,1))"], "no tag 'lgo'; did you mean 'log'?"),
        (["learner.lr=interval(1,0.1)"], "must go from a smaller to a larger number"),
        (["learner.lr=tag(log,interval(0,1))"], "must begin above 0"),
        (["learner.lrr=interval(0.1,1)"], "no key 'learner.lrr'; did you mean 'learner.lr'?"),
        (["learner.lr=0.1,fast"], "learner.lr must be float, got 'fast'"),
        (["learner.align_epochs=interval(1,5)"], "for whole numbers write int(interval(a,b))"),
        (["learner=ncm,slac"], "no learner 'slac'; did you mean 'slca'?"),
        (["learner.lr=0.1"], "nothing to tune"),
        (["scenario.increment=1,2"], "is the stream's, not the method's"),
        (["num_threads=1,2"], "does not belong to the method"),
        (["learner.lr=0.1,0.2", "tune.protocl=test"], "did you mean 'tune.protocol'?"),
        (["learner.lr=0.1,0.2", "tune.protocol=two_fase"], "did you mean 'two_phase'?"),
        (["learner.lr=0.1,0.2", "tune.sampler=tpee"], "did you mean 'tpe'?"),
        (["learner.lr=0.1,0.2", "tune.metric=last_marco"], "did you mean 'last_macro'?"),
        (["learner.lr=0.1,0.2", "tune.space=scla"], "did you mean 'slca'?"),
        (["learner.lr=0.1,0.2", "tune.trials=many"], "tune.trials must be a number, got 'many'"),
        (["learner.lr=0.1,0.2", "tune.trials=0"], "tune.trials must be in 1..100000, got 0"),
        (["learner.lr=0.1,0.2", "tune.seeds=0,0"], "whole numbers from 0, each once"),
        (["learner.lr=interval(0,1)", "tune.sampler=grid"], "learner.lr is an interval"),
        (["learner.lr=0.1,0.2", "tune.sampler=grid", "tune.trials=1"], "tries all 2 choices"),
        (["learner.lr=0.1,0.2", "tune.sampler=grid", "tune.seed=1"], "tune.seed has no effect with tune.sampler=grid"),
        (["learner.lr=0.1,0.2", "tune.on=rest", "tune.protocol=test"], "tune.on has no effect with tune.protocol=test"),
        (["learner.lr=0.1,0.2", "tune.on=cil_digitz"], "no scenario 'cil_digitz'; did you mean 'cil_digits'?"),
        (["learner.lr=0.1,0.2", "tune.protocol=first_experience", "tune.metric=forgetting"], "not defined on one experience"),
        (["learner.lr=0.1,0.2", "seed=x"], "seed must be whole numbers"),
        (["learner.lr=0.1,0.2", "machine=joblib"], "has no effect with tune"),
        (["learner.lr=0.1,0.2", "force=true"], "has no effect with tune"),
        (["learner.lr=0.1,0.2", "scenario.num_classes=null"], "leaves 0 of 10 classes to tune on"),
        (["learner.lr=0.1,0.2", "tune.on=cil_digits", "tune.scenario.num_classes=4"], "samples that cil_digits is tested on"),
    ],
)
def test_mistakes_are_answered_before_a_trial(tmp_path, words, message):
    with pytest.raises(UserError) as caught:
        tune(tmp_path / "results", *words)
    assert message in str(caught.value)
    assert not list(tmp_path.rglob("*.json"))


def test_ranges_become_variables():
    words = ["learner.a=1,2,1", "learner.b=range(1,4)", "learner.c=interval(0,1)", "learner.d=tag(log,int(interval(1,100)))"]
    fixed, spaces = compose.searched([*words, "learner=ncm", "seed=0,1"])
    assert fixed == ["learner=ncm"] and spaces.pop("seed") == ["0", "1"]
    a, b, c, d = variables(spaces)
    assert a == Variable("learner.a", ("1", "2")) and b.values == ("1", "2", "3")
    assert c == Variable("learner.c", (), 0.0, 1.0) and d == Variable("learner.d", (), 1.0, 100.0, True, True)
    assert (c.about(), d.about()) == ("interval(0,1)", "tag(log,int(interval(1,100)))")
    assert tuning_space.size([a, b]) == 6 and tuning_space.size([a, c]) is None


def test_a_file_of_ranges_gives_way_to_the_command_line(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("learner.lr: interval(0,1)\nlearner.slow: 0.1,0.2\n")
    words = tuning_options.read([f"tune.space={own}", "learner.lr=0.5"]).overrides
    assert words == ("learner.slow=0.1,0.2", "learner.lr=0.5")
    own.write_text("- 1\n")
    with pytest.raises(UserError, match="must hold lines like"):
        tuning_options.read([f"tune.space={own}"])


@pytest.mark.parametrize("path", sorted((tuning_options.conf_dir() / "tune").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_spaces_fit_their_learners(path):
    options = tuning_options.read([f"learner={path.stem}", f"tune.space={path.stem}"])
    fixed, spaces = compose.searched(options.overrides)
    tuning_study._check_ends(fixed, variables(spaces))


@given(
    low=st.floats(1e-6, 1e6),
    ratio=st.floats(1.001, 1e6),
    share=st.floats(0, 1),
    whole=st.booleans(),
)
def test_numbers_stay_inside(low, ratio, share, whole):
    low, high = (round(low) + 1, round(low * ratio) + 2) if whole else (low, low * ratio)
    v = Variable("learner.lr", (), float(low), float(high), whole=whole)
    word = v.number(low + share * (high - low))
    assert low * (1 - 1e-11) <= float(word) <= high * (1 + 1e-11)
    assert not whole or word == str(int(word))


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_same_seed_and_values_give_the_same_proposals(sampler):
    pytest.importorskip("optuna")
    space = (Variable("a", ("x", "y")), Variable("b", (), 0.001, 1.0, log=True), Variable("c", (), 1, 9, whole=True))

    def course(seed: int) -> list[dict[str, str]]:
        search, made = begin(sampler, space, seed, 12, False), []
        for i in range(12):
            made.append(search.ask())
            search.tell(None if i == 4 else -abs(float(made[-1]["b"]) - 0.1))
        return made

    first = course(0)
    assert first == course(0) != course(1)
    assert all(p["a"] in ("x", "y") and 0.001 <= float(p["b"]) <= 1 and int(p["c"]) in range(1, 10) for p in first)


def test_the_grid_is_every_combination():
    search = begin("grid", (Variable("a", ("1", "2")), Variable("b", ("x", "y", "z"))), 0, 6, False)
    made = [tuple(search.ask().values()) for _ in range(6)]
    assert made == [(a, b) for a in "12" for b in "xyz"]


def scenario_of(*words: str):
    node = compose.compose(words)[0]["scenario"]
    return compose.build(node), node


@pytest.mark.parametrize(("classes", "sizes"), [(6, [2, 2]), (4, [2, 2]), (7, [2]), (8, [2])])
def test_the_rest_shares_nothing(classes, sizes):
    evaluation, node = scenario_of(f"scenario.num_classes={classes}")
    tuned = tuning_streams.rest(evaluation, node)
    assert [len(e.classes) for e in tuned.manifest.experiences] == sizes
    assert tuned.manifest.class_order == tuple(range(classes, classes + sum(sizes)))
    found = tuning_streams.guard("two_phase", tuned, evaluation)
    assert (found["shared_test"], found["shared_train"], found["shared_classes"]) == (0, 0, 0)
    labels = evaluation.dataset.y
    for step, evals in zip(tuned.manifest.experiences, tuned.manifest.evals, strict=True):
        every = set(np.flatnonzero(np.isin(labels, step.classes)).tolist())
        assert set(step.train.tolist()) | set(evals.ids.tolist()) == every


def test_the_rest_of_task_incremental_discloses_tasks():
    evaluation, node = scenario_of("scenario=til_digits", "scenario.num_classes=6")
    tuned = tuning_streams.rest(evaluation, node).manifest
    assert tuned.kind == "task_incremental" and [e.task for e in tuned.experiences] == [0, 1] == [e.task for e in tuned.evals]


def test_the_first_experience_stays_in_its_training_data():
    evaluation, _ = scenario_of()
    tuned, first = tuning_streams.first_experience(evaluation, 0.25), evaluation.manifest.experiences[0]
    (step,), (aside,) = tuned.manifest.experiences, tuned.manifest.evals
    assert sorted([*step.train, *aside.ids]) == sorted(first.train)
    labels = evaluation.dataset.y
    for c in first.classes:
        n = int((labels[first.train] == c).sum())
        assert int((labels[aside.ids] == c).sum()) == int(n * 0.25 + 0.5)
    found = tuning_streams.guard("first_experience", tuned, evaluation)
    assert found["shared_test"] == 0 and found["shared_train"] == len(first.train)


def test_what_streams_share_is_counted():
    """Training 0-287 of classes 0, 1 and so on: two streams of the same data, one half of the other's classes."""
    (whole, _), (part, _) = scenario_of(), scenario_of("scenario.num_classes=2")
    found = tuning_streams.shared(part.manifest, whole.manifest)
    assert found["same_data"] and found["shared_classes"] == 2
    assert found["shared_test"] == len(part.manifest.evals[0].ids) == 72
    assert found["shared_train"] == len(part.manifest.experiences[0].train) == 288
    other = Manifest.from_json(part.manifest.to_json().replace(part.manifest.dataset["sha256"], "0" * 64))
    assert tuning_streams.shared(other, whole.manifest) == {
        "same_data": False,
        "shared_test": 0,
        "shared_train": 0,
        "shared_classes": None,
    }


@pytest.mark.parametrize("protocol", ["two_phase", "first_experience", "validation", "test"])
def test_each_protocol_tunes_freezes_and_evaluates_once(tmp_path, direct, protocol, capsys):
    results = tmp_path / "results"
    assert tune(results, *NCM, f"tune.protocol={protocol}", "seed=0,1") == 0
    study, made = study_of(results), records(results)
    assert [r["seed"] for r in made] in ([0, 1], [1, 0]) and len(direct) == 4
    trials = records(results / "tuning" / study["study"])
    assert {r["run_id"] for r in trials} == {run for row in study["trials"] for run in row["runs"]} and len(trials) == 2
    best = max(study["trials"], key=lambda row: (row["value"], -row["number"]))
    assert study["sealed"] and study["chosen"] == best["chosen"] and study["best_value"] == best["value"]
    for entry in made:
        told = entry["tuning"]
        assert entry["config"]["learner"]["metric"] == study["chosen"]["learner.metric"]
        assert (told["protocol"], told["study"], told["trials"], told["runs"]) == (protocol, study["study"], 2, 2)
        assert told["seconds"] == pytest.approx(sum(r["seconds"]["total"] for r in trials)) and told["failed"] == 0
        assert told["space"] == {"learner.metric": "euclidean,cosine"} and told["metric"] == "last_macro"
        assert ("test_tuned" in entry["marks"]) == (protocol == "test")
        same = told["on"]["manifest_sha256"] == entry["scenario"]["manifest_sha256"]
        assert same == (protocol == "test") and (told["on"]["shared_test"] == 0) == (protocol != "test")
    (row,) = table.rows(made)
    assert ("test_tuned" in row["marks"].split()) == (protocol == "test") and row["n_seeds"] == 2
    before = {path: path.read_bytes() for path in results.rglob("*.json")}
    capsys.readouterr()
    assert tune(results, *NCM, f"tune.protocol={protocol}", "seed=0,1") == 0
    said = capsys.readouterr()
    assert "its choice was made before" in said.out and "evaluated before" not in said.err
    assert len(direct) == 6, "no trial is run again"
    assert before == {path: path.read_bytes() for path in results.rglob("*.json")}


def test_the_same_choice_by_hand_is_the_same_run(tmp_path, direct, capsys):
    """A record that is there is not overwritten, and the study says by what it was made."""
    from clbench.run.runner import run_job

    results = tmp_path / "results"
    for metric in ("euclidean", "cosine"):
        words = [*TINY, "learner=ncm", f"learner.metric={metric}", f"results_dir={results}"]
        assert run_job(compose.compose(words)[0], command=["clbench", "run", "by", "hand"]).status == "ok"
    before = {path: path.read_bytes() for path in (results / "records").iterdir()}
    assert tune(results, *NCM, "tune.protocol=validation") == 0
    assert "was evaluated before, by: clbench run by hand; its record is not overwritten" in capsys.readouterr().err
    assert tune(results, *NCM, "tune.protocol=test") == 1
    assert "lacks the mark test_tuned" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (results / "records").iterdir()}


def test_a_repeat_keeps_the_mark(tmp_path, direct):
    from clbench.run.runner import run_job

    results = tmp_path / "results"
    assert tune(results, *NCM, "tune.protocol=test") == 0
    (entry,) = records(results)
    words = [*TINY, "learner=ncm", f"learner.metric={entry['config']['learner']['metric']}", f"results_dir={results}"]
    assert run_job(compose.compose([*words, "force=true"])[0], command=["clbench", "run"]).status == "ok"
    (again,) = records(results)
    assert again["marks"] == ["test_tuned"] and again["tuning"] == entry["tuning"]


BAD = """
from clbench.learners.ncm import NearestClassMean

class Bad(NearestClassMean):
    def __init__(self, model, runtime, *, how: str = "fine"):
        super().__init__(model, runtime)
        self.how = how

    def learn(self, experience):
        if self.how == "raise":
            raise RuntimeError("on purpose")
        if self.how == "exit":
            raise SystemExit(3)
        return super().learn(experience)
"""


def test_a_trial_that_fails_stops_nothing(tmp_path, direct, capsys):
    source = tmp_path / "bad.py"
    source.write_text(BAD)
    words = (f"learner._target_={source}:Bad", "+learner.how=raise,exit,fine", "tune.sampler=grid")
    results = tmp_path / "results"
    assert tune(results, *words, "tune.protocol=first_experience") == 0
    study = study_of(results)
    assert study["chosen"] == {"+learner.how": "fine"} and study["failed"] == 2
    assert "RuntimeError: on purpose" in study["trials"][0]["why"]
    assert "[1/3] +learner.how=raise  failed: " in capsys.readouterr().out
    assert tune(tmp_path / "none", *(w.replace(",fine", "") for w in words), "tune.protocol=first_experience") == 1
    assert not records(tmp_path / "none") and not study_of(tmp_path / "none")["sealed"]


def test_a_study_that_was_stopped_goes_on(tmp_path, direct, monkeypatch):
    results, done = tmp_path / "results", []
    usual = tuning_trials.run_alone

    def stops(*arguments):
        if len(done) == 1:
            return {"run_id": "", "status": "interrupted", "text": "stopped", "stopped": True}
        done.append(1)
        return usual(*arguments)

    monkeypatch.setattr(tuning_trials, "run_alone", stops)
    with pytest.raises(KeyboardInterrupt):
        tune(results, *NCM, "tune.protocol=validation")
    half = study_of(results)
    assert len(half["trials"]) == 1 and "sealed" not in half and not records(results)
    (first,) = (results / "tuning" / half["study"] / "records").glob("*.json")
    stamp = first.read_bytes()
    monkeypatch.setattr(tuning_trials, "run_alone", usual)
    assert tune(results, *NCM, "tune.protocol=validation") == 0
    assert first.read_bytes() == stamp and len(study_of(results)["trials"]) == 2


def test_a_choice_that_comes_back_costs_nothing(tmp_path, direct):
    pytest.importorskip("optuna")
    words = ("learner=ncm", "learner.metric=euclidean,cosine", "tune.sampler=random", "tune.trials=5", "tune.seeds=0,1")
    assert tune(tmp_path / "results", *words) == 0
    study = study_of(tmp_path / "results")
    fresh = [row for row in study["trials"] if "repeats" not in row]
    assert len(study["trials"]) == 5 and len(fresh) == 2 and study["runs"] == 4 and len(direct) == 5
    assert all(len(row["values"]) == 2 and row["value"] == pytest.approx(np.mean(row["values"])) for row in study["trials"])
    assert study["seconds"] == pytest.approx(sum(row["seconds"] for row in fresh))


def test_lower_is_better_for_forgetting(tmp_path, direct):
    assert tune(tmp_path / "results", *NCM, "tune.protocol=validation", "tune.metric=forgetting") == 0
    study = study_of(tmp_path / "results")
    assert study["best_value"] == min(row["value"] for row in study["trials"])


def test_classes_that_are_tuned_on_are_marked(tmp_path, direct, capsys):
    """The last images of each class are tuned on, the first are tested on: no sample is shared, the classes are."""
    whole, _ = scenario_of("scenario.validation=0.3", "scenario.evaluate_on=validation", "scenario.num_classes=4")
    path = tmp_path / "stream.json"
    whole.manifest.save(path)
    words = ("tune.on=manifest", f"tune.scenario.path={path}")
    assert tune(tmp_path / "results", *NCM, *words) == 0
    assert "4 classes of cil_digits are also tuned on" in capsys.readouterr().err
    (entry,) = records(tmp_path / "results")
    assert entry["marks"] == ["classes_tuned"] and entry["tuning"]["on"]["shared_test"] == 0


def test_a_damaged_study_is_named(tmp_path, direct):
    results = tmp_path / "results"
    assert tune(results, *NCM, "tune.protocol=validation") == 0
    (path,) = (results / "tuning").glob("*.json")
    path.write_text("{")
    with pytest.raises(UserError, match="remove it to count the trials anew"):
        tune(results, *NCM, "tune.protocol=validation")


def test_the_command_line(clbench):
    """Processes of their own, the record, the mark in the report, and nothing of the trials in the leaderboard."""
    done = clbench("tune", *TINY, *NCM, "tune.protocol=test")
    assert "[2/2] learner.metric=cosine  last_macro " in done.stdout and "chosen learner.metric=" in done.stdout
    (entry,) = clbench.records()
    assert entry["machine"]["command"].startswith("clbench run scenario.num_classes=4")
    said = clbench("report").stdout
    assert "test_tuned" in said and "1 records: 1 ok" in said
    assert clbench("verify").stdout.startswith("verified ")
    assert clbench("tune", "learner.lrr=1,2", code=2).stderr.startswith("clbench: no key 'learner.lrr'; did you mean")
