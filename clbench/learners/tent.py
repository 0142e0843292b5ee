"""TENT: fully test-time adaptation by entropy minimisation (Wang, Shelhamer, Liu, Olshausen & Darrell, ICLR 2021,
arXiv 2006.10726).

Network and head are trained on the source as in `finetune`. Then, for every test batch of n samples,
  loss = 1/n sum_i H(softmax z_i),  H(p) = -sum_c p_c log p_c
takes one step on scale and shift of the normalisation layers; BatchNorm uses the statistics of the batch. Nothing else moves.
`learn` starts from the source's own weights again.

reset   "never" (default, as papers on continual adaptation): what was learned goes on from set to set; "set" (the paper):
        scales, shifts and moments of the optimiser are the source's again before each set; "batch": before each batch (the
        release's MODEL.EPISODIC)
norms   "all" (default): BatchNorm, LayerNorm and GroupNorm, as later papers use it on ViTs; "batch": BatchNorm alone, the
        release's choice; in a network without it that is refused
answer  "before" (default, the release): the scores with which the loss was computed (of the last of `steps`); "after": those
        of one more pass behind the step

Constants are the release's for CIFAR-10-C (Adam 1e-3, batch 200); ImageNet-C: adapt_optimizer=sgd adapt_lr=2.5e-4.
Published, read in the release's README: CIFAR-10-C at severity 5, WRN-28-10, with resets: error 43.5 % (source), 18.6 %.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.func import functional_call

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.learners.finetune import Finetune
from clbench.models.backbone import Backbone
from clbench.training.adaptation import Adapted, Reset, affine, batch_statistics, begins_anew, checked_reset, entropy
from clbench.training.fit import Recipe
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect


class Tent(Finetune):
    """State: backbone and head of the source, scales and shifts as they are adapted, moments of their optimiser."""

    capabilities: ClassVar[Capabilities] = Capabilities(transductive=True, adapts_at_test=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        norms: Literal["all", "batch"] = "all",
        answer: Literal["before", "after"] = "before",  # predict, then adapt; or adapt, then predict
        reset: Reset = "never",  # when adaptation starts from the source again
        steps: int = 1,  # on each test batch
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
        if steps < 1:
            raise UserError(f"learner.steps must be at least 1, got {steps}")
        super().__init__(
            model, runtime, lr=lr, backbone_lr=backbone_lr, epochs=epochs, batch_size=batch_size, momentum=momentum,
            weight_decay=weight_decay, schedule=schedule,
        )  # fmt: skip
        self.batch_norm_alone, self.answer, self.steps = norms == "batch", answer, steps
        self.reset: Reset = checked_reset(reset)
        if not affine(model, self.batch_norm_alone):
            name = model.identity["name"]
            raise UserError(f"learner.norms={norms}: model {name} has no such layer with a scale, nothing would change")
        self.adapted = Adapted(Recipe(adapt_optimizer), adapt_lr)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train on the source; adaptation starts anew."""
        self.adapted.begin({})
        log = super().learn(experience)
        self.begin()
        return log

    def source(self) -> dict[str, Tensor]:
        """What adapts, as training left it, by name."""
        return affine(self.model, self.batch_norm_alone)

    def begin(self) -> None:
        """From the source."""
        self.adapted.begin(self.source())

    def scores(self, x: Tensor) -> Tensor:
        """Logits of images under the weights as they are adapted [B, num_seen]."""
        return self.head(functional_call(self.model, self.adapted.weights, (x,)))

    def predict(self, batch: Batch) -> Tensor:
        """Logits [B, num_seen]; changes the state."""
        self.model.eval()
        if begins_anew(self.reset, batch):
            self.begin()
        with batch_statistics(self.model), torch.enable_grad():
            for _ in range(self.steps):
                z = self.adapt(batch.x)
            if self.answer == "after":
                with torch.no_grad():
                    z = self.scores(batch.x)
        return z.detach()

    def adapt(self, x: Tensor) -> Tensor:
        """One step on images -> the logits with which it was computed [B, num_seen]."""
        z = self.scores(x)
        self.adapted.step(entropy(z).mean())
        return z

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head", "adapted")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({name: value for name, value in state.items() if name != "adapted"})
        self.adapted.load_state_dict(state["adapted"], self.runtime.device)
