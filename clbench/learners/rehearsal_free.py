"""The parts of rehearsal-free learning, one by one ("A Closer Look at Rehearsal-Free Continual Learning", CVPR-W 2023, arXiv
2203.17269): which loss, which distillation, which hold on the weights, towards what, in which weights.

    L(z, y) + kd_strength KD + (reg_strength / 2) sum_p F_p (theta_p - theta*_p)^2

head_loss  L over the experience's classes: "softmax" cross-entropy, or "bce", a sigmoid for each class: summed over the
           classes, mean over the batch
kd         "pred": T^2 KL to the answers of the network before the experience, on the classes known then; "feat": squared
           distance to its features
reg        "l2": F = 1; "ewc": F the diagonal Fisher information of L, summed over experiences
anchor     theta*: "previous", the weights before the experience; "initial", those before the first one, from that on; of
           reg=l2, as there is no Fisher information before the first experience
trainable  all | attention | qkv | norm | head, of the backbone (head: nothing of it); half and lisa as in `training/steps.py`

`pred_kd`, `feat_kd`, `l2_reg` and `ewc` are cells of this grid, to the last bit. The paper's findings: bce and pred matter
most; reg alone fails from scratch; with pre-trained weights l2 towards them comes first.
No official code was found; the strengths, the temperature 2, softmax in KD under either loss and the sum in bce are choices.
Published (as quoted, not checked): CIFAR-100 in 10 experiences, ResNet-18 from scratch, last accuracy: pred 25.2 %, pred + ewc
22.7 %, pred + l2 21.6 %, pred + feat 19.1 %, ewc alone 7.7 % (bce) and 7.3 % (softmax).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.learners.feat_kd import distance_of_features
from clbench.learners.regularised import Penalty, Regularised, distance_of_predictions
from clbench.models.backbone import Backbone
from clbench.training.adaptation import affine
from clbench.training.fisher import Weights, kept, moved, quadratic_penalty, sum_per_sample, train_only
from clbench.training.fit import Recipe
from clbench.training.runtime import Runtime
from clbench.training.schedules import cosine
from clbench.training.steps import Project, RefreshOptions, Steps, part_of

GRID = {"head_loss": ("softmax", "bce"), "kd": ("none", "pred", "feat"), "reg": ("none", "l2", "ewc")}
GRID |= {"anchor": ("previous", "initial")}


class RehearsalFree(Regularised):
    """State: backbone, head, the first weights (anchor=initial), the Fisher information so far (reg=ewc)."""

    capabilities: ClassVar[Capabilities] = Capabilities(anytime=True)

    @classmethod
    def capabilities_of(cls, *, reg: str = "l2", **options: Any) -> Capabilities:
        """Fisher information needs the samples again."""
        can = super().capabilities_of(**options)
        return replace(can, needs_random_access=can.needs_random_access or reg == "ewc")

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        head_loss: Literal["softmax", "bce"] = "bce",
        kd: Literal["none", "pred", "feat"] = "pred",
        reg: Literal["none", "l2", "ewc"] = "l2",
        anchor: Literal["previous", "initial"] = "initial",  # of reg
        trainable: Literal["all", "attention", "qkv", "norm", "head", "half", "lisa"] | dict[str, Any] = "qkv",
        kd_strength: float = 1.0,
        reg_strength: float = 1.0,
        temperature: float = 2.0,  # of kd=pred
        lr: float = 5e-5,  # head
        backbone_lr: float = 5e-5,
        epochs: int | None = None,
        batch_size: int = 128,
        weight_decay: float = 0.0,
        schedule: Schedule = cosine,
        refresh: RefreshOptions = None,  # {variant: official | paper, ...}, see `training/refresh.py`
        project: Project = None,  # bloop: what is added gives way to L, see `training/bloop.py`
    ):
        given = {"head_loss": head_loss, "kd": kd, "reg": reg, "anchor": anchor}
        for name, value in given.items():
            if value not in GRID[name]:
                raise UserError(f"unknown learner.{name}={value}: choose {', '.join(GRID[name])}")
        if reg == "ewc" and anchor == "initial":
            raise UserError(
                "learner.anchor=initial has no Fisher information to hold by: choose learner.reg=l2 or anchor=previous"
            )
        if trainable == "head" and (kd == "feat" or reg != "none"):
            raise UserError("learner.trainable=head leaves the backbone as it is: choose learner.reg=none, and kd none or pred")
        train_part(model, part_of(trainable) if isinstance(trainable, dict) or trainable in ("half", "lisa") else trainable)
        recipe = Recipe("adam", weight_decay=weight_decay, schedule=schedule)
        steps = Steps(runtime, refresh=refresh, trainable=trainable, project=project)  # type: ignore[arg-type]
        rates: Any = {"lr": lr, "backbone_lr": backbone_lr}
        super().__init__(model, runtime, recipe, 1.0, **rates, epochs=epochs, batch_size=batch_size, steps=steps)
        self.binary, self.kd, self.reg = head_loss == "bce", kd, reg
        self.kd_strength, self.reg_strength, self.temperature = kd_strength, reg_strength, temperature
        self.initial = kept(model) if reg == "l2" and anchor == "initial" else None
        self.fisher: Weights = {}

    def penalty(self, experience: Experience) -> Penalty | None:
        """The sum of what is chosen of distillation and hold, each with its strength."""
        terms = [(self.kd_strength, self.distillation(experience)), (self.reg_strength, self.hold(experience))]
        asked = [(strength, term) for strength, term in terms if term is not None]
        if not asked:
            return None

        def total(batch: Batch, features: Tensor, z: Tensor) -> Tensor:
            (strength, term), *rest = asked
            found = strength * term(batch, features, z)
            for strength, term in rest:
                found = found + strength * term(batch, features, z)
            return found

        return total

    def distillation(self, experience: Experience) -> Penalty | None:
        """Distance to answers or features of the network as it is now."""
        if not experience.index or self.kd == "none":
            return None
        if self.kd == "feat":
            return distance_of_features(self.model)
        return distance_of_predictions(self.model, self.head, self.temperature)

    def hold(self, experience: Experience) -> Penalty | None:
        """Half the squared distance from the anchor."""
        if self.reg == "none" or (self.initial is None and not experience.index):
            return None
        reference = kept(self.model) if self.initial is None else self.initial
        importance = self.fisher if self.reg == "ewc" else None
        return lambda batch, features, z: quadratic_penalty(self.model, reference, importance)

    def local(self, z: Tensor, batch: Batch, experience: Experience) -> Tensor:
        if not self.binary:
            return super().local(z, batch, experience)
        assert batch.y is not None
        keep = torch.tensor(sorted(experience.classes), device=z.device)
        return binary(z[:, keep], torch.searchsorted(keep, batch.y))

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train, then add the experience's Fisher information where it is needed."""
        log = super().learn(experience)
        if self.reg != "ewc":
            return log
        keep = torch.tensor(sorted(experience.classes), device=self.runtime.device)
        loss_of = binary if self.binary else F.cross_entropy

        def loss(features: Tensor, target: Tensor) -> Tensor:
            return loss_of(self.head(features)[:, keep], target[None])

        total: Weights = {}
        with self.runtime.phase("fisher"), self.model.in_fp32():
            self.model.eval()
            for batch in experience.train.test_batches(self.batch_size):
                self.runtime.check_stop()
                assert batch.y is not None
                part = sum_per_sample(self.model, batch.x, torch.searchsorted(keep, batch.y), loss, Tensor.square)
                total = {name: f + total[name] if total else f for name, f in part.items()}
        mean = {name: f / len(experience.train) for name, f in total.items()}
        self.fisher = {name: self.fisher.get(name, torch.zeros(())) + f for name, f in mean.items()}
        return log

    def state_dict(self) -> dict[str, Any]:
        held = (["initial"] if self.initial is not None else []) + (["fisher"] if self.reg == "ewc" else [])
        return self.collect(*held)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        weights = {name: moved(state[name], self.runtime.device) for name in ("initial", "fisher") if name in state}
        super().load_state_dict({**state, **weights})


def binary(z: Tensor, y: Tensor) -> Tensor:
    """Sigmoid cross-entropy of logits [B, C] with labels [B], summed over the classes -> the mean over the batch."""
    target = (y[:, None] == torch.arange(z.shape[1], device=z.device)).to(z)
    return F.binary_cross_entropy_with_logits(z, target, reduction="sum") / len(z)


def train_part(model: Backbone, part: str) -> None:
    """As `train_only`; also the normalisation layers alone, or nothing."""
    if part == "head":
        model.freeze()
    elif part == "norm":
        names = affine(model, batch_norm_alone=False)
        if not names:
            raise UserError(f"learner.trainable=norm: {model.identity['name']} has no normalisation layers")
        for name, p in model.named_parameters():
            p.requires_grad_(name in names)
    else:
        train_only(model, part)
