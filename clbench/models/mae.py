"""Masked autoencoder (He et al. 2022, arXiv 2111.06377): an encoder of visible patches, a decoder of the masked ones.

Rows of a batch [B, S * S * 3 + 8] uint8 hold the pixels of an image (height, width, colour) and, in the last 8 bytes, the key
that its mask is drawn from (little endian). So the mask of an image is a pure function of its row: it depends on no other row,
no batch size and no machine. Names of parameters are those of the published checkpoints.

Legend: B batch, S side of the image, P patches, K patches that are seen, M = P - K masked ones, D width.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from clbench.interfaces import UserError
from clbench.models import weights as files
from clbench.models.precision import MixedPrecision
from clbench.streams import rng

KEY_BYTES = 8
_GOLDEN, _FIRST, _SECOND = (
    n - (1 << 64) if n >> 63 else n for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


@dataclass(frozen=True)
class Shape:
    """What an autoencoder is built from; see `build_mae`."""

    image: int
    patch: int
    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    mask: float = 0.75
    target: str = "normalised"
    pool: str = "mean"

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in asdict(self).items() if name not in ("mask", "target", "pool")}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"model.{name} must be a whole number from 1, got {value!r}")
        for width, heads in (("width", "heads"), ("decoder_width", "decoder_heads")):
            if numbers[width] % 4 or numbers[width] % numbers[heads]:
                raise UserError(f"model.{width}={numbers[width]} is not a multiple of 4 and of model.{heads}={numbers[heads]}")
        if self.image % self.patch:
            raise UserError(f"model.image={self.image} is not a multiple of model.patch={self.patch}")
        if isinstance(self.mask, bool) or not isinstance(self.mask, int | float) or not 0 < self.mask < 1:
            raise UserError(f"model.mask must be a share above 0 and below 1, got {self.mask!r}")
        if not 0 < self.seen < self.patches:
            raise UserError(f"model.mask={self.mask} leaves {self.seen} of {self.patches} patches: some must be seen, some not")
        for name, known in (("target", ("normalised", "pixels")), ("pool", ("mean", "class"))):
            if getattr(self, name) not in known:
                raise UserError(f"model.{name} must be {' or '.join(known)}, got {getattr(self, name)!r}")

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2

    @property
    def seen(self) -> int:
        """K: patches that the encoder sees, rounded down as in the paper's code."""
        return int(self.patches * (1 - self.mask) + 1e-9)


def _shifted(z: Tensor, places: int) -> Tensor:
    """A shift to the right that fills with zeros, as for unsigned numbers."""
    return (z >> places) & ((1 << (64 - places)) - 1)


def draws(keys: Tensor, number: int) -> Tensor:
    """`rng.bits(key, range(number))` for each key on the device: keys [B] int64 -> [B, number] int64 (the same bits)."""
    z = torch.arange(number, device=keys.device) * _GOLDEN + keys[:, None]
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    z = z ^ _shifted(z, 31)
    z = (z ^ _shifted(z, 30)) * _FIRST
    return z ^ _shifted(z, 27)


def split_rows(rows: Tensor, image: int) -> tuple[Tensor, Tensor]:
    """Rows [B, S * S * 3 + 8] uint8 -> images [B, 3, S, S] float32 in -1..1, keys [B] int64."""
    if rows.dtype != torch.uint8 or rows.ndim != 2 or rows.shape[1] != image * image * 3 + KEY_BYTES:
        wanted = f"[B, {image * image * 3 + KEY_BYTES}] uint8"
        raise UserError(
            f"a masked autoencoder for images of {image} pixels reads {wanted}, got {list(rows.shape)} {rows.dtype}"
        )
    pixels = rows[:, :-KEY_BYTES].view(-1, image, image, 3).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1, rows[:, -KEY_BYTES:].contiguous().view(torch.int64)[:, 0]


