"""What a manifest says: to people, a line for each experience and each evaluation set; and in a record."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from clbench.streams.entries import EvalEntry, ExperienceEntry

if TYPE_CHECKING:
    from clbench.streams.manifest import Manifest


def lines(m: Manifest, name: Callable[[int], str]) -> Iterator[str]:
    """The lines; `name` names an original class id."""
    yield f"{m.kind}, {_domains(m) if m.domains else m.dataset['name']}, sha256 {m.sha256}"
    yield from (f"  operator {json.dumps(one, sort_keys=True)}" for one in m.operators)
    yield from [f"  evaluated after every {m.evaluate_every} experiences, {m.rows} times"] if m.evaluate_every > 1 else ()
    yield from _spans(m) if m.domains else _lines(m) if m.form != "ids" else _ids(m, name)


def _ids(m: Manifest, name: Callable[[int], str]) -> Iterator[str]:
    named = any(name(c) != str(c) for c in m.class_order)  # "10=2": id 10 is the class named 2
    classes = {c: f"{c}={name(c)}" if named else str(c) for c in m.class_order}
    between = ", " if any(" " in one for one in classes.values()) else " "
    wide, tested = (max([10, *(len(e.name) for e in entries)]) for entries in (m.experiences, m.evals))
    for e in m.experiences:
        line = f"  {e.name:<{wide}} {len(e.train):>7} samples  classes {between.join(classes[c] for c in e.classes)}"
        yield line + _remarks(e)
    for e in m.evals:
        yield f"  evaluate {e.name:<{tested}} {len(e.ids):>7} samples  first seen in experience {e.first_seen}{_remarks(e)}"


def _lines(m: Manifest) -> Iterator[str]:
    """Experiences with their edits or lines, evaluation sets with their probes."""
    unit = "edits" if m.form == "edits" else "lines"
    yield from (f"  {e.name:<14} {len(e.train):>7} {unit}" for e in m.experiences)
    wide = max(len(e.name) for e in m.evals)
    for e in m.evals:
        known = "" if e.floor is None else f", floor {e.floor:.4f} nats a token"
        yield f"  evaluate {e.name:<{wide}} {len(e.ids):>7} {e.probe or unit}, first seen in experience {e.first_seen}{known}"


def _remarks(entry: ExperienceEntry | EvalEntry) -> str:
    """What is out of the ordinary about an entry."""
    said = [f"{name} {json.dumps(_cut(options))}" for step in entry.transform for name, options in step.items()]
    said += ["own labels"] if entry.labels is not None else []
    if isinstance(entry, EvalEntry):
        said += [f"in this order, batches of {entry.batch_size or 'any size'}"] if entry.order == "given" else []
    else:
        said += [] if entry.labelled else ["without labels"]
        said += [] if entry.boundary else ["boundary hidden"]
        said += [f"budget {json.dumps(entry.budget)}"] if entry.budget else []
    return "".join(f"; {one}" for one in said)


def _cut(options: dict[str, Any]) -> dict[str, Any]:
    """Options without the rest of what is long."""
    return {key: f"{v[:20]}..." if isinstance(v, str) and len(v) > 24 else v for key, v in options.items()}


def _domains(m: Manifest) -> str:
    images = m.unit == "images"
    of = f"images of {m.domains[0]['side']} pixels" if images else f"{m.vocab} tokens in the vocabulary"
    return f"{len(m.domains)} domains, {of}"


def _spans(m: Manifest) -> Iterator[str]:
    """Experiences with their tokens, evaluation sets with their floors."""
    size = m.batch * m.context
    for e in m.experiences:
        passes = e.steps * size / (e.sequences * m.context)
        yield f"  {e.name:<14} {e.steps * size:>11} {m.unit}, {e.steps} steps of {size}, {passes:.2f} passes"
    for e in m.evals:
        known = "" if e.floor is None else f", floor {e.floor:.4f} nats a token"
        yield f"  evaluate {e.name:<14} {e.tokens:>7} {m.unit}, first read in experience {e.first_seen}{known}"


def described(m: Manifest) -> dict[str, Any]:
    """What a record says of its stream and evaluation sets, as far as the manifest knows it: {scenario, n, first_seen, ...}.

    The experiences between two evaluations are one: a record has a row for each evaluation, and so an experience for each.
    """
    spans = m.form == "spans"
    about: dict[str, Any] = {
        "kind": m.kind,
        "manifest_sha256": m.sha256,
        "num_experiences": m.rows,
        "eval_names": [e.name for e in m.evals],
        "experiences": [dict(e) if spans else _experience(e) for e in m.experiences],
        "budget": dict(m.budget),
    }
    if m.operators:
        about["operators"] = [name for one in m.operators for name in one]
    if m.evaluate_every > 1:
        about |= {"experiences": _joined(m), "learned": len(m.experiences), "evaluate_every": m.evaluate_every}
    sets: dict[str, Any] = {"first_seen": [e.first_seen // m.evaluate_every for e in m.evals]}
    if spans:
        about |= {name: getattr(m, name) for name in ("unit", "context", "batch", "vocab", "iid")}
        sets |= {name: [e[name] for e in m.evals] for name in ("tokens", "floor", "bytes_per_token")}
        return {"scenario": about, "n": sets["tokens"], **sets}
    if m.form in ("edits", "texts"):
        about |= {"vocab": m.vocab, "context": m.context}
        about["experiences"] = [{"name": e.name, "num_train": len(e.train)} for e in m.experiences]
    if m.form == "texts":
        return {"scenario": about | {"discloses_task": m.discloses_task}, "n": [len(e.ids) for e in m.evals], **sets}
    if m.form == "edits":
        sets |= {name: [e[name] for e in m.evals] for name in ("probe", "floor")}
        return {"scenario": about, "n": [len(e.ids) for e in m.evals], **sets}
    about["class_order"] = list(m.class_order)
    return {"scenario": about, "n": [len(e.ids) for e in m.evals], "eval_classes": [list(e.classes) for e in m.evals], **sets}


def _experience(e: ExperienceEntry) -> dict[str, Any]:
    return {"name": e.name, "classes": list(e.classes), "task": e.task, "num_train": len(e.train)}


def _joined(m: Manifest) -> list[dict[str, Any]]:
    """The experiences between two evaluations as one, each."""
    found = []
    for first in range(0, len(m.experiences), m.evaluate_every):
        several = m.experiences[first : first + m.evaluate_every]
        name = several[0].name if len(several) == 1 else f"{several[0].name}..{several[-1].name}"
        classes = list(dict.fromkeys(c for e in several for c in e.classes))
        tasks = {e.task for e in several}
        task = tasks.pop() if len(tasks) == 1 else None
        found.append({"name": name, "classes": classes, "task": task, "num_train": sum(len(e.train) for e in several)})
    return found
