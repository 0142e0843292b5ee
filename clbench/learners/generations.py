"""Model collapse: generation after generation of a model, trained from scratch on text that the one before wrote.

Shumailov et al., "AI models collapse when trained on recursively generated data", Nature 631, 2024; Gerstgrasser et al., "Is
model collapse inevitable? Breaking the curse of recursion by accumulating real and synthetic data", 2024, arXiv 2404.01413;
Kazdan et al., "Collapse or thrive?", 2024, arXiv 2410.16713 (the third form).

Experience k is generation k. Generation 0 learns the real text D_0. Before a later one the model writes D_k, as many sequences
as the stream gives experience k; its real text is not read. From fresh weights (those of generation 0) it then learns

replace      D_k
accumulate   D_0 and all that was written, once: the budget grows with k
subsample    as many sequences as D_k has, drawn without replacement from all of those: the budget stays

On one language of known entropy (`scenario=cpt_synthetic scenario.order=[0,0,0,0,0]`) `regret` is the last generation's loss
on real text above what is possible, and `forgetting_after` what was lost since generation 0.

Deviations: fresh weights, as in the pre-training runs of Gerstgrasser et al.; Shumailov et al. fine-tune one pre-trained
network in each generation. A text begins with a token drawn by its share of the text learned (there is no mark for the
beginning); Shumailov et al. begin with real text. No published number is at this scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor, nn

from clbench.interfaces import Capabilities, Experience, Schedule, UserError
from clbench.learners.pretrain import Pretrain
from clbench.streams.tokens.data import TokenData
from clbench.training.pretraining.segments import PretrainRuntime, Segment
from clbench.training.pretraining.written_text import WrittenText
from clbench.training.schedules import constant
from clbench.training.state import collect, restore

DATA = ("replace", "accumulate", "subsample")


class Generations:
    """`Pretrain` from scratch on what the model before wrote. State: that of `Pretrain`, the written texts."""

    capabilities: ClassVar[Capabilities] = Capabilities(asks="loss", writes_text=True, needs_one_domain=True)

    def __init__(
        self,
        model: nn.Module,
        runtime: PretrainRuntime,
        *,
        lr: float = 3e-3,
        schedule: Schedule = constant,
        data: Literal["replace", "accumulate", "subsample"] = "replace",
        temperature: float = 1.0,  # of the logits, where text is written
        betas: Sequence[float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        clip: float | None = 1.0,
    ):
        if data not in DATA:
            raise UserError(f"learner.data must be one of {', '.join(DATA)}, got {data!r}")
        rest: dict[str, Any] = {"betas": betas, "weight_decay": weight_decay, "clip": clip}
        self.inner = Pretrain(model, runtime, lr=lr, schedule=schedule, boundary="reset", start="scratch", **rest)
        self.runtime, self.data = runtime, data
        self.written = WrittenText(model, runtime, temperature)

    @staticmethod
    def capabilities_of(data: str = "replace", **options: Any) -> Capabilities:
        """Whatever accumulates keeps the real text of generation 0."""
        return replace(Generations.capabilities, stores_exemplars=data != "replace")

    def plan(self, experience: Experience) -> list[Segment]:
        """The trunk of one generation, over its own budget."""
        (trunk,) = self.inner.plan(self._learned(experience))
        given = self.runtime.stream_steps or (_text(experience.train).steps,) * experience.index
        before = sum(sum(given[: i + 1]) if self.data == "accumulate" else given[i] for i in range(experience.index))
        return [replace(trunk, before=before, mixture=trunk.mixture | {"data": self.data})]

    def learn(self, experience: Experience) -> dict[str, float]:
        """Write, then train from fresh weights -> tokens trained on."""
        text, ledger = _text(experience.train), self.runtime.ledger
        if experience.index:
            after = self.data != "replace"
            self.written.write(len(text), text.context, self.runtime.key("write"), after)
            if after:
                real = _text(experience.past[0])
                ledger.replay_bytes = max(ledger.replay_bytes, len(real) * real.sequence_bytes)
        learned = self._learned(experience)
        self.written.note(_text(learned.train), alone=True)
        return self.inner.run(learned, self.plan(experience), owner=self)

    def _learned(self, experience: Experience) -> Experience:
        """The experience with the text that its generation learns instead of its own."""
        text, past = _text(experience.train), [_text(old) for old in experience.past]
        if not experience.index:
            return experience
        key = self.runtime.key("learned")
        if self.data == "replace":
            made = self.written.text(text, len(text), text.steps, len(text), key)
            return replace(experience, train=made, past=())
        real, pool = past[0], sum(len(old) for old in past) + len(text)

        def read(places: np.ndarray, role: str, positions: np.ndarray) -> np.ndarray:
            """Of D_0, which stands first, or of what was written."""
            found = np.empty((len(places), text.context + 1), np.int64)
            old = places < len(real)
            found[old] = real.take(places[old], role, positions[old])
            found[~old] = self.written.read(places[~old] - len(real))
            return found

        whole = self.data == "accumulate"
        size, steps = (pool, sum(old.steps for old in past) + text.steps) if whole else (len(text), text.steps)
        return replace(experience, train=self.written.text(text, size, steps, pool, key, read), past=())

    def loss(self, tokens: Tensor) -> Tensor:
        """Nats of every token after the first: tokens [B, L + 1] int64 -> [B, L]."""
        return self.inner.loss(tokens)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser, data cursor; the written texts."""
        return collect(self, "inner", "written")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)


def _text(data: Any) -> TokenData:
    return data
