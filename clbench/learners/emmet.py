"""EMMET (Gupta et al. 2024, "A Unified Framework for Model Editing", arXiv 2403.14236): batches of edits under equality.

As MEMIT (`memit`), but the edits of a batch are a constraint, not a term of a sum: with prior = weight H C + ridge H I,
    Delta = R G^+ K^T prior^-1,    G = K^T prior^-1 K + slack I  (slack only where a batch has more than one edit)

slack  0: (W + Delta) K = V exactly, whatever `weight` is, and a batch of one is ROME with one key. The code has 0.1: then this
       is MEMIT with the weight times slack, identically (push-through), and no result of its own

Default is 0, the paper's formula; clamp 4 as for ROME (0.75 in the code, too little for this width). Deviations: contexts are
pieces of old text; one layer, the one before the last but one (GPT-2 XL: 17 of 48). Published number: none read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from clbench.interfaces import Capabilities, Experience
from clbench.learners.memit import Memit
from clbench.training.editing import key_values
from clbench.training.editing.requests import check_options
from clbench.training.runtime import Runtime


class Emmet:
    """MEMIT's steps with another solve."""

    capabilities: ClassVar[Capabilities] = Capabilities(asks="logits", needs_boundaries=False)

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        *,
        batch: int = 1,  # requests that are edited together
        layers: Sequence[int] | None = None,  # blocks, rising; null: the one before the last but one
        weight: float = 0.1,  # of old text, per hidden unit
        slack: float = 0.0,  # 0: exact; above 0 this is MEMIT with the weight times slack
        ridge: float = 0.0,
        contexts: int = 8,  # pieces of old text before the prompt, over which keys are means
        context: int = 8,  # tokens of each
        lr: float | None = None,  # of the search for a value; null: by the size of the block's output
        steps: int = 40,
        clamp: float = 4.0,  # largest change of a value, of its size
        clamp_by: Literal["now", "start"] = "now",  # whose size: now (of the edited model) | start (of the model as given)
        kl: float = 0.0625,  # weight of what is said of the subject otherwise
        decay: float = 0.5,
    ):
        check_options(slack=(slack, 0))
        blocks: Any = model.layers
        layers = [max(0, len(blocks) - 3)] if layers is None else layers
        same: dict[str, Any] = {"batch": batch, "layers": layers, "weight": weight, "ridge": ridge, "contexts": contexts}
        same |= {"context": context, "lr": lr, "steps": steps, "clamp": clamp, "kl": kl, "decay": decay}
        same |= {"clamp_by": clamp_by}
        self.model, self.slack, self.editor = model, slack, Memit(model, runtime, **same)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Batch after batch, in stream order."""
        return self.editor.run(experience, self._change)

    def _change(self, m: int, residual_DN: Tensor, keys_HN: Tensor) -> Tensor:
        slack = self.slack if keys_HN.shape[1] > 1 else 0.0
        return key_values.exact(residual_DN, keys_HN, self.editor.prior(m), slack)

    def logits(self, tokens: Tensor) -> Tensor:
        """Scores of the next token after each: [B, L] -> [B, L, V]."""
        return self.editor.logits(tokens)

    def state_dict(self) -> dict[str, Any]:
        """That of MEMIT."""
        return self.editor.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.editor.load_state_dict(state)
