"""One learner on one small stream, with what is needed to run it again: what the checks of the contract are tried on."""

from __future__ import annotations

import contextlib
import gc
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clbench.config.compose import build
from clbench.interfaces import Capabilities, Experience
from clbench.models.precision import set_precision
from clbench.streams.eval_sets import open_eval
from clbench.streams.images.data import open_experience
from clbench.streams.images.pixels import Pipeline
from clbench.streams.scenario import Scenario
from clbench.streams.tokens import text_data
from clbench.streams.tokens.edits import EditScenario, edit_facts
from clbench.streams.tokens.scenario import TokenScenario
from clbench.streams.tokens.text_lines import TextScenario
from clbench.streams.tokens.text_tasks import text_tasks
from clbench.streams.tokens.texts import synthetic
from clbench.training.checkpoint import Journal
from clbench.training.pretraining.ledger import flops_per_token
from clbench.training.pretraining.segments import PretrainRuntime
from clbench.training.runtime import Runtime

CPU = torch.device("cpu")


@dataclass
class Trial:
    """A learner that answers with class scores."""

    config: dict[str, Any]
    scenario: Any
    capabilities: Capabilities
    seed: int = 0

    def start(self, folder: pathlib.Path | None = None, **changes: Any) -> tuple[Any, Any, Any]:
        """A fresh learner with its runtime and pipeline; `changes` go to the budget."""
        model = set_precision(build(self.config["model"]), self.config.get("precision", "fp32"))
        runtime = Runtime(
            self.seed,
            CPU,
            replace(self.scenario.budget, **changes),
            precision=self.config.get("precision", "fp32"),
            exempt=self.capabilities.stores_all_data,
        )
        runtime.journal = Journal(folder, 0.0)
        return build(self.config["learner"], model=model, runtime=runtime), runtime, Pipeline(model.profile, CPU, "none")

    def open(self, index: int, pipeline: Any) -> Experience:
        """What the learner is given."""
        keeps = self.capabilities.stores_all_data
        past = tuple(open_experience(self.scenario, i, pipeline, True).train for i in range(index)) if keeps else ()
        return replace(open_experience(self.scenario, index, pipeline, keeps), past=past)

    def learn(self, learner: Any, runtime: Any, pipeline: Any, index: int) -> Experience:
        """Let it learn experience `index` as the runner does -> the experience."""
        experience = self.open(index, pipeline)
        runtime.begin(index, self.size(experience))
        result = learner.learn(experience)
        assert result is None or all(isinstance(v, float | int) for v in result.values()), "learn must return numbers by name"
        return experience

    def size(self, experience: Experience) -> int | None:
        """Samples that the budget counts."""
        return len(experience.train)

    def scores(self, learner: Any, pipeline: Any, j: int, size: int) -> Tensor:
        """Predictions on evaluation set j in batches of `size` -> [N, K]."""
        with torch.no_grad():
            parts = [main(learner.predict(batch)) for batch, _ in open_eval(self.scenario, j, pipeline).batches(size)]
        return torch.cat(parts).float()

    def answers(self, learner: Any, pipeline: Any) -> Tensor:
        """What it answers on an evaluation set [N, ...]."""
        return self.scores(learner, pipeline, 0, 6)

    def saved(self, learner: Any, runtime: Any) -> dict[str, Any]:
        """What the runner keeps between two experiences."""
        return {"learner": learner.state_dict()}

    def restore(self, learner: Any, runtime: Any, state: dict[str, Any]) -> None:
        """Go on from there."""
        learner.load_state_dict(state["learner"])


