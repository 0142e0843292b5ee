"""The hooks of `pet_modules.py`: plain objects that survive a deep copy of the network they hang on.

`per_token` marks those that treat every token alike (see `class_token.py`).

Legend: B batch, N tokens, D channels, n inserted tokens, h heads, d channels of a head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.interfaces import UserError
from clbench.models.backbone import Backbone
from clbench.models.decoder import Block as DecoderBlock
from clbench.models.decoder import Decoder
from clbench.models.pet import Network, Pet

Blocks = Sequence[int] | str | None  # a list is exact, a range like "2:5" ends with the network, None means all
PARTS = {"q": 0, "k": 1, "v": 2}
LAYERS = {  # of a block: in a network of images, in a decoder
    "norm1": ("norm1", "input_layernorm"),
    "norm2": ("norm2", "post_attention_layernorm"),
    "norm": ("norm",),
    "qkv": ("attn.qkv", "attention.query_key_value"),
    "proj": ("attn.proj", "attention.dense"),
    "fc1": ("mlp.fc1", "mlp.dense_h_to_4h"),
    "fc2": ("mlp.fc2", "mlp.dense_4h_to_h"),
}


class Rows(NamedTuple):
    """Which outputs of a linear layer: all (`part` None), or those of q, k or v (0, 1, 2), which lie as [groups, 3, d].

    groups  1 in networks of images (q, then k, then v); as many as heads in a decoder (q, k, v of one head, then the next's)
    """

    part: int | None = None
    groups: int = 1

    def of(self, weight: Tensor) -> Tensor:
        """The rows of a weight [O, I], or of a bias [O]. They share its memory where there is one group."""
        return weight if self.part is None else self._cut(weight).flatten(0, 1)

    def of_output(self, out: Tensor) -> Tensor:
        """The same of outputs [..., O]."""
        return out if self.part is None else out.unflatten(-1, (self.groups, 3, -1))[..., self.part, :].flatten(-2)

    def added(self, out: Tensor, delta: Tensor) -> Tensor:
        """Outputs [..., O] with `delta` [..., rows] added."""
        if self.part is None:
            return out + delta
        changed = out.clone()
        rows = changed.unflatten(-1, (self.groups, 3, -1)).select(-2, self.part)
        rows.add_(delta.unflatten(-1, (self.groups, -1)))
        return changed

    def set_(self, weight: Tensor, value: Tensor) -> None:
        """Overwrite the rows of a weight [O, I] in place."""
        rows = weight if self.part is None else self._cut(weight)
        rows.copy_(value.reshape(rows.shape))

    def _cut(self, weight: Tensor) -> Tensor:
        assert self.part is not None
        return weight.unflatten(0, (self.groups, 3, -1))[:, self.part]


def net_of(model: Network) -> Any:
    """The module whose blocks a kind hangs on; `UserError` for a model that is neither."""
    if not isinstance(model, Backbone | Decoder):
        raise UserError(f"pet hangs on networks of images and on decoders, a {type(model).__name__} is neither")
    return model.net if isinstance(model, Backbone) else model


def blocks_of(net: Any, kind: str) -> list[nn.Module]:
    """The blocks of a ViT, a Swin, a ConvNeXt or a decoder in the order of the pass; `UserError` for anything else."""
    if isinstance(net, Decoder):
        return list(net.layers)
    if hasattr(net, "blocks"):
        return list(net.blocks)
    for name in ("layers", "stages"):
        stages = getattr(net, name, None)
        if stages is not None and all(hasattr(stage, "blocks") for stage in stages):
            return [block for stage in stages for block in stage.blocks]
    raise UserError(f"pet={kind} needs a network of blocks (ViT, Swin, ConvNeXt), {type(net).__name__} is none")


def chosen(net: Any, blocks: Blocks, kind: str, needs: Sequence[str]) -> list[tuple[int, Any]]:
    """The numbered blocks to hang on; each must have the parts that the kind needs."""
    every = blocks_of(net, kind)
    numbers = _numbers(blocks, len(every), kind)
    if not numbers or len(set(numbers)) != len(numbers) or min(numbers) < 0 or max(numbers) >= len(every):
        raise UserError(
            f"pet={kind}: blocks {numbers} are not distinct numbers of the {len(every)} blocks (0 to {len(every) - 1})"
        )
    for i in numbers:
        missing = [part for part in needs if not hasattr(every[i], part)]
        if missing or type(every[i]).__name__ not in ("Block", "SwinTransformerBlock", "ConvNeXtBlock"):
            raise UserError(f"pet={kind} does not fit {type(net).__name__}: its {type(every[i]).__name__} is built otherwise")
    return [(i, every[i]) for i in numbers]


def _numbers(blocks: Blocks, depth: int, kind: str) -> list[int]:
    if blocks is None:
        return list(range(depth))
    if isinstance(blocks, str):
        if not (match := re.fullmatch(r"(\d*):(\d*)", blocks)):
            raise UserError(f"pet={kind}: blocks={blocks!r} is neither a list of numbers nor a range like 0:5")
        return list(range(depth))[slice(*(int(end) if end else None for end in match.groups()))]
    return [int(i) for i in blocks]


def require_tokens(model: Network, kind: str, class_token: bool = False) -> list[nn.Module]:
    """The blocks of a plain ViT, whose sequence of tokens can be made longer."""
    net = net_of(model)
    blocks = blocks_of(net, kind)
    if type(blocks[0]).__name__ != "Block" or not hasattr(net, "num_prefix_tokens"):
        raise UserError(f"pet={kind} adds tokens, which only plain ViTs can take; {type(net).__name__} cannot")
    if class_token and net.cls_token is None:
        raise UserError(f"pet={kind} stands behind the class token, and {model.identity['name']} has none")
    return blocks


def layer_of(block: Any, name: str) -> Any:
    """The layer of a block that has this name in LAYERS; None where there is none."""
    for path in LAYERS[name]:
        found: Any = block
        for step in path.split("."):
            found = getattr(found, step, None)  # a `ModuleDict` gives its entries as attributes too
        if found is not None:
            return found
    return None


def linear_of(block: Any, target: str, kind: str = "lora") -> tuple[nn.Linear, Rows]:
    """The layer of a LoRA target, and which of its outputs (q, k, v; else all)."""
    part = PARTS.get(target)
    layer = layer_of(block, target if part is None else "qkv")
    if not isinstance(layer, nn.Linear):
        raise UserError(f"pet={kind}: {type(block).__name__} has no linear layer {target!r}")
    return layer, Rows(part, block.shape.heads if isinstance(block, DecoderBlock) else 1)


def rows_of(block: nn.Module, target: str) -> Tensor:
    """The weights [O, D] that a term is added to: in a ViT they share the layer's memory."""
    layer, rows = linear_of(block, target)
    return rows.of(layer.weight.detach())


def affine(x: Tensor, weight: tuple[Tensor, bool], bias: tuple[Tensor, bool] | None = None) -> Tensor:
    """Product of x [B, ..., I] and weight [O, I] (or [B, O, I], a matrix a sample), plus bias -> [B, ..., O]."""
    (w, mixed), b = weight, None if bias is None else bias[0]
    if not mixed:
        return F.linear(x, w, b)
    flat = x.reshape(len(x), -1, x.shape[-1])
    out = torch.bmm(flat, w.transpose(1, 2).to(flat.dtype))
    if b is not None:
        out = out + b[:, None].to(out.dtype)
    return out.reshape(*x.shape[:-1], w.shape[1])


def broadcast(value: tuple[Tensor, bool], x: Tensor) -> Tensor:
    """A scalar or channel value, made to fit x [B, ..., D] where it has a batch axis."""
    v, mixed = value
    if not mixed:
        return v
    return v.reshape(len(v), *[1] * (x.dim() - (1 if v.dim() == 1 else 2)), *v.shape[1:])


@dataclass(eq=False)
class Adapter:
    """s (W_up drop(act(W_down x + b)) + b')."""

    pet: Pet
    block: int
    scale: float | None
    activation: Callable[[Tensor], Tensor]
    dropout: float
    seen: Tensor | None = None
    per_token: ClassVar[bool] = True

    def value(self, x: Tensor) -> Tensor:
        """Of x [B, ..., D]."""

        def get(name: str) -> tuple[Tensor, bool]:
            return self.pet.get(f"{self.block}/{name}", len(x))

        hidden = self.activation(affine(x, get("down"), get("down_bias")))
        out = affine(self.pet.dropout(hidden, self.dropout, str(self.block)), get("up"), get("up_bias"))
        return out * (broadcast(get("scale"), out) if self.scale is None else self.scale)

    def add(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Hook behind a layer: what the adapter makes of the layer's input joins its output."""
        return out + self.value(args[0]) if self.pet.active else out

    def remember(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Hook before a layer: what the adapter is to see."""
        self.seen = args[0] if self.pet.active else None

    def add_remembered(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Hook at the end of the branch."""
        seen, self.seen = self.seen, None
        return out if seen is None else out + self.value(seen).reshape(out.shape)


def beside_mlp(block: Any, site: Adapter) -> None:
    """Hang an adapter beside the MLP: its input is the residual stream before the second norm."""
    layer_of(block, "norm2").register_forward_pre_hook(site.remember)
    last = block.mlp["dense_4h_to_h"] if isinstance(block, DecoderBlock) else block.drop_path2
    last.register_forward_hook(site.add_remembered)


def beside_attention(block: Any, site: Adapter) -> None:
    """Hang an adapter beside the attention: its input is the attention's."""
    if isinstance(block, DecoderBlock):
        layer_of(block, "qkv").register_forward_pre_hook(site.remember)
        layer_of(block, "proj").register_forward_hook(site.add_remembered)
    else:
        block.attn.register_forward_hook(site.add)


@dataclass(eq=False)
class LoraTerm:
    """Adds s B A x to a linear layer's output, or to a third of it."""

    pet: Pet
    name: str
    rows: Rows
    scale: float | None
    per_token: ClassVar[bool] = True

    def add(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if not self.pet.active:
            return out
        x = args[0]
        delta = affine(affine(x, self.pet.get(f"{self.name}/a", len(x))), self.pet.get(f"{self.name}/b", len(x)))
        scale = self.scale
        delta = delta * (broadcast(self.pet.get(f"{self.name}/scale", len(x)), delta) if scale is None else scale)
        return self.rows.added(out, delta)


def fold_low_rank(pet: Pet, name: str, layer: nn.Linear, rows: Rows, scale: float | None) -> Callable[[float], None]:
    """A function that adds sign * s B A to the layer's weight."""

    def fold(sign: float) -> None:
        s = pet.values[f"{name}/scale"] if scale is None else scale
        delta = sign * s * (pet.values[f"{name}/b"] @ pet.values[f"{name}/a"])
        rows.set_(layer.weight, rows.of(layer.weight) + delta)

    return fold


@dataclass(eq=False)
class ScaleShift:
    """gamma y + beta on the last axis."""

    pet: Pet
    name: str
    per_token: ClassVar[bool] = True

    def apply(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if not self.pet.active:
            return out
        scale, shift = (broadcast(self.pet.get(f"{self.name}/{part}", len(out)), out) for part in ("scale", "shift"))
        return out * scale + shift


def fold_scale_shift(pet: Pet, name: str, layer: Any) -> Callable[[float], None]:
    """A function that scales the layer's rows and moves its bias; undone exactly where no scale is 0."""

    def fold(sign: float) -> None:
        scale, shift = pet.values[f"{name}/scale"], pet.values[f"{name}/shift"]
        rows = scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
        if sign > 0:
            layer.weight.mul_(rows)
            layer.bias.mul_(scale).add_(shift)
        else:
            layer.weight.div_(rows)
            layer.bias.sub_(shift).div_(scale)

    return fold


@dataclass(eq=False)
class Tokens:
    """Inserts tokens into x [B, N, D] at position `at` (None: the end) and takes them out again."""

    pet: Pet
    name: str
    at: int | None
    position: Tensor | None = None
    count: int = 0

    def insert(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self.count = 0
        if not self.pet.active:
            return None
        x = args[0]
        tokens, mixed = self.pet.get(self.name, len(x))
        if not mixed:
            tokens = tokens.expand(len(x), -1, -1)
        if self.position is not None:
            tokens = tokens + self.position[:, :1]
        self.count = tokens.shape[1]
        at = x.shape[1] if self.at is None else self.at
        return (torch.cat([x[:, :at], tokens.to(x.dtype), x[:, at:]], dim=1), *args[1:])

    def drop(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Hook behind a block: without what `insert` put at the end."""
        return out[:, : out.shape[1] - self.count] if self.count else out


class PrefixAttention(nn.Module):
    """timm's attention with keys and values before its own. Shares the wrapped module's layers under their old names."""

    plain: Any
    pet: Pet

    def __init__(self, plain: Any, pet: Pet, block: int, learn_scale: bool, compensate: bool):
        super().__init__()
        for name, child in plain.named_children():
            self.add_module(name, child)
        self.__dict__["plain"] = plain  # not a child: the names in the state dictionary stay
        self.__dict__["pet"] = pet
        self.block, self.learn_scale, self.compensate = block, learn_scale, compensate

    @staticmethod
    def check(attention: Any, block: int) -> int:
        """The width of keys and values; `UserError` where the attention is not timm's plain one."""
        if isinstance(attention, PrefixAttention):
            raise UserError(f"pet=prefix: block {block} has a prefix already")
        if (
            type(attention).__name__ != "Attention"
            or not hasattr(attention, "qkv")
            or getattr(attention, "gate", None) is not None
        ):
            raise UserError(f"pet=prefix needs timm's plain attention, block {block} has {type(attention).__name__}")
        return attention.qkv.out_features // 3

    def _heads(self, name: str, batch: int) -> Tensor:
        value, mixed = self.pet.get(f"{self.block}/{name}", batch)
        if self.learn_scale:
            value = value * broadcast(self.pet.get(f"{self.block}/scale_{name}", batch), value)
        value = value if mixed else value.expand(batch, -1, -1)
        return value.reshape(batch, value.shape[1], self.plain.num_heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attention of x [B, N, D] -> [B, N, D]."""
        a = self.plain
        if not self.pet.active or f"{self.block}/k" not in self.pet.in_use():
            return a(x, attn_mask=attn_mask, is_causal=is_causal)
        assert attn_mask is None and not is_causal
        b, n, _ = x.shape
        q, k, v = a.qkv(x).reshape(b, n, 3, a.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = a.q_norm(q), a.k_norm(k)
        prefix_k, prefix_v = self._heads("k", b).to(k.dtype), self._heads("v", b).to(v.dtype)
        k, v = torch.cat([prefix_k, k], dim=2), torch.cat([prefix_v, v], dim=2)
        if self.compensate:
            out = compensated(q * a.scale, k, prefix_k.shape[2]) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, scale=a.scale)
        out = out.transpose(1, 2).reshape(b, n, -1)
        return a.proj_drop(a.proj(getattr(a, "norm", nn.Identity())(out)))


def compensated(q: Tensor, k: Tensor, n: int) -> Tensor:
    """Attention weights [B, h, N, n + N] of scaled queries; the n columns of the prefix are divided by their own sum."""
    weights = (q @ k.transpose(-2, -1)).softmax(dim=-1)
    own = weights[..., :n]
    return torch.cat([own / own.sum(-1, keepdim=True).clamp_min(1e-12), weights[..., n:]], dim=-1)
