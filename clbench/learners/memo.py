"""MEMO: a model or 603 exemplars, towards memory-efficient class-incremental learning (ICLR 2023, arXiv 2205.13218).

As in PyCIL. `der_expand` copies the whole network in every experience; here early layers, which change little, are shared, and
only the last stage is copied:

    features = [s_0(g(x)), .., s_t(g(x))]     g shared, s_t a copy of s_(t-1); s_0 .. s_(t-1) stand still, in evaluation mode

Loss, classifier and weight alignment are those of `der_expand`: cross-entropy over all classes + auxiliary cross-entropy of s_t
alone (own classes and "any other"), then the new classes' rows times mean |w_old| / mean |w_new|.

train_base  true (PyCIL): g trains in every experience. false (PILOT): in the first one alone, so old features never move
Last stage: of ResNets (of `resnet32` 353,664 of 466,256 parameters; without convolutions in shortcuts, as in PyCIL, 351,488 of
463,504); of ViTs the last block and its norm; of `convnet` the last convolutions and the hidden units; of an `mlp` the last
layer. Where ViTs, `convnet` and `mlp` are split is a choice.

Fair comparisons count weights and exemplars together (`budget.stored_bytes`, `budget.exemplar_bytes`): a ResNet-32 has the
bytes of 603 images of CIFAR, and at 10 experiences `der_expand` with 2,000 exemplars equals this with 3,312 and one network
with 7,431.
Deviation: one schedule for all experiences (PyCIL: 200 epochs first, x 0.1 after 60, 120, 170). Published: none read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.learners.der_expand import DROPS
from clbench.models.backbone import Backbone
from clbench.models.expansion import WideHead, fork_last_stage
from clbench.training.expansion import expansion_loss, grow_heads
from clbench.training.features import extract
from clbench.training.fit import Recipe, fit
from clbench.training.memory import Rehearsed, allowed_memory
from clbench.training.runtime import Runtime
from clbench.training.state import collect, groups_of, restore


class Memo:
    """State: the forked network, the classifier, the auxiliary head (empty between experiences), the memory."""

    capabilities: ClassVar[Capabilities] = Capabilities(stores_exemplars=True, needs_random_access=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        memory: int | None = None,  # samples; null: what the scenario's budget allows
        train_base: bool = True,  # the shared layers, after the first experience
        balance: Literal["weight_align", "none"] = "weight_align",
        auxiliary: float = 1.0,  # weight of its loss
        lr: float = 0.1,  # of all parts
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 2e-4,
        first_weight_decay: float = 5e-4,  # in the first experience
        schedule: Schedule = DROPS,
    ):
        if balance not in ("weight_align", "none"):
            raise UserError(f"unknown learner.balance={balance}: choose weight_align or none")
        if auxiliary < 0:
            raise UserError(f"learner.auxiliary={auxiliary} must be at least 0")
        self.model, self.runtime, self.train_base = model, runtime, train_base
        self.align, self.weight = balance == "weight_align", auxiliary
        self.lr, self.epochs, self.batch_size = lr, runtime.epochs(epochs), batch_size
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.first_weight_decay = first_weight_decay
        self.fork = fork_last_stage(model)
        self.head, self.auxiliary = WideHead().to(runtime.device), WideHead().to(runtime.device)
        self.memory = allowed_memory(runtime, "herding", memory)

    @property
    def parts(self) -> int:
        """Copies of the last stage."""
        return len(self.fork.parts)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Copy the last stage, train the copy with the classifier, align, herd."""
        train: Any = experience.train
        known = experience.num_seen - len(experience.new_classes)
        if experience.index:
            self.fork.resize(self.parts + 1)
        width = self.model.num_features
        grow_heads(self.runtime, experience, self.head, self.auxiliary, self.parts * width, width)
        log = self._train(experience)
        self.auxiliary.clear()
        if known and experience.new_classes and self.align:
            log["factor"] = self.head.align(known)
        features, _ = extract(self.runtime, self.model, self.memory.candidates(train), self.batch_size)
        self.memory.update(train, features)
        return {**log, "parts": float(self.parts), "exemplars": float(len(self.memory))}

    def _train(self, experience: Experience) -> dict[str, float]:
        """The newest part, the classifier, the auxiliary head and perhaps the shared layers, on new and stored samples."""
        train: Any = experience.train
        first = experience.index == 0
        weight = 0.0 if first else self.weight
        self._choose(first or self.train_base)

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            return expansion_loss(self.model.features(batch), batch.y, self.head, self.auxiliary, experience.classes, weight)

        batches = Rehearsed(train, self.memory.data(train), self.batch_size, self.epochs, self.runtime.key("train"))
        parts = (self.model, self.head, *((self.auxiliary,) if weight else ()))
        recipe = replace(self.recipe, weight_decay=self.first_weight_decay) if first else self.recipe
        return fit(self.runtime, "train", self, groups_of(*((part, self.lr) for part in parts)), loss, batches, recipe)

    def _choose(self, base: bool) -> None:
        """What trains, and is in training mode: the newest part, and the shared layers where `base`."""
        self.model.requires_grad_(base).train(base)
        self.fork.requires_grad_(False)
        self.fork.parts[-1].requires_grad_(True).train()

    def predict(self, batch: Batch) -> Tensor:
        """Logits over the classes seen so far [B, num_seen]."""
        self.model.eval()
        return self.head(self.model.features(batch))

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "parts", "model", "head", "auxiliary", "memory")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it; copies that are missing are made first, those too many go."""
        self.fork.resize(state["parts"])
        restore(self, {name: value for name, value in state.items() if name != "parts"})
