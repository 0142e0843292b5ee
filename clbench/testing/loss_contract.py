"""The contract of learners that answer with a loss, and of streams of texts, as a test suite; see `testing`."""

from __future__ import annotations

import io
import math
import pathlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from clbench.config.compose import build
from clbench.interfaces import Capabilities, Experience
from clbench.run.token_stream import experience_of
from clbench.streams.manifest import Manifest
from clbench.streams.tokens.image_scenario import ImageScenario
from clbench.streams.tokens.scenario import TokenScenario, eval_windows
from clbench.streams.tokens.texts import synthetic
from clbench.testing import loss_data_reach
from clbench.training.checkpoint import Journal
from clbench.training.pretraining.ledger import flops_per_token
from clbench.training.pretraining.segments import PretrainRuntime
from clbench.training.runtime import Interrupted
from clbench.training.state import fingerprint

MODEL = {
    "_target_": "clbench.models.decoder.build_decoder",
    "name": "decoder_check",
    "width": 16,
    "depth": 1,
    "heads": 2,
    "vocab": 8,
    "context": 16,
}


@dataclass
class LossTrial:
    """One learner on three small languages: everything that is needed to run it again."""

    config: dict[str, Any]
    capabilities: Capabilities
    scenario: TokenScenario

    def start(self, folder: pathlib.Path | None = None) -> Any:
        model: nn.Module = build({**MODEL})
        runtime = PretrainRuntime(seed=0, device=torch.device("cpu"), journal=Journal(folder, 0.0))
        runtime.flops_per_token = flops_per_token(model, self.scenario.manifest.context)
        return build(self.config["learner"], model=model, runtime=runtime)

    def experience(self, index: int) -> Experience:
        """What the learner is given."""
        can = self.capabilities
        return experience_of(self.scenario, index, can.stores_exemplars or can.stores_all_data)

    def learn(self, learner: Any, *indices: int) -> Any:
        """Let it learn experiences as the runner does."""
        for index in indices:
            learner.runtime.begin(index)
            result = learner.learn(self.experience(index))
            plain = result is None or all(isinstance(v, float | int) for v in result.values())
            assert plain, "learn must return numbers by name"
            learner.runtime.journal.finish_experience({"experience": index})
        return learner

    def losses(self, learner: Any, rows: slice = slice(None)) -> torch.Tensor:
        """Losses on the second evaluation set [N, L]."""
        with torch.no_grad():
            return learner.loss(torch.from_numpy(self.scenario.evaluation(1)[rows]))


def small_stream() -> TokenScenario:
    """Three Markov languages of 8 words, 24 steps of 4 sequences of 16 tokens each."""
    options: dict[str, Any] = {"states": 8, "symbols": 8, "tokens": 1536, "context": 16, "batch": 4, "eval_tokens": 256}
    return synthetic(name="check_texts", **options)


def check_learner(config: dict[str, Any], capabilities: Capabilities, run: Callable[..., Any]) -> list[Any]:
    """Run every check on the learner of a resolved configuration -> (name, passed, message) each."""
    trial = LossTrial(config, capabilities, small_stream())
    return [run(check.__name__.removeprefix("check_"), check, trial) for check in LEARNER_CHECKS]


def check_shapes(trial: LossTrial) -> None:
    """One finite loss from 0 for every token after the first, before and after learning."""
    learner = trial.start()
    for index in range(3):
        found = trial.losses(learner)
        n, length = trial.scenario.evaluation(1).shape
        assert tuple(found.shape) == (n, length - 1), f"loss returned {tuple(found.shape)} for tokens ({n}, {length})"
        assert torch.isfinite(found).all() and (found >= 0).all(), "loss returned NaN, infinite or negative numbers"
        trial.learn(learner, index)


def check_future_is_not_seen(trial: LossTrial) -> None:
    """The loss of a token does not depend on later ones."""
    learner = trial.learn(trial.start(), 0)
    tokens = torch.from_numpy(trial.scenario.evaluation(1)[:4])
    other = tokens.clone()
    other[:, -3:] = (other[:, -3:] + 1) % trial.scenario.manifest.vocab
    with torch.no_grad():
        same = torch.allclose(learner.loss(tokens)[:, :-3], learner.loss(other)[:, :-3], atol=1e-5)
    assert same, "the loss of a token depends on tokens after it"


