"""AutoLRS (Jin et al. 2021, "Automatic Learning-Rate Schedule by Bayesian Optimization on the Fly", ICLR, arXiv 2105.10762).

Stage by stage: a search of `trials` constant rates, each for t updates from the same weights and optimiser, then `trials` times
as many updates at the best of them:
    trial    t updates at rate eta_i; the losses are extrapolated to t * trials updates; weights and optimiser go back
    train    t * trials updates at the rate with the lowest forecast
    t        `first`, and doubles after a stage, `doublings` times
eta_1 is drawn, eta_i is where a Gaussian process on log eta (RBF of a fifth of the range, noise 1e-4) knows least: the code's
lower confidence bound weighs the deviation so highly (1e6) that its mean plays no part. Rates are factors on the schedule, from
`least` to `most` times it.

forecast   c + a exp(-b n), least squares over b in a range: an exact exponential is continued exactly. With fewer than 12
           losses the last one stands

Cost: as many updates are searched as trained. They are taken from the experience, so the weights that go on are trained on half
of it; the ledger counts searched tokens as those of a branch, whose weights go nowhere. A search reads fresh text and does not
give it back, as in the code. No stage begins that would not end: the rest of an experience goes at the last rate.

Deviations: the code forecasts by a smoothing spline with dropped outliers before the exponential, which on losses of order one
is one parabola and misses an exact exponential; late in training it forecasts validation losses, which a learner here does not
see; its first rate runs a step longer. Own choices: t = 16 and two doublings (100 and three in the code), the range. A loss
that is not a number ends the run, as everywhere here. Published number: none read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clbench.interfaces import Place, Schedule, UserError
from clbench.streams import rng
from clbench.training.pretraining.adaptive_rate import Rate
from clbench.training.state import detached

FEWEST = 12  # losses of a forecast
GRID = 64  # rates to choose from
NOISE = 1e-4
PARTS = ("stage", "trial", "at", "length", "losses", "tried", "forecasts", "saved", "number")


class AutoLrs(Rate):
    """State: where in a stage it is, rates tried with their forecasts, weights and optimiser at the stage's beginning."""

    kept = ("factor", "fresh", *PARTS)

    def __init__(
        self,
        *,
        least: float = 0.1,
        most: float = 10.0,
        trials: int = 10,
        first: int = 16,
        doublings: int = 2,
        restart: bool = True,
    ):
        super().__init__(restart)
        if not 0 < least < most < math.inf or trials < 2 or first < 1 or doublings < 0:
            raise UserError("learner.adapt auto_lrs needs 0 < least < most, trials from 2, first from 1, doublings from 0")
        self.least, self.most, self.trials, self.first, self.doublings = least, most, trials, first, doublings
        self.stage, self.trial, self.at, self.length, self.number = 0, -1, 0, 0, 0
        self.losses: list[float] = []
        self.tried: list[float] = []
        self.forecasts: list[float] = []
        self.saved: dict[str, Any] = {}
        self.optimizer: torch.optim.Optimizer | None = None

    @property
    def searching(self) -> bool:
        """Whether the update at hand is one whose weights go back."""
        return 0 <= self.trial < self.trials

    def begin(self, model: nn.Module) -> None:
        super().begin(model)
        self.trial = -1
        self.stage = 0 if self.restart else self.stage

    def schedule(self, base: Schedule) -> Schedule:
        def scaled(place: Place) -> float:
            if self.trial < 0:
                self._open(place.steps - place.step)
            return base(place) * self.factor

        return scaled

    def _open(self, left: int) -> None:
        """Begin a stage, if the updates that are left are enough for it; else go on as it is."""
        self.length = self.first * 2 ** min(self.stage, self.doublings)
        while self.length > self.first and 2 * self.trials * self.length > left:
            self.length //= 2
        self.at, self.losses, self.tried, self.forecasts, self.saved = 0, [], [], [], {}
        if 2 * self.trials * self.length > left:
            if self.stage == 0:
                said = f"learner.adapt auto_lrs searches {self.trials} x {self.first} updates and trains as many"
                raise UserError(f"{said}: an experience of {left} updates is too short (auto_lrs.first, auto_lrs.trials)")
            self.trial, self.length = self.trials, left  # no search any more
            return
        self.trial = 0
        self._next()

    def _next(self) -> None:
        """The rate of the next trial."""
        grid = np.linspace(math.log(self.least), math.log(self.most), GRID)
        if not self.tried:
            chosen = grid[int(rng.uniform(rng.key("auto_lrs", self.number), np.arange(1))[0] * GRID)]
        else:
            chosen = grid[int(deviation(grid, np.log(self.tried)).argmax())]
        self.factor = math.exp(chosen)
        self.tried.append(self.factor)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        if self.searching and not self.saved:
            assert self.model is not None
            self.saved = {"model": detached(self.model.state_dict()), "optimizer": detached(optimizer.state_dict())}

    def seen(self, losses: Tensor) -> None:
        self.at += 1
        if not self.searching:
            if self.at == self.trials * self.length:
                self.stage, self.number, self.trial = self.stage + 1, self.number + 1, -1
            return
        self.losses.append(float(losses.double().mean()))
        if self.at < self.length:
            return
        self.forecasts.append(forecast(self.losses, self.trials * self.length))
        self._back()
        self.at, self.losses, self.trial = 0, [], self.trial + 1
        if self.searching:
            self._next()
        else:
            self.factor, self.saved = self.tried[int(np.argmin(self.forecasts))], {}

    def _back(self) -> None:
        """Weights and optimiser as they were when the search began."""
        assert self.model is not None and self.optimizer is not None
        self.model.load_state_dict(self.saved["model"])
        self.optimizer.load_state_dict(self.saved["optimizer"])

    def end(self, model: nn.Module) -> None:
        assert not self.searching, "no search begins that does not end"
        self.saved = {}


def deviation(grid: np.ndarray, tried: np.ndarray) -> np.ndarray:
    """Posterior standard deviation of a Gaussian process at points [G] after looks at others [N]."""
    scale = (grid[-1] - grid[0]) / 5

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(-0.5 * ((a[:, None] - b[None]) / scale) ** 2)

    across = kernel(grid, tried)
    known = np.linalg.solve(kernel(tried, tried) + NOISE * np.eye(len(tried)), across.T)
    return np.sqrt(np.clip(1.0 - (across * known.T).sum(1), 0.0, None))


def forecast(losses: Sequence[float], at: int) -> float:
    """The loss after update number `at` of losses after updates 1, 2, ...: c + a exp(-b n), or the last one of a few."""
    y = np.asarray(losses, np.float64)
    if len(y) < FEWEST:
        return float(y[-1])
    from scipy.optimize import minimize_scalar

    n = np.arange(1, len(y) + 1)

    def fitted(log_b: float) -> tuple[float, np.ndarray]:
        columns = np.stack([np.exp(-math.exp(log_b) * n), np.ones(len(n))], 1)
        found = np.linalg.lstsq(columns, y, rcond=None)[0]
        return float(np.square(columns @ found - y).sum()), found

    starts = np.linspace(math.log(0.25 / at), math.log(2.0), 24)
    best = min(range(len(starts)), key=lambda i: fitted(starts[i])[0])
    around = (starts[max(0, best - 1)], starts[min(len(starts) - 1, best + 1)])
    log_b = float(minimize_scalar(lambda v: fitted(v)[0], bounds=around, method="bounded", options={"xatol": 1e-10}).x)  # type: ignore[attr-defined]
    scale, level = fitted(log_b)[1]
    return float(level + scale * math.exp(-math.exp(log_b) * at))
