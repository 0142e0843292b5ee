"""Gaussians per class in feature space, samples from them, and classifier alignment on those samples.

    full            one Gaussian with its covariance (SLCA, SLCA++, SSIAT; MOS by default): [D, D] numbers a class
    diagonal        one Gaussian with its variances (MOS on ImageNet-A): [D]
    multi-centroid  k-means centroids, each with its variances (MOS): [C, D], sampled with equal shares

Alignment trains a classifier alone, with the softmax over all classes: per epoch S samples of each of K classes, shuffled, in
K batches of S, so one step a class and an epoch; the learning rate follows a cosine that moves once an epoch.

Legend: K classes, D features, C centroids, S samples per class. Statistics are computed in float64 and kept in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.interfaces import UserError
from clbench.models.heads import LinearHead
from clbench.streams import rng
from clbench.training.cholesky import check_finite, repaired
from clbench.training.fit import Recipe, fit
from clbench.training.losses import normalised_cross_entropy
from clbench.training.runtime import Runtime
from clbench.training.schedules import stepwise_cosine
from clbench.training.state import groups_of

LEAST = 1e-8  # the first ridge of a covariance without a Cholesky factor where none was asked for
Kind = Literal["full", "diagonal", "multi-centroid"]
FIELDS = {
    "full": ("mean_KD", "cov_KDD"),
    "diagonal": ("mean_KD", "var_KD"),
    "multi-centroid": ("mean_KD", "centre_KCD", "var_KCD", "members_KC"),
}


def class_rows(y: Tensor, classes: Sequence[int]) -> dict[int, Tensor]:
    """Rows of each class, in their order, found in one sort: y [N] int64 -> {class: [N_c] int64}."""
    order = torch.argsort(y, stable=True)
    wanted = torch.as_tensor(list(classes), dtype=y.dtype, device=y.device)
    first = torch.searchsorted(y[order], wanted).tolist()
    last = torch.searchsorted(y[order], wanted, right=True).tolist()
    return {int(c): order[a:b] for c, a, b in zip(classes, first, last, strict=True)}


class ClassGaussians:
    """Statistics of the classes seen so far; class k is the k-th that was added. State: the tensors that FIELDS names.

    mean_KD     means of the classes, whatever the kind
    cov_KDD     unbiased covariances + ridge I ("full")
    var_KD      their diagonals ("diagonal")
    centre_KCD  k-means centroids, var_KCD their biased variances + ridge, members_KC their images (0: padding); a centroid
                of one image has no spread and is not sampled where the class has others, as in MOS ("multi-centroid")

    `seed` is for k-means. `UserError` for an unknown kind or fewer than one centroid.
    """

    def __init__(
        self,
        ridge: float = 1e-4,
        device: torch.device | str = "cpu",
        kind: Kind = "full",
        centroids: int = 10,
        seed: int = 0,
    ):
        if kind not in FIELDS:
            raise UserError(f"unknown kind {kind!r} of class Gaussians: choose {', '.join(FIELDS)}")
        if centroids < 1:
            raise UserError(f"a class needs at least 1 centroid, got {centroids}")
        self.ridge, self.kind, self.centroids, self.seed = ridge, kind, centroids, seed
        self.mean_KD = torch.zeros(0, 0, device=device)
        self.cov_KDD = torch.zeros(0, 0, 0, device=device)
        self.var_KD = torch.zeros(0, 0, device=device)
        self.centre_KCD = torch.zeros(0, 0, 0, device=device)
        self.var_KCD = torch.zeros(0, 0, 0, device=device)
        self.members_KC = torch.zeros(0, 0, dtype=torch.int64, device=device)
        self._chol_KDD: Tensor | None = None

    def __len__(self) -> int:
        return len(self.mean_KD)

    def add(self, *features: Tensor) -> None:
        """Append a class from each features [N, D]; a single sample has covariance ridge I. FloatingPointError for NaN."""
        for i, f in enumerate(features):
            check_finite(f, f"features of class {len(self) + i}")
        found = [self._statistics(f.double(), len(self) + i) for i, f in enumerate(features)]
        for name in FIELDS[self.kind] if found else ():
            rows, old = torch.stack([one[name] for one in found]), getattr(self, name)
            setattr(self, name, torch.cat([old, rows]) if len(old) else rows)

    def _statistics(self, f: Tensor, k: int) -> dict[str, Tensor]:
        """What class `k` adds to each of FIELDS, from f [N, D] float64."""
        mean = f.mean(0)
        centred = f - mean
        if self.kind == "full":
            eye = torch.eye(f.shape[1], dtype=f.dtype, device=f.device)
            spread = {"cov_KDD": (centred.T @ centred / max(1, len(f) - 1) + self.ridge * eye).float()}
        elif self.kind == "diagonal":
            spread = {"var_KD": (centred.square().sum(0) / max(1, len(f) - 1) + self.ridge).float()}
        else:
            spread = self._centroids(f, k)
        return {"mean_KD": mean.float(), **spread}

    def _centroids(self, f: Tensor, k: int) -> dict[str, Tensor]:
        """Clusters of class `k`'s f [N, D] float64, padded to C by empty ones."""
        cluster = kmeans(f, self.centroids, rng.key(self.seed, "kmeans", k))
        centre, var = f.new_zeros(2, self.centroids, f.shape[1])
        members = torch.bincount(cluster, minlength=self.centroids)
        for c in range(int(cluster.max()) + 1):
            part = f[cluster == c]
            centre[c], var[c] = part.mean(0), part.var(0, correction=0) + self.ridge
        return {"centre_KCD": centre.float(), "var_KCD": var.float(), "members_KC": members}

    def centres(self) -> Tensor:
        """Everything that stands for a class: means [K, D], or all centroids [sum of their numbers, D]."""
        return self.centre_KCD[self.members_KC > 0] if self.kind == "multi-centroid" else self.mean_KD

    def replace(self, mean_KD: Tensor, cov_KDD: Tensor) -> None:
        """Other moments of the same classes ("full")."""
        assert mean_KD.shape == self.mean_KD.shape and cov_KDD.shape == self.cov_KDD.shape
        if cov_KDD is not self.cov_KDD:
            self._chol_KDD = None
        self.mean_KD, self.cov_KDD = mean_KD, cov_KDD

    def cholesky(self) -> Tensor:
        """Lower factors [K, D, D] of "full" covariances, each computed once.

        A covariance that lost definiteness gets ten times the ridge, a hundred times, and so on (`cholesky.repaired`).
        """
        done = 0 if self._chol_KDD is None else len(self._chol_KDD)
        if done < len(self):
            cov = self.cov_KDD[done:].double()
            chol, bad = torch.linalg.cholesky_ex(cov)
            for i in torch.nonzero(bad).flatten().tolist():
                chol[i], _ = repaired(cov[i], f"the covariance of class {done + i}", ridge=9 * self.ridge or LEAST)
            fresh = chol.float()
            self._chol_KDD = fresh if self._chol_KDD is None else torch.cat([self._chol_KDD, fresh])
        assert self._chol_KDD is not None
        return self._chol_KDD

    def sample(self, per_class: int, scale_K: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw from N(scale_k mean_k, cov_k) for every class -> features [K * per_class, D], labels [K * per_class]."""
        k, d = self.mean_KD.shape
        noise = torch.randn(k, per_class, d, generator=rng).to(self.mean_KD.device)
        if self.kind == "full":
            x = (self.mean_KD * scale_K[:, None])[:, None] + noise @ self.cholesky().transpose(1, 2)
        elif self.kind == "diagonal":
            x = (self.mean_KD * scale_K[:, None])[:, None] + noise * self.var_KD.sqrt()[:, None]
        else:
            members = self.members_KC.cpu()
            spread = members > 1
            share = torch.where(spread.any(1, keepdim=True), spread, members > 0).float()
            pick = torch.multinomial(share, per_class, replacement=True, generator=rng).to(noise.device)
            row = torch.arange(k, device=noise.device)[:, None]
            x = self.centre_KCD[row, pick] * scale_K[:, None, None] + noise * self.var_KCD[row, pick].sqrt()
        return x.reshape(-1, d), torch.arange(k, device=x.device).repeat_interleave(per_class)

    def state_dict(self) -> dict[str, Any]:
        """The statistics of this kind."""
        return {name: getattr(self, name) for name in FIELDS[self.kind]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace them, on the device they are on here."""
        for name in FIELDS[self.kind]:
            setattr(self, name, state[name].to(self.mean_KD.device).clone())
        self._chol_KDD = None


def kmeans(f: Tensor, count: int, key: int) -> Tensor:
    """Cluster of every row of f [N, D] -> [N] int64, at most `count` clusters and no more than distinct rows.

    scikit-learn's k-means (k-means++ start, Lloyd), seeded, in one thread: the number of threads cannot change a bit of it.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    rows = f.cpu().numpy()
    count = min(count, len(np.unique(rows, axis=0)))
    with threadpool_limits(limits=1):
        labels = KMeans(count, n_init="auto", random_state=key % 2**32).fit(rows).labels_
    return torch.from_numpy(np.asarray(labels, np.int64)).to(f.device)


class GaussianBatches:
    """Per epoch: S samples of each of K classes, shuffled, in K batches of S. A pure function of the step.

    age_K  experiences since each class was learned: every sample is divided by 1 + rho age, rho ~ U(low, high) (SLCA++)
    """

    def __init__(
        self,
        gaussians: ClassGaussians,
        scale_K: Tensor,
        per_class: int,
        epochs: int,
        key: int,
        age_K: Tensor | None = None,
        rho: tuple[float, float] = (0.01, 0.03),
    ):
        self.gaussians, self.scale_K, self.per_class, self.key = gaussians, scale_K, per_class, key
        self.age_K, self.rho = age_K, rho
        self.steps = epochs * len(gaussians)
        self._epoch: tuple[int, Tensor, Tensor] | None = None

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Features [S, D] and labels [S]."""
        epoch, i = divmod(step, len(self.gaussians))
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(rng.key(self.key, epoch) >> 1)
            x, y = self.gaussians.sample(self.per_class, self.scale_K, generator)
            if self.age_K is not None:
                low, high = self.rho
                rho = low + (high - low) * torch.rand(len(y), generator=generator).to(x.device)
                x = x / (1 + rho * self.age_K[y])[:, None]
            order = torch.randperm(len(y), generator=generator).to(x.device)
            self._epoch = (epoch, x[order], y[order])
        part = slice(i * self.per_class, (i + 1) * self.per_class)
        return self._epoch[1][part], self._epoch[2][part]


def shrunken_means(experience_of_class: Sequence[int], index: int) -> Tensor:
    """SLCA's factor of each class's mean [K]: 0.9 + 0.1 (tau + 1) / (t + 1), tau the class's own experience, t `index`."""
    return 0.9 + 0.1 * (torch.tensor(experience_of_class, dtype=torch.float32) + 1) / (index + 1)


Prepared = tuple[list[dict[str, Any]], Callable[[tuple[Tensor, Tensor]], Tensor], GaussianBatches, Recipe]


def alignment(
    runtime: Runtime,
    head: nn.Module,
    gaussians: ClassGaussians,
    *,
    samples: int = 256,
    epochs: int = 5,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    mean_scale_K: Tensor | None = None,
    age_K: Tensor | None = None,
    rho: tuple[float, float] = (0.01, 0.03),
    temperature: float | None = None,
    widths: Sequence[int] | None = None,
    multiplier: float = 1.0,
    name: str = "align",
) -> Prepared:
    """What `fit` needs to align `head` (features [B, D] -> logits [B, K]): groups, loss, batches, recipe.

    mean_scale_K  factor of each class's mean (SLCA, SSIAT: `shrunken_means`); None is 1
    age_K, rho    divide each sample by 1 + rho age (SLCA++); None leaves them
    temperature   of the logit normalisation over the blocks `widths` (SLCA, SLCA++); None does without
    multiplier    of the logits (SSIAT: 20)
    """
    device = gaussians.mean_KD.device
    scale_K = torch.ones(len(gaussians)) if mean_scale_K is None else mean_scale_K
    age_K = None if age_K is None else age_K.to(device)
    batches = GaussianBatches(gaussians, scale_K.to(device), samples, epochs, runtime.key(name), age_K, rho)
    assert temperature is None or widths is not None, "logit normalisation needs the widths of the head's blocks"

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        z = head(batch[0]) * multiplier
        if temperature is None:
            return F.cross_entropy(z, batch[1])
        return normalised_cross_entropy(z, batch[1], widths or (), temperature)

    recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=lambda place: stepwise_cosine(place, periods=epochs))
    return groups_of((head, lr)), loss, batches, recipe


def align(
    runtime: Runtime, learner: Any, head: nn.Module, gaussians: ClassGaussians, *, name: str = "align", **options: Any
) -> dict[str, float]:
    """Train `head`, which must be in the learner's state, on samples of `gaussians`; `options` are those of `alignment`.

    The blocks of a `LinearHead` are trained as one and written back: the same steps, with one product each.
    """
    if not isinstance(head, LinearHead) or not all(p.requires_grad for p in head.parameters()):
        return fit(runtime, name, learner, *alignment(runtime, head, gaussians, name=name, **options))
    joined = head.joined()
    log = fit(runtime, name, learner, *alignment(runtime, joined, gaussians, name=name, **options))
    head.take(joined)
    return log
