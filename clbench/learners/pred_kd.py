"""Prediction distillation, rehearsal-free (Smith, Tian, Halbe, Hsu & Kira, CVPR-W 2023, arXiv 2203.17269).

    local cross-entropy + strength x T^2 KL(softmax(z_old / T) || softmax(z / T))

on the logits of the classes known before, z_old from the network at the end of the previous experience, T = 2.
`trainable`: all | attention | qkv, as in `l2_reg.py`. With SGD, all weights and strength 3 without the factor T^2 this is
LwF as PyCIL has it (`lwf.py`).
No official code was found; the constants are start values. Published number in this setting: none read.
"""

from __future__ import annotations

from typing import ClassVar

from clbench.interfaces import Capabilities, Experience, Schedule
from clbench.learners.regularised import Penalty, Regularised, distance_of_predictions
from clbench.models.backbone import Backbone
from clbench.training.fisher import train_only
from clbench.training.fit import Recipe
from clbench.training.runtime import Runtime
from clbench.training.schedules import cosine
from clbench.training.steps import PartOrTrainable, Project, RefreshOptions, Steps, part_of


class PredKd(Regularised):
    """State: backbone and head (the teacher is both, as an experience finds them)."""

    capabilities: ClassVar[Capabilities] = Capabilities(anytime=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        strength: float = 1.0,
        temperature: float = 2.0,
        trainable: PartOrTrainable = "qkv",
        lr: float = 5e-5,  # head
        backbone_lr: float = 5e-5,
        epochs: int | None = None,
        batch_size: int = 128,
        weight_decay: float = 0.0,
        schedule: Schedule = cosine,
        refresh: RefreshOptions = None,  # {variant: official | paper, ...}, see `training/refresh.py`
        project: Project = None,  # bloop: the penalty gives way to the cross-entropy, see `training/bloop.py`
    ):
        train_only(model, part_of(trainable))
        recipe = Recipe("adam", weight_decay=weight_decay, schedule=schedule)
        steps = Steps(runtime, refresh=refresh, trainable=trainable, project=project)
        super().__init__(
            model, runtime, recipe, strength, lr=lr, backbone_lr=backbone_lr, epochs=epochs, batch_size=batch_size, steps=steps
        )
        self.temperature = temperature

    def penalty(self, experience: Experience) -> Penalty | None:
        """T^2 KL on the logits of the classes known before."""
        return distance_of_predictions(self.model, self.head, self.temperature) if experience.index else None
