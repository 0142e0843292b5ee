"""Feature extractors: unmodified timm models with their weights' identity, and what a learner may ask of them.

A backbone is named by its full timm tag and by the SHA-256 of its weights: the same short name has meant different weights in
different timm releases (`vit_base_patch16_224` was `augreg_in21k_ft_in1k`, today it is `augreg2_in21k_ft_in1k`).
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clbench.interfaces import UserError
from clbench.models import weights as files
from clbench.models.feature_memory import FeatureMemory, Name
from clbench.models.weights import state_sha256
from clbench.streams.images import ImageBatch
from clbench.streams.pixels import Profile, make_profile

Family = Literal[
    "timm", "unit", "imagenet", "cifar", "small", "pilot", "ranpac", "coda", "lae", "slca_cifar", "slca_imagenet",
    "slca_finegrained", "fecam",
]  # fmt: skip

CACHED_PIXELS = 16 * 224 * 224  # of one pass on a CPU: more leave its caches (a ViT-Tiny in bf16: 173 images/s, 163 with 32)


class Backbone(nn.Module):
    """A timm model without its classifier. `features` gives [B, D] after the last norm and pooling (class token for ViTs).

    passes    images that went through, those of deep copies included, and those that the store on disk spared:
              {"train": n, "eval": n, "stored": n}
    memory    features that were computed already
    identity  name, timm tag, source, profile, file_sha256, state_sha256: goes into the record
    """

    def __init__(self, net: nn.Module, profile: Profile, identity: dict[str, Any], pretrained: bool):
        super().__init__()
        self.net, self.profile, self.identity, self.pretrained = net, profile, identity, pretrained
        self.num_features = int(net.num_features)  # type: ignore[arg-type]
        self.passes = {"train": 0, "eval": 0, "stored": 0}
        self.memory = FeatureMemory()
        self.frozen = False
        self._remembers = True
        self.pets: list[Any] = []

    def features(self, batch: Any) -> Tensor:
        """Features of a batch, or of ready images x [B, C, H, W] -> [B, D].

        While frozen, features of test-view batches are remembered as float32 by id and by the tags of the PETs at work (no tag:
        they are not), in memory and, with a store, on disk: no image passes twice.
        """
        names = self._names(batch) if isinstance(batch, ImageBatch) and batch.plain and self._may_remember() else []
        if not names:
            return self._pooled(batch)
        known, stored = self.memory.find(names, self._group)
        self.passes["stored"] += stored
        rows = [i for i, name in enumerate(names) if name not in known]
        if rows:
            out = self._of_some(batch, rows).detach().float().cpu()
            fresh: dict[Name, Tensor] = {}
            for i, row in zip(rows, out, strict=True):
                fresh.setdefault(names[i], row.clone())
            fresh = {name: row for name, row in fresh.items() if name not in known}
            self.memory.keep(fresh, self._group)
            known |= fresh
        return torch.stack([known[name] for name in names]).to(self._device)

    def _pooled(self, batch: Any) -> Tensor:
        x = batch if isinstance(batch, Tensor) else batch.x
        bound = x.device.type != "cpu" or torch.is_grad_enabled() or self._trains() or any(pet.active for pet in self.pets)
        number = 1 if bound else max(1, -(-x[:, 0].numel() // CACHED_PIXELS))
        pooled = [self.net.forward_head(self.tokens(x), pre_logits=True) for x in x.tensor_split(number)]  # type: ignore[operator]
        return torch.cat(pooled)

    def _of_some(self, batch: ImageBatch, rows: list[int]) -> Tensor:
        """Features of some samples [R, D]. No image goes alone: kernels for single images round differently from others."""
        x = batch.select(torch.tensor(rows)).x
        passing = rows * 2 if len(rows) == 1 else rows
        with contextlib.ExitStack() as stack:
            for pet in self.pets:
                stack.enter_context(pet.only(passing))
            out = self._pooled(x.repeat(2, 1, 1, 1) if len(rows) == 1 else x)
        self.passes["eval"] -= len(passing) - len(rows)
        return out[: len(rows)]

    def _group(self, tags: Name) -> str | None:
        """The store's name for the network as it stands with the modules at work; None where something unknown hangs on it."""
        assert self.memory.store is not None
        modules = list(self.net.modules())
        if not self.pets and any(m._forward_hooks or m._forward_pre_hooks for m in modules):
            return None
        active = [pet for pet in self.pets if pet.active]
        kinds = [type(m).__name__ for m in modules]
        digests = [f"{pet.kind} {state_sha256(pet.in_use_by(tag))}" for pet, tag in zip(active, tags[1:], strict=True)]
        return self.memory.store.group(tags[0], state_sha256(self.net.state_dict()), kinds, digests)

    def _names(self, batch: ImageBatch) -> list[Name]:
        """What each sample's features are remembered under; empty where they are not."""
        tags = [pet.tags(len(batch)) for pet in self.pets if pet.active]
        if any(tag is None for tag in tags):
            return []
        lower = [torch.is_autocast_enabled(self._device.type)] * len(batch)
        return list(zip(batch.ids.tolist(), lower, *tags, strict=True))

    def tokens(self, batch: Any) -> Tensor:
        """What comes before pooling: for a ViT all tokens after the last norm [B, N, D]."""
        x = batch if isinstance(batch, Tensor) else batch.x
        self.passes["train" if torch.is_grad_enabled() and self._trains() else "eval"] += len(x)
        return self.net.forward_features(x)  # type: ignore[operator]

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
) -> Backbone:
    """Build a model by its full timm tag and give it its weights.

    weights  "none" (random, drawn from `seed`), "timm" (timm's own download, needs `download=true` or a filled cache),
             "package:FILE" (ships with clbench), else a file: as given, or under `data_root` / CLBENCH_DATA
    sha256   of the file, checked where it is given
    stem     "small": 3x3 convolution without pooling, for ResNets at 32 px
    """
    options = dict(kwargs or {})
    if weights == "none" and sha256 is not None:
        raise UserError(f"model.sha256={sha256[:12]}... has no effect: model.weights=none has no file")
    if weights == "timm":
        if stem is not None:
            raise UserError(f"model.stem={stem} would replace a part of the weights that model.weights=timm brings")
        net, timm, file_sha = _downloaded(timm, options, sha256, download)
    else:
        net, file_sha = _drawn(timm, options, stem, seed), None
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
    return Backbone(net, make_profile(profile, size, config), identity, weights != "none")


