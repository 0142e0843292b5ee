"""A head for every task: rows by hand, answers for the task's classes alone, old tasks left untouched."""

import copy
import json

import pytest
import torch
from torch.nn import functional as F

from clbench.config.compose import compose
from clbench.interfaces import UserError
from clbench.learners.regularised import distance_of_predictions
from clbench.models.backbone import build_backbone
from clbench.models.heads import LOWEST, LinearHead, TaskHead, linear_head, scores
from clbench.records import record
from clbench.run import provenance
from clbench.run.runner import run_job
from clbench.streams.images.data import ImageBatch
from clbench.training.losses import masked_cross_entropy
from clbench.training.state import detached, fingerprint

STREAM = ("scenario=til_digits", "scenario.num_classes=6", "scenario.limit_train=6", "scenario.limit_test=4")
EXACT = ("scenario.budget.epochs=2", "num_threads=1", "arithmetic=reference", "on_error=raise")
NET = ("model=mlp", "model.kwargs.img_size=8", "model.kwargs.hidden=[6]")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def two_tasks():
    """Task 0 has the classes 0 and 1, task 4 the classes 2, 0 and, later, 3: rows are set by hand."""
    head = TaskHead(2)
    head.grow(0, (0, 1), rng())
    head.grow(4, (2, 0), rng(1))
    head.grow(4, (0, 3), rng(2))
    rows = {"0": [[[1.0, 0], [0, 1]]], "4": [[[2.0, 0], [0, 2]], [[1.0, 1]]]}
    with torch.no_grad():
        for task, blocks in rows.items():
            for block, weight in zip(head.heads[task].blocks, blocks, strict=True):
                block.weight.copy_(torch.tensor(weight))
                block.bias.zero_()
    return head


def test_places_and_targets_by_hand():
    head = TaskHead(3)
    assert head.grow(7, [2, 0], rng()) == 0 and head.grow(5, [1, 0, 3], rng()) == 1 and head.grow(7, [2, 0], rng()) == 0
    assert head.num_classes == 4 and head.tasks == [7, 5] and [head.place(t) for t in (5, 7, 99, None)] == [1, 0, 1, 1]
    assert head.targets(0, torch.tensor([0, 2, 2])).tolist() == [1, 0, 0]
    assert head.targets(1, torch.tensor([3, 0, 1])).tolist() == [2, 1, 0]
    low = torch.tensor(LOWEST).item()
    assert head.spread(1, torch.tensor([[5.0, 6, 4]])).tolist() == [[6.0, 5.0, low, 4.0]]
    other = TaskHead(3)
    other.load_state_dict(head.state_dict())
    assert other.tasks == head.tasks and fingerprint(other.state_dict()) == fingerprint(head.state_dict())


@pytest.mark.parametrize("learner", ["finetune", "ewc", "lwf", "hat", "packnet"])
def test_tasks_that_share_their_classes(tmp_path, learner):
    """Permuted pixels, task disclosed: sets of later tasks are asked for before they are learned."""
    head = ["learner.head=per_task"] if learner in ("finetune", "ewc", "lwf") else []
    head += ["learner.trainable=all"] if learner == "ewc" else []
    words = [*STREAM, *EXACT, *NET, f"learner={learner}", *head, "scenario.increment=6", f"results_dir={tmp_path}"]
    operators = "scenario.operators=[{permute: {experiences: 3}}]"
    entry = record.read(run_job(compose([*words, operators])[0]).path)
    assert entry["status"] == "ok" and all(count is not None for row in entry["correct"] for count in row)


def test_answers_by_hand():
    head, f = two_tasks(), torch.tensor([[3.0, 5.0], [-1.0, 0.5]])
    assert head.num_classes == 4
    low = LOWEST
    assert torch.equal(head(f, 0), torch.tensor([[3.0, 5, low, low], [-1, 0.5, low, low]]))
    assert torch.equal(head(f, 4), torch.tensor([[10.0, low, 6, 8], [1, low, -2, -0.5]]))
    for task in (None, 1):
        assert torch.equal(head(f, task), head(f, 4)), "a task that has no head is answered by the newest"
    z = head(f, 4)
    own = torch.tensor([[6.0, 10, 8], [-2, 1, -0.5]])  # of the classes 2, 0, 3
    for masking in ("seen", "local"):
        loss = masked_cross_entropy(z, torch.tensor([2, 3]), masking, (0, 2, 3))
        torch.testing.assert_close(loss, F.cross_entropy(own, torch.tensor([0, 2])))


def test_a_task_trains_its_own_rows():
    head = two_tasks()
    F.cross_entropy(head(torch.randn(5, 2, generator=rng(3)), 4), torch.tensor([0, 2, 3, 0, 2])).backward()
    assert all(p.grad is None for p in head.heads["0"].parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.heads["4"].parameters())
    assert [p.shape for p in head.parameters() if p.requires_grad] == [(2, 2), (2,), (2, 2), (2,), (1, 2), (1,)]


