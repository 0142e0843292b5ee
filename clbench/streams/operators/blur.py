"""Blurred boundaries: some classes stay in one experience, samples of the others stray into every one (i-Blurry)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import rng
from clbench.streams.operators.copies import flag, share, whole
from clbench.streams.operators.dealing import Pool, dealt, pool, split, without_tasks
from clbench.streams.scenario import Scenario


def blur(
    stream: Scenario,
    disjoint: float = 50,
    blurred: float = 10,
    experiences: int | None = None,
    stochastic: bool = False,
    seed: int = 0,
) -> Scenario:
    """Blurred boundaries: some classes stay in one experience, a share of the others' samples strays (i-Blurry, Si-Blurry).

    i-Blurry-N-M: Koh et al., ICLR 2022, arXiv 2110.10031. Si-Blurry: Moon et al., ICCV 2023, arXiv 2308.09303.

    disjoint     N: per cent of the classes that stay in one experience
    blurred      M: per cent of the other classes' samples that are dealt over all experiences
    experiences  T; null: as many as there are
    stochastic   Si-Blurry: classes are cut into experiences at uniform places, so that some get few or none, and so are the
                 M % into experiences that give and receive them. An experience without samples is left out
    seed         of classes, samples and their order

    Classes are dealt in a seeded order: floor(floor(K N / 100) / T) T of them are disjoint, the others blurry, each equally
    over the experiences. Where T does not divide the others, the first experiences get one more (the released splits leave
    the rest out). Strays are drawn from a shuffled home, and every experience receives as many as it gives, so sizes stay.
    Of equal classes a share 1 - M / 100 (1 - 1 / T) is at home on average. An evaluation set holds the classes that appear
    first in its experience, so accuracy over the sets seen is that over the classes seen.
    """
    percent, stray = _per_cent(disjoint, "blur.disjoint"), _per_cent(blurred, "blur.blurred")
    flag(stochastic, "blur.stochastic")
    whole(seed, "blur.seed")
    if experiences is not None:
        whole(experiences, "blur.experiences", 2)
    if stray and percent == 100:
        raise UserError(f"blur.blurred={blurred} has no effect with blur.disjoint=100: say blur.blurred=0")
    without_tasks(stream, "blur")
    number = experiences or len(stream.manifest.experiences)
    found = pool(stream, "blur")
    if len(found.classes) < 2:
        raise UserError("operator blur needs two classes or more, and the stream has one")
    if number < 2 or number > len(found.classes):
        raise UserError(f"operator blur needs 2 to {len(found.classes)} experiences, as many as classes at most, got {number}")
    classes = np.array(found.classes)[rng.permutation(rng.key("blur classes", seed), len(found.classes))].tolist()
    apart = int(int(len(classes) * percent / 100 + 1e-9) / number) * number
    home = [_cut(part, number, stochastic, seed, k) for k, part in enumerate((classes[:apart], classes[apart:]))]
    parts = _strayed(found, home[1], stray, stochastic, seed)
    made = []
    for t in range(number):
        ids = np.concatenate([*(found.train[c] for c in home[0][t]), parts[t]]) if home[0][t] else parts[t]
        made.append(ids[rng.permutation(rng.key("blur order", seed, t), len(ids))])
    return dealt(found, made, [f"blur{t}" for t in range(number)], "blur", classes)


def _per_cent(value: float, what: str) -> float:
    percent = share(value, what, 0, 100)
    if 0 < percent < 1:
        raise UserError(f"{what}={value:g} is in per cent: a half is 50")
    return percent


def _cut(classes: Sequence[int], number: int, stochastic: bool, seed: int, k: int) -> list[list[int]]:
    """Classes of every experience: equally many, or between sorted uniform places."""
    if stochastic:
        cuts = np.sort(rng.integers(rng.key("blur cuts", seed, k), number - 1, len(classes) + 1)).tolist()
        ends = [0, *cuts, len(classes)]
    else:
        ends = np.cumsum([0, *split(len(classes), number)]).tolist()
    return [list(classes[a:b]) for a, b in pairwise(ends)]


def _strayed(found: Pool, home: Sequence[Sequence[int]], percent: float, stochastic: bool, seed: int) -> list[np.ndarray]:
    """Ids of blurry classes of every experience: those that stay, then those received."""
    none = np.zeros(0, np.int64)
    own = [np.concatenate([found.train[c] for c in part]) if part else none for part in home]
    own = [ids[rng.permutation(rng.key("blur home", seed, t), len(ids))] for t, ids in enumerate(own)]
    if stochastic:
        total = int(sum(map(len, own)) * percent / 100 + 1e-9)
        cuts = np.sort(rng.integers(rng.key("blur strays", seed), len(own) - 1, total + 1))
        gives = [min(int(n), len(ids)) for n, ids in zip(np.diff([0, *cuts, total]), own, strict=True)]
    else:
        gives = [int(len(ids) * percent / 100 + 1e-9) for ids in own]
    strays = np.concatenate([ids[:n] for ids, n in zip(own, gives, strict=True)])
    strays = strays[rng.permutation(rng.key("blur strays order", seed), len(strays))]
    ends = np.cumsum([0, *gives])
    return [np.concatenate([ids[n:], strays[a : a + n]]) for ids, n, a in zip(own, gives, ends, strict=False)]
