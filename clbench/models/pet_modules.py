"""Kinds of parameter-efficient tuning: site in the block, formula, initialisation.

    adapter   a bottleneck beside the MLP (AdaptFormer) or beside the attention (LAE)
    lora      low-rank terms of q, k, v, qkv, proj, fc1, fc2 (Hu et al. 2022)
    prefix    keys and values put before the attention's own (prefix tuning; LAE, DualPrompt, CODA-Prompt, OVOR)
    prompt    tokens between the class token and the patches (L2P)
    vpt       tokens after the patches, carried through (shallow) or new in every block (deep) (Jia et al. 2022)
    ssf       scale and shift after every layer (Lian et al. 2022)
    mam       prefix and a parallel adapter together (He et al. 2022)
    none      nothing: the whole backbone is meant

All but vpt hang on decoders too; there q, k and v are rows of each head, and a prefix or prompt stands where `pet_decoder.py`
says.

Blocks are counted from 0: `blocks` is a list, or a range like "2:5" that ends where the network ends, or None for all.
Shapes: x [B, N, D]; a value has its own shape, or a first axis B where a batch mixes states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.interfaces import UserError
from clbench.models.decoder import Decoder
from clbench.models.pet import Init, Network, Pet, kaiming, normal, ones, uniform, zeros
from clbench.models.pet_decoder import Prompt, hang_prefix
from clbench.models.pet_sites import (
    LAYERS,
    Adapter,
    Blocks,
    LoraTerm,
    PrefixAttention,
    ScaleShift,
    Tokens,
    beside_attention,
    beside_mlp,
    blocks_of,
    chosen,
    fold_low_rank,
    fold_scale_shift,
    layer_of,
    linear_of,
    net_of,
    require_tokens,
)

Spec = dict[str, tuple[Sequence[int], Init]]
Hang = Callable[[Pet], None]  # puts the hooks of a kind on the network
LORA_TARGETS = ("q", "k", "v", "qkv", "proj", "fc1", "fc2")


def none(model: Network, runtime: Any) -> None:
    """No module: learners that take one train the whole backbone instead."""


def adapter(
    model: Network,
    runtime: Any,
    *,
    bottleneck: int = 64,
    place: Literal["mlp", "attention"] = "mlp",
    scale: float = 0.1,
    learn_scale: bool = False,
    activation: Literal["relu", "gelu"] = "relu",
    dropout: float = 0.1,
    blocks: Sequence[int] | str | None = None,  # null: all; a list, counted from 0; or a range like "0:5"
) -> Pet:
    """Bottleneck x -> s (W_up drop(act(W_down x + b)) + b'), W_down Kaiming, the rest 0: the identity at the start.

    place "mlp" (AF-b): x is the un-normalised residual stream, the output joins the MLP branch. place "attention" (LAE): x
    is the normalised input of the attention, the output joins the attention's. Works in ViT and Swin blocks.
    """
    spec, hang = _adapter(model, bottleneck, place, scale, learn_scale, activation, dropout, blocks)
    pet = Pet(model, runtime, "adapter", spec)
    hang(pet)
    return pet


def _adapter(
    model: Network,
    bottleneck: int,
    place: str,
    scale: float,
    learn_scale: bool,
    activation: str,
    dropout: float,
    blocks: Blocks,
) -> tuple[Spec, Hang]:
    _positive("bottleneck", bottleneck)
    sites, spec = {}, Spec()
    needs = ("mlp",) if isinstance(model, Decoder) else ("norm1", "attn", "norm2", "drop_path2")
    for i, block in chosen(net_of(model), blocks, "adapter", needs):
        width = int(layer_of(block, "norm1").normalized_shape[0])
        spec |= {f"{i}/down": ((bottleneck, width), kaiming), f"{i}/down_bias": ((bottleneck,), zeros)}
        spec |= {f"{i}/up": ((width, bottleneck), zeros), f"{i}/up_bias": ((width,), zeros)}
        if learn_scale:
            spec[f"{i}/scale"] = ((), _filled(scale))
        sites[i] = block
    function = {"relu": F.relu, "gelu": F.gelu}[activation]

    def hang(pet: Pet) -> None:
        pet.drops = dropout > 0
        for i, block in sites.items():
            site = Adapter(pet, i, None if learn_scale else scale, function, dropout)
            if place == "mlp":
                beside_mlp(block, site)
            elif place == "attention":
                beside_attention(block, site)
            else:
                raise UserError(f"unknown place {place!r} of an adapter: choose mlp or attention")

    return spec, hang


def lora(
    model: Network,
    runtime: Any,
    *,
    rank: int = 5,
    targets: Sequence[str] = ("k", "v"),  # of q, k, v, qkv, proj, fc1, fc2
    scale: float = 1.0,
    learn_scale: bool = False,
    blocks: Sequence[int] | str | None = None,
) -> Pet:
    """W x -> W x + s B A x for each target layer: A [rank, in] Kaiming, B [out, rank] 0. Can be merged into the weights."""
    _positive("rank", rank)
    unknown = [t for t in targets if t not in LORA_TARGETS]
    if unknown or not targets:
        raise UserError(f"unknown LoRA targets {list(unknown)}: choose from {', '.join(LORA_TARGETS)}")
    sites, spec = [], Spec()
    for i, block in chosen(net_of(model), blocks, "lora", ("mlp",)):
        for target in targets:
            layer, rows = linear_of(block, target)
            out = len(rows.of(layer.weight))
            spec |= {
                f"{i}/{target}/a": ((rank, layer.in_features), kaiming),
                f"{i}/{target}/b": ((out, rank), zeros),
            }
            if learn_scale:
                spec[f"{i}/{target}/scale"] = ((), _filled(scale))
            sites.append((f"{i}/{target}", layer, rows))
    pet = Pet(model, runtime, "lora", spec)
    for name, layer, rows in sites:
        layer.register_forward_hook(LoraTerm(pet, name, rows, None if learn_scale else scale).add)
        pet.merges.append(fold_low_rank(pet, name, layer, rows, None if learn_scale else scale))
    return pet


def prefix(
    model: Network,
    runtime: Any,
    *,
    length: int | Sequence[int] = 10,  # or one length a block
    blocks: Sequence[int] | str | None = None,
    low: float = 0.0,
    high: float = 0.01,
    learn_scale: bool = False,
    compensate: bool = False,
) -> Pet:
    """Keys P_k and values P_v [length, D], U(low, high), before the attention's own; queries stay. `length` may be one a block.

    learn_scale  P_k and P_v are multiplied by a learnable scalar each (1 at the start)
    compensate   LAE's calibration: after the softmax, the weights on the prefix are divided by their sum (at least 1e-12)
    """
    spec, hang = _prefix(model, length, blocks, low, high, learn_scale, compensate)
    pet = Pet(model, runtime, "prefix", spec)
    hang(pet)
    return pet


def _prefix(
    model: Network,
    length: int | Sequence[int],
    blocks: Blocks,
    low: float,
    high: float,
    learn_scale: bool,
    compensate: bool,
) -> tuple[Spec, Hang]:
    decodes = isinstance(model, Decoder)
    if decodes and compensate:
        raise UserError("pet=prefix: compensate is for networks of images, not for decoders")
    places = chosen(net_of(model), blocks, "prefix", ("attention",) if decodes else ("attn",))
    lengths = [length] * len(places) if isinstance(length, int) else list(length)
    if len(lengths) != len(places):
        raise UserError(f"prefix has {len(lengths)} lengths for {len(places)} blocks")
    spec = Spec()
    for (i, block), n in zip(places, lengths, strict=True):
        _positive("length", n)
        width = model.shape.width if isinstance(model, Decoder) else PrefixAttention.check(block.attn, i)
        spec |= {f"{i}/k": ((n, width), uniform(low, high)), f"{i}/v": ((n, width), uniform(low, high))}
        if learn_scale:
            spec |= {f"{i}/scale_k": ((), ones), f"{i}/scale_v": ((), ones)}

    def hang(pet: Pet) -> None:
        for i, block in places:
            if decodes:
                hang_prefix(block, pet, i, learn_scale)
            else:
                block.attn = PrefixAttention(block.attn, pet, i, learn_scale, compensate)

    return spec, hang


def mam(
    model: Network,
    runtime: Any,
    *,
    length: int = 10,
    bottleneck: int = 64,
    scale: float = 4.0,
    dropout: float = 0.1,
    low: float = 0.0,
    high: float = 0.01,
    blocks: Blocks = None,
) -> Pet:
    """MAM adapter, mix and match (He et al., ICLR 2022, arXiv 2110.04366): `prefix` in the attention, `adapter` beside the MLP.

    Prefix of `length`, parallel adapter of `bottleneck` with ReLU, no norm of its own and scale 4. The paper's sizes, 30 and
    512, are those of summarisation. Deviations: the keys and values of the prefix are trained themselves, where the paper
    makes them by an MLP while it trains; the adapter sees what `adapter` does, the residual stream before the norm.
    """
    parts = (
        _adapter(model, bottleneck, "mlp", scale, False, "relu", dropout, blocks),
        _prefix(model, length, blocks, low, high, False, False),
    )
    pet = Pet(model, runtime, "mam", {name: value for spec, _ in parts for name, value in spec.items()})
    for _, hang in parts:
        hang(pet)
    return pet


def prompt(model: Network, runtime: Any, *, length: int = 5, low: float = -1.0, high: float = 1.0) -> Pet:
    """Tokens [length, D], U(low, high), between the class token and the patches; they get the class token's position.

    They stay to the end: `model.tokens` shows their outputs at positions 1 .. length. In a decoder they stand before the text,
    whose positions begin behind them (`pet_decoder.py`).
    """
    _positive("length", length)
    if isinstance(model, Decoder):
        pet = Pet(model, runtime, "prompt", {"tokens": ((length, model.shape.width), uniform(low, high))})
        pet.in_front = length
        model.embed_in.register_forward_hook(Prompt(pet, "tokens").put)
        return pet
    first, width = require_tokens(model, "prompt", class_token=True), model.num_features
    pet = Pet(model, runtime, "prompt", {"tokens": ((length, width), uniform(low, high))})
    net: Any = model.net
    position = None if net.pos_embed is None or net.no_embed_class else net.pos_embed
    site = Tokens(pet, "tokens", at=int(net.num_prefix_tokens), position=position)
    first[0].register_forward_pre_hook(site.insert)
    return pet


def vpt(
    model: Network,
    runtime: Any,
    *,
    length: int = 5,
    deep: bool = True,
    low: float = 0.0,
    high: float = 0.0,
    blocks: Sequence[int] | str | None = None,
) -> Pet:
    """Tokens [length, D] after the patches, without a position, 0 at the start. Their outputs are dropped.

    deep     one set a block, dropped behind it; shallow: one set at the first block, dropped behind the last
    blocks   of a deep one; a shallow one goes through all
    """
    _positive("length", length)
    every = require_tokens(model, "vpt")
    assert not isinstance(model, Decoder)
    if not deep and blocks is not None:
        raise UserError("vpt: blocks has no effect with deep=false")
    places = chosen(net_of(model), blocks, "vpt", ("attn",)) if deep else [(0, every[0])]
    pet = Pet(model, runtime, "vpt", {f"{i}/tokens": ((length, model.num_features), uniform(low, high)) for i, _ in places})
    for i, block in places:
        site = Tokens(pet, f"{i}/tokens", at=None)
        block.register_forward_pre_hook(site.insert)
        (block if deep else every[-1]).register_forward_hook(site.drop)
    return pet


def ssf(model: Network, runtime: Any, *, std: float = 0.02) -> Pet:
    """Scale and shift y -> gamma y + beta of each channel, gamma N(1, std^2), beta N(0, std^2).

    After these layers where they exist: patch projection, norms, qkv, attention output, fc1, fc2, final norm. Can be merged
    into the weights.
    """
    net = net_of(model)
    layers: list[tuple[str, nn.Module, Any]] = []
    if isinstance(getattr(getattr(net, "patch_embed", None), "proj", None), nn.Conv2d):
        inner = getattr(net.patch_embed, "norm", None)
        layers.append(("patch", net.patch_embed, inner if getattr(inner, "weight", None) is not None else net.patch_embed.proj))
    for i, block in enumerate(blocks_of(net, "ssf")):
        for name in LAYERS:
            layer = layer_of(block, name)
            if layer is not None and getattr(layer, "weight", None) is not None:
                layers.append((f"{i}/{name}", layer, layer))
    last: Any = net.final_layer_norm if isinstance(net, Decoder) else getattr(net, "norm", None)
    if getattr(last, "weight", None) is not None:
        layers.append(("norm", last, last))
    spec = Spec()
    for name, _, owner in layers:
        if owner.bias is None:
            raise UserError(f"ssf: layer {name} of {model.identity['name']} has no bias to take the shift when merged")
        spec |= {
            f"{name}/scale": ((len(owner.bias),), normal(1.0, std)),
            f"{name}/shift": ((len(owner.bias),), normal(0.0, std)),
        }
    pet = Pet(model, runtime, "ssf", spec)
    for name, layer, owner in layers:
        layer.register_forward_hook(ScaleShift(pet, name).apply)
        pet.merges.append(fold_scale_shift(pet, name, owner))
    return pet


def _filled(value: float) -> Init:
    def fill(x: Tensor, generator: torch.Generator) -> None:
        x.fill_(value)

    return fill


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"pet: {name} must be at least 1, got {value}")
