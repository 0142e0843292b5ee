"""Part of the contract suite: a learner that declares `anytime` is asked inside `learn`, after every step of `fit`."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from clbench.interfaces import Place
from clbench.training import looks
from clbench.training.state import fingerprint


class Idle(looks.Observer):
    """An observer with evaluation data, as the runner's has it; it looks at nothing."""

    def __init__(self, sets: list[Any]):
        self.sets = sets


class Asking(looks.Observer):
    """An observer that asks a learner about an evaluation set after every step of `fit`, as a stream with looks may."""

    def __init__(self, trial: Any, learner: Any, pipeline: Any):
        self.trial, self.learner, self.pipeline = trial, learner, pipeline
        self.experience, self.asked = 0, 0

    def at_step(self, name: str, place: Place, lr: float, visits: int) -> float:
        """After each step, scores must be finite [B, num_seen]."""
        if place.step == 0:
            return 0.0
        seen = self.trial.scenario.manifest.num_seen(self.experience)
        where = f"step {place.step} of experience {self.experience}"
        with looks.modes_kept(self.learner):
            z = self.trial.scores(self.learner, self.pipeline, 0, 6)
        assert z.shape[1] == seen, f"predict gave {z.shape[1]} columns after {where}, {seen} classes were seen"
        assert torch.isfinite(z).all(), f"predict gave NaN or infinite scores after {where}"
        self.asked += 1
        return 0.0


def check_anytime(trial: Any) -> None:
    """A learner that declares `anytime` answers after any step of `fit`, and being asked changes nothing of its training."""
    if not trial.capabilities.anytime:
        return
    ended = []
    for asks in (False, True):
        learner, runtime, pipeline = trial.start()
        observer = Asking(trial, learner, pipeline)
        for observer.experience in range(3):
            with looks.observed_by(observer) if asks else contextlib.nullcontext():
                trial.learn(learner, runtime, pipeline, observer.experience)
        ended.append(fingerprint(learner.state_dict()))
        assert observer.asked or not asks, "anytime is declared, and nothing was trained through clbench.fit: nobody can ask"
    assert ended[0] == ended[1], "asked inside learn, it ends in another state"
