"""A stream of labelled images in a run: what is opened, evaluated and counted. See `loop.Stream` and `loop.StreamKind`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from clbench.config.run_options import RunOptions
from clbench.evaluation import metrics
from clbench.evaluation.accuracy import evaluate, spent_of, sums_of
from clbench.evaluation.evaluators import Answered, row_of
from clbench.interfaces import Capabilities, Experience, Place, UserError
from clbench.models import feature_store
from clbench.run import saved_predictions
from clbench.run.build_model import build_classifier
from clbench.run.held import held
from clbench.run.loop import Row
from clbench.streams.eval_sets import open_eval
from clbench.streams.images import damage
from clbench.streams.images.data import open_experience
from clbench.streams.images.pixels import Pipeline
from clbench.streams.scenario import Scenario
from clbench.training import looks
from clbench.training.runtime import Runtime

if TYPE_CHECKING:
    from clbench.run.runner import Job


build_model = build_classifier
MOST_CONFUSED = 256  # rows of a record up to which each holds predictions by experience: more would grow with their square
BESIDES = 0.012  # seconds of an experience besides its passes, as 1,000 small ones were timed
_PACES: dict[str, tuple[float, float]] = {}  # by model: seconds of an image forward, and forward and backward


def check(scenario: Scenario, options: RunOptions, parallel: str, learner: str, can: Capabilities) -> None:
    """One process, no options without effect, no image that is seen at once to be damaged."""
    if parallel != "none":
        raise UserError(f"scenario {scenario.name} is made of images: such a run is for one process, without torchrun")
    if options.optimizer_state == "keep" and not can.trains:
        raise UserError(f"optimizer_state=keep has no effect: {learner} does not train through fit")
    if option := next((name for name in ("micro_batch", "compile") if getattr(options, name)), None):
        raise UserError(f"{option} has no effect in scenario {scenario.name}, which is made of images")
    if options.gradient_norms != "none":
        raise UserError(f"gradient_norms has no effect in scenario {scenario.name}: it is for pre-training")
    damage.look(scenario)


def make_pipeline(scenario: Scenario, model: Any, device: Any) -> Pipeline:
    """Pixels as the model's weights want them."""
    return Pipeline(model.profile, device, scenario.augment)


def make_runtime(job: Job) -> Runtime:
    """The runtime of a learner of images."""
    return Runtime(
        seed=job.options.seed,
        device=job.device,
        budget=job.scenario.facts().budget,
        precision=job.options.precision,
        exempt=job.capabilities.stores_all_data,
        optimizer_state=job.options.optimizer_state,
    )


def check_learner(job: Job) -> None:
    """A learner that stores exemplars says how many bytes they are."""
    if job.capabilities.stores_exemplars and not hasattr(getattr(job.learner, "memory", None), "num_bytes"):
        name = type(job.learner).__name__
        raise UserError(f"{name} declares stores_exemplars: its memory must be `self.memory` with num_bytes()")


def attach(job: Job) -> None:
    """The feature store: what it holds depends on the arithmetic."""
    mode, gigabytes = job.options.feature_store, job.options.feature_store_gb
    feature_store.attach(job.model, job.scenario, job.device, job.flags, job.config["learner"], mode, gigabytes)


def open_stream(job: Job, runtime: Runtime, learner: Any) -> ImageStream:
    """The stream of a job."""
    return ImageStream(job, runtime, learner)


def seconds_of(job: Job) -> float:
    """Seconds from the passes that the stream asks for and this machine's measured pace (one small batch each way)."""
    sizes = [len(e.train) for e in job.scenario.manifest.experiences]
    trains = "epochs" in job.config["learner"] or "lr" in job.config["learner"]
    if job.capabilities.stores_all_data:
        visits = sum(sum(sizes[: i + 1]) for i in range(len(sizes)))
    else:
        visits = sum(sizes) * (2 if job.capabilities.stores_exemplars else 1)
    wanted = job.config["learner"].get("epochs") or job.scenario.budget.epochs
    manifest = job.scenario.manifest
    rows = [i for i in range(len(sizes)) if manifest.is_evaluated(i)]
    seen = sum(len(e.ids) for i in rows for j, e in enumerate(manifest.evals) if manifest.evaluable(j, i))
    if not trains:
        seen = sum(len(e.ids) for e in manifest.evals)
    forward, training = _pace(job)
    answer = forward
    if job.capabilities.adapts_at_test:  # a step or more on every test batch, some on many views of it
        options = job.config["learner"]
        answer += options.get("steps", 0) * (training + options.get("augmentations", 0) * forward)
    learned = visits * wanted * training if trains else 0.0
    return learned + sum(sizes) * forward + seen * answer + len(sizes) * BESIDES


