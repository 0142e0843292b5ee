"""What is left of a network's plasticity: dormant units and the rank of its features, on samples of an evaluation set.

    dormant_share   units whose activation is not 0 on less than 1 % of the samples (of a convolution: of samples and places),
                    of all units behind activation modules (Dohare et al. 2024, Nature 632, loss of plasticity)
    quiet_share     units with mean |h| / (mean |h| of their layer + 1e-9) <= 0.025 (Sokar et al. 2023, arXiv 2302.12902, ReDo)
    effective_rank  exp(-sum p log p), p the singular values of the features [n, D] / their sum (Roy & Vetterli 2007)
    stable_rank     the least k whose k largest singular values make 99 % of their sum (srank of Kumar et al. 2021)

Ranks are at most the number of samples: compare sets of one size. Numbers of a set are not additive over samples; each is
multiplied by n, so that sum / n is the set's own number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clbench.interfaces import EvaluationSet, UserError

MODULES = (nn.ReLU, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.ELU, nn.Hardswish, nn.ReLU6, nn.Tanh, nn.Sigmoid)
DORMANT, QUIET, KEPT = 0.01, 0.025, 0.99
BATCH, MOST = 64, 2000  # images of a pass; samples of a set that are looked at


class Units:
    """Sums over samples of one layer: how often each unit is not 0, and |h|."""

    def __init__(self) -> None:
        self.active: Tensor | None = None
        self.size: Tensor | None = None
        self.count = 0

    def add(self, h: Tensor) -> None:
        """Activations [B, units], [B, units, H, W] of a convolution, or [B, tokens, units]."""
        rows = (
            h.detach().float().flatten(2).transpose(1, 2).flatten(0, 1) if h.dim() == 4 else h.detach().float().flatten(0, -2)
        )
        active, size = (rows != 0).sum(0).double().cpu(), rows.abs().sum(0).double().cpu()
        if self.active is None or self.size is None:
            self.active, self.size = torch.zeros_like(active), torch.zeros_like(size)
        self.active, self.size, self.count = self.active + active, self.size + size, self.count + len(rows)

    def dormant(self) -> tuple[int, int, int]:
        """Units that are dormant, quiet, all."""
        assert self.active is not None and self.size is not None
        mean = self.size / self.count
        dormant = self.active / self.count < DORMANT
        quiet = mean / (mean.mean() + 1e-9) <= QUIET
        return int(dormant.sum()), int(quiet.sum()), len(mean)


@contextmanager
def watched(network: nn.Module) -> Iterator[dict[tuple[str, int], Units]]:
    """Units of every activation module inside the `with` block; a module that runs several times a pass is several layers."""
    found: dict[tuple[str, int], Units] = {}
    calls: dict[str, int] = {}

    def seen(name: str) -> Any:
        def hook(module: nn.Module, given: Any, out: Tensor) -> None:
            calls[name] = calls.get(name, -1) + 1
            found.setdefault((name, calls[name]), Units()).add(out)

        return hook

    with ExitStack() as stack:
        stack.callback(network.register_forward_pre_hook(lambda *_: calls.clear()).remove)
        for name, module in network.named_modules():
            if isinstance(module, MODULES):
                stack.callback(module.register_forward_hook(seen(name)).remove)
        yield found


def effective_rank(s: Tensor) -> float:
    """Of singular values [k]: the exponential of the entropy of their shares; 0 where all are 0."""
    p = s[s > 0] / s.sum() if s.sum() > 0 else s[:0]
    return float(torch.exp(-(p * p.log()).sum())) if len(p) else 0.0


def stable_rank(s: Tensor) -> float:
    """Of singular values [k], largest first: how many make 99 % of their sum; 0 where all are 0."""
    total = s.sum()
    return float((torch.cumsum(s, 0) < KEPT * total).sum() + 1) if total > 0 else 0.0


class Activations:
    """Evaluator `activations`: shares of dormant units and ranks of features of a learner's `model`, see above."""

    name = "activations"

    def __call__(self, learner: Any, data: EvaluationSet) -> dict[str, int | float]:
        """dormant_share, quiet_share, effective_rank, stable_rank, each times n."""
        model: Any = getattr(learner, "model", None)
        if not callable(getattr(model, "features", None)) or not callable(getattr(model, "modules", None)):
            raise UserError(f"evaluator activations needs a network: {type(learner).__name__} has no model with features")
        features, n = [], 0
        modes = {module: module.training for module in model.modules()}
        passes = dict(getattr(model, "passes", {}))
        model.eval()
        try:
            with torch.no_grad(), watched(getattr(model, "net", model)) as layers:
                for batch in data.batches(BATCH):
                    features.append(model.features(batch.x[: MOST - n]).float().cpu())
                    n += len(features[-1])
                    if n >= MOST:
                        break
        finally:
            for module, mode in modes.items():
                module.training = mode
            if passes:
                model.passes.update(passes)
        if not layers:
            raise UserError("evaluator activations: no activation module of the network runs, so there are no units to count")
        dormant, quiet, units = (sum(column) for column in zip(*(layer.dormant() for layer in layers.values()), strict=True))
        s = torch.linalg.svdvals(torch.cat(features).double())
        shares = {"dormant_share": dormant / units, "quiet_share": quiet / units}
        ranks = {"effective_rank": effective_rank(s), "stable_rank": stable_rank(s)}
        return {"n": n, **{name: n * value for name, value in (shares | ranks).items()}}
