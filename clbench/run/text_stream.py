"""A stream of text tasks in a run: lines with answers, old text. See `loop.Stream`, `loop.StreamKind`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from clbench.config.run_options import RunOptions
from clbench.evaluation import metrics
from clbench.evaluation.answers import Answers, AskedLines, old_text_sums
from clbench.evaluation.evaluators import row_of
from clbench.evaluation.generated import Generated
from clbench.interfaces import Capabilities, Experience, UserError
from clbench.models.pet_decoder import require_room
from clbench.run.build_model import build_decoder
from clbench.run.held import held
from clbench.run.image_stream import check_learner as check_memory
from clbench.run.loop import Row
from clbench.streams.tokens.text_data import open_experience
from clbench.streams.tokens.text_lines import TextScenario
from clbench.training import looks
from clbench.training.runtime import Runtime

if TYPE_CHECKING:
    from clbench.run.runner import Job

SPACED = 16  # lines of the batch whose pace is measured


def check(scenario: TextScenario, options: RunOptions, parallel: str, learner: str, can: Capabilities) -> None:
    """One process, no options without effect."""
    if parallel != "none":
        raise UserError(f"scenario {scenario.name} is made of text tasks: such a run is for one process, without torchrun")
    if options.optimizer_state == "keep" and not can.trains:
        raise UserError(f"optimizer_state=keep has no effect: {learner} does not train through fit")
    if option := next((name for name in ("save_predictions", "micro_batch", "compile") if getattr(options, name)), None):
        raise UserError(f"{option} has no effect in scenario {scenario.name}, which is made of text tasks")
    if options.gradient_norms != "none":
        raise UserError(f"gradient_norms has no effect in scenario {scenario.name}: it is for pre-training")


def build_model(build: Any, node: dict[str, Any], scenario: TextScenario) -> Any:
    """A decoder that knows the old text; `UserError` for one that does not."""
    model = build_decoder(build, node, scenario)
    if scenario.gap is not None and scenario.floor is not None:
        tokens = torch.from_numpy(scenario.old)
        with torch.no_grad():
            gap = float(model.eval().loss(tokens).double().mean()) - scenario.floor
        if not gap <= scenario.gap:
            said = f"model {node.get('name')} is {gap:.2f} nats a byte worse than the source of the old text"
            hint = "model=decoder_base is not, scenario.gap=null lets any decoder run"
            raise UserError(f"{said}, scenario.gap={scenario.gap} is allowed: {hint}")
    return model


def make_pipeline(scenario: TextScenario, model: Any, device: Any) -> None:
    """Tokens are the model's input."""


def make_runtime(job: Job) -> Runtime:
    """The runtime of a learner of text tasks."""
    return Runtime(
        seed=job.options.seed,
        device=job.device,
        budget=job.scenario.budget,
        precision=job.options.precision,
        exempt=job.capabilities.stores_all_data,
        optimizer_state=job.options.optimizer_state,
    )


def check_learner(job: Job) -> None:
    """A memory says how many bytes it holds; behind a prompt there is room for the longest text."""
    check_memory(job)
    for pet in getattr(job.model, "pets", ()):
        require_room(job.model, pet, job.scenario.manifest.context)


def attach(job: Job) -> None:
    """Nothing depends on the arithmetic."""


def open_stream(job: Job, runtime: Runtime, learner: Any) -> TextStream:
    """The stream of a job."""
    return TextStream(job, runtime, learner)


def seconds_of(job: Job) -> float:
    """Seconds of all passes: one step is measured, a line that is asked costs a third of one that is trained on."""
    m, lines = job.scenario.manifest, job.scenario.lines
    length = int(lines.lengths.mean())
    tokens = torch.ones(SPACED, length, dtype=torch.int64, device=job.device)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        job.model(tokens).sum().backward()
        times.append((time.perf_counter() - start) / SPACED)
    job.model.zero_grad(set_to_none=True)
    sizes = [len(e.train) for e in m.experiences]
    keeps = job.capabilities.stores_all_data
    visits = sum(sum(sizes[: i + 1]) for i in range(len(sizes))) if keeps else sum(sizes)
    epochs = job.config["learner"].get("epochs") or job.scenario.budget.epochs
    asked = (len(sizes) + 1) * sum(len(e.ids) for e in m.evals)
    return min(times) * (visits * epochs * (2 if job.capabilities.stores_exemplars else 1) + asked / 3)


def disk_of(job: Job) -> float:
    """Bytes of the snapshots while it runs: weights and two moments, old and new file."""
    return 2 * 3 * 4.0 * sum(p.numel() for p in job.model.parameters())


