"""`clbench bench tokens`: tokens per second of pre-training beside a bare loop, in one process and one run.

    loop     the bare hand-written loop, clbench's loop, and clbench's loop with probes, on the same model and batches
    paths    attention x precision x matrix mode x torch.compile: which wins on this machine
    memory   resident memory while a corpus much larger than it is read

Rounds of everything that is compared alternate, and ratios are medians over rounds: absolute numbers of a busy machine mean
little. On a GPU the table has the share of peak and the target too.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from clbench.bench import machine, mapped, table, token_options
from clbench.config.registry import choices, conf_dir
from clbench.config.signatures import nearest
from clbench.interfaces import UserError
from clbench.models.decoder import build_decoder
from clbench.models.precision import set_precision
from clbench.run.token_stream import TokenLooks, TokenStream
from clbench.streams.tokens.scenario import Domain, TokenScenario, scenario
from clbench.training import arithmetic, looks
from clbench.training.optimizer_state import Adam
from clbench.training.pretraining.data_mixture import Mixture, Replay
from clbench.training.pretraining.ledger import flops_per_token
from clbench.training.pretraining.segments import PretrainRuntime, Segment, train
from clbench.training.schedules import cosine

PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}  # dense bf16 operations per second
TARGETS = {"pythia_410m": 145_000, "decoder_124m": 460_000}  # tokens per second on one H200: 40 % of its peak
REPLAY = Replay(share=0.05)
SETTINGS: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1, "clip": 1.0}


def target(args: argparse.Namespace) -> int | None:
    """The tokens per second that were set for this model on one H200."""
    on_gpu = args.device.startswith("cuda") and "H200" in torch.cuda.get_device_name(args.device)
    return TARGETS.get(args.model) if on_gpu else None


def share_of_peak(flops_per_second: float, args: argparse.Namespace) -> float | None:
    """Operations per second over the device's dense bf16 peak; None where that is not known."""
    if not args.device.startswith("cuda") or args.precision != "bf16":
        return None
    name = torch.cuda.get_device_name(args.device)
    peak = next((value for part, value in PEAKS.items() if part in name), None)
    return None if peak is None else round(flops_per_second / peak, 3)