def _pace(job: Job) -> tuple[float, float]:
    """Seconds for one image forward, and for one image forward and backward; measured once per model."""
    name = str(job.model.identity)
    if name not in _PACES:
        size = job.model.profile.size
        x = torch.zeros(32 if size <= 64 else 8, 3, size, size, device=job.device)
        times: dict[bool, list[float]] = {False: [], True: []}
        for train in (False, False, False, True, True, True):
            start = time.perf_counter()
            with torch.set_grad_enabled(train):
                z = job.model.net(x)
            if train:
                z.sum().backward()
            times[train].append((time.perf_counter() - start) / len(x))
        job.model.zero_grad(set_to_none=True)
        _PACES[name] = (min(times[False]), min(times[True]))
    return _PACES[name]


def disk_of(job: Job) -> float:
    """Bytes of the snapshots while it runs: weights and momentum, the exemplars allowed, class statistics at their largest."""
    weights = sum(p.numel() for p in job.model.parameters()) * 4
    classes = len(job.scenario.manifest.class_order)
    statistics = classes * job.model.num_features**2 * 4 if "align_epochs" in job.config["learner"] else 0
    shape = job.scenario.dataset.images.shape or (224, 224)
    exemplars = (job.scenario.budget.exemplars or 0) * math.prod(shape) * 3 if job.capabilities.stores_exemplars else 0
    return 3.0 * weights + 2 * statistics + exemplars


