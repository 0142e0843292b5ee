"""CBP: continual backpropagation (Dohare, Hernandez-Garcia, Lan, Rahman, Mahmood & Sutton, Nature 632, 2024; arXiv 2306.13812).

Training as in `finetune`, and after every step the least useful units of every hidden layer (`models.units`) start anew. For
unit i with activations h_i of the batch, age a_i, decay eta:
  a_i <- a_i + 1,  h-_i <- eta h-_i + (1 - eta) mean h_i,  h^_i = h-_i / (1 - eta^a_i)
  u_i <- eta u_i + (1 - eta) y_i,  u^_i = u_i / (1 - eta^a_i)
  y_i = mean_k |w_out[k, i]| x mean |h_i - h^_i| / mean |w_in[i]|     (utility=adaptable; contribution: mean |h_i|, no division)
Units with a_i > maturity are eligible. `rate` of them are due at each step; fractions add up. Of the eligible, those of the
least u^ get new incoming weights, U(+-gain sqrt(3 / fan_in)) with gain sqrt(2) (convolutions: U(+-1 / sqrt(fan_in))), bias 0,
outgoing weights 0, and age, utility and mean 0; the bias of the reader takes over w_out[:, i] h^_i, what the unit gave on
average. BatchNorm and the optimiser's moments of all these numbers start anew too.

variant  "paper" (default): as above. "official_mlp": the released code for MLPs sets the mean to 0 before it is read, so that
         the biases of readers never change. "official_resnet": the released code for ResNets has
           m_i <- m_i + (1 - eta) mean |h_i|,  u^_i = mean |w_out| m_i     (no decay, no division; utility=contribution alone)
         and m_i goes on when a unit starts anew, so that utility grows with the age of the network. `rate` of all units of a
         layer are due once one is eligible; new weights are normal(0, sqrt(2 / fan_in)), no bias takes anything over, and the
         optimiser's moments stay

With optimizer=adam every number counts its own steps (`training/entry_adam.py`), as in the release: those of a new unit are 0.
Deviations: a reader without a bias cannot take anything over. Only layers whose units one other layer reads take part: all of
an MLP or a plain convolutional network, the inner one of a ResNet's block (the release for ResNets takes all, and as reader
the next in its list), the hidden layer of a ViT's MLPs. Fractions that are due add up (the code for MLPs draws unless told so).
Constants: online permuted MNIST (SGD 0.003, batch 1) rate 1e-4 to 1e-6, maturity 100; Continual ImageNet rate 3e-4.
Published, read: Continual ImageNet, plain backpropagation falls from 89 % to 77 % at task 2,000; CBP's number was not read.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from clbench.interfaces import Batch, Capabilities, Experience, Place, Schedule, UserError
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead
from clbench.models.units import Units, hidden_units
from clbench.streams.images.data import shuffled
from clbench.training.entry_adam import EntryAdam
from clbench.training.fisher import moved
from clbench.training.fit import Recipe, fit
from clbench.training.losses import masked_cross_entropy
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore

VARIANTS = ("paper", "official_mlp", "official_resnet")
COUNTERS = ("age", "mean", "utility", "due")  # of every layer: [units] each, due [1]


@dataclass(frozen=True)
class _Watched(Recipe):
    """A recipe that says which optimiser it built: moments of units that start anew are reset there."""

    built: list[torch.optim.Optimizer] = field(default_factory=list, compare=False)

    def build(self, groups: Any) -> torch.optim.Optimizer:
        adam = self.optimizer == "adam"
        self.built[:] = [EntryAdam(groups, self.betas, self.weight_decay) if adam else super().build(groups)]
        return self.built[0]


class Cbp:
    """State: backbone, head; by layer: age, mean activation and utility of its units, the share that is due; a count."""

    capabilities: ClassVar[Capabilities] = Capabilities(needs_boundaries=False, anytime=True)

    @staticmethod
    def capabilities_of(*, masking: str = "seen", **options: Any) -> Capabilities:
        """A softmax over an experience's classes must be told where one ends."""
        return replace(Cbp.capabilities, needs_boundaries=masking == "local")

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        variant: Literal["paper", "official_mlp", "official_resnet"] = "paper",
        utility: Literal["adaptable", "contribution"] = "adaptable",
        rate: float = 1e-4,  # share of the eligible units that start anew at each step
        maturity: int = 100,  # steps that a unit is safe
        decay: float = 0.99,
        optimizer: Literal["sgd", "adam"] = "sgd",
        momentum: float = 0.0,  # of sgd
        weight_decay: float = 0.0,
        masking: Literal["local", "seen", "batch"] = "seen",
        lr: float = 0.01,
        backbone_lr: float = 0.01,
        epochs: int | None = None,
        batch_size: int = 64,
        schedule: Schedule = constant,
    ):
        if not 0 <= rate <= 1 or not 0 <= decay < 1 or maturity < 0:
            given = f"rate={rate} decay={decay} maturity={maturity}"
            raise UserError(f"learner.rate must lie in [0, 1], decay in [0, 1), maturity from 0, got {given}")
        if variant not in VARIANTS:
            raise UserError(f"unknown learner.variant={variant}: choose {', '.join(VARIANTS)}")
        if variant == "official_resnet" and utility != "contribution":
            raise UserError(f"learner.variant=official_resnet has learner.utility=contribution alone, got {utility}")
        self.model, self.runtime, self.masking = model, runtime, masking
        self.units = hidden_units(model)
        if not self.units:
            raise UserError(f"learner cbp: model {model.identity['name']} has no layer whose units one other layer reads alone")
        self.variant, self.adaptable = variant, utility == "adaptable"
        self.rate, self.maturity, self.decay = rate, maturity, decay
        self.lr, self.backbone_lr = lr, backbone_lr
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = _Watched(optimizer, momentum, weight_decay=weight_decay, schedule=schedule)
        self.head = LinearHead(model.num_features).to(runtime.device)
        self.counters = {
            one.name: {part: torch.zeros(1 if part == "due" else one.count, device=runtime.device) for part in COUNTERS}
            for one in self.units
        }
        self.replaced = 0

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train on the experience; units start anew on the way."""
        if experience.new_classes:
            self.head.grow(len(experience.new_classes), self.runtime.generator("head"))
        self.model.train()
        activations: dict[str, Tensor] = {}
        hooks = [
            one.reader.register_forward_pre_hook(_noting(one, activations)) for one in self.units if one.reader is not None
        ]
        before = self.replaced

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            features = self.model.features(batch)
            for one in self.units:
                if one.reader is None:
                    activations[one.name] = one.apart(features.detach())
            return masked_cross_entropy(self.head(features), batch.y, self.masking, experience.classes)

        def after(place: Place, batch: Batch) -> None:
            for one in self.units:
                generator = self.runtime.generator("cbp", place.step, one.name)
                self.replaced += self.renew(one, activations[one.name], generator)

        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr))
        try:
            log = fit(self.runtime, "train", self, groups, loss, batches, self.recipe, after_step=after)
        finally:
            for hook in hooks:
                hook.remove()
        return {**log, "replaced": float(self.replaced - before)}

    @torch.no_grad()
    def renew(self, one: Units, h: Tensor, generator: torch.Generator) -> int:
        """One step of a layer: activations h [N, units, M] count, then what is due starts anew -> number of units."""
        own, resnet = self.counters[one.name], self.variant == "official_resnet"
        out = torch.cat([w.movedim(1, 0).flatten(1) for w, _ in one.outgoing(self.head.blocks)], dim=1).abs().mean(1)
        mean, worth = (summed if resnet else averaged)(one, own, h, out, self.decay, self.adaptable)
        eligible = own["age"] > self.maturity
        own["due"] += self.rate * (one.count * eligible.any() if resnet else eligible.sum())
        number = int(own["due"])
        if number == 0:
            return 0
        own["due"] -= number
        rows = worth.masked_fill(~eligible, float("inf")).argsort(stable=True)[: min(number, int(eligible.sum()))]
        self.start_anew(one, rows, mean if self.variant == "paper" else torch.zeros_like(mean), generator)
        return len(rows)

    @torch.no_grad()
    def start_anew(self, one: Units, rows: Tensor, mean: Tensor, generator: torch.Generator) -> None:
        """Units `rows` of a layer get new weights; their readers' biases take over `mean` [units] of them."""
        layer, norm, resnet = one.layer, one.norm, self.variant == "official_resnet"
        layer.weight[rows] = drawn(layer, len(rows), resnet, generator).to(layer.weight)
        incoming = [layer.weight, *([] if layer.bias is None else [layer.bias])]
        if layer.bias is not None:
            layer.bias[rows] = 0
        for weight, bias in one.outgoing(self.head.blocks):
            if bias is not None:
                bias += weight[:, rows].sum(2) @ mean[rows]
            weight[:, rows] = 0
        if norm is not None:
            for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                if getattr(norm, name, None) is not None:
                    getattr(norm, name)[rows] = value
            incoming += list(norm.parameters())
        for name in ("age", "utility") if resnet else ("age", "mean", "utility"):
            self.counters[one.name][name][rows] = 0
        if not resnet:
            self.forget_moments(one, rows, incoming)

    def forget_moments(self, one: Units, rows: Tensor, incoming: list[Tensor]) -> None:
        """The optimiser's moments of the units' weights are 0."""
        for optimizer in self.recipe.built:
            for p in incoming:
                for value in optimizer.state.get(p, {}).values():
                    if isinstance(value, Tensor) and value.shape == p.shape:
                        value[rows] = 0
            readers: list[Any] = list(self.head.blocks) if one.reader is None else [one.reader]
            for reader in readers:
                for value in optimizer.state.get(reader.weight, {}).values():
                    if isinstance(value, Tensor) and value.shape == reader.weight.shape:
                        value.view(len(value), one.count, -1)[:, rows] = 0

    def predict(self, batch: Batch) -> Tensor:
        """Logits over the classes seen so far [B, num_seen]."""
        self.model.eval()
        return self.head(self.model.features(batch))

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head", "counters", "replaced")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, {**state, "counters": {n: moved(c, self.runtime.device) for n, c in state["counters"].items()}})


