"""LUCIR: "Learning a Unified Classifier Incrementally via Rebalancing" (Hou, Pan, Loy, Wang & Lin, CVPR 2019).

The classifier is z = eta cos(f, w), eta learned, 1 at the start, one block of rows w an experience. Features may be negative:
the last ReLU of a network goes (`last_relu`). In experience t, with k old classes and n classes in the experience,
  imprint       w_c of a new class = normalised mean of its normalised features x mean |w_old|; rows of old classes stand still
  less-forget   lambda_t mean (1 - cos(f, f_old)), lambda_t = less_forget sqrt(k / n), f_old of the network before t
  margin        mean relu(margin - cos_y + cos_j) over samples of old classes and their `hardest` new classes j; before eta
loss = CE(z, y) + less-forget + ranking x margin term. Stored and new samples are shuffled together; the memory is herded.

balance_epochs  passes over equally many stored samples of every class after herding, which train the head alone, old rows
                too; the network is in evaluation mode. The rate falls to a tenth after half of them. 0 (the release for
                CIFAR): none; 20 at 0.01 in the release for ImageNet, 20 at 0.05 in another suite's for CIFAR
hardest         the margin term is the mean over all pairs (a choice of reading: the sum over a sample's pairs is ranking=2)
eta             its first value: 1 as published, for trainings of thousands of steps (a short one wants 10; a choice)

Deviations: the last ReLU is taken from ResNets and the MLP alone; other networks (a ViT ends in LayerNorm) stay as they are.
Where classes come back, n counts all classes of the experience, and their samples are old ones to the margin term. The default
rates are for pre-trained backbones. Herding takes a sample once (released: one may be chosen again, which moves the mean and
fills no place). Released for CIFAR-100: ResNet-32 from scratch, 160 epochs, SGD 0.1 (x 0.1 at 80 and 120), weight decay 5e-4,
batch 128, 20 exemplars a class, less_forget 5; ImageNet 10.
Published: none read in the paper. A library reproduces 63.00 and 47.40 % on CIFAR-100 B50 (at "2" and "5" tasks, protocol
unclear).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Place, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import CosineHead
from clbench.models.small_networks import Mlp
from clbench.training.distillation import frozen_copy
from clbench.training.features import extract
from clbench.training.fit import Recipe, fit
from clbench.training.memory import Rehearsed, allowed_memory
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore


def drop_last_relu(net: Any) -> bool:
    """Take the activation behind a network's last layer away, in place -> whether there was one that is known."""
    if isinstance(net, ResNet):
        last = [block for block in net.modules() if hasattr(block, "act2") and hasattr(block, "bn2")][-1]
        name = "act3" if hasattr(last, "act3") else "act2"
        setattr(last, name, nn.Identity())
    elif isinstance(net, Mlp):
        net.layers[-1][-1] = nn.Identity()  # type: ignore[index]
    return isinstance(net, ResNet | Mlp)


def margin_term(cosines: Tensor, y: Tensor, known: int, margin: float, hardest: int) -> Tensor:
    """Mean relu(margin - cos_y + cos_j) over old samples and their nearest new classes; cosines [B, K], y [B] -> scalar."""
    old, count = y < known, min(hardest, cosines.shape[1] - known)
    if count < 1 or not old.any():
        return cosines.sum() * 0
    own, rivals = cosines[old].gather(1, y[old, None]), cosines[old, known:].topk(count, dim=1).values
    return (margin - own + rivals).relu().mean()


