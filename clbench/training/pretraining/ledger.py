"""Ledger of a pre-training run: tokens by purpose, repeated tokens, floating-point operations, bytes of replay text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn


@dataclass
class Ledger:
    """Whole numbers of tokens. trunk_new + trunk_replay + branch_new + branch_replay = unique + repeated = all trained on.

    trunk, branch  what the weights that go on, and annealed copies that do not, were trained on
    repeated       read before in this run: every replayed token, and new text past its first pass
    probe          looked at while training, for the curves, and for evaluators beside the loss; `evaluation`: for the loss
    flops          forward and backward of training, 6 * parameters + attention per token, 4 where frozen; probes and evaluation
                   a third each
    replay_bytes   largest amount of old text that had to be at hand
    written        by the model itself, to be trained on; a third of the operations each, in `flops`. Trained on, written text
                   counts as new where it is the text of an experience, as replayed and repeated where it stands for old text
    """

    trunk_new: int = 0
    trunk_replay: int = 0
    branch_new: int = 0
    branch_replay: int = 0
    unique: int = 0
    repeated: int = 0
    probe: int = 0
    evaluation: int = 0
    flops: float = 0.0
    probe_flops: float = 0.0
    replay_bytes: int = 0
    written: int = 0

    @property
    def trained(self) -> int:
        """Tokens trained on."""
        return self.trunk_new + self.trunk_replay + self.branch_new + self.branch_replay

    def train(self, role: str, new: int, replay: int, repeated: int, flops_per_token: float) -> None:
        """Count tokens of some steps."""
        setattr(self, f"{role}_new", getattr(self, f"{role}_new") + new)
        setattr(self, f"{role}_replay", getattr(self, f"{role}_replay") + replay)
        self.unique += new + replay - repeated
        self.repeated += repeated
        self.flops += (new + replay) * flops_per_token

    def look(self, purpose: str, tokens: int, flops_per_token: float) -> None:
        """Count tokens that are only looked at."""
        setattr(self, purpose, getattr(self, purpose) + tokens)
        self.probe_flops += tokens * flops_per_token / 3

    def write(self, tokens: int, flops_per_token: float) -> None:
        """Count tokens that the model writes."""
        self.written += tokens
        self.flops += tokens * flops_per_token / 3

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; `written` where something was."""
        return {name: value for name, value in asdict(self).items() if value or name != "written"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the numbers of `state`."""
        for name, value in ({"written": 0} | state).items():
            setattr(self, name, value)


def flops_per_token(model: nn.Module, context: int) -> float:
    """Training operations per token: 6 for each weight that multiplies (embedding look-ups do not), 12 L T d for attention.

    Causal attention is counted in full, as in most published figures. A model with a `flops_per_token(context)` says it itself.
    """
    own = getattr(model, "flops_per_token", None)
    if callable(own):
        return float(own(context))  # type: ignore[arg-type]
    identity: Any = getattr(model, "identity", {})
    looked_up = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    weights = sum(p.numel() for p in model.parameters()) - looked_up
    return 6.0 * weights + 12.0 * float(identity.get("depth", 0)) * context * float(identity.get("width", 0))
