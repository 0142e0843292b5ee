"""Experience replay, step by step, from a reservoir (Chaudhry et al. 2019, arXiv 1902.10486, "On Tiny Episodic Memories").

Every update joins the b samples at hand with r samples drawn from the memory; the samples at hand are offered to the memory
after their last update (`training/online.py`, `training/stream_memory.py`). Cross-entropy over all classes that have appeared.

combine  "joint": one pass and one mean over b + r samples (the paper; Mammoth); "added": two passes whose means are added (the
         survey of Mai et al. 2022, arXiv 2101.10423; MIR; ER-ACE). With batch normalisation these are two networks.
start    replay begins with the second batch (the paper), or with the second experience
past     draw from samples of earlier experiences alone
head     linear | cosine10, ten times the cosine without bias
project  "bloop": the memory's gradient gives way to that of the new samples (`training/bloop.py`); of combine=added
refresh  forget a little before each update (`training/refresh.py`)

Differs from `replay`, which chooses its memory at an experience's end. r = 0 is fine-tuning. The paper's memory is a ring or a
reservoir; its rate is 0.1 for a small ResNet from scratch, the default rates here are for pre-trained backbones. Its reservoir
draws a slot from one number too few; this one is exact.
Published: Split CIFAR-10, one pass, b = r = 10, memory 1,000: about 50 % last (quoted from a reproduction, not checked).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import OnlineHead
from clbench.streams.images.data import ImageBatch
from clbench.training.fit import Recipe, fit
from clbench.training.online import Augment, OnlineBatch, OnlineStream, Start, grow, labels, replay_loss, scores
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore
from clbench.training.steps import Project, RefreshOptions, Steps, reads_again
from clbench.training.stream_memory import allowed_stream_memory


class ExperienceReplay:
    """State: backbone, head with the classes that have appeared, memory."""

    capabilities: ClassVar[Capabilities] = Capabilities(stores_exemplars=True, needs_boundaries=False, anytime=True)

    @staticmethod
    def capabilities_of(
        *, start: str = "second_batch", past: bool = False, refresh: Any = None, project: Any = None, **options: Any
    ) -> Capabilities:
        """What refers to experiences must be told where they end."""
        again = reads_again(refresh)
        told = past or start == "second_experience" or again or project is not None
        return replace(ExperienceReplay.capabilities, needs_boundaries=told, needs_random_access=again)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        memory: int | None = None,  # samples; null: what the scenario's budget allows
        replay: int | None = None,  # drawn in each update; null: as many as new ones
        updates: float = 1.0,  # on each batch of the stream; below 1: some batches have none
        combine: Literal["joint", "added"] = "joint",
        start: Start = "second_batch",
        past: bool = False,
        head: Literal["linear", "cosine10"] = "linear",
        augment: Augment = "both",
        lr: float = 0.01,  # head
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 10,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        clip: float | None = None,
        schedule: Schedule = constant,
        refresh: RefreshOptions = None,  # {variant: official | paper, ...}
        project: Project = None,  # bloop
    ):
        for name, value, known in (("combine", combine, ("joint", "added")), ("start", start, get_args(Start))):
            if value not in known:
                raise UserError(f"unknown learner.{name}={value}: choose {' or '.join(known)}")
        if project is not None and (combine != "added" or clip is not None):
            raise UserError(
                f"learner.project={project} needs a loss of two parts: choose learner.combine=added, learner.clip=null"
            )
        self.model, self.runtime, self.past = model, runtime, past
        self.stepping = Steps(runtime, refresh=refresh, project=project)
        self.combine: Literal["joint", "added"] = combine
        self.start: Start = start
        self.epochs, self.batch_size, self.updates, self.augment = runtime.epochs(epochs), batch_size, updates, augment
        self.replay = batch_size if replay is None else replay
        self.lr, self.backbone_lr = lr, backbone_lr
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule, clip=clip)
        self.head = OnlineHead(model.num_features, head).to(runtime.device)
        self.memory = allowed_stream_memory(runtime, "reservoir", memory)

    def learn(self, experience: Experience) -> dict[str, float]:
        """One pass (or what the budget allows) over new samples joined with drawn ones."""
        grow(self, experience)
        self.model.train()

        def loss(batch: OnlineBatch) -> Tensor:
            return replay_loss(self, batch, self.combine)

        def new(batch: ImageBatch) -> Tensor:
            return F.cross_entropy(scores(self, batch), labels(batch))

        def parts(batch: OnlineBatch) -> tuple[Tensor, Tensor | None]:
            return new(batch.new), None if batch.old is None else new(batch.old)

        def of_new(batch: OnlineBatch) -> Tensor:
            return new(batch.new)

        stream = OnlineStream(self, experience, replay=self.replay, start=self.start, past=self.past)
        modules = {"model": self.model, "head": self.head}
        hooks: Any = {"after_step": stream.store}
        with self.stepping.around(self.model, modules, loss, new=of_new, parts=parts, **hooks) as (total, hooks):
            groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
            log = fit(self.runtime, "train", self, groups, total, stream, self.recipe, **hooks)
        self.stepping.end(modules, experience, new)
        return {**log, "exemplars": float(len(self.memory))}

    def predict(self, batch: Batch) -> Tensor:
        """Logits [B, num_seen]; a class that has not appeared has the lowest."""
        self.model.eval()
        return scores(self, batch)

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head", "memory", *self.stepping.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
