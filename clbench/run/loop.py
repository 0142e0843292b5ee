"""One run over a stream: learn an experience, evaluate, save. What a killed run goes on from, and what the record gets.

    for experience in stream: learner.learn(experience); rows += evaluators(learner, sets); checkpoint

The loop is the same for images, tokens and autoencoders. What differs is a `Stream`: `image_stream`, `token_stream`, modules
that a `StreamKind` describes.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from clbench.config.run_options import RunOptions
from clbench.interfaces import Capabilities, Experience, UserError
from clbench.run import provenance
from clbench.training import looks
from clbench.training.runtime import Runtime
from clbench.training.state import fingerprint

if TYPE_CHECKING:
    from clbench.run.runner import Job
    from clbench.run.tracking import Tracker

log = logging.getLogger("clbench")
Row = dict[str, Any]  # as `records` describes it: experience, step, evaluator, sums
KEPT_FLAGS = (
    "matmul",
    "fused_attention",
    "class_token_tail",
    "channels_last",
    "arithmetic",
)  # what a resumed run does not choose anew


class Stream(Protocol):
    """What a kind of stream does its own way.

    observer  looks at the learner inside an experience; `taken()` gives the rows that it made and the seconds that it took
    """

    observer: Any

    def before(self) -> list[Row]:
        """Rows of an evaluation before the first experience; empty where there is none."""
        ...

    def open(self, index: int) -> Experience:
        """An experience as the learner sees it."""
        ...

    def close(self, experience: Experience) -> None:
        """It is over: its data cannot be read any more, unless the learner declared that it keeps all data."""
        ...

    def held(self, index: int, state: Mapping[str, Any]) -> dict[str, Any]:
        """What the learner holds after an experience, for the record; `UserError` where the budget allows less."""
        ...

    def evaluate(self, index: int) -> list[Row]:
        """Every evaluator on every evaluation set, after experience `index`."""
        ...

    def described(self, rows: list[Row], index: int) -> tuple[str, dict[str, float]]:
        """How it went after experience `index`: a few words for the log, numbers by name for a tracker."""
        ...

    def costs(self) -> dict[str, Any]:
        """Fields of the record that count what was used."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What it has counted, for a snapshot."""
        ...

    def load_state_dict(self, state: dict[str, Any], experiences: int) -> None:
        """Go on after the first `experiences` experiences."""
        ...

    def close_stream(self) -> None:
        """The run is over, however it ended."""
        ...


class StreamKind(Protocol):
    """A module with what one kind of stream does its own way before and around the loop."""

    def check(self, scenario: Any, options: RunOptions, parallel: str, learner: str, can: Capabilities) -> None:
        """`UserError` for options that have no effect, and for processes that cannot train such a run together."""
        ...

    def build_model(self, build: Any, node: dict[str, Any], scenario: Any) -> Any:
        """The model of a configuration's `model`; `UserError` where it cannot read the stream."""
        ...

    def make_pipeline(self, scenario: Any, model: Any, device: Any) -> Any:
        """What makes a model's input of stored samples; None where they are its input."""
        ...

    def make_runtime(self, job: Job) -> Any:
        """The runtime that the learner is built with."""
        ...

    def check_learner(self, job: Job) -> None:
        """`UserError` for a learner that was built and does not fit."""
        ...

    def attach(self, job: Job) -> None:
        """Whatever depends on the arithmetic in force, each time it is set."""
        ...

    def open_stream(self, job: Job, runtime: Any, learner: Any) -> Stream:
        """The stream that the loop asks."""
        ...

    def seconds_of(self, job: Job) -> float:
        """An estimate of the seconds that the run takes."""
        ...

    def disk_of(self, job: Job) -> float:
        """An estimate of the bytes of its snapshots."""
        ...


