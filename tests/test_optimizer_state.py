"""`optimizer_state=keep`: moments of one experience go on in the next; values against loops written by hand."""

import json

import pytest
import torch

from clbench.config.compose import compose
from clbench.interfaces import UserError
from clbench.models.heads import LinearHead
from clbench.run import provenance
from clbench.run.runner import run_job
from clbench.training.checkpoint import Journal
from clbench.training.fit import Recipe, fit
from clbench.training.runtime import Interrupted, Runtime
from clbench.training.state import detached

CPU = torch.device("cpu")


class Slope:
    """Batches are numbers g; the loss g * w has the gradient g."""

    def __init__(self, gradients):
        self.gradients, self.steps = gradients, len(gradients)

    def __call__(self, step):
        return self.gradients[step]


class Line:
    """One weight w, from 1."""

    def __init__(self, state, dtype=torch.float64):
        self.runtime = Runtime(0, CPU, optimizer_state=state)
        self.w = torch.nn.Parameter(torch.ones(1, dtype=dtype))

    def learn(self, experience, gradients, recipe, name="train", rate=0.1):
        self.runtime.begin(experience)
        groups = [{"params": [self.w], "lr": rate}]
        fit(self.runtime, name, self, groups, lambda g: (g * self.w).sum(), Slope(gradients), recipe)
        return float(self.w.detach())

    def state_dict(self):
        return {"w": self.w.detach()}

    def load_state_dict(self, state):
        with torch.no_grad():
            self.w.copy_(state["w"])


def test_momentum_worked_out():
    """rate 0.1, momentum 0.5: buffers 2, 1 + 1 = 2; kept 3 + 1 = 4, fresh 3."""
    recipe = Recipe("sgd", momentum=0.5)
    keep, fresh = Line("keep"), Line("fresh")
    for line in (keep, fresh):
        assert line.learn(0, [2.0, 1.0], recipe) == pytest.approx(1 - 0.2 - 0.2)
    assert keep.learn(1, [3.0], recipe) == pytest.approx(0.6 - 0.4)
    assert fresh.learn(1, [3.0], recipe) == pytest.approx(0.6 - 0.3)
    assert fresh.runtime.optimizers == {}
    assert keep.runtime.optimizers["train"]["w"]["shape"] == [1]
    assert float(keep.runtime.optimizers["train"]["w"]["state"]["momentum_buffer"]) == pytest.approx(4.0)


def test_the_step_size_that_was_found_is_kept():
    """dadapt_adam in two experiences is one of both lengths; fresh, d starts at 1e-6 again."""
    recipe = Recipe("dadapt_adam")
    keep, fresh, whole = Line("keep"), Line("fresh"), Line("keep")
    ends = [
        [line.learn(e, [1.0] * n, recipe, rate=1.0) for e, n in enumerate(lengths)]
        for line, lengths in ((keep, (8, 6)), (fresh, (8, 6)), (whole, (14,)))
    ]
    assert ends[0][0] == ends[1][0] and ends[0][1] == ends[2][0] != ends[1][1]
    assert keep.runtime.optimizers["train"]["*"]["d"] == whole.runtime.optimizers["train"]["*"]["d"] > 1e-4


