"""MIR: maximally interfered retrieval (Aljundi et al., NeurIPS 2019, arXiv 1908.04742).

Of S samples drawn from the memory those r are replayed whose loss would rise most by a step on the new batch alone:

    theta' = theta - eta grad CE(new);   score_i = CE(theta'; x_i) - CE(theta; x_i);   step on CE(new) + CE(top r)

The virtual step is plain SGD at the rate of the moment, whatever the optimiser. Scores are taken in training mode, as in the
released code, but on copies of the buffers: scoring does not move the statistics of batch normalisation. Ties go to the sample
that was drawn first.

past=true draws from earlier experiences alone, as the authors' code; false (default), as in the survey of Mai et al. (arXiv
2101.10423), needs no boundaries. Released: S = 50, r = b = 10, SGD 0.1 from scratch; the default rates are for pre-trained
backbones. The paper's variant for streams that disclose tasks (a score against the best past loss) is not built.
Published: Split CIFAR-10, one pass, 20, 50 and 100 samples a class: 29.8, 40.0 and 47.6 % (recalled, not checked).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace as changed
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Place, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import OnlineHead
from clbench.streams.images.data import ImageBatch
from clbench.training.fit import Recipe, fit
from clbench.training.online import Augment, OnlineBatch, OnlineStream, gradients, grow, labels, scores
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, parameters_of, restore
from clbench.training.stream_memory import allowed_stream_memory


@torch.no_grad()
def losses_under(modules: Sequence[nn.Module], weights: Mapping[int, Tensor], batch: ImageBatch) -> Tensor:
    """Cross-entropy of each sample [B] under other weights, by the parameters' `id`; buffers are copied, nothing is changed."""
    value = batch.x
    for module in modules:
        own = {name: weights.get(id(p), p) for name, p in module.named_parameters()}
        own |= {name: buffer.clone() for name, buffer in module.named_buffers()}
        value = functional_call(module, own, (value,))
    return F.cross_entropy(value, labels(batch), reduction="none")


class Mir:
    """State: backbone, head with the classes that have appeared, memory."""

    capabilities: ClassVar[Capabilities] = Capabilities(stores_exemplars=True, needs_boundaries=False, anytime=True)

    @staticmethod
    def capabilities_of(*, past: bool = False, **options: Any) -> Capabilities:
        """What refers to experiences must be told where they end."""
        return changed(Mir.capabilities, needs_boundaries=past)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        candidates: int = 50,  # drawn and scored in each update
        replay: int | None = None,  # replayed of them; null: as many as new ones
        past: bool = False,
        memory: int | None = None,  # samples; null: what the scenario's budget allows
        updates: float = 1.0,  # on each batch of the stream; below 1: some batches have none
        head: Literal["linear", "cosine10"] = "linear",
        augment: Augment = "both",
        lr: float = 0.01,  # head
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 10,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        schedule: Schedule = constant,
    ):
        self.model, self.runtime, self.past, self.candidates = model, runtime, past, candidates
        self.epochs, self.batch_size, self.updates, self.augment = runtime.epochs(epochs), batch_size, updates, augment
        self.replay = batch_size if replay is None else replay
        if self.replay > candidates:
            raise UserError(f"learner.candidates={candidates} must be at least as many as are replayed, {self.replay}")
        self.lr, self.backbone_lr = lr, backbone_lr
        self.recipe = Recipe("sgd", momentum, weight_decay=weight_decay, schedule=schedule)
        self.head = OnlineHead(model.num_features, head).to(runtime.device)
        self.memory = allowed_stream_memory(runtime, "reservoir", memory)

    def learn(self, experience: Experience) -> dict[str, float]:
        """New samples, and those of the memory with which they interfere most."""
        grow(self, experience)
        self.model.train()
        rate = [0.0]

        def at_place(place: Place) -> None:
            rate[0] = self.recipe.schedule(place)

        def loss(batch: OnlineBatch) -> Tensor:
            new = F.cross_entropy(scores(self, batch.new), labels(batch.new))
            if batch.old is None:
                return new
            chosen = self.interfered(batch.old, new, rate[0])
            return new + F.cross_entropy(scores(self, chosen), labels(chosen))

        stream = OnlineStream(self, experience, replay=self.candidates, past=self.past, trained=self.replay)
        groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
        options: Any = {"at_place": at_place, "after_step": stream.store}
        log = fit(self.runtime, "train", self, groups, loss, stream, self.recipe, **options)
        return {**log, "exemplars": float(len(self.memory))}

    def interfered(self, drawn: ImageBatch, loss: Tensor, rate: float) -> ImageBatch:
        """Those of `drawn` whose loss rises most by a virtual step on `loss` at `rate` times the base rates, in their order."""
        params, moved = [], {}
        for module, lr in ((self.model, self.backbone_lr), (self.head, self.lr)):
            params += [(p, lr * rate) for p in parameters_of(module)]
        grads = gradients(loss, [p for p, _ in params], keep=True)
        for (p, eta), g in zip(params, grads, strict=True):
            moved[id(p)] = p.detach() - eta * g
        modules = (self.model, self.head)
        rise = losses_under(modules, moved, drawn) - losses_under(modules, {}, drawn)
        return drawn.select(rise.sort(descending=True, stable=True).indices[: self.replay].sort().values)

    def predict(self, batch: Batch) -> Tensor:
        """Logits [B, num_seen]; a class that has not appeared has the lowest."""
        self.model.eval()
        return scores(self, batch)

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head", "memory")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
