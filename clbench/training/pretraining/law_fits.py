"""Laws of the loss in the rates so far, fitted to one's own curves. Imports no torch.

    annealing    L = base + scale S1^-power - gain S2                       (Tissue et al. 2024, arXiv 2408.11029)
    multi_power  L = base + scale S1^-power - gain sum_k (eta_{k-1} - eta_k) (1 - (1 + speed eta_k^-bend R_k)^-decay),
                 R_k the sum of the rates from k on                         (Luo et al. 2025, arXiv 2503.12811)
    steps        L = base + scale s^-power in the number s of updates: the control, which knows nothing of rates

S1 and S2 are those of `scaling_laws.areas`. As in the code of the second: updates of a warm-up count with the rate at which it
ends (else a rise counts as negative annealing), looks before its end and 2 % of the updates are left out, and what is least is
the Huber loss (1e-3) of the residuals of log L, the constants not below 0. S1 is rate times updates, so constants hold for one
optimiser, batch and model only.

Choices of this file: the minimiser (`scipy.optimize.least_squares`, with that loss) and its starts, for each of some exponents
the best constants of a linear least squares; exponents of at most 5; of more than 128 falls of the rate the multi-power law
takes those in 128 equal pieces together. Where rates hardly fall, `gain` is free: with less than 10 % of S1 in S2 in every
curve that is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clbench.interfaces import UserError

DELTA = 1e-3  # of the Huber loss
SKIPPED = 0.02  # of the updates after warm-up
LEAST_FALL = 0.1  # S2 of S1, in one curve at least
PIECES = 128
EXPONENTS = (0.1, 0.25, 0.5, 0.8, 1.2, 2.0)
Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Curve:
    """Losses of one run after numbers of updates [P], and the rate of every update [T]. `label` names its schedule."""

    label: str
    name: str
    rates: Array
    steps: Array
    losses: Array

    @functools.cached_property
    def kept(self) -> Curve:
        """The curve with the warm-up at its last rate, and without the looks that the fit leaves out."""
        peak = int(np.argmax(self.rates))
        rates = np.concatenate([np.full(peak, self.rates[peak]), self.rates[peak:]])
        late = self.steps > peak + SKIPPED * len(rates)
        return Curve(self.label, self.name, rates, self.steps[late], self.losses[late])

    @property
    def same_rates(self) -> tuple[bytes, bytes]:
        """What two curves have in common for which every law predicts the same."""
        return self.rates.tobytes(), self.steps.tobytes()


@dataclass(frozen=True)
class Looks:
    """What a law needs of one curve's looks [P]: S1 and S2 in units of their largest over the curves of a fit."""

    updates: Array
    forward: Array
    annealed: Array
    falls: Array  # [K], of the rate, in units of the largest rate
    rates: Array  # [K], after each, in the same units
    later: Array  # [P, K], sum of the rates from the fall to the look, in units of the largest S1; 0 where it comes later


@dataclass(frozen=True)
class Units:
    """The largest S1, S2 (1 where nothing falls), rate and number of updates of the curves of a fit."""

    forward: float
    annealed: float
    rate: float
    updates: float


@dataclass(frozen=True)
class Law:
    """An equation.

    loss     [P] of constants and looks
    columns  for the starts, of the other constants and looks: [P, M], to be weighed by the first M constants
    """

    names: tuple[str, ...]
    loss: Callable[[Array, Looks], Array]
    columns: Callable[[Array, Looks], Array]
    others: tuple[tuple[float, ...], ...]
    anneals: bool
    about: str


def _level(x: Array, power: float) -> Array:
    return np.maximum(x, 1e-12) ** -power


def _shift(looks: Looks, speed: float, bend: float, decay: float) -> Array:
    """The multi-power law's sum over falls, for a gain of 1: [P]."""
    inside = 1 + speed * np.maximum(looks.rates, 1e-6) ** -bend * looks.later
    return (1 - inside**-decay) @ looks.falls


def _annealing(c: Array, at: Looks) -> Array:
    return c[0] + c[1] * _level(at.forward, c[3]) - c[2] * at.annealed


def _multi_power(c: Array, at: Looks) -> Array:
    return c[0] + c[1] * _level(at.forward, c[3]) - c[2] * _shift(at, c[4], c[5], c[6])


def _steps(c: Array, at: Looks) -> Array:
    return c[0] + c[1] * _level(at.updates, c[2])


