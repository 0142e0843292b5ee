"""Continual pre-training (Ibrahim et al. 2024, arXiv 2403.08763; Singh et al. 2025, arXiv 2503.02844): one loop, many plans.

The model goes on from domain to domain with AdamW; what differs from learner to learner are options:

schedule      the rate over an experience's steps; "re-warm and re-decay" is a cosine with warm-up in each experience
branch        share of the steps that are a branch: the rate is annealed on a copy, the copy is evaluated, the next experience
              continues from before the anneal, with its optimiser. 0: no branch, the model itself goes on
accounting    "equal_compute": the branch takes its steps from the experience, so the trunk sees less of it; "equal_data":
              the trunk sees all of it, and the branch comes on top
boundary      the optimiser at a new experience: "keep" (with a branch: as the anneal left it, as in the code of Singh et al.),
              "reset" (Ibrahim et al.), "reset_moments" (the step count stays), "restore" (with a branch: the trunk's)
replay        old text in each batch, displacing new text; with source "generated" the model writes it before an experience
              (as evaluated: after its anneal), so that no old text is stored (Shin et al. 2017; LAMOL, Sun et al. 2020)
anneal        what the branch replays in place of `replay`: other data in the anneal alone (OLMo 2, arXiv 2501.00656; MiniCPM,
              arXiv 2404.06395), of earlier experiences: no text is given before its experience. null: as the trunk
data, start   "union" with start "scratch": joint training on everything so far, the reference; "new" with "scratch": each
              domain alone from the first weights; "new" with "base": each alone from the end of the first experience
until         experiences that are learned at all, then the model is frozen; null for all
passes        several passes over a part of an experience instead of one over all of it (Guo et al. 2024); [1, 4]: four from the
              second experience on
rank          which part: null for the first, or that of the "lowest" (middle, highest) loss under a reference, the model
              after `pilot` steps on the new text (`ranked_subset.py`)
average       weights averaged along the trunk are evaluated instead of annealed ones
adapt         the rate follows the run: "plateau", "hypergradient" or "fedhyper" (`adaptive_rate.py`), or "auto_lrs"
              (`auto_lrs.py`); with options {plateau: {every, factor, patience}}; null: the schedule alone
pet           a parameter-efficient module is trained in place of the weights, `pet=lora`, ...; what the options above say of
              weights and of fresh ones then holds for its values
trainable     "half": in each later experience a random half of the matrices by kind and block is frozen (HFT, Hui et al.)

No published number is at this scale; what is to be expected is listed in the sweeps `conf/sweep/cpt_*.yaml`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

import numpy as np
from torch import Tensor, nn

from clbench.interfaces import Capabilities, Experience, Schedule, UserError
from clbench.models.pet import Factory
from clbench.models.pet_decoder import require_room
from clbench.models.pet_modules import none
from clbench.training import looks
from clbench.training.chosen_layers import option
from clbench.training.optimizer_state import Adam
from clbench.training.pretraining import adaptive_rate
from clbench.training.pretraining.adaptive_rate import Rate, watching
from clbench.training.pretraining.auto_lrs import AutoLrs
from clbench.training.pretraining.data_cursor import DataCursor
from clbench.training.pretraining.data_mixture import Mixture, Replay
from clbench.training.pretraining.half_finetuning import freeze_random_half
from clbench.training.pretraining.progress import Progress
from clbench.training.pretraining.ranked_subset import RANKS, Rank, RankedSubset
from clbench.training.pretraining.segments import AfterStep, PretrainRuntime, Segment, check_plan, train
from clbench.training.pretraining.trunk_and_branch import Trunk, check_trunk
from clbench.training.pretraining.tuned_pet import attach_pet
from clbench.training.pretraining.weight_averaging import Average, Averager
from clbench.training.pretraining.written_text import WrittenText
from clbench.training.schedules import constant
from clbench.training.state import collect, detached, restore
from clbench.training.steps import made

NO_REPLAY = Replay()
NO_AVERAGE = Average()
PARTS = ("model", "optimizer", "average", "trunk")
RATES: dict[str, Callable[..., Rate]] = {**adaptive_rate.KINDS, "auto_lrs": AutoLrs}
Shares = Callable[[Segment], np.ndarray]


class Pretrain:
    """Trains segment after segment. State: weights, optimiser, the trunk while a branch is evaluated, data cursor."""

    capabilities: ClassVar[Capabilities] = Capabilities(asks="loss", supports_parallel=True)

    def __init__(
        self,
        model: nn.Module,
        runtime: PretrainRuntime,
        *,
        lr: float = 3e-3,
        schedule: Schedule = constant,
        branch: float = 0.0,
        accounting: Literal["equal_compute", "equal_data"] = "equal_compute",
        boundary: Literal["keep", "reset", "reset_moments", "restore"] = "keep",
        replay: Replay = NO_REPLAY,
        anneal: Replay | None = None,
        start: Literal["trunk", "scratch", "base"] = "trunk",
        data: Literal["new", "union"] = "new",
        until: int | None = None,
        passes: int | Sequence[int] = 1,
        rank: Rank | None = None,
        pilot: int = 50,
        average: Average = NO_AVERAGE,
        trainable: Literal["all", "half"] = "all",
        adapt: Literal["plateau", "hypergradient", "fedhyper", "auto_lrs"] | Mapping[str, Any] | None = None,
        pet: Factory = none,
        betas: Sequence[float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        clip: float | None = 1.0,
    ):
        self.model, self.runtime, self.lr, self.schedule = model, runtime, lr, schedule
        self.branch, self.accounting, self.boundary, self.replay, self.anneal = branch, accounting, boundary, replay, anneal
        self.start, self.data, self.until, self.trainable = start, data, until, trainable
        self.passes: float | Sequence[int] = passes
        adam = {"betas": betas, "weight_decay": weight_decay, "clip": clip}
        self.ranked = RankedSubset(rank, pilot, lr, adam) if rank is not None else None
        self.pet = attach_pet(pet, model, runtime)
        self.tuned = model if self.pet is None else self.pet  # what is trained, saved and put back
        self.optimizer, self.cursor = Adam(self.tuned, betas, weight_decay, clip), DataCursor()
        self.average, self.adapt, self.adapts = Averager(self.tuned, average), _adapting(adapt), adapt
        initial = detached(self.tuned.state_dict()) if start == "scratch" else {}
        self.trunk = Trunk(self.tuned, self.optimizer, self.cursor, initial, based=start == "base")
        self.written = WrittenText(model, runtime) if replay.generated else None
        _check(self)

    @staticmethod
    def capabilities_of(
        data: str = "new", replay: Any = None, anneal: Any = None, rank: str | None = None, **options: Any
    ) -> Capabilities:
        """Joint training keeps all data, replay keeps some, unless the model writes it; that, and ranking, in one process."""
        active = [one for one in (replay, anneal) if isinstance(one, Mapping) and one.get("share", 0.0) != 0]
        written = any(one.get("source") == "generated" for one in active)
        kept = {"stores_all_data": data == "union", "stores_exemplars": data == "new" and bool(active) and not written}
        return Capabilities(asks="loss", supports_parallel=not written and rank is None, writes_text=written, **kept)

    def plan(self, experience: Experience) -> list[Segment]:
        """The segments of one experience."""
        k, text = experience.index, _text(experience.train)
        require_room(self.model, self.pet, text.context)
        if self.until is not None and k >= self.until:
            return []
        for replay in _replays(self):
            for old in experience.past if replay.active else ():
                replay.capacity(_text(old), len(experience.past))
        steps, total = _steps(self, k, text.steps)
        cut = steps if self.accounting == "equal_data" else round(total * (1 - self.branch))
        mixture = {"replay": dict(vars(self.replay)), "data": self.data, "passes": self.passes}
        mixture |= {} if self.adapt is None else {"adapt": self.adapts}
        mixture |= {} if self.ranked is None else {"rank": self.ranked.rank, "pilot": self.ranked.steps}
        start, policy = ("init" if self.start == "scratch" else self.start, self.boundary) if k else ("init", "new")
        before = _steps_before(self, k, text.steps)
        made = [Segment(k, "trunk", cast(Any, start), policy, 0, cut, total, self.lr, self.schedule, mixture, before)]
        if cut < total:
            check_trunk(made[0], self.branch)
            read = mixture if self.anneal is None else mixture | {"replay": dict(vars(self.anneal))}
            own = {"role": "branch", "start_from": "here", "optimizer": "keep", "mixture": read}
            made.append(replace(made[0], first=cut, last=total, **own))
        return made

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train the plan's segments."""
        return self.run(experience, self.plan(experience))

    def run(
        self,
        experience: Experience,
        plan: Sequence[Segment],
        shares: Shares | None = None,
        after_step: AfterStep | None = None,
        owner: Any = None,
    ) -> dict[str, float]:
        """Train segments, from where a killed run was; `shares(segment)` -> [S, K] takes the place of what `replay` says.

        `owner` is a learner that is built on this one: its state is saved, and its `objective`, if it has one, is minimised.
        """
        owner, runtime = owner or self, self.runtime
        text, objective = _text(experience.train), getattr(owner, "objective", None)
        check_plan(plan, runtime.processed_limit, text.batch * text.context)
        progress = Progress(runtime, plan)
        _set_to_train(self, experience)
        if progress.saved is not None:
            owner.load_state_dict(progress.saved)
        elif plan:
            _begin(self, plan[0], experience)
        then = self.average.before(after_step) if self.average else after_step
        if self.adapt is not None:
            self.adapt.model, then = self.tuned, watching(self.adapt, then)
        for i in range(progress.segment, len(plan)):
            segment = plan[i]
            table = _shares(self, segment, experience) if shares is None else shares(segment)
            mixture = _mixture(self, segment, experience, table)
            step = progress.step if i == progress.segment else segment.first

            def save(step: int, i: int = i) -> None:
                progress.save(i, step, owner.state_dict())

            train(runtime, self.model, self.optimizer, segment, mixture, step, save, then, self.adapt, objective)
            ends = segment.role == "trunk" and (i + 1 == len(plan) or plan[i + 1].role == "branch")
            self._advance(segment, mixture, trunk_ends=ends)
        if self.adapt is not None and plan:
            self.adapt.end(self.tuned)
        if self.written is not None:
            self.written.clear()
        return {"tokens": float(sum(s.last - s.first for s in plan) * text.batch * text.context)}

    def _advance(self, segment: Segment, mixture: Mixture, trunk_ends: bool) -> None:
        """Advance the data cursor; at the trunk's last step keep a copy of it, if something else is evaluated."""
        self.cursor.advance(mixture.used(segment.first, segment.last), mixture, segment.experience)
        if self.start == "base" and segment.experience == 0:
            self.trunk.base()
        if trunk_ends and (self.branch > 0 or self.average):
            looks.trunk_ended(self.model)
            self.trunk.keep()
            if self.average:
                self.average.evaluate()

    def loss(self, tokens: Tensor) -> Tensor:
        """Nats of every token after the first: tokens [B, L + 1] int64 -> [B, L]."""
        self.model.eval()
        self.tuned.eval()
        return self.model.loss(tokens)  # type: ignore[operator]

    def state_dict(self) -> dict[str, Any]:
        """Everything that goes on, and what is evaluated."""
        return {**collect(self, *_parts(self)), "places": self.cursor.state_dict()}  # a key of every fingerprint so far

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, {name: state[name] for name in _parts(self)})
        self.cursor.load_state_dict(state["places"])


