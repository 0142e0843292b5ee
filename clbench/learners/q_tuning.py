"""Q-tuning, queue-based prompt tuning for lifelong few-shot learning (Guo, Xu, Fu, Liu, Ai & Tan, EACL 2024).

The network is frozen. A queue Q holds the prompts [l, D] of at most C tasks. Task k appends a prompt P_k, and the input is

    [P*; (u v') o Q; x]

with a prefix P* [p, D] that all tasks share and an importance of rank one, u [|Q| l] and v [D], learned anew for each task from
ones. Trained are P_k, u, v and P*. A full queue loses one prompt before the next is appended: with the rows of M [C, l D] the
prompts, m their mean and M - m = U S V', the C - 1 rows that stay are m + S_j V_j', j < C, with the largest entry of each V_j
made positive. They span what the prompts spanned around their mean; which prompt was where is lost. A change of P* costs

    retention * mean KL( p(. | P* before the task, x) || p(. | P*, x) )

over the tokens of the task's own lines, without the queue.

queue     "exact": a line is read behind the queue, u and v that its task was trained with: the state grows with the tasks, and
          only P* can make them forget; "present": behind the present queue with the newest u and v
task_id   as in `progressive_prompts`: here it is always given

No code of the authors was found. PCA, signs, the form of the retention term and the constants are this file's; in the paper
the term bounds a mutual information. Published number: none read.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.interfaces import Capabilities, Experience, Schedule, UserError
from clbench.models.decoder import Decoder
from clbench.models.pet import State
from clbench.models.pet_modules import prompt
from clbench.streams.images.data import shuffled
from clbench.streams.tokens.text_data import TextBatch
from clbench.training.answer_loss import Targets, answer_loss, check_targets
from clbench.training.fit import Recipe, fit
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.soft_prompts import check_room, random_embeddings
from clbench.training.state import collect, detached, restore


class QTuning:
    """A queue of prompts behind a shared prefix. State: P*, the queue, what each task is read behind."""

    capabilities: ClassVar[Capabilities] = Capabilities(asks="next_token", needs_task_id=True)

    def __init__(
        self,
        model: Decoder,
        runtime: Runtime,
        *,
        length: int = 3,  # of a task's prompt
        capacity: int = 6,  # prompts in the queue
        shared: int = 3,  # length of the prefix of all tasks
        retention: float = 0.1,
        queue: Literal["exact", "present"] = "exact",
        targets: Targets = "answer",
        lr: float = 0.03,
        epochs: int | None = None,
        batch_size: int = 16,
        weight_decay: float = 0.0,
        clip: float | None = 1.0,
        schedule: Schedule = constant,
    ):
        check_targets(targets)
        if capacity < 2 or shared < 0 or retention < 0:
            got = f"got {capacity}, {shared} and {retention:g}"
            raise UserError(f"learner.capacity must be at least 2, learner.shared and learner.retention at least 0, {got}")
        if queue not in ("exact", "present"):
            raise UserError(f"unknown learner.queue={queue}: choose exact, present")
        self.model, self.runtime, self.lr = model, runtime, lr
        self.targets: Targets = targets
        self.length, self.capacity, self.retention, self.exact = length, capacity, retention, queue == "exact"
        self.pet, device = prompt(model, runtime, length=length), runtime.device
        self.shared = nn.Parameter(random_embeddings(model, shared, runtime.generator("shared")))
        self.queue = torch.zeros(0, length, model.shape.width, device=device)
        self.u, self.v = nn.Parameter(torch.ones(0, device=device)), nn.Parameter(torch.ones(0, device=device))
        self.kept: list[State] = []  # of each task: the queue that it was trained with, u and v
        self.tasks: list[int] = []
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = Recipe("adamw", weight_decay=weight_decay, schedule=schedule, clip=clip)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Make room, train the prompt, u, v and P*, append the prompt."""
        if len(self.queue) == self.capacity:
            self.queue = without_one(self.queue)
        number, before, own = len(self.queue) + 1, self.shared.detach().clone(), self.pet.values["tokens"]
        check_room(self.model, experience.train, len(before) + number * self.length)
        with torch.no_grad():
            own.copy_(random_embeddings(self.model, self.length, self.runtime.generator("prompt")))
        self.u = nn.Parameter(torch.ones(number * self.length, device=own.device))
        self.v = nn.Parameter(torch.ones(own.shape[1], device=own.device))
        self.pet.train()

        def loss(batch: TextBatch) -> Tensor:
            with self.pet.use({"tokens": behind(self.shared, torch.cat([self.queue, own[None]]), self.u, self.v)}):
                value = answer_loss(self.model, batch, self.targets)
            if not self.kept or not self.retention or not len(before):
                return value
            return value + self.retention * self.drift(before, batch)

        groups = [{"params": [p for p in (own, self.u, self.v, self.shared) if p.numel()], "lr": self.lr}]
        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        log = fit(self.runtime, "train", self, groups, loss, batches, self.recipe)
        self.queue = torch.cat([self.queue, own.detach()[None]])
        self.kept.append(detached({"queue": self.queue, "u": self.u, "v": self.v}))
        self.tasks.append(-1 if experience.task is None else experience.task)
        if not self.exact:
            self.kept = [{}] * (len(self.kept) - 1) + self.kept[-1:]
        return log

    def drift(self, before: Tensor, batch: TextBatch) -> Tensor:
        """Mean KL of the predictions behind P* before from those behind P* now, over the tokens of lines; a scalar."""
        inputs, real = batch.tokens[:, :-1], batch.real
        with torch.no_grad(), self.pet.use({"tokens": before}):
            old = torch.log_softmax(self.model(inputs)[real].float(), -1)
        with self.pet.use({"tokens": self.shared}):
            new = torch.log_softmax(self.model(inputs)[real].float(), -1)
        return F.kl_div(new, old, log_target=True, reduction="batchmean")

    def next_token(self, batch: TextBatch) -> Tensor:
        """Scores of the token after each: [B, L] -> [B, L, V], behind what the batch's task was trained with."""
        self.pet.eval()
        if batch.task is None or not self.kept:
            with self.pet.off():
                return self.model(batch.tokens)
        known = self.exact and batch.task in self.tasks
        kept = self.kept[self.tasks.index(batch.task) if known else -1]
        with self.pet.use({"tokens": behind(self.shared, kept["queue"], kept["u"], kept["v"])}):
            return self.model(batch.tokens)

    def state_dict(self) -> dict[str, Any]:
        """P*, the queue and what tasks are read behind."""
        return collect(self, "pet", "queue", "kept", "tasks") | {"shared": self.shared.detach()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)


def behind(shared: Tensor, queue: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Vectors before a text: shared [p, D], queue [n, l, D], u [n l], v [D] -> [p + n l, D]."""
    return torch.cat([shared, torch.outer(u, v) * queue.flatten(0, 1)])


def without_one(queue: Tensor) -> Tensor:
    """The main directions of prompts [C, l, D] as prompts [C - 1, l, D]."""
    rows = queue.flatten(1).cpu().double()
    mean = rows.mean(0)
    _, s, v = torch.linalg.svd(rows - mean, full_matrices=False)
    s, v = s[: len(rows) - 1], v[: len(rows) - 1]
    sign = v.gather(1, v.abs().argmax(1, keepdim=True)).sign()
    return (mean + s[:, None] * sign * v).view(-1, *queue.shape[1:]).to(queue)
