"""The contract as a test suite: `check_learner` and `check_scenario`, for clbench's own and for everybody's plug-ins.

Each check is a function that raises AssertionError with a sentence; the two entry points run them all and report. The checks of
every learner stand here; those of class scores are in `score_checks`, of losses in `loss_checks`, of edits in `edit_checks`, of
text tasks in `text_checks`.
"""

from __future__ import annotations

import copy
import io
import pathlib
import tempfile
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch

from clbench.config.compose import build, load_target
from clbench.interfaces import UserError, declared
from clbench.streams.manifest import Manifest
from clbench.testing import anytime, data_reach, edit_checks, loss_checks, score_checks, text_checks
from clbench.testing.trial import (
    EditTrial,
    LossTrial,
    TextTrial,
    Trial,
    mixed_stream,
    repeated_stream,
    small_edits,
    small_stream,
    small_tasks,
    small_texts,
)
from clbench.training import arithmetic
from clbench.training.runtime import Interrupted
from clbench.training.state import fingerprint

Result = tuple[str, bool, str]
Checks = Mapping[str, Callable[[Any], None]]


def check_learner(config: dict[str, Any]) -> list[Result]:
    """Run every check on the learner of a resolved configuration -> (name, passed, message) each."""
    arithmetic.apply(torch.device("cpu"), arithmetic.choose_threads("auto"), 0)
    try:
        can = declared(load_target(config["learner"]["_target_"]), config["learner"])
    except UserError as error:
        return [("capabilities", False, str(error))]
    if can.asks == "loss":
        return _run(LOSS, LossTrial(config, small_texts(), can))
    if can.asks == "logits":
        return _run(LOGITS, EditTrial(config, small_edits(), can))
    if can.asks == "next_token":
        return _run(NEXT_TOKEN, TextTrial(_all_epochs(config), small_tasks(), can))
    kind = "task_incremental" if can.needs_task_id else "class_incremental"
    config = _all_epochs(config)
    epochs, shapes = max(2, can.needs_passes), score_checks.check_shapes
    budget = {"epochs": epochs, "exemplars": 12}
    results = _run(SCORES, Trial(config, small_stream(kind, budget=budget), can))
    if not can.needs_task_id:
        tasks = small_stream("task_incremental", budget=budget)
        results += _run({"task_incremental": shapes}, Trial(config, tasks, can))
    if not can.needs_new_classes:
        results += _run({"classes_come_back": shapes}, Trial(config, repeated_stream(epochs, kind), can))
    if not can.needs_disjoint_classes:
        results += _run({"old_classes_beside_new": shapes}, Trial(config, mixed_stream(epochs, kind), can))
    if not (can.needs_random_access or can.stores_all_data or can.needs_passes > 1):
        once = small_stream(kind, operators=["single_pass"], budget=budget | {"epochs": 1})
        results += _run({"single_pass": shapes}, Trial(config, once, can))
    return results


