"""A stream that asks for losses (texts, languages, images for autoencoders) in a run. See `loop.Stream`, `loop.StreamKind`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from clbench.config.run_options import RunOptions
from clbench.evaluation.evaluators import row_of
from clbench.evaluation.linear_probe import linear_probe, look_at
from clbench.evaluation.zero_shot import Texts
from clbench.interfaces import Capabilities, Experience, Place, UserError
from clbench.run.build_model import build_reader
from clbench.run.loop import Row
from clbench.streams.images import damage
from clbench.streams.tokens.scenario import TokenScenario
from clbench.training import looks
from clbench.training.checkpoint import Journal
from clbench.training.gradient_norms import GradientNorms
from clbench.training.pretraining.ledger import flops_per_token
from clbench.training.pretraining.segments import PretrainRuntime, check_plan
from clbench.training.state import num_bytes

if TYPE_CHECKING:
    from clbench.run.runner import Job


def make_runtime(job: Job) -> PretrainRuntime:
    """The runtime of a pre-training run."""
    return PretrainRuntime(
        seed=job.options.seed,
        device=job.device,
        precision=job.options.precision,
        exempt=job.capabilities.stores_all_data,
        journal=Journal(),
        flops_per_token=flops_per_token(job.model, job.scenario.manifest.context),
        micro_batch=job.options.micro_batch,
        group=job.group,
        compiled=job.options.compile,
        processed_limit=None if job.capabilities.stores_all_data else job.scenario.budget.processed,
        stream_steps=tuple(entry.steps for entry in job.scenario.manifest.experiences),
        norms=None if (kind := job.options.gradient_norms) == "none" else GradientNorms(kind),
    )


build_model = build_reader


def check(scenario: TokenScenario, options: RunOptions, parallel: str, learner: str, can: Capabilities) -> None:
    """Moments at a boundary are the learner's own option; several processes need a learner that supports them."""
    if options.optimizer_state != "fresh":
        raise UserError(f"optimizer_state has no effect in scenario {scenario.name}: its learners have options of their own")
    if options.save_predictions:
        raise UserError(f"save_predictions has no effect in scenario {scenario.name}, which asks for losses")
    if options.gradient_norms != "none" and parallel == "fsdp":
        raise UserError("gradient_norms needs parallel=ddp or none: under fsdp no process holds a whole gradient")
    if parallel != "none" and not can.supports_parallel:
        raise UserError(f"learner {learner} does not declare supports_parallel: it trains in one process, without torchrun")
    damage.look(scenario)


def make_pipeline(scenario: TokenScenario, model: Any, device: Any) -> None:
    """Sequences are the model's input."""


def attach(job: Job) -> None:
    """Nothing depends on the arithmetic."""


def open_stream(job: Job, runtime: PretrainRuntime, learner: Any) -> TokenStream:
    """The stream of a job."""
    return TokenStream(job, runtime, learner)


def check_learner(job: Job) -> None:
    """Ask the learner for its plans, so that one that cannot be carried out is refused before anything is trained."""
    if not callable(getattr(job.learner, "plan", None)):
        return
    scenario: TokenScenario = job.scenario
    job.group.check_batch(scenario.manifest.batch, job.options.micro_batch)
    size, limit = scenario.manifest.batch * scenario.manifest.context, job.runtime.processed_limit
    for index in range(len(scenario.manifest.experiences)):
        check_plan(job.learner.plan(scenario.experience(index, keeps_text(job))), limit, size)


def keeps_text(job: Job) -> bool:
    """Whether the learner is given the texts of earlier experiences."""
    return job.capabilities.stores_exemplars or job.capabilities.stores_all_data


@torch.no_grad()
def own_losses(loss: Any, wanted: np.ndarray, runtime: PretrainRuntime) -> Tensor:
    """Nats of this process's rows of a batch [B, L + 1] -> [b, L] float64; of images uint8: L = 1.

    A process that has none of a short batch reads a sequence that is not counted: with fsdp all of them go along.
    """
    own, length = wanted[runtime.group.rows(len(wanted))], 1 if wanted.dtype == np.uint8 else wanted.shape[1] - 1
    tokens = torch.from_numpy(own if len(own) else wanted[:1]).to(runtime.device)
    found = loss(tokens)
    if not isinstance(found, Tensor) or found.shape != (len(tokens), length):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UserError(f"loss must return one number for each of {(len(tokens), length)} tokens, got {shape}")
    return found.double()[: len(own)]


@torch.no_grad()
def total_loss(loss: Any, windows: np.ndarray, runtime: PretrainRuntime, batch: int) -> float:
    """Sum of nats over sequences [N, L + 1] by a `loss(tokens [B, L + 1]) -> [B, L]`, in float64; of images uint8: L = 1.

    Processes share each batch.
    """
    parts = []
    for start in range(0, len(windows), batch):
        parts.append(own_losses(loss, windows[start : start + batch], runtime).sum())
        runtime.check_stop()
    (value,) = runtime.group.all_reduce_sum(float(torch.stack(parts).sum()))
    if not math.isfinite(value):
        raise UserError("the loss on an evaluation set is NaN or infinite")
    return value


