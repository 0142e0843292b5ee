"""A part of a text chosen by quality: the sequences on which a reference decoder has the lowest loss.

Guo et al. 2024 (arXiv 2406.14833) rank a corpus by the perplexity of a small model of a good reference corpus, and read the
best part several times. A learner here is given no such corpus. The reference is the model itself as an experience finds it,
trained for `steps` steps on new text drawn at random and put back afterwards (a reference trained on a part of the text that it
ranks: Marion et al. 2023, arXiv 2309.04564): what is rare or noise in the text keeps a high loss. On natural text the lowest
losses can be those of repeated boilerplate; hence "middle".

The ledger counts what the reference reads, and the pass over the whole text that ranks it, as looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from clbench.streams import rng
from clbench.streams.entries import ExperienceEntry
from clbench.streams.tokens import sequences
from clbench.streams.tokens.data import Source, TokenData
from clbench.training.pretraining.pilot import after_pilot, losses
from clbench.training.pretraining.segments import PretrainRuntime
from clbench.training.state import detached

Rank = Literal["lowest", "middle", "highest"]
RANKS = ("lowest", "middle", "highest")
AT_ONCE = 64  # sequences that are ranked side by side


def ranked(scores: np.ndarray, number: int, rank: Rank) -> np.ndarray:
    """The `number` places of the lowest, middle or highest scores [N], rising -> [number] int64; of equal ones the first."""
    order = np.argsort(scores, kind="stable")
    first = {"lowest": 0, "middle": (len(scores) - number) // 2, "highest": len(scores) - number}[rank]
    return np.sort(order[first : first + number])


class RankedSubset:
    """Which sequences of each experience are read. State: their numbers, by experience; none where all are."""

    def __init__(self, rank: Rank, steps: int, lr: float, adam: dict[str, Any]):
        self.rank: Rank = rank
        self.steps, self.lr, self.adam = steps, lr, adam
        self.chosen: list[Tensor] = []  # [n] int64; empty: the whole text

    def choose(
        self, runtime: PretrainRuntime, model: nn.Module, tuned: nn.Module, text: TokenData, index: int, number: int
    ) -> None:
        """Rank the text of experience `index` and keep `number` sequences of it."""
        self.chosen = [*self.chosen[:index], *[torch.zeros(0, dtype=torch.int64)] * (index - len(self.chosen))]
        if number >= len(text):
            self.chosen.append(torch.zeros(0, dtype=torch.int64))
            return
        with runtime.phase("rank"):
            scores = self.scores(model, tuned, text, runtime.key("rank"), runtime.check_stop)
        flops, size = runtime.flops_per_token, text.context
        runtime.ledger.look("probe", self.steps * text.batch * size, 3 * flops)
        runtime.ledger.look("probe", len(text) * size, flops)
        self.chosen.append(torch.from_numpy(ranked(scores, number, self.rank)))

    def scores(
        self, model: nn.Module, tuned: nn.Module, text: TokenData, key: int, check_stop: Callable[[], None]
    ) -> np.ndarray:
        """Mean nats of each sequence of a text under the reference -> [N] float64."""

        def batch(step: int) -> np.ndarray:
            positions = step * text.batch + np.arange(text.batch)
            return text.take(sequences.passes(rng.key(key, "reference"), len(text), positions), "pilot", positions)

        found, options = [], {"steps": self.steps, "lr": self.lr, "adam": self.adam, "check_stop": check_stop}
        with after_pilot(model, batch, tuned=tuned, **options), torch.no_grad():
            for first in range(0, len(text), AT_ONCE):
                check_stop()
                numbers = np.arange(first, min(first + AT_ONCE, len(text)))
                found.append(losses(model, text.take(numbers, "judged", numbers)).double().mean(1).cpu().numpy())
        return np.concatenate(found)

    def of(self, text: TokenData, index: int) -> TokenData:
        """What is read of the text of experience `index`: its chosen sequences, in an order drawn by the text's own key."""
        numbers = self.chosen[index].cpu().numpy() if index < len(self.chosen) else np.zeros(0, np.int64)
        if not len(numbers):
            return text

        def read(places: np.ndarray, role: str, positions: np.ndarray) -> np.ndarray:
            return text.take(numbers[places], role, positions)

        source = Source(len(numbers), text.itemsize, read)
        entry = ExperienceEntry(f"the best of {text.name}", domain=text.domain, sequences=len(numbers), steps=text.steps)
        return TokenData.of(entry, source, text.context, text.batch, text.key)

    def state_dict(self) -> dict[str, Any]:
        """The numbers."""
        return {"chosen": self.chosen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.chosen = [detached(one, torch.device("cpu")) for one in state["chosen"]]