def by_hand(kind, gradients, lr=0.1):
    """Momentum SGD (0.9), or Adam, without a break."""
    w, m, v = 1.0, 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        if kind == "sgd":
            m = g if t == 1 else 0.9 * m + g
            w -= lr * m
        else:
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            w -= lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)) ** 0.5 + 1e-8)
    return w


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("seed", range(3))
def test_kept_moments_are_one_training(kind, seed):
    gradients = torch.randn(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    keep, fresh, recipe = Line("keep"), Line("fresh"), Recipe(kind)
    for i, part in enumerate((gradients[:4], gradients[4:6], gradients[6:])):
        keep.learn(i, part, recipe)
        fresh.learn(i, part, recipe)
    expected = by_hand(kind, gradients)
    assert float(keep.w.detach()) == pytest.approx(expected, abs=1e-12)
    assert abs(float(fresh.w.detach()) - expected) > 1e-6


def test_moments_belong_to_the_name_of_the_fit():
    line, recipe = Line("keep"), Recipe("sgd", momentum=0.5)
    line.learn(0, [2.0], recipe, "train")
    before = float(line.w.detach())
    assert line.learn(1, [3.0], recipe, "align") == pytest.approx(before - 0.3), "moments of another fit were taken"
    before = float(line.w.detach())
    assert line.learn(2, [3.0], recipe, "train") == pytest.approx(before - 0.4)


class Growing:
    """A head that grows: its first block goes on, the second one starts without moments."""

    def __init__(self, state):
        self.runtime = Runtime(0, CPU, optimizer_state=state)
        self.head = LinearHead(2, bias=False).to(CPU)

    def learn(self, experience, count):
        self.runtime.begin(experience)
        self.head.grow(count, torch.Generator().manual_seed(experience))
        before = [block.weight.detach().clone() for block in self.head.blocks]

        def loss(g):
            return g * sum(block.weight.sum() for block in self.head.blocks)

        groups = [{"params": list(self.head.parameters()), "lr": 0.1}]
        fit(self.runtime, "train", self, groups, loss, Slope([1.0]), Recipe("sgd", momentum=0.5))
        return [block.weight.detach() - old for block, old in zip(self.head.blocks, before, strict=True)]

    def state_dict(self):
        return {"head": self.head.state_dict()}

    def load_state_dict(self, state):
        self.head.load_state_dict(state["head"])


def test_grown_heads_start_fresh():
    keep, fresh = Growing("keep"), Growing("fresh")
    for learner, first in ((keep, -0.15), (fresh, -0.1)):
        (step,) = learner.learn(0, 2)
        assert torch.allclose(step, torch.full((2, 2), -0.1))
        old, new = learner.learn(1, 3)
        assert torch.allclose(old, torch.full((2, 2), first)) and torch.allclose(new, torch.full((3, 2), -0.1))


def test_another_shape_under_the_same_name_starts_fresh():
    line, recipe = Line("keep"), Recipe("sgd", momentum=0.5)
    line.learn(0, [2.0], recipe)
    line.w = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    line.runtime.begin(1)
    fit(line.runtime, "train", line, [{"params": [line.w], "lr": 0.1}], lambda g: (g * line.w).sum(), Slope([3.0]), recipe)
    assert torch.allclose(line.w, torch.full((3,), 0.7, dtype=torch.float64))


def test_parameters_that_are_in_no_attribute_are_refused():
    line = Line("keep")
    loose = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(UserError, match="optimizer_state=keep: fit 'train' of Line trains parameters that are in no attribute"):
        fit(line.runtime, "train", line, [{"params": [loose], "lr": 0.1}], lambda g: (g * loose).sum(), Slope([1.0]))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("stop_at", [1, 2])
def test_stopped_inside_the_second_experience(tmp_path, kind, stop_at):
    gradients, recipe = [[0.5, -2.0], [1.0, 0.3, -0.7]], Recipe(kind)
    straight = Line("keep", torch.float32)
    for i, part in enumerate(gradients):
        straight.learn(i, part, recipe)
    first = Line("keep", torch.float32)
    first.learn(0, gradients[0], recipe)
    saved = detached({"learner": first.state_dict(), "optimizers": first.runtime.optimizers})
    for again in range(2):
        line = Line("keep", torch.float32)
        line.load_state_dict(saved["learner"])
        line.runtime.optimizers = saved["optimizers"]
        line.runtime.journal = Journal(tmp_path, 1e9)

        def progress(name, step, steps, loss, line=line, again=again):
            line.runtime.stop = not again and step == stop_at

        line.runtime.progress = progress
        try:
            line.learn(1, gradients[1], recipe)
        except Interrupted:
            assert not again and (tmp_path / "fit-0.pt").exists()
    assert torch.equal(line.w, straight.w)
    kept, expected = (one.runtime.optimizers["train"]["w"]["state"] for one in (line, straight))
    assert kept.keys() == expected.keys() and all(torch.equal(kept[k], expected[k]) for k in kept)


# whole runs

TINY = ("scenario.num_classes=4", "scenario.limit_train=6", "scenario.limit_test=3", "scenario.budget.epochs=1")
EXACT = ("num_threads=1", "arithmetic=reference", "on_error=raise")


def run(folder, *words):
    outcome = run_job(compose([*TINY, *EXACT, f"results_dir={folder}", *words])[0])
    return outcome.status, json.loads(outcome.path.read_text())


@pytest.mark.parametrize("learner", ["replay", "ewc"])  # SGD, Adam
def test_runs_differ_and_resume_to_the_last_bit(tmp_path, monkeypatch, learner):
    words = (f"learner={learner}", "learner.batch_size=4", "checkpoint_seconds=0")
    _, fresh = run(tmp_path / "fresh", *words)
    _, keep = run(tmp_path / "keep", *words, "optimizer_state=keep")
    assert keep["run_id"] != fresh["run_id"] and keep["final_state_sha256"] != fresh["final_state_sha256"]
    assert keep["config"]["optimizer_state"] == "keep" and "optimizer_state" not in fresh["config"]
    from clbench.run.loop import Loop
    from clbench.training import looks

    class Killed(BaseException):
        pass

    def dies(*given):
        raise Killed

    for place in ("between", "inside"):
        with monkeypatch.context() as patch:
            if place == "between":
                patch.setattr(Loop, "evaluate", dies)
            else:
                plain, asked = looks.at_step, []

                def between(*given, plain=plain, asked=asked):
                    asked.append(given)
                    return dies() if len(asked) == 7 else plain(*given)

                patch.setattr(looks, "at_step", between)
            with pytest.raises(Killed):
                run(tmp_path / place, *words, "optimizer_state=keep")
        status, again = run(tmp_path / place, *words, "optimizer_state=keep")
        assert status == "ok" and again["resumed"] == 1
        assert again["final_state_sha256"] == keep["final_state_sha256"], place
        assert again["rows"] == keep["rows"]


def test_fresh_leaves_the_identity_as_it_was():
    plain, fresh, keep = (compose([*words])[0] for words in ((), ("optimizer_state=fresh",), ("optimizer_state=keep",)))
    assert provenance.identity(plain) == provenance.identity(fresh) and "optimizer_state" not in provenance.identity(fresh)
    assert provenance.identity(keep)["optimizer_state"] == "keep"
    without = {key: value for key, value in plain.items() if key != "optimizer_state"}
    assert provenance.identity(without) == provenance.identity(plain)


def test_refusals(clbench, small):
    for learner in ("ncm", "fecam", "ranpac pet=none"):
        for command in ("plan", "run"):
            err = clbench(command, *f"learner={learner}".split(), "optimizer_state=keep", *small, code=2).stderr
            assert err == f"clbench: optimizer_state=keep has no effect: {learner.split()[0]} does not train through fit\n"
    err = clbench("run", "learner.lr=-1", *small, code=2).stderr
    assert err == "clbench: learner.lr must be a finite number from 0, got -1\n"
    err = clbench("run", "scenario=cpt_synthetic", "learner=constant_lr", "optimizer_state=keep", code=2).stderr
    assert err.startswith("clbench: optimizer_state has no effect in scenario") and err.count("\n") == 1
    err = clbench("run", "learner=ncm", "optimizer_state=kept", code=2).stderr
    assert err == "clbench: optimizer_state must be fresh or keep, got 'kept'\n"
