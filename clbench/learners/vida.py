"""ViDA: homeostatic visual domain adapters for continual test-time adaptation (ICLR 2024).

Every linear layer of attention (qkv and output) gets a low-rank and a high-rank adapter beside it:
  W x  ->  W x + s_low U_l D_l x + s_high U_h D_h x,   D of `low` or `high` rows from N(0, rank^-4), U = 0 at the start.
Network, head and adapters are trained on the source together. At test time a student adapts, network and adapters at a rate
each, and a teacher follows it. For every test batch
  1. u = 0.1 x the mean over images and classes of the variance of the teacher's logits over `augmentations` random views
  2. u >= `threshold`: s_high = 1 + u, s_low = 1 - u (a new domain); else s_low = 1 + u, s_high = 1 - u; of both networks
  3. y' = teacher(x); one step of the student on  -sum_c softmax(y')_c log softmax(student(x))_c
  4. theta' <- alpha theta' + (1 - alpha) theta, adapters with `adapter_alpha`
  5. each number of theta goes back to the source with probability `restore`
The answer is y' (answer=before, the release), or teacher(x) after these steps (answer=after).

variant  "official" (default): the release as it runs, whose setter never reaches the high-rank scale: s_high = 1 always.
         "paper": both scales.

Scales begin as 1; the views of a batch are seen under those of the batch before, as in the release. The head has no adapter.
Deviations: the release warms the adapters up in a training of their own, which would be further passes over the source; views
are CoTTA's. Constants: the release's for CIFAR-10-C (ranks 1 and 128, Adam 1e-4 and 1e-5); CIFAR-100-C: adapt_lr=3e-4
adapter_lr=1e-6; ImageNet-C: SGD 5e-7 and 2e-7, adapter_alpha=0.8, batches of 50. Which ranks were published is not known.
Published numbers: none read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clbench.interfaces import Capabilities, Schedule, UserError
from clbench.learners.cotta import Cotta, Network
from clbench.models.backbone import Backbone
from clbench.models.pet import Pet, normal
from clbench.models.pet_modules import lora
from clbench.training.adaptation import Adapted, Reset
from clbench.training.fit import Recipe
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect

SHARE = 0.1  # of the variance that counts as uncertainty


class Vida(Cotta):
    """State: network, head and adapters of the source, student with its moments, teacher, steps taken, scales [low, high]."""

    capabilities: ClassVar[Capabilities] = Capabilities(transductive=True, adapts_at_test=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        variant: Literal["official", "paper"] = "official",
        low: int = 1,  # rank of one adapter
        high: int = 128,  # and of the other
        threshold: float = 0.2,  # uncertainty from which the high rank counts more
        augmentations: int = 10,
        alpha: float = 0.999,
        adapter_alpha: float = 0.999,
        restore: float = 0.01,
        answer: Literal["before", "after"] = "before",  # predict, then adapt; or adapt, then predict
        reset: Reset = "never",  # when adaptation starts from the source again
        steps: int = 1,  # on each test batch
        adapt_optimizer: Literal["adam", "sgd"] = "adam",
        adapt_lr: float = 1e-4,  # network and head
        adapter_lr: float = 1e-5,
        lr: float = 0.01,
        backbone_lr: float = 0.001,  # adapters too
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = constant,
    ):
        if variant not in ("official", "paper"):
            raise UserError(f"unknown learner.variant={variant}: choose official or paper")
        if not 1 <= low < high:
            raise UserError(f"learner.low={low} must be at least 1 and below learner.high={high}")
        if not 0 <= adapter_alpha <= 1:
            raise UserError(f"learner.adapter_alpha must lie between 0 and 1, got {adapter_alpha}")
        super().__init__(
            model, runtime, threshold=threshold, augmentations=augmentations, alpha=alpha, restore=restore, answer=answer,
            reset=reset, steps=steps, adapt_optimizer=adapt_optimizer, adapt_lr=adapt_lr, lr=lr, backbone_lr=backbone_lr,
            epochs=epochs, batch_size=batch_size, momentum=momentum, weight_decay=weight_decay, schedule=schedule,
        )  # fmt: skip
        self.high_too, self.adapter_alpha = variant == "paper", adapter_alpha
        self.low, self.high = adapter(model, runtime, low), adapter(model, runtime, high)
        model.unfreeze()
        self.pet: Any = nn.ModuleList([model, self.low, self.high])  # all that is trained on the source
        self.student = Adapted(Recipe(adapt_optimizer), adapt_lr, {"low.": adapter_lr, "high.": adapter_lr})
        self.scales = [1.0, 1.0]

    def begin(self) -> None:
        """Student and teacher are the source, under equal scales."""
        super().begin()
        self.scales = [1.0, 1.0]

    def source(self) -> dict[str, Tensor]:
        """The weights that training left, by name, and those of the adapters."""
        pets = {f"{word}.{n}": p.detach() for word in ("low", "high") for n, p in getattr(self, word).values.items()}
        return super().source() | pets

    def scores(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        """Logits of images under some weights and the scales of now [B, num_seen]."""
        low, high = (part(weights, word, scale) for word, scale in zip(("low.", "high."), self.scales, strict=True))
        net = {name: value for name, value in weights.items() if not name.startswith(("low.", "high."))}
        with self.low.use(low), self.high.use(high):
            return functional_call(Network(self.model, self.head), net, (x,))

    @torch.no_grad()
    def target(self, x: Tensor) -> Tensor:
        """Set the scales, then the teacher's logits [B, num_seen]."""
        views = [self.scores(self.teacher, self.view(x, k)) for k in range(self.augmentations)]
        u = SHARE * float(torch.stack(views).var(0).mean()) if len(views) > 1 else 0.0
        more, less = 1 + u, 1 - u
        low, high = (less, more) if u >= self.threshold else (more, less)
        self.scales = [low, high if self.high_too else 1.0]
        return self.scores(self.teacher, x)

    def follow(self) -> None:
        """The teacher becomes a moving average of the student, the adapters at a rate of their own."""
        for name, value in self.student.weights.items():
            alpha = self.adapter_alpha if name.startswith(("low.", "high.")) else self.alpha
            self.teacher[name].lerp_(value.detach(), 1 - alpha)

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "pet", "head", "student", "teacher", "answered", "scales")


def adapter(model: Backbone, runtime: Runtime, rank: int) -> Pet:
    """U D beside every linear layer of attention; `UserError` for a network without."""
    try:
        pet = lora(model, runtime, rank=rank, targets=("qkv", "proj"))
    except UserError:
        name = model.identity["name"]
        raise UserError(f"learner vida: model {name} has no linear layers of attention (qkv, proj); choose a ViT") from None
    pet.inits |= {name: normal(0.0, rank**-2) for name in pet.inits if name.endswith("/a")}
    pet.reset(runtime.generator("vida", rank))
    return pet


def part(weights: Mapping[str, Tensor], start: str, scale: float) -> dict[str, Tensor]:
    """The values of one adapter, times its scale."""
    own = {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
    return {name: value * scale if name.endswith("/b") else value for name, value in own.items()}
