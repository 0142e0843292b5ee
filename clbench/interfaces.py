"""The nouns of clbench, and the roles that a plug-in can play. Imports no torch.

A *scenario* is a stream of *experiences* with *evaluation sets* and a *budget*. A *learner* learns the experiences one after
another. Only the runner sees learners and evaluation sets together.

Legend for shapes in this package: B batch, N samples, C channels, H W image, D features, K classes seen so far, T experiences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class UserError(ValueError):
    """Something the user can mend: shown as one line, without a traceback."""


class BudgetExceeded(UserError):
    """A learner used more than the scenario allows."""


RULES = {  # fields of `Budget` that limit a learner which is asked so
    "predict": ("epochs", "sample_visits", "exemplars", "exemplar_bytes", "stored_bytes"),
    "loss": ("processed", "exemplar_bytes"),
    "logits": ("exemplar_bytes", "stored_bytes"),
}
RULES["next_token"] = RULES["predict"]
Asks = Literal["predict", "loss", "logits", "next_token"]  # what a stream asks of a learner, and the method that answers


@dataclass(frozen=True)
class Budget:
    """The rules of the game that limit a learner. `None` means unlimited; negative values raise `UserError`.

    epochs          passes over an experience's training data (a learner that is asked for "all" of them uses this number)
    sample_visits   images that all `fit` calls of one experience may visit, new and replayed ones together
    exemplars       raw samples of earlier experiences that a learner may hold
    exemplar_bytes  the same in bytes of the stored arrays
    stored_bytes    everything else that a learner holds between experiences: weights, statistics, prototypes
    in_order        an experience's samples come once, in stream order; what was not kept is gone. Needs epochs=1
    processed       tokens (of autoencoders: images) trained on in one experience: trunk, branch and replay together
    """

    epochs: int = 1
    sample_visits: int | None = None
    exemplars: int | None = None
    exemplar_bytes: int | None = None
    stored_bytes: int | None = None
    in_order: bool = False
    processed: int | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "in_order":
                if not isinstance(value, bool):
                    raise UserError(f"budget.in_order must be true or false, got {value!r}")
                continue
            if value is None and item.name != "epochs":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise UserError(f"budget.{item.name} must be a whole number, got {value!r}")
            if value < 0 or (item.name == "epochs" and value < 1):
                least = 1 if item.name == "epochs" else 0
                raise UserError(f"budget.{item.name} must be at least {least}, got {value}")
        if self.in_order and self.epochs != 1:
            raise UserError(f"budget.in_order=true means one pass: budget.epochs must be 1, got {self.epochs}")

    def rules(self, asks: Asks = "predict") -> dict[str, Any]:
        """The fields as manifests and records hold them: those of `RULES`, and `in_order` where it is true."""
        return {name: getattr(self, name) for name in RULES[asks]} | ({"in_order": True} if self.in_order else {})


@dataclass(frozen=True)
class Capabilities:
    """What a learner needs and can do. Checked against the scenario before any image is read.

    asks                what it can answer: class scores ("predict"), a loss per sample ("loss"), as an editor of a language
                        model scores of every next token ("logits"), as a learner of text tasks the same of lines of a task
                        ("next_token")
    needs_task_id       predicts only where the task of a test sample is disclosed
    needs_boundaries    must be told where an experience ends
    needs_new_classes   every experience must bring classes of its own (no domain-incremental streams)
    needs_disjoint_classes  no experience may bring a class of an earlier one back, beside new ones either
    needs_pretrained    makes no sense on random weights
    needs_passes        the least number of passes over an experience's data (2: cannot run in a single-pass stream)
    needs_random_access asks for samples of an experience by row, or again after training (memories filled at its end,
                        statistics after training): cannot run where samples come once, in stream order
    needs_labels        learns from labels: cannot run where an experience has none
    stores_exemplars    keeps raw samples, within the scenario's exemplar budget; with `adapts_at_test` also test images
    stores_all_data     keeps every sample: a reference (upper bound), not a contender; exempt from the sample budgets
    transductive        predictions may depend on the other samples of a test batch: marks the record
    adapts_at_test      changes its state while predicting: marks the record (without these two, small test sets share a batch)
    supports_parallel   one model may be trained by several processes (torchrun)
    anytime             can be asked inside `learn`, after any step of `fit`: needed where a stream has looks
    trains              has weights that `fit` trains: needed where a run keeps the optimiser's moments (optimizer_state)
    needs_target        chooses what to train on by samples of a target
    writes_text         is trained on text that its model writes: needs a stream of tokens, and a decoder
    needs_one_domain    every experience must be of the same domain
    """

    asks: Asks = "predict"
    needs_task_id: bool = False
    needs_boundaries: bool = True
    needs_new_classes: bool = False
    needs_disjoint_classes: bool = False
    needs_pretrained: bool = False
    needs_passes: int = 1
    needs_random_access: bool = False
    needs_labels: bool = True
    stores_exemplars: bool = False
    stores_all_data: bool = False
    transductive: bool = False
    adapts_at_test: bool = False
    supports_parallel: bool = False
    anytime: bool = False
    trains: bool = True
    writes_text: bool = False
    needs_target: bool = False
    needs_one_domain: bool = False


@dataclass(frozen=True)
class Place:
    """Where an optimisation step stands, all 0-based: `step` of `steps` in this call.

    global_step  steps that the run has taken before this one in calls of the same name (`fit(runtime, name, ...)`), in this and
                 earlier experiences: the alignment after a training does not move the schedule of the next training. In
                 pre-training: steps of the earlier experiences, whatever their lengths, branches included, and `step`
    """

    experience: int
    step: int
    steps: int
    global_step: int


class Schedule(Protocol):
    """A pure function of the place: the multiplier of every base learning rate."""

    def __call__(self, place: Place) -> float:
        """The multiplier at `place`."""
        ...


class Batch(Protocol):
    """Some samples. `x` is decoded, augmented and moved to the device when it is first asked for; `UserError` if that is after
    the end of the experience.

    ids   [B] int64, stable over runs and machines; at test time numbers that say nothing of a sample's place or class
    y     [B] int64, classes renumbered by order of appearance; None at test time
    task  the task of all samples where the scenario discloses it, else None
    x     [B, C, H, W] float, normalised as the model wants it
    begins  at test time: these are the first samples of an evaluation set
    """

    ids: Tensor
    y: Tensor | None
    task: int | None
    begins: bool

    @property
    def x(self) -> Tensor: ...

    def __len__(self) -> int: ...


class Data(Protocol):
    """The labelled samples of one experience. `y` is [N] int64 (renumbered; -1 without a label), `ids` [N] int64, both NumPy.

    Only these can be read, and only until the experience ends: then this, its slices and batches raise `UserError`.
    Where the budget says `in_order`, samples are had once, front to back: `batch` answers for the next rows, `raw` for rows
    of the batch at hand, and `y` and `ids` come with the batches alone. `streams.images.streamed` makes such batches.
    """

    ids: np.ndarray
    y: np.ndarray

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int] | np.ndarray, key: int | None = None) -> Batch:
        """Samples by row; `key` chooses the random augmentation, None gives the test transform."""
        ...

    def test_batches(self, batch_size: int) -> Iterator[Batch]:
        """All samples in order under the test transform."""
        ...

    def raw(self, rows: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Stored pixels, uint8 [H, W, 3] each: what an exemplar memory may keep."""
        ...


