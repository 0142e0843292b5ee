"""E2WM's fine-tuning: EWC on the product of a low-rank pair (Xiang et al., "Language Models Meet World Models: Embodied
Experiences Enhance Language Models", NeurIPS 2023, arXiv 2305.10626; code: szxiangjn/world-model-for-language-model).

    loss on answers + strength * sum over layers, i, j of F_ij (s (B A)_ij)^2

One pair A [r, I], B [O, r] for each layer is trained on task after task, as by `text_lora`. F is the diagonal Fisher
information of the frozen weights on *old text*, of the kind that the decoder was pre-trained on, and the anchor is no change at
all: nothing is stored but F, and what is held is what pre-training knew. Earlier tasks are not.

old_lines  rows of old text that F is the mean of; they are drawn anew, and are not those that the record's old text is asked on

Deviations from the code: F is the mean over rows of the squared gradient of the row's whole log-probability, where the code
squares the gradient of a mean over its tokens (which falls with the square of the length) and over a batch (one square for many
rows). F is held in full precision, in 8 bits there. As in the code there is no 1/2 before the sum. Old text is that of
`streams/tokens/base_text.py`, so the decoder must read bytes. Own choices: rank, rates, 256 rows, strength; the published
strengths, 2 and 0.5, are for the other F. Published number: none read. Measured on facts_30, then shift_3 (200 lines each, two
seeds): the loss on old text rises by 1.62 nats as `text_lora`, by 0.94, 0.29 and 0.05 with strength 0.1, 1 and 10. Up to 1 both
tasks are learned as well as without; earlier tasks are forgotten either way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from clbench.interfaces import Capabilities, Experience, Schedule, UserError
from clbench.models.decoder import Decoder
from clbench.models.pet_modules import lora
from clbench.models.pet_sites import blocks_of, linear_of
from clbench.streams.images.data import shuffled
from clbench.streams.tokens import base_text
from clbench.streams.tokens.made_tasks import VOCAB
from clbench.streams.tokens.text_data import TextBatch
from clbench.training.answer_loss import Targets, answer_loss, check_targets
from clbench.training.fisher import Weights, sum_per_sample
from clbench.training.fit import Recipe, fit
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore

LENGTH = 64  # bytes of a row of old text
AT_ONCE = 64


class E2wm:
    """Sequential LoRA that is held where old text needs the weights. State: the pair of each layer, F."""

    capabilities: ClassVar[Capabilities] = Capabilities(asks="next_token")

    def __init__(
        self,
        model: Decoder,
        runtime: Runtime,
        *,
        strength: float = 1.0,
        old_lines: int = 256,
        rank: int = 8,
        layers: Sequence[str] = ("q", "k", "v", "proj", "fc1", "fc2"),
        scale: float = 4.0,
        targets: Targets = "answer",
        lr: float = 3e-3,
        epochs: int | None = None,
        batch_size: int = 16,
        weight_decay: float = 0.0,
        clip: float | None = 1.0,
        schedule: Schedule = constant,
    ):
        check_targets(targets)
        if not strength >= 0 or old_lines < 1:
            raise UserError(f"learner.strength must be from 0 and old_lines from 1, got {strength} and {old_lines}")
        if model.shape.vocab != VOCAB:
            said = f"model {model.identity['name']} reads {model.shape.vocab} tokens"
            raise UserError(f"learner e2wm holds what bytes of the made old text need, {said}: model=decoder_base")
        self.model, self.runtime, self.lr = model, runtime, lr
        self.targets: Targets = targets
        self.strength, self.old_lines, self.scale = strength, old_lines, scale
        self.pet = lora(model, runtime, rank=rank, targets=layers, scale=scale)
        self.sites = sorted({name.rsplit("/", 1)[0] for name in self.pet.values})
        self.fisher: Weights = {}
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = Recipe("adamw", weight_decay=weight_decay, schedule=schedule, clip=clip)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Before the first task F; then train the pairs under the penalty."""
        if not self.fisher and self.strength > 0:
            with self.runtime.phase("fisher"):
                self.fisher = self.old_fisher()
        self.pet.train()

        def loss(batch: TextBatch) -> Tensor:
            nats = answer_loss(self.model, batch, self.targets)
            return (
                nats + self.strength * penalty(dict(self.pet.values.items()), self.fisher, self.scale) if self.fisher else nats
            )

        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        return fit(self.runtime, "train", self, groups_of((self.pet, self.lr)), loss, batches, self.recipe)

    def old_fisher(self) -> Weights:
        """Mean over rows of old text of the squared gradient of each one's -log p -> {site: [O, I]}, of the bare network."""
        blocks = blocks_of(self.model, "lora")
        weights = {site: linear_of(blocks[int(site.split("/")[0])], site.split("/")[1]) for site in self.sites}
        names = {id(p): name for name, p in self.model.named_parameters()}
        rows = torch.from_numpy(base_text.old_text(self.old_lines, LENGTH, self.runtime.key("old text")))
        total: Weights = {}
        self.model.eval()
        for layer, _ in weights.values():
            layer.weight.requires_grad_(True)
        with self.pet.off():
            for some in rows.to(self.runtime.device).split(AT_ONCE):
                self.runtime.check_stop()
                part = sum_per_sample(self.model, some, some[:, 1:], _nats, Tensor.square)
                total = {name: f + total[name] if total else f for name, f in part.items()}
        for layer, _ in weights.values():
            layer.weight.requires_grad_(False)
        whole = {site: total[names[id(layer.weight)]] / len(rows) for site, (layer, _) in weights.items()}
        return {site: weights[site][1].of(f).contiguous() for site, f in whole.items()}

    def next_token(self, batch: TextBatch) -> Tensor:
        """Scores of the token after each: [B, L] -> [B, L, V]."""
        self.model.eval()
        self.pet.eval()
        return self.model(batch.tokens)

    def state_dict(self) -> dict[str, Any]:
        """The pairs, and F."""
        return collect(self, "pet", "fisher")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)


def penalty(values: Mapping[str, Tensor], fisher: Mapping[str, Tensor], scale: float) -> Tensor:
    """Sum of F (s B A)^2 over sites: values "SITE/a" [r, I], "SITE/b" [O, r], F [O, I] -> scalar."""
    terms = [(f * (scale * values[f"{site}/b"] @ values[f"{site}/a"]).square()).sum() for site, f in fisher.items()]
    return torch.stack(terms).sum()


def _nats(z: Tensor, wanted: Tensor) -> Tensor:
    """-log p of a row: scores [1, L, V], its tokens from the second on [L - 1] -> scalar."""
    return functional.cross_entropy(z[0, :-1].float(), wanted, reduction="sum")
