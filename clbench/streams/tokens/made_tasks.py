"""Made text tasks of known structure: a line is `TAG PAYLOAD = ANSWER newline` without the blanks, as bytes. Imports no torch.

    copy              8 letters -> the same                          reverse   8 letters -> reversed
    shift_K           8 letters -> each K places on in the alphabet  sort      6 letters -> in the order of the alphabet
    modsum_P          3 digits -> their sum modulo P
    topic_C_V         32 letters of one of C Markov chains -> the chain's word. Version 1 has a fifth of the rows of each chain
                      of its own, and the words of version 0; the first three of the 10 words of topic_10 are those of topic_4
    facts_N_S         one of N keys of 3 letters -> its value of 2, drawn from S: training and test lines are the same facts
    lego_K            k clauses `a v 1`, `a v b` (is), `a n b` (is not), and a letter -> its bit (Zhang et al. 2022, LEGO)

Payloads are lower-case letters and digits. `modsum` has a thousand of them and `facts` N, so their test lines are among the
training lines; those of the others are new, but for chance.

How much tasks are in each other's way (`level`):
    L0  no byte in common but `=` and newline      L1  one alphabet, a tag for each task
    L2  as L1, payloads of one distribution        L3  the same payloads, no tag: what is right differs from task to task

A draw is a pure function of (seed, task, split, number). Own choices: tags, words, lengths where none is said, the clauses.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import rng
from clbench.streams.tokens import languages
from clbench.streams.tokens.markov import Markov

Level = Literal["L0", "L1", "L2", "L3"]
LEVELS = ("L0", "L1", "L2", "L3")
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
EQUALS, END, VOCAB = ord("="), ord("\n"), 256
TOPIC_LETTERS, TOPIC_SHIFT, TOPIC_OWN = 32, 0.5, 0.2  # of a payload; of a chain from all others; of version 1 from version 0
LEGO_LETTERS = "abcdefghijklmopqrstuwxyz"  # v and n are said of them
Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class MadeTask:
    """One task: a family with its numbers."""

    family: str
    numbers: tuple[int, ...]

    @property
    def name(self) -> str:
        """As it is written, `shift_3`: numbers at the end that are the default are left out."""
        known, given = FAMILIES[self.family].numbers, list(self.numbers)
        while given and given[-1] == known[len(given) - 1][1]:
            given.pop()
        return "_".join([self.family, *map(str, given)])

    @property
    def payload(self) -> tuple[str | int, ...]:
        """What its payloads depend on: tasks of one payload can share them."""
        return {"letters": ("letters",), "topic": ("topic", *self.numbers), "facts": ("facts", *self.numbers[:1])}.get(
            _KINDS.get(self.family, self.family), (self.family, *(self.numbers if self.family == "lego" else ()))
        )

    @property
    def tag(self) -> str:
        """Two letters of its own."""
        first = {"sort": "o"}.get(self.family, self.family[0])
        last = sum(n * m for n, m in zip(self.numbers, (1, 13), strict=False))
        return first + ALPHABET[last % 26]

    def pairs(self, key: int, count: int, length: int | None = None) -> Pairs:
        """`count` payloads with their answers; `length` letters where the family says how many."""
        return FAMILIES[self.family].draw(key, count, self.numbers, length)


@dataclass(frozen=True)
class Family:
    """How the lines of a family are drawn, and its numbers: (name, default, least, most)."""

    draw: Callable[[int, int, tuple[int, ...], int | None], Pairs]
    numbers: tuple[tuple[str, int | None, int, int], ...] = ()


_KINDS = {"copy": "letters", "reverse": "letters", "shift": "letters", "sort": "letters"}


def _words(key: int, count: int, length: int) -> list[str]:
    """Random words of letters."""
    table = rng.integers(key, count * length, 26).reshape(count, length)
    return ["".join(ALPHABET[i] for i in row) for row in table]


def _letters(of: Callable[[str, tuple[int, ...]], str], usual: int) -> Callable[..., Pairs]:
    """A family whose answer is a function of letters."""

    def draw(key: int, count: int, numbers: tuple[int, ...], length: int | None) -> Pairs:
        return [(word, of(word, numbers)) for word in _words(key, count, length or usual)]

    return draw


def _shifted(word: str, numbers: tuple[int, ...]) -> str:
    return "".join(ALPHABET[(ALPHABET.index(c) + numbers[0]) % 26] for c in word)


def _modsum(key: int, count: int, numbers: tuple[int, ...], length: int | None) -> Pairs:
    payloads = [f"{n:03d}" for n in rng.integers(key, count, 1000)]
    return [(p, str(sum(map(int, p)) % numbers[0])) for p in payloads]


@cache
def chains(classes: int, version: int) -> tuple[Markov, ...]:
    """The Markov chains of a topic task."""
    made = [languages.synthetic(26, 26, "markov", TOPIC_SHIFT, c + 1, classes) for c in range(classes)]
    if version:
        other = [languages.synthetic(26, 26, "markov", 1.0, c + 1, 1000 * version + classes) for c in range(classes)]
        for c, chain in enumerate(made):
            counts = np.array(chain.counts)  # type: ignore[attr-defined]
            rows = rng.permutation(rng.key("topic", classes, version, c), 26)[: round(26 * TOPIC_OWN)]
            counts[rows] = other[c].counts[rows]  # type: ignore[attr-defined]
            made[c] = Markov(counts)
    return tuple(made)  # type: ignore[arg-type]


def walks(chain: Markov, count: int, length: int, key: int) -> np.ndarray:
    """Texts of a chain that depends on one letter [count, length] int64, each from its stationary distribution on."""
    size = int(chain.counts[0].sum())
    draws = rng.bits(rng.key(key, "next"), np.arange(count * length)) % np.uint64(size)  # a power of two: no bias
    draws, rises = draws.reshape(count, length).astype(np.int64), chain.counts.cumsum(1)
    first = np.searchsorted(chain.stationary.cumsum(), rng.uniform(rng.key(key, "first"), np.arange(count)), side="right")
    text = np.empty((count, length), np.int64)
    text[:, 0] = np.minimum(first, chain.vocab - 1)
    for t in range(1, length):
        text[:, t] = (rises[text[:, t - 1]] <= draws[:, t : t + 1]).sum(1)
    return text


def topic_words(classes: int) -> list[str]:
    """The words that answer a topic task."""
    words = [_words(rng.key("topic", "word", classes, c), 1, 4)[0] for c in range(classes)]
    return topic_words(4)[:3] + words[3:] if classes == 10 else words


def _topic(key: int, count: int, numbers: tuple[int, ...], length: int | None) -> Pairs:
    classes, words = rng.integers(rng.key(key, "class"), count, numbers[0]), topic_words(numbers[0])
    text = np.empty((count, TOPIC_LETTERS), np.int64)
    for c, chain in enumerate(chains(*numbers)):
        rows = np.flatnonzero(classes == c)
        text[rows] = walks(chain, len(rows), TOPIC_LETTERS, rng.key(key, "text", c))
    return [("".join(ALPHABET[j] for j in row), words[c]) for row, c in zip(text, classes, strict=True)]


def topic_bayes(payloads: Sequence[str], classes: int, version: int = 0) -> np.ndarray:
    """The likeliest class of each payload [N]: no answer is right more often."""
    rows = np.array([[ALPHABET.index(c) for c in p] for p in payloads])
    return np.stack([chain.nats(rows).sum(1) for chain in chains(classes, version)], 1).argmin(1)


def _facts(key: int, count: int, numbers: tuple[int, ...], length: int | None) -> Pairs:
    n, seed = numbers
    order = rng.permutation(rng.key("facts", "keys"), 26**3)[:n]
    values = rng.integers(rng.key("facts", "values", n, seed), n, 26**2)
    chosen = rng.permutation(key, n)[:count] if count <= n else rng.integers(key, count, n)
    keys = ["".join(ALPHABET[order[i] // 26**j % 26] for j in range(3)) for i in chosen]
    return [(k, ALPHABET[values[i] // 26] + ALPHABET[values[i] % 26]) for k, i in zip(keys, chosen, strict=True)]


def _lego(key: int, count: int, numbers: tuple[int, ...], length: int | None) -> Pairs:
    (k,) = numbers
    letters, orders = (_orders(rng.key(key, what), count, n) for what, n in (("letters", len(LEGO_LETTERS)), ("order", k)))
    bits = rng.integers(rng.key(key, "bits"), count * k, 2).reshape(count, k)
    found = []
    for i, asked in enumerate(rng.integers(rng.key(key, "asked"), count, k)):
        name, bit = [LEGO_LETTERS[j] for j in letters[i, :k]], bits[i]
        clauses = [f"{name[0]}v{bit[0]}"]
        clauses += [f"{name[j]}{'v' if bit[j] == bit[j - 1] else 'n'}{name[j - 1]}" for j in range(1, k)]
        found.append(("".join(clauses[j] for j in orders[i]) + name[asked], str(bit[asked])))
    return found


def _orders(key: int, count: int, n: int) -> np.ndarray:
    """Permutations of range(n) [count, n]."""
    return rng.bits(key, np.arange(count * n)).reshape(count, n).argsort(1, kind="stable")


FAMILIES: dict[str, Family] = {
    "copy": Family(_letters(lambda word, _: word, 8)),
    "reverse": Family(_letters(lambda word, _: word[::-1], 8)),
    "shift": Family(_letters(_shifted, 8), (("k", None, 1, 25),)),
    "sort": Family(_letters(lambda word, _: "".join(sorted(word)), 6)),
    "modsum": Family(_modsum, (("p", None, 2, 10),)),
    "topic": Family(_topic, (("c", None, 2, 26), ("v", 0, 0, 1))),
    "facts": Family(_facts, (("n", None, 1, 5000), ("s", 0, 0, 10**6))),
    "lego": Family(_lego, (("k", None, 2, 8),)),
}


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for a word that is near to a known one, else nothing."""
    found = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"; did you mean '{found[0]}'?" if found else ""


