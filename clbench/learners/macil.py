"""MACIL: incremental low-rank terms that keep distances within a class and patches (ICML 2025, arXiv 2502.07560).

Each experience has low-rank terms of its own at keys and values of every block (A Kaiming, B 0), trained and then added to the
weights, so that the network before it is the one without them, and a cosine classifier of its own:
  CosFace(s, 0) over the experience's classes, and from the second experience on, "old" being the network without the terms,
  + pairs x (1 / B) sum over pairs i < j of one class |D_old(i, j) - D(i, j)|,   D = sqrt(d^T P d + 1e-8), d between features of
    length 1; P the pseudo-inverse of S + 10 mean(diag S) I + 10 mean(offdiag S) (J - I) + 1e-3 I, S the covariance of the class
    in the old network
  + patches x mean over images and patches of (arccos cos(class token, p) / pi) |p - p_old| of length 1, the weight detached
Then means of old classes follow by SSIAT's shift, sigma 1, and all classifiers are aligned on Gaussians as in SLCA (shrunken
means, logits normalised per experience).

variant  "paper" (default): the shift is of features of the same images under the test transform. "official": of two passes over
         shuffled, augmented images, so that row i of one is another image than row i of the other, as released
drift    "shift" (default), "linear", "nonlinear" (SLDC's maps), null
Deviations: the mean off the diagonal leaves out zeros, as in FeCAM, so features that never vary can make the sum indefinite
(over all entries, its eigenvalues are at least 1e-3): eigenvalues at or below 0 have inverse 0, where a root would be of a
negative number. Later experiences take half of the epochs (`later`: 20, then 10, released).
Own choices: S of features as they are, not of length 1; the detached weight of tokens of the network in training; aligned
classifiers are kept, as in SSIAT; rate and decay of the alignment are SLCA's.
Published number: none read. Rank 32, batch 48, SGD 0.9, rate 0.01, no decay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.learners.fecam import shrink, whitener
from clbench.models.backbone import Backbone
from clbench.models.heads import CosineHead
from clbench.models.pet import Factory
from clbench.models.pet_modules import lora
from clbench.models.pet_sites import require_tokens, rows_of
from clbench.streams.images.data import shuffled
from clbench.training.drift import Drift, checked, is_unpaired
from clbench.training.features import augmented, extract
from clbench.training.fit import Recipe, fit
from clbench.training.gaussians import ClassGaussians, align, class_rows, shrunken_means
from clbench.training.losses import margin_logits
from clbench.training.runtime import Runtime
from clbench.training.schedules import cosine
from clbench.training.state import collect, groups_of, restore


def metric(f: Tensor, what: str = "a covariance") -> Tensor:
    """W [D, D] with W^T W = P, of a class's features [N, D]: distances of W x are D without its 1e-8."""
    eye = torch.eye(f.shape[1], dtype=torch.float64, device=f.device)
    centred = f.double() - f.double().mean(0)
    cov = centred.T @ centred / max(1, len(f) - 1)
    return whitener(shrink(cov, 10, 10) + 1e-3 * eye, singular=True, what=what).float()


def pair_loss(f: Tensor, old: Tensor, y: Tensor, metrics: Mapping[int, Tensor]) -> Tensor:
    """(1 / B) sum over pairs of one class |D_old - D|: features of both networks [B, D], labels [B]."""
    total, now, then = f.new_zeros(()), F.normalize(f, dim=1), F.normalize(old, dim=1)
    for c in y.unique().tolist():
        rows = torch.nonzero(y == c).flatten()
        i, j = torch.triu_indices(len(rows), len(rows), 1, device=y.device)
        d, d_old = ((x[rows] @ metrics[c].T) for x in (now, then))
        d, d_old = ((x[i] - x[j]).square().sum(1).add(1e-8).sqrt() for x in (d, d_old))
        total = total + (d_old - d).abs().sum()
    return total / len(y)


def patch_loss(tokens: Tensor, old: Tensor, first: int) -> Tensor:
    """Mean of weight x distance over patches: tokens of both networks [B, N, D], the class token 0, patches from `first` on."""
    unit, unit_old = F.normalize(tokens, dim=2), F.normalize(old, dim=2)
    cosines = (unit[:, :1] * unit[:, first:]).sum(2).detach().clamp(-1, 1)
    return (torch.arccos(cosines) / math.pi * (unit[:, first:] - unit_old[:, first:]).norm(dim=2)).mean()


