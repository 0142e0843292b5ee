"""The contract as a test suite: `check_learner` and `check_scenario`, for clbench's own and for everybody's plug-ins.

Each check is a function that raises AssertionError with a sentence; the two entry points run them all and report.
The learner is tried on a small stream of digits with uneven experiences, one of them of a single class.
"""

from __future__ import annotations

import copy
import gc
import io
import pathlib
import tempfile
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clbench.config.compose import build, load_target
from clbench.interfaces import BudgetExceeded, Capabilities, UserError, declared, mismatch
from clbench.models.precision import set_precision
from clbench.streams.eval_sets import open_eval
from clbench.streams.images.data import open_experience
from clbench.streams.images.pixels import Pipeline
from clbench.streams.scenario import Scenario
from clbench.testing import anytime, data_reach, loss_contract
from clbench.training import arithmetic
from clbench.training.checkpoint import Journal
from clbench.training.runtime import Interrupted, Runtime
from clbench.training.state import fingerprint

Result = tuple[str, bool, str]


@dataclass
class Trial:
    """One learner on one small stream: everything that is needed to run it again."""

    config: dict[str, Any]
    scenario: Scenario
    capabilities: Capabilities
    seed: int = 0

    def start(self, folder: pathlib.Path | None = None, **changes: Any) -> tuple[Any, Runtime, Pipeline]:
        """A fresh learner with its runtime and pipeline; `changes` go to the budget."""
        device = torch.device("cpu")
        model = set_precision(build(self.config["model"]), self.config.get("precision", "fp32"))
        runtime = Runtime(
            self.seed,
            device,
            replace(self.scenario.budget, **changes),
            precision=self.config.get("precision", "fp32"),
            exempt=self.capabilities.stores_all_data,
        )
        runtime.journal = Journal(folder, 0.0)
        return build(self.config["learner"], model=model, runtime=runtime), runtime, Pipeline(model.profile, device, "none")

    def learn(self, learner: Any, runtime: Runtime, pipeline: Pipeline, index: int) -> Any:
        """Let it learn experience `index` as the runner does -> the experience."""
        past = ()
        if self.capabilities.stores_all_data:
            past = tuple(open_experience(self.scenario, i, pipeline, True).train for i in range(index))
        experience = open_experience(self.scenario, index, pipeline, self.capabilities.stores_all_data)
        experience = replace(experience, past=past)
        runtime.begin(index, len(experience.train))
        result = learner.learn(experience)
        assert result is None or all(isinstance(v, float | int) for v in result.values()), "learn must return numbers by name"
        return experience

    def scores(self, learner: Any, pipeline: Pipeline, j: int, size: int) -> Tensor:
        """Predictions on evaluation set j in batches of `size` -> [N, K]."""
        with torch.no_grad():
            parts = [main(learner.predict(batch)) for batch, _ in open_eval(self.scenario, j, pipeline).batches(size)]
        return torch.cat(parts).float()


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


def check_learner(config: dict[str, Any]) -> list[Result]:
    """Run every check on the learner of a resolved configuration -> (name, passed, message) each."""
    arithmetic.apply(torch.device("cpu"), arithmetic.choose_threads("auto"), 0)
    try:
        capabilities = declared(load_target(config["learner"]["_target_"]), config["learner"])
    except UserError as error:
        return [("capabilities", False, str(error))]
    if capabilities.asks == "loss":
        return loss_contract.check_learner(config, capabilities, _run)
    kind = "task_incremental" if capabilities.needs_task_id else "class_incremental"
    config = copy.deepcopy(config)
    if "epochs" in config["learner"]:
        config["learner"]["epochs"] = None
    epochs = max(2, capabilities.needs_passes)
    trial = Trial(config, small_stream(kind, budget={"epochs": epochs, "exemplars": 12}), capabilities)
    results = [_run(check.__name__.removeprefix("check_"), check, trial) for check in LEARNER_CHECKS]
    if not capabilities.needs_task_id:
        other = Trial(config, small_stream("task_incremental", budget={"epochs": epochs, "exemplars": 12}), capabilities)
        results.append(_run("task_incremental", check_shapes, other))
    if not capabilities.needs_new_classes:
        results.append(_run("classes_come_back", check_shapes, Trial(config, repeated_stream(epochs), capabilities)))
    if not (capabilities.needs_random_access or capabilities.stores_all_data or capabilities.needs_passes > 1):
        once = small_stream(kind, operators=["single_pass"], budget={"epochs": 1, "exemplars": 12})
        results.append(_run("single_pass", check_shapes, Trial(config, once, capabilities)))
    return results


