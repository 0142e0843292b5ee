"""Feature extractors: unmodified timm models with their weights' identity, and what a learner may ask of them.

A backbone is named by its full timm tag and by the SHA-256 of its weights: the same short name has meant different weights in
different timm releases (`vit_base_patch16_224` was `augreg_in21k_ft_in1k`, today it is `augreg2_in21k_ft_in1k`).
"""

from __future__ import annotations

import contextlib
import copy
import json
from functools import partial
from typing import Any, Literal

import torch
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from clbench.interfaces import UserError
from clbench.models import architectures, class_token, feature_width
from clbench.models import weights as files
from clbench.models.feature_memory import FeatureMemory, Name, state_of
from clbench.models.memory_layout import laid_out
from clbench.models.precision import MixedPrecision
from clbench.models.weights import state_sha256
from clbench.streams.images.data import ImageBatch
from clbench.streams.images.pixels import Profile, make_profile

Family = Literal[
    "timm", "unit", "imagenet", "cifar", "small", "pilot", "ranpac", "coda", "lae", "slca_cifar", "slca_imagenet",
    "slca_finegrained", "fecam",
]  # fmt: skip

CACHED_PIXELS = 16 * 224 * 224  # of one pass on a CPU: more leave its caches (a ViT-Tiny in bf16: 173 images/s, 163 with 32)