def _parts(learner: Pretrain) -> tuple[str, ...]:
    """What a state is made of, by name."""
    named = PARTS if learner.pet is None else ("pet", *PARTS[1:])
    return (*named, *(name for name in ("adapt", "written", "ranked") if getattr(learner, name) is not None))


def _set_to_train(learner: Pretrain, experience: Experience) -> None:
    """Freeze what an experience does not train."""
    if learner.pet is None:
        half = learner.trainable == "half" and experience.index > 0
        freeze_random_half(learner.model, learner.runtime.key("rest") if half else None)
    learner.tuned.train()


def _begin(learner: Pretrain, segment: Segment, experience: Experience) -> None:
    """Weights, optimiser and data cursor at the first segment of an experience; before, write what will be replayed."""
    written, text = learner.written, _text(experience.train)
    if written is not None:
        if experience.index:
            number = learner.replay.sequences(segment.steps, text.batch)
            written.write(number, text.context, learner.runtime.key("write"))
        written.note(text)
    learner.trunk.begin(segment)
    if learner.ranked is not None:
        number = _read_size(learner, experience.index, text)
        learner.ranked.choose(learner.runtime, learner.model, learner.tuned, text, experience.index, number)
        _set_to_train(learner, experience)
    if learner.adapt is not None:
        learner.adapt.begin(learner.tuned)
    learner.cursor.begin(experience.index, replays_start_anew=learner.data == "union" or written is not None)
    old, seen = [_text(past) for past in experience.past], learner.cursor.seen[: len(experience.past)]
    held = [replay.held_bytes(old, seen) for replay in _replays(learner)]
    learner.runtime.ledger.replay_bytes = max(learner.runtime.ledger.replay_bytes, *held)


