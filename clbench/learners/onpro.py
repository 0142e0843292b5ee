"""OnPro: Online Prototype Learning for Online Continual Learning (Wei, Ye, Huang, Zhang & Shan, ICCV 2023, arXiv 2308.00301).

Images are seen in V turned copies (`views`) and each copy in two views: plain, and a random flip, grey, crop. P are unit
projections, F windows of as many coordinates of unit features, drawn anew in each step. From the second experience on

    loss = CE(memory, mixed) + I(new) + I(memory, mixed) + E(new) + E(memory)

I  instances: softmax over s = sim_lambda (P F^T + P P^T) / ins_t. New: twice the mean over the others of the anchor's class and
   copy, plus the same image's other view; self is left out. Memory: the mean over the class and copy, self included.
E  online prototype equilibrium: the mean projection of each class in each view; every prototype finds the one of the other view
   among all others, at temperature proto_t (NT-Xent). Of copies that are not turned.
Adaptive prototypical feedback: of m = min(replay, per_class x classes seen) images (1 - base_rate) m are pairs of two classes,
   drawn with the shares softmax(1 / |p_a - p_b|) of the prototypes p that the memory had in the step before, and mixed by
   lambda ~ Beta(0.4, 0.4); the rest are ordinary draws, mixed with each other by lambda ~ U(0, mix_upper). Both: with
   probability mix_p. E(memory) sees ordinary draws that are not mixed.
In the first experience: CE(new) + I(new) + E(new) + E(memory). The new images have no cross-entropy afterwards.

views  1: no copy is turned. 4: quarter turns. 16: these of four images whose left and right half is turned by 180 degrees or
       not (as released): 16 times the cost, 256 forward passes of the batch in the paper's setting
start  "second_experience" (released): where CE, I and feedback of the memory begin; "second_batch": needs no boundaries

Deviations: a mixed image is a class of its own in I (released: the number (1 - lambda) y + lambda y', which may be another
class's); pairs are of classes that the memory holds; the mean over an anchor's class leaves self out of its divisor; coins of
mixing are an image's own; features narrower than 128 are projected to their own width; released only: 1e-8 on probabilities in
I, sim_lambda 1 and draws of 64 (whatever `per_class`) in the first experience, nothing mixed in the first batch of a later one.
`sim_lambda` 0.5 is CIFAR-10's.
Default rates are for pre-trained backbones (released: Adam 5e-4 from scratch; base_rate / mix_p 0.75 / 0.6 on CIFAR-10).
Published, CIFAR-10, 200 and 500 stored: 65.5 and 72.6 %; CIFAR-100, 1000 and 2000: 30.0 and 35.9 % (as quoted, not checked).
"""

from __future__ import annotations

import itertools
from dataclasses import replace as changed
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.learners.scr import WIDTH, projector
from clbench.models.backbone import Backbone
from clbench.models.heads import OnlineHead
from clbench.streams import rng
from clbench.training.contrastive import equilibrium, instance_loss, mild_view
from clbench.training.fit import Recipe, fit
from clbench.training.online import OnlineBatch, OnlineStream, Start, grow, labels, scores
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore
from clbench.training.stream_memory import allowed_stream_memory


def turned(x: Tensor, views: int) -> Tensor:
    """Copies of images [B, C, S, S], copy by copy -> [V B, C, S, S]; the first is the image itself."""
    if views == 16:
        left, right = x.tensor_split(2, dim=3)
        halves = itertools.product((left, left.rot90(2, (2, 3))), (right, right.rot90(2, (2, 3))))
        x = torch.cat([torch.cat(pair, dim=3) for pair in halves])
    return x if views == 1 else torch.cat([x.rot90(turn, (2, 3)) for turn in range(4)])


def shares(prototypes_CP: Tensor, number: int, key: int) -> list[int]:
    """How many of `number` pairs each pair of classes has, in the order of itertools.combinations.

    Rounded; what is missing then goes to pairs at random, what is too much is taken from some.
    """
    weight = (1 / torch.pdist(prototypes_CP.double().cpu()).clamp_min(1e-9)).softmax(0)
    found = (weight * number).round().long().numpy()
    missing = number - int(found.sum())
    order = rng.permutation(key, len(found))
    while missing:
        among = order if missing > 0 else order[found[order] > 0]
        found[among[: abs(missing)]] += 1 if missing > 0 else -1
        missing = number - int(found.sum())
    return found.tolist()


