"""The last block of a ViT for the class token only, where features are that token's output and the others are not used.

Equal in real arithmetic to the whole block, and a fifteenth of a ViT's work less, forward and backward: the block needs keys
and values of all tokens, but one query, one row of the projection and one of the MLP. Part of the arithmetic of a run ("+tail",
`training/arithmetic.py`), because the last bits may differ: smaller products can be rounded otherwise.

Shapes: x [B, N, D]; h heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def fits(net: Any) -> bool:
    """Whether nothing but the class token's output is read from the last block, and no hook of unknown kind hangs in it.

    Hooks that treat every token alike say so by an attribute `per_token`. Dropout of the network's own would draw otherwise.
    """
    from timm.models.vision_transformer import Block, VisionTransformer

    own = type(net)
    if not isinstance(net, VisionTransformer) or "forward_features" in vars(net):
        return False
    if any(getattr(own, name) is not getattr(VisionTransformer, name) for name in ("forward_features", "forward_head", "pool")):
        return False
    if net.global_pool != "token" or net.cls_token is None or net.attn_pool is not None or net.grad_checkpointing:
        return False
    block = net.blocks[-1]
    if type(block) is not Block or any(True for part in (net.blocks, block) for _ in _hooks(part)):
        return False
    if any(isinstance(part, nn.Dropout) and part.p and part.training for part in block.modules()):
        return False
    return all(_per_token(hook) for part in block.modules() for hook in _hooks(part))


def _hooks(module: nn.Module) -> Iterator[Any]:
    """What runs besides a module's own forward."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks):
        yield from hooks.values()


def _per_token(hook: Any) -> bool:
    return bool(getattr(hook, "per_token", False) or getattr(getattr(hook, "__self__", None), "per_token", False))


def forward_features(net: Any, pets: Sequence[Any], x: Tensor) -> Tensor:
    """The `forward_features` of timm for images x [B, C, H, W] without the tokens that nobody reads -> [B, 1, D]."""
    x = net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(x))))
    *blocks, last = net.blocks
    for block in blocks:
        x = block(x)
    for pet in pets:
        pet.tokens = x.shape[1]
    try:
        return net.norm(_last(last, x))
    finally:
        for pet in pets:
            pet.tokens = None


def _last(block: Any, x: Tensor) -> Tensor:
    """A block's output at the class token -> [B, 1, D]."""
    h = block.norm1(x)
    h = _one_query(block.attn, h) if _plain(block.attn) else block.attn(h)[:, :1]
    x = x[:, :1] + block.drop_path1(block.ls1(h))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _plain(attention: Any) -> bool:
    """Whether it is timm's, and what it computes is seen by nobody else."""
    from timm.models import vision_transformer

    known = vars(vision_transformer)["Attention"]  # older versions define it there, newer ones import it from their layers
    qkv = getattr(attention, "qkv", None)
    if type(attention) is not known or type(qkv) is not nn.Linear or getattr(attention, "gate", None) is not None:
        return False
    return not any(True for part in (attention, qkv) for _ in _hooks(part)) and "forward" not in vars(attention) | vars(qkv)


def _one_query(a: Any, x: Tensor) -> Tensor:
    """Attention of the first token to all -> [B, 1, D]."""
    batch, width = len(x), a.qkv.out_features // 3
    bias_q, bias_kv = (None, None) if a.qkv.bias is None else (a.qkv.bias[:width], a.qkv.bias[width:])
    q = F.linear(x[:, :1], a.qkv.weight[:width], bias_q).reshape(batch, 1, a.num_heads, -1).transpose(1, 2)
    kv = F.linear(x, a.qkv.weight[width:], bias_kv).reshape(batch, x.shape[1], 2, a.num_heads, -1)
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = a.q_norm(q), a.k_norm(k)
    if a.fused_attn:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = (q * a.scale @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    out = out.transpose(1, 2).reshape(batch, 1, -1)
    return a.proj_drop(a.proj(getattr(a, "norm", nn.Identity())(out)))