def _replay(learner: Pretrain, segment: Segment) -> Replay:
    """What a segment replays."""
    return _replays(learner)[-1 if segment.role == "branch" else 0]


def _old(learner: Pretrain, experience: Experience) -> list[Any]:
    """What is replayed: the texts of earlier experiences, or one that the model wrote."""
    written, text = learner.written, _text(experience.train)
    if written is None:
        return [_chosen(learner, past, i) for i, past in enumerate(experience.past)]
    return [written.text(text, n, text.steps, n, learner.runtime.key("written"))] if (n := len(written)) else []


def _shares(learner: Pretrain, segment: Segment, experience: Experience) -> np.ndarray:
    """Share of each source in each step of a segment [S, K], the new text last."""
    if learner.data == "union":
        sizes = np.array([len(text) for text in (*experience.past, experience.train)], np.float64)
        return np.repeat((sizes / sizes.sum())[None], segment.last - segment.first, 0)
    trained = learner.cursor.trained[: len(_old(learner, experience))]
    return _replay(learner, segment).table(segment.steps, trained)[segment.first : segment.last]


def _mixture(learner: Pretrain, segment: Segment, experience: Experience, shares_SK: np.ndarray) -> Mixture:
    new, old, cursor = _chosen(learner, experience.train, experience.index), _old(learner, experience), learner.cursor
    whole = learner.data == "union" or learner.written is not None
    return Mixture(
        new,
        old,
        _replay(learner, segment),
        shares_SK,
        first=segment.first,
        seen=[len(text) for text in old] if whole else cursor.seen[: len(old)],
        starts=cursor.starts(len(old)),
        carry=cursor.carry[-shares_SK.shape[1] :],
        size=_read_size(learner, experience.index, _text(experience.train)),
    )