def positions(width: int, side: int) -> Tensor:
    """Fixed sine and cosine positions of a grid, the class token's (zeros) first -> [1, 1 + side * side, width] float32.

    The first half of the numbers is for the column, the second for the row, each half sines, half cosines.
    """
    rate = 1 / 10_000 ** (np.arange(width // 4) / (width / 4))
    turned = np.arange(side)[:, None] * rate
    one = np.concatenate([np.sin(turned), np.cos(turned)], 1)
    down, across = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    grid = np.concatenate([one[across.ravel()], one[down.ravel()]], 1)
    return torch.from_numpy(np.concatenate([np.zeros((1, width)), grid])[None]).float()


def pick(x: Tensor, places: Tensor) -> Tensor:
    """X [B, P, D] at places [B, K] -> [B, K, D]."""
    return x.gather(1, places[:, :, None].expand(-1, -1, x.shape[2]))


class MaskedAutoencoder(MixedPrecision, nn.Module):
    """Rows [B, S * S * 3 + 8] uint8 -> loss of each image [B, 1], or features [B, D].

    With `precision` bf16 encoder and decoder compute in bf16; the last layer, which draws the pixels, and the error in float32.

    identity    name, source, state_sha256, file_sha256 and the numbers of its shape
    pretrained  whether the weights came from a file
    """

    num_prefix_tokens = 1

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = s = shape
        side = s.image // s.patch
        self.patch_embed = PatchEmbed(s.image, s.patch, 3, s.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, s.width))
        self.blocks = nn.ModuleList(Block(s.width, s.heads, qkv_bias=True) for _ in range(s.depth))
        self.norm = nn.LayerNorm(s.width, eps=1e-6)
        self.decoder_embed = nn.Linear(s.width, s.decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, s.decoder_width))
        self.decoder_blocks = nn.ModuleList(
            Block(s.decoder_width, s.decoder_heads, qkv_bias=True) for _ in range(s.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(s.decoder_width, eps=1e-6)
        self.decoder_pred = nn.Linear(s.decoder_width, s.patch**2 * 3)
        self.register_buffer("pos_embed", positions(s.width, side))
        self.register_buffer("decoder_pos_embed", positions(s.decoder_width, side))
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
        self.identity: dict[str, Any] = {}
        self.pretrained = False

    def masks(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B] -> places of the patches that are seen [B, K] and of those that are not [B, M], both in rising order."""
        order = draws(keys, self.shape.patches).argsort(dim=1, stable=True)
        seen, hidden = order.split([self.shape.seen, self.shape.patches - self.shape.seen], 1)
        return seen.sort(1).values, hidden.sort(1).values

    def encode(self, images: Tensor, seen: Tensor | None = None) -> Tensor:
        """Images [B, 3, S, S], places [B, K] (None: all) -> tokens [B, 1 + K, D], the class token first."""
        places: Tensor = self.pos_embed  # type: ignore[assignment]
        with self.lowered(images.device.type):
            x = self.patch_embed(images) + places[:, 1:]
            x = x if seen is None else pick(x, seen)
            x = torch.cat([(self.cls_token + places[:, :1]).expand(len(x), -1, -1).to(x.dtype), x], 1)
            for block in self.blocks:
                x = block(x)
            return self.norm(x).float()

    def decode(self, tokens: Tensor, seen: Tensor, hidden: Tensor) -> Tensor:
        """Tokens [B, 1 + K, D] -> what the hidden patches look like [B, M, patch * patch * 3]."""
        places: Tensor = self.decoder_pos_embed  # type: ignore[assignment]
        where = torch.cat([torch.zeros_like(seen[:, :1]), seen + 1, hidden + 1], 1)
        with self.lowered(tokens.device.type):
            x = self.decoder_embed(tokens)
            blank = self.mask_token.to(x.dtype).expand(len(x), hidden.shape[1], -1)
            x = torch.cat([x, blank], 1) + pick(places.expand(len(x), -1, -1), where)
            for block in self.decoder_blocks:
                x = block(x)
            x = self.decoder_norm(x[:, -hidden.shape[1] :])
        return self.decoder_pred(x.float())

    def patches(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] -> pixels of each patch [B, P, patch * patch * 3], row by row, colours innermost."""
        size, side = self.shape.patch, self.shape.image // self.shape.patch
        x = images.reshape(-1, 3, side, size, side, size).permute(0, 2, 4, 3, 5, 1)
        return x.reshape(len(images), side * side, size * size * 3)

    def encoded(self, rows: Tensor, keys: Tensor | None = None) -> Tensor:
        """What the encoder makes of the patches that are seen: rows -> tokens [B, 1 + K, D], the class token first.

        keys  [B] of other masks than the rows' own
        """
        images, own = split_rows(rows, self.shape.image)
        return self.encode(images, self.masks(own if keys is None else keys)[0])

    def forward(self, rows: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Mean squared error of each masked patch: rows -> [B, M] float32. What is seen has no part in it.

        tokens: those of `encoded`, where they are at hand.
        target=normalised: pixels of a patch minus their mean, over their standard deviation (with n - 1), as in the paper.
        """
        images, keys = split_rows(rows, self.shape.image)
        seen, hidden = self.masks(keys)
        drawn = self.decode(self.encode(images, seen) if tokens is None else tokens, seen, hidden).float()
        wanted = pick(self.patches(images), hidden)
        if self.shape.target == "normalised":
            spread = wanted.var(-1, keepdim=True) + 1e-6
            wanted = (wanted - wanted.mean(-1, keepdim=True)) / spread.sqrt()
        return (drawn - wanted).square().mean(-1)

    def loss(self, rows: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Mean over the masked patches of each image: rows (and their `encoded` tokens) -> [B, 1] float32."""
        return self(rows, tokens).mean(1, keepdim=True)

    def features(self, rows: Tensor) -> Tensor:
        """The encoder's view of whole images, nothing masked: rows -> [B, D] float32."""
        tokens = self.encode(split_rows(rows, self.shape.image)[0])
        return (tokens[:, 1:].mean(1) if self.shape.pool == "mean" else tokens[:, 0]).float()

    def flops_per_token(self, context: int) -> float:
        """Operations of a training step (forward and backward) per image: six for each weight and token, 12 T^2 D a layer."""
        s = self.shape
        pixels, seen, all_tokens = s.patch**2 * 3, 1 + s.seen, 1 + s.patches

        def blocks(depth: int, width: int, tokens: int) -> float:
            return depth * (6.0 * 12 * width**2 * tokens + 12.0 * tokens**2 * width)

        ends = s.patches * pixels * s.width + seen * s.width * s.decoder_width + (s.patches - s.seen) * pixels * s.decoder_width
        return blocks(s.depth, s.width, seen) + blocks(s.decoder_depth, s.decoder_width, all_tokens) + 6.0 * ends

    @property
    def feature_flops(self) -> float:
        """Operations of `features` per image."""
        s, tokens = self.shape, 1 + self.shape.patches
        embed = s.patches * s.patch**2 * 3 * s.width
        return 2.0 * (s.depth * (12 * s.width**2 * tokens + 2 * tokens**2 * s.width) + embed)


@torch.no_grad()
def draw_weights(model: MaskedAutoencoder, seed: int) -> None:
    """Random weights as in the paper's code: matrices uniform (Glorot & Bengio 2010), biases 0, gains 1.

    The class and the mask token have a standard deviation of 0.02; they are uniform here, normal in that code. The draws are
    counter-based: the same on every machine.
    """
    for name, value in model.named_parameters():
        if value.ndim < 2:
            value.fill_(float("norm" in name and name.endswith("weight")))
            continue
        matrix = value.view(value.shape[0], -1)
        edge = 0.02 * 3**0.5 if name.endswith("token") else (6 / sum(matrix.shape)) ** 0.5
        drawn = rng.uniform(rng.key("mae", seed, name), np.arange(value.numel()))
        value.copy_(torch.from_numpy(drawn * 2 * edge - edge).view_as(value))


def build_mae(
    *,
    name: str,
    image: int | None,
    patch: int | None,
    width: int,
    depth: int,
    heads: int,
    decoder_width: int,
    decoder_depth: int,
    decoder_heads: int,
    mask: float = 0.75,
    target: Literal["normalised", "pixels"] = "normalised",
    pool: Literal["mean", "class"] = "mean",
    weights: str = "none",
    data_root: str | None = None,
    seed: int = 0,
) -> MaskedAutoencoder:
    """Build a masked autoencoder.

    image    side of the images; the stream's where null
    patch    side of the patches; null: an eighth of the image's, at least 2
    mask     share of the patches that the encoder does not see
    target   what is drawn: pixels normalised patch by patch, or "pixels" in -1..1
    pool     features for the linear probe: the "mean" over patches, or the "class" token
    weights  "none": random, drawn from `seed`; else a file of tensors with the decoder, as given or under `data_root` or
             CLBENCH_DATA. Every tensor must be there and none besides.
    """
    if image is None:
        raise UserError("model.image is null, and no stream of images says what it is")
    side = max(2, image // 8) if patch is None else patch
    shape = Shape(image, side, width, depth, heads, decoder_width, decoder_depth, decoder_heads, mask, target, pool)
    model = MaskedAutoencoder(shape)
    identity: dict[str, Any] = {"name": name, "architecture": "mae", "source": "none", "file_sha256": None}
    if weights == "none":
        draw_weights(model, seed)
    else:
        path = _find(weights, data_root)
        files.fill(model, path, name)
        identity |= {"source": path.name, "file_sha256": files.check_sha256(path, None)}
        model.pretrained = True
    identity |= {"state_sha256": files.state_sha256(model.state_dict()), **asdict(shape)}
    model.identity = identity | {"parameters": sum(p.numel() for p in model.parameters())}
    return model


def _find(weights: str, data_root: str | None) -> Path:
    """A file as given, or under `data_root` (else CLBENCH_DATA). Missing: `UserError`."""
    root = data_root or os.environ.get("CLBENCH_DATA")
    places = [Path(weights).expanduser()] + ([Path(root).expanduser() / weights] if root else [])
    for path in places:
        if path.is_file():
            return path
    looked = " and ".join(map(str, places)) + ("" if root else " (no data_root, CLBENCH_DATA is not set)")
    raise UserError(f"model.weights={weights} not found: looked for {looked}; model.weights=none draws random ones")
