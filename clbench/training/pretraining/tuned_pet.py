"""A parameter-efficient module in place of a decoder's weights: what it must fit, and what its training costs."""

from __future__ import annotations

from typing import Any

from torch import nn

from clbench.interfaces import UserError
from clbench.models.pet import Factory, Pet
from clbench.training.pretraining.segments import PretrainRuntime


def attach_pet(pet: Factory, model: Any, runtime: PretrainRuntime) -> Pet | None:
    """Attach a module to the model that a run trains, and set the operations of its steps; None for the whole model.

    `UserError` for kinds that are guided by labelled data, for several processes, torch.compile and muP, and for a kind with
    dropout where batches are cut: the pieces would draw otherwise.
    """
    made = pet(model, runtime)
    if made is None:
        return None
    kind = made.kind
    wrong = {
        f"pet={kind} is chosen by data or steps of its training, which learners of texts do not tell it": made.guide
        is not None,
        f"pet={kind} needs parallel=none: its values are in no replica of the model": runtime.group.kind != "none",
        f"pet={kind} needs compile=false": runtime.compiled,
        f"pet={kind} needs model.mup=null: rates of its values are not those of the family": getattr(model, "times", 1) != 1,
        f"pet={kind} with dropout needs micro_batch=null, or learner.pet.dropout=0": (
            made.drops and runtime.micro_batch is not None
        ),
    }
    if lines := [line for line, holds in wrong.items() if holds]:
        raise UserError("\n".join(lines))
    runtime.trained_flops = step_flops(model, made, runtime.flops_per_token)
    return made


def step_flops(model: nn.Module, pet: Pet, whole: float) -> float:
    """Operations per token of a step that trains a pet, of those per token that train the `whole` model.

    A frozen weight of a matrix product costs 4 instead of 6: its own gradient is not computed. A value of the pet costs 6, as
    in a matrix product; what a prompt or a prefix makes attention longer by is not counted.
    """
    frozen = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    return whole - 2.0 * frozen + 6.0 * pet.num_values()
