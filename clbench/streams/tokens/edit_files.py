"""Edits from files in the layouts of CounterFact and zsRE, for decoders with a tokenizer. Imports no torch.

CounterFact (Meng et al. 2022), records with `requested_rewrite` {prompt with one {}, subject, target_new {str}, target_true
{str}}, `paraphrase_prompts`, `neighborhood_prompts`: other subjects for which target_true holds.
zsRE (as in MEND and EasyEdit), records with `src`, `subject`, `rephrase`, `loc`, `loc_ans`, `alt`, `answers`: loc is one
unrelated question. `target=alt` asks for the made alternative, old answer answers[0]; `target=answers` for the true one, as the
MEMIT family.

Prompts and answers are encoded each by itself, answers behind a space, so both are cut at the same place everywhere; an answer
has no end token. A record whose prompt has come before, or whose subject does not stand in its prompt, is left out. Old text is
a plain text file: the first rows of it are asked, the others are for learners.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clbench.interfaces import UserError
from clbench.streams.tokens.edits import OLD_ROWS, TEXT_ROWS, EditScenario, Probe, Questions, Request, scenario
from clbench.streams.tokens.tokenizers import Bytes, Encoder, TokenizerFile


@dataclass(frozen=True)
class Fact:
    """One record as text; `near` are prompts with their right answers."""

    prompt: str
    subject: str
    target: str
    before: str
    rephrased: tuple[str, ...]
    near: tuple[tuple[str, str], ...]


def edit_file(
    *,
    name: str,
    path: str,
    layout: Literal["counterfact", "zsre"],
    corpus: str,
    tokenizer: str | None = None,
    target: Literal["alt", "answers"] = "alt",
    edits: int = 100,
    looks: Sequence[int] | None = None,
    neighbours: int = 4,
    context: int = 64,
    data_root: str | None = None,
    budget: Mapping[str, Any] | None = None,
) -> EditScenario:
    """The first `edits` records of a file that can be used.

    path, corpus, tokenizer  files, as given or under `data_root` or CLBENCH_DATA: records, plain text, tokenizer.json (null:
                             bytes)
    target      of zsRE: which answer is asked for
    neighbours  of CounterFact: asked for each edit, at most
    context     tokens of the longest text, and of a row of old text
    """
    for key, value, known in (("layout", layout, ("counterfact", "zsre")), ("target", target, ("alt", "answers"))):
        if value not in known:
            raise UserError(f"scenario.{key} must be {' or '.join(known)}, got {value!r}")
    for key, value in (("edits", edits), ("neighbours", neighbours), ("context", context)):
        if isinstance(value, bool) or not isinstance(value, int) or value < (16 if key == "context" else 1):
            raise UserError(f"scenario.{key} must be a whole number from {16 if key == 'context' else 1}, got {value!r}")
    encoder: Encoder = Bytes() if tokenizer is None else TokenizerFile(find_file("tokenizer", tokenizer, data_root))
    found = list(_facts(find_file("path", path, data_root), layout, target, edits, neighbours))
    if len(found) < edits:
        raise UserError(f"scenario.edits={edits}: {path} has {len(found)} records that can be used")
    rows = old_rows(find_file("corpus", corpus, data_root), encoder, context)
    return scenario(name, questions(Path(path).stem, found, rows, encoder, context), looks, budget)


def find_file(option: str, name: str, data_root: str | None) -> Path:
    """A file that an option of a scenario names, as given or under the data folder."""
    root = data_root or os.environ.get("CLBENCH_DATA")
    places = [Path(name).expanduser(), *([Path(root).expanduser() / name] if root else [])]
    for place in places:
        if place.is_file():
            return place
    hint = "" if root else " (no data_root, CLBENCH_DATA is not set)"
    raise UserError(f"scenario.{option}={name}: no file {' or '.join(map(str, places))}{hint}")


def _facts(path: Path, layout: str, target: str, edits: int, neighbours: int) -> Iterator[Fact]:
    """Records that can be used, the first ones."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(body, list):
        raise UserError(f"{path} must hold a list of records")
    met: set[str] = set()
    for i, one in enumerate(body):
        try:
            fact = _counterfact(one, neighbours) if layout == "counterfact" else _zsre(one, target)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(f"{path}: record {i} is not in the layout of {layout}: {type(error).__name__}: {error}") from None
        if fact.prompt not in met and fact.subject and fact.subject in fact.prompt:
            met.add(fact.prompt)
            yield fact
        if len(met) == edits:
            return


