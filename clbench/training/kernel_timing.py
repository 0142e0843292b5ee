"""Chooses the fastest arithmetic that keeps the accuracy: timed once per machine, cached on disk.

A path is a mode of fp32 matrix products, a way to compute attention, and whether a ViT's last block is run for the class token
alone ("+tail"). Which one is fast differs more than one would think:
on processors without matrix units `medium` leaves fp32 as exact as it was and takes another library's kernels, twice as fast;
on those with such units, and on GPUs, the same word means bf16 products. So every path is tried on two blocks of a ViT, forward
and with gradients, under the run's precision: it is *accurate* if its error against float64 is at most twice that of torch's
defaults, and the fastest accurate path is chosen (the expected one, unless another is faster by a tenth: a busy machine
should not decide). No gate, no choice: `reference` and explicit names are taken as they are (`arithmetic.py`).

"+channels_last" behind a path's name lets networks of convolutions keep their channels innermost, in weights and images. It is
measured apart, on two residual blocks, and judged in the same way. Convolutions are as exact with it, but batch norm need not
be: on CPUs torch 2.14 adds its statistics up one after another (fp32: relative errors of 2e-6 instead of 4e-8), so that it is
refused there, and taken where it is asked for by name.

    FOLDER/<sha256 of device, library, threads, precision; 24 digits>.json     what was measured, and the choice
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import secrets
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.models.feature_store import default_folder
from clbench.training import hardware


class Path(NamedTuple):
    """What a path sets."""

    matmul: str
    fused: bool
    tail: bool


PATHS = {
    f"{matmul}+{attention}{tail}": Path(matmul, attention == "fused", bool(tail))
    for tail in ("", "+tail")
    for matmul in ("highest", "high", "medium")
    for attention in ("fused", "explicit")
}
CHANNELS_LAST = "+channels_last"
VERSION = 4  # raised when the measurement changes
TOLERANCE, MARGIN = 2.0, 0.1
ROUNDS, BATCH, TOKENS, WIDTH, HEADS = 3, 8, 197, 192, 3


def folder() -> pathlib.Path:
    """Beside the feature store's: `$CLBENCH_CACHE/arithmetic`, else `clbench/arithmetic` in the user's cache folder."""
    return default_folder().parent / "arithmetic"


@functools.cache
def choice(device: torch.device, threads: int, precision: str) -> str:
    """The path for this machine: from the cache folder, else measured and put there. Jobs that start at once agree on one."""
    key = machine_key(device, threads, precision)
    path = _file(key)
    if (known := _read(path)) is not None:
        return known
    with _locked(path.parent):
        if (known := _read(path)) is not None:
            return known
        found = {"machine": key, **measure(device, precision)}
        found["choice"] += CHANNELS_LAST if channels_last_wins(device, precision) else ""
        with contextlib.suppress(OSError):
            temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        return found["choice"]


def known(device: torch.device, threads: int, precision: str) -> str | None:
    """The path for this machine if it has been measured; nothing is measured or written."""
    return _read(_file(machine_key(device, threads, precision)))


def _file(key: dict[str, Any]) -> pathlib.Path:
    return folder() / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.json"


def machine_key(device: torch.device, threads: int, precision: str) -> dict[str, Any]:
    """What a choice belongs to."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type} {hardware.cpu()} {torch.backends.cpu.get_cpu_capability()}"
    return {"version": VERSION, "device": name, "torch": torch.__version__, "threads": threads, "precision": precision}


def _read(path: pathlib.Path) -> str | None:
    """The choice in a file; None where there is none, or none that is known."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["choice"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) and found.removesuffix(CHANNELS_LAST) in PATHS else None


@contextlib.contextmanager
def _locked(place: pathlib.Path) -> Any:
    """Hold the folder's lock where that is possible: a folder that cannot be written measures without."""
    from filelock import FileLock, Timeout

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, Timeout):
            place.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(str(place / "lock"), timeout=60))
        yield


