"""Experience replay: every batch of new samples is joined by samples from a bounded memory of raw images.

Sources: Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning" (arXiv 1902.10486); Mammoth's `er` (reservoir,
cross-entropy over all classes); PyCIL's `replay` (herding, softmax over seen classes; ResNet-32, 2,000 exemplars).
policy   reservoir | balanced | herding (see `training/memory.py`)
memory   samples kept, `memory_bytes` the same in bytes of pixels; None takes what the scenario's budget allows
replay   replayed samples in a batch, None: as many as new ones

Deviations: the memory is chosen anew at the end of each experience from distinct samples (Mammoth inserts after each step, so
a sample can sit in it twice); replay starts with the second experience.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead
from clbench.streams.images.data import shuffled
from clbench.training.features import extract
from clbench.training.fit import Recipe, fit
from clbench.training.memory import Mixed, allowed_memory
from clbench.training.optimizers import Optimizer
from clbench.training.optimizers import check as check_optimizer
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore


class Replay:
    """Train everything on new and remembered samples. State: backbone, head, memory."""

    capabilities: ClassVar[Capabilities] = Capabilities(stores_exemplars=True, needs_random_access=True, anytime=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        policy: Literal["reservoir", "balanced", "herding"] = "reservoir",
        memory: int | None = None,  # samples; null: what the scenario's budget allows
        memory_bytes: int | None = None,
        replay: int | None = None,  # replayed samples in a batch; null: as many as new ones
        lr: float = 0.01,
        backbone_lr: float = 0.001,  # 0.01 destroys pre-trained ViTs
        epochs: int | None = None,
        batch_size: int = 64,
        momentum: float = 0.9,  # of sgd
        weight_decay: float = 5e-4,
        clip: float | None = None,
        schedule: Schedule = constant,
        optimizer: Optimizer = "sgd",  # see `training/optimizers.py`; prodigy and dadapt_adam want lr=1 backbone_lr=1
    ):
        self.model, self.runtime = model, runtime
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.replay = batch_size if replay is None else replay
        self.lr, self.backbone_lr = lr, backbone_lr
        check_optimizer(optimizer, lr=lr, backbone_lr=backbone_lr)
        self.recipe = Recipe(optimizer, momentum, weight_decay=weight_decay, schedule=schedule, clip=clip)
        self.head = LinearHead(model.num_features).to(runtime.device)
        self.memory = allowed_memory(runtime, policy, memory, memory_bytes)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train on the experience mixed with the memory, then choose the memory again."""
        if experience.new_classes:
            self.head.grow(len(experience.new_classes), self.runtime.generator("head"))
        self.model.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            return F.cross_entropy(self.head(self.model.features(batch)), batch.y)

        groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
        new = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        batches = Mixed(new, self.memory.data(experience.train), self.replay, self.runtime.key("replay"))
        log = fit(self.runtime, "train", self, groups, loss, batches, self.recipe)
        features = None
        if self.memory.policy == "herding":
            features, _ = extract(self.runtime, self.model, self.memory.candidates(experience.train))
        self.memory.update(experience.train, features)
        return {**log, "exemplars": float(len(self.memory))}

    def predict(self, batch: Batch) -> Tensor:
        """Logits over the classes seen so far [B, num_seen]."""
        self.model.eval()
        return self.head(self.model.features(batch))

    def state_dict(self) -> dict[str, Any]:
        """Backbone, head and the stored samples."""
        return collect(self, "model", "head", "memory")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