def repeated_stream(epochs: int) -> Scenario:
    """The small stream whose later experiences bring no new class: halves of the same three classes."""
    scenario = small_stream(sizes=[3], num_classes=3, limit_train=24, budget={"epochs": epochs, "exemplars": 12})
    whole, manifest = scenario.manifest.experiences[0], scenario.manifest
    parts = [replace(whole, name=f"part {i}", train=whole.train[i::2]) for i in range(2)]
    manifest = replace(manifest, experiences=tuple(parts), kind="data_incremental")
    return replace(scenario, manifest=manifest)


def _run(name: str, check: Callable[[Any], None], subject: Any) -> Result:
    try:
        check(subject)
    except AssertionError as error:
        return name, False, str(error)
    except Exception as error:  # a check must report, whatever a plug-in raises
        where = traceback.extract_tb(error.__traceback__)[-1]
        return name, False, f"{type(error).__name__}: {error} ({pathlib.PurePath(where.filename).name}:{where.lineno})"
    return name, True, ""


def check_fits(trial: Trial) -> None:
    """Its capabilities allow the small stream."""
    why = mismatch(trial.config["learner"]["_target_"], trial.capabilities, trial.scenario.facts(), True)
    assert why is None, why


def check_shapes(trial: Trial) -> None:
    """Scores are finite [B, num_seen] after every experience, also after one of a single class; heads keep their names."""
    learner, runtime, pipeline = trial.start()
    names: list[str] | None = None
    for i in range(len(trial.scenario.manifest.experiences)):
        trial.learn(learner, runtime, pipeline, i)
        seen = trial.scenario.manifest.num_seen(i)
        z = trial.scores(learner, pipeline, 0, 5)
        assert z.shape[1] == seen, f"predict gave {z.shape[1]} columns after experience {i}, {seen} classes were seen"
        assert torch.isfinite(z).all(), f"predict gave NaN or infinite scores after experience {i}"
        with torch.no_grad():
            answer = learner.predict(next(open_eval(trial.scenario, 0, pipeline).batches(5))[0])
        heads = [] if isinstance(answer, Tensor) else list(answer)
        names = heads if names is None else names
        assert heads == names, f"predict named its heads {names}, and after experience {i} {heads}"


def check_determinism(trial: Trial) -> None:
    """The same seed gives the same state to the last bit; the global generator is left alone."""
    prints = []
    for _ in range(2):
        before = torch.random.get_rng_state()
        learner, runtime, pipeline = trial.start()
        for i in range(2):
            trial.learn(learner, runtime, pipeline, i)
        trial.scores(learner, pipeline, 0, 4)
        assert torch.equal(before, torch.random.get_rng_state()), (
            "the global random generator was used; take runtime.generator()"
        )
        prints.append(fingerprint(learner.state_dict()))
    assert prints[0] == prints[1], "two runs with one seed end in different states"


def check_prediction_changes_nothing(trial: Trial) -> None:
    """Predicting twice gives the same scores and the same state, unless adaptation at test time is declared."""
    learner, runtime, pipeline = trial.start()
    trial.learn(learner, runtime, pipeline, 0)
    before = fingerprint(learner.state_dict())
    first, second = (trial.scores(learner, pipeline, 0, 6) for _ in range(2))
    if not trial.capabilities.adapts_at_test:
        assert fingerprint(learner.state_dict()) == before, "predict changed the learner's state"
        assert torch.equal(first, second), "predicting twice gave different scores"


