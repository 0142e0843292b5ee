"""timm's networks by name: with random weights from a seed, or with the weights that timm publishes."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn

from clbench.interfaces import UserError
from clbench.models import small_networks
from clbench.models import weights as files


def known(tag: str) -> None:
    """`UserError` unless timm has this architecture and, where one is given, this tag."""
    import timm

    architecture, _, variant = tag.partition(".")
    if architecture not in timm.list_models():
        near = difflib.get_close_matches(architecture, [*timm.list_models(), *small_networks.NAMES], 3)
        raise UserError(f"timm has no model {architecture!r}; near: {', '.join(near) or 'none'}")
    tags = timm.list_pretrained(f"{architecture}.*")
    if variant and tag not in tags:
        near = difflib.get_close_matches(tag, tags, 1) or tags[:1]
        raise UserError(
            f"timm has no weights {tag!r}; {f'did you mean {near[0]!r}?' if near else 'it has none for this model'}"
        )


def create(tag: str, options: dict[str, Any], **more: Any) -> nn.Module:
    """A network without a classifier; `UserError` for options that it does not take."""
    import timm

    try:
        return timm.create_model(tag, num_classes=0, **options, **more)
    except (TypeError, AssertionError) as error:
        raise UserError(f"model.kwargs {options} do not fit timm's {tag}: {error}") from None


def drawn(tag: str, options: dict[str, Any], stem: str | None, seed: int, norm: str = "batch") -> nn.Module:
    """An architecture with random weights from `seed`; the global generators stay as they are."""
    from timm.models.resnet import ResNet

    if stem not in (None, "small"):
        raise UserError(f"model.stem must be null or small, got {stem!r}")
    if norm != "batch" and tag not in small_networks.NAMES:
        raise UserError(f"model.norm={norm} has no effect on timm's {tag}: it is for {', '.join(small_networks.NAMES)}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        if tag in small_networks.NAMES:
            net: Any = small_networks.drawn(tag, options, norm)
        else:
            known(tag)
            net = create(tag, options)
        if stem == "small":
            if not isinstance(net, ResNet):
                raise UserError(f"model.stem=small is for ResNets, {tag} is none")
            first = net.conv1 if isinstance(net.conv1, nn.Conv2d) else net.conv1[-1]  # type: ignore[index]
            net.conv1 = nn.Conv2d(3, first.out_channels, 3, 1, 1, bias=False)  # type: ignore[arg-type]
            net.maxpool = nn.Identity()
        if isinstance(net, ResNet):
            small_networks.start(net, tag, norm)
    return net


def downloaded(tag: str, options: dict[str, Any], sha256: str | None, download: bool) -> tuple[nn.Module, str, str | None]:
    """A model with timm's own weights, from its cache where they lie there -> net, full tag, SHA-256 of the file."""
    import timm

    known(tag)
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
            net = create(tag, options, pretrained=True, pretrained_cfg_overlay=overlay)
    except UserError:
        raise
    except Exception as error:  # the hub's client raises many kinds
        reason = files.line(error)
        raise UserError(f"weights of timm's {tag} could not be loaded ({mend}): {reason}") from None
    path = path or files.cached(tag)
    if path is None and sha256 is not None:
        raise UserError(f"model.sha256 cannot be checked: timm's file for {tag} was not found after loading it")
    return net, tag, files.check_sha256(path, sha256) if path else None