def model_of(name: str, vocab: int, context: int, **changes: Any) -> Any:
    """A decoder by the name of its configuration, with random weights."""
    if name not in choices("model") or "build_decoder" not in (conf_dir() / "model" / f"{name}.yaml").read_text():
        raise UserError(f"no decoder '{name}'{nearest(name, [n for n in choices('model') if 'pythia' in n or 'decoder' in n])}")
    found = yaml.safe_load((conf_dir() / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
    drop = ("_target_", "data_root", "seed", "weights")
    node: dict[str, Any] = {key: value for key, value in found.items() if key not in drop} | {"context": context} | changes
    node["vocab"] = node["vocab"] or vocab
    node["eps"] = float(node["eps"])
    return build_decoder(**node)


def stream_of(vocab: int, context: int, batch: int, steps: int) -> TokenScenario:
    """Two domains of random tokens: nothing can be learned from them, and any batch costs the same."""
    rng, kind = np.random.default_rng(0), np.uint16 if vocab <= 1 << 16 else np.uint32
    size = min(max(steps, 8) * batch * context, 1 << 24) + 1
    made = [
        Domain(f"d{i}", rng.integers(0, vocab, size, kind), rng.integers(0, vocab, size // 4, kind), "0" * 64) for i in (0, 1)
    ]
    return scenario(
        "bench",
        made,
        (0, 1),
        vocab=vocab,
        tokens=steps * batch * context,
        context=context,
        batch=batch,
        eval_tokens=64 * context,
    )


class Bare:
    """What one would write by hand: random windows, loss, backward, clip, AdamW with a cosine."""

    def __init__(self, model: nn.Module, tokens: np.ndarray, args: argparse.Namespace):
        self.model, self.tokens, self.args, self.at = model, tokens, args, 0
        loss: Any = model.loss
        self.loss = torch.compile(loss) if args.compile else loss
        params = list(model.parameters())
        groups = [
            {"params": [p for p in params if p.ndim >= 2]},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        self.rng = np.random.default_rng(0)

    def __call__(self, steps: int) -> None:
        args, device = self.args, next(self.model.parameters()).device
        for _ in range(steps):
            starts = self.rng.integers(0, len(self.tokens) - args.context - 1, args.batch)
            batch = np.stack([self.tokens[s : s + args.context + 1] for s in starts]).astype(np.int64)
            tokens = torch.from_numpy(batch).to(device)
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-4 * (1 + np.cos(np.pi * (self.at % 1000) / 1000))
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                loss = self.loss(tokens).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.at += 1
            if device.type == "cpu":
                loss.item()


class Loop:
    """clbench's loop on the same model: exact quotas with 5 % replay, ledger, and with `probes` the curves of the loss."""

    def __init__(self, model: nn.Module, args: argparse.Namespace, probes: bool):
        self.model, self.args, self.at = set_precision(model, args.precision), args, 0
        device = next(model.parameters()).device
        self.runtime = PretrainRuntime(0, device, precision=args.precision, compiled=args.compile)
        self.runtime.flops_per_token = flops_per_token(model, args.context)
        self.optimizer = Adam(model, **SETTINGS)
        self.steps = args.steps * args.rounds + args.warm
        self.stream = stream_of(args.vocab, args.context, args.batch, self.steps)
        self.observer: TokenLooks | None = None
        if probes:
            options = SimpleNamespace(eval_batch_size=128)
            job = SimpleNamespace(scenario=self.stream, device=device, model=self.model, options=options, evaluators=[])
            self.observer = TokenStream(job, self.runtime, None).observer  # type: ignore[arg-type]

    def __call__(self, steps: int) -> None:
        """The next steps of an experience with replay."""
        new, old, first = self.stream.data(1), self.stream.data(0), self.at
        segment = Segment(1, "trunk", "here", "keep", first, first + steps, self.steps, 1e-4, cosine)
        shares = REPLAY.table(self.steps, [len(old)])[first : first + steps]
        mixture = Mixture(new, [old], REPLAY, shares, first=first, seen=[len(old)], starts=[0, first * new.batch])
        with nullcontext() if self.observer is None else looks.observed_by(self.observer):
            train(self.runtime, self.model, self.optimizer, segment, mixture, first, lambda step: None)
        self.at += steps


Paces = dict[str, list[float]]


def alternate(works: dict[str, Callable[[int], None]], args: argparse.Namespace) -> tuple[Paces, Paces]:
    """Tokens per second of each piece of work, one number for each round, by the clock and by this process's own time.

    The first steps are not counted. On a machine that others use, a process's own time says more than the clock.
    """

    def timed(work: Callable[[int], None], steps: int) -> tuple[float, float]:
        start, own = time.perf_counter(), time.process_time()
        work(steps)
        if args.device.startswith("cuda"):
            torch.cuda.synchronize(args.device)
        return time.perf_counter() - start, time.process_time() - own

    for name, work in works.items():
        print(f"{name}: {args.rounds} rounds of {args.steps} steps", file=sys.stderr, flush=True)
        timed(work, args.warm)
    clock: Paces = {name: [] for name in works}
    own: Paces = {name: [] for name in works}
    for number in range(args.rounds):
        order = list(works) if number % 2 == 0 else list(works)[::-1]
        for name in order:
            tokens = args.steps * args.batch * args.context
            seconds = timed(works[name], args.steps)
            clock[name].append(tokens / seconds[0])
            own[name].append(tokens / seconds[1])
    return clock, own


def ratio(paces: Paces, name: str, to: str) -> float:
    """Median over rounds of one pace to another."""
    return round(statistics.median(a / b for a, b in zip(paces[name], paces[to], strict=True)), 3)


def loop_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Bare loop, clbench's loop, with probes: tokens per second, ratio to the bare one, share of a known peak."""
    model = model_of(args.model, args.vocab, args.context, attention=args.attention).to(args.device)
    args.vocab = model.shape.vocab
    bare = Bare(copy.deepcopy(model), stream_of(args.vocab, args.context, args.batch, args.steps).domains[0].train, args)
    works = {"bare": bare, "clbench": Loop(copy.deepcopy(model), args, False), "clbench with probes": Loop(model, args, True)}
    found, own = alternate(works, args)
    flops, rows = flops_per_token(model, args.context), []
    for name, paces in found.items():
        pace = statistics.median(paces)
        row: dict[str, Any] = {"row": name, "tokens_per_second": round(pace), "of_bare": ratio(found, name, "bare")}
        row |= {
            "of_bare_own_time": ratio(own, name, "bare") if args.device == "cpu" else None,
            "rounds": list(map(round, paces)),
        }
        rows.append(row | {"of_peak": share_of_peak(pace * flops, args), "target": target(args) if name == "clbench" else None})
    return rows


def path_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every way to compute the same step, each in the bare loop."""
    works, before = {}, torch.get_float32_matmul_precision()
    tokens = stream_of(args.vocab, args.context, args.batch, args.steps).domains[0].train
    for attention in ("explicit", "sdpa"):
        for precision, matmul in (("fp32", "highest"), ("fp32", "medium"), ("bf16", "highest")):
            for compiled in (False, True) if args.compile else (False,):
                own = argparse.Namespace(**vars(args) | {"precision": precision, "compile": compiled})
                model = model_of(args.model, args.vocab, args.context, attention=attention).to(args.device)
                name = f"{attention} {precision} {matmul}{' compiled' * compiled}"
                works[name] = _in_mode(matmul, Bare(model, tokens, own))
    try:
        found, own = alternate(works, args)
    finally:
        torch.set_float32_matmul_precision(before)
    best = max(found, key=lambda name: statistics.median(found[name]))
    first = "explicit fp32 highest"
    return [
        {
            "row": name + ("  <- fastest" if name == best else ""),
            "tokens_per_second": round(statistics.median(paces)),
            "of_first": ratio(found, name, first),
            "of_first_own_time": ratio(own, name, first) if args.device == "cpu" else None,
        }
        for name, paces in found.items()
    ]


def _in_mode(matmul: str, work: Callable[[int], None]) -> Callable[[int], None]:
    def both(steps: int) -> None:
        torch.set_float32_matmul_precision(matmul)
        work(steps)

    return both


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The tables that are asked for, with the machine and the options. Raises `UserError`."""
    token_options.check(args)
    device = arithmetic.choose_device(args.device)
    args.device = str(device)
    threads = arithmetic.choose_threads(int(args.threads) if args.threads.isdigit() else args.threads)
    flags = arithmetic.apply(device, threads, 0)
    kept = {k: v for k, v in vars(args).items() if k not in ("name", "results_dir")}
    found: dict[str, Any] = {"machine": machine.describe(device, threads), "flags": flags, "options": kept}
    work = {"loop": loop_rows, "paths": path_rows, "memory": mapped.rows}
    return found | {name: work[name](args) for name in args.rows}


def text(found: dict[str, Any]) -> str:
    o = found["options"]
    title = f"{o['model']}, batch {o['batch']} x {o['context']}, {o['device']}, {o['precision']}"
    return "\n\n".join([table.machine_text(found), *(f"{name}: {title}\n{table.plain(found[name])}" for name in o["rows"])])