def check_test_batches(trial: Trial) -> None:
    """Scores depend neither on the size of a test batch, nor on its other samples, nor on their order."""
    if trial.capabilities.transductive or trial.capabilities.adapts_at_test:
        return
    learner, runtime, pipeline = trial.start()
    for i in range(2):
        trial.learn(learner, runtime, pipeline, i)
    data = open_eval(trial.scenario, 0, pipeline).data
    reference = trial.scores(learner, pipeline, 0, 1)
    scale = reference.abs().max().clamp_min(1.0)
    for rows in (torch.arange(len(data)), torch.arange(len(data)).flip(0), torch.arange(len(data))[::3]):
        with torch.no_grad():
            batch = data.batch(rows.numpy())
            batch.y = None
            z = main(learner.predict(batch)).float()
        gap = ((z - reference[rows]).abs().max() / scale).item()
        assert gap < 1e-4, f"scores change by {gap:.1e} (relative) with the other samples of the batch"


def check_state_round_trip(trial: Trial) -> None:
    """A fresh learner that loads the saved state in mid-stream predicts the same and learns the same from there on."""
    learner, runtime, pipeline = trial.start()
    trial.learn(learner, runtime, pipeline, 0)
    file = io.BytesIO()
    torch.save(learner.state_dict(), file)
    file.seek(0)
    copy_, copy_runtime, copy_pipeline = trial.start()
    copy_.load_state_dict(torch.load(file, weights_only=True))
    assert fingerprint(copy_.state_dict()) == fingerprint(learner.state_dict()), "load_state_dict(state_dict()) loses something"
    a, b = trial.scores(learner, pipeline, 0, 6), trial.scores(copy_, copy_pipeline, 0, 6)
    assert torch.equal(a, b), "the restored learner predicts otherwise"
    for one, its_runtime, its_pipeline in ((learner, runtime, pipeline), (copy_, copy_runtime, copy_pipeline)):
        trial.learn(one, its_runtime, its_pipeline, 1)
    assert fingerprint(copy_.state_dict()) == fingerprint(learner.state_dict()), "the restored learner learns otherwise"