def _chosen(learner: Pretrain, data: Any, index: int) -> Any:
    """The text of experience `index`, or what ranking chose of it."""
    return _text(data) if learner.ranked is None else learner.ranked.of(_text(data), index)


def _passes(learner: Pretrain, k: int) -> float:
    """Passes in experience `k`; the last of a list holds for all later ones."""
    given = learner.passes
    return given[min(k, len(given) - 1)] if isinstance(given, Sequence) else given


def _read_size(learner: Pretrain, k: int, text: Any) -> int:
    """How many sequences of the text of experience `k` are read at all."""
    return max(text.batch, int(len(text) // _passes(learner, k)))


def _replays(learner: Pretrain) -> list[Replay]:
    """What trunk and branch replay."""
    return [learner.replay] if learner.anneal is None else [learner.replay, learner.anneal]


def _adapting(adapt: Any) -> Rate | None:
    """What `learner.adapt` says; `UserError` for what it does not know."""
    if adapt is None:
        return None
    word, options = option(adapt)
    if word not in RATES:
        raise UserError(f"unknown learner.adapt={word}: choose {', '.join(RATES)} or null")
    return made(RATES[word], f"adapt {word}", options)  # type: ignore[arg-type]


def _steps(learner: Pretrain, k: int, given: int) -> tuple[int, int]:
    """Steps on the data of experience `k`, to which the stream gives `given`, and those of its trunk and branch together."""
    steps = given * (k + 1 if learner.data == "union" else 1)
    return steps, round(steps / (1 - learner.branch)) if learner.accounting == "equal_data" else steps


def _steps_before(learner: Pretrain, k: int, given: int) -> int:
    """Steps of the experiences before `k`; where the runtime does not name them, the stream gives each as many as this one."""
    stream = learner.runtime.stream_steps or (given,) * k
    return sum(_steps(learner, i, stream[i])[1] for i in range(k))


def _text(data: Any) -> Any:
    """The `TokenData` that an experience of a pre-training stream holds."""
    return data


def _check(learner: Pretrain) -> None:
    """Options that contradict each other, or have no effect, are errors."""
    joint, replays, branches = learner.data == "union", any(one.active for one in _replays(learner)), learner.branch > 0
    anneal, ranked = learner.anneal, learner.ranked
    given = learner.passes if isinstance(learner.passes, Sequence) else [learner.passes]
    most = max(given) if given and all(not isinstance(n, bool | str) and n >= 1 for n in given) else None
    averages, scratch, again = bool(learner.average), learner.start == "scratch", learner.start != "trunk"
    wrong = {
        "learner.branch must be at least 0 and below 1": not 0 <= learner.branch < 1,
        "learner.passes must be at least 1, or a list of such numbers": most is None,
        "learner.rank must be lowest, middle, highest or null, and learner.pilot at least 1": ranked is not None
        and (ranked.rank not in RANKS or ranked.steps < 1),
        "learner.rank chooses what is read several times: learner.passes must be above 1": ranked is not None and most == 1,
        "learner.rank is for parallel=none": ranked is not None and learner.runtime.group.kind != "none",
        "learner.until must be at least 1 or null": learner.until is not None and learner.until < 1,
        "learner.lr must be above 0": not learner.lr > 0,
        "learner.accounting=equal_data has no effect without a branch": learner.accounting == "equal_data" and not branches,
        "learner.anneal has no effect without a branch": anneal is not None and not branches,
        "learner.anneal replays stored text over the whole branch: source original, reshuffled or buffer, timing=all": (
            anneal is not None and (anneal.source == "generated" or anneal.timing != "all" or learner.replay.generated)
        ),
        "learner.boundary=restore needs a branch or an average: without one it would be keep": learner.boundary == "restore"
        and not (branches or averages),
        "learner.branch and learner.average exclude each other: both stand for the anneal": branches and averages,
        f"learner.start={learner.start} needs boundary=reset, no replay and no branch": again
        and (replays or branches or learner.boundary != "reset"),
        "learner.adapt needs learner.branch=0: an anneal is planned, a rate that follows the run is not": (
            learner.adapt is not None and branches
        ),
        "learner.replay.source=generated writes with the whole model's own weights: choose pet=none": (
            learner.written is not None and learner.pet is not None
        ),
        "learner.adapt does not go with an average, which stands for an anneal": learner.adapt is not None and averages,
        "learner.adapt reads whole gradients and weights, which parallel=fsdp has not: parallel=ddp": (
            learner.adapt is not None and learner.runtime.group.kind == "fsdp"
        ),
        "learner.trainable=half freezes other weights in each experience, which parallel=fsdp cannot: parallel=ddp": (
            learner.trainable == "half" and learner.runtime.group.kind == "fsdp"
        ),
        "learner.trainable=half is for the whole network: choose pet=none": learner.pet is not None
        and learner.trainable == "half",
        "learner.data=union is joint training: it needs start=scratch and passes=1": joint and (not scratch or (most or 1) > 1),
    }
    lines = [line for line, holds in wrong.items() if holds]
    if lines:
        raise UserError("\n".join(lines))
