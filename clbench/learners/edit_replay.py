"""Fine-tuning on edits with replay: the control that pays for what the editors avoid.

As `edit_finetune`, on all the texts of one step together: the request, `replayed` earlier requests and `old` pieces of old
text,
    min  -log p(answer | prompt)  +  mean over replayed requests of the same  +  mean nats of a token of old text
with Adam on the second linear layer of one block's MLP. Which requests and which text depends on the seed and the request's
number alone. Requests are kept for good, and count as exemplars; old text is the stream's, at hand in every experience. It
stops where the request itself is answered, so later edits cost as much as the first, but for what is drawn beside them.

No paper: rehearsal (Ratcliff 1990) as in `replay`. Own choices: all numbers. Published number: none.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from clbench.interfaces import Capabilities, Experience
from clbench.streams import rng
from clbench.streams.tokens.edits import EditData, Request
from clbench.training.editing.requests import check_options, descend, each, edit_data
from clbench.training.editing.site import Site, last_but_one
from clbench.training.editing.suffix import Suffix, nats
from clbench.training.runtime import Runtime
from clbench.training.state import collect, restore


class Requests:
    """Requests that were made: texts [L] int64 with the length of their answers."""

    def __init__(self) -> None:
        self.texts: list[np.ndarray] = []
        self.lengths: list[int] = []

    def __len__(self) -> int:
        return len(self.texts)

    def num_bytes(self) -> int:
        """Bytes of the stored texts."""
        return sum(text.nbytes for text in self.texts)

    def add(self, request: Request) -> None:
        """Keep one."""
        self.texts.append(np.concatenate([request.prompt, request.target]))
        self.lengths.append(len(request.target))

    def state_dict(self) -> dict[str, Any]:
        """Texts as tensors."""
        return {"texts": [torch.from_numpy(text) for text in self.texts], "lengths": list(self.lengths)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.texts, self.lengths = [text.numpy().copy() for text in state["texts"]], list(state["lengths"])


class EditReplay:
    """Trains one layer on each request beside old ones. State: weights and the requests."""

    capabilities: ClassVar[Capabilities] = Capabilities(asks="logits", needs_boundaries=False, stores_exemplars=True)

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        *,
        layer: int | None = None,  # the block whose MLP is trained; null: the last but one
        lr: float = 5e-3,
        steps: int = 25,  # of an edit, at most
        stop_below: float = 1e-2,  # nats per token from which on no step is made
        replayed: int = 8,  # earlier requests beside each
        old: int = 4,  # pieces of old text beside each
    ):
        check_options(lr=(lr, 0), steps=(steps, 1), stop_below=(stop_below, 0), replayed=(replayed, 0), old=(old, 0))
        self.model, self.runtime, self.site = model, runtime, Site(model, last_but_one(model, layer))
        self.lr, self.steps, self.stop_below, self.replayed, self.old = lr, steps, stop_below, replayed, old
        self.params = [self.site.linear.weight, self.site.linear.bias]
        self.memory = Requests()
        runtime.meter.trained = sum(p.numel() for p in self.params)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Each request beside a few of those before it, in stream order."""
        self.model.eval()
        data, steps = edit_data(experience), 0
        for (request,) in each(self.runtime, self, experience):
            steps += self._edit(request, data)
            self.memory.add(request)
        return {"steps": float(steps)}

    def _edit(self, request: Request, data: EditData) -> int:
        """Steps made for one request."""
        key, device = rng.key(self.runtime.seed, "replay", request.id), self.runtime.device
        rows = rng.permutation(rng.key(key, "requests"), len(self.memory))[: self.replayed]
        groups: dict[tuple[int, int], list[np.ndarray]] = {}
        for row in rows:
            text, length = self.memory.texts[row], self.memory.lengths[row]
            groups.setdefault((len(text), length), []).append(text)
        beside = [(torch.from_numpy(np.stack(texts)).to(device), length) for (_, length), texts in groups.items()]
        own = torch.from_numpy(np.concatenate([request.prompt, request.target]))[None].to(device)
        pieces = rng.permutation(rng.key(key, "old"), data.old_size)[: self.old]
        old = torch.from_numpy(data.old_text(pieces)).to(device) if len(pieces) else None

        parts = [(own, len(request.target), 1.0)]
        parts += [(texts, length, len(texts) / len(rows)) for texts, length in beside]
        parts += [] if old is None else [(old, old.shape[1] - 1, 1.0)]
        suffixes = [Suffix(self.site, texts[:, :-1]) for texts, _, _ in parts]
        last = {"own": 0.0}

        def loss() -> Tensor:
            found = [
                nats(suffix.logits(self.site.linear(suffix.keys)), texts, length).mean() * weight
                for suffix, (texts, length, weight) in zip(suffixes, parts, strict=True)
            ]
            last["own"] = float(found[0].detach())
            return torch.stack(found).sum()

        def is_done() -> bool:
            return last["own"] < self.stop_below

        optimizer = torch.optim.Adam(self.params, lr=self.lr)
        return descend(self.runtime, self.params, loss, optimizer, self.steps, 0.0, is_done=is_done)

    def logits(self, tokens: Tensor) -> Tensor:
        """Scores of the next token after each: [B, L] -> [B, L, V]."""
        self.model.eval()
        return self.model(tokens)

    def state_dict(self) -> dict[str, Any]:
        """Weights and requests."""
        return collect(self, "model", "memory")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
