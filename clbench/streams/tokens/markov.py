"""Sources of tokens whose entropy is known: Markov chains and hidden Markov models. Imports no torch.

Probabilities are integer counts over a power of two, and draws are integers of a counter-based generator, so tokens are the
same on every machine. No model has a mean loss below `Source.bayes_loss`: what is above it is regret.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import rng

_CHUNK = 1 << 16
_ESTIMATE_TOKENS = 1 << 16


class Source(Protocol):
    """A stationary source of tokens 0..vocab-1. Losses are in nats per token, rounded to 1e-9: the same on every machine.

    entropy_is_exact  whether `entropy_rate` is exact, or the mean over a sample
    """

    entropy_is_exact: ClassVar[bool]

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        ...

    @property
    def entropy_rate(self) -> float:
        """Entropy rate, nats per token."""
        ...

    def sample(self, count: int, key: int) -> np.ndarray:
        """`count` tokens -> [count] uint16. The same key, the same tokens; a short sample is the front of a long one."""
        ...

    def nats(self, tokens: np.ndarray) -> np.ndarray:
        """-log p of every token given those before it: tokens [..., L] -> [..., L] float64.

        Every row starts anew: its first token is judged by the stationary distribution. These are the exact losses of the
        best possible predictor, which knows the source and sees no more than the row.
        """
        ...

    def bayes_loss(self, tokens: np.ndarray) -> float:
        """Mean of `nats` over tokens [..., L]: the exact floor on this very text."""
        ...

    def divergence(self, other: Source) -> float:
        """Kullback-Leibler divergence rate of this source from `other`, nats per token."""
        ...


@dataclass(frozen=True, eq=False)
class Markov:
    """Markov chain of order m: transition counts [vocab ** m, vocab] int64, every row with the same power of two as its sum.

    Row (a * vocab + b) holds the successors of the two tokens a, b.
    """

    counts: np.ndarray
    entropy_is_exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_counts(self.counts)
        assert self.vocab**self.order == len(self.counts)

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return self.counts.shape[1]

    @cached_property
    def order(self) -> int:
        """Order m of the chain: tokens in a state."""
        return next(m for m in range(1, 64) if self.vocab**m >= len(self.counts))

    @cached_property
    def probabilities(self) -> np.ndarray:
        """p(next | state) [S, V]."""
        return self.counts / self.counts[0].sum()

    @cached_property
    def stationary(self) -> np.ndarray:
        """Stationary distribution of the states [S]."""
        states, vocab = self.counts.shape
        steps = self.probabilities.reshape(vocab, states // vocab, vocab)
        return _fixed_point(lambda p: np.einsum("ar,arv->rv", p.reshape(vocab, -1), steps).ravel(), states)

    def nats(self, tokens: np.ndarray) -> np.ndarray:
        rows = _rows(tokens, self.vocab)
        out = np.empty(rows.shape)
        state = np.zeros(len(rows), np.int64)
        for t in range(min(self.order, rows.shape[1])):
            before = self.stationary.reshape(self.vocab**t, -1).sum(1)
            state = state * self.vocab + rows[:, t]
            now = self.stationary.reshape(self.vocab ** (t + 1), -1).sum(1)
            out[:, t] = np.log(before[state // self.vocab]) - np.log(now[state])
        states = np.zeros((len(rows), max(0, rows.shape[1] - self.order)), np.int64)
        for back in range(self.order):
            states = states * self.vocab + rows[:, back : back + states.shape[1]]
        with np.errstate(divide="ignore"):  # -log 0 for impossible tokens
            out[:, self.order :] = -np.log(self.probabilities[states, rows[:, self.order :]])
        return out.reshape(np.shape(tokens))

    def bayes_loss(self, tokens: np.ndarray) -> float:
        return _rounded(np.mean(self.nats(tokens)))

    def sample(self, count: int, key: int) -> np.ndarray:
        states, vocab = self.counts.shape
        size = int(self.counts[0].sum())
        table = _lookup(self.counts)
        state = _start(self.stationary, key)
        first = [state // vocab**i % vocab for i in reversed(range(self.order))]
        out = array("H", first)
        for draws in _draws(rng.key("next", key), count - self.order, size):
            for draw in draws:
                word = table[state * size + draw]
                out.append(word)
                state = (state * vocab + word) % states
        return np.array(out[:count], np.uint16)

    @property
    def entropy_rate(self) -> float:
        """Exact: row entropies under the stationary distribution."""
        p = self.probabilities
        return _rounded(-(self.stationary @ _x_log_y(p, p).sum(1)))

    def divergence(self, other: Source) -> float:
        """Exact between chains of one order."""
        if not isinstance(other, Markov) or other.counts.shape != self.counts.shape:
            raise UserError("divergence compares Markov languages with the same states and vocabulary")
        p, q = self.probabilities, other.probabilities
        rows = (_x_log_y(p, p) - _x_log_y(p, q)).sum(1)
        return _rounded(self.stationary @ rows)


@dataclass(frozen=True, eq=False)
class Hmm:
    """HMM: transition counts [S, S] and emission counts [S, vocab] int64; row sums are powers of two.

    The entropy rate of such a source has no closed form: `entropy_rate` is the exact Bayes loss of one long sample of it, and
    `divergence` a mean over that sample. The floor of a validation text, `bayes_loss`, is exact (forward algorithm).
    """

    transitions: np.ndarray
    emissions: np.ndarray
    entropy_is_exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_counts(self.transitions)
        _check_counts(self.emissions)
        assert self.transitions.shape == (len(self.emissions), len(self.emissions))

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return self.emissions.shape[1]

    @cached_property
    def stationary(self) -> np.ndarray:
        """Stationary distribution of the hidden states [S]."""
        move = self.transitions / self.transitions[0].sum()
        return _fixed_point(lambda p: p @ move, len(self.transitions))

    def nats(self, tokens: np.ndarray) -> np.ndarray:
        """See `Source.nats`: the forward algorithm, normalised at every token."""
        rows = _rows(tokens, self.vocab)
        move = self.transitions / self.transitions[0].sum()
        emission = np.ascontiguousarray((self.emissions / self.emissions[0].sum()).T)
        belief = np.tile(self.stationary, (len(rows), 1))
        seen = np.empty(rows.shape)
        for t in range(rows.shape[1]):
            belief *= emission[rows[:, t]]
            mass = belief.sum(1)
            seen[:, t] = mass
            belief = (belief / np.maximum(mass, 1e-300)[:, None]) @ move
        with np.errstate(divide="ignore"):
            return -np.log(seen).reshape(np.shape(tokens))

    def bayes_loss(self, tokens: np.ndarray) -> float:
        return _rounded(np.mean(self.nats(tokens)))

    def sample(self, count: int, key: int) -> np.ndarray:
        move_size, word_size = int(self.transitions[0].sum()), int(self.emissions[0].sum())
        moves, words = _lookup(self.transitions), _lookup(self.emissions)
        state = _start(self.stationary, key)
        out = array("H")
        said = _draws(rng.key("word", key), count, word_size)
        moved = _draws(rng.key("next", key), count, move_size)
        for word_draws, move_draws in zip(said, moved, strict=True):
            for word, move in zip(word_draws, move_draws, strict=True):
                out.append(words[state * word_size + word])
                state = moves[state * move_size + move]
        return np.array(out, np.uint16)

    @cached_property
    def _long_sample(self) -> np.ndarray:
        return self.sample(_ESTIMATE_TOKENS, rng.key("entropy")).reshape(16, -1)

    @cached_property
    def _own_nats(self) -> np.ndarray:
        return self.nats(self._long_sample)

    @property
    def entropy_rate(self) -> float:
        """Mean over a sample of 65,536 tokens in 16 rows; the first 64 of each row, which know too little, are left out."""
        return _rounded(self._own_nats[:, 64:].mean())

    def divergence(self, other: Source) -> float:
        """Mean over the same sample."""
        if not isinstance(other, Hmm) or other.vocab != self.vocab:
            raise UserError("divergence compares hidden Markov languages with the same vocabulary")
        excess = other.nats(self._long_sample) - self._own_nats
        return _rounded(excess[:, 64:].mean())


def _rounded(value: float | np.floating) -> float:
    return round(float(value), 9)


def _check_counts(counts: np.ndarray) -> None:
    size = int(counts[0].sum())
    assert (counts >= 0).all() and (counts.sum(1) == size).all() and size & (size - 1) == 0


def _lookup(counts: np.ndarray) -> array:
    """Lookup table for sampling from counts: state * size + draw -> token, [S * size] of 32 bits."""
    states, words = counts.shape
    which = np.repeat(np.tile(np.arange(words, dtype=np.uint32), states), counts.ravel())
    return array("I", which.tobytes())


def _draws(key: int, count: int, size: int) -> Iterator[list[int]]:
    """`count` uniform integers in 0..size-1 (a power of two), in lists of up to 65,536."""
    for start in range(0, count, _CHUNK):
        numbers = rng.bits(key, np.arange(start, min(start + _CHUNK, count)))
        yield (numbers & np.uint64(size - 1)).tolist()


def _start(stationary: np.ndarray, key: int) -> int:
    """A first state from the stationary distribution."""
    edges = np.cumsum(stationary)
    place = rng.uniform(rng.key("start", key), np.zeros(1, np.int64))[0]
    return int(min(np.searchsorted(edges / edges[-1], place, "right"), len(edges) - 1))


def _fixed_point(step: Callable[[np.ndarray], np.ndarray], states: int) -> np.ndarray:
    p = np.full(states, 1 / states)
    for _ in range(100_000):
        new = (p + step(p)) / 2  # averaging with p lets periodic chains converge
        new /= new.sum()
        if np.abs(new - p).sum() < 1e-14:
            return new
        p = new
    return p


def _rows(tokens: np.ndarray, vocab: int) -> np.ndarray:
    """Tokens [..., L] as checked rows [N, L] int64."""
    found = np.asarray(tokens).astype(np.int64)
    if found.ndim == 0 or found.size == 0:
        raise UserError("a loss needs at least one token")
    if found.min() < 0 or found.max() >= vocab:
        raise UserError(f"tokens of this language are 0..{vocab - 1}, got {found.min()}..{found.max()}")
    return found.reshape(-1, found.shape[-1])


def _x_log_y(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """X log y with 0 log 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(x > 0, x * np.log(y), 0.0)
