"""Train the decoder of the made world of facts that ships inside the package: `python -m clbench.models.train_facts --out DIR`.

Writes `facts.safetensors` (float16) and `facts.json` (the card: command, world, what it knows, SHA-256), and refuses to where
the decoder does not know its world: at least 99.5 % of the facts in a wording of the text and 98 % in wordings that were never
told of them, in every pool, the end included, by greedy answers of the weights as they are stored.

A world of 64 entities to edit takes two minutes on one thread, larger ones more `--steps`. Another seed or size: `--seed`,
`--entities`, and then `clbench run scenario=edit_facts scenario.seed=S scenario.entities=E model.weights=FILE`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import sys
import time
from typing import Any

import numpy as np
import torch

from clbench.models.decoder import Decoder, build_decoder
from clbench.streams import rng
from clbench.streams.tokens import facts
from clbench.streams.tokens.facts import POOLS, PROMPT, World

SHAPE: dict[str, Any] = {"width": 64, "depth": 4, "heads": 4, "context": 64}
TOLD, UNTOLD = 0.995, 0.98  # what it must know


@torch.no_grad()
def known(model: Decoder, world: World, pool: str, told: bool) -> float:
    """Share of the facts of a pool that the decoder answers, end included, in wordings that the text told of them, or not."""
    entities = world.entities(pool)
    e, r, t = np.nonzero(world.told[entities] == told)
    right = 0
    for part in np.array_split(np.arange(len(e)), -(-len(e) // 512)):
        s = torch.from_numpy(world.sentences(entities[e[part]], r[part], t[part]))
        right += int((model(s[:, :-1])[:, PROMPT - 1 :].argmax(-1) == s[:, PROMPT:]).all(1).sum())
    return right / len(e)


def train(options: argparse.Namespace) -> None:
    """AdamW, a rate that rises over 100 steps and falls linearly over the second half; writes the weights and the card."""
    from safetensors.torch import save_file

    torch.set_num_threads(options.threads)
    world, start = World(options.entities, options.seed), time.time()
    model = build_decoder(name="facts", vocab=facts.VOCAB, seed=options.seed, **SHAPE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(options.steps):
        rate = min(1.0, (step + 1) / 100, 2 * (1 - step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate
        text = world.text(POOLS, options.batch, SHAPE["context"] + 1, rng.key("train", options.seed, step))
        loss = model.loss(torch.from_numpy(text)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 500 == 499:
            told = known(model, world, "edit", True)
            print(f"step {step + 1} loss {loss.item():.3f} told {told:.4f} {time.time() - start:.0f} s", flush=True)
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    shares = {
        f"{pool}_{'told' if told else 'untold'}": known(model, world, pool, told) for pool in POOLS for told in (True, False)
    }
    print(shares)
    if low := {k: v for k, v in shares.items() if v < (TOLD if k.endswith("_told") else UNTOLD)}:
        sys.exit(f"the decoder does not know its world: {low}; more --steps")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "facts.safetensors"
    save_file(state, path, {"entities": str(options.entities), "seed": str(options.seed)})
    command = " ".join(f"--{k} {v.name if isinstance(v, pathlib.Path) else v}" for k, v in vars(options).items())
    card = {
        "name": "facts",
        "architecture": {"gpt_neox": {"vocab": facts.VOCAB, **SHAPE}},
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "data": f"a world of {2 * options.entities} entities, seed {options.seed}: clbench.streams.tokens.facts",
        "command": f"python -m clbench.models.train_facts {command}",
        "known": shares,
        "tokens": options.steps * options.batch * SHAPE["context"],
        "seconds": round(time.time() - start),
        "torch": torch.__version__,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (options.out / "facts.json").write_text(json.dumps(card, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m clbench.models.train_facts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for facts.safetensors and facts.json")
    parser.add_argument("--entities", type=int, default=64, help="entities whose facts can be edited")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch", type=int, default=16, help="sequences of 64 tokens in a step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=1)
    train(parser.parse_args(argv if argv is not None else sys.argv[1:]))


if __name__ == "__main__":
    main()
