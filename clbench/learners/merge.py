"""Merging between experiences: each trains a copy of the network, and an operator makes one network of all copies.

After experience t there are theta_0 (the network before the first experience) and theta_1 .. theta_t; what answers is
theta* = operator(theta_0; theta_1 .. theta_t), see `training/merging.py` for each operator's form and paper:
    operator         amount (default)                     scale (default)
    average          -                                    -
    task_arithmetic  -                                    of the sum of task vectors (0.3)
    ties             share of entries that is kept (0.2)  of the merged vector (1)
    dare             share of entries that is dropped (0.5); their average then
    breadcrumbs      share that is left (0.9); of the largest 1 % go as well     of the sum (0.3)
    fisher           -; F of batches, each experience's divided by its norm      -
    model_stock      -                                    -
    pcb              share of entries that compete (0.1)  of the merged vector (1)
    iso_c            -                                    of the merged matrix (1)
    slerp            share of the newest (1 / (t + 1)), folded from one experience to the next   -
    ema              share of what was there before (0.5), folded likewise                      -

start  "initial" (default): every experience starts from theta_0, so that task vectors are independent; "merged": from theta*
With pet=lora, adapter, ... only the module is trained and merged: factors of low-rank terms are then merged one by one, which
is not the merge of their products. Rows of the classifier belong to the classes of one experience: they are trained by a
softmax over these (`masking` local) and joined, never averaged; a class that comes again keeps its rows.
Running statistics of BatchNorm are the newest ones.
A choice of this file: the operators come from merging models at the end; here they are used after every experience, on all
task vectors so far. Weights of every experience are kept (slerp and ema keep one network). Published number: none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead
from clbench.models.pet import Factory, unguided
from clbench.models.pet_modules import none
from clbench.streams.images.data import shuffled
from clbench.training import merging
from clbench.training.fisher import kept, moved, sum_per_batch, trained
from clbench.training.fit import Recipe, fit
from clbench.training.losses import masked_cross_entropy
from clbench.training.merging import State
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore

Operator = Literal[
    "average", "task_arithmetic", "ties", "dare", "breadcrumbs", "fisher", "model_stock", "pcb", "iso_c", "slerp", "ema"
]
AMOUNT: dict[str, float | None] = {"ties": 0.2, "dare": 0.5, "breadcrumbs": 0.9, "pcb": 0.1, "slerp": None, "ema": 0.5}
SCALE = {"task_arithmetic": 0.3, "ties": 1.0, "breadcrumbs": 0.3, "pcb": 1.0, "iso_c": 1.0}
FOLDED = ("slerp", "ema")
TOP = 0.01  # of the largest entries, which breadcrumbs drop


class Merge:
    """State: the network (or module) that answers, the classifier, theta_0, the weights of every experience."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_new_classes=True)

    @classmethod
    def capabilities_of(cls, *, operator: str = "average", **options: Any) -> Capabilities:
        """Fisher information reads the samples again."""
        return replace(cls.capabilities, needs_random_access=operator == "fisher")

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        operator: Operator = "average",
        amount: float | None = None,  # a share between 0 and 1, see above; null: the operator's default
        scale: float | None = None,  # see above; null: the operator's default
        start: Literal["initial", "merged"] = "initial",
        pet: Factory = none,
        lr: float = 0.01,
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = constant,
    ):
        for name, value, known in (("operator", operator, get_args(Operator)), ("start", start, ("initial", "merged"))):
            if value not in known:
                raise UserError(f"unknown learner.{name}={value}: choose {', '.join(known)}")
        for name, value, own in (("amount", amount, AMOUNT), ("scale", scale, SCALE)):
            if value is not None and operator not in own:
                raise UserError(f"learner.{name}={value} has no effect with learner.operator={operator}")
        if (amount is not None and not 0 <= amount <= 1) or (operator == "dare" and amount == 1):
            raise UserError(f"learner.amount must be a share between 0 and 1, got {amount}")
        self.model, self.runtime, self.operator, self.start = model, runtime, operator, start
        self.amount = AMOUNT.get(operator) if amount is None else amount
        self.scale = SCALE.get(operator, 1.0) if scale is None else scale
        self.pet = unguided(pet(model, runtime), "merge")
        self.lr, self.backbone_lr = lr, backbone_lr
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.head = LinearHead(model.num_features).to(runtime.device)
        self.first = kept(self.pet or model)
        self.bank: list[State] = []
        self.information: list[State] = []

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train a copy, keep it, merge."""
        tuned = self.pet or self.model
        before = kept(tuned)
        if self.start == "initial":
            self._put(self.first)
        self.head.grow(len(experience.new_classes), self.runtime.generator("head"))
        tuned.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            z = self.head(self.model.features(batch))
            return masked_cross_entropy(z, batch.y, "local", experience.classes)

        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        groups = groups_of((tuned, self.backbone_lr), (self.head.blocks[-1], self.lr))
        log = fit(self.runtime, "train", self, groups, loss, batches, self.recipe)
        new = kept(tuned)
        if self.operator == "fisher":
            self.information = [*self.information, self._fisher(experience, loss)]
        if self.operator in FOLDED:
            merged = self._folded(before, new, experience.index) if experience.index else new
        else:
            self.bank = [*self.bank, new]
            merged = self.merged()
        self._put(merged)
        moved_by = torch.stack([(merged[name] - new[name]).float().square().sum() for name in new]).sum().sqrt()
        return {**log, "merge_distance": float(moved_by)}

    def _folded(self, before: State, new: State, index: int) -> State:
        if self.operator == "ema":
            assert self.amount is not None
            return merging.moving_average(before, new, self.amount)
        return merging.slerp(before, new, 1 / (index + 1) if self.amount is None else self.amount)

    def merged(self) -> State:
        """What the operator makes of all experiences."""
        base, bank, amount = self.first, self.bank, self.amount or 0.0
        if self.operator == "dare":
            draws = [self.runtime.generator("dare", t) for t in range(len(bank))]
            return merging.average([merging.dropped(base, s, amount, g) for s, g in zip(bank, draws, strict=True)])
        made = {
            "average": lambda: merging.average(bank),
            "task_arithmetic": lambda: merging.task_arithmetic(base, bank, self.scale),
            "ties": lambda: merging.ties(base, bank, self.scale, amount),
            "breadcrumbs": lambda: merging.breadcrumbs(base, bank, self.scale, amount, TOP),
            "fisher": lambda: merging.fisher(bank, self.information),
            "model_stock": lambda: merging.model_stock(base, bank),
            "pcb": lambda: merging.pcb(base, bank, self.scale, amount),
            "iso_c": lambda: merging.iso_c(base, bank, self.scale),
        }
        return made[self.operator]()

    def _fisher(self, experience: Experience, loss: Any) -> State:
        """Squared gradients of batches, summed, divided by their norm over all weights."""
        batches = shuffled(experience.train, self.batch_size, 1, self.runtime.key("fisher"))
        self.model.eval()
        with self.runtime.phase("fisher"), self.model.in_fp32():
            total = sum_per_batch(self.pet or self.model, loss, batches, self.runtime.check_stop)
        norm = torch.cat([value.double().flatten() for value in total.values()]).norm().clamp_min(1e-300)
        return {name: (value.double() / norm).to(value.dtype) for name, value in total.items()}

    @torch.no_grad()
    def _put(self, state: State) -> None:
        """Into the network (or module), in place."""
        for name, p in trained(self.pet or self.model).items():
            p.copy_(state[name])

    def predict(self, batch: Batch) -> Tensor:
        """Logits over the classes seen so far [B, num_seen]."""
        self.model.eval()
        return self.head(self.model.features(batch))

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "pet" if self.pet else "model", "head", "first", "bank", "information")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
        device = self.runtime.device
        self.first = moved(self.first, device) or {}
        self.bank, self.information = ([moved(s, device) or {} for s in some] for some in (self.bank, self.information))
