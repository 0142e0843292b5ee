"""Training of a random part of a network's blocks: half fine-tuning and LISA.

half  (HFT, arXiv 2404.18466): in each experience a random `ratio` of the blocks' layers is trained, a new draw each time, the
      rest stands still. unit "matrix" (the paper's): of each block and category (attention, feed-forward, normalisation);
      where that is no whole number of layers the rounding alternates from block to block, in random order, so that over all
      it is `ratio`. "layer": whole blocks. "model": of all layers of the blocks together.
lisa  (LISA, arXiv 2403.17919, LMFlow's release): every `every` steps of an experience `blocks` of the blocks are drawn; these
      alone are trained until the next draw. Moments of blocks that sleep stay as they are.

Whatever stands outside the blocks is always trained: patch embedding, last norm, head. A block is what the first number in the
names of weights counts (blocks.3, layer1.0; a layer of a plain network); a layer is a matrix or a convolution with its bias, a
norm. Choices: a bias goes with its matrix (the paper's networks have none); LISA's constants are those of language models.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from torch import nn

from clbench.interfaces import Place, UserError
from clbench.models.backbone import Backbone
from clbench.streams import rng
from clbench.training.runtime import Runtime

Blocks = dict[str, dict[str, list[str]]]  # block -> category -> the names of its layers
Draw = Callable[[Blocks, int], set[str]]  # blocks, key -> the layers that are trained
UNITS = ("matrix", "layer", "model")


def blocks_of(model: nn.Module) -> Blocks:
    """Layers that own trainable weights, by block and category, in the network's order."""
    found: Blocks = {}
    for name, module in model.named_modules():
        block = re.search(r"^.*?\.\d+(?=\.|$)", f".{name}")
        if block is None or not any(p.requires_grad for p in module.parameters(recurse=False)):
            continue
        is_matrix = any(p.ndim >= 2 for p in module.parameters(recurse=False))
        kind = "attention" if re.search(r"attn|attention", name) else "feed-forward"
        found.setdefault(block[0][1:], {}).setdefault(kind if is_matrix else "norm", []).append(name)
    return found


class Half:
    """A random `ratio` of the layers, drawn once an experience."""

    every = None

    def __init__(self, *, unit: Literal["matrix", "layer", "model"] = "matrix", ratio: float = 0.5):
        if unit not in UNITS:
            raise UserError(f"unknown learner.trainable half unit={unit}: choose {', '.join(UNITS)}")
        if not 0 <= ratio <= 1:
            raise UserError(f"learner.trainable half: ratio must lie in [0, 1], got {ratio}")
        self.unit, self.ratio = unit, ratio

    def __call__(self, blocks: Blocks, key: int) -> set[str]:
        """The layers that are trained."""
        if self.unit == "model":
            return set(self.share([layer for kinds in blocks.values() for names in kinds.values() for layer in names], key))
        if self.unit == "layer":
            return {layer for block in self.share(list(blocks), key) for names in blocks[block].values() for layer in names}
        chosen: set[str] = set()
        for kind in sorted({kind for kinds in blocks.values() for kind in kinds}):
            groups = [kinds[kind] for kinds in blocks.values() if kind in kinds]
            passed = taken = 0
            for i in rng.permutation(rng.key(key, kind), len(groups)):  # carries the rounding on
                passed += len(groups[i])
                count = round_half_up(self.ratio * passed) - taken
                taken += count
                chosen |= {groups[i][j] for j in rng.permutation(rng.key(key, kind, int(i)), len(groups[i]))[:count]}
        return chosen

    def share(self, names: list[str], key: int) -> list[str]:
        """A random `ratio` of some names."""
        return [names[i] for i in rng.permutation(key, len(names))[: round_half_up(self.ratio * len(names))]]


class Lisa:
    """`blocks` of the blocks, drawn anew every `every` steps."""

    def __init__(self, *, blocks: int = 2, every: int = 20):
        if blocks < 1 or every < 1:
            raise UserError(f"learner.trainable lisa: blocks and every must be at least 1, got {blocks} and {every}")
        self.number, self.every = blocks, every

    def __call__(self, blocks: Blocks, key: int) -> set[str]:
        """The layers that are trained."""
        if self.number > len(blocks):
            raise UserError(f"learner.trainable lisa: blocks={self.number}, the network has {len(blocks)}")
        names = list(blocks)
        drawn = [names[i] for i in rng.permutation(key, len(names))[: self.number]]
        return {layer for block in drawn for found in blocks[block].values() for layer in found}


def round_half_up(x: float) -> int:
    """2.5 -> 3."""
    return int(x + 0.5)


@contextlib.contextmanager
def chosen_layers(draw: Half | Lisa, model: Backbone, runtime: Runtime) -> Iterator[Callable[[Place], None] | None]:
    """Train a part of the blocks inside -> a hook for `fit`'s `at_place`, where the part changes from step to step."""
    blocks = blocks_of(model)
    if not blocks:
        raise UserError(f"learner.trainable: {model.identity['name']} has no numbered blocks; choose learner.trainable=all")
    names = [layer for kinds in blocks.values() for found in kinds.values() for layer in found]
    owned = {name: [p for p in model.get_submodule(name).parameters(recurse=False) if p.requires_grad] for name in names}

    def train(layers: set[str]) -> None:
        for name, params in owned.items():
            for p in params:
                p.requires_grad_(name in layers)

    try:
        if draw.every is None:
            train(draw(blocks, runtime.key("half")))
            yield None
        else:
            every = draw.every
            yield lambda place: train(draw(blocks, runtime.key("lisa", place.step // every)))
    finally:
        train(set(names))


def option(value: str | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The word and the options of "word" or {word: {option: value}}."""
    if isinstance(value, str):
        return value, {}
    if len(value) != 1 or not isinstance(next(iter(value.values())), Mapping):
        raise UserError(f"write an option as a word or as {{word: {{option: value}}}}, got {dict(value)}")
    return next(iter(value.items()))
