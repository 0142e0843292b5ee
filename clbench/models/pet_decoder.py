"""Where parameter-efficient modules hang in a GPT-NeoX decoder, for what is more than a term of a linear layer.

    adapter   beside the MLP (input: the residual stream, before the second norm) or beside the attention (input: normalised)
    prefix    keys and values before the text's own, in every block, seen by every position
    prompt    vectors before the text's embeddings, in front of the first block

Positions. A prefix has none: its keys are not turned, and the text stays at 0 .. L - 1, so that a text may be as long as the
context. A prompt has the positions 0 .. n - 1 and is causal like a text: token t of the text stands at n + t and sees the whole
prompt. So n + L may not be above the context; outputs at the prompt's positions are dropped. `transformers` with a cache of
prefix keys counts positions of the text from n instead: another parametrisation of the same prefix, R(n) between the keys.

Shapes: B batch, L tokens of a text, n of a prompt or prefix, D width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clbench.interfaces import UserError
from clbench.models.decoder import Decoder
from clbench.models.pet import Pet
from clbench.models.pet_sites import broadcast


@dataclass(eq=False)
class DecoderPrefix:
    """Keys and values of a prefix, as `decoder.Block.prefix` asks for them."""

    pet: Pet
    block: int
    heads: int
    learn_scale: bool

    def __call__(self, batch: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values [B, H, n, D / H]; None where the bare network computes."""
        if not self.pet.active or f"{self.block}/k" not in self.pet.in_use():
            return None
        return self._of("k", batch), self._of("v", batch)

    def _of(self, name: str, batch: int) -> Tensor:
        value, mixed = self.pet.get(f"{self.block}/{name}", batch)
        if self.learn_scale:
            value = value * broadcast(self.pet.get(f"{self.block}/scale_{name}", batch), value)
        value = value if mixed else value.expand(batch, -1, -1)
        return value.unflatten(-1, (self.heads, -1)).transpose(1, 2)


@dataclass(eq=False)
class Prompt:
    """Vectors [n, D] before the embeddings of a text."""

    pet: Pet
    name: str

    def put(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Hook behind the embedding: x [B, L, D] -> [B, n + L, D]."""
        if not self.pet.active:
            return out
        tokens, mixed = self.pet.get(self.name, len(out))
        return torch.cat([(tokens if mixed else tokens.expand(len(out), -1, -1)).to(out.dtype), out], dim=1)


def hang_prefix(block: Any, pet: Pet, number: int, learn_scale: bool) -> None:
    """Give a block a prefix; `UserError` where it has one."""
    if block.prefix is not None:
        raise UserError(f"pet=prefix: block {number} has a prefix already")
    block.prefix = DecoderPrefix(pet, number, block.shape.heads, learn_scale)


def require_room(model: Any, pet: Pet | None, length: int) -> None:
    """`UserError` where texts of `length` tokens behind the pet's prompt do not fit into the context of a decoder."""
    if pet is None or not pet.in_front or not isinstance(model, Decoder):
        return
    if (needed := length + pet.in_front) > model.shape.context:
        raise UserError(
            f"pet={pet.kind} puts {pet.in_front} vectors before texts of {length} tokens: model.context={needed} or more is "
            f"needed, it is {model.shape.context}"
        )
