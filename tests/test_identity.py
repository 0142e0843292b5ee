"""Code from outside is in a run's identity; what a learner is given at test time names no class; failures are named."""

import pathlib
import textwrap

import numpy as np
import pytest
import torch

from clbench.config import compose
from clbench.evaluation.evaluators import Answered
from clbench.interfaces import UserError
from clbench.records import record
from clbench.run import provenance
from clbench.streams.eval_sets import opaque, open_eval
from clbench.streams.images.pixels import Pipeline, make_profile
from clbench.testing.contract import check_learner
from clbench.testing.trial import small_stream

LEARNER = """
    import helper
    from clbench import Capabilities
    from clbench.learners.ncm import NearestClassMean


    class Scaled(NearestClassMean):
        def predict(self, batch):
            return super().predict(batch) * helper.SCALE
"""


def write(folder: pathlib.Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))


def ids_of(clbench) -> set[str]:
    return {entry["run_id"] for entry in clbench.records()}


def test_helpers_of_a_loose_learner_count(clbench, small):
    words = ("run", "learner._target_=method.Scaled", "num_threads=1", *small)
    write(clbench.folder, method=LEARNER, helper="SCALE = 1.0")
    clbench(*words)
    before = ids_of(clbench)
    assert "done already" in clbench(*words).stdout
    write(clbench.folder, helper="SCALE = -1.0")
    assert "done already" not in clbench(*words).stdout and len(ids_of(clbench)) == 2 and before < ids_of(clbench)
    assert "2 self-reported, 0 failed" in clbench("verify").stdout