def _counterfact(one: Any, neighbours: int) -> Fact:
    asked = one["requested_rewrite"]
    prompt, new, true = asked["prompt"].replace("{}", asked["subject"]), asked["target_new"]["str"], asked["target_true"]["str"]
    near = tuple((text.strip(), true.strip()) for text in one["neighborhood_prompts"][:neighbours])
    return Fact(
        prompt.strip(), asked["subject"], new.strip(), true.strip(), tuple(map(str.strip, one["paraphrase_prompts"])), near
    )


def _zsre(one: Any, target: str) -> Fact:
    alt, true = one["alt"].strip(), one["answers"][0].strip()
    new, old = (alt, true) if target == "alt" else (true, alt)
    near = ((one["loc"].strip(), one["loc_ans"].strip()),)
    return Fact(one["src"].strip(), one["subject"], new, old, (one["rephrase"].strip(),), near)


def old_rows(path: Path, encoder: Encoder, context: int) -> np.ndarray:
    """Rows of a plain text [N, context], spread over all of it."""
    (ids,) = encoder.encode([path.read_text(encoding="utf-8", errors="replace").replace("\0", " ")])
    rows = ids[: len(ids) // context * context].astype(np.int64).reshape(-1, context)
    if len(rows) < 2:
        raise UserError(f"{path} is too short: {len(ids)} tokens for a context of {context}")
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), OLD_ROWS + TEXT_ROWS)).astype(np.int64)]


def questions(name: str, found: Sequence[Fact], rows: np.ndarray, encoder: Encoder, context: int) -> Questions:
    """Facts as requests and probes."""

    def ids(*texts: str) -> list[np.ndarray]:
        return [one.astype(np.int64) for one in encoder.encode(texts)]

    requests, before, probes, about = [], [], list[Probe](), dict[tuple[str, int], tuple[int, ...]]()
    for i, fact in enumerate(found):
        head = fact.prompt[: fact.prompt.index(fact.subject) + len(fact.subject)]
        prompt, lead, target, old = ids(fact.prompt, head, f" {fact.target}", f" {fact.before}")
        requests.append(Request(prompt, target, last_of(lead, prompt), i))
        before.append(old)
        asked = {"paraphrases": [Probe(text, target, old) for text in ids(*fact.rephrased)], "neighbours": list[Probe]()}
        for text, answer in fact.near:
            said, right = ids(text, f" {answer}")
            asked["neighbours"].append(Probe(said, right, target))
        for kind, several in asked.items():
            about[kind, i] = tuple(range(len(found) + len(probes), len(found) + len(probes) + len(several)))
            probes += several
    longest = max(len(p.prompt) + max(len(p.answer), len(p.other if p.other is not None else ())) for p in probes)
    longest = max(longest, *(len(r.prompt) + len(r.target) for r in requests))
    if longest > context:
        raise UserError(f"scenario.context={context}: a prompt with its answer has {longest} tokens")
    held = min(OLD_ROWS, len(rows) // 2)
    every = len(rows) // held
    asked_rows = np.arange(len(rows)) % every == 0
    old_rows, text = rows[asked_rows], rows[~asked_rows]
    return Questions(name, encoder.vocab, context, tuple(requests), tuple(before), tuple(probes), about, old_rows, text)


def last_of(lead: np.ndarray, prompt: np.ndarray) -> int:
    """Place in a prompt of the token with which its beginning `lead` ends, also where that is joined with what follows."""
    size = min(len(lead), len(prompt))
    same = size if (lead[:size] == prompt[:size]).all() else int((lead[:size] != prompt[:size]).argmax())
    return same - 1 if same == len(lead) else min(same, len(prompt) - 1)
