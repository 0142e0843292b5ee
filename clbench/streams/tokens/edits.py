"""Model editing: a stream of requests to change single facts that a decoder knows. Imports no torch.

A *request* is a prompt, the place of its subject, and the answer wanted from now on. The learner is given requests one after
another, in experiences that end where the stream is looked at (after 1, 10, 100, ... edits), and text of the kind that the
decoder was trained on. What is asked of it (*probes*) it never sees:

    edits         the prompts of the requests: the answer must be the new one
    paraphrases   other wordings, half of them behind unrelated text: the new one
    neighbours    other subjects that have the old answer of a request: the old one
    same_subject  another relation of the subject of a request: the old one
    old_text      text of the kind that the decoder was trained on

An evaluation set holds the probes of the requests of one experience, so that a record has reliability by the age of an edit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np

from clbench.interfaces import Budget, Experience, Facts, UserError
from clbench.streams import rng
from clbench.streams.entries import EvalEntry, ExperienceEntry
from clbench.streams.handles import Handle, end, opened
from clbench.streams.manifest import EDITS, Manifest
from clbench.streams.manifest_rules import PROBES, budget_of
from clbench.streams.manifest_text import described
from clbench.streams.tokens import facts, sequences
from clbench.streams.tokens.facts import World
from clbench.streams.tokens.texts import window_floor


@dataclass(frozen=True, eq=False)
class Request:
    """One edit: after `prompt` [P] the model must go on with `target` [T]; int64 both.

    subject  place in `prompt` of the last token of the subject
    id       number of the request in its data set
    """

    prompt: np.ndarray
    target: np.ndarray
    subject: int
    id: int


@dataclass(frozen=True, eq=False)
class Probe:
    """What is asked: after `prompt` [P] the right answer is `answer` [T]; `other` is the one that it is compared with."""

    prompt: np.ndarray
    answer: np.ndarray
    other: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Questions:
    """A data set of requests with what is asked about them. Ids count `requests`, then `probes`, then rows of `old`.

    requests  in no particular order; probes of kind `edits` are made of them
    before    what each request's prompt was answered with before, by request
    about     (probe kind, request) -> ids of its probes
    old       old text for evaluation [N, L], of which the first token of each row is given
    text      old text for learners [M, L]: nothing of it is asked
    floor     exact loss of the true source on `old`, nats per token, where it is known
    end       the token with which a sentence ends, if there is one
    """

    name: str
    vocab: int
    context: int
    requests: tuple[Request, ...]
    before: tuple[np.ndarray, ...]
    probes: tuple[Probe, ...]
    about: Mapping[tuple[str, int], tuple[int, ...]]
    old: np.ndarray
    text: np.ndarray
    floor: float | None = None
    end: int | None = None

    @property
    def size(self) -> int:
        """Number of ids."""
        return len(self.requests) + len(self.probes) + len(self.old)

    def probe(self, number: int) -> Probe:
        """A probe by id; that of a request asks for its new answer."""
        if number < len(self.requests):
            request = self.requests[number]
            return Probe(request.prompt, request.target, self.before[number])
        return self.probes[number - len(self.requests)]

    def windows(self, ids: np.ndarray) -> np.ndarray:
        """Rows of `old` by id."""
        return self.old[ids - len(self.requests) - len(self.probes)]

    def sha256(self) -> str:
        """Over everything that a learner is given or asked."""
        found = hashlib.sha256(f"{self.vocab} {self.context}".encode())
        arrays = [part for r in self.requests for part in (r.prompt, r.target, np.array([r.subject]))]
        arrays += [part for p in self.probes for part in (p.prompt, p.answer, p.other if p.other is not None else p.prompt[:0])]
        for array in [*arrays, *self.before, self.old, self.text]:
            found.update(np.array(array.shape, "<i8").tobytes())
            found.update(np.ascontiguousarray(array, "<i8").tobytes())
        return found.hexdigest()


@dataclass(frozen=True, eq=False)
class _Given:
    requests: tuple[Request, ...]
    text: np.ndarray
    end: int | None
    name: str


@dataclass(frozen=True, eq=False)
class EditData:
    """The requests of one experience in stream order, and old text; until `close`. `given` is a handle: see `handles`."""

    name: str
    size: int
    given: Handle

    def __len__(self) -> int:
        return self.size

    def request(self, place: int) -> Request:
        """Request number `place` of this experience; the arrays are copies."""
        held: _Given = opened(self.given)
        inside = int(sequences.own(np.array([place]), self.size, held.name)[0])
        one = held.requests[inside]
        return Request(one.prompt.copy(), one.target.copy(), one.subject, one.id)

    @property
    def old_size(self) -> int:
        """Sequences of old text."""
        return len(opened(self.given).text)

    @property
    def end(self) -> int | None:
        """The token with which a sentence of old text ends, if there is one."""
        return opened(self.given).end

    def old_text(self, rows: np.ndarray) -> np.ndarray:
        """Sequences of old text by number -> [B, L] int64. Nothing of it is asked in an evaluation."""
        return opened(self.given).text[np.asarray(rows, np.int64)].copy()

    def close(self) -> None:
        """Let go: the experience is over."""
        end(self.given)


@dataclass(frozen=True, eq=False)
class EditScenario:
    """A stream of edits that can be run: the manifest, requests and probes, the rules.

    known  share of the facts that a decoder must know to be edited: one that does not is refused. 0 for real checkpoints
    """

    name: str
    manifest: Manifest
    questions: Questions
    known: float = 0.0
    asks: ClassVar[Literal["logits"]] = "logits"

    @property
    def budget(self) -> Budget:
        """Bytes that a learner may hold."""
        return Budget(**self.manifest.budget)

    def facts(self) -> Facts:
        """What is compared with a learner's capabilities."""
        return Facts(self.name, "logits", False, True, False, self.budget)

    def experience(self, index: int) -> Experience:
        """What a learner sees of experience `index`."""
        entry = self.manifest.experiences[index]
        made, label = self.questions, f"experience {entry.name}"
        given = _Given(tuple(made.requests[i] for i in entry.train), made.text, made.end, label)
        data: Any = EditData(entry.name, len(entry.train), Handle(given.name, given))
        return Experience(index, entry.name, data, (), (), (), 0, None, self.budget)

    def probes(self, j: int) -> list[Probe]:
        """The probes of evaluation set j, in its order."""
        return [self.questions.probe(int(i)) for i in self.manifest.evals[j].ids]

    def text(self) -> str:
        """The stream for people."""
        return self.manifest.text()

    def describe(self) -> dict[str, Any]:
        """What a record says about the stream and its evaluation sets."""
        found = described(self.manifest)
        return {**found, "scenario": {"name": self.name, **found["scenario"]}}