@dataclass
class LossTrial(Trial):
    """A learner that answers with losses, on a small decoder; there is no pipeline."""

    def model(self) -> Any:
        """The network that is trained."""
        sizes = {"width": 16, "depth": 1, "heads": 2, "vocab": 8, "context": 16}
        return build({"_target_": "clbench.models.decoder.build_decoder", "name": "decoder_check", **sizes})

    def start(self, folder: pathlib.Path | None = None, **changes: Any) -> tuple[Any, Any, Any]:
        """A fresh learner with its runtime."""
        with torch.random.fork_rng([]):  # layers draw their first weights before the decoder draws its own
            model = self.model()
        flops = flops_per_token(model, self.scenario.manifest.context)
        runtime = PretrainRuntime(self.seed, CPU, journal=Journal(folder, 0.0), flops_per_token=flops)
        return build(self.config["learner"], model=model, runtime=runtime), runtime, None

    def open(self, index: int, pipeline: Any) -> Experience:
        return self.scenario.experience(index, self.keeps_past)

    def size(self, experience: Experience) -> None:
        """The ledger counts tokens instead."""

    @property
    def keeps_past(self) -> bool:
        """Whether it is given the texts of earlier experiences."""
        return self.capabilities.stores_exemplars or self.capabilities.stores_all_data

    def answers(self, learner: Any, pipeline: Any, rows: slice = slice(None)) -> Tensor:
        """Losses on the second evaluation set [N, L]."""
        with torch.no_grad():
            return learner.loss(torch.from_numpy(self.scenario.evaluation(1)[rows]))

    def saved(self, learner: Any, runtime: Any) -> dict[str, Any]:
        return {"learner": learner.state_dict(), "ledger": runtime.ledger.state_dict()}

    def restore(self, learner: Any, runtime: Any, state: dict[str, Any]) -> None:
        super().restore(learner, runtime, state)
        runtime.ledger.load_state_dict(state["ledger"])


@dataclass
class EditTrial(Trial):
    """An editor, on a small decoder with random weights; there is no pipeline."""

    def start(self, folder: pathlib.Path | None = None, **changes: Any) -> tuple[Any, Any, Any]:
        """A fresh learner with its runtime."""
        m = self.scenario.manifest
        sizes = {"width": 16, "depth": 3, "heads": 2, "vocab": m.vocab, "context": m.context}
        with torch.random.fork_rng([]):  # layers draw their first weights before the decoder draws its own
            model = build({"_target_": "clbench.models.decoder.build_decoder", "name": "decoder_check", **sizes})
        runtime = Runtime(self.seed, CPU, self.scenario.budget, journal=Journal(folder, 0.0))
        return build(self.config["learner"], model=model, runtime=runtime), runtime, None

    def open(self, index: int, pipeline: Any) -> Experience:
        return self.scenario.experience(index)

    def texts(self) -> Tensor:
        """Prompts and right answers of every request, but for the last token [N, L]."""
        requests = self.scenario.questions.requests
        return torch.from_numpy(np.stack([np.concatenate([r.prompt, r.target[:-1]]) for r in requests]))

    def answers(self, learner: Any, pipeline: Any) -> Tensor:
        """Scores after every token of `texts` [N, L, V]."""
        with torch.no_grad():
            return learner.logits(self.texts())


@dataclass
class TextTrial(Trial):
    """A learner of text tasks, on a small decoder with random weights; there is no pipeline."""

    def start(self, folder: pathlib.Path | None = None, **changes: Any) -> tuple[Any, Any, Any]:
        """A fresh learner with its runtime; `changes` go to the budget."""
        m = self.scenario.manifest
        sizes = {"width": 16, "depth": 2, "heads": 2, "vocab": m.vocab, "context": m.context}
        with torch.random.fork_rng([]):  # layers draw their first weights before the decoder draws its own
            model = build({"_target_": "clbench.models.decoder.build_decoder", "name": "decoder_check", **sizes})
        budget, exempt = replace(self.scenario.budget, **changes), self.capabilities.stores_all_data
        runtime = Runtime(self.seed, CPU, budget, exempt=exempt, journal=Journal(folder, 0.0))
        return build(self.config["learner"], model=model, runtime=runtime), runtime, None

    def open(self, index: int, pipeline: Any) -> Experience:
        keeps = self.capabilities.stores_all_data
        past = tuple(text_data.open_experience(self.scenario, i, CPU).train for i in range(index)) if keeps else ()
        return replace(text_data.open_experience(self.scenario, index, CPU), past=past)

    def asked(self, j: int) -> text_data.TextBatch:
        """The lines of evaluation set j as one batch, as they are asked."""
        m, entry = self.scenario.manifest, self.scenario.manifest.evals[j]
        task = entry.task if m.discloses_task else None
        ((_, batch),) = text_data.asked_batches(self.scenario.lines, entry.ids, len(entry.ids), CPU, task)
        return batch

    def without_task(self) -> text_data.TextBatch:
        """Rows of old text, as they are asked."""
        rows = self.scenario.old[:4]
        return text_data.TextBatch.of_lines(list(rows), np.ones(len(rows), np.int64), CPU)

    def answers(self, learner: Any, pipeline: Any) -> Tensor:
        """Scores after every token of the first task's lines [N, L, V]."""
        with torch.no_grad():
            return learner.next_token(self.asked(0))


