"""What is counted of an edited decoder: answers to probes, and the loss on old text. Sums by evaluation set; metrics are made
later.

An answer is right where the model, left to itself, says every token of it, the end included. Greedy answers are causal, so that
is the case exactly where each token is the first choice after those before it: one pass over prompt and answer decides.
The same pass over what the unedited model answered says whether an answer is still the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clbench.interfaces import UserError
from clbench.streams.tokens.edits import Probe

Logits = Callable[[Tensor], Tensor]


def logits_of(answer: Logits, tokens: np.ndarray, device: Any, vocab: int) -> Tensor:
    """Scores of the next token after each one: tokens [B, L] -> [B, L, V] float32, finite."""
    z = answer(torch.from_numpy(np.ascontiguousarray(tokens, np.int64)).to(device))
    if not isinstance(z, Tensor) or z.ndim != 3 or z.shape[:2] != tokens.shape or z.shape[2] < vocab:
        found = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise UserError(f"logits must return scores {(*tokens.shape, vocab)} of {tokens.shape} tokens, got {found}")
    return z.float()


def batches(prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray], size: int) -> Iterator[list[int]]:
    """Numbers of probes whose prompts, and whose answers, are equally long: nothing is padded."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        groups.setdefault((len(prompt), len(answer)), []).append(i)
    for found in groups.values():
        yield from (found[start : start + size] for start in range(0, len(found), size))


class Asked:
    """The probes of one evaluation set, with what the unedited model answers them; `ask` is how a learner is asked.

    kind       a kind of `manifest_rules.PROBES`
    unedited   answers [T] of the unedited model by probe, as long as the right ones
    """

    def __init__(self, name: str, kind: str, probes: Sequence[Probe], device: Any, vocab: int, size: int):
        self.name, self.kind, self.probes = name, kind, list(probes)
        self.device, self.vocab, self.size = device, vocab, size
        self.unedited: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self.probes)

    def said(self, answer: Logits, answers: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every probe with these answers: whether all tokens are first choice, how many are, mean nats of a token."""
        prompts = [probe.prompt for probe in self.probes]
        exact, right, nats = np.zeros(len(self), bool), np.zeros(len(self), np.int64), np.zeros(len(self))
        for rows in batches(prompts, answers, self.size):
            tokens = np.stack([np.concatenate([prompts[i], answers[i]]) for i in rows])
            wanted = torch.from_numpy(np.stack([answers[i] for i in rows])).to(self.device)
            length = wanted.shape[1]
            z = logits_of(answer, tokens[:, :-1], self.device, self.vocab)[:, -length:]
            hits = z.argmax(-1) == wanted
            exact[rows], right[rows] = hits.all(1).cpu().numpy(), hits.sum(1).cpu().numpy()
            chosen = torch.log_softmax(z.double(), -1).gather(-1, wanted[..., None])[..., 0]
            nats[rows] = -chosen.mean(1).cpu().numpy()
        return exact, right, nats

    def generated(self, answer: Logits) -> list[np.ndarray]:
        """Greedy answers, as long as the right ones."""
        made = [probe.prompt for probe in self.probes]
        for rows in batches(made, [probe.answer for probe in self.probes], self.size):
            tokens = np.stack([made[i] for i in rows])
            for _ in range(len(self.probes[rows[0]].answer)):
                z = logits_of(answer, tokens, self.device, self.vocab)[:, -1]
                tokens = np.concatenate([tokens, z.argmax(-1).cpu().numpy()[:, None]], 1)
            for i, row in zip(rows, tokens, strict=True):
                made[i] = row
        return [row[len(probe.prompt) :] for row, probe in zip(made, self.probes, strict=True)]


class EditSuccess:
    """Counts of probes, and sums over the tokens of their right answers.

    correct         the right answer is said in full; `token_hits` of `tokens`: each after the right ones before it
    same            what the unedited model said is said
    preferred       the right answer is likelier than the other one, per token
    nats            of the right answers
    """

    name = "edit_success"

    def __call__(self, learner: Any, data: Asked) -> dict[str, int | float]:
        """Named sums over the probes of `data`."""
        answers = [probe.answer for probe in data.probes]
        exact, right, nats = data.said(learner.logits, answers)
        sums: dict[str, int | float] = {"n": len(data), "correct": int(exact.sum()), "token_hits": int(right.sum())}
        sums |= {"tokens": sum(map(len, answers)), "nats": float((nats * [len(a) for a in answers]).sum())}
        sums["same"] = int(data.said(learner.logits, data.unedited)[0].sum())
        others = [probe.other for probe in data.probes]
        if all(other is not None for other in others):
            sums["preferred"] = int((nats < data.said(learner.logits, others)[2]).sum())  # type: ignore[arg-type]
        return sums


class OldText:
    """Loss on old text: `nats` over `tokens`; the first token of each of `n` rows is given."""

    name = "old_text"

    def __init__(self, device: Any, vocab: int, size: int):
        self.device, self.vocab, self.size = device, vocab, size

    def __call__(self, learner: Any, data: Any) -> dict[str, int | float]:
        """Named sums over the rows of `data.windows` [N, L]."""
        total, count = 0.0, 0
        for start in range(0, len(data.windows), self.size):
            tokens = data.windows[start : start + self.size]
            z = logits_of(learner.logits, tokens[:, :-1], self.device, self.vocab).double()
            wanted = torch.from_numpy(tokens[:, 1:]).to(self.device)
            total -= float(torch.log_softmax(z, -1).gather(-1, wanted[..., None]).sum())
            count += wanted.numel()
        return {"n": len(data.windows), "tokens": count, "nats": total}


class Windows:
    """Rows of old text [N, L] as an evaluation set."""

    def __init__(self, name: str, windows: np.ndarray):
        self.name, self.windows = name, windows

    def __len__(self) -> int:
        return len(self.windows)


def weight_sums(start: dict[str, Tensor], model: torch.nn.Module) -> dict[str, float]:
    """Of the tensors that differ from `start`: squared norms before, now, and of the difference; and how many there are."""
    sums = {"before": 0.0, "now": 0.0, "difference": 0.0, "tensors": 0}
    for name, value in model.state_dict().items():
        old, new = start[name].double(), value.detach().double()
        if not torch.equal(old, new):
            parts = (old.square().sum(), new.square().sum(), (new - old).square().sum(), 1)
            sums = {key: sums[key] + float(part) for key, part in zip(sums, parts, strict=True)}
    return sums
