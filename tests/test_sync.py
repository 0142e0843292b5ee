"""No step of training asks the device for a number: that would make the processor wait for it.

Where there is no GPU, the questions are counted on the CPU: every `item()`, `float()`, `bool()` and `tolist()` of a tensor is
`_local_scalar_dense`, and picking rows by a mask needs their number.
"""

import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clbench.config.compose import compose
from clbench.interfaces import Capabilities
from clbench.testing.contract import Trial, small_stream
from clbench.training import fit as fitting

ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "unique")
LEARNERS = ["slca", "mos", "lae", "ranpac", "ease", "aper", "finetune", "joint", "ssiat"]


class Questions(TorchDispatchMode):
    """Counts them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if "aten.index." in str(func) else []
        asks = any(word in str(func) for word in ASKING) or bool(masks)
        # Adam counts its steps in a tensor that lies on the host wherever the parameters are.
        self.count += asks and not any(frame.filename.endswith("optim/adam.py") for frame in traceback.extract_stack(limit=12))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", LEARNERS)
def test_steps_ask_nothing(name, monkeypatch):
    (config,) = compose([f"learner={name}"])
    trial = Trial(config, small_stream(budget={"epochs": 4, "exemplars": 12}), Capabilities(stores_all_data=name == "joint"))
    learner, runtime, pipeline = trial.start()
    runtime.journal.seconds = float("inf")
    monkeypatch.setattr(fitting, "LAG", {"cpu": 1_000_000})
    real, asked = fitting._gradients, {}
    now = Questions()

    def gradients(call, group, loss_fn):
        asked.setdefault(f"experience {runtime.experience} {call.key}", []).append(now.count)
        return real(call, group, loss_fn)

    monkeypatch.setattr(fitting, "_gradients", gradients)
    with now:
        for index in range(2):
            trial.learn(learner, runtime, pipeline, index)
    assert max(len(counts) for counts in asked.values()) >= 4
    for call, counts in asked.items():
        assert counts[0] == counts[-1], f"steps of {call} ask {counts[-1] - counts[0]} times"


def test_a_question_is_counted():
    with Questions() as found:
        float(torch.ones(1))
        bool(torch.ones(1) > 0)
        torch.ones(3)[torch.ones(3) > 0]
    assert found.count == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_do_not_wait_on_a_gpu(monkeypatch):
    (config,) = compose(["learner=slca"])
    trial = Trial(config, small_stream(), Capabilities())
    learner, runtime, pipeline = trial.start()
    device = torch.device("cuda")
    learner.model.to(device)
    real = fitting._gradients

    def gradients(call, group, loss_fn):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return real(call, group, loss_fn)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    runtime.device = pipeline.device = device
    monkeypatch.setattr(fitting, "_gradients", gradients)
    trial.learn(learner, runtime, pipeline, 0)


@pytest.mark.parametrize("lag", [1, 3, 1000])
def test_a_late_look_gives_the_same_numbers(lag, monkeypatch):
    monkeypatch.setattr(fitting, "LAG", {"cpu": lag})
    (config,) = compose(["learner=finetune"])
    trial = Trial(config, small_stream(), Capabilities())
    learner, runtime, pipeline = trial.start()
    logs = []
    real = learner.learn
    learner.learn = lambda experience: logs.append(real(experience)) or logs[-1]
    trial.learn(learner, runtime, pipeline, 0)
    monkeypatch.setattr(fitting, "LAG", {"cpu": 1})
    again, runtime, pipeline = trial.start()
    real_again = again.learn
    again.learn = lambda experience: logs.append(real_again(experience)) or logs[-1]
    trial.learn(again, runtime, pipeline, 0)
    assert logs[0] == logs[1] and logs[0]["train_loss"] > 0
