"""Which lines of a text task are trained on (`learner.select`): a share `kept` of them, by a score.

random  drawn: what a score has to be better than
ifd     IFD, instruction-following difficulty (Li et al., NAACL 2024, arXiv 2308.12032; code: tianyi-lab/Cherry_LLM): the mean
        loss of an answer behind its prompt / behind the last token of the prompt alone. Lines above `most` are dropped, those
        with the highest score among the others are kept: the prompt helps, but not much. A ratio of losses, not of perplexities
less    LESS (Xia et al., ICML 2024, arXiv 2402.04333; code: princeton-nlp/LESS): a fresh low-rank pair is trained on the share
        `warm` of the lines for `epochs`. After each epoch, with Adam's moments m, v as they stand, and g a line's gradient,

            u = (b1 m + (1 - b1) g) / sqrt(b2 v + (1 - b2) g^2 + eps)       of a line
            score = mean over epochs of < P u / |P u|, P g' / |P g'| >      with a target line's gradient g'

        averaged over the target lines of a task, the highest of tasks counts. P are random signs, drawn once from the seed.
        (Adam's correction of the bias is one factor for all of u, which the normalisation takes out again but for eps.)
        Target lines are the stream's (`scenario.target`)

Deviations: the first state of IFD's model is trained on lines drawn at random (`warm`, one epoch), there on 100 clusters x 10;
the header of an answer alone is the last token of the prompt; LESS adapts the MLP too, with rank 4. Selection is done on a copy
of the model, and is no visit of the budget. Fewer lines make fewer steps, as in both papers. Published numbers: none read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from clbench.interfaces import Experience, UserError
from clbench.models.pet import Pet
from clbench.models.pet_modules import lora
from clbench.streams import rng
from clbench.streams.tokens.text_data import TextBatch
from clbench.training.answer_loss import answer_loss
from clbench.training.chosen_layers import option
from clbench.training.runtime import Runtime
from clbench.training.steps import made

AT_ONCE = 64
LAYERS = ("q", "k", "v", "proj", "fc1", "fc2")
BETAS, EPS = (0.9, 0.999), 1e-8


class Random:
    """A share of the lines, drawn."""

    needs_target = False

    def __init__(self, *, kept: float = 0.1):
        self.kept = _share("kept", kept)

    def scores(self, model: Any, experience: Experience, runtime: Runtime) -> np.ndarray:
        """Numbers drawn evenly [N]."""
        return rng.uniform(runtime.key("select"), np.arange(len(experience.train)))


class Ifd:
    """Instruction-following difficulty of each line."""

    needs_target = False

    def __init__(self, *, kept: float = 0.1, warm: float = 0.1, most: float = 1.0, lr: float = 1e-3, batch_size: int = 16):
        self.kept, self.warm, self.most, self.lr, self.batch_size = _share("kept", kept), warm, most, lr, batch_size
        if not 0 <= warm <= 1 or not most > 0:
            raise UserError(f"learner.select.ifd: warm must be from 0 to 1 and most above 0, got {warm} and {most}")

    def scores(self, model: Any, experience: Experience, runtime: Runtime) -> np.ndarray:
        """IFD of each line [N]; minus infinity above `most`."""
        twin, data = copy.deepcopy(model), experience.train
        if rows := round(self.warm * len(data)):
            optimizer = torch.optim.Adam(_trainable(twin), self.lr)
            twin.train()
            for batch in _drawn(data, rows, self.batch_size, runtime.key("warm"), runtime.key("lines")):
                runtime.check_stop()
                optimizer.zero_grad()
                answer_loss(twin, batch).backward()
                optimizer.step()
        found = []
        for batch in data.test_batches(AT_ONCE):
            runtime.check_stop()
            found.append(difficulty(twin.eval(), batch))  # type: ignore[arg-type]
        ratio = torch.cat(found).double().cpu().numpy()
        return np.where(ratio > self.most, -np.inf, ratio)


class Less:
    """Similarity of each line's step with the gradients of target lines."""

    needs_target = True

    def __init__(
        self,
        *,
        kept: float = 0.05,
        warm: float = 0.05,
        epochs: int = 4,
        rank: int = 4,
        size: int = 512,  # numbers that a gradient is projected to
        lr: float = 3e-3,
        batch_size: int = 16,
    ):
        self.kept, self.warm, self.epochs = _share("kept", kept), _share("warm", warm), epochs
        self.rank, self.size, self.lr, self.batch_size = rank, size, lr, batch_size
        if min(epochs, rank, size) < 1:
            raise UserError(f"learner.select.less: epochs, rank and size must be at least 1, got {epochs}, {rank}, {size}")

    def scores(self, model: Any, experience: Experience, runtime: Runtime) -> np.ndarray:
        """Mean over epochs of the similarity with the target task that is nearest [N]."""
        assert experience.target is not None
        twin = copy.deepcopy(model)
        pet = lora(twin, runtime, rank=self.rank, targets=LAYERS)
        optimizer = torch.optim.Adam(pet.values.parameters(), self.lr, BETAS, EPS)
        rows, total = max(1, round(self.warm * len(experience.train))), torch.zeros(len(experience.train))
        owner = torch.from_numpy(np.asarray(experience.target.y))
        for epoch in range(self.epochs):
            pet.train()
            order = rng.key(runtime.key("warm"), epoch)
            for batch in _drawn(experience.train, rows, self.batch_size, order, runtime.key("lines")):
                runtime.check_stop()
                optimizer.zero_grad()
                answer_loss(twin, batch).backward()
                optimizer.step()
            pet.eval()
            state = {n: optimizer.state[p] for n, p in pet.values.items()}
            key = runtime.key("projection")
            steps = self._projected(twin, pet, experience.train, state, key, runtime)
            wanted = self._projected(twin, pet, experience.target, None, key, runtime)
            total += nearest(steps @ wanted.T, owner).cpu() / self.epochs
        return total.double().numpy()

    def _projected(self, model: Any, pet: Pet, data: Any, moments: Any, key: int, runtime: Runtime) -> Tensor:
        """Projected directions of every line, of length 1 [N, size]: Adam's with `moments`, else gradients."""
        parts = []
        for batch in data.test_batches(AT_ONCE):
            runtime.check_stop()
            grads = row_gradients(model, pet, batch)
            if moments is not None:
                grads = {n: adam_direction(g, moments[n]["exp_avg"], moments[n]["exp_avg_sq"]) for n, g in grads.items()}
            parts.append(F.normalize(projected(grads, self.size, key), dim=1))
        return torch.cat(parts)