def measure(device: torch.device, precision: str) -> dict[str, Any]:
    """Errors and seconds of every path that makes sense on `device`, and the choice. The process's flags stay as they are.

    On a GPU fp32 is never reduced: there is nothing to gain that a user did not ask for with precision=bf16.
    """
    kinds = ("highest+", "medium+") if device.type == "cpu" else ("highest+",)  # "high" on CPUs is one of these
    names = [name for name in PATHS if name.startswith(kinds)]
    expected = ["medium+explicit+tail", "highest+explicit+tail"] if device.type == "cpu" else ["highest+fused+tail"]
    before = torch.get_float32_matmul_precision()
    probe = KernelTimer(device, precision)
    try:
        errors = {name: probe.error(name) for name in names}
        accurate = [n for n in names if errors[n] <= TOLERANCE * errors["highest+fused"]]
        seconds = dict.fromkeys(accurate, float("inf"))
        for _ in range(ROUNDS):
            for name in accurate:  # in turns, so that a slow moment of the machine meets all of them
                seconds[name] = min(seconds[name], probe.seconds(name))
    finally:
        torch.set_float32_matmul_precision(before)
    return {"choice": fastest(seconds, expected), "errors": errors, "seconds": seconds}


def fastest(seconds: dict[str, float], expected: list[str]) -> str:
    """The expected path if it is accurate, unless another is faster by MARGIN of its time."""
    home = next((name for name in expected if name in seconds), None)
    best = min(seconds, key=lambda name: seconds[name])
    return home if home is not None and seconds[best] > (1 - MARGIN) * seconds[home] else best


def channels_last_wins(device: torch.device, precision: str) -> bool:
    """Whether two residual blocks are trained with channels last: on a CPU unless the other way is faster by MARGIN.

    On a GPU the other way round. An error against float64 of more than TOLERANCE times that of torch's default refuses it.
    """
    rng, lower = torch.Generator().manual_seed(0), precision == "bf16"
    weights = [torch.randn(16, 16, 3, 3, generator=rng) * 144**-0.5 for _ in range(4)]
    images = torch.randn(32, 16, 32, 32, generator=rng)
    forms = {"": torch.contiguous_format, CHANNELS_LAST: torch.channels_last}

    def work(form: torch.memory_format, count: int, act: Callable[[Tensor], Tensor]) -> list[Tensor]:
        laid = [tensor.to(device).contiguous(memory_format=form) for tensor in (images[:count], *weights)]
        with torch.autocast(device.type, torch.bfloat16, enabled=lower):
            return convolved(laid[0], laid[1:], act)

    exact = convolved(images[:4].double(), [w.double() for w in weights], F.silu)
    errors, seconds = {}, dict.fromkeys(forms, float("inf"))
    for name, form in forms.items():
        pairs = zip(work(form, 4, F.silu), exact, strict=True)
        errors[name] = max(((a.cpu().double() - b).norm() / b.norm()).item() for a, b in pairs)
    for _ in range(ROUNDS):
        for name, form in forms.items():
            wait(device)
            start = time.perf_counter()
            work(form, len(images), F.relu)
            wait(device)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    wanted = fastest(seconds, [CHANNELS_LAST if device.type == "cpu" else ""])
    return wanted == CHANNELS_LAST and errors[CHANNELS_LAST] <= TOLERANCE * errors[""]