@dataclass(frozen=True)
class Experience:
    """One step of the stream, as a learner sees it. Classes are renumbered by order of first appearance.

    classes           present here; `new_classes` are those never seen before
    original_classes  the data set's own ids, in the order of `classes`
    num_seen          classes seen so far, this experience included: predictions have this width
    task              disclosed only in task-incremental streams
    past              data of earlier experiences, for learners that declare `stores_all_data`; empty for all others
    target            samples of what the learner is to become good at, no training samples; None where a stream has none
    """

    index: int
    name: str
    train: Data
    classes: tuple[int, ...]
    new_classes: tuple[int, ...]
    original_classes: tuple[int, ...]
    num_seen: int
    task: int | None
    budget: Budget
    past: tuple[Data, ...] = ()
    target: Data | None = None


class EvaluationSet(Protocol):
    """One evaluation set while a learner is asked about it. `classes` are renumbered; `task` is None unless it is disclosed."""

    name: str
    classes: tuple[int, ...]
    num_seen: int
    task: int | None

    def answers(self, learner: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Scores [B, num_seen] float32 and labels [B] int64 of a batch each, on the CPU. All evaluators share one pass."""
        ...

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The samples without labels, as `predict` is given them; each can be decoded until the next is asked for."""
        ...


class Evaluator(Protocol):
    """What is counted of a learner's answers on one evaluation set. `name` stands in the record and before its columns.

    The sums are additive over samples, whole numbers where they count, and hold `n`, the number of samples. An attribute `asks`
    says what it asks of a learner where that is not "predict": it then fits streams that ask the same.
    """

    name: str

    def __call__(self, learner: Any, data: EvaluationSet) -> Mapping[str, int | float]:
        """Named sums over the samples of `data`."""
        ...


@dataclass(frozen=True)
class Facts:
    """What the runner knows of a scenario before any image is read; compared with `Capabilities`."""

    name: str
    asks: Asks
    discloses_task: bool
    has_boundaries: bool
    every_experience_has_new_classes: bool
    budget: Budget = field(default_factory=Budget)
    every_experience_has_labels: bool = True
    has_looks: bool = False
    every_class_comes_once: bool = True
    one_domain: bool = False
    has_text: bool = False
    has_target: bool = False


@runtime_checkable
class Learner(Protocol):
    """A method. Built as `Learner(model, runtime, **hyperparameters)`; it never reads a configuration or an evaluation set.

    `learn` trains on one experience and returns a few numbers for the log. `predict` returns scores [B, num_seen], or a
    mapping of names to such scores whose first entry is the answer. `load_state_dict(state_dict())` restores everything
    that later calls depend on, in place where shapes agree. Only plain containers, numbers, strings and tensors.
    """

    capabilities: ClassVar[Capabilities]

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train on one experience -> numbers for the log."""
        ...

    def predict(self, batch: Batch) -> Tensor | Mapping[str, Tensor]:
        """Scores [B, num_seen], or several heads by name, the answer first."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that later calls depend on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it, in place where shapes agree."""
        ...


def declared(learner: Any, node: Mapping[str, Any]) -> Capabilities:
    """The capabilities of a learner class under the options of its configuration node; `UserError` where it has none.

    Where options change them, the class has a static method `capabilities_of(**options)`, which is asked instead.
    """
    found = getattr(learner, "capabilities", None)
    if callable(ask := getattr(learner, "capabilities_of", None)):
        found = ask(**{name: value for name, value in node.items() if not name.startswith("_")})
    if not isinstance(found, Capabilities):
        raise UserError(f"{node['_target_']} declares no `capabilities = Capabilities(...)`")
    return found


def mismatch(learner: str, can: Capabilities, facts: Facts, pretrained: bool) -> str | None:
    """Say why a learner cannot run in a scenario, or None. Names both and the capability."""
    reasons = {
        f"asks={can.asks}, the scenario asks {facts.asks}": can.asks != facts.asks,
        "needs_task_id, and the scenario does not disclose tasks": can.needs_task_id and not facts.discloses_task,
        "needs_boundaries, and the scenario has none": can.needs_boundaries and not facts.has_boundaries,
        "needs_new_classes, and some experience brings none": can.needs_new_classes
        and not facts.every_experience_has_new_classes,
        "needs_disjoint_classes, and some experience brings classes of an earlier one": can.needs_disjoint_classes
        and not facts.every_class_comes_once,
        f"needs_passes={can.needs_passes}, and the budget is {facts.budget.epochs} epoch(s)": can.needs_passes
        > facts.budget.epochs,
        "needs_random_access, and an experience's samples come once, in stream order": can.needs_random_access
        and facts.budget.in_order
        and not can.stores_all_data,
        "needs_labels, and some experience has none": can.needs_labels and not facts.every_experience_has_labels,
        "writes_text, and the scenario is not made of tokens": can.writes_text and not facts.has_text,
        "needs_target, and the scenario has no target lines": can.needs_target and not facts.has_target,
        "needs_one_domain, and experiences are of several": can.needs_one_domain and not facts.one_domain,
        "it cannot be asked inside an experience (anytime), and the stream has looks": facts.has_looks and not can.anytime,
        "needs_pretrained, and the model has random weights": can.needs_pretrained and not pretrained,
        "stores_exemplars, and the budget allows none": can.stores_exemplars
        and (facts.budget.exemplars == 0 or facts.budget.exemplar_bytes == 0),
    }
    for reason, holds in reasons.items():
        if holds:
            return f"learner {learner} does not fit scenario {facts.name}: {reason}"
    return None