def check_resume_in_mid_learn(trial: Trial) -> None:
    """Stopped after any third step of `learn` (of many steps: at six), started again, it ends in the same state, bit by bit."""
    learner, runtime, pipeline = trial.start()
    steps = 0

    def count(name: str, step: int, total: int, loss: float) -> None:
        nonlocal steps
        steps += 1

    for i in range(2):
        trial.learn(learner, runtime, pipeline, i)
    before = fingerprint(learner.state_dict())
    state = copy.deepcopy(learner.state_dict())
    runtime.progress = count
    trial.learn(learner, runtime, pipeline, 2)
    expected = fingerprint(learner.state_dict())
    for stop_at in range(1, steps + 1, max(3, -(-steps // 6))):
        with tempfile.TemporaryDirectory() as folder:
            ended = _interrupted(trial, state, before, pathlib.Path(folder), stop_at)
        assert ended == expected, f"stopped at step {stop_at} of {steps} and resumed, it ends in another state"


def _interrupted(trial: Trial, state: Any, loaded: str, folder: pathlib.Path, stop_at: int) -> str:
    done = 0
    for _ in range(2):
        learner, runtime, pipeline = trial.start(folder)
        learner.load_state_dict(copy.deepcopy(state))
        assert fingerprint(learner.state_dict()) == loaded, "load_state_dict(state_dict()) loses something"

        def count(name: str, step: int, total: int, loss: float, runtime: Runtime = runtime) -> None:
            nonlocal done
            done += 1
            runtime.stop = done == stop_at

        runtime.progress = count
        try:
            trial.learn(learner, runtime, pipeline, 2)
        except Interrupted:
            continue
        break
    return fingerprint(learner.state_dict())


def check_budget(trial: Trial) -> None:
    """Sample visits are counted by `fit`, and one visit less than it needs is refused."""
    learner, runtime, pipeline = trial.start()
    trial.learn(learner, runtime, pipeline, 0)
    used = runtime.used_visits
    limit = trial.scenario.budget.epochs * len(trial.scenario.manifest.experiences[0].train)
    assert runtime.used_new <= limit or runtime.exempt, f"{runtime.used_new} visits to new samples, the budget allows {limit}"
    if used == 0 or runtime.exempt:
        return
    learner, runtime, pipeline = trial.start(sample_visits=used - 1)
    try:
        trial.learn(learner, runtime, pipeline, 0)
    except BudgetExceeded:
        return
    raise AssertionError("a budget of one sample visit too few was not noticed: train through clbench.training.fit")


def check_no_hold_on_old_data(trial: Trial) -> None:
    """After `learn` nothing refers to the experience's data any more, unless `stores_all_data` is declared."""
    if trial.capabilities.stores_all_data:
        return
    learner, runtime, pipeline = trial.start()
    experience = trial.learn(learner, runtime, pipeline, 0)
    reference = weakref.ref(experience.train)
    experience.train.close()
    del experience
    gc.collect()
    assert reference() is None, "the learner still refers to the training data of the last experience"
    trial.scores(learner, pipeline, 0, 6)


LEARNER_CHECKS: tuple[Callable[[Trial], None], ...] = (
    check_fits,
    check_shapes,
    check_determinism,
    check_prediction_changes_nothing,
    check_test_batches,
    check_state_round_trip,
    check_resume_in_mid_learn,
    check_budget,
    anytime.check_anytime,
    check_no_hold_on_old_data,
    data_reach.check_only_own_data_is_reachable,
    data_reach.check_adversary,
)


def check_scenario(config: dict[str, Any]) -> list[Result]:
    """Run every check on the scenario of a resolved configuration -> (name, passed, message) each."""
    built = [build(config["scenario"]) for _ in range(2)]
    checks: Any = loss_contract.SCENARIO_CHECKS if getattr(built[0], "asks", "") == "loss" else SCENARIO_CHECKS
    return [_run(check.__name__.removeprefix("check_"), check, built) for check in checks]


def check_same_hash(built: list[Scenario]) -> None:
    """Built twice, and written and read, it is the same stream."""
    from clbench.streams.manifest import Manifest

    first, second = built[0].manifest, built[1].manifest
    assert first.sha256 == second.sha256, "built twice, it has two hashes"
    assert Manifest.from_json(first.to_json()).sha256 == first.sha256, "written and read, it has another hash"


def check_no_leak(built: list[Scenario]) -> None:
    """No evaluation sample is a training sample."""
    manifest = built[0].manifest
    train = {int(i) for e in manifest.experiences for i in e.train}
    for entry in manifest.evals:
        both = train.intersection(entry.ids.tolist())
        assert not both, f"evaluation set {entry.name} shares {len(both)} sample(s) with the training data"


def check_labels(built: list[Scenario]) -> None:
    """Every sample carries a class that its experience or evaluation set declares; none is empty."""
    scenario = built[0]
    for entry in scenario.manifest.experiences:
        assert len(entry.train), f"experience {entry.name} has no training sample"
        assert set(scenario.labels(entry).tolist()) == set(entry.classes), f"experience {entry.name}: wrong classes"
    for entry in scenario.manifest.evals:
        assert len(entry.ids), f"evaluation set {entry.name} is empty"
        assert set(scenario.labels(entry).tolist()) <= set(entry.classes), f"evaluation set {entry.name}: wrong classes"
        assert 0 <= entry.first_seen < len(scenario.manifest.experiences), f"evaluation set {entry.name} is never seen"


def check_images(built: list[Scenario]) -> None:
    """The first and last images of every experience decode to uint8 [H, W, 3]."""
    for entry in built[0].manifest.experiences:
        for image in built[0].dataset.images.raw(entry.train[[0, -1]]):
            assert image.dtype.name == "uint8" and image.ndim == 3 and image.shape[2] == 3, f"{entry.name}: {image.shape}"


SCENARIO_CHECKS: tuple[Callable[[list[Scenario]], None], ...] = (check_same_hash, check_no_leak, check_labels, check_images)