def convolved(x: Tensor, weights: list[Tensor], act: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Two residual blocks over x [B, C, H, W] -> means [B, C], and the gradients of their square's mean by all weights.

    Errors are those of a smooth `act`: a ReLU turns the smallest rounding into another gradient.
    """
    own = [w.detach().requires_grad_(True) for w in weights]
    gains, shifts = ([x.new_full((x.shape[1],), value).requires_grad_(True) for _ in range(2)] for value in (1.0, 0.0))
    with torch.enable_grad():
        for a, b in ((own[0], own[1]), (own[2], own[3])):
            h = act(F.batch_norm(F.conv2d(x, a, padding=1), None, None, gains[0], shifts[0], training=True))
            x = act(x + F.batch_norm(F.conv2d(h, b, padding=1), None, None, gains[1], shifts[1], training=True))
        out = x.mean((2, 3))
        gradients = torch.autograd.grad(out.square().mean(), [*own, *gains, *shifts])
    return [out.detach(), *gradients]


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class KernelTimer:
    """Two blocks of a ViT-Tiny at 224 px on a few random images, and what they give in float64."""

    def __init__(self, device: torch.device, precision: str):
        self.device, self.lower = device, precision == "bf16"
        rng = torch.Generator().manual_seed(0)
        shapes = {"qkv": (3 * WIDTH, WIDTH), "proj": (WIDTH, WIDTH), "up": (4 * WIDTH, WIDTH), "down": (WIDTH, 4 * WIDTH)}
        self.weights = [
            {n: (torch.randn(s, generator=rng) * s[1] ** -0.5).to(device) for n, s in shapes.items()} for _ in range(2)
        ]
        self.x = torch.randn(BATCH, TOKENS, WIDTH, generator=rng).to(device)
        exact = [{n: w[:].cpu().double() for n, w in block.items()} for block in self.weights]
        self.exact = self._both(self.x[:2].cpu().double(), exact, Path("highest", False, False))

    def error(self, name: str) -> float:
        """The larger relative error against float64 of the output and of the gradient of one weight."""
        torch.set_float32_matmul_precision(PATHS[name].matmul)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.lower):
            found = self._both(self.x[:2], self.weights, PATHS[name])
        pairs = zip(found, self.exact, strict=True)
        return max(((a.detach().cpu().double() - b).norm() / b.norm()).item() for a, b in pairs)

    def seconds(self, name: str) -> float:
        """One forward pass and one step with gradients."""
        torch.set_float32_matmul_precision(PATHS[name].matmul)
        wait(self.device)
        start = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.lower):
            with torch.no_grad():
                self._forward(self.x, self.weights, PATHS[name])
            self._both(self.x, self.weights, PATHS[name])
        wait(self.device)
        return time.perf_counter() - start

    def _both(self, x: Tensor, weights: list[dict[str, Tensor]], path: Path) -> tuple[Tensor, Tensor]:
        """Output [B, D] at the first token, and the gradient of its square's mean with respect to the first weight."""
        first = weights[0]["qkv"].detach().requires_grad_(True)
        with torch.enable_grad():
            out = self._forward(x, [weights[0] | {"qkv": first}, *weights[1:]], path)[:, 0]
            (gradient,) = torch.autograd.grad(out.square().mean(), first)
        return out.detach(), gradient

    @staticmethod
    def _forward(x: Tensor, weights: list[dict[str, Tensor]], path: Path) -> Tensor:
        """Tokens x [B, N, D] through all blocks -> [B, N, D], or [B, 1, D] where the last one is run for the first alone."""
        for number, w in enumerate(weights, 1):
            h, rows = F.layer_norm(x, (WIDTH,)), 1 if path.tail and number == len(weights) else x.shape[1]
            if rows == x.shape[1]:
                q, k, v = F.linear(h, w["qkv"]).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            else:
                q = F.linear(h[:, :rows], w["qkv"][:WIDTH]).unflatten(2, (HEADS, -1)).transpose(1, 2)
                k, v = F.linear(h, w["qkv"][WIDTH:]).unflatten(2, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)
            x = x[:, :rows] + F.linear(attention(q, k, v, path.fused).transpose(1, 2).flatten(2), w["proj"])
            x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, (WIDTH,)), w["up"])), w["down"])
        return x


def attention(q: Tensor, k: Tensor, v: Tensor, fused: bool) -> Tensor:
    """Softmax attention of q, k, v [B, H, N, D/H], by one kernel or written out."""
    if fused:
        return F.scaled_dot_product_attention(q, k, v)
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
