"""FeCAM: Mahalanobis distances with a covariance per class (Goswami, Liu, Twardowski & van de Weijer, NeurIPS 2023).

On a frozen network every class keeps mean mu_c and covariance S_c of its features. arXiv 2309.14062.

    shrinkage      S' = S + g1 V1 I + g2 V2 (1 - I), V1 the mean variance, V2 the mean of the covariances that are not 0
    normalisation  S'' = S'_ij / sqrt(S'_ii S'_jj): unit diagonal, so that classes of wide and of narrow spread compare
    distance       D_c(x) = (x - mu_c)^T S''^-1 (x - mu_c), the smallest wins

variant "official", in the two forms that the authors' code (dipamgoswami/FeCAM) has:
  form "vit"  features are L2-normalised first, mean and covariance are theirs; the mean is not normalised again; g1 1, g2 0
  form "cnn"  S is that of the features' square roots (Tukey, power 0.5), shrunk twice with g1 1, g2 1; x and mu_c (mean, then
              power) are L2-normalised in the distance. `train_first` trains the network in experience 0 (SGD, cosine),
              then it is frozen. Needs features that are not negative.
variant "pilot" is another method under the same name (LAMDA-PILOT): S + 100 I (absolute; `gamma1`), then the *correlation of
  the rows* of that matrix in place of S'', its pseudo-inverse (it is always singular), x and mu_c L2-normalised in the
  distance. Off-diagonals nearly vanish, so it comes close to the nearest mean of normalised features. There it follows the
  tuning of an adapter in experience 0, which is not part of this variant.

Deviations: S'' is inverted by Cholesky in float64 (the release: pseudo-inverse, the same where S'' is definite; a ridge of
1e-6, ten times more each time, where it is not). A class of one image has S'' = I. The release answers with cosines to the
classifier's weights in experience 0 of the CNN form; here all experiences use the distance. A class that comes back
(domain-incremental) has mean and covariance of all its samples.
Published: CIFAR-100 B0 Inc10, ViT-B/16 augreg_in21k, last about 85.7 %, ImageNet-R about 63.7 % (recalled, not re-checked).

Legend: K classes, D features, N samples. Statistics are computed in float64 and kept in float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LOWEST, LinearHead
from clbench.streams.images.data import shuffled
from clbench.training.cholesky import check_finite, repaired
from clbench.training.features import extract
from clbench.training.fit import Recipe, fit
from clbench.training.gaussians import class_rows
from clbench.training.runtime import Runtime
from clbench.training.schedules import cosine
from clbench.training.state import collect, groups_of, restore

TUKEY = 0.5
RIDGE = 1e-6  # the first one that is tried on a matrix without a Cholesky factor
PILOT_RIDGE = 100.0


def tukey(x: Tensor) -> Tensor:
    """x^0.5 of features [N, D]; `UserError` where one is below 0."""
    if (x < 0).any():
        raise UserError("learner.form=cnn takes roots of features, and this network's can be negative: use learner.form=vit")
    return x.pow(TUKEY)


def shrink(cov: Tensor, gamma1: float, gamma2: float) -> Tensor:
    """S + g1 V1 I + g2 V2 (1 - I): cov [D, D] -> [D, D]."""
    eye = torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
    off = cov * (1 - eye)
    v1, v2 = cov.diagonal().mean(), off.sum() / (off != 0).sum().clamp_min(1)
    return cov + gamma1 * v1 * eye + gamma2 * v2 * (1 - eye)


def correlation(cov: Tensor) -> Tensor:
    """Unit diagonal: cov [D, D] -> [D, D]; a feature without variance correlates with none."""
    sd = cov.diagonal().sqrt()
    sd = torch.where(sd > 0, sd, torch.ones_like(sd))
    out = cov / (sd[:, None] * sd)
    out.diagonal().fill_(1.0)
    return out


def whitener(matrix: Tensor, singular: bool = False, what: str = "a covariance") -> Tensor:
    """W [D, D] with W^T W = matrix^-1, by Cholesky; of the pseudo-inverse by eigenvalues where it is known to be `singular`.

    FloatingPointError, which says `what` it is, where a number in it is NaN or infinite.
    """
    if singular:
        check_finite(matrix, f"numbers of {what}")
        values, vectors = torch.linalg.eigh(matrix)
        kept = values > len(values) * torch.finfo(torch.float32).eps * values.max()
        return torch.where(kept, values.clamp_min(0).rsqrt(), 0.0)[:, None] * vectors.T
    chol, _ = repaired(matrix, what, ridge=RIDGE)
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(chol, eye, upper=False)


def distances(x: Tensor, mean_KD: Tensor, whiten_KDD: Tensor) -> Tensor:
    """||W_k (x - mu_k)||^2: x [B, D] -> [B, K]; some classes at a time, which bounds the memory by 64 MB."""
    out = []
    size = max(1, (1 << 24) // max(1, x.numel()))
    for mean, whiten in zip(mean_KD.split(size), whiten_KDD.split(size), strict=True):
        z = (x @ whiten.flatten(0, 1).T).unflatten(1, mean.shape) - (whiten @ mean[:, :, None])[:, :, 0]
        out.append(z.square().sum(2))
    return torch.cat(out, dim=1)


class Fecam:
    """State: counts, means, means and scatter matrices of what covariances are taken of; the network where it is trained."""

    capabilities: ClassVar[Capabilities] = Capabilities(trains=False)

    @staticmethod
    def capabilities_of(*, train_first: bool = False, **options: Any) -> Capabilities:
        """A network that is trained first needs the samples again for its statistics."""
        return replace(Fecam.capabilities, needs_random_access=train_first, trains=train_first)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        variant: Literal["official", "pilot"] = "official",  # official | pilot (LAMDA-PILOT's, another method)
        form: Literal["vit", "cnn"] = "vit",  # vit | cnn (square roots of the features, shrunk twice)
        gamma1: float | None = None,  # null: 1; pilot: 100, absolute
        gamma2: float | None = None,  # null: 0 (vit), 1 (cnn)
        batch_size: int = 128,
        train_first: bool = False,  # true: train the network in experience 0, then freeze it (networks from scratch)
        epochs: int | None = None,  # of that training
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = cosine,
    ):
        self.model, self.runtime, self.batch_size = model, runtime, batch_size
        self.pilot, self.cnn = variant == "pilot", form == "cnn"
        self.first = not (self.pilot or self.cnn)  # normalise before the statistics
        if self.pilot and (self.cnn or gamma2 is not None):
            raise UserError("learner.form=cnn and learner.gamma2 have no effect with learner.variant=pilot: leave them out")
        if self.pilot and gamma1 is not None and gamma1 <= 0:
            raise UserError(f"learner.gamma1 must be above 0 with learner.variant=pilot, got {gamma1}")
        if epochs is not None and not train_first:
            raise UserError("learner.epochs has no effect with learner.train_first=false: nothing is trained")
        self.gamma1 = gamma1 if gamma1 is not None else PILOT_RIDGE if self.pilot else 1.0
        self.gamma2 = gamma2 if gamma2 is not None else 1.0 if self.cnn else 0.0
        self.train_first, self.lr, self.epochs = train_first, lr, runtime.epochs(epochs)
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.counts_K = torch.zeros(0, device=runtime.device)
        self.proto_KD, self.mean_KD = (torch.zeros(0, model.num_features, device=runtime.device) for _ in range(2))
        self.scatter_KDD = torch.zeros(0, model.num_features, model.num_features, device=runtime.device)
        self._whiten_KDD: Tensor | None = None
        if not train_first:
            model.freeze()

    def learn(self, experience: Experience) -> dict[str, float]:
        """One pass over the new data; in experience 0 the training of the network where that is asked for."""
        log = {}
        if self.train_first and not len(self.counts_K):
            log = self._train(experience)
            self.model.freeze()
        features, y = extract(self.runtime, self.model, experience.train, self.batch_size)
        self._grow(experience.num_seen - len(self.counts_K))
        for c, rows in class_rows(y, experience.classes).items():
            check_finite(features[rows], f"features of class {c} in experience {experience.index}")
            self._add(c, features[rows])
        self._whiten_KDD = None
        return log | {"train_samples": float(len(y))}

    def _train(self, experience: Experience) -> dict[str, float]:
        """Cross-entropy over the classes of experience 0; the linear head is thrown away."""
        self.model.train()
        head = LinearHead(self.model.num_features).to(self.runtime.device)
        head.grow(len(experience.classes), self.runtime.generator("head"))

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            return F.cross_entropy(head(self.model.features(batch)), batch.y)

        groups = groups_of((self.model, self.lr), (head, self.lr))
        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        return fit(self.runtime, "train", self, groups, loss, batches, self.recipe)

    def _grow(self, more: int) -> None:
        for name in ("counts_K", "proto_KD", "mean_KD", "scatter_KDD"):
            old: Tensor = getattr(self, name)
            setattr(self, name, torch.cat([old, old.new_zeros(max(0, more), *old.shape[1:])]))

    def _add(self, c: int, features: Tensor) -> None:
        """Merge the moments of new samples [N, D] of class c into those that are there."""
        proto = F.normalize(features, dim=1) if self.first else features
        f = (tukey(features) if self.cnn else proto).double()
        n, new = self.counts_K[c].double(), len(f)
        gap = f.mean(0) - self.mean_KD[c].double()
        centred = f - f.mean(0)
        scatter = centred.T @ centred + torch.outer(gap, gap) * (n * new / (n + new))
        self.scatter_KDD[c] += scatter.float()
        self.mean_KD[c] += (gap * (new / (n + new))).float()
        self.proto_KD[c] += ((proto.double().mean(0) - self.proto_KD[c].double()) * (new / (n + new))).float()
        self.counts_K[c] += new

    def normalised_covariance(self, c: int) -> Tensor:
        """S'' of class c [D, D] float64."""
        cov = self.scatter_KDD[c].double() / max(1.0, float(self.counts_K[c]) - 1)
        if self.pilot:
            return torch.corrcoef(cov + self.gamma1 * torch.eye(len(cov), dtype=cov.dtype, device=cov.device))
        for _ in range(2 if self.cnn else 1):
            cov = shrink(cov, self.gamma1, self.gamma2)
        return correlation(cov)

    def _whitener(self, c: int) -> Tensor:
        what = f"the covariance of class {c} after experience {self.runtime.experience}"
        return whitener(self.normalised_covariance(c), self.pilot, what).float()

    def predict(self, batch: Batch) -> Tensor:
        """Negative distances [B, num_seen]."""
        self.model.eval()
        if self._whiten_KDD is None:
            self._whiten_KDD = torch.stack([self._whitener(c) for c in range(len(self.counts_K))])
        x, mean_KD = self.model.features(batch), self.proto_KD
        if self.cnn:
            x, mean_KD = tukey(x), tukey(mean_KD)
        if not self.first:
            mean_KD = F.normalize(mean_KD, dim=1)
        z = -distances(F.normalize(x, dim=1), mean_KD, self._whiten_KDD)
        return z.masked_fill(self.counts_K == 0, LOWEST)

    def state_dict(self) -> dict[str, Any]:
        network = ("model",) if self.train_first else ()
        return collect(self, "counts_K", "proto_KD", "mean_KD", "scatter_KDD", *network)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it; a network that was trained is frozen again."""
        restore(self, state)
        self._whiten_KDD = None
        if self.train_first:
            self.model.freeze() if len(self.counts_K) else self.model.unfreeze()
