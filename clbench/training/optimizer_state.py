"""The state of an optimiser from experience to experience: moments that are kept by name, and AdamW over a whole model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clbench.interfaces import UserError
from clbench.training.distributed import placed_like
from clbench.training.runtime import Runtime
from clbench.training.state import detached

SHARED = ("d", "d_max", "d_numerator", "k", "weighted")  # numbers that an optimiser has once for all parameters, in its groups
ALL = "*"  # their place


class Adam(torch.optim.AdamW):
    """AdamW over a model's parameters, matrices decayed, vectors not; kept, emptied or cleaned at boundaries.

    clip  largest global gradient norm, None for none
    A model's `rate_shares()` (name -> share) makes a group for each share, whose rate is that share of the others' (`share`)
    and whose decay is as many times higher: what is taken off in a step is the same.
    """

    def __init__(self, model: nn.Module, betas: Sequence[float], weight_decay: float, clip: float | None):
        self.params, self.clip = list(model.parameters()), clip
        named: dict[str, float] = model.rate_shares() if hasattr(model, "rate_shares") else {}  # type: ignore[operator]
        shares = {id(p): named[name] for name, p in model.named_parameters() if name in named}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.params if p.ndim >= 2 and id(p) not in shares], "weight_decay": weight_decay},
            *(
                {"params": [p for p in self.params if shares.get(id(p)) == s], "weight_decay": weight_decay / s, "share": s}
                for s in sorted(set(shares.values()))
            ),
            {"params": [p for p in self.params if p.ndim < 2], "weight_decay": 0.0},
        ]
        fused = self.params[0].device.type in ("cpu", "cuda")
        super().__init__([g for g in groups if g["params"]], betas=tuple(betas), fused=fused)  # type: ignore[arg-type]

    def clip_gradients(self, *_: Any) -> None:
        """`fit` calls it before a step. The norm is over the model's order of parameters."""
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.params, self.clip)

    def reset_moments(self) -> None:
        """Zero both moments; the step count, which corrects their bias, stays."""
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name].zero_()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; it is copied, and placed like the parameters."""
        super().load_state_dict(detached(state_dict))
        for param, moments in self.state.items():
            moments |= {name: placed_like(value, param) for name, value in moments.items() if value.shape == param.shape}


def take_over(runtime: Runtime, name: str, learner: Any, optimizer: torch.optim.Optimizer) -> None:
    """Moments of parameters that an earlier experience trained in a `fit` of this name; others start without."""
    kept = runtime.optimizers.get(name, {})
    for group in optimizer.param_groups:
        group |= kept.get(ALL, {})
    for place, p in _places(learner, optimizer, name).items():
        if (state := kept.get(place)) is not None and list(state["shape"]) == list(p.shape):
            moments = state["state"].items()  # Adam counts its steps on the CPU
            optimizer.state[p] = {k: detached(value, None if k == "step" else p.device) for k, value in moments}


def keep(runtime: Runtime, name: str, learner: Any, optimizer: torch.optim.Optimizer) -> None:
    """Keep the moments for the next experience."""
    found = {place: p for place, p in _places(learner, optimizer, name).items() if p in optimizer.state}
    made = {place: {"shape": list(p.shape), "state": detached(optimizer.state[p])} for place, p in found.items()}
    shared = {key: value for key, value in optimizer.param_groups[0].items() if key in SHARED}
    runtime.optimizers[name] = runtime.optimizers.get(name, {}) | made | ({ALL: shared} if shared else {})


def _places(learner: Any, optimizer: torch.optim.Optimizer, fit_name: str) -> dict[str, Tensor]:
    """Trained parameters by their place in the learner, the same in every process. `UserError` where one has none."""
    found: dict[int, str] = {}
    for attribute, part in vars(learner).items():
        if isinstance(part, nn.Module):
            for name, p in part.named_parameters():
                found.setdefault(id(p), f"{attribute}.{name}")
        elif isinstance(part, nn.Parameter):
            found.setdefault(id(part), attribute)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if any(id(p) not in found for p in params):
        kind = type(learner).__name__
        raise UserError(f"optimizer_state=keep: fit {fit_name!r} of {kind} trains parameters that are in no attribute of it")
    return {found[id(p)]: p for p in params}
