"""Feature distillation, rehearsal-free (Smith, Tian, Halbe, Hsu & Kira, CVPR-W 2023, arXiv 2203.17269).

    local cross-entropy + strength x |f_t(x) - f_{t-1}(x)|^2

f_{t-1} being the features of the network at the end of the previous experience. `trainable`: all | attention | qkv, as in
`l2_reg.py`. No official code was found; the constants are start values. Published number in this setting: none read.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, Schedule
from clbench.learners.regularised import Penalty, Regularised
from clbench.models.backbone import Backbone
from clbench.training.distillation import feature_distillation, frozen_copy
from clbench.training.fisher import train_only
from clbench.training.fit import Recipe
from clbench.training.runtime import Runtime
from clbench.training.schedules import cosine
from clbench.training.steps import PartOrTrainable, Project, RefreshOptions, Steps, part_of


class FeatKd(Regularised):
    """State: backbone and head (the teacher is the backbone, as an experience finds it)."""

    capabilities: ClassVar[Capabilities] = Capabilities(anytime=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        strength: float = 1.0,
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

    def penalty(self, experience: Experience) -> Penalty | None:
        """|f_t(x) - f_{t-1}(x)|^2."""
        return distance_of_features(self.model) if experience.index else None


def distance_of_features(model: Backbone) -> Penalty:
    """Distillation of the features that the network has now."""
    (teacher,) = frozen_copy(model)

    def distance(batch: Batch, features: Tensor, z: Tensor) -> Tensor:
        with torch.no_grad():
            old = teacher.features(batch)
        return feature_distillation(features, old)

    return distance