KINDS: dict[str, type] = {"random": Random, "ifd": Ifd, "less": Less}


def selection(select: Any) -> Any:
    """What `learner.select` says, None for none; `UserError` for a word or an option that there is not."""
    if select is None:
        return None
    word, options = option(select)
    if word not in KINDS:
        raise UserError(f"unknown learner.select={word}: choose {', '.join(KINDS)} or null")
    return made(KINDS[word], f"select.{word}", options)


def chosen(scores: np.ndarray, kept: float) -> np.ndarray:
    """Rows of the highest scores [N], a share `kept` of all and at least one, in their order; of equal ones the first.

    Lines at minus infinity are never among them, so there may be fewer; `UserError` where there is none.
    """
    order = np.argsort(-scores, kind="stable")[: max(1, round(kept * len(scores)))]
    order = order[scores[order] > -np.inf]
    if not len(order):
        raise UserError("learner.select.ifd drops every line: raise most")
    return np.sort(order)


@torch.no_grad()
def difficulty(model: Callable[[Tensor], Tensor], batch: TextBatch) -> Tensor:
    """IFD of each line of a batch [B]."""
    starts = [int(n) - 1 for n in batch.prompts]
    alone = [row[first:n].cpu().numpy() for row, first, n in zip(batch.tokens, starts, batch.lengths.tolist(), strict=True)]
    bare = TextBatch.of_lines(alone, np.ones(len(alone), np.int64), batch.tokens.device)
    return row_nats(model, batch) / row_nats(model, bare)


def row_nats(model: Callable[[Tensor], Tensor], batch: TextBatch) -> Tensor:
    """Mean nats of the answer of each line [B]."""
    z, wanted, asked = model(batch.tokens[:, :-1]), batch.tokens[:, 1:], batch.asked
    each = F.cross_entropy(z.float().flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)
    return (each * asked).sum(1) / asked.sum(1)


def row_gradients(model: Any, pet: Pet, batch: TextBatch) -> dict[str, Tensor]:
    """Gradients of each line's mean nats in the values of a module: name -> [B, ...]."""

    def loss(values: dict[str, Tensor], tokens: Tensor, asked: Tensor) -> Tensor:
        with pet.use(values):
            z = model(tokens[None, :-1])[0]
        each = F.cross_entropy(z.float(), tokens[1:], reduction="none")
        return (each * asked).sum() / asked.sum()

    values = {name: value.detach() for name, value in pet.values.items()}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no rule for vmap
        return vmap(grad(loss), in_dims=(None, 0, 0))(values, batch.tokens, batch.asked.float())


def adam_direction(g: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """What Adam would do for gradients g [B, ...] from moments m, v [...]: [B, ...]."""
    return (BETAS[0] * m + (1 - BETAS[0]) * g) / (BETAS[1] * v + (1 - BETAS[1]) * g.square() + EPS).sqrt()


def projected(grads: Mapping[str, Tensor], size: int, key: int) -> Tensor:
    """Gradients by name [B, ...] -> their products with `size` vectors of random signs [B, size]."""
    total: Any = 0.0
    for name in sorted(grads):
        flat = grads[name].flatten(1)
        draw = torch.Generator().manual_seed(rng.key(key, name) >> 1)
        signs = torch.randint(0, 2, (flat.shape[1], size), generator=draw, dtype=torch.int8).mul_(2).sub_(1)
        total = total + flat @ signs.to(flat)
    return total


def nearest(similar: Tensor, owner: Tensor) -> Tensor:
    """Similarities of lines with target lines [N, T], whose tasks are `owner` [T] -> [N]: the best task's mean."""
    tasks: Sequence[int] = owner.unique().tolist()
    return torch.stack([similar[:, owner == task].mean(1) for task in tasks]).amax(0)


def _drawn(data: Any, rows: int, size: int, key: int, lines: int) -> Iterator[TextBatch]:
    """An epoch in batches of `size` over `rows` lines of `data`, which the key `lines` chooses, in an order drawn by `key`."""
    order = rng.permutation(lines, len(data))[:rows][rng.permutation(key, rows)]
    for first in range(0, rows, size):
        yield data.batch(order[first : first + size])


def _trainable(model: Any) -> list[Tensor]:
    """What is trained of a model: the values of its modules, or its own weights."""
    values = [value for pet in getattr(model, "pets", ()) for value in pet.values.values()]
    return values or [p for p in model.parameters() if p.requires_grad]


def _share(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise UserError(f"learner.select: {name} must be a share above 0 and at most 1, got {value!r}")
    return float(value)
