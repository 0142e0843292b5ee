"""A stream of edits in a run: requests to change facts, probes, weights. See `loop.Stream`, `loop.StreamKind`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clbench.config.run_options import RunOptions
from clbench.evaluation import edit_metrics
from clbench.evaluation.edits import Asked, EditSuccess, OldText, Windows, weight_sums
from clbench.evaluation.evaluators import row_of
from clbench.interfaces import Capabilities, Experience, Place, UserError
from clbench.run.build_model import build_decoder
from clbench.run.held import held
from clbench.run.loop import Row
from clbench.streams.tokens.edits import EditScenario
from clbench.training import looks
from clbench.training.runtime import Runtime
from clbench.training.state import detached

if TYPE_CHECKING:
    from clbench.run.runner import Job

SAMPLE = 128  # facts on which it is looked at whether a decoder knows the world
STEPS = 30  # of an edit, where nothing is known


def check(scenario: EditScenario, options: RunOptions, parallel: str, learner: str, can: Capabilities) -> None:
    """One process, no options without effect."""
    if parallel != "none":
        raise UserError(f"scenario {scenario.name} edits a model: such a run is for one process, without torchrun")
    if options.optimizer_state != "fresh":
        raise UserError(f"optimizer_state has no effect in scenario {scenario.name}: every edit has its own optimiser")
    if option := next((name for name in ("save_predictions", "micro_batch", "compile") if getattr(options, name)), None):
        raise UserError(f"{option} has no effect in scenario {scenario.name}, which edits a model")


def build_model(build: Any, node: dict[str, Any], scenario: EditScenario) -> Any:
    """A decoder that knows the facts that are to be changed; `UserError` for one that does not."""
    model = build_decoder(build, node, scenario)
    if not isinstance(getattr(model, "layers", None), torch.nn.ModuleList):
        raise UserError(f"model {node.get('name')} has no `layers`: scenario {scenario.name} edits the MLP of a block")
    if scenario.known:
        requests, before = scenario.questions.requests[:SAMPLE], scenario.questions.before
        tokens = torch.from_numpy(np.stack([np.concatenate([r.prompt, before[r.id]]) for r in requests]))
        length = len(before[0])
        with torch.no_grad():
            right = (model.eval()(tokens[:, :-1]).argmax(-1)[:, -length:] == tokens[:, -length:]).all(1)
        if (share := float(right.float().mean())) < scenario.known:
            hint = "model=decoder_facts does, python -m clbench.models.train_facts makes one for another world"
            said = f"model {node.get('name')} knows {share:.0%} of the facts that scenario {scenario.name} changes"
            raise UserError(f"{said}: {hint}")
    return model


def make_pipeline(scenario: EditScenario, model: Any, device: Any) -> None:
    """Tokens are the model's input."""


def make_runtime(job: Job) -> Runtime:
    """The runtime of an editor."""
    budget, exempt = job.scenario.budget, job.capabilities.stores_all_data
    return Runtime(job.options.seed, job.device, budget, precision=job.options.precision, exempt=exempt)


def check_learner(job: Job) -> None:
    """A learner that stores requests or old text says how many bytes they are."""
    if job.capabilities.stores_exemplars and not hasattr(getattr(job.learner, "memory", None), "num_bytes"):
        name = type(job.learner).__name__
        raise UserError(f"{name} declares stores_exemplars: its memory must be `self.memory` with num_bytes()")


def attach(job: Job) -> None:
    """Nothing depends on the arithmetic."""


def open_stream(job: Job, runtime: Runtime, learner: Any) -> EditStream:
    """The stream of a job."""
    return EditStream(job, runtime, learner)


def seconds_of(job: Job) -> float:
    """Seconds of so many steps an edit, and of three passes over every probe after each experience; one step is measured."""
    m, questions = job.scenario.manifest, job.scenario.questions
    tokens = torch.from_numpy(np.stack([questions.requests[0].prompt] * 8)).to(job.device)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        job.model(tokens).sum().backward()
        times.append(time.perf_counter() - start)
    job.model.zero_grad(set_to_none=True)
    probes = sum(len(e.ids) for e in m.evals)
    return min(times) * (STEPS * sum(len(e.train) for e in m.experiences) + len(m.experiences) * probes / 8)


def disk_of(job: Job) -> float:
    """Bytes of the snapshots while it runs: weights, statistics of one layer, old and new file."""
    return 2 * 4.0 * sum(p.numel() for p in job.model.parameters()) * 1.5


