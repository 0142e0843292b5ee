"""What a schedule is told of the run: steps taken before, with experiences of any lengths and several phases in one."""

import pytest
import torch
from torch import nn

from clbench.config import compose
from clbench.run.runner import prepare
from clbench.training import schedules
from clbench.training.checkpoint import Journal
from clbench.training.fit import Recipe, fit
from clbench.training.runtime import Interrupted, Runtime

TEXTS = (
    "scenario=cpt_text_weak",
    "scenario.corpora=[one,two,three]",
    "scenario.context=8",
    "scenario.batch=8",
    "scenario.eval_tokens=320",
    "model.width=16",
    "model.depth=1",
    "model.heads=2",
    "num_threads=1",
    "device=cpu",
    "arithmetic=reference",
)
UNEQUAL = "scenario.tokens=[640,2560,1280]"  # 10, 40 and 20 steps of 64 tokens


def plans(tmp_path, *words):
    for i, name in enumerate(("one", "two", "three")):
        lines = (f"<|doc|>{d}\n" + " ".join(f"{(d * 7 + k * (i + 3)) % 97}" for k in range(90)) for d in range(20))
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    job = prepare(compose.compose([*TEXTS, f"data_root='{tmp_path}'", f"results_dir='{tmp_path}'", *words])[0])
    from clbench.run.token_stream import keeps_text

    return [job.learner.plan(job.scenario.experience(i, keeps_text(job))) for i in range(3)]


def test_steps_before_are_those_that_were_taken(tmp_path):
    made = plans(tmp_path, UNEQUAL, "learner=constant_lr", "schedule=inverse_sqrt", "learner.lr=1.0")
    assert [segment.before for (segment,) in made] == [0, 10, 50]
    (last,) = made[2]
    # n = 50 at its start; warm-up is 1 % of 20 steps, none; s = 0.05 of 20 steps, 1
    assert last.rate(0) == pytest.approx((50 + 1) ** -0.5) and last.rate(19) == pytest.approx((69 + 1) ** -0.5)


def test_a_falling_peak_over_unequal_experiences(tmp_path):
    made = plans(tmp_path, UNEQUAL, "learner=constant_lr", "schedule=autoregressive_cosine", "learner.lr=1.0")
    before = [0.5 * (1 + torch.cos(torch.tensor(torch.pi * n / (n + s)))).item() for n, s in ((0, 10), (10, 40), (50, 20))]
    assert [segment.rate(0) for (segment,) in made] == pytest.approx(before, abs=1e-6)


def test_equal_experiences_count_as_they_did(tmp_path):
    for learner in ("constant_lr", "wsd_branch", "infinite"):
        for plan in plans(tmp_path, "scenario.tokens=1280", f"learner={learner}"):
            assert all(segment.before == segment.experience * segment.steps for segment in plan)


def test_branches_and_joint_training(tmp_path):
    """A branch on top of the data is steps too; joint training takes those of all data so far, each time."""
    words = ("learner=wsd_branch", "learner.branch=0.2", "learner.accounting=equal_data")
    assert [plan[0].before for plan in plans(tmp_path, UNEQUAL, *words)] == [0, 12, 12 + 50]  # 10 / 0.8 and 40 / 0.8
    assert [plan[0].before for plan in plans(tmp_path, "scenario.tokens=640", "learner=joint_union")] == [0, 10, 30]


class Point:
    def __init__(self):
        self.w = nn.Parameter(torch.zeros(2))

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Steps:
    def __init__(self, steps):
        self.steps = steps

    def __call__(self, step):
        return torch.ones(2)


def run(runtime, name, steps, seen, accumulate=1, stop_at=None):
    point = Point()

    def note(place):
        seen.append((name, place.experience, place.step, place.steps, place.global_step))
        runtime.stop = place.step == stop_at

    loss = lambda x: ((point.w - x) ** 2).sum()  # noqa: E731
    recipe = Recipe(schedule=schedules.constant_after_warmup, accumulate=accumulate)
    fit(runtime, name, point, [{"params": [point.w], "lr": 0.1}], loss, Steps(steps), recipe, at_place=note)


def test_phases_count_by_name():
    runtime, seen = Runtime(0, torch.device("cpu")), []
    for experience in range(2):
        runtime.begin(experience)
        run(runtime, "train", 3, seen)
        run(runtime, "align", 5, seen, accumulate=2)
    assert [place[-1] for place in seen if place[0] == "train"] == [0, 1, 2, 3, 4, 5]
    assert [place[-1] for place in seen if place[0] == "align"] == [0, 1, 2, 3, 4, 5]  # 5 batches are 3 steps
    assert runtime.meter.steps == 12 and runtime.meter.by_name == {"train": 6, "align": 6}
    assert [place[1:4] for place in seen[:4]] == [(0, 0, 3), (0, 1, 3), (0, 2, 3), (0, 0, 3)]


def test_a_resumed_run_counts_on(tmp_path):
    straight, killed = [], []
    runtime = Runtime(0, torch.device("cpu"))
    for experience in range(2):
        runtime.begin(experience)
        run(runtime, "train", 4, straight)
    first = Runtime(0, torch.device("cpu"), journal=Journal(tmp_path))
    first.begin(0)
    run(first, "train", 4, killed)
    first.journal.finish_experience({"experience": 0})
    meter = first.meter.state_dict()
    first.begin(1)
    with pytest.raises(Interrupted):
        run(first, "train", 4, killed, stop_at=1)
    second = Runtime(0, torch.device("cpu"), journal=Journal(tmp_path))
    second.meter.load_state_dict(meter)
    second.begin(1)
    run(second, "train", 4, killed)
    assert killed == straight and second.meter.by_name == {"train": 8}


def test_snapshots_of_earlier_versions_are_read():
    runtime = Runtime(0, torch.device("cpu"))
    runtime.meter.load_state_dict({"visits": {"new": 1, "replayed": 0}, "steps": 7, "seconds": {}, "trained": 3})
    assert runtime.meter.steps == 7 and runtime.meter.by_name == {}
