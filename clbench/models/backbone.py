"""Feature extractors: unmodified timm models with their weights' identity, and what a learner may ask of them.

A backbone is named by its full timm tag and by the SHA-256 of its weights: the same short name has meant different weights in
different timm releases (`vit_base_patch16_224` was `augreg_in21k_ft_in1k`, today it is `augreg2_in21k_ft_in1k`).
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from typing import Any

import torch
from torch import Tensor, nn

from clbench.interfaces import UserError
from clbench.streams.images import ImageBatch
from clbench.streams.pixels import Profile, make_profile

HERE = pathlib.Path(__file__).resolve().parent
MEMO_BYTES = 2 << 30


class Backbone(nn.Module):
    """A timm model without its classifier. `features` gives [B, D] after the last norm and pooling (class token for ViTs).

    passes    images that went through: {"train": n, "eval": n}
    identity  name, timm tag, source, file_sha256, state_sha256: goes into the record
    """

    def __init__(self, net: nn.Module, profile: Profile, identity: dict[str, Any], pretrained: bool):
        super().__init__()
        self.net, self.profile, self.identity, self.pretrained = net, profile, identity, pretrained
        self.num_features = int(net.num_features)  # type: ignore[arg-type]
        self.passes = {"train": 0, "eval": 0}
        self.frozen = False
        self._memo: dict[int, Tensor] = {}

    def features(self, batch: Any) -> Tensor:
        """Features of a batch, or of ready images x [B, C, H, W] -> [B, D].

        While frozen, features of test-view batches are remembered by sample id: no image passes twice.
        """
        memo = self.frozen and isinstance(batch, ImageBatch) and batch.plain
        if memo:
            ids = batch.ids.tolist()
            if all(i in self._memo for i in ids):
                return torch.stack([self._memo[i] for i in ids]).to(self._device)
        x = batch if isinstance(batch, Tensor) else batch.x
        self.passes["train" if self.training and torch.is_grad_enabled() else "eval"] += len(x)
        out = self.net.forward_head(self.net.forward_features(x), pre_logits=True)  # type: ignore[operator]
        if memo and len(self._memo) * self.num_features * 4 < MEMO_BYTES:
            self._memo.update(zip(ids, out.detach().float().cpu().clone(), strict=True))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """The same as `features` for ready images."""
        return self.features(x)

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def freeze(self) -> None:
        """No parameter is trained from now on; normalisation keeps its statistics; features are remembered."""
        self.requires_grad_(False)
        self.frozen = True
        self.eval()

    def unfreeze(self) -> None:
        """Undo `freeze`; what was remembered is forgotten."""
        self.requires_grad_(True)
        self.frozen = False
        self._memo.clear()

    def train(self, mode: bool = True) -> Backbone:
        """A frozen backbone stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def fresh_norm(self) -> None:
        """Replace the final LayerNorm by a new one (gamma 1, beta 0, eps 1e-5), as SLCA's released code does on loading."""
        norm = getattr(self.net, "norm", None)
        if not isinstance(norm, nn.LayerNorm):
            raise UserError(f"model {self.identity['name']} has no final LayerNorm: set learner.fresh_norm=false")
        self.net.norm = nn.LayerNorm(norm.normalized_shape, eps=1e-5).to(self._device)

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        """Fill in place; remembered features are forgotten."""
        self._memo.clear()
        return super().load_state_dict(state, strict, assign)