def mixed(x: Tensor, y: Tensor, m: int, key: int, chance: float, upper: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the memory trains: images [m, C, S, S], two labels [m] of each, share of the second [m].

    x [m + 2 pairs, C, S, S] and y are m ordinary draws, first and second partners of the pairs.
    """
    pairs = (len(x) - m) // 2

    def drawn(word: str) -> np.ndarray:
        return rng.uniform(rng.key(key, word), np.arange(m))

    ordinary = torch.from_numpy(rng.permutation(rng.key(key, "kept"), m)[: m - pairs])
    other = ordinary[torch.from_numpy(rng.permutation(rng.key(key, "partner"), m - pairs))]
    first = torch.cat([ordinary, torch.arange(m, m + pairs)]).to(y.device)
    second = torch.cat([other, torch.arange(m + pairs, len(x))]).to(y.device)
    share = np.where(np.arange(m) < m - pairs, upper * drawn("uniform"), betaincinv(0.4, 0.4, drawn("beta")))
    lam = torch.from_numpy(share * (drawn("coin") < chance)).to(x)
    wide = lam[:, None, None, None]
    return (1 - wide) * x[first] + wide * x[second], y[first], y[second], lam


class Feedback(OnlineStream):
    """The stream with draws of the learner's own, which follow its prototypes."""

    def __init__(self, learner: OnPro, experience: Experience):
        super().__init__(learner, experience, replay=learner.replay)
        self.choose, self.mixes = learner.choose, learner.start == "second_batch" or experience.index > 0

    def draw(self, key: int) -> tuple[np.ndarray, Any]:
        """Slots of a draw [R] and its samples."""
        rows = self.choose(key, self.mixes)
        return rows, self.memory.batch(rows, self.data, None) if len(rows) else None


class OnPro:
    """State: backbone, head with the classes that have appeared, projector, memory, its prototypes [K, P] (0: none)."""

    capabilities: ClassVar[Capabilities] = Capabilities(stores_exemplars=True, anytime=True)

    @staticmethod
    def capabilities_of(*, start: str = "second_experience", **options: Any) -> Capabilities:
        """What refers to experiences must be told where they end."""
        return changed(OnPro.capabilities, needs_boundaries=start == "second_experience")

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        views: Literal[1, 4, 16] = 1,  # turned copies of each image
        start: Start = "second_experience",
        base_rate: float = 0.9,  # share of the memory's images that are ordinary draws
        mix_p: float = 0.2,
        mix_upper: float = 0.6,
        ins_t: float = 0.07,
        proto_t: float = 0.5,
        sim_lambda: float = 1.0,
        mirror: bool = True,  # whether views may be flipped
        memory: int | None = None,  # samples; null: what the scenario's budget allows
        replay: int = 64,  # most samples of a draw
        per_class: int = 7,  # most of them for each class seen
        updates: float = 1.0,  # on each batch of the stream; below 1: some batches have none
        lr: float = 5e-4,  # head and projector
        backbone_lr: float = 1e-4,
        epochs: int | None = None,
        batch_size: int = 10,
        weight_decay: float = 1e-4,
        schedule: Schedule = constant,
    ):
        if views not in (1, 4, 16):
            raise UserError(f"learner.views={views} must be 1, 4 or 16")
        if start not in get_args(Start):
            raise UserError(f"unknown learner.start={start}: choose {' or '.join(get_args(Start))}")
        for name, value in (("base_rate", base_rate), ("mix_p", mix_p), ("mix_upper", mix_upper)):
            if not 0 <= value <= 1:
                raise UserError(f"learner.{name}={value} must lie in 0..1")
        if ins_t <= 0 or proto_t <= 0 or replay < 1 or per_class < 1:
            raise UserError(
                f"learner.ins_t={ins_t} and learner.proto_t={proto_t} must be above 0, "
                f"learner.replay={replay} and learner.per_class={per_class} at least 1"
            )
        self.start: Start = start
        self.model, self.runtime, self.views, self.mirror = model, runtime, views, mirror
        self.base_rate, self.mix_p, self.mix_upper = base_rate, mix_p, mix_upper
        self.ins_t, self.proto_t, self.sim_lambda = ins_t, proto_t, sim_lambda
        self.epochs, self.batch_size, self.updates, self.augment = runtime.epochs(epochs), batch_size, updates, "none"
        self.replay, self.per_class, self.lr, self.backbone_lr = replay, per_class, lr, backbone_lr
        self.recipe = Recipe("adam", betas=(0.9, 0.99), weight_decay=weight_decay, schedule=schedule)
        self.width = min(WIDTH, model.num_features)
        self.head = OnlineHead(model.num_features).to(runtime.device)
        self.projector = projector(model.num_features, runtime.generator("projector"), self.width).to(runtime.device)
        self.memory = allowed_stream_memory(runtime, "reservoir", memory)
        self.prototypes_KP = torch.zeros(0, self.width, device=runtime.device)

    def learn(self, experience: Experience) -> dict[str, float]:
        """One pass (or what the budget allows)."""
        grow(self, experience)
        self.prototypes_KP = F.pad(self.prototypes_KP, (0, 0, 0, experience.num_seen - len(self.prototypes_KP)))
        self.model.train()
        stream, profile = Feedback(self, experience), experience.train.pipeline.profile  # type: ignore[attr-defined]

        def loss(batch: OnlineBatch) -> Tensor:
            y, m = labels(batch.new), self.draw_size()
            total, p = self.instances(batch.new.x, y, rng.key(batch.key, "new"), profile, alone=True)
            total = total + equilibrium(p, y, self.proto_t)[0]
            if batch.old is not None and stream.mixes:
                x, a, b, lam = mixed(batch.old.x, labels(batch.old), m, batch.key, self.mix_p, self.mix_upper)
                own = torch.where(lam > 0, len(self.prototypes_KP) + torch.arange(len(a), device=a.device), a)
                total = total + self.instances(x, own, rng.key(batch.key, "old"), profile, alone=False)[0]
            else:
                x, a, b, lam = batch.new.x, y, y, torch.zeros(len(y), device=y.device)
            z = scores(self, mild_view(x, rng.key(batch.key, "answer"), profile, self.mirror))
            losses = [F.cross_entropy(z, target, reduction="none") for target in (a, b)]
            total = total + ((1 - lam) * losses[0] + lam * losses[1]).mean()
            if batch.old is not None:
                total = total + self.of_memory(batch.old.x[:m], labels(batch.old)[:m], batch.key, profile)
            return total

        groups = groups_of((self.model, self.backbone_lr), (self.head, self.lr), (self.projector, self.lr))
        log = fit(self.runtime, "train", self, groups, loss, stream, self.recipe, after_step=stream.store)
        return {**log, "exemplars": float(len(self.memory))}

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, C, S, S] -> unit features [B, D], unit projections [B, P]."""
        f = self.model.features(x)
        return F.normalize(f, dim=1), F.normalize(self.projector(f), dim=1)

    def instances(self, x: Tensor, y: Tensor, key: int, profile: Any, alone: bool) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """I of images [B, C, S, S] of classes y [B], and both views' projections [B, P] of those that are not turned."""
        copies = turned(x, self.views)
        f, p = self.project(torch.cat([copies, mild_view(copies, rng.key(key, "view"), profile, self.mirror)]))
        begin = rng.key(key, "window") % (f.shape[1] - self.width + 1)
        s = self.sim_lambda * (p @ f[:, begin : begin + self.width].T + p @ p.T) / self.ins_t
        classes = int(y.max()) + 1
        y_copies = torch.cat([y + classes * copy for copy in range(self.views)])
        return instance_loss(s, y_copies, alone), (p[: len(x)], p[len(copies) : len(copies) + len(x)])

    def of_memory(self, x: Tensor, y: Tensor, key: int, profile: Any) -> Tensor:
        """E of the memory's ordinary draw; its prototypes are those that the next draw follows."""
        _, p = self.project(torch.cat([x, mild_view(x, rng.key(key, "equilibrium"), profile, self.mirror)]))
        loss, classes, prototypes = equilibrium((p[: len(x)], p[len(x) :]), y, self.proto_t)
        self.prototypes_KP = torch.zeros_like(self.prototypes_KP)
        self.prototypes_KP[classes] = prototypes
        return loss

    def draw_size(self) -> int:
        """Images of the memory that take part in an update: m."""
        return min(self.replay, self.per_class * int(self.head.seen_K.sum()), len(self.memory))

    def choose(self, key: int, mixes: bool) -> np.ndarray:
        """Slots of m ordinary draws; then first, then second partners of the pairs, if there are some."""
        m = self.draw_size()
        rows = self.memory.rows(rng.key(key, "ordinary"), m)
        known = [c for c in np.unique(self.memory.y).tolist() if bool(self.prototypes_KP[c].any())]
        number = m - int(m * self.base_rate)
        if not mixes or len(known) < 2 or not number:
            return rows
        first, second = [], []
        pairs = itertools.combinations(known, 2)
        for (a, b), count in zip(pairs, shares(self.prototypes_KP[known], number, rng.key(key, "shares")), strict=True):
            for chosen, c in ((first, a), (second, b)):
                slots = np.flatnonzero(self.memory.y == c)
                chosen.append(slots[rng.integers(rng.key(key, "pair", a, b, c), count, len(slots))])
        return np.concatenate([rows, *first, *second])

    def predict(self, batch: Batch) -> Tensor:
        """Logits [B, num_seen]; a class that has not appeared has the lowest."""
        self.model.eval()
        return scores(self, batch)

    def state_dict(self) -> dict[str, Any]:
        return collect(self, "model", "head", "projector", "memory", "prototypes_KP")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)
