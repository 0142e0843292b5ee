"""Joint training: the upper reference. After each experience a fresh model is trained on all data seen so far.

mode "full": backbone and head from the pre-trained weights, SGD with momentum 0.9 and weight decay 5e-4, batch 32, backbone
rate 1e-3, head rate 0.01, both falling in half a cosine. A pre-trained ViT bears no more: ViT-Tiny at 112 px on 10 classes of
CIFAR-100 (50 images each, 3 epochs) gets 90.6, 86.0 and 21.0 % at 1e-3, 3e-3 and 0.01. A small network trained from little data
wants more: the nano ViT on digits (5 epochs) gets 94.7, 96.7, 97.8, 98.1 % at 1e-4, 1e-3, 3e-3, 0.01, less with batch 128.
RanPAC's rows 0 and 1 (McDonnell et al., NeurIPS 2023; ViT-B/16, CIFAR-100 93.8 % full, 87.9 % probe) are another recipe:
`backbone_lr=1e-4 batch_size=128`, 30 epochs.
mode "probe": the backbone stays frozen and only the linear head is trained, on features under the test transform.
It is a reference, not a contender: it keeps all data and is exempt from the sample budgets; its rows are marked.
The "upper bound" depends on the recipe: with few epochs a sequential method may pass it.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead
from clbench.streams.images.data import ImageData, shuffled
from clbench.training.features import FeatureBatches, extract
from clbench.training.fit import Recipe, fit
from clbench.training.optimizers import Optimizer
from clbench.training.optimizers import check as check_optimizer
from clbench.training.runtime import Runtime
from clbench.training.schedules import cosine
from clbench.training.state import collect, detached, groups_of, restore


class Joint:
    """Train on everything seen, from the start, after each experience. State: backbone and head."""

    capabilities: ClassVar[Capabilities] = Capabilities(stores_all_data=True, anytime=True)

    @staticmethod
    def capabilities_of(mode: str = "full", **options: Any) -> Capabilities:
        """What the mode does: a probe is trained on features, whose visits are not counted, so that looks have no place."""
        return Capabilities(stores_all_data=True, anytime=mode == "full")

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        mode: Literal["full", "probe"] = "full",  # full | probe (frozen backbone)
        lr: float = 0.01,
        backbone_lr: float = 1e-3,  # 0.01 destroys pre-trained ViTs; a nano ViT on digits wants it
        epochs: int | None = None,
        batch_size: int = 32,
        momentum: float = 0.9,  # of sgd
        weight_decay: float = 5e-4,
        schedule: Schedule = cosine,
        optimizer: Optimizer = "sgd",  # see `training/optimizers.py`; prodigy and dadapt_adam want lr=1 backbone_lr=1
    ):
        self.model, self.runtime, self.mode = model, runtime, mode
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.lr, self.backbone_lr = lr, backbone_lr
        check_optimizer(optimizer, lr=lr, backbone_lr=0.0 if mode == "probe" else backbone_lr)
        self.recipe = Recipe(optimizer, momentum, weight_decay=weight_decay, schedule=schedule)
        self.start = detached(model.state_dict()) if mode == "full" else None
        if mode == "probe":
            model.freeze()
        self.head = LinearHead(model.num_features).to(runtime.device)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Begin again from the pre-trained weights and train on all experiences so far."""
        if self.start is not None:
            self.model.load_state_dict(self.start)
        fresh = LinearHead(self.model.num_features).to(self.runtime.device)
        fresh.grow(experience.num_seen, self.runtime.generator("head"))
        self.head = fresh
        data = ImageData.join([*experience.past, experience.train])
        if self.mode == "probe":
            return self._probe(data)
        self.model.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            return F.cross_entropy(self.head(self.model.features(batch)), batch.y)

        groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
        batches = shuffled(data, self.batch_size, self.epochs, self.runtime.key("train"))
        return fit(self.runtime, "train", self, groups, loss, batches, self.recipe)

    def _probe(self, data: ImageData) -> dict[str, float]:
        features, y = extract(self.runtime, self.model, data, self.batch_size)
        batches = FeatureBatches(features, y, self.batch_size, self.epochs, self.runtime.key("train"))
        groups = groups_of((self.head, self.lr))
        return fit(self.runtime, "probe", self, groups, lambda b: F.cross_entropy(self.head(b[0]), b[1]), batches, self.recipe)

    def predict(self, batch: Batch) -> Tensor:
        """Logits over the classes seen so far [B, num_seen]."""
        self.model.eval()
        return self.head(self.model.features(batch))

    def state_dict(self) -> dict[str, Any]:
        """Backbone and head (the start weights come from the model itself)."""
        return collect(self, "model", "head")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