def build_backbone(
    name: str,
    timm: str,
    kwargs: dict[str, Any] | None = None,
    weights: str = "none",
    sha256: str | None = None,
    profile: str = "timm",
    stem: str | None = None,
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
    net = _architecture(name, timm, dict(kwargs or {}), stem, seed, weights == "timm", download)
    source, file_sha = weights, None
    if weights not in ("none", "timm"):
        path = _find(weights, timm, data_root)
        file_sha = hashlib.sha256(path.read_bytes()).hexdigest()
        if weights.startswith("package:"):
            sha256 = json.loads(path.with_suffix(".json").read_text())["sha256"]
        if sha256 is not None and sha256 != file_sha:
            raise UserError(f"weights {path} have SHA-256 {file_sha}, expected {sha256}")
        _fill(net, path, name)
        source = weights if weights.startswith("package:") else path.name
    identity = {
        "name": name,
        "timm": timm,
        "source": source,
        "profile": profile,
        "file_sha256": file_sha,
        "state_sha256": state_sha256(net.state_dict()),
    }
    config = dict(getattr(net, "pretrained_cfg", None) or {})
    size = int((kwargs or {}).get("img_size", 32 if stem == "small" else config.get("input_size", (3, 224, 224))[-1]))
    return Backbone(net, make_profile(profile, size, config), identity, weights != "none")


def _architecture(
    name: str, tag: str, kwargs: dict, stem: str | None, seed: int, pretrained: bool, download: bool
) -> nn.Module:
    import timm
    from timm.models.resnet import BasicBlock, ResNet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if tag == "resnet32":
            net: nn.Module = ResNet(BasicBlock, layers=(5, 5, 5), channels=(16, 32, 64), num_classes=0, stem_width=16)  # type: ignore[arg-type]
        else:
            if tag.split(".")[0] not in timm.list_models(tag.split(".")[0]):
                near = timm.list_models(f"*{tag.split('.')[0][:8]}*")[:3]
                raise UserError(f"timm has no model {tag!r}; near: {', '.join(near) or 'none'}")
            if pretrained and "." not in tag:
                tags = ", ".join(timm.list_pretrained(f"{tag}.*")[:6])
                raise UserError(f"model.timm={tag} names several weights: give the full tag, one of {tags}")
            net = _created(tag, kwargs, pretrained, download)
    if stem == "small":
        net.conv1 = nn.Conv2d(3, net.conv1.out_channels, 3, 1, 1, bias=False)  # type: ignore[union-attr]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    elif stem is not None:
        raise UserError(f"model.stem must be null or small, got {stem!r}")
    return net


def _created(tag: str, kwargs: dict[str, Any], pretrained: bool, download: bool) -> nn.Module:
    import timm

    if not pretrained:
        return timm.create_model(tag, num_classes=0, **kwargs)
    offline = os.environ.get("HF_HUB_OFFLINE")
    if not download:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        return timm.create_model(tag, pretrained=True, num_classes=0, **kwargs)
    except Exception as error:  # the hub's client raises many kinds
        hint = "no network, or the hub does not answer" if download else "not in the local cache; download=true fetches them"
        line = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(
            f"weights of timm's {tag} could not be loaded ({hint}; or model.weights=FILE, a safetensors file): {line}"
        ) from None
    finally:
        if not download:
            if offline is None:
                os.environ.pop("HF_HUB_OFFLINE", None)
            else:
                os.environ["HF_HUB_OFFLINE"] = offline


def _find(weights: str, tag: str, data_root: str | None) -> pathlib.Path:
    if weights.startswith("package:"):
        return HERE / weights.removeprefix("package:")
    root = data_root or os.environ.get("CLBENCH_DATA")
    places = [pathlib.Path(weights).expanduser()] + ([pathlib.Path(root).expanduser() / weights] if root else [])
    for path in places:
        if path.is_file():
            return path
    looked = " and ".join(str(p) for p in places)
    where = "" if root else " (no data_root, CLBENCH_DATA is not set)"
    raise UserError(
        f"weights file {weights} not found: looked for {looked}{where}; it holds timm's {tag}; "
        "model.weights=FILE names it, model.weights=timm download=true fetches timm's own"
    )


def _fill(net: nn.Module, path: pathlib.Path, name: str) -> None:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # corrupt files raise many kinds
        raise UserError(f"weights {path} cannot be read: {(str(error).splitlines() or [''])[0][:120]}") from None
    state = state.get("state_dict", state.get("model", state)) if isinstance(state, dict) else {}
    wanted = net.state_dict()
    heads = ("head.", "head_drop.", "fc.", "classifier.", "head_dist.", "pre_logits.")
    given = {k: v.float() if v.is_floating_point() else v for k, v in state.items() if k in wanted or not k.startswith(heads)}
    missing, extra = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or extra:
        first = f"missing {missing[0]}" if missing else f"unexpected {extra[0]}"
        raise UserError(f"weights {path} do not fit model {name}: {len(missing)} missing, {len(extra)} unexpected ({first})")
    for key, value in given.items():
        if value.shape != wanted[key].shape:
            raise UserError(
                f"weights {path} do not fit model {name}: {key} is {tuple(value.shape)}, the model wants {tuple(wanted[key].shape)}"
            )
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"weights {path}: {key} holds NaN or infinite values")
    net.load_state_dict(given)


def state_sha256(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a state, in the order of the names."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()
