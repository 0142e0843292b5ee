"""What is kept of a run so that its numbers can be compared later, and in what two such rows differ."""

import hashlib
import json
import pathlib
import platform
from collections import defaultdict

import numpy as np
import torch

from clbench.training.state import fingerprint

IMAGES = 2  # counts of another kind of processor may differ by as many
RELATIVE = 2e-3  # and sums of losses by this share
COUNTS = ("n", "correct", "correct_masked", "correct_top5", "class_correct", "heads", "probe", "edit_counts")
SUMS = ("sum_loss", "sum_loss_start", "sum_loss_trunk", "edit_nats")
PLAIN = (int, float, str, type(None))  # bool is an int


def machine_kind():
    """Processor, the instructions that torch uses on it, and torch's version: equal kinds are equal to the last bit."""
    told = {}
    info = pathlib.Path("/proc/cpuinfo")
    for line in info.read_text(errors="replace").split("\n\n")[0].splitlines() if info.exists() else ():
        key, _, value = line.partition(":")
        told[key.strip()] = value.strip()
    names = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
    processor = " ".join(told[name] for name in names if name in told) or platform.processor()
    version = ".".join(torch.__version__.split(".")[:2])
    return f"{platform.machine()} {processor}, {torch.backends.cpu.get_cpu_capability()}, torch {version}"


def leaves(state):
    """Everything in a nested state that is no container."""
    if isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from leaves(value)
    else:
        yield state


def tensors_by_shape(state):
    """Digests of a state's tensors without their names: "float32 4x160" -> "NUMBER DIGEST" of the sorted SHA-256s.

    The digests stay when keys are renamed or reordered, or when containers are nested otherwise.
    """
    found = defaultdict(list)
    for leaf in leaves(state):
        if isinstance(leaf, torch.Tensor):
            flat = leaf.detach().cpu().contiguous().reshape(-1)
            content = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
            name = f"{str(leaf.dtype).removeprefix('torch.')} {'x'.join(map(str, leaf.shape))}".strip()
            found[name].append(hashlib.sha256(content).hexdigest())
        else:  # of other objects the record's fingerprint knows their text alone, which need not show all of them
            assert isinstance(leaf, PLAIN), f"a learner's state holds tensors and plain values, not {type(leaf).__name__}"
    return {
        name: f"{len(shas)} {hashlib.sha256(''.join(sorted(shas)).encode()).hexdigest()[:16]}"
        for name, shas in sorted(found.items())
    }


def edits_of(record):
    """Counts and losses of a record of edits or of text tasks, by evaluator and experience; {} for others."""
    if record["scenario"].get("kind") not in ("model_editing", "text_tasks"):
        return {}
    rows = {f"{row['evaluator']} {row['experience']}": row["sums"] for row in record["rows"] if row["sums"]}
    counts = {place: {name: column for name, column in sums.items() if name != "nats"} for place, sums in rows.items()}
    return {"edit_counts": counts, "edit_nats": {place: sums["nats"] for place, sums in rows.items() if "nats" in sums}}


def row_of(record, state):
    """The golden row of a finished record and the learner's final state."""
    assert fingerprint(state) == record["final_state_sha256"]
    record = record | edits_of(record)
    row = {name: record[name] for name in (*COUNTS, *SUMS) if record.get(name)}
    row |= {"final_state_sha256": record["final_state_sha256"], "tensors": tensors_by_shape(state)}
    return {"made_on": machine_kind(), "manifest": record["scenario"]["manifest_sha256"], **json.loads(json.dumps(row))}


def numbers(value, path=""):
    """Nested lists and dictionaries of numbers -> {path: number}."""
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, item in pairs for key, leaf in numbers(item, f"{path}[{name}]").items()}
    return {path: value}


def differences(old, new, exact):
    """One line for each thing in which a new row differs from the old one: to the last bit, or beyond the tolerances."""
    if old["manifest"] != new["manifest"]:
        return ["another stream"]
    lines = []
    for field in (*COUNTS, *SUMS):
        a, b = numbers(old.get(field)), numbers(new.get(field))
        if a.keys() != b.keys():
            lines.append(f"{field} has another form")
            continue
        moved = [key for key in a if a[key] != b[key] and (exact or not near(a[key], b[key], field in COUNTS))]
        lines += [f"numbers moved: {field}{key} {a[key]} -> {b[key]}" for key in moved]
    return lines + (differences_of_states(old, new) if exact else [])


def differences_of_states(old, new):
    """The lines of `differences` on the final state."""
    a, b = old["tensors"], new["tensors"]
    changed = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    lines = [f"tensors moved: {name}: {a.get(name, 'none')} -> {b.get(name, 'none')}" for name in changed]
    if not lines and old["final_state_sha256"] != new["final_state_sha256"]:
        lines = ["names moved: no tensor of the final state changed, its keys, order or plain values did"]
    return lines


def near(a, b, count):
    """Are two numbers, or two nothings, equal within the tolerance of counts or of sums of losses?"""
    if a is None or b is None:
        return a is b
    return abs(a - b) <= IMAGES if count else bool(np.isclose(a, b, rtol=RELATIVE, atol=0))