def parse(text: str) -> MadeTask:
    """`shift_3` -> the task; `UserError` for what there is not."""
    found = re.fullmatch(r"([a-z]+)((?:_\d+)*)", str(text).strip())
    if found is None or found[1] not in FAMILIES:
        name = found[1] if found else str(text)
        raise UserError(
            f"unknown task {text!r} in scenario.tasks{suggestion(name, FAMILIES)} (there are: {', '.join(FAMILIES)})"
        )
    given = [int(n) for n in found[2].split("_")[1:]]
    known = FAMILIES[found[1]].numbers
    needed = sum(default is None for _, default, _, _ in known)
    if not needed <= len(given) <= len(known):
        wanted = "_".join([found[1], *(name.upper() for name, *_ in known)])
        raise UserError(f"scenario.tasks: write {wanted}{' with numbers' if known else ''}, got {text!r}")
    numbers = [*given, *(default for _, default, _, _ in known[len(given) :] if default is not None)]
    for value, (name, _, least, most) in zip(numbers, known, strict=True):
        if not least <= value <= most:
            raise UserError(f"scenario.tasks: {name} of {text} must be a whole number from {least} to {most}")
    return MadeTask(found[1], tuple(numbers))


def lines(tasks: Sequence[MadeTask], level: Level, split: str, count: int, seed: int) -> list[list[tuple[bytes, bytes]]]:
    """Of each task `count` lines as (prompt with `=`, answer with newline); `UserError` where the level does not fit them."""
    if level not in LEVELS:
        raise UserError(f"unknown scenario.level={level}: choose {', '.join(LEVELS)}")
    check_level(tasks, level)
    tables = _alphabets(tasks) if level == "L0" else [bytes(range(256))] * len(tasks)
    letters = 8 if level in ("L2", "L3") else None
    made = []
    for task, table in zip(tasks, tables, strict=True):
        kind = task.payload if level == "L3" else (task.name,)
        number = min(count, task.numbers[0]) if split == "test" and task.family == "facts" else count
        pairs = task.pairs(rng.key("text_tasks", seed, split, *kind), number, letters)
        tag = "" if level == "L3" else task.tag
        made.append([(f"{tag}{p}".encode().translate(table) + b"=", a.encode().translate(table) + b"\n") for p, a in pairs])
    return made


