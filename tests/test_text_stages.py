"""Stages of text tasks (DMT): what an experience holds against a naive version, what is disclosed, a run, refusals."""

import numpy as np
import pytest
import torch

from clbench.config.compose import compose
from clbench.evaluation import metrics
from clbench.interfaces import UserError, mismatch
from clbench.learners.progressive_prompts import ProgressivePrompts
from clbench.records import record, verify_texts
from clbench.run.provenance import identity
from clbench.run.runner import prepare, run_job
from clbench.streams.tokens.text_data import open_experience
from clbench.streams.tokens.text_tasks import text_tasks

TASKS = ["copy", "reverse", "topic_4"]
OPTIONS = {"name": "t", "tasks": TASKS, "lines": 20, "test_lines": 4}


def texts(scenario, index):
    """(line, task) of everything that experience `index` hands out."""
    data = open_experience(scenario, index, torch.device("cpu")).train
    batch = data.batch(np.arange(len(data)))
    lines = [bytes(row[:n].tolist()) for row, n in zip(batch.tokens, batch.lengths.tolist(), strict=True)]
    return list(zip(lines, batch.y.tolist(), strict=True))


def test_a_later_stage_has_its_own_lines_and_a_share_of_each_earlier_task():
    single = text_tasks(**OPTIONS)
    alone = [[line for line, _ in texts(single, i)] for i in range(3)]
    made = text_tasks(**OPTIONS, stages=[2, 1], old_share=0.25)
    first, second = texts(made, 0), texts(made, 1)
    assert first == [(line, 0) for line in alone[0]] + [(line, 1) for line in alone[1]]
    assert second[:20] == [(line, 2) for line in alone[2]] and len(second) == 20 + 5 + 5
    for task, part in ((0, second[20:25]), (1, second[25:])):
        assert all(owner == task and line in alone[task] for line, owner in part) and len(set(part)) == 5
    assert [(e.name, e.first_seen, e.task) for e in made.manifest.evals] == [
        ("copy", 0, 0),
        ("reverse", 0, 1),
        ("topic_4", 1, 2),
    ]
    assert [e.name for e in made.manifest.experiences] == ["copy+reverse", "topic_4"]
    again = text_tasks(**OPTIONS, stages=[1, 1, 1], old_share=0.25)
    assert texts(again, 1)[20:] == second[20:25] and texts(again, 2)[20:] == second[20:], "drawn once"
    assert len(texts(text_tasks(**OPTIONS, stages=[2, 1], old_share=1.0), 1)) == 60, "k = 1: all of them"
    for line, _ in first + second:
        assert line not in {bytes(made.lines.line(i).tolist()) for e in made.manifest.evals for i in e.ids} or b"topic" in line


def test_one_task_at_a_time_is_what_it_was():
    plain, same = text_tasks(**OPTIONS), text_tasks(**OPTIONS, stages=[1, 1, 1])
    assert plain.manifest.sha256 == same.manifest.sha256 and plain.manifest.discloses_task
    (job,) = compose(["scenario=text_tasks"])
    assert not {"stages", "old_share"} & set(identity(job)["scenario"])


def test_mixed_lines_disclose_no_task():
    for options in ({"stages": [2, 1]}, {"old_share": 0.5}):
        made = text_tasks(**OPTIONS, **options)
        assert not made.facts().discloses_task and open_experience(made, 0, torch.device("cpu")).task is None
        assert "needs_task_id" in str(mismatch("x", ProgressivePrompts.capabilities, made.facts(), True))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("scenario.stages=[2,2]",), r"scenario\.stages must be whole numbers from 1 whose sum is the 3 tasks"),
        (("scenario.stages=[3,0]",), r"scenario\.stages must be whole numbers"),
        (("scenario.old_share=1.5",), r"scenario\.old_share must be from 0 to 1"),
        (("scenario.stages=[2,1]", "learner=progressive_prompts"), "needs_task_id"),
        (("scenario.stages=[2,1]", "learner=text_isolated"), "needs_task_id"),
    ],
    ids=str,
)
def test_refused_before_anything_is_trained(tmp_path, words, said):
    base = ["scenario=text_tasks", "scenario.tasks=[copy,reverse,topic_4]", "scenario.lines=8", f"results_dir={tmp_path}"]
    with pytest.raises(UserError, match=said):
        prepare(compose([*base, *words])[0])


def test_a_run_in_two_stages(tmp_path):
    words = [
        "scenario=text_tasks",
        "scenario.tasks=[shift_3,facts_20,copy]",
        "scenario.stages=[2,1]",
        "scenario.old_share=0.25",
    ]
    words += [
        "scenario.lines=16",
        "scenario.test_lines=5",
        "scenario.budget.epochs=1",
        f"results_dir={tmp_path}",
        "num_threads=1",
    ]
    (job,) = compose([*words, "learner=text_finetune"])
    entry = record.read(run_job(job).path)
    assert entry["status"] == "ok" and len(entry["correct"]) == 2 and entry["first_seen"] == [0, 0, 1]
    assert [e["num_train"] for e in entry["scenario"]["experiences"]] == [32, 16 + 4 + 4]
    assert 0 <= metrics.summary(entry)["last_macro"] <= 1 and entry["visits"]["new"] == 56
    assert not list(verify_texts.check(entry))