def check_determinism(trial: LossTrial) -> None:
    """The same seed ends in the same state."""
    ends = [fingerprint(trial.learn(trial.start(), 0, 1).state_dict()) for _ in range(2)]
    assert ends[0] == ends[1], "two runs with the same seed end in different states"


def check_evaluation_changes_nothing(trial: LossTrial) -> None:
    """`loss` leaves the state as it was, and batch mates do not matter."""
    learner = trial.learn(trial.start(), 0)
    before = fingerprint(learner.state_dict())
    whole, alone = trial.losses(learner), trial.losses(learner, slice(2, 3))
    assert torch.allclose(whole[2:3], alone, atol=1e-5), "the loss of a text depends on the texts beside it"
    assert fingerprint(learner.state_dict()) == before, "loss changed the learner's state"


def check_state_round_trip(trial: LossTrial) -> None:
    """Saved after an experience and loaded into a fresh learner, it goes on to the same end."""
    learner = trial.learn(trial.start(), 0)
    file = io.BytesIO()
    torch.save(learner.state_dict(), file)
    file.seek(0)
    other = trial.start()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(trial.losses(learner), trial.losses(other)), "a loaded learner has other losses"
    ends = [fingerprint(trial.learn(one, 1, 2).state_dict()) for one in (learner, other)]
    assert ends[0] == ends[1], "a loaded learner ends elsewhere: something that matters is not in state_dict()"


def check_resume_in_mid_learn(trial: LossTrial) -> None:
    """Stopped in the middle of the second experience, it goes on to the same state and the same count of tokens."""
    straight = trial.learn(trial.start(), 0, 1)
    with tempfile.TemporaryDirectory() as folder:
        learner = trial.learn(trial.start(pathlib.Path(folder)), 0)
        state, ledger = learner.state_dict(), learner.runtime.ledger.state_dict()
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        learner.runtime.begin(1)
        learner.runtime.progress = lambda name, step, steps, loss: setattr(learner.runtime, "stop", step >= 7)
        try:
            learner.learn(trial.experience(1))
        except Interrupted:
            pass
        again = trial.start(pathlib.Path(folder))
        again.load_state_dict(torch.load(file, weights_only=True))
        again.runtime.ledger.load_state_dict(ledger)
        again.runtime.begin(1)
        again.learn(trial.experience(1))
    assert fingerprint(again.state_dict()) == fingerprint(straight.state_dict()), "a resumed run ends in another state"
    assert again.runtime.ledger == straight.runtime.ledger, "a resumed run counts other tokens"


def check_ledger(trial: LossTrial) -> None:
    """What was trained on adds up."""
    ledger = trial.learn(trial.start(), 0, 1, 2).runtime.ledger
    assert ledger.trained == ledger.unique + ledger.repeated, f"the ledger does not add up: {ledger}"


LEARNER_CHECKS: tuple[Callable[[LossTrial], None], ...] = (
    check_shapes,
    check_future_is_not_seen,
    check_determinism,
    check_evaluation_changes_nothing,
    check_state_round_trip,
    check_resume_in_mid_learn,
    check_ledger,
    loss_data_reach.check_only_own_text_is_reachable,
    loss_data_reach.check_text_adversary,
)


def check_same_hash(built: list[TokenScenario]) -> None:
    """Built twice, and written and read, it is the same stream."""
    first, second = built[0].manifest, built[1].manifest
    assert first.sha256 == second.sha256, "built twice, it has two hashes"
    with tempfile.TemporaryDirectory() as folder:
        first.save(pathlib.Path(folder) / "m.json")
        assert Manifest.load(pathlib.Path(folder) / "m.json").sha256 == first.sha256, "written and read, it has another hash"


def check_tokens(built: list[TokenScenario]) -> None:
    """Every batch and every evaluation set holds tokens of the vocabulary."""
    scenario = built[0]
    parts = [scenario.data(i).read(np.arange(4)) for i in range(len(scenario.manifest.experiences))]
    for part in [*parts, *(scenario.evaluation(j) for j in range(len(scenario.manifest.evals)))]:
        assert part.min() >= 0 and part.max() < scenario.manifest.vocab, f"tokens from {part.min()} to {part.max()}"


def check_no_leak(built: list[TokenScenario]) -> None:
    """No window of an evaluation set stands in its training text (the first few are looked for), no image in both parts."""
    if isinstance(built[0], ImageScenario):
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


SCENARIO_CHECKS: tuple[Callable[[list[TokenScenario]], None], ...] = (
    check_same_hash,
    check_tokens,
    check_no_leak,
    check_floors,
)
