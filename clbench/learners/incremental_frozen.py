"""Incremental-frozen: the floor of few-shot class-incremental learning (`avg_cos` in CEC: Zhang, Song, Lin, Zheng, Pan & Xu,
CVPR 2021, arXiv 2104.03047, "Few-Shot Incremental Learning with Continually Evolved Classifiers").

Base session (the first experience): the whole network is trained with a cosine classifier, CE of temperature x cos(f, w_c).
Then the network is frozen and every class, of the base session too, is the mean of its un-normalised features under the test
transform; a later session adds the means of its few shots. The answer is the largest cosine. The final result does not depend
on the order of the later sessions.

Tricks (arXiv 2403.14392, "A Bag of Tricks for Few-Shot Class-Incremental Learning"), all off by default. In the base session:
supcon    weight of a supervised contrastive loss of temperature 0.07 between each image and a stronger view of it
etf       classes in all: the rows of the base classifier are fixed, those of a simplex equiangular tight frame of so many
virtual   pseudo-classes: the halves of images of two base classes added, with rows of their own that are dropped afterwards
rotation  weight of the cross-entropy of telling apart four turns of each image
In later sessions:
finetune  passes over the few shots at `finetune_lr` before their means are taken, with the cross-entropy of temperature x
          cos(f, w_c), w_c the means of all classes so far (those of the session under the network before) or the simplex's rows
subnet    the share of weights that these steps may change: those with the least mean squared gradient of the base session
Choices, since no code and no table was read: the weights of the terms, one second view, halves in mixtures, rows for turns.
With `finetune`, normalisation keeps the statistics of the base session, and earlier classes keep their means.

Deviations: the last weights of the base session are taken, the releases take those with the best test accuracy; means answer
from the first session on, the releases report the better of trained rows and means there, so that their drop compares two
classifiers. A class that comes back has its mean over all its samples.
Constants: the release's for CIFAR-100 from scratch (SGD 0.9 nesterov, 0.1, weight decay 5e-4, batch 128, x 0.1 at 60 and 70 %
of 100 epochs); pre-trained networks need smaller rates. Published number: none read.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Place, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import CosineHead, PrototypeHead
from clbench.streams.images.data import shuffled
from clbench.training.features import extract
from clbench.training.few_shot import BaseSession, least_important, masked, simplex
from clbench.training.fisher import Weights, fisher_per_batch, moved, trained
from clbench.training.fit import Recipe, fit
from clbench.training.runtime import Runtime
from clbench.training.schedules import multistep
from clbench.training.state import collect, groups_of, restore

DROPS = partial(multistep, milestones=(0.6, 0.7))


class IncrementalFrozen:
    """State: backbone, the classifier of the base session, sums and counts of every class; what tricks need."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_random_access=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        temperature: float = 16.0,
        lr: float = 0.1,
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 5e-4,
        schedule: Schedule = DROPS,
        supcon: float = 0.0,  # weight; 0: none
        mirror: bool = True,  # whether its second view may be flipped (digits and texts do not mirror)
        etf: int = 0,  # classes of the whole stream, at most the features of the model; 0: rows are learned
        virtual: int = 0,  # pseudo-classes; 0: none
        rotation: float = 0.0,  # weight; 0: none
        finetune: int = 0,  # passes over a later session's shots; 0: none
        finetune_lr: float = 1e-3,
        subnet: float = 1.0,  # share of the weights that finetune may change
    ):
        _check(supcon, rotation, etf, virtual, finetune, subnet)
        if temperature <= 0:
            raise UserError(f"learner.temperature must be above 0, got {temperature}")
        self.model, self.runtime = model, runtime
        self.lr, self.epochs, self.batch_size = lr, runtime.epochs(epochs), batch_size
        self.recipe = Recipe("sgd", momentum, nesterov=nesterov, weight_decay=weight_decay, schedule=schedule)
        self.base_head = CosineHead(model.num_features).to(runtime.device)
        torch.nn.init.constant_(self.base_head.sigma, temperature)
        self.base_head.sigma.requires_grad_(False)
        self.prototypes = PrototypeHead(model.num_features, "cosine").to(runtime.device)
        self.session = BaseSession(runtime, model, self.base_head, supcon, virtual, rotation, mirror)
        self.etf, self.temperature = etf, temperature
        self.passes, self.finetune_lr, self.subnet = (runtime.epochs(finetune) if finetune else 0), finetune_lr, subnet
        self.free: Weights = {}  # masks of what finetune may change
        self.tuning = False
        self.extra = ("session", "free") if supcon or etf or virtual or rotation or finetune else ()

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train in the base session; then one pass over the data for its class means."""
        log = {}
        if experience.index == 0:
            log = self.train_base(experience)
            self.model.freeze()
        elif self.passes:
            log = self.tune(experience)
        features, y = extract(self.runtime, self.model, experience.train, self.batch_size)
        self.prototypes.update(features, y, experience.num_seen)
        return log

    def train_base(self, experience: Experience) -> dict[str, float]:
        """Backbone and classifier, with what is asked for besides."""
        session = self.session
        session.begin(len(experience.new_classes), self.etf)
        self.model.train()

        def at(place: Place) -> None:
            session.step = place.step

        groups = groups_of((self.model, self.lr), (self.base_head, self.lr))
        groups.append({"params": session.parameters(), "lr": self.lr})
        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        log = fit(self.runtime, "adapt", self, groups, session.loss, batches, self.recipe, at_place=at)
        session.end()
        self.model.eval()
        if self.passes and self.subnet < 1:
            self.free = self.unimportant(experience)
        return log

    def unimportant(self, experience: Experience) -> Weights:
        """Masks of the weights with the least mean squared gradient of the base session's cross-entropy."""

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            return F.cross_entropy(self.base_head(self.model.features(batch)), batch.y)

        total: Weights = {}
        with self.runtime.phase("fisher"), self.model.in_fp32():
            for batch in experience.train.test_batches(self.batch_size):
                self.runtime.check_stop()
                found = fisher_per_batch(self.model, loss, batch)
                total = {name: f + total[name] if total else f for name, f in found.items()}
        return least_important(total, self.subnet)

    def tune(self, experience: Experience) -> dict[str, float]:
        """Some passes over the few shots; the network is frozen again behind them."""
        rows_KD = self.rows(experience)
        self.tuning = True
        self.model.unfreeze()
        self.model.eval()  # normalisation keeps the statistics of the base session
        masks = [self.free[name] for name in trained(self.model)] if self.free else []

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            return F.cross_entropy(self.temperature * F.normalize(self.model.features(batch), dim=1) @ rows_KD.T, batch.y)

        def before(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
            if masks:
                masked(grads, masks)

        batches = shuffled(experience.train, self.batch_size, self.passes, self.runtime.key("finetune"))
        groups, recipe = groups_of((self.model, self.finetune_lr)), Recipe("sgd", 0.9)
        log = fit(self.runtime, "finetune", self, groups, loss, batches, recipe, before_step=before)
        self.tuning = False
        self.model.freeze()
        return log

    def rows(self, experience: Experience) -> Tensor:
        """Unit rows of all classes so far [K, D]: the simplex's, or means, those of new classes under the network of now."""
        if self.etf:
            if self.etf < experience.num_seen:
                raise UserError(f"learner.etf={self.etf}: the stream has shown {experience.num_seen} classes")
            found = simplex(self.etf, self.model.num_features, self.runtime.seed)
            return found[: experience.num_seen].to(self.runtime.device)
        head = copy.deepcopy(self.prototypes)
        head.update(*extract(self.runtime, self.model, experience.train, self.batch_size), experience.num_seen)
        return F.normalize(head.means_KD, dim=1).float().to(self.runtime.device)

    def predict(self, batch: Batch) -> Tensor:
        """Cosines [B, num_seen]."""
        self.model.eval()
        return self.prototypes(self.model.features(batch))

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "base_head", "prototypes", *self.extra)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = {"free": moved(state["free"], self.runtime.device)} if self.extra else {}
        restore(self, {**state, **own})
        if not self.tuning:  # else a killed session goes on
            self.model.freeze() if len(self.prototypes.counts_K) else self.model.unfreeze()


def _check(supcon: float, rotation: float, etf: int, virtual: int, finetune: int, subnet: float) -> None:
    """`UserError` where a trick's option makes no sense."""
    for name, value in {"supcon": supcon, "rotation": rotation, "etf": etf, "virtual": virtual, "finetune": finetune}.items():
        if not 0 <= value < math.inf:
            raise UserError(f"learner.{name} must be a finite number from 0, got {value}")
    if not 0 <= subnet <= 1:
        raise UserError(f"learner.subnet must lie between 0 and 1, got {subnet}")
    if subnet < 1 and not finetune:
        raise UserError(f"learner.subnet={subnet} has no effect without steps: choose learner.finetune=N")
