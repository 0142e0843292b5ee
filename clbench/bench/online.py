"""`clbench bench online`: one pass in small batches, clbench's loop beside one written by hand, in one process.

Both train the same network (`resnet18_slim`, or --model) from the same weights on the same images with SGD. The hand-written
loop is what one would write: uint8 images are normalised, forward, cross-entropy over all classes, backward, step, and the loss
is read. Of clbench it is `finetune` on a stream of single passes. Rounds of both alternate, and a ratio is the median over
rounds of its seconds to the other's: the absolute numbers of a busy machine mean little.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from clbench.bench import machine, options
from clbench.bench.table import aligned, machine_text
from clbench.config.compose import build, compose
from clbench.interfaces import Budget, Experience, UserError
from clbench.learners.finetune import Finetune
from clbench.models.precision import set_precision
from clbench.streams.images.data import ImageData
from clbench.streams.images.pixels import Pipeline
from clbench.streams.in_order import StreamData
from clbench.streams.scenario import ArrayImages
from clbench.training import arithmetic
from clbench.training.runtime import Runtime

CLASSES, RATE, DECAY = 10, 0.01, 5e-4
MOST = 1.10  # of the hand-written loop's seconds
COLUMNS = (
    "cpu",
    "threads",
    "torch",
    "model",
    "batch",
    "precision",
    "layout",
    "loop",
    "images_per_second",
    "ratio",
    "ratio_cpu",
)


class ByHand:
    """The loop that one would write."""

    def __init__(self, model: Any, x: np.ndarray, y: np.ndarray, precision: str, batch: int):
        self.net, self.head, self.precision = model.net.train(), nn.Linear(model.num_features, CLASSES), precision
        self.channels_last = model.channels_last
        self.mean, self.std = (torch.tensor(v)[:, None, None] for v in (model.profile.mean, model.profile.std))
        self.x, self.y, self.at = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.from_numpy(y.copy()), 0
        self.batch = batch
        params = [*self.net.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.SGD(params, lr=RATE, momentum=0.9, weight_decay=DECAY)

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            rows = slice(self.at, self.at + self.batch)
            x, y = (self.x[rows].float() / 255 - self.mean) / self.std, self.y[rows]
            if self.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
                features = self.net(x)
            loss = F.cross_entropy(self.head(features.float()), y)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            loss.item()
            self.at += self.batch


class OfClbench:
    """`finetune` on the next experience of a stream whose samples come once."""

    def __init__(self, model: Any, x: np.ndarray, y: np.ndarray, precision: str, batch: int):
        self.model = set_precision(model, precision)
        self.runtime = Runtime(0, torch.device("cpu"), Budget(epochs=1, in_order=True), precision)
        self.pipeline = Pipeline(model.profile, "cpu", "none")
        self.source, self.y, self.at, self.index, self.batch = ArrayImages(x), y, 0, 0, batch
        self.learner = Finetune(self.model, self.runtime, batch_size=batch, lr=RATE, backbone_lr=RATE, weight_decay=DECAY)

    def __call__(self, steps: int) -> None:
        rows = np.arange(self.at, self.at + steps * self.batch)
        images = ImageData(self.source, rows, rows, self.y[rows], self.pipeline, None, f"part {self.index}")
        classes = tuple(range(CLASSES))
        new = () if self.index else classes
        budget, once = self.runtime.budget, cast(Any, StreamData(images))
        name = f"part {self.index}"
        experience = Experience(self.index, name, once, classes, new, classes, CLASSES, None, budget)
        self.runtime.begin(self.index, len(rows), budget)
        self.learner.learn(experience)
        images.close()
        self.at, self.index = self.at + len(rows), self.index + 1


LOOPS = {"by hand": ByHand, "clbench": OfClbench}


def measure(args: argparse.Namespace, kind: str = "online") -> dict[str, Any]:
    """All rows -> the content of the file. kind: "online" (training), or "adapting" (`adapting.py`)."""
    precisions = options.listed(args.precision, "--precision") if args.precision else ["fp32", "bf16"]
    if any(p not in ("fp32", "bf16") for p in precisions):
        raise UserError(f"--precision must be fp32, bf16 or fp32,bf16, got {args.precision!r}")
    if args.batch is not None and args.batch < 1:
        raise UserError(f"--batch must be at least 1, got {args.batch}")
    steps, rounds = (2, 2) if args.quick else (10, 7)
    batch = args.batch or 10
    name = args.model or "resnet18_slim"
    node = compose([f"model={name}"])[0]["model"]
    device, threads = torch.device("cpu"), arithmetic.choose_threads("auto")
    found: dict[str, Any] = {"bench": args.name or kind, "kind": kind, "quick": bool(args.quick), "batch": batch}
    found |= {"model": name, "steps": steps, "rounds": rounds, "machine": machine.describe(device, threads), "rows": []}
    for precision in precisions:
        for layout in ("", "+channels_last"):
            flags = arithmetic.apply(device, threads, 0, wanted=arithmetic.REFERENCE + layout, precision=precision)
            print(f"{precision}{layout}", file=sys.stderr, flush=True)
            found["rows"] += _rows(node, flags, precision, batch, (steps, rounds), loops_of(kind))
    return found


def loops_of(kind: str) -> Mapping[str, Any]:
    """The two loops of a measurement, by name."""
    if kind == "online":
        return LOOPS
    from clbench.bench import adapting

    return adapting.LOOPS


def _rows(
    node: dict[str, Any],
    flags: dict[str, Any],
    precision: str,
    batch: int,
    times: tuple[int, int],
    kinds: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Both loops under one arithmetic, in turns, `times` = (steps, rounds); the first round of each is not counted."""
    steps, rounds = times
    model = arithmetic.pin(build(node), flags)
    rng, number = np.random.default_rng(0), steps * batch * (rounds + 1)
    side = model.profile.size
    x, y = rng.integers(0, 256, (number, side, side, 3), np.uint8), rng.integers(0, CLASSES, number)
    loops = {name: kind(copy.deepcopy(model), x, y, precision, batch) for name, kind in kinds.items()}
    clocks: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
    for turn in range(rounds + 1):
        for name in list(loops)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter(), time.process_time()
            loops[name](steps)
            clocks[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    seconds = {name: pairs[1:] for name, pairs in clocks.items()}
    made = []
    for name, pairs in seconds.items():
        both = list(zip(pairs, seconds["by hand"], strict=True))
        made.append(
            {
                "precision": precision,
                "layout": "channels_last" if flags.get("channels_last") else "contiguous",
                "loop": name,
                "images_per_second": round(steps * batch / statistics.median(wall for wall, _ in pairs), 1),
                "ratio": round(statistics.median(mine[0] / other[0] for mine, other in both), 3),
                "ratio_cpu": round(statistics.median(mine[1] / other[1] for mine, other in both), 3),
            }
        )
    return made


def text(found: dict[str, Any]) -> str:
    """The table, and whether the target is met."""
    names = COLUMNS[5:]
    table = aligned([names, *([str(row[name]) for name in names] for row in found["rows"])])
    worst = max(row["ratio_cpu"] for row in found["rows"])
    head = f"{found['model']}, batches of {found['batch']}, {found['rounds']} rounds of {found['steps']} steps"
    judged = f"processor time, at most {MOST:.2f} of a loop by hand: {worst}, {'yes' if worst <= MOST else 'NO'}"
    return f"{machine_text(found)}\n\n{head}\n{table}\n\n{judged}"


def write_csv(found: dict[str, Any], path: pathlib.Path) -> None:
    """The rows with the machine named in each. `UserError` where it cannot be written."""
    m = found["machine"]
    shared = {"cpu": m["cpu"], "threads": m["threads"], "torch": m["versions"]["torch"]}
    shared |= {"model": found["model"], "batch": found["batch"]}
    rows: Sequence[dict[str, Any]] = [shared | row for row in found["rows"]]
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