def test_a_lone_file_has_the_version_that_it_always_had(tmp_path, monkeypatch):
    import hashlib
    import sys

    write(tmp_path, lonely_method="import torch\n\n\nclass Alone:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import lonely_method

    digest = hashlib.sha256((tmp_path / "lonely_method.py").read_bytes()).hexdigest()[:16]
    assert provenance._version("lonely_method.Alone", lonely_method.Alone) == f"lonely_method.Alone {digest}"
    del sys.modules["lonely_method"]


def test_a_checkout_around_a_loose_file_does_not_count(clbench, monkeypatch):
    """A loose learner in the folder of clbench's own checkout: a change of clbench is no change of the learner."""
    import sys

    import clbench as package

    write(clbench.folder, beside_it="from clbench.interfaces import UserError\n\n\nclass Mine(UserError):\n    pass\n")
    monkeypatch.syspath_prepend(str(clbench.folder))
    import beside_it

    root = pathlib.Path(package.__file__).resolve().parent.parent
    monkeypatch.setattr(provenance.inspect, "getsourcefile", lambda made: str(root / "beside_it.py"))
    assert provenance._source_files(beside_it.Mine) == [root / "beside_it.py"]
    del sys.modules["beside_it"]


SCENARIO = """
    from dataclasses import replace

    from clbench.config import compose

    def digits(name="mine", operators=()):
        node = compose.compose(["scenario.num_classes=4", "scenario.limit_train=8", "scenario.limit_test=4"])[0]["scenario"]
        return replace(compose.build(node), {change})

    def turned(stream):
        return replace(stream, {change})
"""


@pytest.mark.parametrize("words", [("scenario._target_=mine.digits",), ("scenario.operators=[mine.turned]",)])
def test_the_code_of_scenarios_and_operators_counts(clbench, words):
    small = ("scenario.num_classes=4", "scenario.limit_train=8", "scenario.limit_test=4")
    extra = () if words[0].startswith("scenario._target_") else small
    words = ("run", "learner=finetune", "num_threads=1", *words, *extra)
    write(clbench.folder, mine=SCENARIO.replace("{change}", "augment='none'"))
    clbench(*words)
    assert "done already" in clbench(*words).stdout
    write(clbench.folder, mine=SCENARIO.replace("{change}", "augment='shift'"))
    clbench(*words)
    records = clbench.records()
    assert len(records) == 2 and len({entry["scenario"]["manifest_sha256"] for entry in records}) == 1
    assert all(next(iter(entry["code"])) in ("scenario", "operator mine.turned") for entry in records)
    assert clbench("verify").returncode == 0
    assert len(set(clbench("report", "--format", "csv").stdout.splitlines()[1:])) == 2  # two rows, not two seeds of one


def test_clbench_alone_has_no_such_versions(clbench, small):
    clbench("run", "learner=ncm", "num_threads=1", *small, "scenario.operators=[single_pass]")
    (entry,) = clbench.records()
    assert "code" not in entry and "evaluators" not in entry


def test_ids_at_test_time_name_no_class():
    scenario = small_stream()
    pipeline = Pipeline(make_profile("small", 32), torch.device("cpu"), scenario.augment)
    batch, _ = next(open_eval(scenario, 0, pipeline).batches(4))
    assert torch.equal(batch.ids, opaque(scenario.manifest.evals[0].ids[:4]))
    ids = opaque(np.arange(10_000))
    assert len(ids.unique()) == 10_000 and int(ids.min()) >= 0 and torch.equal(ids, opaque(np.arange(10_000)))
    places = ids.argsort().double()
    assert abs(float(torch.corrcoef(torch.stack([places, torch.arange(10_000).double()]))[0, 1])) < 0.05


CHEAT = """
    import torch
    from clbench.learners.ncm import NearestClassMean


    class Told(NearestClassMean):
        def predict(self, batch):
            z = super().predict(batch)
            return z + {told} * torch.arange(z.shape[1])
"""


@pytest.mark.parametrize(("name", "told"), [("ids", "(batch.ids % 7)[:, None].float()"), ("place", "float(batch.begins)")])
def test_answers_by_what_a_batch_is_called_fail_the_contract(tmp_path, monkeypatch, name, told):
    write(tmp_path, **{f"cheat_by_{name}": CHEAT.replace("{told}", told)})
    monkeypatch.syspath_prepend(str(tmp_path))
    config = compose.compose([f"learner._target_=cheat_by_{name}.Told"])[0]
    results = {name: (passed, text) for name, passed, text in check_learner(config)}
    assert not results["test_batches"][0]


def test_an_evaluator_has_answers_of_its_own():
    scores, labels = torch.ones(3, 2), torch.tensor([0, 1, 1])
    data = Answered("a", (0, 1), 2, None, [(scores, labels)])
    for z, y in data.answers(None):
        z.zero_()
        y.zero_()
    assert scores.sum() == 6 and labels.tolist() == [0, 1, 1]


MUTATE = """
    class Mutate:
        name = "mutate"

        def __call__(self, learner, data):
            n = 0
            for z, y in data.answers(learner):
                n += len(y)
                z.zero_()
                y.zero_()
            return {"n": n}
"""


def test_an_evaluator_that_writes_into_labels_changes_no_count(clbench, small):
    write(clbench.folder, mutate=MUTATE)
    clbench("run", "learner=ncm", "num_threads=1", *small)
    clbench("run", "learner=ncm", "num_threads=1", *small, "scenario.operators=[{evaluators: {names: [mutate.Mutate]}}]")
    first, second = clbench.records()
    assert first["correct"] == second["correct"] and first["class_correct"] == second["class_correct"]


RAISES = """
    def perhaps(stream, bad=False):
        if bad:
            raise RuntimeError("planned")
        return stream
"""


def test_a_job_whose_operator_raises_is_seen_in_the_report(clbench, small):
    write(clbench.folder, opz=RAISES)
    operators = "scenario.operators=[{opz.perhaps: {bad: true}}],[opz.perhaps]"
    out = clbench("run", "-m", "learner=ncm", "num_threads=1", operators, *small)
    assert "2 jobs: 1 ok, 1 failed" in out.stdout and "RuntimeError: planned" in out.stdout
    report = clbench("report", "--strict", code=1)
    assert "planned" in report.stdout + report.stderr
    assert {entry["status"] for entry in clbench.records()} == {"ok", "failed"}
    raised = clbench("plan", "learner=ncm", "scenario.operators=[{opz.perhaps: {bad: true}}]", code=None)
    assert raised.returncode and "operator opz.perhaps of scenario.operators" in raised.stderr


def test_a_repeat_that_raises_leaves_the_others(clbench, small, monkeypatch):
    from clbench.cli import verify_command

    clbench("run", "-m", "learner=ncm", "seed=0,1", "num_threads=1", *small)
    bad = sorted(path.name for path in (clbench.folder / "results" / "records").glob("*.json"))[0]
    real = verify_command._again

    def again(file, data_root):
        if file.name == bad:
            raise RuntimeError("planned <b>fault</b>")
        return real(file, data_root)

    monkeypatch.setattr(verify_command, "_again", again)
    text, code = verify_command.repeat(clbench.folder / "results", 2, 0, None)
    assert code == 1 and "its repeat raises RuntimeError: planned" in text and "2 repeated: 1 verified" in text


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("learner.lr=-1", "learner.lr must be a finite number from 0, got -1"),
        ("learner.backbone_lr=inf", "learner.backbone_lr must be a finite number"),
        ("learner.batch_size=0", "learner.batch_size must be at least 1, got 0"),
        ("learner.epochs=0", "learner.epochs must be at least 1, got 0"),
        ("learner.epochs=-1", "learner.epochs must be at least 1, got -1"),
    ],
)
def test_numbers_that_no_run_can_have(word, line):
    from clbench.config import registry

    with pytest.raises(UserError, match=line.replace(".", r"\.")):
        registry.check(compose.compose(["learner=finetune", word])[0])


