"""Checks of the contract for editors, which answer with scores of next tokens, and for streams of edits."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from clbench.streams.manifest_rules import PROBES
from clbench.streams.tokens.edits import EditScenario
from clbench.testing.trial import EditTrial


def check_shapes(trial: EditTrial) -> None:
    """Finite scores for every token of the vocabulary after every token, before and after learning."""
    learner, runtime, _ = trial.start()
    vocab = trial.scenario.manifest.vocab
    for index in range(3):
        z = trial.answers(learner, None)
        assert z.shape == (*trial.texts().shape, vocab), f"logits returned {tuple(z.shape)} for {tuple(trial.texts().shape)}"
        assert torch.isfinite(z).all(), "logits returned NaN or infinite numbers"
        trial.learn(learner, runtime, None, index)


def check_future_is_not_seen(trial: EditTrial) -> None:
    """The scores after a token do not depend on later ones: answers are read off while they are written."""
    learner, runtime, _ = trial.start()
    for index in range(2):
        trial.learn(learner, runtime, None, index)
    tokens = trial.texts()
    other = tokens.clone()
    other[:, -2:] = (other[:, -2:] + 1) % trial.scenario.manifest.vocab
    with torch.no_grad():
        a, b = learner.logits(tokens)[:, :-2], learner.logits(other)[:, :-2]
        short = learner.logits(tokens[:, :-2])
    assert torch.allclose(a, b, atol=1e-4), "the scores after a token depend on tokens after it"
    assert torch.allclose(a, short, atol=1e-4), "the scores after a token depend on how long the text is"


def check_texts_beside(trial: EditTrial) -> None:
    """Batch mates do not matter."""
    learner, runtime, _ = trial.start()
    for index in range(2):
        trial.learn(learner, runtime, None, index)
    whole, tokens = trial.answers(learner, None), trial.texts()
    with torch.no_grad():
        alone = torch.cat([learner.logits(row[None]) for row in tokens])
    assert torch.allclose(whole, alone, atol=1e-4), "the scores of a text depend on the texts beside it"


def check_edits(trial: EditTrial) -> None:
    """An edit changes something, and `learn` asks for every request of its experience."""
    learner, runtime, _ = trial.start()
    seen: list[int] = []
    runtime.progress = lambda name, done, total, loss: seen.append(done)
    before = trial.answers(learner, None)
    for index in range(3):
        seen.clear()
        trial.learn(learner, runtime, None, index)
        made = len(trial.scenario.manifest.experiences[index].train)
        assert seen and seen[-1] == made, (
            f"learn went through {seen[-1:]} of {made} requests: use training.editing.requests.each"
        )
    assert not torch.equal(before, trial.answers(learner, None)), "after all edits every answer is as before"


def check_probes(built: list[EditScenario]) -> None:
    """Texts are of the vocabulary and fit the context; no neighbour and no paraphrase is a request."""
    made = built[0].questions
    asked = {tuple(map(int, request.prompt)) for request in made.requests}
    for j, entry in enumerate(built[0].manifest.evals):
        assert entry.probe in PROBES, f"{entry.name} is of {entry.probe!r}"
        if entry.probe == "old_text":
            continue
        for probe in built[0].probes(j):
            text = np.concatenate([probe.prompt, probe.answer])
            assert text.min() >= 0 and text.max() < made.vocab and len(text) <= made.context, f"{entry.name}: {text}"
            assert entry.probe == "edits" or tuple(map(int, probe.prompt)) not in asked, f"{entry.name}: a probe is a request"


def check_old_text(built: list[EditScenario]) -> None:
    """Old text that learners are given is not that of the evaluation, and holds no prompt that is asked."""
    made = built[0].questions
    given = " ".join(map(str, made.text.flatten().tolist()))
    for j, entry in enumerate(built[0].manifest.evals):
        if entry.probe in ("neighbours", "same_subject"):
            for probe in built[0].probes(j):
                words = " ".join(map(str, [*probe.prompt.tolist(), *probe.answer.tolist()]))
                assert f" {words} " not in f" {given} ", f"{entry.name}: old text for learners holds what is asked"


SCENARIO: Mapping[str, Callable[[list[EditScenario]], None]] = {"probes": check_probes, "old_text": check_old_text}
