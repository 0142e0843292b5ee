"""Progressive Prompts (Razdaibiedina, Mao, Hou, Khabsa, Lewis & Almahairi, ICLR 2023, arXiv 2301.12314; code:
github.com/arazd/ProgressivePrompts).

The network is frozen. Task t gets a soft prompt P_t [l, D] of its own, which starts as the embeddings of random tokens and is
trained in front of the earlier prompts, which are frozen; the input of the network is

    [P_t; P_t-1; ...; P_1; x]

newest first. A line of task i is read behind P_i .. P_1, so its answers never change again: what is measured is transfer.

task_id   "given": the task of a line is disclosed at test time. A line of a task that is not learned yet is read behind all
          prompts, text of no task by the network alone. "none": everything is read behind all prompts, and forgetting is
          possible

In a decoder the text's positions begin behind the prompts (`models/pet_decoder.py`). The code cuts off the end of a text that
does not fit; here that is an error.

From the code for T5: l 10, AdamW with a new optimiser for every task, weight decay 1e-5, rate 0.3, ten passes. Left out: the
residual MLP in front of a prompt in training, and the choice of the best epoch on validation data, which streams do not have:
the last one is taken. Own choices: l 3, for lines of some forty tokens, and the rate. Published number: none read.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from clbench.interfaces import Capabilities, Experience, Schedule, UserError
from clbench.models.decoder import Decoder
from clbench.models.pet_modules import prompt
from clbench.streams.images.data import shuffled
from clbench.streams.tokens.text_data import TextBatch
from clbench.training.answer_loss import Targets, answer_loss, check_targets
from clbench.training.fit import Recipe, fit
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.soft_prompts import check_room, random_embeddings
from clbench.training.state import collect, groups_of, restore


class ProgressivePrompts:
    """A prompt for each task in front of the earlier ones. State: the prompt in training, those of all tasks, their order."""

    capabilities: ClassVar[Capabilities] = Capabilities(asks="next_token", needs_task_id=True)

    def __init__(
        self,
        model: Decoder,
        runtime: Runtime,
        *,
        length: int = 3,  # of a task's prompt
        task_id: Literal["given", "none"] = "given",
        targets: Targets = "answer",
        lr: float = 0.03,
        epochs: int | None = None,
        batch_size: int = 16,
        weight_decay: float = 1e-5,
        clip: float | None = 1.0,
        schedule: Schedule = constant,
    ):
        check_targets(targets)
        if task_id not in ("given", "none"):
            raise UserError(f"unknown learner.task_id={task_id}: choose given, none")
        self.model, self.runtime, self.lr = model, runtime, lr
        self.targets: Targets = targets
        self.length, self.given = length, task_id == "given"
        self.pet = prompt(model, runtime, length=length)
        self.past = torch.zeros(0, model.shape.width, device=runtime.device)  # newest first
        self.tasks: list[int] = []
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = Recipe("adamw", weight_decay=weight_decay, schedule=schedule, clip=clip)

    @staticmethod
    def capabilities_of(task_id: str = "given", **options: Any) -> Capabilities:
        """Whether the task of a line must be disclosed."""
        return Capabilities(asks="next_token", needs_task_id=task_id == "given")

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train a prompt in front of the earlier ones, then put it to them."""
        check_room(self.model, experience.train, self.length + len(self.past))
        own = self.pet.values["tokens"]
        with torch.no_grad():
            own.copy_(random_embeddings(self.model, self.length, self.runtime.generator("prompt")))
        self.pet.train()

        def loss(batch: TextBatch) -> Tensor:
            with self.pet.use({"tokens": torch.cat([own, self.past])}):
                return answer_loss(self.model, batch, self.targets)

        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        log = fit(self.runtime, "train", self, groups_of((self.pet, self.lr)), loss, batches, self.recipe)
        self.past = torch.cat([own.detach(), self.past])
        self.tasks.append(-1 if experience.task is None else experience.task)
        return log

    def next_token(self, batch: TextBatch) -> Tensor:
        """Scores of the token after each: [B, L] -> [B, L, V], behind the prompts that the batch's task was trained with."""
        self.pet.eval()
        used = self.past[len(self.past) - self.length * self.number(batch.task) :]
        with self.pet.use({"tokens": used}) if len(used) else self.pet.off():
            return self.model(batch.tokens)

    def number(self, task: int | None) -> int:
        """How many prompts, the earliest, stand before a line of a task."""
        if not self.given:
            return len(self.tasks)
        if task is None:
            return 0
        return self.tasks.index(task) + 1 if task in self.tasks else len(self.tasks)

    def state_dict(self) -> dict[str, Any]:
        """Prompts, and the tasks that they belong to, in the order in which they were learned."""
        return collect(self, "pet", "past", "tasks")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
