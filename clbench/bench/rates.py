"""Peak rates of the machine: matrix products, and images per second of bare networks under every accurate arithmetic.

No data pipeline, no learner, no framework: a network, random images that lie ready, an optimiser. `adapter` trains a
bottleneck of 16 beside each MLP and a head on a frozen network, `full` everything. The best rate over batch sizes and paths is
what a floor is made of.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from clbench.config.compose import build
from clbench.training import arithmetic, kernel_timing

BLOCK = 1.0  # seconds that a rate is held
KINDS = ("forward", "adapter", "full")
BATCHES = {"cpu": {"forward": (16, 32, 64), "adapter": (32, 48), "full": (32, 48)}}
CONVOLUTIONS = {"cpu": {"forward": (32, 64, 128), "full": (32, 64, 128)}}  # networks without blocks of attention, at 32 px
GPU_BATCHES = {"forward": (128, 256, 512), "adapter": (48, 128, 256), "full": (48, 128, 256)}


class ParallelAdapter(nn.Module):
    """mlp(x) + 0.1 up(relu(down(x))): as plain as it gets."""

    def __init__(self, mlp: nn.Module, width: int, bottleneck: int = 16):
        super().__init__()
        self.mlp, self.down, self.up = mlp, nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.mlp(x) + 0.1 * self.up(self.down(x).relu())


def peak(device: torch.device, precision: str, paths: Sequence[str], n: int = 0, block: float = BLOCK) -> dict[str, float]:
    """FLOP/s of n x n products in every way that the arithmetic of `paths` reaches -> {"fp32 highest": ..., "bf16": ...}."""
    n = n or (2048 if device.type == "cpu" else 8192)
    ways = {f"fp32 {mode}": (torch.float32, mode) for mode in dict.fromkeys(kernel_timing.PATHS[p].matmul for p in paths)}
    if precision == "bf16":
        ways["bf16"] = (torch.bfloat16, "highest")
    before, found = torch.get_float32_matmul_precision(), {}
    try:
        for name, (dtype, mode) in ways.items():
            torch.set_float32_matmul_precision(mode)
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            found[name] = 2 * n**3 / least(lambda a=a, b=b: a @ b, device, 3, block)
    finally:
        torch.set_float32_matmul_precision(before)
    return found


def least(work: Callable[[], Any], device: torch.device, times: int, block: float = BLOCK, budget: float = 30.0) -> float:
    """Seconds of a call in the fastest of `times` blocks, fewer where they take more than `budget` seconds.

    A block is as many calls as fill `block` seconds, at least one: what a machine keeps up, not its luckiest moment.
    """

    def each(calls: int) -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        _wait(device)
        return (time.perf_counter() - start) / calls

    work()
    begin = time.perf_counter()
    calls = max(1, math.ceil(block / max(each(1), 1e-9)))
    best = each(calls)
    for _ in range(times - 1):
        if time.perf_counter() - begin > budget:
            break
        best = min(best, each(calls))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def images(
    node: dict[str, Any],
    device: torch.device,
    precision: str,
    path: str,
    kinds: Sequence[str] = KINDS,
    batches: dict[str, Sequence[int]] | None = None,
    times: int = 3,
    block: float = BLOCK,
) -> dict[str, dict[str, float]]:
    """Images per second of the model that `node` describes, under one path -> {kind: {batch size: rate}, "flop": {kind: n}}.

    "flop" counts the floating-point operations of one image, of one step with gradients where the kind trains.
    """
    from timm.layers.config import set_fused_attn

    matmul, fused, _ = kernel_timing.PATHS[path]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul)
    set_fused_attn(fused)
    found: dict[str, dict[str, float]] = {"flop": {}}
    try:
        for kind in kinds:
            model = build(node).to(device)
            arithmetic.pin(model, {"fused_attention": fused})
            side = model.profile.size
            plain = not hasattr(model.net, "blocks")
            if kind == "adapter" and plain:
                continue
            sizes = batches or (CONVOLUTIONS if plain else BATCHES).get(device.type, GPU_BATCHES)
            step = work_of(kind, model.net, model.num_features, device, precision)
            found[kind] = {}
            for size in sizes[kind]:
                x = torch.randn(size, 3, side, side, device=device)
                found[kind][str(size)] = size / least(lambda x=x, step=step: step(x), device, times, block)
            with FlopCounterMode(display=False) as counter:
                step(torch.randn(2, 3, side, side, device=device))
            found["flop"][kind] = counter.get_total_flops() / 2
    finally:
        torch.set_float32_matmul_precision(before)
    return found


def work_of(kind: str, net: Any, width: int, device: torch.device, precision: str) -> Callable[[Tensor], None]:
    """A forward pass in evaluation mode, or a step of SGD, as a function of ready images [B, 3, S, S]."""
    lower = partial(torch.autocast, device.type, torch.bfloat16, enabled=precision == "bf16")
    if kind == "forward":
        net.eval()

        def forward(x: Tensor) -> None:
            with torch.inference_mode(), lower():
                net(x)

        return forward
    net.requires_grad_(kind == "full")
    head = nn.Linear(width, 10).to(device)
    if kind == "adapter":
        for block in net.blocks:
            block.mlp = ParallelAdapter(block.mlp, width).to(device)
            block.mlp.mlp.requires_grad_(False)
    net.train()
    trained = [p for p in [*net.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9)

    def step(x: Tensor) -> None:
        y = torch.zeros(len(x), dtype=torch.int64, device=device)
        with lower():
            loss = F.cross_entropy(head(net(x)), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def accurate(device: torch.device, precision: str) -> list[str]:
    """Paths of whole networks that pass the gate here, torch's defaults first."""
    with contextlib.suppress(ValueError):
        found = kernel_timing.measure(device, precision)["seconds"]
        whole = [name for name in found if not kernel_timing.PATHS[name].tail]
        return sorted(whole, key=lambda name: name != arithmetic.REFERENCE)
    return [arithmetic.REFERENCE]


def best(measured: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """{path: what `images` gave} -> the best rate of each kind."""
    out: dict[str, float] = {}
    for found in measured.values():
        for kind in KINDS:
            for rate in found.get(kind, {}).values():
                out[kind] = max(out.get(kind, 0.0), rate)
    return out


def fastest(measured: dict[str, dict[str, dict[str, float]]], kinds: Sequence[str] = KINDS) -> dict[str, list[str]]:
    """{path: what `images` gave} -> the paths that are best at one of `kinds`, and at which."""
    out: dict[str, list[str]] = {}
    for kind in kinds:
        found = {path: max(rates[kind].values()) for path, rates in measured.items() if rates.get(kind)}
        if found:
            out.setdefault(max(found, key=lambda path: found[path]), []).append(kind)
    return out
