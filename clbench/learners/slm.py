"""SLM, scalable language model (Peng, Tian, Liu, Yang & Jia, ICLR 2024, arXiv 2404.07470; code: github.com/Pbihao/SLM).

A pool of N entries, each a change of low rank of the output layer of attention in every block, A_k = 0 [O, r] and B_k ~ N(0, 1)
[r, I] at first, and a key for each entry in each of G groups. A frozen encoder makes a query of a text, cut into G parts.

    sim_k = mean over groups of cos(q_g, key_gk)        weights w_k = sim_k / (sum over the top K of sim + 1e-9)
    W' = W + sum over the top K of w_k A_k B_k          ("joint adaptive re-parameterisation", JARe)

Keys come first ("dynamic task-related knowledge retrieval", DTKR): those of a task's entries, orthogonal in each group at
first, are trained on its texts with the loss - mean of the top K cosines in each group, where a key is left out of the choice
with probability `key_dropout`. Then they are frozen and joined to the pool's, and the task's own entries are trained, alone,
retrieved among themselves. At test time all entries are eligible, no task is told, and nothing but a wrong retrieval forgets.

query   "sample": each line is answered with its own mixture; "batch": similarities are averaged over the batch too, as in the
        code, which makes an answer depend on the other lines

Deviations from the code: the encoder is the frozen decoder, its last states averaged over the prompt (a sentence encoder of 768
there); keys are there from their task on (the code trains those of all tasks first, later ones included); no key is left out
while entries are trained (the code averages -100 for each one left out into the weights). It restores other tasks' entries
after each step; here they are not trained. As in the code: similarities are not kept above 0, so a sum may be near 0. Keys are
trained on the queries of one pass, which is no visit of the budget. Own choices: sizes and rates; keys at 0.01, because at the
code's 1e-3 they have not left where they were drawn after a few hundred steps. With seed 0 the eight tasks of `made8` then
find one of their own entries first for 94 % of the lines. Published number: none read.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.interfaces import Capabilities, Experience, Schedule, UserError
from clbench.models.decoder import Decoder
from clbench.models.pet import State
from clbench.models.pet_modules import lora
from clbench.streams import rng
from clbench.streams.images.data import shuffled
from clbench.streams.tokens.text_data import TextBatch
from clbench.training.answer_loss import Targets, answer_loss, check_targets
from clbench.training.fit import Recipe, fit
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, detached, groups_of, restore

READ = 128  # lines of a pass that makes queries


class Slm:
    """Low-rank changes that texts retrieve by keys. State: the entries in training, keys and entries of all tasks."""

    capabilities: ClassVar[Capabilities] = Capabilities(asks="next_token", needs_random_access=True)

    def __init__(
        self,
        model: Decoder,
        runtime: Runtime,
        *,
        entries: int = 2,  # of each task
        rank: int = 4,  # of an entry
        top: int = 2,  # entries that are mixed
        groups: int = 4,
        query: Literal["sample", "batch"] = "sample",
        key_dropout: float = 0.25,
        key_lr: float = 0.01,
        key_epochs: int = 3,
        targets: Targets = "answer",
        lr: float = 3e-3,
        epochs: int | None = None,
        batch_size: int = 16,
        weight_decay: float = 0.0,
        clip: float | None = 1.0,
        schedule: Schedule = constant,
    ):
        check_targets(targets)
        if query not in ("sample", "batch"):
            raise UserError(f"unknown learner.query={query}: choose sample, batch")
        width = model.shape.width
        if min(entries, top, groups) < 1 or width % groups or entries > width // groups:
            raise UserError(
                f"learner.groups must divide the width of {width} into parts of at least learner.entries, entries and top be "
                f"at least 1: got groups={groups}, entries={entries}, top={top}"
            )
        if not 0 <= key_dropout < 1:
            raise UserError(f"learner.key_dropout must be at least 0 and below 1, got {key_dropout}")
        self.model, self.runtime, self.lr = model, runtime, lr
        self.targets: Targets = targets
        self.entries, self.rank, self.top, self.groups, self.shared_query = entries, rank, top, groups, query == "batch"
        self.key_dropout, self.key_lr, self.key_epochs = key_dropout, key_lr, key_epochs
        self.pet = lora(model, runtime, rank=rank * entries, targets=("proj",))
        self.keys = torch.zeros(groups, 0, width // groups, device=runtime.device)
        self.own_keys = nn.Parameter(torch.zeros(groups, entries, width // groups, device=runtime.device))
        self.bank: State = {}
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = Recipe("adamw", weight_decay=weight_decay, schedule=schedule, clip=clip)

    @staticmethod
    def capabilities_of(query: str = "sample", **options: Any) -> Capabilities:
        """With one query for a batch an answer depends on its other lines."""
        return Capabilities(asks="next_token", needs_random_access=True, transductive=query == "batch")

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train keys, then entries; join both to the pool."""
        key_log = self._learn_keys(experience)
        if self.bank:
            self.pet.reset(self.runtime.generator("pet"))
        draw = self.runtime.generator("entries")
        with torch.no_grad():
            for name, value in self.pet.values.items():
                if name.endswith("/a"):
                    value.copy_(torch.empty(value.shape).normal_(generator=draw))
        self.pet.train()

        def loss(batch: TextBatch) -> Tensor:
            found = retrieved(self.query(batch), self.own_keys.detach(), self.top, self.shared_query)
            with self.pet.use(*mixed(self.own_entries(), *found)):
                return answer_loss(self.model, batch, self.targets)

        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        log = fit(self.runtime, "train", self, groups_of((self.pet, self.lr)), loss, batches, self.recipe)
        own = detached(self.own_entries())
        self.bank = {name: torch.cat([self.bank[name], value]) if self.bank else value for name, value in own.items()}
        self.keys = torch.cat([self.keys, self.own_keys.detach()], 1)
        return key_log | log

    def _learn_keys(self, experience: Experience) -> dict[str, float]:
        """Train the keys of new entries on the queries of a task's lines."""
        draw = self.runtime.generator("keys")
        with torch.no_grad():
            for group in self.own_keys:
                group.copy_(nn.init.orthogonal_(torch.empty(group.shape), generator=draw))
        with self.runtime.phase("queries"):
            data: Any = experience.train
            queries = torch.cat([self.query(batch) for batch in data.test_batches(READ)])
        step, seed = [0], self.runtime.key("key_dropout")

        def loss(chosen: Tensor) -> Tensor:
            shape = (len(chosen), self.groups, self.entries)
            generator = torch.Generator().manual_seed(rng.key(seed, step[0]) >> 1)
            dropped = torch.rand(shape, generator=generator).to(chosen.device) < self.key_dropout
            return key_loss(chosen, self.own_keys, self.top, dropped)

        groups = [{"params": [self.own_keys], "lr": self.key_lr}]
        batches = _Queries(queries, self.batch_size, self.key_epochs, self.runtime.key("keys"))
        place: dict[str, Any] = {"at_place": lambda place: step.__setitem__(0, place.step)}
        return fit(self.runtime, "keys", self, groups, loss, batches, Recipe("adamw", clip=0.1), **place)

    @torch.no_grad()
    def query(self, batch: TextBatch) -> Tensor:
        """The bare network's last states, averaged over each prompt [B, D]."""
        inside = (torch.arange(batch.tokens.shape[1]) < batch.prompts[:, None]).to(batch.tokens.device)
        with self.pet.off():
            states = self.model.states(batch.tokens) * inside[..., None]
        return states.sum(1) / inside.sum(1, keepdim=True)

    def own_entries(self) -> State:
        """The entries in training: "/a" [n, r, I], "/b" [n, O, r]."""
        n, r, values = self.entries, self.rank, self.pet.values
        return {
            name: value.view(n, r, -1) if name.endswith("/a") else value.view(-1, n, r).transpose(0, 1)
            for name, value in values.items()
        }

    def next_token(self, batch: TextBatch) -> Tensor:
        """Scores of the token after each: [B, L] -> [B, L, V], with the entries that each line retrieves."""
        self.pet.eval()
        if not self.bank:
            with self.pet.off():
                return self.model(batch.tokens)
        found = retrieved(self.query(batch), self.keys, self.top, self.shared_query)
        with self.pet.use(*mixed(self.bank, *found)):
            return self.model(batch.tokens)

    def state_dict(self) -> dict[str, Any]:
        """The entries and keys in training, and the pool."""
        return collect(self, "pet", "keys", "bank") | {"own_keys": self.own_keys.detach()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)


