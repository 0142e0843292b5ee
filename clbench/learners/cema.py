"""CEMA: cloud-edge elastic model adaptation by selective entropy distillation (Chen, Niu, Wang, Xu, Song & Tan, ICLR 2024,
arXiv 2402.17316).

A small network at the edge answers and never runs backwards. It uploads some of each test batch; in the cloud a stronger
network (`teacher`) and a copy of the small one adapt on them, and scale and shift of the normalisation layers come back.
Edge: of a batch with entropies H_i those are uploaded with  E_min < H_i < E_max.
Cloud: for every 32 uploads x (`uploads`), which the memory of the latest ones has taken in as well, with weights of a sample
that are constants of the gradient, w(H) = exp(margin ln K - H),
  1. one step of the teacher on  mean w(H(t)) H(t),  t = teacher(x)
  2. one step of the edge on x and 3 times as many uploads from the memory (`replayed`), with z and t the logits of both, on
     entropy mean w(H(z)) H(z) + kl mean w(H(t)) KL(softmax t | softmax z) + pseudo mean w(H(t)) CE(argmax t, z)
Answers are those of the edge before the step; `uploads` and `seen` of a set are in the record's rows `spent`.

variant  paper (default): E_max = margin ln K times the mean entropy of all test samples before this batch, as a share of that
         of the first batch; E_min = low ln K; the memory is drawn from as soon as it holds something.
         official, as the release's configuration runs: E_max = margin ln K and no E_min (both criteria are in its code,
         switched off); EATA's second criterion instead, |cos(p_i, p)| < similarity, but for the first batch with candidates;
         nothing is drawn before the memory holds 256, and from then on a batch that fills no 32 has a step 2. on draws alone
statistics  "renorm" (the release): BatchNorm of each network normalises by moving averages (momentum 0.1) of the statistics of
         what the cloud trains on, begun with the first batch that it sees (batch renormalisation); "batch": the batch's own
teacher  a network like `model` (`+model@learner.teacher=resnet18_slim`), or null: a copy of `model`, a control that is no
         stronger. Both are trained on the source in one `fit`, on the same batches at the same rates: no image is visited
         twice, the teacher is stronger by its size alone, and its bytes count. Published: a pre-trained ResNet-101

Of the paper its two algorithms were read, not its equations: losses and weights are the release's, the threshold is the one
of the release's code with every factor in `margin`, low 0.02 is as recalled. K are the classes (the release: 1000, written
out). Uploads are raw test images and count as exemplars: memory=null holds what the budget allows (the release: 10,000).
Constants are the release's (SGD with momentum 0.9). Its script builds both networks anew for every corruption: reset=set.
The released code ran beside variant=official, with both networks of `convnet` and `resnet18_slim`: the same 557 uploads of 900
images, weights within 2e-5, all 900 predictions equal. Published numbers: none read.
"""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from clbench.interfaces import Batch, Capabilities, Experience, Schedule, UserError
from clbench.learners.tent import Tent
from clbench.models.backbone import Backbone
from clbench.models.heads import LinearHead, grow
from clbench.streams import rng
from clbench.streams.images.data import shuffled
from clbench.training.adaptation import Adapted, Reset, affine, batch_statistics, begins_anew, entropy, renormalised
from clbench.training.fit import Recipe, fit
from clbench.training.memory import allowed_memory
from clbench.training.runtime import Runtime
from clbench.training.schedules import constant
from clbench.training.state import collect, groups_of, restore

KEEP = 0.9  # of the mean answer, when new ones come
FROM = 256  # uploads from which the release draws


