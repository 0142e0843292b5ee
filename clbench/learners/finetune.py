"""Sequential fine-tuning: the lower bound of every table.

Every weight of the backbone and a growing linear head are trained on each experience in turn with cross-entropy; nothing
is done against forgetting. The result is almost entirely a choice of learning rate and masking, so both belong beside the
number: PILOT's `finetune` (lr 1e-3, softmax over the new classes) ends near 68 % on CIFAR-100 B0 Inc10 with ViT-B/16, while
papers that use lr 1e-2 over all seen classes quote 20 to 33 % (SLCA, ICCV 2023, figure: 33.61 %).

masking    "seen": softmax over all classes seen; "local": over the experience's classes; "batch": over those in the batch.
head       "single": one head over all classes; "per_task": one for every task, which answers for its task's classes alone and
           needs the task of a test sample. The head of a task is trained in that task only.
trainable  "half", "lisa": a random part of the network's blocks (`training/chosen_layers.py`).
refresh    forget a little before each step (`training/refresh.py`).
head_init  new rows of the head: "normal" (0, 0.02), or "kaiming_uniform", U(-sqrt(3 / D), sqrt(3 / D)), as PILOT's `finetune`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import grow, linear_head, scores
from clbench.models.pet import Factory
from clbench.models.pet_modules import none
from clbench.streams.images.data import shuffled
from clbench.training.fit import Recipe, fit
from clbench.training.losses import masked_cross_entropy
from clbench.training.optimizers import AVERAGES, Optimizer
from clbench.training.optimizers import check as check_optimizer
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore
from clbench.training.steps import RefreshOptions, Steps, Trainable, guided, is_guided, reads_again, whole


class Finetune:
    """Train everything on the newest experience. State: backbone and head.

    It does nothing at the end of an experience; that the optimiser's moments begin anew with the next one is the run's
    `optimizer_state`.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(needs_boundaries=False, anytime=True)

    @classmethod
    def capabilities_of(
        cls,
        *,
        head: str = "single",
        masking: str = "seen",
        trainable: Any = "all",
        refresh: Any = None,
        pet: Any = None,
        **options: Any,
    ) -> Capabilities:
        """A head for every task needs the task; what is done for each experience must be told where one ends."""
        can, again = cls.capabilities, reads_again(refresh) or is_guided(pet)
        told = can.needs_boundaries or masking == "local" or trainable != "all" or again
        random = can.needs_random_access or again
        return replace(can, needs_task_id=head == "per_task", needs_boundaries=told, needs_random_access=random)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        lr: float = 0.01,
        backbone_lr: float = 0.001,  # 0.01 destroys pre-trained ViTs
        masking: Literal["local", "seen", "batch"] = "seen",
        epochs: int | None = None,  # null: all that the scenario's budget allows
        batch_size: int = 128,
        momentum: float = 0.9,  # of sgd
        weight_decay: float = 5e-4,
        clip: float | None = None,
        accumulate: int = 1,
        schedule: Schedule = constant,
        pet: Factory = none,  # none: all weights; pet=adapter, lora, ... trains that module alone, at backbone_lr
        head_init: Literal["normal", "kaiming_uniform"] = "normal",
        head: Literal["single", "per_task"] = "single",  # per_task: for streams that disclose their tasks
        trainable: Trainable = "all",  # all | half | lisa: a random part of the blocks, see `training/chosen_layers.py`
        refresh: RefreshOptions = None,  # {variant: official | paper, ...}, see `training/refresh.py`
        optimizer: Optimizer = "sgd",  # see `training/optimizers.py`; prodigy and dadapt_adam want lr=1 backbone_lr=1
    ):
        self.model, self.runtime, self.masking = model, runtime, masking
        self.pet = pet(model, runtime)
        if self.pet and trainable != "all":
            raise UserError(f"learner.trainable={trainable} is for the whole network: choose pet=none")
        if refresh is not None and accumulate != 1:
            raise UserError(f"learner.refresh moves weights before each batch: learner.accumulate must be 1, got {accumulate}")
        self.stepping = Steps(runtime, refresh=refresh, trainable=whole(trainable))
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.lr, self.backbone_lr = lr, backbone_lr
        check_optimizer(optimizer, lr=lr, backbone_lr=backbone_lr)
        if optimizer in AVERAGES and (refresh is not None or (self.pet and self.pet.kind == "adalora")):
            raise UserError(f"learner.optimizer={optimizer} averages weights, which learner.refresh and pet=adalora set")
        self.recipe = Recipe(
            optimizer, momentum, weight_decay=weight_decay, schedule=schedule, clip=clip, accumulate=accumulate
        )
        self.head = linear_head(head, model.num_features, head_init).to(runtime.device)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Grow the head by the new classes and train on the experience's data alone."""
        grow(self.head, experience, lambda: self.runtime.generator("head"))
        (self.pet or self.model).train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            z = scores(self.head, self.model.features(batch), experience.task)
            return masked_cross_entropy(z, batch.y, self.masking, experience.classes)

        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        modules = {"model": self.model, "head": self.head} | ({"pet": self.pet} if self.pet else {})
        with self.stepping.around(self.model, modules, loss, new=loss) as (total, hooks):
            total, hooks = guided(self.pet, experience.train, total, hooks)
            groups = groups_of((self.pet or self.model, self.backbone_lr), (self.head, self.lr))
            log = fit(self.runtime, "train", self, groups, total, batches, self.recipe, **hooks)
        self.stepping.end(modules, experience, loss)
        return log

    def predict(self, batch: Batch) -> Tensor:
        """Logits over the classes seen so far [B, num_seen]."""
        self.model.eval()
        return scores(self.head, self.model.features(batch), batch.task)

    def state_dict(self) -> dict[str, Any]:
        """Backbone (or what is tuned of it) and head."""
        return collect(self, "pet" if self.pet else "model", "head", *self.stepping.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
