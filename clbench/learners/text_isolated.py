"""A model for each task: every task is trained from the weights before the first, and answers with its own.

Nothing is forgotten and nothing is passed on; what it costs is a copy of the weights for each task, and the task of a line at
test time. "Per-task fine-tuning" of ProgressivePrompts (Razdaibiedina et al. 2023, arXiv 2301.12314), where the distance to
it is called transfer. Text of no task, and of a task to come, is answered with the weights before the first. Trained as in
`text_finetune.py`. Published number: none read.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.func import functional_call

from clbench.interfaces import Capabilities, Experience, Schedule
from clbench.streams.images.data import shuffled
from clbench.streams.tokens.text_data import TextBatch
from clbench.training.answer_loss import answer_loss
from clbench.training.fit import Recipe, fit
from clbench.training.optimizers import Optimizer
from clbench.training.optimizers import check as check_optimizer
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, detached, groups_of, restore


class TextIsolated:
    """Weights by task. State: these, and those that are trained."""

    capabilities: ClassVar[Capabilities] = Capabilities(asks="next_token", needs_task_id=True)

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        *,
        lr: float = 1e-3,
        epochs: int | None = None,
        batch_size: int = 16,
        optimizer: Optimizer = "adamw",
        weight_decay: float = 0.0,
        clip: float | None = 1.0,
        schedule: Schedule = constant,
    ):
        check_optimizer(optimizer, lr=lr)
        self.model, self.runtime, self.lr = model, runtime, lr
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = Recipe(optimizer, weight_decay=weight_decay, schedule=schedule, clip=clip)
        self.start: dict[str, Tensor] = detached(model.state_dict())
        self.weights: dict[int, dict[str, Tensor]] = {}

    def learn(self, experience: Experience) -> dict[str, float]:
        """Begin again from the start; a task that comes back goes on from its own weights."""
        task = experience.task
        assert task is not None
        self.model.load_state_dict(self._of(task))
        self.model.train()

        def loss(batch: TextBatch) -> Tensor:
            return answer_loss(self.model, batch)

        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        log = fit(self.runtime, "train", self, groups_of((self.model, self.lr)), loss, batches, self.recipe)
        self.weights[task] = detached(self.model.state_dict())
        return log

    def next_token(self, batch: TextBatch) -> Tensor:
        """Scores of the token after each, by the weights of the batch's task: [B, L] -> [B, L, V]."""
        self.model.eval()
        return functional_call(self.model, self._of(batch.task), (batch.tokens,))

    def _of(self, task: int | None) -> dict[str, Tensor]:
        """The weights of a task; those before the first where it has none."""
        return self.weights[task] if task in self.weights else self.start

    def state_dict(self) -> dict[str, Any]:
        """Weights by task, and those that are trained (the start comes from the model itself)."""
        return collect(self, "model", "weights")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