@contextlib.contextmanager
def old_set_aside() -> Iterator[None]:
    """`gc.collect` inside goes through what was made inside alone: the modules of a process take it half a second each time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def main(answer: Any) -> Tensor:
    """The first head of a prediction."""
    return answer if isinstance(answer, Tensor) else next(iter(answer.values()))


def small_stream(kind: str = "class_incremental", **changes: Any) -> Scenario:
    """Digits, 6 classes in experiences of 3, 1 and 2, 12 training and 6 test images a class, 2 epochs."""
    from clbench.streams import generators

    options: dict[str, Any] = {
        "name": f"check_{kind}",
        "dataset": "digits",
        "sizes": [3, 1, 2],
        "num_classes": 6,
        "limit_train": 12,
        "limit_test": 6,
        "augment": "none",
        "budget": {"epochs": 2, "exemplars": 12},
    }
    return getattr(generators, kind)(**(options | changes))


def repeated_stream(epochs: int, kind: str = "class_incremental") -> Scenario:
    """The small stream whose later experiences bring no new class: halves of the same three classes (of one task)."""
    scenario = small_stream(kind, sizes=[3], num_classes=3, limit_train=24, budget={"epochs": epochs, "exemplars": 12})
    whole, manifest = scenario.manifest.experiences[0], scenario.manifest
    parts = [replace(whole, name=f"part {i}", train=whole.train[i::2]) for i in range(2)]
    manifest = replace(manifest, experiences=tuple(parts), kind="data_incremental")
    return replace(scenario, manifest=manifest)


def mixed_stream(epochs: int, kind: str = "class_incremental") -> Scenario:
    """The small stream whose second experience brings one new class beside an old one."""
    scenario = small_stream(kind, sizes=[3, 1], num_classes=4, limit_train=24, budget={"epochs": epochs, "exemplars": 12})
    manifest, y = scenario.manifest, scenario.dataset.y
    first, second = manifest.experiences
    back = first.train[y[first.train] == first.classes[1]][::2]
    first = replace(first, train=first.train[~np.isin(first.train, back)])
    second = replace(second, classes=(first.classes[1], *second.classes), train=np.concatenate([back, second.train]))
    return replace(scenario, manifest=replace(manifest, experiences=(first, second), kind="mixed_classes"))


def small_texts() -> TokenScenario:
    """Three Markov languages of 8 words, 24 steps of 4 sequences of 16 tokens each."""
    options: dict[str, Any] = {"states": 8, "symbols": 8, "tokens": 1536, "context": 16, "batch": 4, "eval_tokens": 256}
    return synthetic(name="check_texts", **options)


def small_edits() -> EditScenario:
    """Six edits of the made world in experiences of 1, 2 and 3; no decoder needs to know it."""
    made = edit_facts(name="check_edits", edits=6, entities=64, looks=[1, 3, 6], neighbours=2)
    return replace(made, known=0.0)


def small_tasks() -> TextScenario:
    """Three made tasks of 16 lines, two passes; no decoder needs to know anything."""
    options: dict[str, Any] = {"tasks": ["copy", "facts_8", "lego_2"], "lines": 16, "test_lines": 6}
    return text_tasks(name="check_tasks", budget={"epochs": 2, "exemplars": 6}, **options)