class Uploads:
    """The latest uploads, of which the last `waiting` have had no step yet. `len` counts them."""

    def __init__(self, limit: int):
        self.limit, self.waiting = limit, 0
        self.x: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.x is None else len(self.x)

    def num_bytes(self) -> int:
        """Of the images."""
        return 0 if self.x is None else self.x.numel() * self.x.element_size()

    def add(self, x: Tensor) -> None:
        """Images [R, C, H, W]; the oldest go."""
        self.waiting += len(x)
        self.x = (x if self.x is None else torch.cat([self.x, x]))[-max(self.limit, self.waiting) :]

    def take(self, number: int) -> Tensor:
        """The next that wait [number, C, H, W]."""
        assert self.x is not None
        first = len(self.x) - self.waiting
        self.waiting -= number
        return self.x[first : first + number]

    def draw(self, number: int, generator: torch.Generator) -> Tensor:
        """Some at random, as many as there are at most [number, C, H, W]."""
        assert self.x is not None
        held = self.x[-self.limit :]
        return held[torch.randperm(len(held), generator=generator)[:number].to(held.device)]

    def state_dict(self) -> dict[str, Any]:
        """Images, and how many wait."""
        return {"x": self.x, "waiting": self.waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.x, self.waiting = state["x"], state["waiting"]


class Selection:
    """What the edge uploads. `limits` and the comparison follow what came before; `variant` and the numbers as in `Cema`."""

    def __init__(self, official: bool, margin: float, low: float | None, similarity: float | None):
        self.official, self.margin = official, margin
        self.low = (0.0 if official else 0.02) if low is None else low
        self.similarity = (0.05 if official else 2.0) if similarity is None else similarity
        for name, value in (("margin", margin), ("similarity", self.similarity)):
            if not 0 < value < math.inf:
                raise UserError(f"learner.{name} must be a finite number above 0, got {value}")
        if not 0 <= self.low < math.inf:
            raise UserError(f"learner.low must be a finite number from 0, got {self.low}")
        self.begin()

    def begin(self) -> None:
        """Nothing was seen yet."""
        self.sum, self.n, self.first = 0.0, 0, 0.0  # of entropies of all test samples; mean of the first batch
        self.mean_K: Tensor | None = None

    def limits(self, classes: int) -> tuple[float, float]:
        """E_min and E_max of the next batch, nats."""
        drift = 1.0 if self.official or not self.first else self.sum / self.n / self.first
        return self.low * math.log(classes), self.margin * math.log(classes) * drift

    def rows(self, z_BK: Tensor) -> Tensor:
        """Rows that are uploaded, of a batch's logits [R]."""
        entropy_B, (least, most) = entropy(z_BK), self.limits(z_BK.shape[1])
        self.first = self.first if self.n else float(entropy_B.mean())
        self.sum, self.n = self.sum + float(entropy_B.sum()), self.n + len(entropy_B)
        rows = ((entropy_B < most) & (entropy_B > least if least else True)).nonzero()[:, 0]
        p_RK = z_BK[rows].softmax(1)
        if self.similarity > 1 or not len(rows):
            return rows
        if self.mean_K is None:
            self.mean_K = p_RK.mean(0)
            return rows
        unlike = F.cosine_similarity(self.mean_K[None], p_RK).abs() < self.similarity
        if unlike.any():
            self.mean_K = KEEP * self.mean_K + (1 - KEEP) * p_RK[unlike].mean(0)
        return rows[unlike]

    def state_dict(self) -> dict[str, Any]:
        """Sums and the mean answer."""
        return {"sum": self.sum, "n": self.n, "first": self.first, "mean_K": self.mean_K}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.sum, self.n, self.first, self.mean_K = (state[name] for name in ("sum", "n", "first", "mean_K"))


class Cema(Tent):
    """State: both networks and heads, what adapts of each with its moments, statistics, uploads, entropies, counts."""

    capabilities: ClassVar[Capabilities] = Capabilities(transductive=True, adapts_at_test=True, stores_exemplars=True)

    def __init__(
        self,
        model: Backbone,
        runtime: Runtime,
        *,
        variant: Literal["paper", "official"] = "paper",
        teacher: Backbone | None = None,  # the network in the cloud; null: a copy of `model`
        margin: float = 0.4,  # E_max as a share of ln K
        low: float | None = None,  # E_min as a share of ln K; null: 0.02 (paper), 0 (official)
        similarity: float | None = None,  # above 1: all are unlike; null: 2 (paper), 0.05 (official)
        entropy: float = 3.0,  # weights of the three terms of the edge
        kl: float = 3.0,
        pseudo: float = 1.0,
        uploads: int = 32,  # of a step of the cloud
        replayed: int = 3,  # times as many that the memory adds
        memory: int | None = None,  # latest uploads held; null: what the scenario's budget allows
        statistics: Literal["renorm", "batch"] = "renorm",
        norms: Literal["all", "batch"] = "all",
        reset: Reset = "never",  # when adaptation starts from the source again
        adapt_optimizer: Literal["adam", "sgd"] = "sgd",
        adapt_lr: float = 2.5e-3,
        teacher_adapt_lr: float = 2.5e-4,
        lr: float = 0.01,
        backbone_lr: float = 0.001,
        epochs: int | None = None,
        batch_size: int = 128,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = constant,
    ):
        _check(variant, statistics, {"entropy": entropy, "kl": kl, "pseudo": pseudo}, uploads, replayed)
        self.official, self.renorm, self.margin = variant == "official", statistics == "renorm", margin
        self.selection = Selection(self.official, margin, low, similarity)
        self.weights, self.replayed = (entropy, kl, pseudo), replayed
        super().__init__(
            model, runtime, norms=norms, reset=reset, adapt_optimizer=adapt_optimizer, adapt_lr=adapt_lr, lr=lr,
            backbone_lr=backbone_lr, epochs=epochs, batch_size=batch_size, momentum=momentum, weight_decay=weight_decay,
            schedule=schedule,
        )  # fmt: skip
        self.teacher = _fitting(teacher, model, self.batch_norm_alone).to(runtime.device)
        self.teacher_head = LinearHead(self.teacher.num_features).to(runtime.device)
        self.guide = Adapted(Recipe(adapt_optimizer), teacher_adapt_lr)
        self.memory = Uploads(_room(runtime, memory))
        self.uploads = min(uploads, self.memory.limit)
        self.spent = {"seen": 0, "uploads": 0}  # test images, and those that left the edge
        self.begin()

    def learn(self, experience: Experience) -> dict[str, float]:
        """Train both networks on the source, batch by batch; adaptation starts anew."""
        self.adapted.begin({})
        self.guide.begin({})
        pairs = ((self.model, self.head), (self.teacher, self.teacher_head))
        for number, (net, head) in enumerate(pairs):
            words = ("head", "teacher")[: number + 1]
            grow(head, experience, lambda words=words: self.runtime.generator(*words))
            net.train()

        def loss(batch: Batch) -> Tensor:
            assert batch.y is not None
            edge, cloud = (F.cross_entropy(head(net.features(batch)), batch.y) for net, head in pairs)
            return edge + cloud

        batches = shuffled(experience.train, self.batch_size, self.epochs, self.runtime.key("train"))
        groups = [group for net, head in pairs for group in groups_of((net, self.backbone_lr), (head, self.lr))]
        log = fit(self.runtime, "train", self, groups, loss, batches, self.recipe)
        self.begin()
        return log

    def begin(self) -> None:
        """Edge and cloud from the source; nothing was seen yet."""
        super().begin()
        self.guide.begin(affine(self.teacher, self.batch_norm_alone))
        self.statistics: dict[str, dict[str, Tensor]] = {"edge": {}, "cloud": {}}
        self.memory = Uploads(self.memory.limit)
        self.selection.begin()
        self.draws = 0

    def normalised(self, place: Literal["edge", "cloud"], moves: bool) -> AbstractContextManager[None]:
        """How BatchNorm normalises there, and whether its averages move."""
        net = self.model if place == "edge" else self.teacher
        return renormalised(net, self.statistics[place], moves) if self.renorm else batch_statistics(net)

    def taught(self, x: Tensor) -> Tensor:
        """The teacher's logits under its weights as they are adapted [B, num_seen]."""
        return self.teacher_head(functional_call(self.teacher, self.guide.weights, (x,)))

    def predict(self, batch: Batch) -> Tensor:
        """Logits of the edge [B, num_seen]; changes the state."""
        self.model.eval()
        self.teacher.eval()
        if begins_anew(self.reset, batch):
            self.begin()
        x = batch.x
        with torch.no_grad(), self.normalised("edge", False):
            z = self.scores(x)
        rows = self.selection.rows(z)
        self.spent["seen"] += len(x)
        self.spent["uploads"] += len(rows)
        self.memory.add(x[rows])
        with torch.enable_grad():
            self.work()
        return z

    def work(self) -> None:
        """What the cloud does with the uploads that wait."""
        enough = min(FROM, self.memory.limit) if self.official else 1
        idle = self.memory.waiting < self.uploads
        while self.memory.waiting >= self.uploads:
            x = self.memory.take(self.uploads)
            with self.normalised("cloud", True):
                self.guide.step(_weighted(entropy(t := self.taught(x)), t, self.margin))
            if self.replayed and len(self.memory) >= enough:
                x = torch.cat([x, self._drawn(self.replayed)])
            self.distil(x)
        if idle and self.official and self.replayed and len(self.memory) > enough:
            self.distil(self._drawn(self.replayed + 1))

    def distil(self, x: Tensor) -> None:
        """One step of the edge towards the teacher on uploads [B, C, H, W]."""
        with torch.no_grad(), self.normalised("cloud", False):
            t = self.taught(x)
        with self.normalised("edge", True):
            z = self.scores(x)
        kl_B = F.kl_div(z.log_softmax(1), t.softmax(1), reduction="none").sum(1)
        of_loss = ((entropy(z), z), (kl_B, t), (F.cross_entropy(z, t.argmax(1), reduction="none"), t))
        terms = [_weighted(loss_B, logits, self.margin) for loss_B, logits in of_loss]
        self.adapted.step(torch.stack([w * term for w, term in zip(self.weights, terms, strict=True)]).sum())

    def _drawn(self, times: int) -> Tensor:
        """Uploads of the memory, `times` as many as a step has."""
        self.draws += 1
        key = rng.key(self.runtime.seed, "cema", self.draws)
        return self.memory.draw(times * self.uploads, torch.Generator().manual_seed(key >> 1))

    def state_dict(self) -> dict[str, Any]:
        names = ("adapted", "guide", "statistics", "memory", "selection", "draws", "spent")
        return collect(self, "model", "head", "teacher", "teacher_head", *names)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.runtime.device
        for name in ("adapted", "guide"):
            getattr(self, name).load_state_dict(state[name], device)
        restore(self, {name: value for name, value in state.items() if name not in ("adapted", "guide")})
        if self.memory.x is not None:
            self.memory.x = self.memory.x.to(device)


def _check(variant: str, statistics: str, weights: dict[str, float], uploads: int, replayed: int) -> None:
    """`UserError` for what no run can have."""
    if variant not in ("paper", "official"):
        raise UserError(f"unknown learner.variant={variant}: choose paper or official")
    if statistics not in ("renorm", "batch"):
        raise UserError(f"unknown learner.statistics={statistics}: choose renorm or batch")
    for name, value in weights.items():
        if not 0 <= value < math.inf:
            raise UserError(f"learner.{name} must be a finite number from 0, got {value}")
    if uploads < 2 or replayed < 0:
        raise UserError(f"learner.uploads={uploads} must be at least 2, learner.replayed={replayed} at least 0")


def _room(runtime: Runtime, memory: int | None) -> int:
    """Uploads that are held: what is wanted, or all that the budget allows."""
    limit = allowed_memory(runtime, "reservoir", memory).samples
    if limit is None or limit < 2:
        raise UserError(f"learner.memory must be a number of uploads from 2, got {memory}")
    return limit


def _weighted(loss_B: Tensor, z_BK: Tensor, margin: float) -> Tensor:
    """Mean of w(H(z)) loss."""
    return (loss_B * (margin * math.log(z_BK.shape[1]) - entropy(z_BK.detach())).exp()).mean()


def _fitting(teacher: Backbone | None, model: Backbone, batch_norm_alone: bool) -> Backbone:
    """The teacher, which sees the pixels of `model` in its precision; `UserError` where it wants others, or cannot adapt."""
    teacher = copy.deepcopy(model) if teacher is None else teacher
    mine, its, name = model.profile, teacher.profile, teacher.identity["name"]
    if (its.size, tuple(its.mean), tuple(its.std)) != (mine.size, tuple(mine.mean), tuple(mine.std)):
        raise UserError(
            f"learner.teacher={name} reads images of {its.size} pixels with mean {tuple(its.mean)}, "
            f"model {model.identity['name']} of {mine.size} with {tuple(mine.mean)}: they must see the same"
        )
    if not affine(teacher, batch_norm_alone):
        raise UserError(f"learner.teacher={name} has no normalisation layer with a scale that learner.norms names")
    teacher.precision, teacher.passes = model.precision, model.passes
    return teacher
