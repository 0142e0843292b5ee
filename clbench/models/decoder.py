"""A decoder of the GPT-NeoX family (Black et al. 2022, arXiv 2204.06745; Pythia: Biderman et al. 2023, arXiv 2304.01373).

Blocks with rotary positions on a part of each head, attention and MLP side by side or one after the other, untied embeddings.
On the same weights its logits equal those of `transformers`' GPTNeoXForCausalLM up to the order of floating-point sums.

`mup` (Yang et al. 2022, arXiv 2203.03466, for Adam) makes a rate hold from width to width: with m = width / mup, matrices
whose sides both grow (those of the blocks) are drawn m^-1/2 times smaller than at the base, as here they always are, and
trained at rate / m with m times the weight decay; both embeddings are drawn as at the base; what goes into the last one is
divided by m. Widths of one family have the same depth and the same size of a head, so that attention is scaled alike. m = 1
changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from clbench.interfaces import UserError
from clbench.models import checkpoint
from clbench.models.precision import MixedPrecision
from clbench.models.weights import check_sha256, find, state_sha256
from clbench.streams import rng

Attention = Literal["auto", "explicit", "sdpa"]
Prefix = Callable[[int], tuple[Tensor, Tensor] | None]  # batch -> keys and values [B, H, n, D / H] that every token sees
_TANH = partial(functional.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Any] = {
    "gelu": functional.gelu,
    "gelu_new": _TANH,
    "gelu_fast": _TANH,
    "gelu_pytorch_tanh": _TANH,
    "relu": functional.relu,
    "silu": functional.silu,
}


@dataclass(frozen=True)
class Shape:
    """What a decoder is built from; see `build_decoder`."""

    vocab: int
    width: int
    depth: int
    heads: int
    context: int
    hidden: int
    rotary: float = 0.25
    rotary_base: float = 10_000.0
    parallel: bool = True
    tied: bool = False
    eps: float = 1e-5
    activation: str = "gelu"

    def __post_init__(self) -> None:
        for name in ("vocab", "width", "depth", "heads", "context", "hidden"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"model.{name} must be a whole number from 1, got {value!r}")
        if self.width % self.heads:
            raise UserError(f"model.width={self.width} is not a multiple of model.heads={self.heads}")
        if not 0 <= self.rotary <= 1:
            raise UserError(f"model.rotary must be a share of each head from 0 to 1, got {self.rotary}")
        if self.turned % 2:
            text = f"model.rotary={self.rotary} turns {self.turned} of {self.width // self.heads} numbers of a head"
            raise UserError(f"{text}: it must be an even number")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"model.activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")

    @property
    def turned(self) -> int:
        """Numbers of each head that carry the position."""
        return int(self.width // self.heads * self.rotary)


class Block(nn.Module):
    """Attention and MLP around a residual stream x [B, L, D].

    prefix  keys and values before the text's own, for every position alike: they are not turned; None: none
    """

    def __init__(self, shape: Shape):
        super().__init__()
        width = shape.width
        self.shape = shape
        self.prefix: Prefix | None = None
        self.input_layernorm = nn.LayerNorm(width, eps=shape.eps)
        self.post_attention_layernorm = nn.LayerNorm(width, eps=shape.eps)
        self.attention = nn.ModuleDict({"query_key_value": nn.Linear(width, 3 * width), "dense": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict(
            {"dense_h_to_4h": nn.Linear(width, shape.hidden), "dense_4h_to_h": nn.Linear(shape.hidden, width)}
        )

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """X [B, L, D] -> [B, L, D]; `mask` [L, L] asks for explicit attention, None for torch's kernel."""
        attended = self._attend(self.input_layernorm(x), angles, mask)
        if self.shape.parallel:
            return x + attended + self._mlp(self.post_attention_layernorm(x))
        x = x + attended
        return x + self._mlp(self.post_attention_layernorm(x))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.mlp["dense_4h_to_h"](ACTIVATIONS[self.shape.activation](self.mlp["dense_h_to_4h"](x)))

    def _attend(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        heads = self.shape.heads
        qkv = self.attention["query_key_value"](x).view(batch, length, heads, 3, width // heads)
        qkv = qkv.permute(3, 0, 2, 1, 4)  # [3, B, H, L, D / H]
        q, k = _turn(qkv[:2], angles).unbind(0)
        v, scale, seen = qkv[2], (width // heads) ** -0.5, None
        if self.prefix is not None and (before := self.prefix(batch)) is not None:
            k, v = (torch.cat([more.to(own.dtype), own], 2) for more, own in zip(before, (k, v), strict=True))
            extra = k.shape[2] - length
            mask = None if mask is None else functional.pad(mask, (extra, 0))
            seen = torch.ones(length, k.shape[2], dtype=torch.bool, device=x.device).tril(extra) if mask is None else None
        if mask is None:
            out = functional.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, scale=scale)
        else:
            q, k, v = (part.flatten(0, 1) for part in (q, k, v))
            scores = torch.baddbmm(mask.to(q.dtype), q, k.transpose(1, 2), alpha=scale)
            out = torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v
            out = out.view(batch, heads, length, -1)
        return self.attention["dense"](out.transpose(1, 2).reshape(batch, length, width))


def _turn(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the front of every head [..., L, D / H] by its position; pairs lie half a front apart."""
    cos, sin = (part.to(x.dtype) for part in angles)
    turned = cos.shape[-1]
    if not turned:
        return x
    front, rest = x[..., :turned], x[..., turned:]
    left, right = front.chunk(2, -1)
    return torch.cat([front * cos + torch.cat([-right, left], -1) * sin, rest], -1)


class Decoder(MixedPrecision, nn.Module):
    """Tokens [B, L] int64 -> logits [B, L, V].

    With `precision` bf16 the blocks compute in bf16, and the softmax in float32. So does the product with the output embedding
    where no gradient is asked for, which is what is evaluated. In training that product is in bf16: with a real vocabulary it
    is a third of a small decoder's work, and float32 would make the whole step several times slower.

    identity    name, source, state_sha256, file_sha256, vocab, context, width, depth and the other numbers of its shape
    pretrained  whether the weights came from a file
    """

    def __init__(self, shape: Shape, attention: Attention = "auto", mup: int | None = None):
        super().__init__()
        if mup is not None and (mup < 1 or shape.tied):
            raise UserError(f"model.mup is a width from 1, and needs model.tied=false; got {mup}")
        self.times = 1.0 if mup is None else shape.width / mup  # as wide as the base
        if attention not in ("auto", "explicit", "sdpa"):
            raise UserError(f"model.attention must be auto, explicit or sdpa, got {attention!r}")
        self.shape, self.kernel = shape, attention
        self.embed_in = nn.Embedding(shape.vocab, shape.width)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.final_layer_norm = nn.LayerNorm(shape.width, eps=shape.eps)
        self.embed_out = nn.Linear(shape.width, shape.vocab, bias=False)
        if shape.tied:
            self.embed_out.weight = self.embed_in.weight
        rates = 1.0 / shape.rotary_base ** (torch.arange(0, shape.turned, 2).float() / max(1, shape.turned))
        angles = torch.outer(torch.arange(shape.context).float(), torch.cat([rates, rates]))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        later = torch.full((shape.context, shape.context), float("-inf")).triu(1) if attention != "sdpa" else torch.empty(0, 0)
        self.register_buffer("later", later, persistent=False)
        self.identity: dict[str, Any] = {}
        self.pretrained = False
        self.pets: list[Any] = []

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, L] int64, L up to the context -> logits [B, L, V], bf16 while a model in bf16 trains, else float32.

        A hook on `embed_in` may put vectors before the text's own. They take the first positions, and give no logits.
        """
        with self.lowered(tokens.device.type):
            x = self._states(tokens)
            if self.times != 1:
                x = x / self.times
            if self.precision == "fp32" or torch.is_grad_enabled():
                return self.embed_out(x)
        return self.embed_out(x.float())

    def states(self, tokens: Tensor) -> Tensor:
        """Tokens [B, L] int64 -> what the last norm makes of each position [B, L, D] float32."""
        with self.lowered(tokens.device.type):
            return self._states(tokens).float()

    def _states(self, tokens: Tensor) -> Tensor:
        x = self.embed_in(tokens)
        length = x.shape[1]
        if length > self.shape.context:
            raise UserError(f"a text of {length} tokens is longer than the context of {self.shape.context}")
        explicit = self.kernel == "explicit" or (self.kernel == "auto" and tokens.device.type == "cpu")
        angles = (self.cos[:length], self.sin[:length])  # type: ignore[index]
        mask = self.later[:length, :length] if explicit else None  # type: ignore[index]
        for layer in self.layers:
            x = layer(x, angles, mask)
        return self.final_layer_norm(x[:, length - tokens.shape[1] :])

    def freeze(self) -> None:
        """No weight is trained from now on."""
        self.requires_grad_(False)

    def forget(self) -> None:
        """Nothing of a pass is remembered."""

    def rate_shares(self) -> dict[str, float]:
        """Parameters whose rate is a share of the others', and their weight decay as many times higher: of `mup`."""
        if self.times == 1:
            return {}
        return {name: 1 / self.times for name, p in self.named_parameters() if name.startswith("layers.") and p.ndim >= 2}

    def loss(self, tokens: Tensor) -> Tensor:
        """Tokens [B, L + 1] -> nats of each token after the first [B, L] float32; the softmax is taken in float32."""
        logits = self(tokens[:, :-1])
        targets = tokens[:, 1:]
        nats = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        return nats.view(targets.shape)

    def flops_per_token(self, context: int) -> float:
        """Operations of a training step (forward and backward) per token: 6 N + 12 L T D.

        N counts the weights of matrix products, the output layer included and embedding look-ups not; T is `context`. Causal
        attention is counted in full, as in most published figures.
        """
        s = self.shape
        weights = s.depth * (4 * s.width**2 + 2 * s.width * s.hidden) + s.vocab * s.width
        return 6.0 * weights + 12.0 * s.depth * context * s.width


@torch.no_grad()
def draw_weights(model: Decoder, seed: int) -> None:
    """Random weights as GPT-NeoX starts Pythia: biases 0, gains 1, matrices with mean 0 and these standard deviations.

    sqrt(2 / 5D)         everywhere ("small init", Nguyen & Salazar 2019), but
    2 / (depth sqrt(D))  in the last layer of attention and of the MLP ("wang init", as in GPT-J)
    sqrt(2 / 5 mup)      in the embeddings of a model with `mup`

    Each number is a sum of eight 16-bit draws, scaled: normal for all practical purposes, never beyond 4.9 standard
    deviations, and the same on every machine.
    """
    small, last = (2 / (5 * model.shape.width)) ** 0.5, 2 / model.shape.depth / model.shape.width**0.5
    for name, value in model.named_parameters():
        if value.ndim < 2:
            value.fill_(float(name.endswith("norm.weight")))
            continue
        base = small * model.times**0.5 if name.startswith("embed_") else small
        deviation = last if name.endswith(("attention.dense.weight", "mlp.dense_4h_to_h.weight")) else base
        flat, key = value.view(-1), rng.key("decoder", seed, name)
        for start in range(0, len(flat), 1 << 20):
            flat[start : start + (1 << 20)] = _normal(key, start, min(len(flat) - start, 1 << 20)) * deviation


def _normal(key: int, start: int, count: int) -> Tensor:
    draws = rng.bits(key, torch.arange(2 * start, 2 * (start + count)).numpy())
    parts = torch.from_numpy(draws.view("<u2").astype("int32").reshape(count, 8)).sum(1)
    return (parts - 8 * 32767.5).double() / (8 * (65536**2 - 1) / 12) ** 0.5


def _fill(model: Decoder, weights: str, data_root: str | None, shape: Shape) -> dict[str, Any]:
    """Fill a decoder with a folder of a checkpoint, or one file of tensors -> source and hash of the files."""
    model.pretrained = True
    if weights.endswith(".safetensors"):
        path = find(weights, "decoder", data_root)
        checkpoint.fill_from(model, path, shape.tied)
        source = weights if weights.startswith("package:") else path.name
        return {"file_sha256": check_sha256(path, None), "source": source}
    folder = checkpoint.find(weights, data_root)
    checkpoint.check_config(folder, asdict(shape))
    return {"file_sha256": checkpoint.fill(model, folder, shape.tied), "source": folder.name}


def build_decoder(
    *,
    name: str,
    vocab: int | None,
    width: int,
    depth: int,
    heads: int,
    context: int | None,
    hidden: int | None = None,
    rotary: float = 0.25,
    rotary_base: float = 10_000.0,
    parallel: bool = True,
    tied: bool = False,
    eps: float = 1e-5,
    activation: str = "gelu",
    attention: Attention = "auto",
    mup: int | None = None,
    weights: str = "none",
    data_root: str | None = None,
    seed: int = 0,
) -> Decoder:
    """Build a decoder. `vocab` and `context` (longest text in tokens) are the stream's where null.

    hidden     width of the MLP; null: 4 times `width`
    rotary     share of each head that carries the position
    parallel   attention and MLP side by side; false: one after the other
    attention  "explicit": matrix products with a mask; "sdpa": torch's kernel; "auto": explicit on a CPU, else torch's
    mup        the width at which rates are chosen (maximal update parametrisation); null: the standard one
    weights    "none": random, drawn from `seed`; else a folder with config.json and safetensors, as given or under `data_root`
               or CLBENCH_DATA, or one file of tensors FILE.safetensors ("package:FILE": ships with clbench). Its shape must be
               the one given here; every tensor must be there and none besides.
    """
    for given, what in ((vocab, "vocab"), (context, "context")):
        if given is None:
            raise UserError(f"model.{what} is null, and no stream of tokens says what it is")
    assert vocab is not None and context is not None
    wide = 4 * width if hidden is None else hidden
    shape = Shape(vocab, width, depth, heads, context, wide, rotary, rotary_base, parallel, tied, eps, activation)
    identity: dict[str, Any] = {"name": name, "architecture": "gpt_neox", "source": "none", "file_sha256": None}
    if mup is not None and weights != "none":
        raise UserError("model.mup is for random weights: those of a file belong to the standard parametrisation")
    model = Decoder(shape, attention, mup)
    if weights == "none":
        draw_weights(model, seed)
    else:
        identity |= _fill(model, weights, data_root, shape)
    identity |= {} if mup is None else {"mup": mup}
    identity |= {"state_sha256": state_sha256(model.state_dict()), **asdict(shape)}
    model.identity = identity | {"parameters": sum(p.numel() for p in model.parameters())}
    return model
