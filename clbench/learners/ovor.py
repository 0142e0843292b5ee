"""OVOR: OnePrompt with Virtual Outlier Regularization for Rehearsal-Free Class-Incremental Learning (Huang, Chen & Hsu, ICLR
2024, arXiv 2402.04129).

OnePrompt: one prefix for all experiences, 5 keys and 5 values in blocks 0 and 1, 20 and 20 in blocks 2 to 4 of a frozen ViT,
U(0, 1), always trained; a linear head on the class token; CE over the experience's classes. No query: one pass an image.
Stage 2 (`outlier_epochs`; 0 is OnePrompt alone) trains the head alone on the experience's features f and on virtual outliers o:
  CE + outlier_weight (huber(relu(id_score - lse(z(f)))) + huber(relu(lse(z(o)) - outlier_score))),
lse the log-sum-exp over the experience's logits: above 15 inside, below 3 outside. Outliers (NPOS) are new every epoch:

variant  "paper": of the L2-normalised features, the `boundary` points with the largest distance to their 50th neighbour;
         `candidates` samples b + noise N(0, I) around each; the `per_class` x classes with the largest distance to their 50th
         neighbour among the features are kept. Each is multiplied by the norm of its point's feature to become an input of the
         head (the description does not say how they come back; without it they would all lie near the origin).
         "official": the release computes the boundary points and does not use them: the candidates are noise N(0, I) around
         the origin, drawn once and repeated for every boundary point, so that kept outliers are mostly duplicates.
The default is the method as described; published numbers were made with the release.

Rate: one quarter cosine over the epochs of both stages, moved once an epoch and one epoch late, as released: 1, 1,
cos(99 pi / (200 (E - 1))), ...; `schedule` replaces it. Incomplete last batches are kept, as in the release.
Deviations: features of stage 2 are taken once, under the test transform (the release: anew each epoch under the training
transform); each stage has an Adam of its own (in the release one Adam's momentum can keep moving the prompt); a point is its
own first neighbour, as in the release; noise is drawn once an epoch for all boundary points, as in the release.
The released scripts: ViT-B/16 augreg_in21k_ft_in1k, Adam 1e-3, batch 128, CIFAR-100 B0 Inc10 16 + 4 epochs (epochs=16),
ImageNet-R B0 Inc20 40 + 10. Published number: none read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead
from clbench.models.pet_modules import prefix
from clbench.streams.images.data import shuffled
from clbench.training.features import extract
from clbench.training.fit import Recipe, fit
from clbench.training.losses import masked_cross_entropy
from clbench.training.prompts import epoch_cosine, part_of
from clbench.training.runtime import Runtime
from clbench.training.state import collect, groups_of, restore
from clbench.training.virtual_outliers import VirtualOutliers


class Ovor:
    """State: the prefix of the early and of the late blocks, the head."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_pretrained=True)

    @staticmethod
    def capabilities_of(*, outlier_epochs: int = 4, **options: Any) -> Capabilities:
        """The second stage needs features of all samples again."""
        return replace(Ovor.capabilities, needs_random_access=outlier_epochs > 0)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        variant: Literal["paper", "official"] = "paper",
        early_length: int = 5,
        late_length: int = 20,
        early_blocks: Sequence[int] | str = "0:2",
        late_blocks: Sequence[int] | str = "2:5",
        outlier_epochs: int = 4,  # on stored features, beyond `epochs`; 0: OnePrompt alone
        outlier_weight: float = 0.1,
        id_score: float = 15.0,
        outlier_score: float = 3.0,
        neighbours: int = 50,
        boundary: int = 50,
        candidates: int = 600,  # around each boundary point
        per_class: int = 40,
        noise: float = 0.1,
        lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 128,
        weight_decay: float = 0.0,
        schedule: Schedule | None = None,  # null: the paper's quarter cosine over both stages, moved once an epoch
    ):
        if outlier_epochs < 0:
            raise UserError(f"learner.outlier_epochs must be at least 0, got {outlier_epochs}")
        scores = {"weight": outlier_weight, "id_score": id_score, "outlier_score": outlier_score, "noise": noise}
        counts = {"neighbours": neighbours, "boundary": boundary, "candidates": candidates, "per_class": per_class}
        self.model, self.runtime, self.outlier_epochs = model, runtime, outlier_epochs
        self.outliers = VirtualOutliers(runtime, variant=variant, epochs=outlier_epochs, **scores, **counts)
        self.lr, self.epochs, self.batch_size, self.weight_decay = lr, runtime.epochs(epochs), batch_size, weight_decay
        self.schedule = schedule or partial(epoch_cosine, epochs=self.epochs + outlier_epochs)
        self.early = prefix(model, runtime, length=early_length, blocks=early_blocks, high=1.0)
        self.late = prefix(model, runtime, length=late_length, blocks=late_blocks, high=1.0)
        self.late.reset(runtime.generator("late"))  # two modules of a kind start with the same numbers
        self.head = LinearHead(model.num_features).to(runtime.device)

    def learn(self, experience: Experience) -> dict[str, float]:
        """OnePrompt, then the head against virtual outliers."""
        if experience.new_classes:
            self.head.grow(len(experience.new_classes), self.runtime.generator("head"))
        self.early.train()
        self.late.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            return masked_cross_entropy(self.head(self.model.features(batch)), batch.y, "local", experience.classes)

        groups = groups_of((self.early, self.lr), (self.late, self.lr), (self.head, self.lr))
        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        total = batches.steps // self.epochs * (self.epochs + self.outlier_epochs)
        log = fit(self.runtime, "train", self, groups, loss, batches, self._recipe(0, total))
        if self.outlier_epochs:
            log |= self._regularise(experience, self._recipe(batches.steps, total))
        return log

    def _recipe(self, first: int, total: int) -> Recipe:
        return Recipe("adam", weight_decay=self.weight_decay, schedule=part_of(self.schedule, first, total))

    def _regularise(self, experience: Experience, recipe: Recipe) -> dict[str, float]:
        features, y = extract(self.runtime, self.model, experience.train, self.batch_size)
        loss, batches = self.outliers.stage(self.head, features, y, experience, self.batch_size)
        return fit(self.runtime, "outliers", self, groups_of((self.head, self.lr)), loss, batches, recipe)

    def predict(self, batch: Batch) -> Tensor:
        """Logits over the classes seen so far [B, num_seen]."""
        self.early.eval()
        self.late.eval()
        return self.head(self.model.features(batch))

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "early", "late", "head")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