class ImageStream:
    """Evaluation sets, data of earlier experiences for learners that keep all of it, counts of passes."""

    def __init__(self, job: Job, runtime: Runtime, learner: Any):
        self.job, self.runtime, self.learner = job, runtime, learner
        manifest = job.scenario.manifest
        self.sets = [open_eval(job.scenario, j, job.pipeline) for j in range(len(manifest.evals))]
        seen = [manifest.num_seen(i) for i in range(len(manifest.experiences))]
        self.origin = [i for i, (a, b) in enumerate(zip([0, *seen], seen, strict=False)) for _ in range(b - a)]
        if manifest.evaluate_every > 1 or manifest.rows > MOST_CONFUSED:
            self.origin = []
        self.evaluators = job.evaluators
        self.past: list[Any] = []
        self.observer = ImageLooks(self)

    def before(self) -> list[Row]:
        """Nothing: no class has been seen."""
        return []

    def _open(self, index: int) -> Experience:
        return open_experience(self.job.scenario, index, self.job.pipeline, self.job.capabilities.stores_all_data)

    def open(self, index: int) -> Experience:
        """An experience, with the data of earlier ones for learners that keep all of it."""
        self.observer.begin(index)
        return replace(self._open(index), past=tuple(self.past))

    def close(self, experience: Experience) -> None:
        """End its handles unless the learner keeps all data."""
        if self.job.capabilities.stores_all_data:
            self.past.append(experience.train)
        else:
            experience.train.close()  # type: ignore[attr-defined]

    def held(self, index: int, state: Mapping[str, Any]) -> dict[str, Any]:
        """Exemplars and bytes; `UserError` where the budget allows less."""
        return held(self.job, self.learner, index, state)

    def evaluate(self, index: int) -> list[Row]:
        """Rows of accuracy and of the scenario's other evaluators, from one pass over every set."""
        start = time.perf_counter()
        rows = self._rows(index, None)
        self.runtime.meter.add_seconds("evaluate", time.perf_counter() - start)
        return rows

    def _rows(self, index: int, step: int | None) -> list[Row]:
        can, num_seen = self.job.capabilities, self.job.scenario.manifest.num_seen(index)
        saves = self.job.options.save_predictions and step is None
        kept: dict[int, list[Any]] | None = {} if self.evaluators or saves else None
        counts = evaluate(
            self.learner,
            self.sets,
            num_seen,
            self.job.options.eval_batch_size,
            self.runtime.check_stop if step is None else _go_on,
            self.origin,
            joined=not (can.transductive or can.adapts_at_test),
            kept=kept,
        )
        place: Row = {"experience": index // self.job.scenario.manifest.evaluate_every, "step": step}
        if step is not None:
            sums = {"correct": [None if c is None else c.correct for c in counts]}
            made = [place | {"evaluator": "accuracy", "sums": sums | {"n": [None if c is None else c.n for c in counts]}}]
        else:
            seen = [one.first_seen <= index for one in self.sets]
            made = [place | {"evaluator": "accuracy"} | sums_of(counts, seen, self.job.scenario.manifest.rows)]
            if costs := spent_of(counts):
                made.append(place | {"evaluator": "spent", "sums": costs})
        if saves:
            saved_predictions.keep(self.job, int(place["experience"]), kept or {}, self.sets)
        asked = [
            Answered(one.name, one.classes, num_seen, one.task, (kept or {})[j], one.batches) if j in (kept or {}) else None
            for j, one in enumerate(self.sets)
        ]
        return made + [place | row_of(evaluator, self.learner, asked) for evaluator in self.evaluators]

    def described(self, rows: list[Row], index: int) -> tuple[str, dict[str, float]]:
        """Accuracy over the sets seen; accuracies, macro, micro and forgetting for a tracker."""
        ends = [row["sums"]["correct"] for row in rows if row["evaluator"] == "accuracy" and row["step"] is None]
        every = self.job.scenario.manifest.evaluate_every
        first, n = [one.first_seen // every for one in self.sets], [len(one.data) for one in self.sets]
        a = metrics.accuracy(ends, n)
        count = sum(c is not None and i <= index // every for c, i in zip(ends[-1], first, strict=True))
        macro = float(metrics.macro(a, first)[-1])
        shown = {"macro": macro, "micro": metrics.micro(a, n, first)[-1], "forgetting": metrics.forgetting(a, first)}
        shown |= {f"accuracy/{one.name}": value for one, value in zip(self.sets, a[-1], strict=True)}
        words = f"accuracy {macro if count else 0.0:.4f} (macro over {count})"
        return words, {name: float(value) for name, value in shown.items()}

    def costs(self) -> dict[str, Any]:
        """Passes through the network, images trained on, parameters."""
        model, meter = self.job.model, self.runtime.meter
        return {
            "parameters": {"trained": meter.trained, "total": sum(p.numel() for p in model.parameters())},
            "passes": dict(model.passes),
            "visits": dict(meter.visits),
            **self._saved(),
        }

    def _saved(self) -> dict[str, str]:
        """The hash of the file of answers, where one is wanted."""
        if not self.job.options.save_predictions:
            return {}
        return {"predictions_sha256": saved_predictions.join(self.job, self.job.scenario.manifest.rows, self.sets)}

    def state_dict(self) -> dict[str, Any]:
        """Passes through the network."""
        return {"passes": dict(self.job.model.passes)}

    def load_state_dict(self, state: dict[str, Any], experiences: int) -> None:
        """Go on after the first `experiences` experiences."""
        self.job.model.passes.update(state["passes"])
        if self.job.options.save_predictions:
            saved_predictions.check(self.job, (experiences - 1) // self.job.scenario.manifest.evaluate_every)
        if self.job.capabilities.stores_all_data:
            self.past = [self._open(i).train for i in range(experiences)]

    def close_stream(self) -> None:
        """Features that are not on disk yet are written."""
        self.job.model.memory.flush()


class ImageLooks(looks.Observer):
    """Evaluates a learner inside an experience, after the numbers of its samples that the manifest names.

    A look changes nothing of the training: modules get their modes back, passes and seconds are not counted as training. It is
    finished when the user asks to stop: the snapshot that `fit` writes then knows of it.
    """

    def __init__(self, stream: ImageStream):
        self.stream = stream
        self.rows: list[Row] = []
        self.spent = 0.0
        self.due_at: list[int] = []

    def begin(self, index: int) -> None:
        """A new experience."""
        every = self.stream.job.scenario.manifest.looks
        self.rows, self.spent, self.due_at = [], 0.0, list(every[index]) if every else []

    def at_step(self, name: str, place: Place, lr: float, visits: int) -> float:
        """Look where the next number of samples was reached -> seconds that it took."""
        if not self.due_at or visits < self.due_at[0]:
            return 0.0
        self.due_at = [number for number in self.due_at if number > visits]
        start = time.perf_counter()
        stream, model = self.stream, self.stream.job.model
        passes, remembered = dict(model.passes), len(model.memory)
        with looks.modes_kept(model, stream.learner):
            self.rows += [row | {"trained": visits} for row in stream._rows(place.experience, place.step)]
        stored, fresh = model.passes["stored"], len(model.memory) - remembered  # what the end of the experience is spared
        model.passes.update(passes | {"eval": passes["eval"] + max(0, fresh - (stored - passes["stored"])), "stored": stored})
        took = time.perf_counter() - start
        self.spent += took
        stream.runtime.meter.add_seconds("looks", took)
        return took

    def taken(self) -> tuple[list[Row], float]:
        """Rows of this experience, and the seconds they took; `UserError` where there should be some and are none."""
        if self.due_at and not self.rows:
            runtime, kind = self.stream.runtime, type(self.stream.learner).__name__
            raise UserError(
                f"experience {runtime.experience}: no look took place: {kind} trains on {runtime.used_new} "
                f"samples through fit, the first look is after {self.due_at[0]}"
            )
        return self.rows, self.spent

    def state_dict(self) -> dict[str, Any]:
        """Rows made inside this experience, what is still to come, passes so far."""
        return {"rows": list(self.rows), "due_at": list(self.due_at), "passes": dict(self.stream.job.model.passes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; `spent` stays that of this process, whose `learn` it is taken from."""
        self.rows, self.due_at = list(state["rows"]), list(state["due_at"])
        self.stream.job.model.passes.update(state.get("passes", {}))


def _go_on() -> None:
    """Of looks: whoever asks to stop is heard after the step."""