class TextStream:
    """Evaluation sets, data of earlier tasks for learners that keep all of it."""

    def __init__(self, job: Job, runtime: Runtime, learner: Any):
        self.job, self.runtime, self.learner = job, runtime, learner
        scenario: TextScenario = job.scenario
        m, size = scenario.manifest, job.options.eval_batch_size
        self.sets = [
            AskedLines(e.name, scenario.lines, e.ids, job.device, m.vocab, size, e.task if m.discloses_task else None, scores)
            for e, scores in zip(m.evals, scenario.scores, strict=True)
        ]
        self.past: list[Any] = []
        self.observer = NoLooks()

    def before(self) -> list[Row]:
        """The model before the first task."""
        return self._rows(-1)

    def open(self, index: int) -> Experience:
        """The lines of a task, with those of earlier ones for learners that keep all of it."""
        return replace(open_experience(self.job.scenario, index, self.job.device), past=tuple(self.past))

    def close(self, experience: Experience) -> None:
        """End its handle unless the learner keeps all data."""
        if experience.target is not None:
            experience.target.close()  # type: ignore[attr-defined]
        if self.job.capabilities.stores_all_data:
            self.past.append(experience.train)
        else:
            experience.train.close()  # type: ignore[attr-defined]

    def held(self, index: int, state: Mapping[str, Any]) -> dict[str, Any]:
        """Exemplars and bytes; `UserError` where the budget allows less."""
        return held(self.job, self.learner, index, state)

    def evaluate(self, index: int) -> list[Row]:
        """Every task, also those to come, and old text."""
        return self._rows(index)

    @torch.no_grad()
    def _rows(self, index: int) -> list[Row]:
        start = time.perf_counter()
        place: Row = {"experience": index, "step": None}
        rows, job = [], self.job
        with looks.modes_kept(job.model, self.learner):
            answers = row_of(Answers(), self.learner, self.sets)  # type: ignore[arg-type]
            self.runtime.check_stop()
            if index >= 0:
                rows.append(place | {"evaluator": "accuracy", "sums": {"correct": answers["sums"]["correct"]}})
            rows += [place | answers, *self._generated(place)]
            if len(job.scenario.old):
                m, size = job.scenario.manifest, job.options.eval_batch_size
                total = old_text_sums(self.learner, job.scenario.old, job.device, m.vocab, size)
                rows.append(place | {"evaluator": "old_text", "sums": {}, "total": total})
        self.runtime.meter.add_seconds("evaluate", time.perf_counter() - start)
        return rows

    def _generated(self, place: Row) -> list[Row]:
        """Scores of generated answers, of the tasks so far that have some."""
        scenario: TextScenario = self.job.scenario
        first = [e.first_seen for e in scenario.manifest.evals]
        asked = [one if one.scores and i <= place["experience"] else None for one, i in zip(self.sets, first, strict=True)]
        if scenario.decode is None or not any(asked):
            return []
        return [place | row_of(Generated(scenario.decode), self.learner, asked)]  # type: ignore[arg-type]

    def described(self, rows: list[Row], index: int) -> tuple[str, dict[str, float]]:
        """Exact matches over the tasks seen; all of them, and the loss on old text, for a tracker."""
        ends = [row["sums"]["correct"] for row in rows if row["evaluator"] == "accuracy"]
        a, first = (
            metrics.accuracy(ends, [len(one) for one in self.sets]),
            [e.first_seen for e in self.job.scenario.manifest.evals],
        )
        shown = {"macro": float(metrics.macro(a, first)[-1]), "forgetting": metrics.forgetting(a, first)}
        shown |= {f"accuracy/{one.name}": float(value) for one, value in zip(self.sets, a[-1], strict=True)}
        words = f"exact match {shown['macro']:.4f} (macro over {sum(i <= index for i in first)})"
        if rows[-1]["evaluator"] == "old_text":
            shown["old_loss"] = rows[-1]["total"]["nats"] / rows[-1]["total"]["tokens"]
            words += f"  old text {shown['old_loss']:.4f} nats a token"
        return words, shown

    def costs(self) -> dict[str, Any]:
        """Parameters, lines trained on."""
        total = sum(p.numel() for p in self.job.model.parameters())
        meter = self.runtime.meter
        return {"parameters": {"trained": meter.trained, "total": total}, "visits": dict(meter.visits)}

    def state_dict(self) -> dict[str, Any]:
        """Nothing is counted."""
        return {}

    def load_state_dict(self, state: dict[str, Any], experiences: int) -> None:
        """Go on after the first `experiences` experiences."""
        if self.job.capabilities.stores_all_data:
            self.past = [open_experience(self.job.scenario, i, self.job.device).train for i in range(experiences)]

    def close_stream(self) -> None:
        """Nothing is left open."""


class NoLooks(looks.Observer):
    """Nobody looks inside a task."""

    def taken(self) -> tuple[list[Row], float]:
        """No rows, no seconds."""
        return [], 0.0
