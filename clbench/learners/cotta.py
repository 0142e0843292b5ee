"""CoTTA: continual test-time domain adaptation (Wang, Fink, Van Gool & Dai, CVPR 2022, arXiv 2203.13591).

Network and head are trained on the source as in `finetune`. Three copies answer a test batch: the source theta_0, a student
theta and a teacher theta', both theta_0 at the start; BatchNorm uses the statistics of the batch.
  1. y' = teacher(x), or, where the mean confidence of the source lies below `threshold`, the mean of the teacher's logits
     over `augmentations` random views of x
  2. one step of the student on -sum_c softmax(y')_c log softmax(student(x))_c
  3. theta' <- alpha theta' + (1 - alpha) theta
  4. each number of theta goes back to theta_0 with probability `restore`
The answer is y' (answer=before, the release), or teacher(x) after these steps (answer=after).

steps   how often 1. to 4. are done on a batch (the release's OPTIM.STEPS); the answer is the last y'
loss    "cross_entropy" (default, the paper and the release for CIFAR): the term of 2.; "symmetric" (the release for ImageNet):
        the mean of it and of the one with teacher and student exchanged
reset   "never" (default); "set", "batch": student, teacher and moments are the source's again before each set, or batch
        (the release's `reset` and MODEL.EPISODIC)

All weights of network and head adapt. Views: colour jitter, affine, blur, flip and noise in the release's ranges, one draw for
a batch; the confidence of `threshold` is 0.92 for CIFAR-10-C, 0.72 for CIFAR-100-C, 0.1 (restore 0.001, SGD 0.01) for
ImageNet-C. Deviations: views that are not used are not computed (the CIFAR release computes them, which changes no answer);
the order of the colour operations is fixed. `learn` starts from the source's own weights again.
Published numbers: none read.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.learners.finetune import Finetune
from clbench.models.backbone import Backbone
from clbench.streams import rng
from clbench.training.adaptation import Adapted, Reset, batch_statistics, begins_anew, checked_reset
from clbench.training.fit import Recipe
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect


class Cotta(Finetune):
    """State: backbone and head of the source, student with its moments, teacher, number of steps taken."""

    capabilities: ClassVar[Capabilities] = Capabilities(transductive=True, adapts_at_test=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        threshold: float = 0.92,  # mean confidence of the source below which views are averaged
        augmentations: int = 32,
        alpha: float = 0.999,
        restore: float = 0.01,
        answer: Literal["before", "after"] = "before",  # predict, then adapt; or adapt, then predict
        reset: Reset = "never",  # when adaptation starts from the source again
        steps: int = 1,  # on each test batch
        loss: Literal["cross_entropy", "symmetric"] = "cross_entropy",
        adapt_optimizer: Literal["adam", "sgd"] = "adam",
        adapt_lr: float = 1e-3,
        lr: float = 0.01,
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = constant,
    ):
        for name, value in (("alpha", alpha), ("restore", restore)):
            if not 0 <= value <= 1:
                raise UserError(f"learner.{name} must lie between 0 and 1, got {value}")
        for name, count in (("augmentations", augmentations), ("steps", steps)):
            if count < 1:
                raise UserError(f"learner.{name} must be at least 1, got {count}")
        if loss not in ("cross_entropy", "symmetric"):
            raise UserError(f"unknown learner.loss={loss}: choose cross_entropy or symmetric")
        super().__init__(
            model, runtime, lr=lr, backbone_lr=backbone_lr, epochs=epochs, batch_size=batch_size, momentum=momentum,
            weight_decay=weight_decay, schedule=schedule,
        )  # fmt: skip
        self.threshold, self.augmentations, self.alpha, self.restoring = threshold, augmentations, alpha, restore
        self.answer, self.answered = answer, 0
        self.reset: Reset = checked_reset(reset)
        self.steps, self.symmetric = steps, loss == "symmetric"
        self.student, self.teacher = Adapted(Recipe(adapt_optimizer), adapt_lr), dict[str, Tensor]()

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train on the source; adaptation starts anew."""
        self.student.begin({})
        self.teacher = {}
        log = super().learn(experience)
        self.begin()
        return log

    def begin(self) -> None:
        """Student and teacher are the source."""
        self.student.begin(self.source())
        self.teacher = {name: value.clone() for name, value in self.source().items()}

    def source(self) -> dict[str, Tensor]:
        """The weights that training left, by name."""
        return {name: p.detach() for name, p in Network(self.model, self.head).named_parameters()}

    def scores(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        """Logits of images under some weights [B, num_seen]."""
        return functional_call(Network(self.model, self.head), weights, (x,))

    def predict(self, batch: Batch) -> Tensor:
        """Logits [B, num_seen]; changes the state."""
        self.model.eval()
        if begins_anew(self.reset, batch):
            self.begin()
        with batch_statistics(self.model):
            for _ in range(self.steps):
                z = self.target(batch.x)
                with torch.enable_grad():
                    self.student.step(self.gap(z, self.scores(self.student.weights, batch.x)))
                with torch.no_grad():
                    self.follow()
                    self.go_back()
                    self.answered += 1
            with torch.no_grad():
                return z if self.answer == "before" else self.scores(self.teacher, batch.x)

    def gap(self, z: Tensor, own: Tensor) -> Tensor:
        """What a step of the student lowers: its logits `own` [B, K] against the teacher's z [B, K]."""
        one = -(z.softmax(1) * own.log_softmax(1)).sum(1).mean()
        return (one - (own.softmax(1) * z.log_softmax(1)).sum(1).mean()) / 2 if self.symmetric else one

    @torch.no_grad()
    def target(self, x: Tensor) -> Tensor:
        """The teacher's logits, averaged over views where the source is unsure [B, num_seen]."""
        confidence = self.scores(self.source(), x).softmax(1).amax(1).mean()
        if confidence >= self.threshold:
            return self.scores(self.teacher, x)
        views = (self.scores(self.teacher, self.view(x, k)) for k in range(self.augmentations))
        return torch.stack(list(views)).mean(0)

    def follow(self) -> None:
        """The teacher becomes a moving average of the student."""
        for name, value in self.student.weights.items():
            self.teacher[name].lerp_(value.detach(), 1 - self.alpha)

    def go_back(self) -> None:
        """Stochastic restore."""
        generator, source = self._generator("restore"), self.source()
        for name, value in self.student.weights.items():
            chosen = torch.rand(value.shape, generator=generator) < self.restoring
            value.copy_(torch.where(chosen.to(value.device), source[name], value))

    def view(self, x: Tensor, number: int) -> Tensor:
        """Images under random view `number` of this batch; what lies outside [0, 1] is clipped."""
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.model.profile.mean, self.model.profile.std))
        drawn = torch.rand(12, generator=self._generator("view", number)).tolist()
        pixels = _changed((x * std + mean).clamp(0, 1), drawn)
        noise = torch.randn(x.shape, generator=self._generator("noise", number)).to(x.device)
        return ((pixels + 0.005 * noise).clamp(0, 1) - mean) / std

    def _generator(self, *parts: int | str) -> torch.Generator:
        key = rng.key(self.runtime.seed, "cotta", self.answered, *parts)
        return torch.Generator().manual_seed(key >> 1)

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head", "student", "teacher", "answered")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({name: value for name, value in state.items() if name != "student"})
        self.student.load_state_dict(state["student"], self.runtime.device)


