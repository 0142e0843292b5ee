"""Soft prompts in front of the text of a decoder: how they start, and whether there is room."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clbench.interfaces import UserError
from clbench.models.decoder import Decoder

LINES = 512


@torch.no_grad()
def random_embeddings(model: Decoder, number: int, generator: torch.Generator) -> Tensor:
    """Embeddings of `number` random tokens, each of the vocabulary equally often, drawn with repetition [number, D]."""
    rows = torch.randint(0, model.shape.vocab, (number,), generator=generator)
    return model.embed_in.weight[rows.to(model.embed_in.weight.device)].clone()


def check_room(model: Decoder, data: Any, in_front: int) -> None:
    """`UserError` where the longest line of `data` does not fit into the context behind `in_front` vectors."""
    longest = max(batch.tokens.shape[1] for batch in data.test_batches(LINES))
    if (needed := longest + in_front) > model.shape.context:
        raise UserError(
            f"{in_front} prompt vectors before lines of {longest} tokens need model.context={needed} or more, it is "
            f"{model.shape.context}: choose a smaller learner.length or a larger model.context"
        )