class Lucir:
    """State: backbone, head, memory (the old network is the backbone as an experience finds it)."""

    capabilities: ClassVar[Capabilities] = Capabilities(stores_exemplars=True, needs_random_access=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        memory: int | None = None,  # samples; null: what the scenario's budget allows
        less_forget: float = 5.0,
        margin: float = 0.5,  # of cosines
        hardest: int = 2,  # new classes that a sample is kept away from
        ranking: float = 1.0,  # weight of the margin term
        eta: float = 1.0,  # at the start
        last_relu: bool = False,  # whether the network keeps it
        balance_epochs: int = 0,
        balance_lr: float = 0.01,
        lr: float = 0.01,  # head
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = constant,
    ):
        for name, value, least in (("hardest", hardest, 1), ("balance_epochs", balance_epochs, 0)):
            if value < least:
                raise UserError(f"learner.{name} must be at least {least}, got {value}")
        if eta <= 0:
            raise UserError(f"learner.eta must be above 0, got {eta}")
        self.model, self.runtime = model, runtime
        self.less_forget, self.margin, self.hardest, self.ranking = less_forget, margin, hardest, ranking
        self.balance_epochs, self.balance_lr = balance_epochs, balance_lr
        self.lr, self.backbone_lr = lr, backbone_lr
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        if not last_relu:
            drop_last_relu(model.net)
        self.head = CosineHead(model.num_features).to(runtime.device)
        self.head.sigma.data.fill_(eta)
        self.memory = allowed_memory(runtime, "herding", memory)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Imprint, train on new and stored samples, herd, balance the head."""
        known = experience.num_seen - len(experience.new_classes)
        old = frozen_copy(self.model)[0] if known else None
        if experience.new_classes:
            self.head.grow(len(experience.new_classes), self.runtime.generator("head"))
            if known:
                self._imprint(experience, known)
        if known:
            older = list(self.head.blocks)[: -1 if experience.new_classes else None]
            nn.ModuleList(older).requires_grad_(False)
        weight = self.less_forget * math.sqrt(known / len(experience.classes))
        self.model.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            f = self.model.features(batch)
            cosines = self.head.cosines(f)
            total = F.cross_entropy(self.head.sigma * cosines, batch.y)
            if old is None:
                return total
            with torch.no_grad():
                before = old.features(batch)
            apart = (1 - F.cosine_similarity(f, before)).mean()
            return total + weight * apart + self.ranking * margin_term(cosines, batch.y, known, self.margin, self.hardest)

        train: Any = experience.train
        batches = Rehearsed(train, self.memory.data(train), self.batch_size, self.epochs, self.runtime.key("train"))
        groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
        log = fit(self.runtime, "train", self, groups, loss, batches, self.recipe)
        self.head.requires_grad_(True)
        features, _ = extract(self.runtime, self.model, self.memory.candidates(train), self.batch_size)
        self.memory.update(train, features)
        if known and self.balance_epochs and len(self.memory):
            log |= self._balance(train)
        return {**log, "eta": float(self.head.sigma.detach()), "exemplars": float(len(self.memory))}

    def _imprint(self, experience: Experience, known: int) -> None:
        """Rows of the new classes are the directions of their features, as long as the old rows are on average."""
        features, y = extract(self.runtime, self.model, experience.train, self.batch_size)
        f, rows = F.normalize(features, dim=1), torch.cat([block.weight for block in self.head.blocks])  # type: ignore[misc]
        length = rows[:known].detach().norm(dim=1).mean()
        means = torch.stack([f[y == c].mean(0) for c in experience.new_classes])
        self.head.assign(known, F.normalize(means, dim=1) * length)

    def _balance(self, like: Any) -> dict[str, float]:
        """Train the head on equally many stored samples of each class."""
        counts = [int((self.memory.y == c).sum()) for c in sorted(set(self.memory.y.tolist()))]
        stored: Any = self.memory.data(like)  # classes take turns in it
        equal, key = stored.subset(range(min(counts) * len(counts))), self.runtime.key("balance")
        self.model.eval()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            with torch.no_grad():
                features = self.model.features(batch)
            return F.cross_entropy(self.head(features), batch.y)

        def falling(place: Place) -> float:
            return 1.0 if 2 * place.step < place.steps else 0.1

        batches = Rehearsed(equal.subset([]), equal, self.batch_size, self.balance_epochs, key)
        recipe = Recipe("sgd", self.recipe.momentum, weight_decay=self.recipe.weight_decay, schedule=falling)
        return fit(self.runtime, "balance", self, groups_of((self.head, self.balance_lr)), loss, batches, recipe)

    def predict(self, batch: Batch) -> Tensor:
        """Scaled cosines over the classes seen so far [B, num_seen]."""
        self.model.eval()
        return self.head(self.model.features(batch))

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head", "memory")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