def test_states_go_round_and_fill_in_place():
    head, f = two_tasks(), torch.randn(3, 2, generator=rng(4))
    before = torch.get_rng_state()
    other = TaskHead(2)
    other.grow(0, (0, 1), rng(5)), other.grow(7, (1,), rng(6))
    held = other.heads["0"].blocks[0].weight
    state = detached(head.state_dict())
    other.load_state_dict(state)
    assert other.heads["0"].blocks[0].weight is held and list(other.heads) == ["0", "4"]
    assert all(torch.equal(other(f, task), head(f, task)) for task in (0, 4))
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in head.parameters()]
    copy.deepcopy(other).requires_grad_(False)
    assert torch.equal(before, torch.get_rng_state())


def test_kinds_of_heads():
    assert isinstance(linear_head("single", 3), LinearHead) and linear_head("per_task", 3, "kaiming_uniform").init != "normal"
    with pytest.raises(UserError, match=r"learner\.head must be single or per_task, got 'both'"):
        linear_head("both", 3)


def test_distillation_is_the_sum_over_earlier_tasks():
    model = build_backbone("m", "mlp", {"hidden": [2], "img_size": 2}, profile="small")
    head, x = two_tasks(), torch.randn(4, 3, 2, 2, generator=rng(7))
    penalty = distance_of_predictions(model, head, 2.0, squared=False)
    old_f, old = model.features(x).detach(), copy.deepcopy(head)
    with torch.no_grad():
        for p in (*model.parameters(), *(p for p in head.parameters() if p.requires_grad)):
            p.add_(torch.randn(p.shape, generator=rng(8)))
    head.grow(5, (4, 5), rng(9))
    f = model.features(x)
    wanted = 0.0
    for task, classes in ((0, [0, 1]), (4, [2, 0, 3])):
        z, z_old = head(f, task)[:, classes] / 2, old(old_f, task)[:, classes] / 2
        wanted += -(z_old.softmax(1) * z.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(penalty(ImageBatch.of(x), f, head(f, 5)), wanted)


# runs


def run(folder, *words):
    kept = []
    from clbench.run import loop

    with pytest.MonkeyPatch.context() as patch:
        real = loop.Loop.learn

        def learn(self, index):
            real(self, index)
            kept.append(detached(self.learner.state_dict()))

        patch.setattr(loop.Loop, "learn", learn)
        outcome = run_job(compose([*STREAM, *EXACT, *NET, f"results_dir={folder}", *words])[0])
    return json.loads(outcome.path.read_text()), kept


@pytest.mark.parametrize(
    "learner", ["finetune", "ewc learner.trainable=all", "ewc learner.trainable=all learner.fisher=batch", "lwf"]
)
def test_learners_answer_for_the_task_alone(tmp_path, learner):
    words = (*f"learner={learner}".split(), "learner.head=per_task", "learner.batch_size=4")
    entry, states = run(tmp_path, *words)
    assert entry["learner"]["capabilities"]["needs_task_id"] and entry["status"] == "ok"
    last = states[-1]["head"]
    assert {name: value.tolist() for name, value in last.items() if name.startswith("classes")} == {
        "classes.0": [0, 1],
        "classes.1": [2, 3],
        "classes.2": [4, 5],
    }
    kept = torch.equal(states[0]["head"]["heads.0.blocks.0.weight"], last["heads.0.blocks.0.weight"])
    assert kept == (learner != "lwf"), "only distillation moves the heads of earlier tasks"
    (row,) = [r for r in entry["rows"] if r["experience"] == 2]
    assert row["sums"]["correct"] == row["sums"]["correct_masked"]


def test_a_killed_run_goes_on_to_the_last_bit(tmp_path, monkeypatch):
    from clbench.run import loop

    words = ("learner=lwf", "learner.head=per_task", "learner.batch_size=4")
    whole, _ = run(tmp_path / "whole", *words)
    real = loop.Loop.evaluate

    def fail(self, index):
        if index == 1:
            raise RuntimeError("killed")
        real(self, index)

    monkeypatch.setattr(loop.Loop, "evaluate", fail)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", *words)
    monkeypatch.undo()
    again, _ = run(tmp_path / "killed", *words)
    assert again["resumed"] == 1 and again["final_state_sha256"] == whole["final_state_sha256"]


def test_identity_and_refusals(clbench):
    plain, single, own = (
        provenance.identity(compose([*STREAM, "learner=ewc", *w])[0])
        for w in ([], ["learner.head=single"], ["learner.head=per_task"])
    )
    assert plain == single and "head" not in plain["learner"] and own["learner"]["head"] == "per_task"
    for learner in ("finetune", "ewc", "lwf"):
        err = clbench("plan", f"learner={learner}", "learner.head=per_task", code=2).stderr
        why = "needs_task_id, and the scenario does not disclose tasks"
        assert err == f"clbench: learner {learner} does not fit scenario cil_digits: {why}\n"
    err = clbench("plan", *STREAM, "learner=lwf", "learner.head=each", code=2).stderr
    assert err.startswith("clbench: learner.head must be per_task or single, got 'each'") and err.count("\n") == 1


def test_scores_of_both_kinds():
    head, f = LinearHead(2), torch.randn(3, 2)
    head.grow(3, rng())
    assert torch.equal(scores(head, f, None), head(f)) and torch.equal(scores(two_tasks(), f, 0), two_tasks()(f, 0))
