"""Checks of the contract for learners of text tasks, which answer with scores of next tokens, and for streams of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from clbench.interfaces import mismatch
from clbench.streams.tokens.text_data import TextBatch
from clbench.streams.tokens.text_lines import TextScenario
from clbench.testing.trial import TextTrial


def check_fits(trial: TextTrial) -> None:
    """Its capabilities allow the small stream."""
    why = mismatch(trial.config["learner"]["_target_"], trial.capabilities, trial.scenario.facts(), True)
    assert why is None, why


def check_shapes(trial: TextTrial) -> None:
    """Finite scores for every token of the vocabulary after every token, before and after learning, of any task and of none."""
    learner, runtime, _ = trial.start()
    vocab = trial.scenario.manifest.vocab
    for index in range(3):
        for batch in (trial.asked(0), trial.asked(2), trial.without_task()):
            with torch.no_grad():
                z = learner.next_token(batch)
            rows, length = batch.tokens.shape
            assert z.shape in ((rows, length, vocab), (rows, length - 1, vocab)), f"next_token returned {tuple(z.shape)}"
            assert torch.isfinite(z).all(), "next_token returned NaN or infinite numbers"
        trial.learn(learner, runtime, None, index)


def check_future_is_not_seen(trial: TextTrial) -> None:
    """The scores after a token of the answer do not depend on later ones: answers are read off while they are written."""
    learner, runtime, _ = trial.start()
    for index in range(2):
        trial.learn(learner, runtime, None, index)
    batch, other = trial.asked(0), trial.asked(0)
    place = int(batch.prompts.max())
    other.tokens[:, place + 1 :] = (other.tokens[:, place + 1 :] + 1) % trial.scenario.manifest.vocab
    short = TextBatch(batch.ids, batch.tokens[:, : place + 1], batch.prompts, batch.prompts + 1, None, batch.task)
    with torch.no_grad():
        a, b, c = (learner.next_token(one)[:, :place] for one in (batch, other, short))
    assert torch.allclose(a, b, atol=1e-4), "the scores after a token depend on tokens after it"
    assert torch.allclose(a, c, atol=1e-4), "the scores after a token depend on how long the text is"


def check_lines_beside(trial: TextTrial) -> None:
    """Batch mates and their padding do not matter, nor do ids."""
    if trial.capabilities.transductive:
        return
    learner, runtime, _ = trial.start()
    for index in range(2):
        trial.learn(learner, runtime, None, index)
    batch = trial.asked(0)
    with torch.no_grad():
        whole = learner.next_token(batch)
        for i in range(len(batch)):
            length = int(batch.lengths[i])
            parts = (batch.ids[i : i + 1] + 7, batch.tokens[i : i + 1, :length], batch.prompts[i : i + 1])
            alone = learner.next_token(TextBatch(*parts, batch.lengths[i : i + 1], None, batch.task))
            gap = float((whole[i, : length - 1] - alone[0, : length - 1]).abs().max())
            assert gap < 1e-3, f"the scores of a line change by {gap:.1e} with the lines beside it"


def check_no_leak(built: list[TextScenario]) -> None:
    """No line is trained on and asked, every line has a prompt and an answer, within vocabulary and context."""
    scenario, m = built[0], built[0].manifest
    train = np.concatenate([e.train for e in m.experiences])
    for entry in m.evals:
        assert not len(np.intersect1d(train, entry.ids)), f"evaluation set {entry.name} shares lines with the training data"
    lines = scenario.lines
    assert (lines.prompts >= 1).all() and (lines.prompts < lines.lengths).all(), "a line has no prompt or no answer"
    assert lines.lengths.max() <= m.context and 0 <= lines.tokens.min() and lines.tokens.max() < m.vocab, "a line does not fit"


SCENARIO: Mapping[str, Callable[[list[TextScenario]], None]] = {"no_leak": check_no_leak}
