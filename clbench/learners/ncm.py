"""Nearest class mean on a frozen backbone. Trains nothing, forgets nothing, and does not depend on the class order.

metric "euclidean": the nearest mean (Janson et al. 2022, "A Simple Baseline that Questions the Use of Pretrained-Models in
Continual Learning", arXiv 2210.04428; CIFAR-100, 10 experiences: 83.70 %, from the abstract).
metric "cosine": SimpleCIL (Zhou et al., IJCV 2024, "Revisiting Class-Incremental Learning with Pre-Trained Models"): the mean
of un-normalised features, then the largest cosine; published CIFAR-100 B0 Inc5 81.26 % last (MOS table, augreg_in21k, [0, 1]
inputs, Resize 256 + crop 224). The two differ: cosine normalises after averaging.

Where a class comes back (domain-incremental) its mean goes over all its samples.
streaming  one batch after another: the means are valid after each, so the learner can be asked in mid-experience, and its
           samples count as visits. The sums, and so the answers at an experience's end, are the same for any batch size, up to
           the order of float64 sums. A class that has not come yet has the lowest score (in CapyMOA its mean is 0, and
           attracts).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience
from clbench.models.backbone import Backbone
from clbench.models.heads import PrototypeHead
from clbench.training.features import extract, streamed_features
from clbench.training.runtime import Runtime
from clbench.training.state import collect, restore


class NearestClassMean:
    """Class means of frozen features. State: sums and counts (the backbone never changes)."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_boundaries=False, trains=False)

    @staticmethod
    def capabilities_of(*, streaming: bool = False, **options: Any) -> Capabilities:
        """Means that are updated sample by sample may be asked anywhere."""
        return replace(NearestClassMean.capabilities, anytime=streaming)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        metric: Literal["euclidean", "cosine"] = "euclidean",
        batch_size: int = 128,
        streaming: bool = False,
    ):
        self.model, self.runtime, self.batch_size, self.streaming = model, runtime, batch_size, streaming
        model.freeze()
        self.head = PrototypeHead(model.num_features, metric).to(runtime.device)

    def learn(self, experience: Experience) -> dict[str, float]:
        """One pass over the new data."""
        if self.streaming:
            before = self.runtime.used_new
            for features, y in streamed_features(self.runtime, self.model, experience.train, self.batch_size):
                self.head.update(features, y, experience.num_seen)
            return {"train_samples": float(self.runtime.used_new - before)}
        features, y = extract(self.runtime, self.model, experience.train, self.batch_size)
        self.head.update(features, y, experience.num_seen)
        return {"train_samples": float(len(y))}

    def predict(self, batch: Batch) -> Tensor:
        """Negative squared distances, or cosines [B, num_seen]."""
        self.model.eval()
        return self.head(self.model.features(batch))

    def state_dict(self) -> dict[str, Any]:
        """Sums and counts of every class."""
        return collect(self, "head")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
