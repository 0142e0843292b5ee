"""Distillation losses towards an earlier network. Shapes: logits z [B, K], features f [B, D]; targets carry no gradient."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from clbench.models.backbone import Backbone


def prediction_distillation(z: Tensor, target: Tensor, temperature: float = 2.0, squared: bool = True) -> Tensor:
    """-sum softmax(target / T) log softmax(z / T), mean over the batch; times T^2 where `squared` (Hinton et al. 2015).

    Its gradient is that of the Kullback-Leibler divergence. PyCIL's LwF, iCaRL, BiC and WA leave the factor out.
    """
    soft = -((target / temperature).softmax(1) * (z / temperature).log_softmax(1)).sum(1).mean()
    return soft * temperature**2 if squared else soft


def feature_distillation(f: Tensor, target: Tensor) -> Tensor:
    """Squared distance |f - target|^2, mean over the batch."""
    return (f - target).square().sum(1).mean()


def frozen_copy(model: Backbone, *heads: nn.Module) -> tuple[Any, ...]:
    """The network and its classifiers as they are now, for targets: nothing of them trains."""
    teacher = copy.deepcopy(model)
    teacher.freeze()
    return teacher, *(copy.deepcopy(head).requires_grad_(False).eval() for head in heads)