def scenario(
    name: str,
    questions: Questions,
    looks: Sequence[int] | None = None,
    budget: Mapping[str, Any] | None = None,
    known: float = 0.0,
) -> EditScenario:
    """Requests in their order, cut into experiences after `looks` edits; None: after 1, 10, 100, ... and all."""
    total = len(questions.requests)
    ends = sorted({*(10**i for i in range(9) if 10**i < total), total}) if looks is None else list(looks)
    whole = all(type(n) is int and n >= 1 for n in ends)
    if not whole or not ends or any(b <= a for a, b in pairwise(ends)) or ends[-1] > total:
        raise UserError(f"scenario.looks must be rising numbers of edits from 1 to {total}, got {list(ends)}")
    experiences, evals, first = [], [], 0
    for i, last in enumerate(ends):
        label = str(last) if last == first + 1 else f"{first + 1}-{last}"
        experiences.append(ExperienceEntry(label, train=np.arange(first, last)))
        for probe in PROBES[:-1]:
            own = [n for r in range(first, last) for n in ((r,) if probe == "edits" else questions.about.get((probe, r), ()))]
            if own:
                evals.append(EvalEntry(f"{probe} {label}", ids=np.array(sorted(set(own))), first_seen=i, probe=probe))
        first = last
    if len(questions.old):
        rows = questions.size - len(questions.old) + np.arange(len(questions.old))
        evals.append(EvalEntry("old_text", ids=rows, first_seen=0, probe="old_text", floor=questions.floor))
    manifest = Manifest(
        kind=EDITS,
        dataset={"name": questions.name, "sha256": questions.sha256(), "num_samples": questions.size},
        vocab=questions.vocab,
        context=questions.context,
        experiences=tuple(experiences),
        evals=tuple(evals),
        budget=budget_of(budget, "logits").rules("logits"),
    )
    return EditScenario(name, manifest, questions, known)


OLD_ROWS, TEXT_ROWS, CONTEXT = 128, 256, 64