def averaged(
    one: Units, own: dict[str, Tensor], h: Tensor, out: Tensor, decay: float, adaptable: bool
) -> tuple[Tensor, Tensor]:
    """Counters after a batch of activations h [N, units, M], outgoing weights of mean size `out` [units] -> h^, u^ [units]."""
    own["age"] += 1
    own["mean"].lerp_(h.mean((0, 2)), 1 - decay)
    correction = 1 - decay ** own["age"]
    mean = own["mean"] / correction
    now = out * (h - mean[:, None] if adaptable else h).abs().mean((0, 2))
    if adaptable:
        now = now / one.layer.weight.abs().flatten(1).mean(1).clamp_min(torch.finfo(torch.float32).tiny)
    own["utility"].lerp_(now, 1 - decay)
    return mean, own["utility"] / correction


def summed(one: Units, own: dict[str, Tensor], h: Tensor, out: Tensor, decay: float, adaptable: bool) -> tuple[Tensor, Tensor]:
    """The same as the released code for ResNets has it: m and u^."""
    own["age"] += 1
    own["mean"] += (1 - decay) * h.abs().mean((0, 2))
    own["utility"].copy_(out * own["mean"])
    return own["mean"], own["utility"].clone()


def drawn(layer: nn.Linear | nn.Conv2d, number: int, normal: bool, generator: torch.Generator) -> Tensor:
    """Incoming weights of new units, from a CPU generator."""
    fresh, scale = torch.empty(number, *layer.weight.shape[1:]), layer.weight[0].numel() ** -0.5
    if normal:
        return fresh.normal_(0, 2**0.5 * scale, generator=generator)
    bound = scale * (6**0.5 if isinstance(layer, nn.Linear) else 1)
    return fresh.uniform_(-bound, bound, generator=generator)


def _noting(one: Units, activations: dict[str, Tensor]) -> Any:
    """A hook of a reader that keeps what it is given while gradients flow."""

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            activations[one.name] = one.apart(args[0].detach().float())

    return note