class Backbone(MixedPrecision, nn.Module):
    """A timm model without its classifier. `features` gives [B, D] after the last norm and pooling (class token for ViTs).

    passes    images that went through, those of deep copies included, and those that the store on disk spared:
              {"train": n, "eval": n, "stored": n}
    memory    features that were computed already
    precision  of its passes, "fp32" or "bf16" (autocast, opened here); what they return is float32
    class_token_tail  whether features leave out what the last block computes for the other tokens
    channels_last     whether weights and images of convolutions have their channels innermost (`memory_layout`)
    identity  name, timm tag, source, profile, file_sha256, state_sha256: goes into the record
    """

    def __init__(self, net: nn.Module, profile: Profile, identity: dict[str, Any], pretrained: bool, width: int | None = None):
        super().__init__()
        self.net, self.profile, self.identity, self.pretrained = net, profile, identity, pretrained
        self.num_features = int(net.num_features) if width is None else width  # type: ignore[arg-type]
        self.passes = {"train": 0, "eval": 0, "stored": 0}
        self.memory = FeatureMemory()
        self.frozen = False
        self.class_token_tail = self.channels_last = False
        self._remembers = True
        self.pets: list[Any] = []

    def features(self, batch: Any) -> Tensor:
        """Features of a batch, or of ready images x [B, C, H, W] -> [B, D].

        While frozen, features of test-view batches are remembered as float32 by sample and by the tags of the PETs at work (no
        tag: they are not), in memory and, with a store, on disk: no image passes twice. Issued batches only: `FeatureMemory`.
        """
        with self.lowered(self._device.type):
            return self._features(batch).float()

    def _features(self, batch: Any) -> Tensor:
        """From memory, or computed; in the precision that is in force."""
        issued = batch.stored if isinstance(batch, ImageBatch) and batch.plain and self._may_remember() else None
        if issued is None or len(issued) != len(batch):
            return self._pooled(batch)
        group = partial(state_of, self)
        names, known, stored = self.memory.find(issued, self._tags(len(issued)), group)
        if not names:
            return self._pooled(batch)
        self.passes["stored"] += stored
        rows = [i for i, name in enumerate(names) if name not in known]
        if rows:
            out = self._of_some(batch, rows).detach().float().cpu()
            fresh: dict[Name, Tensor] = {}
            for i, row in zip(rows, out, strict=True):
                fresh.setdefault(names[i], row.clone())
            fresh = {name: row for name, row in fresh.items() if name not in known}
            self.memory.keep(fresh, group)
            known |= fresh
        return torch.stack([known[name] for name in names]).to(self._device)

    def _pooled(self, batch: Any) -> Tensor:
        x = batch if isinstance(batch, Tensor) else batch.x
        whole = x.device.type != "cpu" or torch.is_grad_enabled() or self.training
        number = 1 if whole else max(1, -(-x[:, 0].numel() // CACHED_PIXELS))
        if number == 1:
            return self._pass(x)
        return torch.cat([self._pass_of(x, rows) for rows in torch.arange(len(x)).tensor_split(number)])

    def _pass_of(self, x: Tensor, rows: Tensor) -> Tensor:
        """Of some images of a batch [R, D], each under the state that its sample has."""
        with contextlib.ExitStack() as stack:
            for pet in self.pets:
                stack.enter_context(pet.only(rows))
            return self._pass(x[rows[0] : rows[-1] + 1])

    def _pass(self, x: Tensor) -> Tensor:
        """Of ready images [B, C, H, W] -> [B, D]."""
        net: Any = self.net
        tail = self.class_token_tail and class_token.fits(net)
        tokens = class_token.forward_features(net, self.pets, self._counted(x)) if tail else self._tokens(x)
        return net.forward_head(tokens, pre_logits=True)

    def _of_some(self, batch: ImageBatch, rows: list[int]) -> Tensor:
        """Features of some samples [R, D]. Never runs batch size 1, whose kernels round differently."""
        x = batch.select(torch.tensor(rows)).x
        passing = rows * 2 if len(rows) == 1 else rows
        with contextlib.ExitStack() as stack:
            for pet in self.pets:
                stack.enter_context(pet.only(passing))
            out = self._pooled(x.repeat(2, 1, 1, 1) if len(rows) == 1 else x)
        self.passes["eval"] -= len(passing) - len(rows)
        return out[: len(rows)]

    def _tags(self, number: int) -> list[Name]:
        """(lower, tag, ...) of each of `number` samples: the state that features belong to; empty where none is known."""
        tags = [pet.tags(number) for pet in self.pets if pet.active]
        lower = [torch.is_autocast_enabled(self._device.type)] * number
        return [] if any(tag is None for tag in tags) else list(zip(lower, *tags, strict=True))

    def tokens(self, batch: Any) -> Tensor:
        """What comes before pooling: for a ViT all tokens after the last norm [B, N, D]."""
        with self.lowered(self._device.type):
            return self._tokens(batch if isinstance(batch, Tensor) else batch.x).float()

    def _tokens(self, x: Tensor) -> Tensor:
        return self.net.forward_features(self._counted(x))  # type: ignore[operator]

    def _counted(self, x: Tensor) -> Tensor:
        self.passes["train" if torch.is_grad_enabled() and self._trains() else "eval"] += len(x)
        return laid_out(x, self.channels_last)

    def _trains(self) -> bool:
        return self.training or any(pet.training and pet.active for pet in self.pets)

    def forward(self, x: Tensor) -> Tensor:
        """The same as `features` for ready images."""
        return self.features(x)

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _may_remember(self) -> bool:
        return self.frozen and self._remembers and not any(p.requires_grad for p in self.parameters())

    def remember(self, on: bool) -> None:
        """Whether features are remembered while frozen (they are, unless told otherwise); False forgets them."""
        self._remembers = on
        if not on:
            self.forget()

    def forget(self) -> None:
        """Drop what memory holds: something that it was made with has changed."""
        self.memory.forget()

    def freeze(self) -> None:
        """No parameter is trained from now on; normalisation keeps its statistics; features are remembered."""
        self.requires_grad_(False)
        self.frozen = True
        self.forget()
        self.eval()

    def unfreeze(self) -> None:
        """Undo `freeze`; what was remembered is forgotten."""
        self.requires_grad_(True)
        self.frozen = False
        self.forget()

    def train(self, mode: bool = True) -> Backbone:
        """A frozen backbone stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def fresh_norm(self) -> None:
        """Replace the final LayerNorm by a new one (gamma 1, beta 0, eps 1e-5), as SLCA's released code does on loading."""
        norm = getattr(self.net, "norm", None)
        if not isinstance(norm, nn.LayerNorm):
            raise UserError(f"model {self.identity['name']} has no final LayerNorm: set learner.fresh_norm=false")
        self.net.norm = nn.LayerNorm(list(norm.normalized_shape), eps=1e-5).to(self._device).requires_grad_(not self.frozen)
        self.forget()

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        """Fill in place; remembered features are forgotten."""
        self.forget()
        return super().load_state_dict(state, strict, assign)

    def __deepcopy__(self, memo: dict[int, Any]) -> Backbone:
        """A copy of its own weights that remembers nothing yet; its passes count here."""
        twin = Backbone.__new__(Backbone)
        memo |= {id(self): twin, id(self.passes): self.passes}
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def build_backbone(
    name: str,
    timm: str,
    kwargs: dict[str, Any] | None = None,
    weights: str = "none",
    sha256: str | None = None,
    profile: Family = "timm",
    stem: Literal["small"] | None = None,
    data_root: str | None = None,
    download: bool = False,
    seed: int = 0,
    norm: Literal["batch", "group", "none"] = "batch",
) -> Backbone:
    """Build a model by its full timm tag, or a small network by its name, and give it its weights.

    weights  "none" (random, drawn from `seed`), "timm" (timm's own download, needs `download=true` or a filled cache),
             "package:FILE" (ships with clbench), else a file: as given, or under `data_root` / CLBENCH_DATA
    sha256   of the file, checked where it is given
    stem     "small": 3x3 convolution without pooling, for ResNets at 32 px
    norm     of the small networks (see `small_networks`)
    """
    options = dict(kwargs or {})
    if weights == "none" and sha256 is not None:
        raise UserError(f"model.sha256={sha256[:12]}... has no effect: model.weights=none has no file")
    if weights == "timm":
        if norm != "batch":
            raise UserError(f"model.norm={norm} has no effect on the weights that model.weights=timm brings")
        if stem is not None:
            raise UserError(f"model.stem={stem} would replace a part of the weights that model.weights=timm brings")
        net, timm, file_sha = architectures.downloaded(timm, options, sha256, download)
    else:
        net, file_sha = architectures.drawn(timm, options, stem, seed, norm), None
    source = weights
    if weights not in ("none", "timm"):
        path = files.find(weights, timm, data_root)
        if weights.startswith("package:"):
            sha256 = sha256 or json.loads(path.with_suffix(".json").read_text())["sha256"]
        file_sha = files.check_sha256(path, sha256)
        files.fill(net, path, name)
        source = weights if weights.startswith("package:") else path.name
    identity = {"name": name, "timm": timm, "source": source, "profile": profile, "file_sha256": file_sha}
    identity["state_sha256"] = state_sha256(net.state_dict())
    config = dict(getattr(net, "pretrained_cfg", None) or {})
    side = options.get("img_size", 32 if stem == "small" else config.get("input_size", (3, 224, 224))[-1])
    size = int(side[0] if isinstance(side, list | tuple) else side)
    width = None if type(net) in (VisionTransformer, ResNet) else feature_width.measured(net, size, name)
    return Backbone(net, make_profile(profile, size, config), identity, weights != "none", width)
