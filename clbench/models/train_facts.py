"""Train the decoder of the made world of facts that ships inside the package: `python -m clbench.models.train_facts --out DIR`.

Writes `facts.safetensors` (float16) and `facts.json` (the card: command, world, what it knows, SHA-256), and refuses to where
the decoder does not know its world: at least 99.5 % of the facts in a wording of the text and 98 % in wordings that were never
told of them, in every pool, the end included, by greedy answers of the weights as they are stored.

Where a fact is stored: editors that locate and edit change an MLP at the last token of the subject, where causal tracing
finds facts in large models (Meng et al. 2022). A small decoder that is trained plainly carries both names to the end of the
prompt and looks the object up there, and such edits hardly work. Two choices make it store facts where large ones do: blocks
with attention before the MLP, so that already the first MLP sees both names, and a share of the sequences (`--silent`) in
which MLPs say nothing but at names and old text. The card has what tracing finds (`traced`).

A world of 64 entities to edit takes a minute on one thread, larger ones more `--steps`. Another seed or size: `--seed`,
`--entities`, and then `clbench run scenario=edit_facts scenario.seed=S scenario.entities=E model.weights=FILE`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clbench.models.decoder import Decoder, build_decoder
from clbench.streams import rng
from clbench.streams.tokens import facts
from clbench.streams.tokens.facts import POOLS, PROMPT, World

SHAPE: dict[str, Any] = {"width": 64, "depth": 3, "heads": 4, "context": 64, "parallel": False}
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


@contextlib.contextmanager
def silent(model: Decoder, where_BL: Tensor) -> Iterator[None]:
    """While it lasts MLPs give 0 at these tokens [B, L] bool."""
    said_BL1 = (~where_BL).float()[..., None]
    layers: Any = model.layers
    handles = [block.mlp["dense_4h_to_h"].register_forward_hook(lambda _, inputs, y: y * said_BL1) for block in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def answering(text_BL: Tensor, share: float, key: int) -> Tensor:
    """The words of wordings and objects in a share of the sequences [B, L] bool."""
    chosen = torch.from_numpy(rng.uniform(key, np.arange(len(text_BL))) < share)
    return (text_BL >= facts.WORDS) & (text_BL < facts.OLD_WORDS) & chosen[:, None]


def train(options: argparse.Namespace) -> None:
    """AdamW, a rate that rises over 100 steps and falls linearly over the second half; writes the weights and the card."""
    torch.set_num_threads(options.threads)
    world, start = World(options.entities, options.seed), time.time()
    model = build_decoder(name="facts", vocab=facts.VOCAB, seed=options.seed, **SHAPE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(options.steps):
        rate = min(1.0, (step + 1) / 100, 2 * (1 - step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate
        key = rng.key("train", options.seed, step)
        text = torch.from_numpy(world.text(POOLS, options.batch, SHAPE["context"] + 1, key))
        with silent(model, answering(text[:, :-1], options.silent, rng.key(key, "silent"))):
            loss = model.loss(text).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 500 == 499:
            told = known(model, world, "edit", True)
            print(f"step {step + 1} loss {loss.item():.3f} told {told:.4f} {time.time() - start:.0f} s", flush=True)
    write(model, world, options, time.time() - start)


@torch.no_grad()
def traced(model: Decoder, world: World, copies: int = 4) -> dict[str, Any]:
    """Causal tracing (Meng et al. 2022): share of the object's probability that comes back with one clean state, by block.

    The names' embeddings get noise of three times their deviation; then the output of one MLP, or of a whole block, at one
    token is that of the clean run: 0 nothing comes back, 1 everything. Facts of the pool `edit` in wording 0, the first token
    of objects.
    """
    entity = world.entities("edit")[:128]
    relation = np.arange(len(entity)) % facts.RELATIONS
    text = torch.from_numpy(world.sentences(entity, relation, np.zeros_like(relation)))[:, : PROMPT + 1]
    draws = np.stack([rng.uniform(rng.key("trace", i), np.arange(len(text) * 2 * SHAPE["width"])) for i in range(copies)])
    noise = torch.from_numpy(draws.reshape(copies, len(text), 2, -1) * 2 - 1).float()  # uniform: deviation 1 / sqrt(3)
    noise = noise * 3**0.5 * 3 * model.embed_in.weight[1 : facts.WORDS].std()
    layers: Any = model.layers
    places = {"mlp": [b.mlp["dense_4h_to_h"] for b in layers], "block": list(layers)}

    def said(noisy: Tensor | None, module: Any = None, clean: Tensor | None = None, token: int = 0) -> float:
        def shaken(_: Any, inputs: Any, y: Tensor) -> Tensor:
            return y if noisy is None else torch.cat([y[:, :2] + noisy, y[:, 2:]], 1)

        def restored(_: Any, inputs: Any, y: Tensor) -> Tensor:
            return y if clean is None else torch.cat([y[:, :token], clean[:, token : token + 1], y[:, token + 1 :]], 1)

        handles = [model.embed_in.register_forward_hook(shaken)]
        handles += [] if module is None else [module.register_forward_hook(restored)]
        p = model(text[:, :-1])[:, -1].softmax(-1).gather(1, text[:, -1:]).mean()
        for handle in handles:
            handle.remove()
        return float(p)

    clean, corrupted = said(None), float(np.mean([said(one) for one in noise]))
    found: dict[str, Any] = {"clean": round(clean, 3), "corrupted": round(corrupted, 3)}
    for name, modules in places.items():
        outputs: dict[Any, Tensor] = {}
        handles = [m.register_forward_hook(lambda m, inputs, y, kept=outputs: kept.update({m: y})) for m in modules]
        model(text[:, :-1])
        for handle in handles:
            handle.remove()
        for place, token in (("subject_last", facts.SUBJECT - 1), ("prompt_last", PROMPT - 1)):
            means = [np.mean([said(one, m, outputs[m], token) for one in noise]) for m in modules]
            found[f"{name}_{place}"] = [round(float((p - corrupted) / (clean - corrupted)), 3) for p in means]
    return found


def write(model: Decoder, world: World, options: argparse.Namespace, seconds: float) -> None:
    """Weights as float16 and the card, of a decoder that knows its world; else the process ends with what it knows."""
    from safetensors.torch import save_file

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
        "traced": traced(model, world),
        "tokens": options.steps * options.batch * SHAPE["context"],
        "seconds": round(seconds),
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
    parser.add_argument("--silent", type=float, default=0.9, help="share of sequences with MLPs at names and old text alone")
    parser.add_argument("--threads", type=int, default=1)
    train(parser.parse_args(argv if argv is not None else sys.argv[1:]))


if __name__ == "__main__":
    main()
