"""S-Prompts, image form (S-iPrompts): a prompt for each domain, chosen by nearest centre (Wang, Huang & Hong, NeurIPS 2022,
arXiv 2207.12819, "S-Prompts Learning with Pre-trained Transformers: An Occam's Razor for Domain Incremental Learning").

The ViT is frozen. Each experience is a domain, with a prompt [length, D] behind the class token and a linear head over its
classes, both trained on its own cross-entropy. Then k-means gives `centres` centres of the domain's bare features f / |f|. A
test image belongs to the domain of the centre nearest to its own bare feature; that domain's prompt and head answer.

variant  "official" (default): the release's distance, sum |f - c|. "paper": Euclidean.

Deviations: the prompt gets the position of the class token added, as `pet=prompt` has it, which is another start for the same
function; k-means sees the test view (the release: augmented images); classes of other domains score one below the lowest of
the chosen ones, and a prediction counts as right where its class is right, as in the release.
Constants: those of the S-liPrompts files, since the release's S-iPrompts file cannot run (SGD 0.9, 0.01, cosine, batch 128,
weight decay 2e-4). Published numbers: none read.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import TaskHead
from clbench.models.pet_modules import prompt
from clbench.models.prompt_pool import GrownPool, query
from clbench.streams.images.data import shuffled
from clbench.training.fit import Recipe, fit
from clbench.training.gaussians import kmeans
from clbench.training.runtime import Runtime
from clbench.training.schedules import cosine
from clbench.training.state import collect, restore


class SPrompts:
    """State: of each domain a prompt [length, D], a head and its centres [k, D]."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_pretrained=True, needs_random_access=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        variant: Literal["official", "paper"] = "official",
        length: int = 10,  # tokens of a prompt
        centres: int = 5,  # of a domain
        lr: float = 0.01,
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 2e-4,
        schedule: Schedule = cosine,
    ):
        if centres < 1:
            raise UserError(f"learner.centres must be at least 1, got {centres}")
        self.model, self.runtime = model, runtime
        self.pet = prompt(model, runtime, length=length)
        model.freeze()
        self.power, self.count = (1.0 if variant == "official" else 2.0), centres
        self.lr, self.epochs, self.batch_size = lr, runtime.epochs(epochs), batch_size
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.prompts = GrownPool((length, model.num_features)).to(runtime.device)
        self.heads = TaskHead(model.num_features).to(runtime.device)
        self.centres: list[Tensor] = []

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train the domain's prompt and head, then find its centres."""
        bound = self.model.num_features**-0.5
        rows = torch.empty(1, *self.prompts.shape).uniform_(-bound, bound, generator=self.runtime.generator("prompt"))
        self.prompts.add(rows)
        place = self.heads.grow(experience.index, experience.classes, self.runtime.generator("head"))
        head = self.heads.at(place)
        self.pet.eval()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            with self.pet.use({"tokens": self.prompts.newest[0]}):
                features = self.model.features(batch)
            return F.cross_entropy(head(features), self.heads.targets(place, batch.y))

        parameters = [self.prompts.newest, *head.parameters()]
        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        log = fit(self.runtime, "train", self, [{"params": parameters, "lr": self.lr}], loss, batches, self.recipe)
        with self.runtime.phase("centres"):
            self.centres.append(self.centres_of(experience))
        return log

    def centres_of(self, experience: Experience) -> Tensor:
        """Centres of an experience's bare features [k, D]."""
        found = []
        for batch in experience.train.test_batches(self.batch_size):
            self.runtime.check_stop()
            found.append(F.normalize(query(self.model, batch), dim=1))
        f = torch.cat(found)
        cluster = kmeans(f, self.count, self.runtime.key("kmeans"))
        return torch.stack([f[cluster == k].mean(0) for k in range(int(cluster.max()) + 1)])

    def domains(self, batch: Any) -> Tensor:
        """The domain that each image is taken for [B] int64."""
        f = F.normalize(query(self.model, batch), dim=1)
        nearest = [(f[:, None] - centres).abs().pow(self.power).sum(2).amin(1) for centres in self.centres]
        return torch.stack(nearest, dim=1).argmin(1)

    def predict(self, batch: Batch) -> Tensor:
        """Scores [B, num_seen]."""
        chosen = self.domains(batch)
        with self.pet.use({"tokens": self.prompts.rows()}, chosen, tag="domain"):  # a domain's prompt is never changed again
            features = self.model.features(batch)
        scores = features.new_empty(len(features), self.heads.num_classes)
        for place in chosen.unique().tolist():
            rows = (chosen == place).nonzero()[:, 0]
            scores[rows] = self.heads.spread(place, self.heads.at(place)(features[rows]))
        return scores

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "prompts", "heads", "centres")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