def test_a_mistyped_option_is_named_where_another_value_is_missing():
    with pytest.raises(UserError, match=r"no key 'scenario.incremnt'; did you mean 'scenario.increment'"):
        compose.compose(["scenario=cil_npz", "scenario.dataset=x.npz", "scenario.incremnt=2"])


def test_from_clbench_import_of_a_moved_module_names_its_place():
    with pytest.raises(ImportError, match=r"clbench.walk is now clbench.run.loop"):
        from clbench import walk  # noqa: F401
    assert record.SCHEMA


@pytest.mark.parametrize("target", provenance.ADDED)
def test_options_that_came_later_leave_ids_as_they_were(target):
    """At the value of what a learner did before it had them they are no part of its identity; at another one they are."""
    added, name = provenance.ADDED[target], target.split(".")[0].replace("pretrain", "constant_lr")
    (config,) = compose.compose([f"learner={name}"])
    assert added.items() <= config["learner"].items(), "these are the defaults"
    plain = provenance.identity(config)["learner"]
    assert not added.keys() & plain.keys() and config["learner"].keys() - plain.keys() >= added.keys()
    for option in added:
        other = {**config, "learner": config["learner"] | {option: "other"}}
        assert provenance.identity(other)["learner"] == plain | {option: "other"}


@pytest.mark.parametrize(
    ("learner", "version"),
    [
        ({"_target_": "clbench.learners.er.Er", "updates": 0.5}, 2),
        ({"_target_": "clbench.learners.er.Er", "updates": 1.0}, 1),
        ({"_target_": "outside.Mine", "updates": 0.5}, 1),
        ({"_target_": "clbench.learners.cbp.Cbp", "optimizer": "adam"}, 2),
        ({"_target_": "clbench.learners.cbp.Cbp", "optimizer": "sgd"}, 1),
        ({"_target_": "clbench.learners.cls_er.ClsEr"}, 2),
        ({"_target_": "clbench.learners.ncm.NearestClassMean"}, 1),
    ],
)
def test_runs_whose_numbers_moved_have_a_version_of_their_own(learner, version):
    assert record.numbers_version({"learner": learner}) == version
