"""A made world of facts: entities with five relations to objects, told in six wordings each. Imports no torch.

Names, words and objects are token ids; everything is a pure function of the seed, so a decoder can be trained on the world in
minutes, and what it must say after an edit is known exactly. A fact "subject relation object" is a sentence of 8 tokens:

    first name, last name | three words of the wording | two tokens of the object | end

entities  pairs of 32 first and 32 last names, so that many entities share a last name. Of 2 E entities the first E are `edit`
          (their facts are changed), 3/4 E are `locality` (asked as neighbours, never changed), E/4 are `tune`: the text that
          learners may read
relations 5, each with 16 objects of its own: 8 first tokens with 2 continuations each. In every pool each object of a relation
          is that of as many entities
wordings  6 of a relation, of its own three words and eight shared ones; number 0 is the edit's, the others are paraphrases.
          A fact is told in four of them: that the model knows it in the other two says that it stores facts, not sentences
old text  a Markov chain of 32 words of its own, whose entropy is known

Own choices: the sizes, the words of wordings, passages of 16 words, one passage to four facts in the text for training.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import rng
from clbench.streams.tokens import languages
from clbench.streams.tokens.markov import Source

END = 0
NAMES, RELATIONS, OBJECTS, WORDINGS, TOLD = 32, 5, 16, 6, 4
SHARED, OWN, OLD = 8, 3, 32  # words of wordings shared by all relations, and of each; words of the old text
LAST = 1 + NAMES
WORDS = LAST + NAMES
RELATION_WORDS = WORDS + SHARED
OBJECT_TOKENS = RELATION_WORDS + OWN * RELATIONS
OLD_WORDS = OBJECT_TOKENS + OBJECTS * RELATIONS
VOCAB = OLD_WORDS + OLD
SUBJECT, PROMPT, ANSWER, PASSAGE = 2, 5, 3, 16  # tokens of a subject, a prompt, an answer with its end, a passage of old text
POOLS = ("edit", "locality", "tune")


@dataclass(frozen=True)
class World:
    """Facts of `2 * pool` entities, drawn from `seed`; `pool` is a multiple of 64, at most 512."""

    pool: int
    seed: int

    def __post_init__(self) -> None:
        if isinstance(self.pool, bool) or not isinstance(self.pool, int) or self.pool % 64 or not 64 <= self.pool <= 512:
            raise UserError(f"scenario.entities must be a multiple of 64 from 64 to 512, got {self.pool!r}")

    @cached_property
    def subjects(self) -> np.ndarray:
        """Token ids of names [2 * pool, 2]."""
        pairs = rng.permutation(rng.key("facts", self.seed, "names"), NAMES * NAMES)[: 2 * self.pool]
        return np.stack([1 + pairs // NAMES, LAST + pairs % NAMES], 1)

    def entities(self, pool: str) -> np.ndarray:
        """Numbers of the entities of a pool."""
        edges = [0, self.pool, self.pool + 3 * self.pool // 4, 2 * self.pool]
        i = POOLS.index(pool)
        return np.arange(edges[i], edges[i + 1])

    @cached_property
    def objects(self) -> np.ndarray:
        """The true objects [2 * pool, RELATIONS], 0..15; in every pool each object comes equally often."""
        made = np.empty((2 * self.pool, RELATIONS), np.int64)
        for pool in POOLS:
            of = self.entities(pool)
            for r in range(RELATIONS):
                made[of, r] = rng.permutation(rng.key("facts", self.seed, "objects", pool, r), len(of)) % OBJECTS
        return made

    @cached_property
    def told(self) -> np.ndarray:
        """Which wordings of a fact the text holds [2 * pool, RELATIONS, WORDINGS] bool, four each."""
        shape = (2 * self.pool, RELATIONS, WORDINGS)
        draws = rng.bits(rng.key("facts", self.seed, "told"), np.arange(np.prod(shape))).reshape(shape)
        return draws.argsort(-1).argsort(-1) < TOLD

    @cached_property
    def wordings(self) -> np.ndarray:
        """The three words between subject and object [RELATIONS, WORDINGS, 3]; no two are alike."""
        made = np.empty((RELATIONS, WORDINGS, 3), np.int64)
        for r in range(RELATIONS):
            for t in range(WORDINGS):
                own = RELATION_WORDS + OWN * r + t // 2
                a, b = WORDS + rng.permutation(rng.key("facts", self.seed, "wording", r, t), SHARED)[:2]
                made[r, t] = (a, own, b) if t % 2 else (own, a, b)
        return made

    @cached_property
    def language(self) -> Source:
        """The source of old text, over 0..31."""
        return languages.synthetic(OLD, OLD, "markov", 0.0, 0, self.seed)

    def prompts(self, entity: np.ndarray, relation: np.ndarray, wording: np.ndarray | int) -> np.ndarray:
        """Subject and wording: [B] each -> [B, PROMPT]."""
        return np.concatenate([self.subjects[entity], self.wordings[relation, wording]], 1)

    def answers(self, relation: np.ndarray, number: np.ndarray) -> np.ndarray:
        """An object of a relation by number, and the end: [B] each -> [B, ANSWER]."""
        first = OBJECT_TOKENS + OBJECTS * np.asarray(relation) + np.asarray(number) // 2
        second = OBJECT_TOKENS + OBJECTS * np.asarray(relation) + 8 + (np.asarray(number) * 3 + np.asarray(number) // 2) % 8
        return np.stack([first, second, np.full_like(first, END)], 1)

    def sentences(self, entity: np.ndarray, relation: np.ndarray, wording: np.ndarray) -> np.ndarray:
        """True facts as text [B, 8]."""
        answer = self.answers(relation, self.objects[entity, relation])
        return np.concatenate([self.prompts(entity, relation, wording), answer], 1)

    def old(self, count: int, key: int) -> np.ndarray:
        """Passages of old text [count, PASSAGE]."""
        return OLD_WORDS + self.language.sample(count * PASSAGE, key).astype(np.int64).reshape(count, PASSAGE)

    def text(self, pools: tuple[str, ...], count: int, context: int, key: int) -> np.ndarray:
        """Sequences of facts of some pools and of old text, cut at random places -> [count, context].

        A sequence is of sentences in which each told fact is as likely, with a passage after every four; it begins anywhere.
        """
        e, r, t = np.nonzero(self.told[np.concatenate([self.entities(pool) for pool in pools])])
        e = np.concatenate([self.entities(pool) for pool in pools])[e]
        unit = 4 * (PROMPT + ANSWER) + PASSAGE  # four sentences and a passage
        units = -(-(context + unit) // unit)
        chosen = (rng.uniform(rng.key(key, "facts"), np.arange(count * units * 4)) * len(e)).astype(np.int64)
        facts = self.sentences(e[chosen], r[chosen], t[chosen]).reshape(count, units, -1)
        passages = self.old(count * units, rng.key(key, "old")).reshape(count, units, PASSAGE)
        whole = np.concatenate([facts, passages], 2).reshape(count, -1)
        starts = (rng.uniform(rng.key(key, "starts"), np.arange(count)) * unit).astype(np.int64)
        return np.take_along_axis(whole, starts[:, None] + np.arange(context), 1)
