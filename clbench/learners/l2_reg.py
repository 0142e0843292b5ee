"""L2 regularisation towards earlier weights, rehearsal-free (Smith, Tian, Halbe, Hsu & Kira, CVPR-W 2023, arXiv 2203.17269,
"A Closer Look at Rehearsal-Free Continual Learning").

    local cross-entropy + (strength / 2) |theta - theta*|^2

over the trained part of the backbone, theta* being its weights at the end of the previous experience (`reference: previous`)
or the pre-trained ones (`pretrained`, from the first experience on). `trainable: qkv` trains the qkv projections alone, with
which the paper reports to beat prompting on ImageNet-R; attention adds the output projections; all is all.

No official code was found; the constants are start values (Adam 5e-5, batch 128: fine-tuning in the CODA-Prompt repository),
and the strength is to be tuned. No published number is given: the paper's tables were not re-read.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, Schedule
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead
from clbench.streams.images.data import shuffled
from clbench.training.fisher import Part, kept, moved, quadratic_penalty, train_only
from clbench.training.fit import Recipe, fit
from clbench.training.losses import masked_cross_entropy
from clbench.training.runtime import Runtime
from clbench.training.schedules import cosine
from clbench.training.state import collect, groups_of, restore


class L2Reg:
    """State: backbone, head, the pre-trained weights where these are the reference (else: the backbone as learn() finds it)."""

    capabilities: ClassVar[Capabilities] = Capabilities()

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        strength: float = 1.0,
        reference: Literal["previous", "pretrained"] = "previous",
        trainable: Part = "qkv",
        lr: float = 5e-5,
        backbone_lr: float = 5e-5,
        epochs: int | None = None,
        batch_size: int = 128,
        weight_decay: float = 0.0,
        schedule: Schedule = cosine,
    ):
        train_only(model, trainable)
        self.model, self.runtime, self.strength = model, runtime, strength
        self.lr, self.backbone_lr = lr, backbone_lr
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = Recipe("adam", weight_decay=weight_decay, schedule=schedule)
        self.head = LinearHead(model.num_features).to(runtime.device)
        self.pretrained = kept(model) if reference == "pretrained" else None

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train on the new data, held by the reference."""
        reference = self.pretrained if self.pretrained is not None else (kept(self.model) if experience.index else None)
        if experience.new_classes:
            self.head.grow(len(experience.new_classes), self.runtime.generator("head"))
        self.model.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            local = masked_cross_entropy(self.head(self.model.features(batch)), batch.y, "local", experience.classes)
            return local if reference is None else local + self.strength * quadratic_penalty(self.model, reference)

        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
        return fit(self.runtime, "train", self, groups, loss, batches, self.recipe)

    def predict(self, batch: Batch) -> Tensor:
        """Logits over the classes seen so far [B, num_seen]."""
        self.model.eval()
        return self.head(self.model.features(batch))

    def state_dict(self) -> dict[str, Any]:
        """Everything listed in the class docstring."""
        return collect(self, "model", "head", "pretrained")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        restore(self, {**state, "pretrained": moved(state["pretrained"], self.runtime.device)})