_MULTI = tuple((p, s, b, d) for p in EXPONENTS[1:4] for s in (1.0, 10.0) for b, d in ((0.5, 0.5),))
LAWS: dict[str, Law] = {
    "annealing": Law(
        ("base", "scale", "gain", "power"),
        _annealing,
        lambda o, at: np.stack([np.ones_like(at.forward), _level(at.forward, o[0]), -at.annealed], 1),
        tuple((p,) for p in EXPONENTS),
        True,
        "L = base + scale S1^-power - gain S2",
    ),
    "multi_power": Law(
        ("base", "scale", "gain", "power", "speed", "bend", "decay"),
        _multi_power,
        lambda o, at: np.stack([np.ones_like(at.forward), _level(at.forward, o[0]), -_shift(at, *o[1:])], 1),
        _MULTI,
        True,
        "L = base + scale S1^-power - gain sum of falls x (1 - (1 + speed rate^-bend S1 since)^-decay)",
    ),
    "steps": Law(
        ("base", "scale", "power"),
        _steps,
        lambda o, at: np.stack([np.ones_like(at.updates), _level(at.updates, o[0])], 1),
        tuple((p,) for p in EXPONENTS),
        False,
        "L = base + scale s^-power in updates s (control: knows no rates)",
    ),
}


def sums(rates: Array, fade: float) -> tuple[Array, Array]:
    """S1 and S2 of `scaling_laws.areas` after each update: [T] of rates [T]."""
    from scipy.signal import lfilter

    falls = -np.diff(rates, prepend=rates[0])
    momentum: Any = lfilter([1.0], [1.0, -fade], falls)
    return np.cumsum(rates), np.cumsum(momentum)


def units_of(curves: Sequence[Curve], fade: float) -> Units:
    """The units in which the constants of a fit to `curves` are all of order 1."""
    kept = [curve.kept for curve in curves]
    found = [[x[c.steps - 1].max(initial=0.0) for x in sums(c.rates, fade)] for c in kept]
    forward, annealed = (max(values) for values in zip(*found, strict=True))
    return Units(forward, annealed or 1.0, max(c.rates.max() for c in kept), float(max(c.steps.max() for c in kept)))


@functools.lru_cache(1000)
def looks_of(curve: Curve, fade: float, units: Units) -> Looks:
    """What laws need of a curve, of its looks that are kept."""
    kept = curve.kept
    forward, annealed = sums(kept.rates, fade)
    falls = -np.diff(kept.rates, prepend=kept.rates[0])
    edges = np.flatnonzero(falls)
    if len(edges) > PIECES:
        edges = np.unique(np.linspace(1, len(falls), PIECES, endpoint=False).astype(int))
    taken = np.add.reduceat(falls, edges) if len(edges) else np.zeros(0)
    before = forward[edges - 1] if len(edges) else np.zeros(0)
    later = np.maximum(forward[kept.steps - 1][:, None] - before, 0.0)
    return Looks(
        kept.steps / units.updates,
        forward[kept.steps - 1] / units.forward,
        annealed[kept.steps - 1] / units.annealed,
        taken / units.rate,
        kept.rates[edges] / units.rate,
        later / units.forward,
    )


