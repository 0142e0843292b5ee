"""Experiences laid over domains: the manifest of a stream of texts or of groups of images. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clbench.streams.entries import EvalEntry, ExperienceEntry
from clbench.streams.manifest import SPANS, Manifest
from clbench.streams.manifest_rules import budget_of


def laid_out(
    domains: Sequence[Any],
    order: Sequence[int],
    parts: Sequence[tuple[int, int]],
    held: Mapping[int, int],
    *,
    vocab: int,
    context: int,
    batch: int,
    budget: Mapping[str, Any] | None,
    about: Sequence[Mapping[str, Any]] | None = None,
    evaluators: Sequence[str] = (),
) -> Manifest:
    """The manifest of a stream that reads domain `order[i]` in experience i; those of one domain stand behind each other in it.

    parts   sequences and steps of each experience
    held    sequences of each domain's evaluation set
    about   what else the manifest says about each domain
    """
    known, experiences, first = about or [{}] * len(domains), [], dict.fromkeys(order, 0)
    for i, (d, (size, steps)) in enumerate(zip(order, parts, strict=True)):
        label = domains[d].name if list(order).count(d) == 1 else f"{domains[d].name}_{list(order)[: i + 1].count(d)}"
        experiences.append(ExperienceEntry(label, domain=d, first=first[d], sequences=size, steps=steps))
        first[d] += size
    return Manifest(
        kind=SPANS,
        domains=tuple(_domain(d, more) for d, more in zip(domains, known, strict=True)),
        vocab=vocab,
        context=context,
        batch=batch,
        experiences=tuple(experiences),
        evals=tuple(_evaluated(domains[d], d, list(order).index(d), number, context) for d, number in held.items()),
        budget=budget_of(budget, "loss").rules("loss"),
        evaluators=tuple(evaluators),
    )


def _domain(domain: Any, more: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {"train_tokens": len(domain.train), "validation_tokens": len(domain.validation)}
    return {"name": domain.name, "sha256": domain.sha256, **more, **sizes}


def _evaluated(domain: Any, d: int, first_seen: int, number: int, context: int) -> EvalEntry:
    known: dict[str, Any] = {name: getattr(domain, name, None) for name in ("floor", "bytes_per_token")}
    return EvalEntry(domain.name, first_seen=first_seen, domain=d, sequences=number, tokens=number * context, **known)
