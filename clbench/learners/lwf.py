"""LwF: Learning without Forgetting (Li & Hoiem, ECCV 2016, arXiv 1606.09282), class-incremental as in PyCIL.

    local cross-entropy + strength x KD,   KD = -sum softmax(z_old / T) log softmax(z / T), no factor T^2

on the logits of the classes known before; z_old from the network at the end of the previous experience, T = 2, strength 3.
PyCIL's protocol is a ResNet-32 from scratch: 250 epochs, SGD 0.1 (x 0.1 at 60, 120, 180, 220), batch 128, weight decay 2e-4.
The default rates here are for pre-trained backbones. With head=per_task (the task is known at test time) this is the paper's
own form: the sum over the earlier tasks' heads, each over its own classes.
Published (MOS table, ViT-B/16 augreg_in21k): CIFAR-100 B0 Inc5 last 41.07 %, average 46.29 %.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from clbench.interfaces import Capabilities, Experience, Schedule
from clbench.learners.regularised import Penalty, Regularised, distance_of_predictions
from clbench.models.backbone import Backbone
from clbench.training.fit import Recipe
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.steps import Project, RefreshOptions, Steps, Trainable, whole


class Lwf(Regularised):
    """State: backbone and head (the teacher is both, as an experience finds them)."""

    capabilities: ClassVar[Capabilities] = Capabilities(anytime=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        strength: float = 3.0,
        temperature: float = 2.0,
        lr: float = 0.01,  # head
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 2e-4,
        schedule: Schedule = constant,
        head: Literal["single", "per_task"] = "single",  # per_task: for streams that disclose their tasks
        trainable: Trainable = "all",  # all | half | lisa: a random part of the blocks, see `training/chosen_layers.py`
        refresh: RefreshOptions = None,  # {variant: official | paper, ...}, see `training/refresh.py`
        project: Project = None,  # bloop: the penalty gives way to the cross-entropy, see `training/bloop.py`
    ):
        recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        rates = {"lr": lr, "backbone_lr": backbone_lr}
        steps = Steps(runtime, refresh=refresh, trainable=whole(trainable), project=project)
        super().__init__(
            model, runtime, recipe, strength, **rates, epochs=epochs, batch_size=batch_size, head=head, steps=steps
        )
        self.temperature = temperature

    def penalty(self, experience: Experience) -> Penalty | None:
        """KD without the factor T^2 on the logits of the classes known before."""
        if not experience.index:
            return None
        return distance_of_predictions(self.model, self.head, self.temperature, squared=False)
