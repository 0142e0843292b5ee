"""Counter-based randomness: every draw is a pure function of its key, so nothing has to be saved or replayed.

The generator is SplitMix64's finaliser applied to a chained key (Steele, Lea & Flood 2014, "Fast splittable pseudorandom
number generators"). Integer arithmetic only: the same key gives the same numbers on every machine and library version.
"""

from __future__ import annotations

import zlib

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def key(*parts: int | str) -> int:
    """Combine numbers and words into one 64-bit key; the order of the parts matters."""
    state = 0
    for part in parts:
        number = zlib.crc32(part.encode()) | (1 << 40) if isinstance(part, str) else int(part) & _MASK
        state = _mix((state + _GOLDEN + _mix((number + _GOLDEN) & _MASK)) & _MASK)
    return state


def bits(base: int, counters: np.ndarray) -> np.ndarray:
    """64 random bits for every counter: counters [...] integers -> [...] uint64."""
    with np.errstate(over="ignore"):
        z = np.asarray(counters).astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(base & _MASK)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return z ^ (z >> np.uint64(27))


def uniform(base: int, counters: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) for every counter: [...] -> [...] float64."""
    return (bits(base, counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(base: int, n: int) -> np.ndarray:
    """A permutation of range(n) -> [n] int64."""
    return np.argsort(bits(base, np.arange(n)), kind="stable").astype(np.int64)


def integers(base: int, n: int, high: int) -> np.ndarray:
    """N draws from range(high), with replacement -> [n] int64. The bias is below high / 2**53."""
    return (uniform(base, np.arange(n)) * high).astype(np.int64)
