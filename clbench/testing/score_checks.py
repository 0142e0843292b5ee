"""Checks of the contract for learners that answer with class scores, and for streams of labelled images."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from clbench.interfaces import BudgetExceeded, mismatch
from clbench.streams.eval_sets import open_eval
from clbench.streams.scenario import Scenario
from clbench.testing.trial import Trial, main, old_set_aside


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


def check_test_batches(trial: Trial) -> None:
    """Scores depend neither on the size of a test batch, nor on its other samples, their order, or the ids of samples."""
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
    batch, _ = next(open_eval(trial.scenario, 0, pipeline).batches(len(data)))
    batch.ids = batch.ids.flip(0)
    with torch.no_grad():
        gap = ((main(learner.predict(batch)).float() - reference).abs().max() / scale).item()
    assert gap < 1e-4, (
        f"scores change by {gap:.1e} (relative) with the ids of samples: in a sorted data set they name the class"
    )


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
    with old_set_aside():
        learner, runtime, pipeline = trial.start()
        experience = trial.learn(learner, runtime, pipeline, 0)
        reference = weakref.ref(experience.train)
        experience.train.close()  # type: ignore[attr-defined]
        del experience
        gc.collect()
    assert reference() is None, "the learner still refers to the training data of the last experience"
    trial.scores(learner, pipeline, 0, 6)


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


SCENARIO: Mapping[str, Callable[[list[Scenario]], None]] = {
    "no_leak": check_no_leak,
    "labels": check_labels,
    "images": check_images,
}