class Macil:
    """State: the terms in training, the weights that they are added to, classifiers, Gaussians, classes' experiences."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        needs_pretrained=True, needs_new_classes=True, needs_disjoint_classes=True, needs_random_access=True
    )

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        pet: Factory = lora,
        lr: float = 0.01,
        epochs: int | None = None,
        later: float = 0.5,  # share of the epochs from the second experience on
        batch_size: int = 48,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        schedule: Schedule = cosine,
        scale: float = 20.0,
        pairs: float = 1.0,  # weight of the distances within classes
        patches: float = 0.4,  # and of those of patches
        sigma: float = 1.0,
        drift: Literal["shift", "linear", "nonlinear"] | None = "shift",
        variant: Literal["paper", "official"] = "paper",
        ridge: float = 1e-3,
        align_epochs: int = 5,
        align_lr: float = 0.01,
        align_decay: float = 5e-4,
        align_samples: int = 256,
        logit_norm: float | None = 0.1,
    ):
        tuned = pet(model, runtime)
        if tuned is None or tuned.kind != "lora" or any(name.endswith("/scale") for name in tuned.values):
            raise UserError("macil adds low-rank terms without a scale to learn to the weights: choose pet=lora")
        if not 0 < later <= 1:
            raise UserError(f"learner.later is a share of the epochs, above 0 and at most 1, got {later}")
        if min(pairs, patches) < 0:
            raise UserError(f"learner.pairs and learner.patches are weights from 0, got {pairs} and {patches}")
        blocks, net = require_tokens(model, "lora", class_token=True), model.net
        self.first_patch = int(net.num_prefix_tokens)  # type: ignore[arg-type]
        names = [name[:-2] for name in tuned.values if name.endswith("/b")]
        self.weights = {name: rows_of(blocks[int(name.split("/")[0])], name.split("/")[1]) for name in names}
        self.model, self.runtime, self.pet, self.unpaired = model, runtime, tuned, is_unpaired(variant, drift)
        self.lr, self.epochs, self.later, self.batch_size = lr, runtime.epochs(epochs), later, batch_size
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.scale, self.pairs, self.patches = scale, pairs, patches
        self.drift = Drift(checked(drift), runtime, self, sigma)
        self.align = {"epochs": align_epochs, "lr": align_lr, "weight_decay": align_decay, "samples": align_samples}
        self.logit_norm = logit_norm
        self.head = CosineHead(model.num_features, std=0.02).to(runtime.device)
        self.head.sigma.requires_grad_(False)
        self.gaussians = ClassGaussians(ridge, runtime.device)
        self.experience_of_class: list[int] = []

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train terms, move the old means, add new statistics, add the terms to the weights, align."""
        first = len(self.experience_of_class)
        self.pet.reset(self.runtime.generator("terms"))
        self.head.grow(len(experience.new_classes), self.runtime.generator("head"))
        with self.pet.off():
            before, y = extract(self.runtime, self.model, experience.train, self.batch_size)
        rows = class_rows(y, experience.new_classes)
        log = self._train(experience, first, before, rows)
        after, _ = extract(self.runtime, self.model, experience.train, self.batch_size)
        if first and self.drift.kind:
            log |= self.drift.follow(self.gaussians, *(self._unpaired(experience) if self.unpaired else (before, after)))
        self.gaussians.add(*(after[rows[c]] for c in experience.new_classes))
        self.experience_of_class = [*self.experience_of_class, *[experience.index] * len(experience.new_classes)]
        self.pet.merge()
        with torch.no_grad():
            for name in self.weights:
                self.pet.values[f"{name}/b"].zero_()
        self.pet.unmerge()  # of B = 0: what was added stays
        if first and self.align["epochs"]:
            log |= align(
                self.runtime, self, self.head, self.gaussians, **self.align, momentum=self.recipe.momentum,
                mean_scale_K=shrunken_means(self.experience_of_class, experience.index),
                temperature=self.logit_norm, widths=self.head.linear.widths,
            )  # fmt: skip
        return log

    def _train(self, experience: Experience, first: int, before: Tensor, rows: dict[int, Tensor]) -> dict[str, float]:
        """CosFace on the newest classifier; from the second experience on what ties the terms to the network without them."""
        epochs = max(1, round(self.later * self.epochs)) if first else self.epochs
        tied = first > 0 and max(self.pairs, self.patches) > 0
        metrics = {c: metric(before[i], f"the covariance of class {c}") for c, i in rows.items()} if tied else {}
        net: Any = self.model.net

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            y, tokens = batch.y - first, self.model.tokens(batch)
            f = net.forward_head(tokens, pre_logits=True)
            own = F.cross_entropy(margin_logits(self.head(f)[:, first:], y, self.scale, 0.0), y)
            if not tied:
                return own
            with torch.no_grad(), self.pet.off():
                old = self.model.tokens(batch)
                f_old = net.forward_head(old, pre_logits=True)
            kept = self.pairs * pair_loss(f, f_old, batch.y, metrics)
            return own + kept + self.patches * patch_loss(tokens, old, self.first_patch)

        groups = groups_of((self.pet, self.lr), (self.head.blocks[-1], self.lr))
        batches = shuffled(experience.train, self.batch_size, epochs, self.runtime.key("train"))
        self.pet.train()
        log = fit(self.runtime, "train", self, groups, loss, batches, self.recipe)
        self.pet.eval()
        return log

    def _unpaired(self, experience: Experience) -> tuple[Tensor, Tensor]:
        """Features [N, D] without and with the terms, of two shuffled and augmented passes."""
        with self.pet.off():
            before, _ = augmented(self.runtime, self.model, experience.train, self.batch_size, "before")
        return before, augmented(self.runtime, self.model, experience.train, self.batch_size, "after")[0]

    def predict(self, batch: Batch) -> Tensor:
        """Cosines [B, num_seen] of one pass: nothing hangs on the network any more."""
        self.model.eval()
        with self.pet.off():
            return self.head(self.model.features(batch))

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "pet", "head", "gaussians", "experience_of_class", "weights")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, {name: value for name, value in state.items() if name != "weights"})
        for name, weight in state["weights"].items():
            self.weights[name].copy_(weight)
        self.model.forget()
