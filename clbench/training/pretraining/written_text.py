"""Text that a decoder writes, to be trained on: what stands in for stored text, and for the text of a later generation.

A text begins with a token drawn by how often it occurs in what the model was trained on, since a model of texts without a mark
at their beginning says nothing of a first token; every further token is drawn from the model. Draws are a pure function of
the key. Reads nothing of the stream but the texts that it is given by `note`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from clbench.interfaces import UserError
from clbench.streams import rng
from clbench.streams.entries import ExperienceEntry
from clbench.streams.tokens.data import Source, TokenData
from clbench.training.pretraining.segments import PretrainRuntime
from clbench.training.state import detached

AT_ONCE = 512  # texts written side by side
NOTED = 4096  # most sequences of a text in which tokens are counted

Read = Callable[[np.ndarray, str, np.ndarray], np.ndarray]


class WrittenText:
    """Texts by a model, and what the next are begun with. State: tokens, shares of first tokens.

    tokens  [N, L + 1] int32
    shares  [V] float64: how often each token occurs in the texts noted, each of which counts the same; not normalised
    """

    def __init__(self, model: nn.Module, runtime: PretrainRuntime, temperature: float = 1.0):
        if not callable(getattr(model, "sample", None)):
            raise UserError(
                f"learner: text is written by a model that has `sample`, as decoders do; {type(model).__name__} has not"
            )
        if not temperature > 0:
            raise UserError(f"learner.temperature must be above 0, got {temperature}")
        self.model, self.runtime, self.temperature = model, runtime, temperature
        identity: Any = model.identity
        self.tokens = torch.zeros(0, 1, dtype=torch.int32)
        self.shares = torch.zeros(int(identity["vocab"]), dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.tokens)

    def note(self, text: TokenData, alone: bool = False) -> None:
        """Count the tokens of a text that the model is trained on; `alone`: forget those counted before."""
        found = text.read(np.arange(min(len(text), NOTED))).ravel()
        counts = np.bincount(found, minlength=len(self.shares))
        self.shares = self.shares * (not alone) + torch.from_numpy(counts / counts.sum())

    @torch.no_grad()
    def write(self, number: int, length: int, key: int, after: bool = False) -> None:
        """Let the model write `number` texts of `length` + 1 tokens, behind those there are (`after`) or in their place."""
        model, runtime = self.model, self.runtime
        edges = np.cumsum(self.shares.numpy())
        places = rng.uniform(rng.key(key, "first"), np.arange(number)) * edges[-1]
        first = np.minimum(np.searchsorted(edges, places, "right"), len(edges) - 1)
        precision = torch.float32 if runtime.device.type == "mps" else torch.float64
        model.eval()
        parts = [self.tokens] if after and len(self) else []
        with runtime.phase("write"):
            for start in range(0, number, AT_ONCE):
                rows = np.arange(start, min(start + AT_ONCE, number))
                counters = rows[:, None] * length + np.arange(length)
                draws = torch.from_numpy(rng.uniform(rng.key(key, "next"), counters)).to(precision).to(runtime.device)
                begun = torch.from_numpy(first[rows]).to(runtime.device)
                parts.append(model.sample(begun, draws, self.temperature).to("cpu", torch.int32))  # type: ignore[operator]
                runtime.check_stop()
        self.tokens = torch.cat(parts)
        runtime.ledger.write(number * length, runtime.flops_per_token)

    def clear(self) -> None:
        """Drop the texts: they were learned."""
        self.tokens = self.tokens[:0]

    def read(self, places: np.ndarray) -> np.ndarray:
        """Texts by place -> [B, L + 1] int64."""
        return self.tokens[torch.from_numpy(np.asarray(places, np.int64))].long().numpy()

    def text(self, like: TokenData, size: int, steps: int, pool: int, key: int, read: Read | None = None) -> TokenData:
        """`size` texts out of `pool`, in an order drawn by `key`, as an experience's text; `read` where not all is here.

        With size = pool it is all of them; below, a choice without replacement.
        """
        source = Source(pool, like.itemsize, read or (lambda places, role, positions: self.read(places)))
        entry = ExperienceEntry(f"text written for {like.name}", domain=like.domain, first=0, sequences=size, steps=steps)
        return TokenData.of(entry, source, like.context, like.batch, key)

    def state_dict(self) -> dict[str, Any]:
        """The texts, and what the next are begun with."""
        return {"tokens": self.tokens, "shares": self.shares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        cpu = torch.device("cpu")
        self.tokens, self.shares = (detached(state[name], cpu) for name in ("tokens", "shares"))
