"""Train the nano ViT that ships inside the package: `python -m clbench.models.train_nano --data cifar100.npz --out DIR`.

A ViT of 1.3 M parameters at 32 px is trained on CIFAR-100 and on letters drawn with the font that Pillow embeds. It never
sees a digit: no 0-9 is drawn, and the letters that look like one (O, o, I, i, l, S, s, Z, z, B, b, g, q) are left out.
Augmentation takes away what small grey scans lack: colour, resolution and contrast.

Writes `nano.safetensors` (float16, timm's names, no head) and `nano.json` (the card: command, data, accuracy, SHA-256).

Shapes: x [B, 3, 32, 32] float in 0..1, y [B] int64; letters are classes 100..(100 + L - 1).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import pathlib
import string
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

NANO: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 160, "depth": 4, "num_heads": 4}
LETTERS = [c for c in string.ascii_letters if c not in "OoIilSsZzBbgq"]


def letter_bank(size: int = 48) -> tuple[Tensor, Tensor]:
    """Draw every letter in several sizes and stroke widths -> images [N, 1, size, size] float in 0..1, labels [N]."""
    from PIL import Image, ImageDraw, ImageFont

    images, labels = [], []
    for label, letter in enumerate(LETTERS):
        for points in (26, 30, 34, 38):
            font = ImageFont.load_default(points)
            for stroke in (0, 1, 2, 3):
                canvas = Image.new("L", (size, size), 0)
                ImageDraw.Draw(canvas).text((size / 2, size / 2), letter, 255, font, "mm", stroke_width=stroke)
                images.append(np.asarray(canvas, np.float32) / 255)
                labels.append(label)
    return torch.from_numpy(np.stack(images))[:, None], torch.tensor(labels)


def warp(x: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """Random rotation, shear, scale, shift and a smooth bend for each image: x [B, 1, H, W] -> [B, 1, size, size]."""
    b = len(x)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(b).uniform_(low, high, generator=rng)

    angle, shear = uniform(-0.3, 0.3), uniform(-0.4, 0.4)
    sx, sy = uniform(0.65, 1.15), uniform(0.65, 1.0)
    theta = torch.stack(
        [
            torch.stack([sx * angle.cos(), sx * (shear - angle.sin()), uniform(-0.15, 0.15)], 1),
            torch.stack([sy * angle.sin(), sy * angle.cos(), uniform(-0.15, 0.15)], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [b, 1, size, size], align_corners=False)
    bend = torch.empty(b, 2, 4, 4).normal_(0, 0.09, generator=rng)
    grid = grid + F.interpolate(bend, (size, size), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, align_corners=False)


def coarsen(x: Tensor, rng: torch.Generator) -> Tensor:
    """Throw resolution away: average to a random smaller size and scale back. x [B, C, 32, 32] -> the same shape."""
    small = [8, 8, 8, 10, 12, 16][int(torch.randint(6, (), generator=rng))]
    return F.interpolate(F.interpolate(x, (small, small), mode="area"), (32, 32), mode="bicubic").clamp(0, 1)


def letters(bank: tuple[Tensor, Tensor], b: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw b letters -> x [b, 3, 32, 32], y [b]; three in four are coarse, one in four is dark on light or coloured."""
    pick = torch.randint(len(bank[0]), (b,), generator=rng)
    x = warp(bank[0][pick], 32, rng)
    part = b * 3 // 4
    x = torch.cat([coarsen(x[: part // 2], rng), coarsen(x[part // 2 : part], rng), x[part:]])
    gain = torch.empty(b, 1, 1, 1).uniform_(0.6, 1.2, generator=rng)
    x = (x * gain).clamp(0, 1).repeat(1, 3, 1, 1)
    odd = torch.rand(b, 1, 1, 1, generator=rng) < 0.25
    ink, paper = torch.rand(2, b, 3, 1, 1, generator=rng)
    x = torch.where(odd, x * ink + (1 - x) * paper, x)
    return x, bank[1][pick] + 100


def photographs(x_u8: Tensor, rng: torch.Generator) -> Tensor:
    """Shift by up to 4 px, flip, grey, contrast, coarse: x_u8 [B, 3, 32, 32] uint8 -> [B, 3, 32, 32] float in 0..1."""
    b = len(x_u8)
    x = F.pad(x_u8.float() / 255, (4, 4, 4, 4), mode="reflect")
    top, left = torch.randint(0, 9, (2, b), generator=rng)
    rows = top[:, None] + torch.arange(32)
    columns = left[:, None] + torch.arange(32)
    x = x[
        torch.arange(b)[:, None, None, None],
        torch.arange(3)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]
    flip = torch.rand(b, generator=rng) < 0.5
    x[flip] = x[flip].flip(3)
    grey = torch.rand(b, generator=rng) < 0.3
    x[grey] = x[grey].mean(1, keepdim=True).expand(-1, 3, -1, -1)
    gain = torch.empty(b, 1, 1, 1).uniform_(0.7, 1.3, generator=rng)
    shift = torch.empty(b, 3, 1, 1).uniform_(-0.1, 0.1, generator=rng)
    x = ((x - 0.5) * gain + 0.5 + shift).clamp(0, 1)
    part = b // 8
    return torch.cat([coarsen(x[:part], rng), x[part:]])


def mix(x: Tensor, y: Tensor, num_classes: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """CutMix on one batch: a rectangle of each image comes from its neighbour -> x, soft targets [B, num_classes]."""
    target = F.one_hot(y, num_classes).float()
    share = rng.beta(1.0, 1.0)
    side = math.sqrt(1 - share)
    h, w = int(32 * side), int(32 * side)
    top, left = rng.integers(0, 33 - h), rng.integers(0, 33 - w)
    x = x.clone()
    x[:, :, top : top + h, left : left + w] = x.roll(1, 0)[:, :, top : top + h, left : left + w]
    kept = 1 - h * w / 1024
    return x, kept * target + (1 - kept) * target.roll(1, 0)


def accuracy(model: torch.nn.Module, x_u8: Tensor, y: Tensor) -> float:
    """Share of photographs whose largest of the 100 CIFAR logits is right: x_u8 [N, 3, 32, 32] uint8, y [N]."""
    model.eval()
    with torch.inference_mode():
        parts = [model((x.float() / 255 - 0.5) / 0.5)[:, :100].argmax(1) for x in x_u8.split(500)]
    return (torch.cat(parts) == y).float().mean().item()


def epoch_of_steps(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    photos: tuple[Tensor, Tensor],
    bank: tuple[Tensor, Tensor],
    options: argparse.Namespace,
    epoch: int,
    rngs: tuple[torch.Generator, np.random.Generator],
) -> float:
    """One pass over the photographs with letters mixed into every batch -> loss of the last step."""
    rng, numpy_rng = rngs
    model.train()
    classes = 100 + len(LETTERS)
    steps = len(photos[0]) // options.batch
    order = torch.randperm(len(photos[0]), generator=rng)
    loss = torch.zeros(())
    for i in range(steps):
        step = epoch * steps + i
        warm = min(1.0, (step + 1) / (2 * steps))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * warm * 0.5 * (1 + math.cos(math.pi * step / (options.epochs * steps)))
        pick = order[i * options.batch : (i + 1) * options.batch]
        x, y = photographs(photos[0][pick], rng), photos[1][pick]
        target = F.one_hot(y, classes).float()
        if step % 2:
            x, target = mix(x, y, classes, numpy_rng)
        lx, ly = letters(bank, options.letters, rng)
        x, target = torch.cat([x, lx]), torch.cat([target, F.one_hot(ly, classes).float()])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model((x - 0.5) / 0.5)
        loss = F.cross_entropy(logits.float(), target, label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return loss.item()


def card(model: torch.nn.Module, arrays: dict[str, np.ndarray], options: argparse.Namespace, results: dict) -> dict:
    """What a reader must know of the weights: data, command, seed, accuracies, versions."""
    import timm

    command = " ".join(f"--{k} {v.name if isinstance(v, pathlib.Path) else v}" for k, v in vars(options).items())
    return {
        "name": "nano",
        "architecture": {"timm": "vit_tiny_patch16_224", **NANO},
        "num_parameters": sum(p.numel() for k, p in model.named_parameters() if not k.startswith("head.")),
        "data": {
            "cifar100": "50000 training images, SHA-256 of the array "
            + hashlib.sha256(arrays["train_x"].tobytes()).hexdigest(),
            "letters": "".join(LETTERS) + " in Pillow's embedded font; no digit",
        },
        "command": "python -m clbench.models.train_nano " + command,
        "seed": options.seed,
        **results,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }


def train(options: argparse.Namespace) -> None:
    """Run the whole recipe; prints a line an epoch, writes the weights and the card."""
    import timm
    from safetensors.torch import save_file
    from timm.layers.config import set_fused_attn

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("medium")
    set_fused_attn(False)
    arrays = dict(np.load(options.data))
    split = {k: torch.from_numpy(arrays[f"{k}_x"]).permute(0, 3, 1, 2).contiguous() for k in ("train", "test")}
    labels = {k: torch.from_numpy(arrays[f"{k}_y"]) for k in ("train", "test")}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=100 + len(LETTERS), drop_path_rate=0.05, **NANO)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.lr)
    rngs = torch.Generator().manual_seed(options.seed), np.random.default_rng(options.seed)
    bank, start = letter_bank(), time.time()
    for epoch in range(options.epochs):
        loss = epoch_of_steps(model, optimizer, (split["train"], labels["train"]), bank, options, epoch, rngs)
        test = accuracy(model, split["test"], labels["test"])
        print(f"epoch {epoch + 1}/{options.epochs} loss {loss:.3f} cifar100 {test:.4f} {time.time() - start:.0f} s", flush=True)
    results: dict[str, Any] = {
        f"cifar100_{k}_accuracy": round(accuracy(model, split[k], labels[k]), 4) for k in ("train", "test")
    }
    results["seconds"] = round(time.time() - start)
    options.out.mkdir(parents=True, exist_ok=True)
    state = {k: v.half().contiguous() for k, v in model.state_dict().items() if not k.startswith("head.")}
    save_file(state, options.out / "nano.safetensors")
    results["sha256"] = hashlib.sha256((options.out / "nano.safetensors").read_bytes()).hexdigest()
    (options.out / "nano.json").write_text(json.dumps(card(model, arrays, options, results), indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m clbench.models.train_nano", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=pathlib.Path, required=True, help="npz with train_x, train_y, test_x, test_y (CIFAR-100)"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for nano.safetensors and nano.json")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--batch", type=int, default=192, help="photographs in a step")
    parser.add_argument("--letters", type=int, default=64, help="letters in a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    train(parser.parse_args(argv if argv is not None else sys.argv[1:]))


if __name__ == "__main__":
    main()
