"""Train the decoder that text tasks start from, which ships in the package: `python -m clbench.models.train_base --out DIR`.

Writes `base_text.safetensors` (float16) and `base_text.json` (the card: command, what it knows, SHA-256), and refuses to where
the decoder does not know its text: its loss on old text must be at most 0.3 nats a byte above that of the source, and at least
90 % of new lines of `copy` must be answered right, by greedy answers of the weights as they are stored. Adapters on a decoder
that knows nothing would measure nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import pathlib
import sys
import time
from typing import Any

import numpy as np
import torch

from clbench.models.decoder import Decoder, build_decoder
from clbench.streams import rng
from clbench.streams.tokens import base_text, made_tasks

SHAPE: dict[str, Any] = {"width": 64, "depth": 4, "heads": 4, "rotary": 1.0, "context": base_text.CONTEXT}
GAP, COPIES = 0.3, 0.9  # nats a byte above the source, share of copies: what it must know


@torch.no_grad()
def known(model: Decoder) -> dict[str, float]:
    """Nats a byte of new old text above those of its source; shares of new lines that are answered right to the end."""
    held = base_text.old_text(64, base_text.CONTEXT, rng.key("known"))
    loss = float(model.loss(torch.from_numpy(held)).double().mean())
    found = {"old_text_gap": loss - base_text.old_floor(held)}
    pairs = made_tasks.lines([made_tasks.parse("copy")], "L1", "known", 256, 0)[0]
    rows = torch.from_numpy(np.array([list(prompt + answer) for prompt, answer in pairs]))
    length = len(pairs[0][1])
    right = model(rows[:, :-1]).argmax(-1)[:, -length:] == rows[:, -length:]
    return found | {"copy": float(right.all(1).float().mean())}


def train(options: argparse.Namespace) -> None:
    """AdamW, a rate that rises over 100 steps and falls in half a cosine; writes the weights and the card."""
    from safetensors.torch import save_file

    torch.set_num_threads(options.threads)
    start = time.time()
    model = build_decoder(name="base_text", vocab=made_tasks.VOCAB, seed=options.seed, **SHAPE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(options.steps):
        rate = min(1.0, (step + 1) / 100) * (1 + math.cos(math.pi * step / options.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate
        text, counts = base_text.text(options.batch, base_text.CONTEXT + 1, rng.key("train", options.seed, step))
        loss = model.loss(torch.from_numpy(text))[torch.from_numpy(counts[:, 1:])].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            print(f"step {step + 1} loss {loss.item():.3f} {known(model)} {time.time() - start:.0f} s", flush=True)
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    knows = known(model)
    print(knows)
    if knows["old_text_gap"] > GAP or knows["copy"] < COPIES:
        sys.exit(f"the decoder does not know its text: {knows}; more --steps")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "base_text.safetensors"
    save_file(state, path, {"seed": str(options.seed)})
    command = " ".join(f"--{k} {v.name if isinstance(v, pathlib.Path) else v}" for k, v in vars(options).items())
    card = {
        "name": "base_text",
        "architecture": {"gpt_neox": {"vocab": made_tasks.VOCAB, **SHAPE}},
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "data": "half Markov text, half lines of copy, lookup, and of reversing and shifting: clbench.streams.tokens.base_text",
        "command": f"python -m clbench.models.train_base {command}",
        "known": knows,
        "tokens": options.steps * options.batch * base_text.CONTEXT,
        "seconds": round(time.time() - start),
        "torch": torch.__version__,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (options.out / "base_text.json").write_text(json.dumps(card, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m clbench.models.train_base", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for base_text.safetensors and base_text.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16, help="rows of 96 bytes in a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    train(parser.parse_args(argv if argv is not None else sys.argv[1:]))


if __name__ == "__main__":
    main()