def _known(tag: str) -> None:
    """`UserError` unless timm has this architecture and, where one is given, this tag."""
    import timm

    architecture, _, variant = tag.partition(".")
    if architecture not in timm.list_models():
        near = difflib.get_close_matches(architecture, timm.list_models(), 3)
        raise UserError(f"timm has no model {architecture!r}; near: {', '.join(near) or 'none'}")
    tags = timm.list_pretrained(f"{architecture}.*")
    if variant and tag not in tags:
        near = difflib.get_close_matches(tag, tags, 1) or tags[:1]
        raise UserError(
            f"timm has no weights {tag!r}; {f'did you mean {near[0]!r}?' if near else 'it has none for this model'}"
        )


def _create(tag: str, options: dict[str, Any], **more: Any) -> nn.Module:
    import timm

    try:
        return timm.create_model(tag, num_classes=0, **options, **more)
    except (TypeError, AssertionError) as error:
        raise UserError(f"model.kwargs {options} do not fit timm's {tag}: {error}") from None


def _drawn(tag: str, options: dict[str, Any], stem: str | None, seed: int) -> nn.Module:
    """An architecture with random weights from `seed`; the global generators stay as they are."""
    from timm.models.resnet import BasicBlock, ResNet

    if stem not in (None, "small"):
        raise UserError(f"model.stem must be null or small, got {stem!r}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        if tag == "resnet32":
            net: nn.Module = ResNet(BasicBlock, layers=(5, 5, 5), channels=(16, 32, 64), num_classes=0, **options)  # type: ignore[arg-type]
            net.bn1, net.layer1[0] = nn.BatchNorm2d(16), BasicBlock(16, 16)  # type: ignore[index, operator]
            net.conv1, net.layer4 = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.Identity()
        else:
            _known(tag)
            net = _create(tag, options)
        if stem == "small":
            if not isinstance(net, ResNet):
                raise UserError(f"model.stem=small is for ResNets, {tag} is none")
            net.conv1 = nn.Conv2d(3, int(net.bn1.num_features), 3, 1, 1, bias=False)  # type: ignore[arg-type]
            net.maxpool = nn.Identity()
        if isinstance(net, ResNet):
            net.init_weights()
    return net


def _downloaded(tag: str, options: dict[str, Any], sha256: str | None, download: bool) -> tuple[nn.Module, str, str | None]:
    """A model with timm's own weights, from its cache where they lie there -> net, full tag, SHA-256 of the file."""
    import timm

    _known(tag)
    if "." not in tag:
        tags = timm.list_pretrained(f"{tag}.*")
        if len(tags) != 1:
            raise UserError(f"model.timm={tag} names {len(tags)} sets of weights: give the full tag, one of {', '.join(tags)}")
        tag = tags[0]
    path = files.cached(tag)
    mend = "or model.weights=FILE, a safetensors file"
    if path is None and not download:
        raise UserError(f"weights of timm's {tag} are not in the local cache: download=true fetches them, {mend}")
    overlay = {} if path is None else {"file": str(path), "custom_load": path.suffix == ".npz"}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            net = _create(tag, options, pretrained=True, pretrained_cfg_overlay=overlay)
    except UserError:
        raise
    except Exception as error:  # the hub's client raises many kinds
        reason = files.line(error)
        raise UserError(f"weights of timm's {tag} could not be loaded ({mend}): {reason}") from None
    path = path or files.cached(tag)
    if path is None and sha256 is not None:
        raise UserError(f"model.sha256 cannot be checked: timm's file for {tag} was not found after loading it")
    return net, tag, files.check_sha256(path, sha256) if path else None
