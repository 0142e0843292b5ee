"""Tokens per second of pre-training beside a bare loop, in one process and one run: `python -m clbench.bench_tokens --help`.

    loop     the bare hand-written loop, clbench's loop, and clbench's loop with probes, on the same model and batches
    paths    attention x precision x matrix mode x torch.compile: which wins on this machine
    memory   resident memory while a corpus much larger than it is read

Rounds of everything that is compared alternate, and ratios are medians over rounds: absolute numbers of a busy machine mean
little. On a GPU: `--rows loop --model decoder_124m --device cuda --precision bf16 --compile --batch 32 --context 1024`, and
`--model pythia_410m --batch 16 --context 2048` with the same; the table then has the share of peak and the target.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from clbench import record
from clbench.bench_machine import machine, memory_rows, share_of_peak, table, target
from clbench.catalog import choices, conf_dir
from clbench.interfaces import UserError
from clbench.loss_stream import Observer
from clbench.models.decoder import build_decoder
from clbench.signatures import nearest
from clbench.streams.cpt import Domain, TokenScenario, scenario
from clbench.training import arithmetic
from clbench.training.ledger import flops_per_token
from clbench.training.mixing import Mixture, Replay
from clbench.training.pretrain import Adam, PretrainRuntime, Segment, train
from clbench.training.schedules import cosine

ROWS = ("loop", "paths", "memory")
REPLAY = Replay(share=0.05)
SETTINGS: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1, "clip": 1.0}


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
        """Some steps."""
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
        self.model, self.args, self.at = model, args, 0
        device = next(model.parameters()).device
        self.runtime = PretrainRuntime(0, device, precision=args.precision, compiled=args.compile)
        self.runtime.flops_per_token = flops_per_token(model, args.context)
        self.optimizer = Adam(model, **SETTINGS)
        self.steps = args.steps * args.rounds + args.warm
        self.stream = stream_of(args.vocab, args.context, args.batch, self.steps)
        if probes:
            job = SimpleNamespace(scenario=self.stream, device=device, config={"eval_batch_size": 128})
            sets = [self.stream.evaluation(j) for j in (0, 1)]
            self.runtime.observer = Observer(job, self.runtime, sets)

    def __call__(self, steps: int) -> None:
        """The next steps of an experience with replay."""
        new, old, first = self.stream.data(1), self.stream.data(0), self.at
        segment = Segment(1, "trunk", "here", "keep", first, first + steps, self.steps, 1e-4, cosine)
        shares = REPLAY.table(self.steps, [len(old)])[first : first + steps]
        mixture = Mixture(new, [old], REPLAY, shares, first=first, seen=[len(old)], starts=[0, first * new.batch])
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

    for work in works.values():
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


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options. Raises `UserError`."""
    parser = argparse.ArgumentParser("python -m clbench.bench_tokens", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--rows", default=",".join(ROWS), help="which tables: loop,paths,memory")
    add("--model", default="decoder_tiny", help="a decoder of `clbench list models`")
    add("--batch", type=int, default=16)
    add("--context", type=int, default=64)
    add("--vocab", type=int, default=256, help="for models that leave it open")
    add("--device", default="cpu")
    add("--threads", default="auto")
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--attention", choices=("auto", "explicit", "sdpa"), default="auto")
    add("--compile", action="store_true", help="torch.compile in `loop`; in `paths` compiled rows too")
    add("--warm", type=int, default=10, help="steps before anything is timed")
    add("--steps", type=int, default=15, help="of a round")
    add("--rounds", type=int, default=15)
    add("--corpus-gb", type=float, default=8.0)
    add("--read-gb", type=float, default=0.05)
    add("--json", metavar="FILE", help="write everything there too")
    args = parser.parse_args(words)
    args.rows = args.rows.split(",")
    for name in args.rows:
        if name not in ROWS:
            raise UserError(f"no table '{name}'{nearest(name, ROWS)} (one of: {', '.join(ROWS)})")
    for name, least in (("batch", 1), ("context", 2), ("vocab", 2), ("warm", 0), ("steps", 1), ("rounds", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if not 0 < args.read_gb or args.corpus_gb * 1e9 < 4 * args.context:
        raise UserError("--read-gb and --corpus-gb must be above 0, and a corpus must hold a context")
    return args


def run(words: Sequence[str]) -> dict[str, Any]:
    """Measure and print -> everything as plain values."""
    args = parse(words)
    threads = int(args.threads) if args.threads.isdigit() else args.threads
    device = arithmetic.choose_device(args.device)
    args.device = str(device)
    arithmetic.apply(device, arithmetic.choose_threads(threads), 0)
    made: dict[str, Any] = {"machine": machine(args), "options": {k: v for k, v in vars(args).items() if k != "json"}}
    print("\n".join(f"{key}: {value}" for key, value in made["machine"].items() if value is not None), end="\n\n")
    work = {"loop": loop_rows, "paths": path_rows, "memory": memory_rows}
    for name in args.rows:
        made[name] = work[name](args)
        print(table(f"{name}: {args.model}, batch {args.batch} x {args.context}, {args.device}, {args.precision}", made[name]))
    if args.json:
        record.write_text(Path(args.json), json.dumps(made, indent=1) + "\n")
    return made


if __name__ == "__main__":
    try:
        run(sys.argv[1:])
    except UserError as error:
        print(f"bench_tokens: {error}", file=sys.stderr)
        sys.exit(2)
