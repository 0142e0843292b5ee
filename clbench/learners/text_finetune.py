"""Sequential fine-tuning of a language model on text tasks: the lower bound; joint training, half fine-tuning and LISA.

Every weight, or a parameter-efficient module, is trained on each task in turn with the mean loss over the tokens of answers,
end included; nothing is done against forgetting. In the literature on continual fine-tuning it is "SeqFT" (TRACE: Wang et al.
2023, arXiv 2310.06762).

targets    "answer": the loss is on answers alone; "line": on prompts too
data       "new": each task's own lines; "union": joint training, the upper reference: after each task anew from the weights
           before the first on all lines so far. It keeps all data, and is exempt from the budgets
pet        a module that is trained in place of the weights, one for all tasks: `pet=lora`, ... . Sequential LoRA
           (`learner=text_lora`) is one pair of rank 8 for each linear layer with scale 4, as the baselines of O-LoRA (Wang et
           al. 2023, arXiv 2310.14152) have it for queries and values
trainable  "half" (HFT, Hui et al. 2024, arXiv 2404.18466): a random half of the matrices of each block stands still in each
           task, another one in the next. "lisa" (LISA, Pan et al. 2024, arXiv 2403.17919): every 20 steps one block is drawn
           that is trained; `training/chosen_layers.py`. Embeddings, last norm and output matrix are always trained

select     only a share of a task's lines is trained on, chosen when it begins: "random", "ifd" or "less", with options
           {ifd: {kept: 0.1}}; `training/line_selection.py`. null: all of them

Own choices: AdamW at 1e-3 with no decay of the rate, batches of 16, for decoders of less than a million parameters. Rates of
the literature (1e-5) are for models of billions. Published number: none read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from clbench.interfaces import Capabilities, Experience, Schedule, UserError
from clbench.models.pet import Factory
from clbench.models.pet_modules import none
from clbench.streams.images.data import shuffled
from clbench.streams.tokens.text_data import TextBatch, TextData
from clbench.training.answer_loss import Targets, answer_loss, attach, check_targets
from clbench.training.fit import Recipe, fit
from clbench.training.line_selection import chosen, selection
from clbench.training.optimizers import Optimizer
from clbench.training.optimizers import check as check_optimizer
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import detached, groups_of
from clbench.training.steps import Steps, Trainable, whole


class TextFinetune:
    """Trains everything, or a module, on each task in turn. State: what is trained."""

    capabilities: ClassVar[Capabilities] = Capabilities(asks="next_token")

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        *,
        targets: Targets = "answer",
        data: Literal["new", "union"] = "new",  # union: joint training
        pet: Factory = none,
        select: Literal["random", "ifd", "less"] | Mapping[str, Any] | None = None,
        trainable: Trainable = "all",  # all | half | lisa, or {half: {unit, ratio}}, {lisa: {blocks, every}}
        lr: float = 1e-3,
        epochs: int | None = None,
        batch_size: int = 16,
        optimizer: Optimizer = "adamw",
        betas: Sequence[float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        clip: float | None = 1.0,
        schedule: Schedule = constant,
    ):
        check_targets(targets)
        check_optimizer(optimizer, lr=lr)
        if data not in ("new", "union"):
            raise UserError(f"unknown learner.data={data}: choose new, union")
        self.targets: Targets = targets
        self.select = selection(select)
        if self.select is not None and data == "union":
            raise UserError("learner.select chooses among the lines of one task: it needs data=new")
        self.model, self.runtime, self.lr = model, runtime, lr
        self.pet = attach(pet, model, runtime)
        if self.pet is not None and trainable != "all":
            raise UserError(f"learner.trainable={trainable} has no effect with pet={self.pet.kind}: the blocks stand still")
        self.tuned = model if self.pet is None else self.pet  # what is trained, saved and put back
        self.epochs, self.batch_size = runtime.epochs(epochs), batch_size
        self.recipe = Recipe(optimizer, betas=(betas[0], betas[1]), weight_decay=weight_decay, schedule=schedule, clip=clip)
        self.steps = Steps(runtime, trainable=whole(trainable))
        self.start = detached(self.tuned.state_dict()) if data == "union" else None

    @staticmethod
    def capabilities_of(data: str = "new", select: Any = None, **options: Any) -> Capabilities:
        """Joint training keeps all data; selection reads a task's lines first, that of LESS target lines too."""
        kept = {"stores_all_data": data == "union", "needs_random_access": select is not None}
        return Capabilities(asks="next_token", needs_target=getattr(selection(select), "needs_target", False), **kept)

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train on the task; jointly: from the start on all tasks so far."""
        train: Any = experience.train
        if self.start is not None:
            self.tuned.load_state_dict(self.start)
            train = TextData.join([*experience.past, train])
        kept = {}
        if self.select is not None:
            with self.runtime.phase("select"):
                scores = self.select.scores(self.model, experience, self.runtime)
            train = train.subset(chosen(scores, self.select.kept))
            kept = {"kept": float(len(train))}
        self.model.train()
        self.tuned.train()

        def loss(batch: TextBatch) -> Tensor:
            return answer_loss(self.model, batch, self.targets)

        batches = shuffled(train, self.batch_size, self.epochs, self.runtime.key("train"))
        with self.steps.around(self.model, {"model": self.model}, loss, new=loss) as (total, hooks):  # type: ignore[arg-type]
            groups = groups_of((self.tuned, self.lr))
            return fit(self.runtime, "train", self, groups, total, batches, self.recipe, **hooks) | kept

    def next_token(self, batch: TextBatch) -> Tensor:
        """Scores of the token after each: [B, L] -> [B, L, V]."""
        self.model.eval()
        self.tuned.eval()
        return self.model(batch.tokens)

    def state_dict(self) -> dict[str, Any]:
        """What is trained (what it was before the first task comes from the model itself)."""
        return {"model": self.tuned.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tuned.load_state_dict(state["model"])