class EditStream:
    """Evaluation sets, what the unedited model answered, its weights."""

    def __init__(self, job: Job, runtime: Runtime, learner: Any):
        self.job, self.runtime, self.learner = job, runtime, learner
        scenario: EditScenario = job.scenario
        self.entries, vocab, size = scenario.manifest.evals, scenario.manifest.vocab, job.options.eval_batch_size
        self.sets: list[Any] = []
        for j, entry in enumerate(self.entries):
            if entry.probe == "old_text":
                self.sets.append(Windows(entry.name, scenario.questions.windows(entry.ids)))
            else:
                self.sets.append(Asked(entry.name, entry.probe, scenario.probes(j), job.device, vocab, size))
        self.evaluators = (EditSuccess(), OldText(job.device, vocab, size))
        self.weights = detached(job.model.state_dict())
        with torch.no_grad(), looks.modes_kept(job.model, learner):
            for one in self.sets:
                if isinstance(one, Asked):
                    one.unedited = one.generated(learner.logits)
        self.observer = EditLooks(self)

    def before(self) -> list[Row]:
        """The unedited model on every set."""
        return self.evaluate(-1)

    def open(self, index: int) -> Experience:
        """The requests of an experience."""
        self.observer.begin(index)
        return self.job.scenario.experience(index)

    def close(self, experience: Experience) -> None:
        """End its handle."""
        experience.train.close()  # type: ignore[attr-defined]

    def held(self, index: int, state: Mapping[str, Any]) -> dict[str, Any]:
        """Bytes of kept requests and of everything else; `UserError` where the budget allows less."""
        return held(self.job, self.learner, index, state)

    @torch.no_grad()
    def evaluate(self, index: int) -> list[Row]:
        """Probes of the edits so far (before the first: of all), old text, weights."""
        start = time.perf_counter()
        place: Row = {"experience": index, "step": None}
        asked = [one if index < 0 or e.first_seen <= index else None for one, e in zip(self.sets, self.entries, strict=True)]
        rows = []
        for evaluator, kind in zip(self.evaluators, (Asked, Windows), strict=True):
            of_kind = [one if isinstance(one, kind) else None for one in asked]
            if any(one is not None for one in of_kind):
                rows.append(place | row_of(evaluator, self.learner, of_kind))  # type: ignore[arg-type]
            self.runtime.check_stop()
        rows.append(place | {"evaluator": "weights", "sums": {}, "total": weight_sums(self.weights, self.job.model)})
        self.runtime.meter.add_seconds("evaluate", time.perf_counter() - start)
        return rows

    def described(self, rows: list[Row], index: int) -> tuple[str, dict[str, float]]:
        """Reliability, generalisation, locality and the loss on old text."""
        view = self.job.scenario.describe() | {"rows": rows}
        last = edit_metrics.course(view)[-1]
        shown = ("reliability", "generalisation", "locality", "old_loss_rise")
        return "  ".join(f"{name} {last[name]:.4f}" for name in shown if name in last), last

    def costs(self) -> dict[str, Any]:
        """Parameters."""
        size = sum(p.numel() for p in self.job.model.parameters())
        return {"parameters": {"trained": self.runtime.meter.trained, "total": size}}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: what the unedited model answered is asked anew."""
        return {}

    def load_state_dict(self, state: dict[str, Any], experiences: int) -> None:
        """Nothing."""

    def close_stream(self) -> None:
        """Nothing is left open."""


class EditLooks(looks.Observer):
    """Asks every edit right after it was made."""

    def __init__(self, stream: EditStream):
        self.stream = stream
        self.begin(0)

    def begin(self, index: int) -> None:
        """A new experience."""
        self.index, self.asked, self.correct, self.spent = index, 0, 0, 0.0
        entries = self.stream.entries
        self.place = next(j for j, e in enumerate(entries) if e.probe == "edits" and e.first_seen == index)

    @torch.no_grad()
    def at_step(self, name: str, place: Place, lr: float, visits: int) -> float:
        """After an edit, or a batch of them: `place.step` are made in this experience -> seconds that it took."""
        if name != "edit" or place.step <= self.asked:
            return 0.0
        start, stream = time.perf_counter(), self.stream
        whole: Asked = stream.sets[self.place]
        newest = Asked(whole.name, whole.kind, whole.probes[self.asked : place.step], whole.device, whole.vocab, whole.size)
        with looks.modes_kept(stream.job.model, stream.learner):
            exact, _, _ = newest.said(stream.learner.logits, [probe.answer for probe in newest.probes])
        self.asked, self.correct = place.step, self.correct + int(exact.sum())
        took = time.perf_counter() - start
        self.spent += took
        stream.runtime.meter.add_seconds("looks", took)
        return took

    def taken(self) -> tuple[list[Row], float]:
        """The row of this experience, and the seconds of the looks; no row where nothing was asked."""
        if not self.asked:
            return [], self.spent
        sums = {name: [None] * len(self.stream.sets) for name in ("n", "correct")}
        sums["n"][self.place], sums["correct"][self.place] = self.asked, self.correct  # type: ignore[call-overload]
        return [{"experience": self.index, "step": None, "evaluator": "newest_edit", "sums": sums}], self.spent

    def state_dict(self) -> dict[str, Any]:
        """What was asked in this experience."""
        return {"asked": self.asked, "correct": self.correct}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.asked, self.correct = state["asked"], state["correct"]
