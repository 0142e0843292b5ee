"""A run between its experiences: learner, rows, log; what is saved so that a killed run goes on, and what the record gets."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from clbench.evaluation import metrics
from clbench.evaluation.accuracy import BINS, SetCounts, evaluate, together
from clbench.interfaces import Experience, UserError
from clbench.run import provenance
from clbench.streams.eval_sets import EvalSet, open_eval
from clbench.streams.images.data import open_experience
from clbench.training.runtime import Runtime
from clbench.training.state import fingerprint, num_bytes

if TYPE_CHECKING:
    from clbench.run.runner import Job
    from clbench.run.tracking import Tracker

log = logging.getLogger("clbench")
Row = list[SetCounts | None]
KEPT_FLAGS = ("matmul", "fused_attention", "class_token_tail", "arithmetic")  # what a resumed run does not choose anew


class Walk:
    """The state of a run between experiences: learner, rows, log."""

    def __init__(
        self,
        job: Job,
        runtime: Runtime,
        learner: Any,
        entry: dict[str, Any],
        saved: dict[str, Any] | None,
        tracker: Tracker,
    ):
        self.job, self.runtime, self.learner, self.entry, self.tracker = job, runtime, learner, entry, tracker
        manifest = job.scenario.manifest
        self.evals = [open_eval(job.scenario, j, job.pipeline) for j in range(len(manifest.evals))]
        seen = [manifest.num_seen(i) for i in range(len(manifest.experiences))]
        self.origin = [i for i, (a, b) in enumerate(zip([0, *seen], seen, strict=False)) for _ in range(b - a)]
        self.rows: list[Row] = []
        self._lines: list[str] = []
        self.logs: list[dict[str, float | None]] = []
        self.past: list[Any] = []
        self.first, self.before = 0, 0.0
        self.start = time.perf_counter()
        if saved is not None:
            learner.load_state_dict(saved["learner"])
            job.model.passes.update(saved["passes"])
            runtime.meter.load_state_dict(saved["meter"])
            self.rows = [[None if c is None else SetCounts(**c) for c in _read(row)] for row in saved["rows"]]
            self.logs, self.before = saved["logs"], saved["seconds"]
            self.first = saved["experience"] + 1
            entry["resumed"] = saved["resumed"] + 1
            if job.capabilities.stores_all_data:
                self.past = [self._open(i).train for i in range(self.first)]

    def begin(self) -> None:
        """Evaluate the experience that an earlier process learned, where it did not come to that."""
        if len(self.rows) < self.first:
            self.evaluate(self.first - 1)

    def _open(self, index: int) -> Experience:
        return open_experience(self.job.scenario, index, self.job.pipeline, self.job.capabilities.stores_all_data)

    def learn(self, index: int) -> None:
        """One experience, then the state on disk; the data is closed unless the learner declared that it keeps it."""
        experience = replace(self._open(index), past=tuple(self.past))
        self.runtime.begin(index, len(experience.train), experience.budget)
        self.job.model.train()
        start = time.perf_counter()
        result = self.learner.learn(experience)
        self.runtime.meter.add_seconds("learn", time.perf_counter() - start)
        numbers = {str(k): float(v) for k, v in (result or {}).items()}
        self.logs.append({k: v if math.isfinite(v) else None for k, v in numbers.items()})  # JSON knows no NaN
        if self.job.capabilities.stores_all_data:
            self.past.append(experience.train)
        else:
            experience.train.close()  # type: ignore[attr-defined]
        state = self.learner.state_dict()
        self._check_budget(index, state)
        self.runtime.journal.finish_experience(self._snapshot(index, state))

    def _snapshot(self, index: int, state: dict[str, Any]) -> dict[str, Any]:
        return {
            "experience": index,
            "learner": state,
            "passes": dict(self.job.model.passes),
            "meter": self.runtime.meter.state_dict(),
            "rows": _write(self.rows, self._lines),
            "logs": self.logs,
            "flags": {k: self.job.flags[k] for k in KEPT_FLAGS if k in self.job.flags},
            "seconds": self.before + time.perf_counter() - self.start,
            "resumed": self.entry["resumed"],
        }

    def _check_budget(self, index: int, state: dict[str, Any]) -> None:
        budget = self.job.scenario.budget_of(index)
        memory = getattr(self.learner, "memory", None) if self.job.capabilities.stores_exemplars else None
        count, size = (0, 0) if memory is None else (len(memory), memory.num_bytes())
        stored = num_bytes(state) - size
        self.entry |= {"exemplars": count, "exemplar_bytes": size, "stored_bytes": stored}
        used = {"exemplars": count, "exemplar_bytes": size, "stored_bytes": stored}
        for name, value in used.items():
            limit = getattr(budget, name)
            if limit is not None and value > limit:
                raise UserError(f"experience {index}: the learner holds {value} {name}, the scenario's budget allows {limit}")

    def evaluate(self, index: int) -> None:
        """Append the row of this experience and say how it went."""
        start = time.perf_counter()
        manifest = self.job.scenario.manifest
        row = evaluate(
            self.learner,
            self.evals,
            manifest.num_seen(index),
            int(self.job.config["eval_batch_size"]),
            self.runtime.check_stop,
            self.origin,
            joined=not (self.job.capabilities.transductive or self.job.capabilities.adapts_at_test),
        )
        self.runtime.meter.add_seconds("evaluate", time.perf_counter() - start)
        self.rows.append(row)
        seen = self._seen(index)
        macro = sum(c.correct / c.n for c in seen) / max(1, len(seen))
        seconds = self.before + time.perf_counter() - self.start
        log.info(
            "experience %d/%d  %s  accuracy %.4f (macro over %d)  %.1f s",
            index + 1,
            len(manifest.experiences),
            manifest.experiences[index].name,
            macro,
            len(seen),
            seconds,
        )
        self.tracker.log(index, tracked(self.evals, self.rows, self.logs[index]) | {"seconds": seconds})

    def _seen(self, index: int) -> list[SetCounts]:
        """Counts after an experience on the sets that belong to it or to the past."""
        row = zip(self.rows[index], self.evals, strict=True)
        return [c for c, s in row if c is not None and s.first_seen <= index]

    def finish(self) -> dict[str, Any]:
        """The record with counts, costs and the hash of the final state."""
        rows, meter = self.rows, self.runtime.meter

        def table(name: str) -> list[list[Any]]:
            return [[None if c is None else copy.copy(getattr(c, name)) for c in row] for row in rows]

        last = [c for c in rows[-1] if c is not None]
        names = last[0].heads if last else ()
        heads = {name: [[None if c is None else c.heads[name] for c in row] for row in rows] for name in names}
        job, model = self.job, self.job.model
        return self.entry | {
            "status": "ok",
            "correct": table("correct"),
            "correct_masked": table("masked"),
            "correct_top5": table("top5"),
            "class_correct": table("class_correct"),
            "heads": heads,
            "calibration": {
                "bins": BINS,
                "table": [together([c.calibration for c in self._seen(i)]) for i in range(len(rows))],
            },
            "task_confusion": [confusion(row, len(job.scenario.manifest.experiences)) for row in rows],
            "experiences": self.logs,
            "seconds": {"total": self.before + time.perf_counter() - self.start, **meter.seconds},
            "peak_memory_bytes": provenance.peak_memory(job.device),
            "parameters": {"trained": meter.trained, "total": sum(p.numel() for p in model.parameters())},
            "passes": dict(model.passes),
            "visits": dict(meter.visits),
            "steps": meter.steps,
            "final_state_sha256": fingerprint(self.learner.state_dict()),
            "finished": provenance.now(),
        }


def _write(rows: Sequence[Row], lines: list[str]) -> list[str]:
    """Append the rows that `lines` lacks as JSON: each is written once, for after T experiences they hold T^2 / 2 counts."""
    for row in rows[len(lines) :]:
        lines.append(json.dumps([None if c is None else vars(c) for c in row]))
    return lines


def _read(row: str | list[dict[str, Any] | None]) -> list[dict[str, Any] | None]:
    """A row of a snapshot; older versions wrote lists."""
    return json.loads(row) if isinstance(row, str) else row


def tracked(evals: Sequence[EvalSet], rows: Sequence[Row], numbers: Mapping[str, float | None]) -> dict[str, float]:
    """What a tracker is shown after an experience: accuracies, macro, micro, forgetting, and what `learn` returned."""
    first, n = [s.first_seen for s in evals], [len(s.data) for s in evals]
    a = metrics.accuracy([[None if c is None else c.correct for c in row] for row in rows], n)
    shown = {"macro": metrics.macro(a, first)[-1], "micro": metrics.micro(a, n, first)[-1]}
    shown |= {"forgetting": metrics.forgetting(a, first)}
    shown |= {f"accuracy/{s.name}": value for s, value in zip(evals, a[-1], strict=True)}
    shown |= {f"learn/{name}": value for name, value in numbers.items() if value is not None}
    return {name: float(value) for name, value in shown.items()}


def confusion(row: Row, width: int) -> list[list[int] | None] | None:
    """Predictions by set and by the experience (of `width`) that brought the predicted class; None where not counted."""
    if any(c is not None and c.into is None for c in row):
        return None
    return [None if c is None or c.into is None else c.into + [0] * (width - len(c.into)) for c in row]