def check_level(tasks: Sequence[MadeTask], level: Level) -> None:
    """Whether tasks can be at a level."""
    names, tags = [t.name for t in tasks], [t.tag for t in tasks]
    if len(set(names)) < len(names):
        raise UserError(f"scenario.tasks names a task twice: {', '.join(names)}")
    if level != "L3" and len(set(tags)) < len(tags):
        twice = [n for n, t in zip(names, tags, strict=True) if tags.count(t) > 1]
        raise UserError(f"scenario.tasks: {', '.join(twice)} would have one tag; choose other numbers, or scenario.level=L3")
    if level in ("L2", "L3") and len(kinds := {t.payload for t in tasks}) > 1:
        said = " and ".join(" ".join(map(str, kind)) for kind in sorted(kinds, key=str)[:2])
        raise UserError(
            f"scenario.level={level} needs tasks with payloads of one kind, got {said}: copy, reverse, shift and sort"
        )


def _alphabets(tasks: Sequence[MadeTask]) -> list[bytes]:
    """A table of bytes for each task, no two of which give the same byte."""
    free = [b for b in range(256) if b not in (EQUALS, END)]
    found, used = [], 0
    for task in tasks:
        needs = [*ALPHABET, *("0123456789" if task.family in ("modsum", "lego") else "")]
        needs = needs if task.family != "lego" else [*ALPHABET, "0", "1"]
        if used + len(needs) > len(free):
            raise UserError(f"scenario.level=L0: there are no bytes of their own for {len(tasks)} tasks; at most 9 fit")
        table = bytearray(range(256))
        for old, new in zip(needs, free[used : used + len(needs)], strict=True):
            table[ord(old)] = new
        used += len(needs)
        found.append(bytes(table))
    return found