class _Queries:
    """Batches of queries [N, D] in a new order in each epoch."""

    def __init__(self, queries: Tensor, size: int, epochs: int, key: int):
        self.queries, self.size, self.key = queries, size, key
        self.each = -(-len(queries) // size)
        self.steps = epochs * self.each

    def __call__(self, step: int) -> Tensor:
        epoch, place = divmod(step, self.each)
        order = rng.permutation(rng.key(self.key, epoch), len(self.queries))
        rows = torch.from_numpy(np.ascontiguousarray(order[place * self.size : (place + 1) * self.size]))
        return self.queries[rows.to(self.queries.device)]


def similarities(queries: Tensor, keys: Tensor) -> Tensor:
    """Cosines of queries [B, D], cut into G parts, with keys [G, N, D / G] -> [B, G, N]."""
    parts = F.normalize(queries.unflatten(1, (len(keys), -1)), dim=-1)
    return torch.einsum("bgc,gnc->bgn", parts, F.normalize(keys, dim=-1))


def key_loss(queries: Tensor, keys: Tensor, top: int, dropped: Tensor) -> Tensor:
    """Minus the mean of the top cosines in each group; `dropped` [B, G, N] come last in the choice. A scalar."""
    sim = similarities(queries, keys)
    rows = sim.detach().masked_fill(dropped, -100.0).topk(min(top, sim.shape[-1]), dim=-1).indices
    return -sim.gather(-1, rows).mean()


def retrieved(queries: Tensor, keys: Tensor, top: int, shared: bool) -> tuple[Tensor, Tensor]:
    """The entries that each query takes, best first, and their weights, both [B, K]; `shared`: the same for all."""
    sim = similarities(queries, keys).mean(1)
    if shared:
        sim = sim.mean(0, keepdim=True).expand_as(sim)
    best, rows = sim.topk(min(top, sim.shape[1]), dim=1)
    return rows, best / (best.sum(1, keepdim=True) + 1e-9)


def mixed(bank: State, rows: Tensor, weights: Tensor) -> tuple[State, Tensor]:
    """Entries "/a" [N, r, I], "/b" [N, O, r] -> pairs [B, K r, I], [B, O, K r] (weights in "/b"), and the row of each line."""
    made = {}
    for name, value in bank.items():
        some = value[rows]
        made[name] = some.flatten(1, 2) if name.endswith("/a") else _side_by_side(some * weights[:, :, None, None])
    return made, torch.arange(len(rows), device=rows.device)


def _side_by_side(b: Tensor) -> Tensor:
    """[B, K, O, r] -> [B, O, K r]."""
    return b.transpose(1, 2).flatten(2)