def _all_epochs(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with as many passes as the stream allows."""
    config = copy.deepcopy(config)
    if "epochs" in config["learner"]:
        config["learner"]["epochs"] = None
    return config


def check_scenario(config: dict[str, Any]) -> list[Result]:
    """Run every check on the scenario of a resolved configuration -> (name, passed, message) each."""
    built = [build(config["scenario"]) for _ in range(2)]
    of = {"loss": loss_checks.SCENARIO, "logits": edit_checks.SCENARIO, "next_token": text_checks.SCENARIO}
    checks = of.get(getattr(built[0], "asks", ""), score_checks.SCENARIO)
    return _run({"same_hash": check_same_hash, **checks}, built)


def _run(checks: Checks, subject: Any) -> list[Result]:
    return [_result(name, check, subject) for name, check in checks.items()]


def _result(name: str, check: Callable[[Any], None], subject: Any) -> Result:
    try:
        check(subject)
    except AssertionError as error:
        return name, False, str(error)
    except Exception as error:  # a check must report, whatever a plug-in raises
        where = traceback.extract_tb(error.__traceback__)[-1]
        return name, False, f"{type(error).__name__}: {error} ({pathlib.PurePath(where.filename).name}:{where.lineno})"
    return name, True, ""


def check_same_hash(built: list[Any]) -> None:
    """Built twice, and written and read, it is the same stream."""
    first, second = built[0].manifest, built[1].manifest
    assert first.sha256 == second.sha256, "built twice, it has two hashes"
    with tempfile.TemporaryDirectory() as folder:
        first.save(pathlib.Path(folder) / "m.json")
        again = Manifest.load(pathlib.Path(folder) / "m.json")
    assert again.sha256 == first.sha256, "written and read, it has another hash"


def check_determinism(trial: Trial) -> None:
    """The same seed gives the same state to the last bit; the global generator is left alone."""
    prints = []
    for _ in range(2):
        before = torch.random.get_rng_state()
        learner, runtime, pipeline = trial.start()
        for i in range(2):
            trial.learn(learner, runtime, pipeline, i)
        trial.answers(learner, pipeline)
        assert torch.equal(before, torch.random.get_rng_state()), (
            "the global random generator was used; take runtime.generator()"
        )
        prints.append(fingerprint(learner.state_dict()))
    assert prints[0] == prints[1], "two runs with one seed end in different states"


def check_asking_changes_nothing(trial: Trial) -> None:
    """Asked twice it gives the same answers and has the same state, unless adaptation at test time is declared."""
    learner, runtime, pipeline = trial.start()
    trial.learn(learner, runtime, pipeline, 0)
    before = fingerprint(learner.state_dict())
    first, second = (trial.answers(learner, pipeline) for _ in range(2))
    if not trial.capabilities.adapts_at_test:
        asked = trial.capabilities.asks
        assert fingerprint(learner.state_dict()) == before, f"{asked} changed the learner's state"
        assert torch.equal(first, second), f"{asked} called twice gave different answers"


def check_evaluation_changes_nothing(trial: LossTrial) -> None:
    """The same of losses; and batch mates do not matter."""
    check_asking_changes_nothing(trial)
    loss_checks.check_texts_beside(trial)


def check_state_round_trip(trial: Trial) -> None:
    """A fresh learner that loads the saved state in mid-stream answers the same and learns the same from there on."""
    learner, runtime, pipeline = trial.start()
    trial.learn(learner, runtime, pipeline, 0)
    file = io.BytesIO()
    torch.save(learner.state_dict(), file)
    file.seek(0)
    other, other_runtime, other_pipeline = trial.start()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert fingerprint(other.state_dict()) == fingerprint(learner.state_dict()), "load_state_dict(state_dict()) loses something"
    a, b = trial.answers(learner, pipeline), trial.answers(other, other_pipeline)
    assert torch.equal(a, b), "the restored learner answers otherwise"
    for index in (1, 2):
        trial.learn(learner, runtime, pipeline, index)
        trial.learn(other, other_runtime, other_pipeline, index)
    assert fingerprint(other.state_dict()) == fingerprint(learner.state_dict()), "the restored learner learns otherwise"


def check_resume_in_mid_learn(trial: Trial) -> None:
    """Stopped after any third step of `learn` (of many steps: at six), started again, it ends in the same state, bit by bit."""
    learner, runtime, pipeline = trial.start()
    steps = 0

    def count(name: str, step: int, total: int, loss: float) -> None:
        nonlocal steps
        steps += 1

    for i in range(2):
        trial.learn(learner, runtime, pipeline, i)
    state = copy.deepcopy(trial.saved(learner, runtime))
    runtime.progress = count
    trial.learn(learner, runtime, pipeline, 2)
    expected = fingerprint(trial.saved(learner, runtime))
    for stop_at in range(1, steps + 1, max(3, -(-steps // 6))):
        with tempfile.TemporaryDirectory() as folder:
            ended = _interrupted(trial, state, pathlib.Path(folder), stop_at)
        assert ended == expected, f"stopped at step {stop_at} of {steps} and resumed, it ends in another state"


def _interrupted(trial: Trial, state: dict[str, Any], folder: pathlib.Path, stop_at: int) -> str:
    done = 0
    learner = runtime = None
    for _ in range(2):
        learner, runtime, pipeline = trial.start(folder)
        trial.restore(learner, runtime, copy.deepcopy(state))
        assert fingerprint(trial.saved(learner, runtime)) == fingerprint(state), "load_state_dict(state_dict()) loses something"

        def count(name: str, step: int, total: int, loss: float, runtime: Any = runtime) -> None:
            nonlocal done
            done += 1
            runtime.stop = done == stop_at

        runtime.progress = count
        try:
            trial.learn(learner, runtime, pipeline, 2)
        except Interrupted:
            continue
        break
    return fingerprint(trial.saved(learner, runtime))


SCORES: Checks = {
    "fits": score_checks.check_fits,
    "shapes": score_checks.check_shapes,
    "determinism": check_determinism,
    "prediction_changes_nothing": check_asking_changes_nothing,
    "test_batches": score_checks.check_test_batches,
    "state_round_trip": check_state_round_trip,
    "resume_in_mid_learn": check_resume_in_mid_learn,
    "budget": score_checks.check_budget,
    "anytime": anytime.check_anytime,
    "no_hold_on_old_data": score_checks.check_no_hold_on_old_data,
    "only_own_data_is_reachable": data_reach.check_only_own_data_is_reachable,
    "adversary": data_reach.check_adversary,
}
LOSS: Checks = {
    "shapes": loss_checks.check_shapes,
    "future_is_not_seen": loss_checks.check_future_is_not_seen,
    "determinism": check_determinism,
    "evaluation_changes_nothing": check_evaluation_changes_nothing,
    "state_round_trip": check_state_round_trip,
    "resume_in_mid_learn": check_resume_in_mid_learn,
    "ledger": loss_checks.check_ledger,
    "only_own_text_is_reachable": data_reach.check_only_own_text_is_reachable,
    "text_adversary": data_reach.check_text_adversary,
}
LOGITS: Checks = {
    "shapes": edit_checks.check_shapes,
    "edits": edit_checks.check_edits,
    "future_is_not_seen": edit_checks.check_future_is_not_seen,
    "determinism": check_determinism,
    "asking_changes_nothing": check_asking_changes_nothing,
    "texts_beside": edit_checks.check_texts_beside,
    "state_round_trip": check_state_round_trip,
    "resume_in_mid_learn": check_resume_in_mid_learn,
    "only_own_requests_are_reachable": data_reach.check_only_own_requests_are_reachable,
}
NEXT_TOKEN: Checks = {
    "fits": text_checks.check_fits,
    "shapes": text_checks.check_shapes,
    "future_is_not_seen": text_checks.check_future_is_not_seen,
    "determinism": check_determinism,
    "asking_changes_nothing": check_asking_changes_nothing,
    "lines_beside": text_checks.check_lines_beside,
    "state_round_trip": check_state_round_trip,
    "resume_in_mid_learn": check_resume_in_mid_learn,
    "budget": score_checks.check_budget,
    "only_own_lines_are_reachable": data_reach.check_only_own_lines_are_reachable,
}
