"""PackNet: several tasks in one network by iterative pruning (Mallya & Lazebnik, CVPR 2018, arXiv 1711.05769). The task of a
sample must be disclosed, at test time too.

Every weight of a Linear or convolutional layer has an owner: a task, or nobody. A new task
  1. takes all that nobody owns and trains it, beside the frozen weights of earlier tasks, which it uses;
  2. gives back, layer by layer, the share `prune` (`prune_first` in the first task) of its weights with the least magnitude:
     they become 0;
  3. trains the rest again, at `retrain_lr`, in the last `retrain` of its epochs.
A sample of task t is answered with the weights of tasks up to t, the others 0, and the head of t. Frozen weights are put back
after every step, so momentum and Adam cannot move them: answers for a task stay the same to the last bit.

Biases, normalisation and tokens are trained in the first task alone, and BatchNorm keeps its statistics (the release: frozen
after ImageNet, which is its first task). A share is rounded to whole weights; of equal magnitudes the first go.
Deviations: the last task gives weights back too, since nobody says that it is the last; no checkpoint is chosen on test data.
A task that comes back trains further where it is the newest, and else its head alone: later tasks use its weights.
Constants: the release's (SGD 0.9, no weight decay, 1e-3 then 1e-4; 0.5 of ImageNet's weights, then 0.75; 20 + 10 epochs).
Published, read in its README (VGG-16, error): CUBS 22.56, Cars 17.09, Flowers 11.07 %.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Place, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import TaskHead
from clbench.models.units import LAYERS, keep_statistics
from clbench.streams.images.data import shuffled
from clbench.training.fit import Recipe, fit
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore


class PackNet:
    """State: backbone, a head for each task, the owner of every weight (uint8: 0 nobody, else 1 + the task's place)."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_task_id=True, needs_passes=2)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        prune_first: float = 0.5,
        prune: float = 0.75,
        retrain: float = 0.333,  # share of the epochs behind pruning, at least one
        optimizer: Literal["sgd", "adam"] = "sgd",
        momentum: float = 0.9,  # of sgd
        lr: float = 1e-3,
        retrain_lr: float = 1e-4,
        epochs: int | None = None,
        batch_size: int = 32,
        schedule: Schedule = constant,
    ):
        for name, share in (("prune_first", prune_first), ("prune", prune), ("retrain", retrain)):
            if not 0 <= share < 1:
                raise UserError(f"learner.{name} must lie in [0, 1), got {share}")
        self.model, self.runtime = model, runtime
        self.shares, self.lr, self.retrain_lr = (prune_first, prune), lr, retrain_lr
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        if self.epochs < 2:
            raise UserError(f"learner packnet trains before and after pruning: it needs 2 epochs, got {self.epochs}")
        self.later = min(self.epochs - 1, max(1, round(self.epochs * retrain)))
        self.recipe = Recipe(optimizer, momentum, schedule=schedule)
        self.heads = TaskHead(model.num_features).to(runtime.device)
        layers = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
        own = dict(model.named_parameters())
        self.owners = {f"{name}.weight": torch.zeros_like(own[f"{name}.weight"], dtype=torch.uint8) for name in layers}

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train, prune, train again."""
        assert experience.task is not None
        known = len(self.heads.tasks)
        place = self.heads.grow(experience.task, experience.classes, self.runtime.generator("head"))
        is_new, newest = place == known, place == len(self.heads.tasks) - 1
        if place > 254:
            raise UserError("learner packnet holds at most 255 tasks")
        for owner in self.owners.values():
            owner[owner == 0] = place + 1 if is_new else 0
        for name, p in self.model.named_parameters():
            p.requires_grad_(newest and (name in self.owners or (is_new and place == 0)))
        if not is_new:
            return self._fit("train", experience, place, self.lr, self.epochs)
        log = self._fit("train", experience, place, self.lr, self.epochs - self.later)
        self.give_back(place, self.shares[min(1, place)])
        log |= self._fit("retrain", experience, place, self.retrain_lr, self.later)
        free = sum(int((owner == 0).sum()) for owner in self.owners.values())
        return {**log, "free_share": free / sum(owner.numel() for owner in self.owners.values())}

    def _fit(self, name: str, experience: Experience, place: int, lr: float, epochs: int) -> dict[str, float]:
        """Train the weights that the task at `place` owns, and its head."""
        head, weights = self.heads.at(place), dict(self.model.named_parameters())
        before = {key: weights[key].detach().clone() for key in self.owners}
        self.model.train()
        if len(self.heads.tasks) > 1:
            keep_statistics(self.model)

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            return F.cross_entropy(head(self.features(batch, place)), self.heads.targets(place, batch.y))

        def put_back(at: Place, batch: Batch) -> None:
            with torch.no_grad():
                for key, owner in self.owners.items():
                    others = before[key].masked_fill(owner == 0, 0)
                    weights[key].copy_(torch.where(owner == place + 1, weights[key], others))

        batches = shuffled(experience.train, self.batch_size, epochs, self.runtime.key(name))
        groups = groups_of((self.model, lr), (head, lr))
        return fit(self.runtime, name, self, groups, loss, batches, self.recipe, after_step=put_back)

    @torch.no_grad()
    def give_back(self, place: int, share: float) -> None:
        """The weights of least magnitude that a task owns become 0 and nobody's."""
        weights = dict(self.model.named_parameters())
        for key, owner in self.owners.items():
            mine = (owner.flatten() == place + 1).nonzero()[:, 0]
            order = weights[key].detach().flatten()[mine].abs().argsort(stable=True)
            gone = mine[order[: round(share * len(mine))]]
            owner.view(-1)[gone] = 0
            weights[key].view(-1)[gone] = 0

    def features(self, batch: Any, place: int) -> Tensor:
        """Features [B, D] by the weights of tasks up to the one at `place`."""
        if place == len(self.heads.tasks) - 1:  # there are no others: what nobody owns is 0
            return self.model.features(batch)
        weights = dict(self.model.named_parameters())
        masked = {key: weights[key].masked_fill((owner == 0) | (owner > place + 1), 0) for key, owner in self.owners.items()}
        return functional_call(self.model, masked, (batch.x,))

    def predict(self, batch: Batch) -> Tensor:
        """Scores [B, num_seen]; only those of the task's classes say something."""
        self.model.eval()
        place = self.heads.place(batch.task)
        return self.heads.spread(place, self.heads.at(place)(self.features(batch, place)))

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "heads", "owners")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, {name: state[name] for name in ("model", "heads")})
        for name, owner in state["owners"].items():
            self.owners[name].copy_(owner)