class Loop:
    """The state of a run between experiences: learner, rows, numbers that `learn` returned.

    first      the next experience to be learned, from 0
    evaluated  experiences whose rows are there
    """

    def __init__(
        self,
        job: Job,
        runtime: Runtime,
        learner: Any,
        stream: Stream,
        entry: dict[str, Any],
        saved: dict[str, Any] | None,
        tracker: Tracker,
    ):
        self.job, self.runtime, self.learner, self.stream = job, runtime, learner, stream
        self.entry, self.tracker = entry, tracker
        self.rows: list[Row] = []
        self._lines: list[str] = []
        self.logs: list[dict[str, float | None]] = []
        self.first, self.evaluated, self.before = 0, 0, 0.0
        self.start = time.perf_counter()
        if saved is not None:
            if "stream" not in saved:
                raise UserError("the saved run is from the first edition of clbench; force=true starts anew")
            learner.load_state_dict(saved["learner"])
            runtime.meter.load_state_dict(saved["meter"])
            runtime.optimizers = saved["optimizers"]
            self._lines, self.logs, self.before = list(saved["rows"]), saved["logs"], saved["seconds"]
            self.rows = [json.loads(line) for line in self._lines]
            self.first, self.evaluated = saved["experience"] + 1, saved["evaluated"]
            stream.load_state_dict(saved["stream"], self.first)
            entry["resumed"] = saved["resumed"] + 1

    def begin(self) -> None:
        """Evaluate before the first experience, or the experience that an earlier process learned and did not evaluate."""
        if self.first == 0:
            self.rows += self.stream.before()
        if self.first:
            self.entry |= self.stream.held(self.first - 1, self.learner.state_dict())
        if self.evaluated < self.first and self.job.scenario.manifest.is_evaluated(self.first - 1):
            self.evaluate(self.first - 1)

    def learn(self, index: int) -> None:
        """One experience, then the state on disk."""
        experience = self.stream.open(index)
        self.runtime.begin(index, len(experience.train), experience.budget)
        self.job.model.train()
        start = time.perf_counter()
        with looks.observed_by(self.stream.observer):
            result = self.learner.learn(experience)
        found, looked = self.stream.observer.taken()
        self.runtime.meter.add_seconds("learn", time.perf_counter() - start - looked)
        numbers = {str(k): float(v) for k, v in (result or {}).items()}
        self.logs.append({k: v if math.isfinite(v) else None for k, v in numbers.items()})  # JSON knows no NaN
        self.rows += found
        if self.runtime.optimizer_state == "keep" and not self.runtime.optimizers:
            raise UserError(f"optimizer_state=keep has no effect: {type(self.learner).__name__} does not train through fit")
        self.stream.close(experience)
        state = self.learner.state_dict()
        self.entry |= self.stream.held(index, state)
        self.runtime.journal.finish_experience(self._snapshot(index, state))

    def _snapshot(self, index: int, state: dict[str, Any]) -> dict[str, Any]:
        self._lines += [json.dumps(row) for row in self.rows[len(self._lines) :]]  # each row is written once
        return {
            "experience": index,
            "evaluated": self.evaluated,
            "learner": state,
            "stream": self.stream.state_dict(),
            "meter": self.runtime.meter.state_dict(),
            "optimizers": self.runtime.optimizers,
            "rows": self._lines,
            "logs": self.logs,
            "flags": {k: self.job.flags[k] for k in KEPT_FLAGS if k in self.job.flags},
            "seconds": self.before + time.perf_counter() - self.start,
            "resumed": self.entry["resumed"],
        }

    def evaluate(self, index: int) -> None:
        """Append the rows of this experience and say how it went."""
        self.rows += self.stream.evaluate(index)
        self.evaluated = index + 1
        seconds = self.before + time.perf_counter() - self.start
        words, numbers = self.stream.described(self.rows, index)
        experiences = self.job.scenario.manifest.experiences
        log.info("experience %d/%d  %s  %s  %.1f s", index + 1, len(experiences), experiences[index].name, words, seconds)
        numbers |= {f"learn/{key}": value for key, value in self.logs[index].items() if value is not None}
        self.tracker.log(index, numbers | {"seconds": seconds})

    def finish(self) -> dict[str, Any]:
        """The record with rows, costs and the hash of the final state."""
        meter = self.runtime.meter
        return self.entry | {
            "status": "ok",
            "rows": self.rows,
            "experiences": self.logs,
            "seconds": {"total": self.before + time.perf_counter() - self.start, **meter.seconds},
            "peak_memory_bytes": provenance.peak_memory(self.job.device),
            "steps": meter.steps,
            **self.stream.costs(),
            "final_state_sha256": fingerprint(self.learner.state_dict()),
            "finished": provenance.now(),
        }
