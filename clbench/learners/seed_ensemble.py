"""SEED: an ensemble of selectively trained experts (Rypesc, Cygert, Khan, Trzcinski, Zielinski & Twardowski, ICLR 2024).

"Divide and not forget: Ensemble of selectively trained experts in Continual Learning". No exemplars, no pre-training needed.

    experiences 0..E-1  train expert e whole, with a linear head of its own; expert e > 0 starts as a copy of expert 0
    later               fit Gaussians of the new classes in every expert's features and choose the expert where they overlap
                        least: the largest mean of KL(N_i || N_j) over all ordered pairs of new classes, i = j included. Only
                        this one is fine-tuned: (1 - alpha) CE + alpha MSE(features, features before), BatchNorm in
                        evaluation mode, no weight decay; the others stand still
    after each          every expert keeps a Gaussian N(mu_c, S_c) of each new class, from the training images and their mirror
                        images under the test transform; expert e knows no class of the experiences before e. Old Gaussians
                        are never touched. S_c is divided by N and gets a ridge: 1e-8, ten times more until it is not singular
    prediction          softmax of log N(f_e(x); mu_c, S_c) / 3 over the classes of expert e, then the mean over the experts
                        that know class c

Deviations: "singular" means a smallest eigenvalue below D eps (single precision) times the largest, in place of a Cholesky
decomposition in single precision that fails; densities are computed in float64. Layers shared by experts, mixtures of several
Gaussians and drift compensation, which the release (grypesc/SEED) offers as options, are left out. Heads are thrown away.
Published (ResNet-32 from scratch, CIFAR-100, average; recalled, not re-checked): 10 experiences 61.7 %, 20 56.2 %, 50 42.6 %;
200 epochs, fine-tuning 100, batch 128, SGD 0.9, rate 0.05, x 0.1 after 30, 60 and 80 % of the epochs, gradient norm up to 1.

Legend: E experts, K classes, D features, N samples.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead
from clbench.streams.images.data import shuffled
from clbench.training.cholesky import check_finite, repaired
from clbench.training.fit import Recipe, fit
from clbench.training.gaussians import class_rows
from clbench.training.runtime import Runtime
from clbench.training.schedules import multistep
from clbench.training.state import collect, groups_of

RIDGE = 1e-8
DROPS: Schedule = partial(multistep, milestones=(0.3, 0.6, 0.8))


def gaussian(features: Tensor, what: str = "a class") -> tuple[Tensor, Tensor]:
    """Mean [D] and lower Cholesky factor [D, D] of features [N, D], both float32; FloatingPointError where they are NaN."""
    check_finite(features, f"features of {what}")
    f = features.double()
    mean = f.mean(0)
    cov = (f - mean).T @ (f - mean) / len(f)
    least = len(cov) * torch.finfo(torch.float32).eps
    chol, _ = repaired(cov, f"the covariance of {what}", ridge=RIDGE, always=True, least=least)
    return mean.float(), chol.float()


def log_density(x: Tensor, mean_KD: Tensor, chol_KDD: Tensor) -> Tensor:
    """Log N(x; mu_k, L_k L_k^T) of x [B, D] -> [B, K] float64."""
    chol = chol_KDD.double()
    z = torch.linalg.solve_triangular(chol, (x.double()[None] - mean_KD.double()[:, None]).mT, upper=False)
    log_det = 2 * chol.diagonal(dim1=1, dim2=2).log().sum(1)
    return -0.5 * (z.square().sum(1) + log_det[:, None] + x.shape[1] * torch.log(torch.tensor(2 * torch.pi))).T


def mean_divergence(mean_KD: Tensor, chol_KDD: Tensor) -> float:
    """Mean over all ordered pairs (i, j), i = j included, of KL(N_i || N_j) between K Gaussians."""
    mean, chol = mean_KD.double(), chol_KDD.double()
    log_det = 2 * chol.diagonal(dim1=1, dim2=2).log().sum(1)
    total = 0.0
    for j in range(len(mean)):  # tr(S_j^-1 S_i) = ||L_j^-1 L_i||^2
        spread = torch.linalg.solve_triangular(chol[j], chol, upper=False).square().sum((1, 2))
        gap = torch.linalg.solve_triangular(chol[j], (mean - mean[j]).T, upper=False).square().sum(0)
        total += float(0.5 * (spread + gap - mean.shape[1] + log_det[j] - log_det).sum())
    return total / len(mean) ** 2


def vote(log_densities: list[Tensor], num_classes: int, temperature: float) -> Tensor:
    """Mean over the experts that own a class of their softmax: [B, K_e] each, the last K_e classes -> [B, K]."""
    total = log_densities[0].new_zeros(len(log_densities[0]), num_classes)
    owners = total.new_zeros(num_classes)
    for z in log_densities:
        total[:, num_classes - z.shape[1] :] += (z / temperature).softmax(1)
        owners[num_classes - z.shape[1] :] += 1
    return total / owners


class SeedEnsemble:
    """State: the experts, and for each its means and Cholesky factors of the classes it knows (the last K_e)."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        needs_new_classes=True, needs_disjoint_classes=True, needs_random_access=True
    )

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        experts: int = 5,
        lr: float = 0.05,
        epochs: int | None = None,
        finetune_epochs: int | None = None,  # null: half of epochs
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,  # fine-tuning: 0
        clip: float | None = 1.0,
        alpha: float = 0.99,  # share of the feature distillation
        temperature: float = 3.0,
        schedule: Schedule = DROPS,
    ):
        if experts < 1:
            raise UserError(f"learner.experts must be at least 1, got {experts}")
        self.model, self.runtime, self.num_experts = model, runtime, experts
        self.lr, self.batch_size, self.alpha, self.temperature = lr, batch_size, alpha, temperature
        self.epochs = runtime.epochs(epochs)
        self.finetune_epochs = runtime.epochs(max(1, self.epochs // 2) if finetune_epochs is None else finetune_epochs)
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule, clip=clip)
        self.experts: list[Backbone] = []
        self.means: list[Tensor] = []
        self.factors: list[Tensor] = []

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train a new expert or fine-tune the one that separates the new classes best; then Gaussians in every expert."""
        fitted: dict[int, tuple[Tensor, Tensor]] = {}
        if len(self.experts) < self.num_experts:
            chosen = len(self.experts)
            self._add_expert()
            log = self._train(experience, chosen)
        else:
            fitted = {e: self._gaussians(expert, experience) for e, expert in enumerate(self.experts)}
            scores = [mean_divergence(*fitted[e]) for e in range(len(self.experts))]
            chosen = scores.index(max(scores))
            log = self._finetune(experience, chosen) | {"divergence": scores[chosen]}
        for e, expert in enumerate(self.experts):
            new = self._gaussians(expert, experience) if e == chosen or e not in fitted else fitted[e]
            for kept, more in zip((self.means, self.factors), new, strict=True):
                kept[e] = torch.cat([kept[e], more])
        return log | {"expert": float(chosen)}

    def _add_expert(self) -> None:
        """The given network first, then copies of expert 0, which know no class yet."""
        self.experts.append(copy.deepcopy(self.experts[0]) if self.experts else self.model)
        d = self.model.num_features
        self.means.append(torch.zeros(0, d, device=self.runtime.device))
        self.factors.append(torch.zeros(0, d, d, device=self.runtime.device))

    def _head(self, experience: Experience) -> LinearHead:
        head = LinearHead(self.model.num_features).to(self.runtime.device)
        head.grow(len(experience.new_classes), self.runtime.generator("head"))
        return head

    def _train(self, experience: Experience, chosen: int) -> dict[str, float]:
        """Cross-entropy over the experience's classes."""
        expert, head, first = self.experts[chosen], self._head(experience), experience.new_classes[0]
        expert.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            return F.cross_entropy(head(expert.features(batch)), batch.y - first)

        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        return fit(self.runtime, "train", self, groups_of((expert, self.lr), (head, self.lr)), loss, batches, self.recipe)

    def _finetune(self, experience: Experience, chosen: int) -> dict[str, float]:
        """The same with distillation of the expert's own features; normalisation keeps its statistics."""
        expert, head, first = self.experts[chosen], self._head(experience), experience.new_classes[0]
        old = copy.deepcopy(expert).eval()
        expert.train()
        for module in expert.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            with torch.no_grad():
                target = old.features(batch)
            features = expert.features(batch)
            cross_entropy = F.cross_entropy(head(features), batch.y - first)
            return (1 - self.alpha) * cross_entropy + self.alpha * F.mse_loss(features, target)

        batches = shuffled(experience.train, self.batch_size, self.finetune_epochs, self.runtime.key("finetune"))
        groups, recipe = groups_of((expert, self.lr), (head, self.lr)), replace(self.recipe, weight_decay=0.0)
        return fit(self.runtime, "finetune", self, groups, loss, batches, recipe)

    def _gaussians(self, expert: Backbone, experience: Experience) -> tuple[Tensor, Tensor]:
        """Means and factors of the new classes, from the images and their mirror images, in one pass."""
        expert.eval()
        features, labels = [], []
        with self.runtime.phase("extract"), torch.no_grad():
            for batch in experience.train.test_batches(self.batch_size):
                self.runtime.check_stop()
                features.append(expert.features(torch.cat([batch.x, batch.x.flip(3)])))
                assert batch.y is not None
                labels.append(batch.y.repeat(2))
        f, rows = torch.cat(features), class_rows(torch.cat(labels), experience.new_classes)
        where = f"in experience {experience.index}"
        means, factors = zip(*(gaussian(f[r], f"class {c} {where}") for c, r in rows.items()), strict=True)
        return torch.stack(means), torch.stack(factors)

    def predict(self, batch: Batch) -> Tensor:
        """Probabilities, averaged over the experts that know a class [B, num_seen]."""
        votes = []
        for expert, mean_KD, chol_KDD in zip(self.experts, self.means, self.factors, strict=True):
            expert.eval()
            votes.append(log_density(expert.features(batch), mean_KD, chol_KDD))
        return vote(votes, len(self.means[0]), self.temperature).float()

    def state_dict(self) -> dict[str, Any]:
        return {"experts": [expert.state_dict() for expert in self.experts]} | collect(self, "means", "factors")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it; experts that are missing are made first, those too many go."""
        while len(self.experts) < len(state["experts"]):
            self._add_expert()
        del self.experts[len(state["experts"]) :]
        for expert, saved in zip(self.experts, state["experts"], strict=True):
            expert.load_state_dict(saved)
        for name in ("means", "factors"):
            setattr(self, name, [value.to(self.runtime.device).clone() for value in state[name]])
