"""FeTrIL: feature translation for exemplar-free class-incremental learning (Petit et al., WACV 2023, arXiv 2211.13131).

The network is trained in the first experience, with a linear classifier on its classes, and frozen. The mean mu of each class
is kept. Where class c has no samples in an experience, those of the class n(c) that is nearest to it stand in for them:

    n(c) = the class of this experience whose mean is nearest to mu_c      x' = x - mu_n(c) + mu_c   for each x of n(c)

so that c has mean mu_c and the covariance of n(c). A linear classifier of all classes seen is trained from new on both.

classifier  "fc": softmax, 50 epochs of SGD at 0.05 on a cosine. "svm": linear support vector machines one against the rest
            (C 1, tolerance 1e-4), on features of length 1
nearest     "euclidean", as released; "cosine", of the means, as in PyCIL
train_first false: the network is taken as it is (pre-trained ones), and one pass over each experience is enough

A class that comes back has real features there; mu goes over all its samples. mu_n(c) is that of the samples at hand.
Deviations: the release leaves the first 512 training features at their own length and codes a binary SVM's labels as strings,
with the score's sign turned; here neither. PyCIL's fc goes on from the rows that older classes had, its rate falls by the
epoch. Momentum, batch sizes and the first training's rate are ours, and so is its augmentation, the scenario's (the release: 90
epochs, then 290 with AugMix and Lookahead; PyCIL: 200 with AutoAugment, Cutout).
Published (release's README, CIFAR-100, half of the classes first, then 5, 10, 60 experiences, average): svm 66.3, 65.2, 59.8,
fc 64.7, 63.4, 50.8 %; PyCIL, ResNet-32: fc 65.78, 64.91, 62.09, svm 65.38, 65.10, 61.72 %.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead, PrototypeHead
from clbench.training.features import FeatureBatches, extract
from clbench.training.first_session import adapt
from clbench.training.fit import Recipe, fit
from clbench.training.gaussians import class_rows
from clbench.training.runtime import Runtime
from clbench.training.schedules import cosine
from clbench.training.state import collect, groups_of, restore


def translated(features: Tensor, y: Tensor, means_KD: Tensor, nearest: str) -> tuple[Tensor, Tensor]:
    """Features [N, D], labels [N] of some classes and the means of all -> the same rows and those of the other classes."""
    present = y.unique().tolist()
    rows = class_rows(y, present)
    here = torch.stack([features[rows[c]].to(means_KD).mean(0) for c in present])
    if nearest == "cosine":
        near = F.normalize(means_KD, dim=1) @ F.normalize(here, dim=1).T
    else:
        near = -torch.cdist(means_KD, here, compute_mode="donot_use_mm_for_euclid_dist")
    parts, labels = [features], [y]
    for c in sorted(set(range(len(means_KD))) - set(present)):
        i = int(near[c].argmax())
        own = features[rows[present[i]]]
        parts.append((own.to(means_KD) - here[i] + means_KD[c]).to(features))
        labels.append(torch.full((len(own),), c, dtype=y.dtype, device=y.device))
    return torch.cat(parts), torch.cat(labels)


class Fetril:
    """State: sums and counts of every class, the classifier; the network and its first classifier where it is trained."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_random_access=True)

    @staticmethod
    def capabilities_of(*, train_first: bool = True, classifier: str = "fc", **options: Any) -> Capabilities:
        """A network that is trained first needs the samples again for its means; support vectors are not found by `fit`."""
        return replace(Fetril.capabilities, needs_random_access=train_first, trains=train_first or classifier == "fc")

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        classifier: Literal["fc", "svm"] = "fc",
        nearest: Literal["euclidean", "cosine"] = "euclidean",
        train_first: bool = True,  # false: take the network as it is
        lr: float = 0.1,  # of the first training
        epochs: int | None = None,  # of the first training
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,  # of the first training
        schedule: Schedule = cosine,
        head_lr: float = 0.05,  # of fc
        head_epochs: int = 50,  # of fc
        c: float = 1.0,  # of svm
    ):
        if classifier not in ("fc", "svm"):
            raise UserError(f"unknown learner.classifier={classifier}: choose fc or svm")
        if nearest not in ("euclidean", "cosine"):
            raise UserError(f"unknown learner.nearest={nearest}: choose euclidean or cosine")
        if head_epochs < 1 or not 0 < c < math.inf:
            raise UserError(f"learner.head_epochs={head_epochs} must be at least 1, learner.c={c} above 0")
        if epochs is not None and not train_first:
            raise UserError("learner.epochs has no effect with learner.train_first=false: nothing is trained first")
        self.model, self.runtime, self.svm, self.nearest = model, runtime, classifier == "svm", nearest
        self.train_first, self.lr, self.epochs, self.batch_size = train_first, lr, runtime.epochs(epochs), batch_size
        self.head_lr, self.head_epochs, self.c = head_lr, head_epochs, c
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.head_recipe = Recipe("sgd", momentum, schedule=cosine)
        self.first_head, self.head = (LinearHead(model.num_features).to(runtime.device) for _ in range(2))
        self.prototypes = PrototypeHead(model.num_features).to(runtime.device)
        if not train_first:
            model.freeze()

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train the network once; then means, features of all classes, and a new classifier of them."""
        log = {}
        if self.train_first and experience.index == 0:
            log = adapt(
                self.runtime, self, self.model, self.model, self.first_head, experience,
                lr=self.lr, epochs=self.epochs, batch_size=self.batch_size, recipe=self.recipe,
            )  # fmt: skip
            self.model.freeze()
        features, y = extract(self.runtime, self.model, experience.train, self.batch_size)
        self.prototypes.update(features, y, experience.num_seen)
        x, labels = translated(features, y, self.prototypes.means_KD, self.nearest)
        fresh = LinearHead(self.model.num_features).to(self.runtime.device)
        fresh.grow(experience.num_seen, self.runtime.generator("classifier"))
        self.head = fresh
        if self.svm:
            self._support(F.normalize(x, dim=1), labels)
            return log
        batches = FeatureBatches(x, labels, self.batch_size, self.head_epochs, self.runtime.key("classifier"))
        groups = groups_of((self.head, self.head_lr))

        def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(self.head(batch[0]), batch[1])

        return log | fit(self.runtime, "classifier", self, groups, loss, batches, self.head_recipe)

    @torch.no_grad()
    def _support(self, x: Tensor, y: Tensor) -> None:
        """Fill the classifier by support vector machines, one for each class; with one class there is nothing to tell apart."""
        from sklearn.svm import LinearSVC

        block: Any = self.head.blocks[0]
        block.weight.zero_()
        if len(block.weight) == 1:
            return
        with self.runtime.phase("svm"):
            found = LinearSVC(C=self.c, tol=1e-4, max_iter=10_000, random_state=0).fit(x.cpu().numpy(), y.cpu().numpy())
        w, b = torch.as_tensor(found.coef_), torch.as_tensor(found.intercept_)
        block.weight.copy_(torch.cat([-w, w]) if len(w) == 1 else w)
        block.bias.copy_(torch.cat([-b, b]) if len(b) == 1 else b)

    def predict(self, batch: Batch) -> Tensor:
        """Logits, or distances from the machines' planes [B, num_seen]."""
        self.model.eval()
        features = self.model.features(batch)
        return self.head(F.normalize(features, dim=1) if self.svm else features)

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "prototypes", "head", *(("model", "first_head") if self.train_first else ()))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it; a network that was trained is frozen again."""
        restore(self, state)
        if self.train_first:
            self.model.freeze() if len(self.prototypes.counts_K) else self.model.unfreeze()
