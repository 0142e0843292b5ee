"""Generators of continual pre-training streams: synthetic languages of known entropy, and text corpora. Imports no torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import rng
from clbench.streams.tokens.scenario import Domain, TokenScenario, content_sha256, eval_windows, scenario

MARK = b"<|doc|>"
END = 0  # the byte between two documents; it does not occur in text


def synthetic(
    *,
    name: str,
    order: Sequence[int] = (0, 1, 2),
    kind: Literal["markov", "hmm"] = "markov",
    states: int = 32,
    symbols: int = 32,
    shift: float = 1.0,
    family: Literal["apart", "line"] = "apart",
    junk: float | Sequence[float] = 0.0,
    language_seed: int = 0,
    tokens: int = 400_000,
    context: int = 64,
    batch: int = 16,
    eval_tokens: int = 16_384,
    probe_sequences: int = 16,
    probe_evenly: int = 16,
    budget: Mapping[str, Any] | None = None,
    evaluators: Sequence[str] = (),
) -> TokenScenario:
    """Languages drawn from a seed, as far from each other as `shift` says (0: all the same, 1: nothing in common).

    order  which language each experience is in; experiences in the same language read different text
    family "apart": all languages are `shift` away from the first, and from each other; "line": language i of n lies at
           i / (n - 1) of the way from the first to the last one, which is `shift` away, so that neighbours are most alike
    junk   share of the training sequences of a language, or of each in a list, that are noise: symbols drawn evenly. Validation
           text has none
    """
    from clbench.streams.tokens import languages

    if family not in ("apart", "line"):
        raise UserError(f"unknown scenario.family={family}: choose apart, line")
    made, shares = [], _junk_shares(junk, max(order, default=-1) + 1)
    for d, share in enumerate(shares):
        place = (min(d, 1), shift * d / max(1, len(shares) - 1)) if family == "line" else (d, shift)
        source = languages.synthetic(states, symbols, kind, place[1], place[0], language_seed)
        times = list(order).count(d)
        train = source.sample(tokens * max(1, times) + 1, rng.key("train", language_seed, d))
        train = with_junk(train, share, context, symbols, rng.key("junk", language_seed, d))
        held = source.sample(eval_tokens + 1, rng.key("validation", language_seed, d))
        windows = eval_windows(held, max(1, eval_tokens // context), context)
        floor = window_floor(source, windows)
        made.append(Domain(f"language_{d}", train, held, content_sha256(train, held), floor))
    options: dict[str, Any] = {"tokens": tokens, "context": context, "batch": batch, "eval_tokens": eval_tokens}
    options |= {"probe_sequences": probe_sequences, "probe_evenly": probe_evenly, "budget": budget, "evaluators": evaluators}
    return scenario(name, made, order, vocab=symbols, **options)


def _junk_shares(junk: float | Sequence[float], languages: int) -> list[float]:
    """`scenario.junk` for each language; `UserError` for what is no share."""
    shares = list(junk) if isinstance(junk, Sequence) and not isinstance(junk, str) else [junk] * languages
    good = all(isinstance(one, int | float) and not isinstance(one, bool) and 0 <= one < 1 for one in shares)
    if len(shares) != languages or not good:
        what = f"a share from 0 to below 1, or one for each of {languages} languages"
        raise UserError(f"scenario.junk must be {what}, got {junk!r}")
    return [float(one) for one in shares]  # type: ignore[arg-type]


def with_junk(text: np.ndarray, share: float, context: int, symbols: int, key: int) -> np.ndarray:
    """A text whose windows of `context` tokens are noise in `share` of all cases, drawn without replacement -> [M]."""
    number = round(share * (len(text) // context))
    if not number:
        return text
    made = text.copy()
    chosen = rng.permutation(rng.key(key, "windows"), len(text) // context)[:number]
    places = chosen[:, None] * context + np.arange(context)
    made[places] = rng.integers(rng.key(key, "noise"), places.size, symbols).reshape(places.shape)
    return made


def window_floor(source: Any, windows: np.ndarray) -> float:
    """Exact loss of the true source on what a model is asked: windows [N, L + 1] -> nats per predicted token.

    The first token of each window is given, so its own loss does not count; what stood before it is unknown to both.
    """
    return round(float(source.nats(windows)[:, 1:].mean()), 9)


def text(
    *,
    name: str,
    corpora: Sequence[str],
    tokens: int | Sequence[int],
    context: int = 256,
    batch: int = 32,
    eval_tokens: int = 131_072,
    validation: float = 0.05,
    data_root: str | None = None,
    probe_sequences: int = 16,
    probe_evenly: int = 24,
    budget: Mapping[str, Any] | None = None,
    evaluators: Sequence[str] = (),
) -> TokenScenario:
    """Texts by name, one experience each: NAME is a folder of shards or a file NAME.txt under the data folder, read as bytes.

    A name that comes again reads a different part of its text. In a .txt file a line "<|doc|>title" starts a document;
    whole documents are set aside for validation, chosen by their content, until they are the share `validation` of the text.
    """
    distinct = list(dict.fromkeys(corpora))
    opened = [open_text(corpus, data_root, validation) for corpus in distinct]
    vocab = {size for _, size in opened}
    if len(vocab) != 1:
        raise UserError(f"the texts {', '.join(distinct)} have vocabularies of {sorted(vocab)} tokens: one tokenizer is needed")
    options: dict[str, Any] = {"tokens": tokens, "context": context, "batch": batch, "eval_tokens": eval_tokens}
    options |= {"probe_sequences": probe_sequences, "probe_evenly": probe_evenly, "budget": budget, "evaluators": evaluators}
    order = [distinct.index(corpus) for corpus in corpora]
    return scenario(name, [domain for domain, _ in opened], order, vocab=vocab.pop(), **options)


SOURCES = {
    "eltec_eng": " (English novels of the European Literary Text Collection, github.com/COST-ELTeC/ELTeC-eng)",
    "eltec_deu": " (German novels of the European Literary Text Collection, github.com/COST-ELTeC/ELTeC-deu)",
    "peps_eng": " (Python Enhancement Proposals, github.com/python/peps)",
    "gesetze_deu": " (German federal law, www.gesetze-im-internet.de)",
}


def open_text(corpus: str, data_root: str | None, validation: float) -> tuple[Domain, int]:
    """A text by name -> (domain, vocabulary). A missing one raises `UserError` that says where it was looked for."""
    if not 0 < validation < 1:
        raise UserError(f"scenario.validation must lie between 0 and 1, got {validation}")
    root = data_root or os.environ.get("CLBENCH_DATA")
    if not root:
        where = f"set data_root or CLBENCH_DATA to the folder with {corpus}.txt or shards {corpus}/"
        raise UserError(f"no text {corpus}{SOURCES.get(corpus, '')}: {where}")
    folder, file = Path(root).expanduser() / corpus, Path(root).expanduser() / f"{corpus}.txt"
    if folder.is_dir():
        from clbench.streams.tokens.corpus import Shards

        shards = Shards.open(folder)
        parts = shards.split("train"), shards.split("validation")
        return Domain(corpus, *parts, shards.sha256), int(shards.vocab)
    if not file.is_file():
        where = f"neither {file} nor a folder of shards {folder} is there"
        command = f"clbench manifest corpus build FILES --out {folder}"
        raise UserError(f"no text {corpus}{SOURCES.get(corpus, '')}: {where} ({command} makes it of texts or JSONL)")
    content = file.read_bytes()
    if (at := content.find(b"\0")) >= 0:
        raise UserError(f"{file} holds a zero byte at {at}, which is the mark between documents: it is no plain text")
    train, held = split_documents(content, validation)
    if not len(train) or not len(held):
        raise UserError(f"{file} needs at least two documents, each after a line '<|doc|>title'")
    return Domain(corpus, train, held, content_sha256(train, held), bytes_per_token=1.0), 256


def split_documents(text: bytes, validation: float) -> tuple[np.ndarray, np.ndarray]:
    """A text with document marks -> (training bytes, validation bytes), uint8, a zero byte after each document.

    Documents are set aside in the order of their SHA-256, which does not depend on where they stand, until they are the
    share `validation`; the one that would overshoot by more than it lacks is left to training, unless none is set aside yet.
    """
    documents = [part.partition(b"\n")[2] for part in (b"\n" + text).removesuffix(b"\n").split(b"\n" + MARK)[1:]]
    documents = [document for document in documents if document]
    order = sorted(range(len(documents)), key=lambda i: hashlib.sha256(documents[i]).digest())
    wanted, held, got = validation * sum(map(len, documents)), set(), 0
    for i in order[: len(documents) - 1]:
        size = len(documents[i])
        if got + size / 2 <= wanted or not held:
            held.add(i)
            got += size
    parts = [b"".join(d + b"\0" for i, d in enumerate(documents) if (i in held) == one) for one in (False, True)]
    return tuple(np.frombuffer(part, np.uint8) for part in parts)  # type: ignore[return-value]