def seconds_of(job: Job) -> float:
    """Seconds from the plan's tokens and this machine's pace: one batch, three times."""
    m = job.scenario.manifest
    tokens = torch.from_numpy(job.scenario.data(0).read(np.arange(m.batch))).to(job.device)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        job.model.loss(tokens).mean().backward()
        times.append(time.perf_counter() - start)
    job.model.zero_grad(set_to_none=True)
    steps = sum(e.steps for e in m.experiences)
    if job.config["learner"].get("data") == "union":
        steps = sum(e.steps * (i + 1) for i, e in enumerate(m.experiences))
    asked = 1 + 3 * len(job.evaluators)  # four options, of about three quarters of a window
    seen = asked * (len(m.experiences) + 1) * sum(e.tokens for e in m.evals)
    return min(times) * (steps + seen / 3 / (m.batch * m.context))


def disk_of(job: Job) -> float:
    """Bytes of the snapshots while it runs: weights and both moments, twice where a trunk is kept aside, old and new file."""
    return 4.0 * 3 * 2 * 2 * sum(p.numel() for p in job.model.parameters())


class TokenStream:
    """Evaluation sets and, for autoencoders, the linear probe."""

    def __init__(self, job: Job, runtime: PretrainRuntime, learner: Any):
        self.job, self.runtime, self.learner = job, runtime, learner
        scenario: TokenScenario = job.scenario
        self.entries = scenario.manifest.evals
        self.sets = [scenario.evaluation(j) for j in range(len(self.entries))]
        self.linear = linear_probe(scenario, job.model, job.device, job.options.eval_batch_size, runtime.ledger)
        self.evaluator = "token_loss" if self.linear is None else "reconstruction"
        size, of_bytes = job.options.eval_batch_size, scenario.of_bytes
        pairs = zip(self.entries, self.sets, strict=True) if job.evaluators else ()
        self.texts = [Texts(entry.name, windows, of_bytes, self._nats, size) for entry, windows in pairs]
        self.observer = TokenLooks(self)

    def before(self) -> list[Row]:
        """Losses of the network as it is given."""
        return self.evaluate(-1)

    def open(self, index: int) -> Experience:
        """An experience, with earlier texts for learners that replay or keep them."""
        self.observer.begin()
        return self.job.scenario.experience(index, keeps_text(self.job))

    def close(self, experience: Experience) -> None:
        """End its handles unless the learner keeps all data."""
        if not self.job.capabilities.stores_all_data:
            for data in (experience.train, *experience.past):
                data.close()  # type: ignore[attr-defined]

    def held(self, index: int, state: Mapping[str, Any]) -> dict[str, Any]:
        """Bytes of old text and of the state; `UserError` where the budget allows less."""
        held, limit = self.runtime.ledger.replay_bytes, self.job.scenario.budget.exemplar_bytes
        if limit is not None and held > limit:
            raise UserError(f"experience {index}: replay needs {held} bytes of old text, the budget allows {limit}")
        return {"exemplar_bytes": held, "stored_bytes": num_bytes(state)}

    def evaluate(self, index: int) -> list[Row]:
        """Summed losses on every set, and what a linear probe gets right."""
        place: Row = {"experience": index, "step": None}
        rows = [place | {"evaluator": self.evaluator, "sums": {"loss": self.losses(self.learner.loss)}}]
        if self.linear is not None:
            own, seen = self.linear.right(self.job.model, None if index < 0 else index)
            sums = {"n": self.linear.n, "own": own} | ({} if index < 0 else {"seen": seen})
            rows.append(place | {"evaluator": "linear_probe", "sums": sums})
        start = time.perf_counter()
        rows += [place | row_of(evaluator, self.learner, self.texts) for evaluator in self.job.evaluators]
        self.runtime.meter.add_seconds("evaluate", time.perf_counter() - start)
        return rows

    def _nats(self, learner: Any, tokens: np.ndarray) -> np.ndarray:
        """Nats of every token after the first: [B, L + 1] -> [B, L] float64, counted in the ledger as looked at."""
        runtime = self.runtime
        runtime.check_stop()
        found = runtime.group.all_gather_rows(own_losses(learner.loss, tokens, runtime), len(tokens)).cpu().numpy()
        if not np.isfinite(found).all():
            raise UserError("the loss on a question is NaN or infinite")
        runtime.ledger.look("probe", found.size, runtime.flops_per_token)
        return found

    def losses(self, loss: Any) -> list[float]:
        """Summed nats on every evaluation set."""
        size, runtime = self.job.options.eval_batch_size, self.runtime
        start = time.perf_counter()
        row = [total_loss(loss, windows, runtime, size) for windows in self.sets]
        tokens = sum(len(w) for w in self.sets) * self.job.scenario.manifest.context
        runtime.ledger.look("evaluation", tokens, runtime.flops_per_token)
        runtime.meter.add_seconds("evaluate", time.perf_counter() - start)
        return row

    def described(self, rows: list[Row], index: int) -> tuple[str, dict[str, float]]:
        """The mean loss on each set."""
        last = next(r for r in reversed(rows) if r["evaluator"] == self.evaluator and r["step"] is None and "role" not in r)
        means = [total / e.tokens for total, e in zip(last["sums"]["loss"], self.entries, strict=True)]
        shown = "  ".join(f"{e['name']} {mean:.4f}" for e, mean in zip(self.entries, means, strict=True))
        numbers = {f"loss/{e['name']}": mean for e, mean in zip(self.entries, means, strict=True)}
        return f"loss {shown}", numbers | {"loss/mean": sum(means) / len(means)}

    def costs(self) -> dict[str, Any]:
        """The ledger, the plan, parameters."""
        size = sum(p.numel() for p in self.job.model.parameters())
        pets = getattr(self.job.model, "pets", ())
        return {
            "ledger": self.runtime.ledger.state_dict(),
            "plan": self.runtime.plan,
            "parameters": {"trained": sum(pet.num_values() for pet in pets) if pets else size, "total": size},
            "exemplars": None,
            **({} if self.runtime.norms is None else {"gradient_norms": self.runtime.norms.described()}),
        }

    def state_dict(self) -> dict[str, Any]:
        """Ledger and plan, and gradient norms where they are noted."""
        noted = {} if self.runtime.norms is None else {"norms": self.runtime.norms.state_dict()}
        return {"ledger": self.runtime.ledger.state_dict(), "plan": self.runtime.plan, **noted}

    def load_state_dict(self, state: dict[str, Any], experiences: int) -> None:
        """Go on after the first `experiences` experiences."""
        self.runtime.ledger.load_state_dict(state["ledger"])
        self.runtime.plan[:] = state["plan"]
        if self.runtime.norms is not None:
            self.runtime.norms.load_state_dict(state.get("norms"))

    def close_stream(self) -> None:
        """Nothing is left open."""