def edit_facts(
    *,
    name: str,
    edits: int = 100,
    entities: int = 64,
    seed: int = 0,
    draw: int = 0,
    all_told: bool = False,
    looks: Sequence[int] | None = None,
    neighbours: int = 4,
    known: float = 0.9,
    budget: Mapping[str, Any] | None = None,
) -> EditScenario:
    """Facts of the made world (`facts`), changed one after another.

    edits       requests: four relations of each entity of the pool `edit`, in random order, so 4 * `entities` at most
    entities    of the pool `edit`; a multiple of 64
    seed        of the world: the decoder must have been trained on it
    draw        of the requests of this world: which facts, in which order, to which new objects
    all_told    old text for learners tells of all subjects, as things were before the edits; else of the pool `tune` alone
    looks       numbers of edits after which the learner is evaluated; None: 1, 10, 100, ... and all
    neighbours  asked for each request: subjects of the pool `locality` with the old answer, at most 10
    known       share of the facts that the decoder must know, else it is refused; 0: any decoder can be tried
    """
    if isinstance(known, bool) or not isinstance(known, int | float) or not 0 <= known <= 1:
        raise UserError(f"scenario.known must be a share from 0 to 1, got {known!r}")
    world = World(entities, seed)
    if isinstance(draw, bool) or not isinstance(draw, int) or draw < 0:
        raise UserError(f"scenario.draw must be a whole number from 0, got {draw!r}")
    if not isinstance(all_told, bool):
        raise UserError(f"scenario.all_told must be true or false, got {all_told!r}")
    most = (facts.RELATIONS - 1) * entities
    for key, value, least, limit in (("edits", edits, 1, most), ("neighbours", neighbours, 1, 10)):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= limit:
            raise UserError(f"scenario.{key} must be a whole number from {least} to {limit}, got {value!r}")
    made = made_world(world, edits, neighbours, draw, facts.POOLS if all_told else ("tune",))
    return scenario(name, made, looks, budget, known)


def made_world(world: World, edits: int, neighbours: int, draw: int = 0, told: tuple[str, ...] = ("tune",)) -> Questions:
    """Requests and probes of a world. Each entity keeps one relation, drawn at random: its `same_subject` probe.

    `told` are the pools that old text for learners tells of.
    """
    own = ("edits", world.seed, draw) if draw else ("edits", world.seed)
    kept = rng.integers(rng.key(*own, "kept"), world.pool, facts.RELATIONS)
    pairs = np.array([(e, r) for e in range(world.pool) for r in range(facts.RELATIONS) if r != kept[e]])
    pairs = pairs[rng.permutation(rng.key(*own, "order"), len(pairs))[:edits]]
    old = world.objects[pairs[:, 0], pairs[:, 1]]
    new = (old + 1 + rng.integers(rng.key(*own, "new"), len(pairs), facts.OBJECTS - 1)) % facts.OBJECTS
    e, r = pairs[:, 0], pairs[:, 1]
    prompts, targets, before = world.prompts(e, r, 0), world.answers(r, new), world.answers(r, old)
    requests = [Request(prompts[i], targets[i], facts.SUBJECT - 1, i) for i in range(len(pairs))]
    probes: list[Probe] = []
    about: dict[tuple[str, int], tuple[int, ...]] = {}
    unrelated = world.old(len(pairs), rng.key("edits", world.seed, "unrelated"))[:, : facts.PROMPT + facts.ANSWER]
    locality = world.entities("locality")
    for i in range(len(pairs)):
        found: dict[str, list[Probe]] = {"paraphrases": [], "neighbours": [], "same_subject": []}
        for t in range(1, facts.WORDINGS):
            said = world.prompts(e[i : i + 1], r[i : i + 1], t)[0]
            said = np.concatenate([unrelated[i], said]) if (t + i) % 2 else said
            found["paraphrases"].append(Probe(said, targets[i], before[i]))
        near = locality[world.objects[locality, r[i]] == old[i]]
        near = near[rng.permutation(rng.key("edits", world.seed, "near", i), len(near))[:neighbours]]
        asked = world.prompts(near, np.full_like(near, r[i]), 0)
        found["neighbours"] = [Probe(prompt, before[i], targets[i]) for prompt in asked]
        mine, other = e[i : i + 1], kept[e[i : i + 1]]
        answer = world.answers(other, world.objects[mine, other])[0]
        found["same_subject"] = [Probe(world.prompts(mine, other, 0)[0], answer)]
        for kind, several in found.items():
            start = edits + len(probes)
            about[kind, i] = tuple(range(start, start + len(several)))
            probes += several
    held = world.old(OLD_ROWS, rng.key("edits", world.seed, "old"))
    floor = window_floor(world.language, held - facts.OLD_WORDS)
    text = world.text(told, TEXT_ROWS, CONTEXT, rng.key("edits", world.seed, "text"))
    named = f"facts_{2 * world.pool}"
    return Questions(
        named, facts.VOCAB, CONTEXT, tuple(requests), tuple(before), tuple(probes), about, held, text, floor, facts.END
    )