@dataclass(frozen=True)
class Fit:
    """A law with its constants, in `units`: `constants` has them in those of the rates."""

    law: str
    fade: float
    units: Units
    values: Array
    error: float = field(compare=False, default=0.0)

    def __call__(self, curve: Curve) -> Array:
        """Loss at the looks of a curve that are kept: [P]."""
        return LAWS[self.law].loss(self.values, looks_of(curve, self.fade, self.units))

    def final(self, rates: Array) -> float:
        """Loss after the updates with these rates; `UserError` where they have no update after warm-up."""
        made = Curve("", "", np.asarray(rates, float), np.array([len(rates)]), np.zeros(1))
        if not len(made.kept.steps):
            raise UserError("a law says nothing of rates that rise to the end")
        return float(self(made)[0])

    @property
    def constants(self) -> dict[str, float]:
        """Constants of the law as its equation has them, in the units of the rates and updates."""
        c, u = dict(zip(LAWS[self.law].names, self.values.tolist(), strict=True)), self.units
        c["scale"] *= (u.updates if self.law == "steps" else u.forward) ** c["power"]
        if self.law == "annealing":
            c["gain"] /= u.annealed
        if self.law == "multi_power":
            c["gain"] /= u.rate
            c["speed"] *= u.rate ** c["bend"] / u.forward
        return {name: float(value) for name, value in c.items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain values, of which `loaded` makes the same fit again."""
        return {"law": self.law, "fade": self.fade, "units": vars(self.units), "values": self.values.tolist()}


def loaded(state: Mapping[str, Any]) -> Fit:
    """The fit that `state_dict` described; `UserError` where it is none."""
    try:
        values = np.array([float(v) for v in state["values"]])
        made = Fit(str(state["law"]), float(state["fade"]), Units(**{k: float(v) for k, v in state["units"].items()}), values)
        known = len(values) == len(LAWS[made.law].names) and np.isfinite(values).all()
    except (KeyError, TypeError, ValueError, AttributeError):
        known = False
    if not known:
        raise UserError("holds no fitted law: clbench schedule fit RECORD ... --out FILE.json writes one")
    return made


def fit(law: str, curves: Sequence[Curve], fade: float = 0.999, start: Fit | None = None) -> Fit:
    """The constants with the least Huber loss on the curves' logarithms, from all starts, or from `start` alone.

    `UserError` where there are fewer looks than constants, or rates that hardly fall.
    """
    if bare := next((curve for curve in curves if not len(curve.kept.steps)), None):
        raise UserError(f"record {bare.name} ({bare.label}) has no look after warm-up")
    kind, units = LAWS[law], units_of(curves, fade) if start is None else start.units
    groups: dict[Any, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.same_rates, []).append(curve)
    looks = [looks_of(group[0], fade, units) for group in groups.values()]
    measured = [np.stack([np.log(curve.kept.losses) for curve in group]) for group in groups.values()]
    if sum(m.shape[1] for m in measured) <= len(kind.names):
        raise UserError(f"{law} has {len(kind.names)} constants: the curves have too few looks after warm-up")
    if start is None and kind.anneals and (share := _fallen(curves, fade)) < LEAST_FALL:
        raise UserError(
            f"the rates hardly fall in these curves (S2 is at most {share:.1%} of S1, {LEAST_FALL:.0%} are needed): no anneal "
            "can be learned from them; add a run that anneals"
        )

    def residuals(values: Array) -> Array:
        made = [np.log(np.maximum(kind.loss(values, at), 1e-9)) - m for at, m in zip(looks, measured, strict=True)]
        return np.concatenate([part.ravel() for part in made])

    starts = [_start(kind, other, looks, measured) for other in kind.others] if start is None else [start.values]
    found = [_least(kind, residuals, values, 1e-12 if start is None else 1e-8) for values in starts]
    best = min(found, key=lambda one: one.cost)
    return Fit(law, fade, units, best.x, float(best.cost))


def _fallen(curves: Sequence[Curve], fade: float) -> float:
    """The largest S2 of a curve's looks as a share of the largest S1, of the curve with most."""
    kept = [curve.kept for curve in curves]
    found = [[x[c.steps - 1].max(initial=0.0) for x in sums(c.rates, fade)] for c in kept if len(c.steps)]
    return max((annealed / forward for forward, annealed in found), default=0.0)


def _start(law: Law, others: tuple[float, ...], looks: Sequence[Looks], measured: Sequence[Array]) -> Array:
    """Constants from 0 that are best for the losses themselves, given the exponents."""
    from scipy.optimize import nnls

    columns = np.concatenate([law.columns(np.array(others), at) for at in looks])
    target = np.concatenate([np.exp(m).mean(0) for m in measured])
    return np.array([*nnls(columns, target)[0], *others])


def _least(law: Law, residuals: Callable[[Array], Array], start: Array, tolerance: float) -> Any:
    from scipy.optimize import least_squares

    upper = np.array([5.0 if name in ("power", "bend", "decay") else np.inf for name in law.names])
    inside = np.clip(start, 1e-6, np.minimum(upper, 1e9) - 1e-6)
    options: dict[str, Any] = {"loss": "huber", "f_scale": DELTA, "x_scale": "jac", "max_nfev": 400}
    tight: dict[str, Any] = {"ftol": tolerance, "xtol": tolerance, "gtol": tolerance / 1000}
    return least_squares(residuals, inside, bounds=(0.0, upper), **options, **tight)
