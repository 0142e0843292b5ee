"""DER: Dynamically Expandable Representation for Class Incremental Learning (CVPR 2021, arXiv 2103.16788), without pruning.

Every experience t adds a backbone f_t, a copy of the one before; earlier ones stand still, in evaluation mode.

    CE(h([f_0, .., f_t]), y) + auxiliary CE(a(f_t), y'),   y' = place of y among the experience's classes, 0 for any other class

on new and herded samples, shuffled together; h sees all features and classes, a is thrown away. The first experience has the
first term alone. Then the classifier is balanced, for it has seen few samples of old classes:

balance     "weight_align" (PyCIL): new classes' rows times mean |w_old| / mean |w_new|. "finetune" (release): the classifier
            starts anew and trains for `balance_epochs` at `balance_lr` on as many samples of every class, logits / 5. "none"
classifier  "kept" (PyCIL): new rows and columns beside the trained ones. "fresh" (release): all rows start anew, and once more
            after `reset` of the steps (10 of 170 epochs)
The release is balance=finetune classifier=fresh weight_decay=5e-4, 170 epochs, x 0.1 after 100 and 120; with half of the
classes first 30 epochs of fine-tuning at 0.1. PyCIL has 200 epochs first, x 0.1 after 60, 120, 170.

Deviations: the masks that prune channels are in the paper alone and are not built. The release warms its rate up before the
reset; here the schedule says. Fine-tuning is on features of plain images: they are computed once and count as no visits. A
class that comes back keeps its old row's length. Not `derpp`, which is DER++ (dark experience replay).
Published (release, CIFAR-100, ResNet-18, without pruning; average / last): B0 5 / 10 / 20 / 50 experiences 76.80 / 68.72,
75.36 / 65.22, 74.09 / 62.49, 72.41 / 59.08 %; half of the classes first, then 2 / 5 / 10: 74.61 / 68.44, 73.21 / 66.26,
72.81 / 65.64 %. PyCIL, ResNet-32 (read off its plot, +- 1): B0 10 experiences last 58.5 %.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, Place, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.expansion import Columns, WideHead
from clbench.training.expansion import expansion_loss, grow_heads, refit
from clbench.training.features import extract
from clbench.training.fit import Recipe, fit
from clbench.training.memory import Rehearsed, allowed_memory
from clbench.training.runtime import Runtime
from clbench.training.schedules import multistep
from clbench.training.state import collect, groups_of, restore

DROPS: Schedule = partial(multistep, milestones=(0.4706, 0.7059, 0.8824))  # after 80, 120, 150 of 170 epochs


class DerExpand:
    """State: the columns, the classifier, the auxiliary head (empty between experiences), the memory."""

    capabilities: ClassVar[Capabilities] = Capabilities(stores_exemplars=True, needs_random_access=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        memory: int | None = None,  # samples; null: what the scenario's budget allows
        balance: Literal["weight_align", "finetune", "none"] = "weight_align",
        classifier: Literal["kept", "fresh"] = "kept",
        auxiliary: float = 1.0,  # weight of its loss
        lr: float = 0.1,  # of all parts
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 2e-4,
        first_weight_decay: float = 5e-4,  # in the first experience
        schedule: Schedule = DROPS,
        balance_lr: float = 0.05,  # of finetune
        balance_epochs: int = 50,  # of finetune
        reset: float = 0.06,  # of fresh: share of the steps
    ):
        if balance not in ("weight_align", "finetune", "none"):
            raise UserError(f"unknown learner.balance={balance}: choose weight_align, finetune or none")
        if classifier not in ("kept", "fresh"):
            raise UserError(f"unknown learner.classifier={classifier}: choose kept or fresh")
        if auxiliary < 0 or balance_epochs < 1 or not 0 <= reset < 1:
            raise UserError(
                f"learner.auxiliary={auxiliary} must be at least 0, learner.balance_epochs={balance_epochs} at least 1, "
                f"learner.reset={reset:g} from 0 to below 1"
            )
        self.runtime, self.balance, self.fresh, self.weight = runtime, balance, classifier == "fresh", auxiliary
        self.lr, self.epochs, self.batch_size = lr, runtime.epochs(epochs), batch_size
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.first_weight_decay, self.reset = first_weight_decay, reset
        self.refit: dict[str, Any] = {"lr": balance_lr, "epochs": balance_epochs}
        self.width, self.columns = model.num_features, Columns(model)
        self.head, self.auxiliary = WideHead().to(runtime.device), WideHead().to(runtime.device)
        self.memory = allowed_memory(runtime, "herding", memory)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Add a column, train it with the classifier, balance the classifier, herd."""
        train: Any = experience.train
        known = experience.num_seen - len(experience.new_classes)
        if experience.index:
            self.columns.add()
        count = len(self.columns.nets)
        grow_heads(self.runtime, experience, self.head, self.auxiliary, count * self.width, self.width)
        log = self._train(experience)
        self.auxiliary.clear()
        features, y = extract(self.runtime, self.columns, self.memory.candidates(train), self.batch_size)
        if experience.index and self.balance == "finetune":
            options = {"batch_size": self.batch_size, "weight_decay": self.recipe.weight_decay, **self.refit}
            log |= refit(self.runtime, self, self.head, features, y, **options)
        elif known and experience.new_classes and self.balance == "weight_align":
            log["factor"] = self.head.align(known)
        self.memory.update(train, features)
        return {**log, "columns": float(count), "exemplars": float(len(self.memory))}

    def _train(self, experience: Experience) -> dict[str, float]:
        """The newest column, the classifier and the auxiliary head, on new and stored samples."""
        train: Any = experience.train
        first = experience.index == 0
        weight = 0.0 if first else self.weight
        if self.fresh:
            self.head.redraw(self.runtime.generator("fresh"))
        self.columns.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            return expansion_loss(self.columns.features(batch), batch.y, self.head, self.auxiliary, experience.classes, weight)

        def start_again(place: Place) -> None:
            if self.fresh and place.step == round(self.reset * place.steps) > 0:
                self.head.redraw(self.runtime.generator("reset"))

        batches = Rehearsed(train, self.memory.data(train), self.batch_size, self.epochs, self.runtime.key("train"))
        parts = (self.columns.newest, self.head, *((self.auxiliary,) if weight else ()))
        recipe = replace(self.recipe, weight_decay=self.first_weight_decay) if first else self.recipe
        groups = groups_of(*((part, self.lr) for part in parts))
        return fit(self.runtime, "train", self, groups, loss, batches, recipe, at_place=start_again)

    def predict(self, batch: Batch) -> Tensor:
        """Logits over the classes seen so far [B, num_seen]."""
        self.columns.eval()
        return self.head(self.columns.features(batch))

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "columns", "head", "auxiliary", "memory")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
