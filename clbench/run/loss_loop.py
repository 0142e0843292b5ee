"""A pre-training run between experiences, and what looks at the model while it trains. Used by `runner`."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clbench.evaluation.linear_probe import linear_probe, look_at, probe_entry, probed
from clbench.interfaces import Experience, UserError
from clbench.run import provenance
from clbench.streams.tokens.scenario import TokenScenario
from clbench.training import looks
from clbench.training.checkpoint import Journal
from clbench.training.pretraining.ledger import flops_per_token
from clbench.training.pretraining.segments import PretrainRuntime, Segment, check_plan
from clbench.training.state import fingerprint, num_bytes

log = logging.getLogger("clbench")
Job = Any  # runner.Job, which stands above


def experience_of(scenario: TokenScenario, index: int, past: bool) -> Experience:
    """What a learner sees of experience `index`; `past`: earlier texts too."""
    data: Any = [scenario.data(i) for i in range(index + 1)]
    made = Experience(index, data[-1].name, data[-1], (), (), (), 0, None, scenario.facts().budget)
    return replace(made, past=tuple(data[:-1])) if past else made


def close(experience: Experience) -> None:
    """It is over: its text, and the earlier ones that came with it, cannot be read any more."""
    for data in (experience.train, *experience.past):
        data.close()  # type: ignore[attr-defined]


def make_runtime(job: Job, journal: Any) -> PretrainRuntime:
    """The runtime of a pre-training run."""
    return PretrainRuntime(
        seed=job.config["seed"],
        device=job.device,
        precision=job.config["precision"],
        exempt=job.capabilities.stores_all_data,
        journal=journal,
        flops_per_token=flops_per_token(job.model, job.scenario.manifest.context),
        micro_batch=job.config.get("micro_batch"),
        group=job.group,
        compiled=bool(job.config.get("compile")),
        processed_limit=None if job.capabilities.stores_all_data else job.scenario.budget.processed,
        stream_steps=tuple(entry["steps"] for entry in job.scenario.manifest.experiences),
    )


def rehearse(build: Any, job: Job) -> None:
    """Build the learner and ask for its plans, so that one that cannot be carried out is refused before anything is trained.

    The run trains this instance (`job.learner`, `job.runtime`): a constructor may change the model, once.
    """
    job.runtime = make_runtime(job, Journal())
    job.learner = learner = build(job.config["learner"], model=job.model, runtime=job.runtime)
    if not callable(getattr(learner, "plan", None)):
        return
    scenario: TokenScenario = job.scenario
    job.group.check_batch(scenario.manifest.batch, job.config.get("micro_batch"))
    size, limit = scenario.manifest.batch * scenario.manifest.context, job.runtime.processed_limit
    for index in range(len(scenario.manifest.experiences)):
        check_plan(learner.plan(experience_of(scenario, index, keeps_text(job))), limit, size)


def keeps_text(job: Job) -> bool:
    """Whether the learner is given the texts of earlier experiences."""
    return job.capabilities.stores_exemplars or job.capabilities.stores_all_data


@torch.no_grad()
def total_loss(loss: Any, windows: np.ndarray, runtime: PretrainRuntime, batch: int) -> float:
    """Sum of nats over sequences [N, L + 1] by a `loss(tokens [B, L + 1]) -> [B, L]`, in float64; of images uint8: L = 1.

    Processes share each batch; one that has none of a short batch reads a sequence that is not counted.
    """
    parts, length = [], 1 if windows.dtype == np.uint8 else windows.shape[1] - 1
    for start in range(0, len(windows), batch):
        wanted = windows[start : start + batch]
        own = wanted[runtime.group.rows(len(wanted))]
        tokens = torch.from_numpy(own if len(own) else wanted[:1]).to(runtime.device)
        found = loss(tokens)
        if not isinstance(found, Tensor) or found.shape != (len(tokens), length):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UserError(f"loss must return one number for each of {(len(tokens), length)} tokens, got {shape}")
        parts.append(found.double().sum() * bool(len(own)))
        runtime.check_stop()
    (value,) = runtime.group.total(float(torch.stack(parts).sum()))
    if not math.isfinite(value):
        raise UserError("the loss on an evaluation set is NaN or infinite")
    return value


class Observer:
    """Curves of the loss on a few sequences of every evaluation set, and the losses of trunks that are not evaluated."""

    def __init__(self, job: Job, runtime: PretrainRuntime, sets: list[np.ndarray]):
        scenario: TokenScenario = job.scenario
        self.job, self.runtime, self.sets = job, runtime, sets
        self.names = [entry["name"] for entry in scenario.manifest.evals]
        rows = [windows[: scenario.probing.sequences] for windows in sets]
        self.probe = torch.from_numpy(np.concatenate(rows)).to(job.device)
        self.sizes = [len(r) for r in rows]
        self.steps: dict[int, set[int]] = {}
        self.trunks: list[list[float] | None] = []
        self.linear = linear_probe(job, runtime)
        self.curves: dict[str, Any] = {"tokens": [], "lr": [], "experience": [], "step": [], "role": [], "boundaries": []}
        self.curves |= {"loss": {name: [] for name in self.names}, "accuracy": {name: [] for name in self.names}}

    def due(self, segment: Segment, step: int) -> bool:
        """At steps 0, 1, 2, 4, ... of an experience, and evenly."""
        if segment.steps not in self.steps:
            self.steps[segment.steps] = set(self.job.scenario.probing.steps(segment.steps))
        return step in self.steps[segment.steps]

    @torch.no_grad()
    def look(self, model: nn.Module, segment: Segment, step: int) -> None:
        """Note losses and the share of right guesses: one pass over the probe."""
        start = time.perf_counter()
        model.eval()
        losses, right = look_at(model, self.probe, self.sizes, self.linear)
        curves, ledger = self.curves, self.runtime.ledger
        if step == 0:
            curves["boundaries"].append(ledger.trained)
        curves["tokens"].append(ledger.trained)
        curves["lr"].append(float(f"{segment.rate(min(step, segment.last - 1)):.6g}"))
        curves["experience"].append(segment.experience)
        curves["step"].append(step)
        curves["role"].append(segment.role)
        for name, loss, share in zip(self.names, losses.split(self.sizes), right, strict=True):
            curves["loss"][name].append(round(float(loss.double().mean()), 5))
            curves["accuracy"][name].append(round(share, 5))
        ledger.look("probe", losses.numel(), self.runtime.flops_per_token)
        self.runtime.meter.add_seconds("probe", time.perf_counter() - start)

    def trunk_ended(self, model: nn.Module) -> None:
        """Evaluate the trunk, whose branch or average will be evaluated as the learner's answer."""
        model.eval()
        self.trunks += [None] * (self.runtime.experience - len(self.trunks))
        self.trunks.append(self.evaluate(model.loss))

    def evaluate(self, loss: Any) -> list[float]:
        """Summed nats on every evaluation set."""
        size, runtime = int(self.job.config["eval_batch_size"]), self.runtime
        start = time.perf_counter()
        row = [total_loss(loss, windows, runtime, size) for windows in self.sets]
        tokens = sum(len(w) for w in self.sets) * self.job.scenario.manifest.context
        runtime.ledger.look("evaluation", tokens, runtime.flops_per_token)
        runtime.meter.add_seconds("evaluate", time.perf_counter() - start)
        return row

    def state_dict(self) -> dict[str, Any]:
        """Curves and trunk losses, copied."""
        curves = {k: {n: list(v) for n, v in x.items()} if isinstance(x, dict) else list(x) for k, x in self.curves.items()}
        return {"curves": curves, "trunks": [None if row is None else list(row) for row in self.trunks]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a copy."""
        self.curves, self.trunks = state["curves"], state["trunks"]


class LossWalk:
    """The state of a pre-training run between experiences: learner, rows, log. The counterpart of `walk.Walk`."""

    def __init__(self, job: Job, runtime: Any, learner: Any, entry: dict[str, Any], saved: dict[str, Any] | None, tracker: Any):
        self.job, self.runtime, self.learner, self.entry, self.tracker = job, runtime, learner, entry, tracker
        scenario: TokenScenario = job.scenario
        sets = [scenario.evaluation(j) for j in range(len(scenario.manifest.evals))]
        self.observer = Observer(job, runtime, sets)
        self.rows: list[list[float]] = []
        self.probed: list[Any] = []  # what a linear probe got right: before, and after each experience
        self.logs: list[dict[str, float | None]] = []
        self.start_row: list[float] | None = None
        self.first, self.before = 0, 0.0
        self.start = time.perf_counter()
        if saved is not None:
            learner.load_state_dict(saved["learner"])
            runtime.meter.load_state_dict(saved["meter"])
            runtime.ledger.load_state_dict(saved["ledger"])
            self.observer.load_state_dict(saved["observer"])
            runtime.plan[:] = saved["plan"]
            self.rows, self.start_row, self.logs = saved["rows"], saved["start_row"], saved["logs"]
            self.probed = saved.get("probed", [])
            self.before, self.first = saved["seconds"], saved["experience"] + 1
            entry["resumed"] = saved["resumed"] + 1

    def begin(self) -> None:
        """Evaluate before the first experience, or the experience that an earlier process learned and did not evaluate."""
        if self.start_row is None:
            self.start_row = self.observer.evaluate(self.learner.loss)
            self.probed += probed(self.observer.linear, self.job.model, None)
        if len(self.rows) < self.first:
            self.evaluate(self.first - 1)

    def learn(self, index: int) -> None:
        """One experience, then the state on disk; its text is closed unless the learner declared that it keeps all data."""
        experience = experience_of(self.job.scenario, index, keeps_text(self.job))
        self.runtime.begin(index, len(experience.train))
        start = time.perf_counter()
        with looks.observed_by(self.observer):
            result = self.learner.learn(experience)
        self.runtime.meter.add_seconds("learn", time.perf_counter() - start)
        numbers = {str(k): float(v) for k, v in (result or {}).items()}
        self.logs.append({k: v if math.isfinite(v) else None for k, v in numbers.items()})
        if not self.job.capabilities.stores_all_data:
            close(experience)
        state = self.learner.state_dict()
        held = self.runtime.ledger.replay_bytes
        limit = self.job.scenario.budget.exemplar_bytes
        if limit is not None and held > limit:
            raise UserError(f"experience {index}: replay needs {held} bytes of old text, the budget allows {limit}")
        self.entry |= {"exemplar_bytes": held, "stored_bytes": num_bytes(state)}
        self.runtime.journal.finish_experience(self._snapshot(index, state))

    def _snapshot(self, index: int, state: dict[str, Any]) -> dict[str, Any]:
        return {
            "experience": index,
            "learner": state,
            "meter": self.runtime.meter.state_dict(),
            "ledger": self.runtime.ledger.state_dict(),
            "observer": self.observer.state_dict(),
            "plan": self.runtime.plan,
            "rows": self.rows,
            "probed": self.probed,
            "start_row": self.start_row,
            "logs": self.logs,
            "flags": {k: self.job.flags[k] for k in ("matmul", "fused_attention", "arithmetic") if k in self.job.flags},
            "seconds": self.before + time.perf_counter() - self.start,
            "resumed": self.entry["resumed"],
        }

    def evaluate(self, index: int) -> None:
        """Append the row of this experience and say how it went."""
        self.rows.append(self.observer.evaluate(self.learner.loss))
        self.probed += probed(self.observer.linear, self.job.model, index)
        entries = self.job.scenario.manifest.evals
        means = [total / e["tokens"] for total, e in zip(self.rows[-1], entries, strict=True)]
        shown = "  ".join(f"{e['name']} {mean:.4f}" for e, mean in zip(entries, means, strict=True))
        name = self.job.scenario.manifest.experiences[index]["name"]
        seconds = self.before + time.perf_counter() - self.start
        total = len(self.job.scenario.manifest.experiences)
        log.info("experience %d/%d  %s  loss %s  %.1f s", index + 1, total, name, shown, seconds)
        numbers = {f"loss/{e['name']}": mean for e, mean in zip(entries, means, strict=True)} | {"seconds": seconds}
        numbers |= {f"learn/{key}": value for key, value in self.logs[index].items() if value is not None}
        self.tracker.log(index, numbers | {"loss/mean": sum(means) / len(means)})

    def finish(self) -> dict[str, Any]:
        """The record with losses, curves, ledger, costs and the hash of the final state."""
        runtime, model = self.runtime, self.job.model
        trained = sum(p.numel() for p in model.parameters())
        trunks = [*self.observer.trunks, *[None] * (len(self.rows) - len(self.observer.trunks))]
        return self.entry | {
            "status": "ok",
            "sum_loss": self.rows,
            "sum_loss_start": self.start_row,
            "sum_loss_trunk": trunks if any(row is not None for row in trunks) else None,
            "curves": self.observer.curves,
            "ledger": runtime.ledger.state_dict(),
            "plan": runtime.plan,
            "experiences": self.logs,
            "seconds": {"total": self.before + time.perf_counter() - self.start, **runtime.meter.seconds},
            "peak_memory_bytes": provenance.peak_memory(self.job.device),
            "parameters": {"trained": trained, "total": trained},
            "steps": runtime.meter.steps,
            "exemplars": None,
            "final_state_sha256": fingerprint(self.learner.state_dict()),
            "finished": provenance.now(),
            **probe_entry(self.observer.linear, self.probed),
        }


def estimate(job: Job) -> float:
    """Seconds from the plan's tokens and this machine's pace: one batch, three times."""
    m = job.scenario.manifest
    tokens = torch.from_numpy(job.scenario.data(0).read(np.arange(m.batch))).to(job.device)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        job.model.loss(tokens).mean().backward()
        times.append(time.perf_counter() - start)
    job.model.zero_grad(set_to_none=True)
    steps = sum(e["steps"] for e in m.experiences)
    if job.config["learner"].get("data") == "union":
        steps = sum(e["steps"] * (i + 1) for i, e in enumerate(m.experiences))
    seen = (len(m.experiences) + 1) * sum(e["tokens"] for e in m.evals)
    return min(times) * (steps + seen / 3 / (m.batch * m.context))


def disk(job: Job) -> float:
    """Bytes of the snapshots while it runs: weights and both moments, twice where a trunk is kept aside, old and new file."""
    return 4.0 * 3 * 2 * 2 * sum(p.numel() for p in job.model.parameters())
