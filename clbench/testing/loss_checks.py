"""Checks of the contract for learners that answer with losses, and for streams of texts or of groups of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch

from clbench.streams.tokens.scenario import TokenScenario, eval_windows
from clbench.testing.trial import LossTrial


def check_shapes(trial: LossTrial) -> None:
    """One finite loss from 0 for every token after the first, before and after learning."""
    learner, runtime, _ = trial.start()
    for index in range(3):
        found = trial.answers(learner, None)
        n, length = trial.scenario.evaluation(1).shape
        assert tuple(found.shape) == (n, length - 1), f"loss returned {tuple(found.shape)} for tokens ({n}, {length})"
        assert torch.isfinite(found).all() and (found >= 0).all(), "loss returned NaN, infinite or negative numbers"
        trial.learn(learner, runtime, None, index)


def check_future_is_not_seen(trial: LossTrial) -> None:
    """The loss of a token does not depend on later ones."""
    learner, runtime, _ = trial.start()
    trial.learn(learner, runtime, None, 0)
    tokens = torch.from_numpy(trial.scenario.evaluation(1)[:4])
    other = tokens.clone()
    other[:, -3:] = (other[:, -3:] + 1) % trial.scenario.manifest.vocab
    with torch.no_grad():
        same = torch.allclose(learner.loss(tokens)[:, :-3], learner.loss(other)[:, :-3], atol=1e-5)
    assert same, "the loss of a token depends on tokens after it"


def check_texts_beside(trial: LossTrial) -> None:
    """Batch mates do not matter."""
    learner, runtime, _ = trial.start()
    trial.learn(learner, runtime, None, 0)
    whole, alone = trial.answers(learner, None), trial.answers(learner, None, slice(2, 3))
    assert torch.allclose(whole[2:3], alone, atol=1e-5), "the loss of a text depends on the texts beside it"


def check_ledger(trial: LossTrial) -> None:
    """What was trained on adds up."""
    learner, runtime, _ = trial.start()
    for index in range(3):
        trial.learn(learner, runtime, None, index)
    ledger = runtime.ledger
    assert ledger.trained == ledger.unique + ledger.repeated, f"the ledger does not add up: {ledger}"


def check_tokens(built: list[TokenScenario]) -> None:
    """Every batch and every evaluation set holds tokens of the vocabulary."""
    scenario = built[0]
    parts = [scenario.data(i).read(np.arange(4)) for i in range(len(scenario.manifest.experiences))]
    for part in [*parts, *(scenario.evaluation(j) for j in range(len(scenario.manifest.evals)))]:
        assert part.min() >= 0 and part.max() < scenario.manifest.vocab, f"tokens from {part.min()} to {part.max()}"


def check_no_leak(built: list[TokenScenario]) -> None:
    """No window of an evaluation set stands in its training text (the first few are looked for), no image in both parts."""
    if built[0].manifest.unit == "images":
        for group in built[0].domains:
            both = np.intersect1d(group.train, group.validation)
            assert not len(both), f"{group.name}: {len(both)} image(s) are for training and for evaluation"
        return
    for domain in built[0].domains:
        train = np.ascontiguousarray(domain.train[: 1 << 26]).tobytes()
        context = built[0].manifest.context
        if built[0].manifest.vocab ** min(context, 64) < 1e12:
            continue
        for window in eval_windows(domain.validation, 4, context):
            needle = window.astype(domain.train.dtype).tobytes()
            assert needle not in train, f"{domain.name}: a text of the evaluation set is training text too"


def check_floors(built: list[TokenScenario]) -> None:
    """A known floor lies between 0 and the logarithm of the vocabulary."""
    for entry in built[0].manifest.evals:
        floor = entry.floor
        assert floor is None or 0 <= floor <= math.log(built[0].manifest.vocab), f"{entry.name}: floor {floor}"


SCENARIO: Mapping[str, Callable[[list[TokenScenario]], None]] = {
    "tokens": check_tokens,
    "no_leak": check_no_leak,
    "floors": check_floors,
}