class Network(nn.Module):
    """Backbone and head in one."""

    def __init__(self, model: Backbone, head: nn.Module):
        super().__init__()
        self.model, self.head = model, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.model.features(x))


def _changed(x: Tensor, drawn: list[float]) -> Tensor:
    """Pixels [B, 3, S, S] in [0, 1] under 12 draws of U(0, 1): the release's ranges for CIFAR."""
    from torchvision.transforms import functional as V

    def between(i: int, low: float, high: float) -> float:
        return low + (high - low) * drawn[i]

    size = x.shape[-1]
    x = V.adjust_brightness(x, between(0, 0.6, 1.4))
    x = V.adjust_contrast(x, between(1, 0.7, 1.3))
    x = V.adjust_saturation(x, between(2, 0.5, 1.5))
    x = V.adjust_hue(x, between(3, -0.06, 0.06))
    x = V.adjust_gamma(x, between(4, 0.7, 1.3))
    x = V.pad(x, [size // 2] * 4, padding_mode="edge")
    moved = [round(between(i, -1, 1) * size / 16) for i in (6, 7)]
    x = V.affine(x, between(5, -15, 15), moved, between(8, 0.9, 1.1), [0.0, 0.0], interpolation=V.InterpolationMode.BILINEAR)
    x = V.center_crop(V.gaussian_blur(x, [5, 5], [between(9, 0.001, 0.5)] * 2), [size, size])
    return V.hflip(x) if drawn[10] < 0.5 else x