class TokenLooks(looks.Observer):
    """Losses on a few sequences of every set while a model is trained, and those of trunks that are not the answer."""

    def __init__(self, stream: TokenStream):
        scenario: TokenScenario = stream.job.scenario
        self.stream, self.runtime, self.probing = stream, stream.runtime, scenario.probing
        rows = [windows[: scenario.probing.sequences] for windows in stream.sets]
        self.probe = torch.from_numpy(np.concatenate(rows)).to(stream.job.device)
        self.sizes = [len(r) for r in rows]
        self.steps: dict[int, set[int]] = {}
        self.rows: list[Row] = []
        self.spent = 0.0

    def begin(self) -> None:
        """A new experience."""
        self.rows, self.spent = [], 0.0

    @torch.no_grad()
    def at_step(self, name: str, place: Place, lr: float, visits: int) -> float:
        """At steps 0, 1, 2, 4, ... of a plan, and evenly: sums of losses and of right guesses, in one pass over the probe."""
        if place.steps not in self.steps:
            self.steps[place.steps] = set(self.probing.steps(place.steps))
        if name not in ("trunk", "branch") or place.step not in self.steps[place.steps]:
            return 0.0
        start, model = time.perf_counter(), self.stream.job.model
        with looks.modes_kept(model):
            model.eval()
            losses, right = look_at(model, self.probe, self.sizes, self.stream.linear)
        parts = losses.split(self.sizes)
        sums = {
            "n": [part.numel() for part in parts],
            "loss": [float(part.double().sum()) for part in parts],
            "correct": [round(share * part.numel()) for share, part in zip(right, parts, strict=True)],
        }
        ledger = self.runtime.ledger
        row: Row = {"experience": place.experience, "step": place.step, "evaluator": self.stream.evaluator, "role": name}
        row |= {"lr": float(f"{lr:.6g}"), "trained": ledger.trained, "sums": sums}
        self.rows.append(row)
        ledger.look("probe", losses.numel(), self.runtime.flops_per_token)
        took = time.perf_counter() - start
        self.spent += took
        self.runtime.meter.add_seconds("probe", took)
        return took

    def trunk_ended(self, model: nn.Module) -> None:
        """Evaluate the trunk, whose branch or average will be evaluated as the learner's answer."""
        model.eval()
        row: Row = {"experience": self.runtime.experience, "step": None, "evaluator": self.stream.evaluator, "role": "trunk"}
        self.rows.append(row | {"sums": {"loss": self.stream.losses(model.loss)}})

    def taken(self) -> tuple[list[Row], float]:
        """Rows of this experience, and the seconds of the looks."""
        return self.rows, self.spent

    def state_dict(self) -> dict[str, Any]:
        """Rows made inside this experience."""
        return {"rows": list(self.rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; `spent` stays that of this process, whose `learn` it is taken from."""
        self.rows = list(state["rows"])
