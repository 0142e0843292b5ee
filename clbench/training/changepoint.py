"""Where a stream changes: Bayesian online changepoint detection (Adams & MacKay 2007, arXiv 0710.3742).

A run is a stretch in which the summaries x of batches come from one distribution; r is how many of them the present run has.
Of each r there are a weight and statistics of the last r summaries, dimensions on their own, with a normal-inverse-gamma prior:

    pi_r = prod_d Student-t(x_d; 2 alpha_r, mu_r, beta_r (kappa_r + 1) / (alpha_r kappa_r))
    P(r + 1) ~ P(r) pi_r (1 - hazard),    P(0) ~ sum_r P(r) pi_r hazard
    beta += kappa (x - mu)^2 / (2 (kappa + 1)),  mu <- (kappa mu + x) / (kappa + 1),  kappa += 1,  alpha += 1/2

A boundary is found where the runs that began after the last one have more than `certain` of the weight; the likeliest run is
the present one from then on. P(0) itself is always the hazard, so no boundary can be read from it.

Choices: the first `warm` summaries set the scale (mean and standard deviation, all x are standardised by them; no boundary is
found among them), the prior is mu = 0, kappa = 0.1, alpha = beta = warm / 2, runs of less than `least` are dropped.

Legend: R runs that are kept, D numbers of a summary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from clbench.interfaces import UserError

FIELDS = ("run_R", "log_R", "mean_RD", "kappa_R", "alpha_R", "beta_RD")


class RunLengths:
    """The weights of all runs. State: FIELDS, float64 (`run_R` int64): log weights sum to 1."""

    def __init__(self, width: int, hazard: float, *, kappa: float = 0.1, alpha: float = 1.0, least: float = 0.0):
        self.hazard, self.least = hazard, least
        one = torch.ones(1, dtype=torch.float64)
        wide = torch.ones(1, width, dtype=torch.float64)
        self.prior = {"mean_RD": 0 * wide, "kappa_R": kappa * one, "alpha_R": alpha * one, "beta_RD": alpha * wide}
        self.run_R, self.log_R = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
        self.mean_RD, self.kappa_R, self.alpha_R, self.beta_RD = self.prior.values()

    def log_predictive(self, x: Tensor) -> Tensor:
        """Log pi_r of x [D] -> [R]."""
        kappa, alpha = self.kappa_R[:, None], self.alpha_R[:, None]
        scale = self.beta_RD * (kappa + 1) / (alpha * kappa)
        z = (x - self.mean_RD).square() / (2 * alpha * scale)
        constant = (alpha + 0.5).lgamma() - alpha.lgamma() - 0.5 * (2 * math.pi * alpha * scale).log()
        return (constant - (alpha + 0.5) * z.log1p()).sum(1)

    def update(self, x: Tensor) -> None:
        """Learn a summary x [D]."""
        joint = self.log_R + self.log_predictive(x)
        change = joint.logsumexp(0) + math.log(self.hazard)
        log_R = torch.cat([change[None], joint + math.log1p(-self.hazard)])
        kappa, gap = self.kappa_R[:, None], x - self.mean_RD
        grown = {
            "mean_RD": self.mean_RD + gap / (kappa + 1),
            "kappa_R": self.kappa_R + 1,
            "alpha_R": self.alpha_R + 0.5,
            "beta_RD": self.beta_RD + kappa * gap.square() / (2 * (kappa + 1)),
        }
        made = {name: torch.cat([self.prior[name], value]) for name, value in grown.items()}
        made["run_R"] = torch.cat([torch.zeros_like(self.run_R[:1]), self.run_R + 1])
        log_R = log_R - log_R.logsumexp(0)
        keep = log_R >= (math.log(self.least) if self.least else -math.inf)
        keep[log_R.argmax()] = True
        for name, value in made.items():
            setattr(self, name, value[keep])
        self.log_R = log_R[keep] - log_R[keep].logsumexp(0)

    def shorter(self, runs: int) -> float:
        """The weight of runs of less than `runs` summaries."""
        return float(self.log_R[self.run_R < runs].exp().sum())

    def likeliest(self) -> int:
        """The run of the largest weight."""
        return int(self.run_R[self.log_R.argmax()])


class Boundaries:
    """Says of summary after summary whether a boundary is found. State: sums of the first ones, the runs, the present run."""

    def __init__(self, width: int, hazard: float, certain: float = 0.9, warm: int = 8, least: float = 1e-6):
        if not 0 < hazard < 1 or not 0 < certain < 1:
            raise UserError(f"learner.hazard={hazard} and learner.certain={certain} must be above 0 and below 1")
        self.certain, self.warm, self.present = certain, warm, 0
        self.first_WD = torch.zeros(0, width, dtype=torch.float64)
        self.runs = RunLengths(width, hazard, alpha=warm / 2, least=least)

    def see(self, x: Tensor) -> bool:
        """A summary [D] comes; True: a boundary lies before it, or not long before."""
        x = x.detach().cpu().double()
        if len(self.first_WD) < self.warm:
            self.first_WD = torch.cat([self.first_WD, x[None]])
            if len(self.first_WD) == self.warm:
                for row in self.standardised(self.first_WD):
                    self.runs.update(row)
                self.present = self.warm
            return False
        self.runs.update(self.standardised(x))
        self.present += 1
        if self.runs.shorter(self.present) <= self.certain:
            return False
        self.present = self.runs.likeliest()
        return True

    def standardised(self, x: Tensor) -> Tensor:
        """By mean and standard deviation of the first summaries."""
        std = self.first_WD.std(0)
        return (x - self.first_WD.mean(0)) / torch.where(std > 0, std, 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {"first_WD": self.first_WD, "present": self.present} | {name: getattr(self.runs, name) for name in FIELDS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first_WD, self.present = state["first_WD"].cpu().clone(), state["present"]
        for name in FIELDS:
            setattr(self.runs, name, state[name].cpu().clone())
