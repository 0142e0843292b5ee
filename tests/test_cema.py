"""CEMA against a naive version of edge and cloud, its choice of uploads by hand, what the record says of it."""

import copy
import math

import numpy as np
import pytest
import torch
from small_networks import SmallTrial, backbone, convnet, mlp
from torch import nn

from clbench.evaluation.accuracy import evaluate, spent_of
from clbench.interfaces import Capabilities, UserError
from clbench.learners.cema import Cema, Selection, Uploads
from clbench.streams import rng
from clbench.streams.eval_sets import open_eval
from clbench.testing.contract import small_stream
from clbench.training.adaptation import renormalised
from clbench.training.state import detached, fingerprint

CAN = Capabilities(transductive=True, adapts_at_test=True, stores_exemplars=True)
ROTATED = [{"rotate": {"experiences": 3}}, {"test_time": {"batch_size": 9}}]
SHIFTED = small_stream(operators=ROTATED, budget={"epochs": 4, "exemplars": 20})
SETS = range(4)
MARGIN = 0.9


class Wide(nn.Sequential):
    """Two convolutions with BatchNorm, six times as wide as the edge's."""

    num_features = 32

    def __init__(self):
        layers = [nn.Conv2d(3, 36, 3, padding=1), nn.BatchNorm2d(36), nn.ReLU(), nn.AvgPool2d(2)]
        super().__init__(*layers, nn.Conv2d(36, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())

    def forward_features(self, x):
        return self(x)

    def forward_head(self, x, pre_logits=True):
        return x


def trained(wide=True, **options):
    more = {"teacher": backbone(Wide(), 3)} if wide else {}
    t = SmallTrial(convnet, Cema, scenario=SHIFTED, can=CAN, lr=0.1, backbone_lr=0.1, batch_size=12, **more, **options)
    learner, learn, pipeline = t.begin()
    learn(0)
    return t, learner, pipeline


def batches(pipeline):
    return [batch for j in SETS for batch, _ in open_eval(SHIFTED, j, pipeline).batches(9) if batch.x is not None]


def entropies(z):
    p = torch.exp(z) / torch.exp(z).sum(1, keepdim=True)
    return -(p * torch.log(p)).sum(1)


class Renorm(nn.Module):
    """Batch renormalisation without bounds, from its formula: x' = (x - mu_B) / s_B r + d, r and d without gradient."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias, self.eps = (
            nn.Parameter(norm.weight.detach().clone()),
            nn.Parameter(norm.bias.detach().clone()),
            norm.eps,
        )
        self.mu = self.var = None

    def forward(self, x):
        mu, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        if self.mu is None:
            self.mu, self.var = mu.detach().clone(), var.detach().clone()
        s, held = torch.sqrt(var + self.eps), torch.sqrt(self.var + self.eps)
        r, d = s.detach() / held, (mu.detach() - self.mu) / held
        one = lambda v: v[None, :, None, None]  # noqa: E731
        out = one(self.weight) * ((x - one(mu)) / one(s) * one(r) + one(d)) + one(self.bias)
        if self.training:
            self.mu, self.var = 0.9 * self.mu + 0.1 * mu.detach(), 0.9 * self.var + 0.1 * var.detach()
        return out


class Plain:
    """A network, its head, and SGD with momentum 0.9 on scales and shifts alone, by hand."""

    def __init__(self, net, head, lr):
        self.net, self.head, self.lr = copy.deepcopy(net), copy.deepcopy(head).requires_grad_(False), lr
        self.net.requires_grad_(False)
        for k, layer in enumerate(self.net):
            if isinstance(layer, nn.BatchNorm2d):
                self.net[k] = Renorm(layer)
        self.params = [p for layer in self.net if isinstance(layer, Renorm) for p in (layer.weight, layer.bias)]
        self.speed = [torch.zeros_like(p) for p in self.params]

    def __call__(self, x, train):
        self.net.train(train)
        return self.head(self.net(x))

    def step(self, loss):
        for p, v, g in zip(self.params, self.speed, torch.autograd.grad(loss, self.params), strict=True):
            v.mul_(0.9).add_(g)
            p.data -= self.lr * v


class Naive:
    """Both variants from the description: uploads in lists, one sample after another."""

    def __init__(self, learner, official, similarity):
        self.edge = Plain(learner.model.net, learner.head, learner.adapted.lr)
        self.cloud = Plain(learner.teacher.net, learner.teacher_head, learner.guide.lr)
        self.official, self.similarity, self.seed = official, similarity, learner.runtime.seed
        self.waiting, self.history, self.seen, self.first, self.mean, self.draws = [], [], [], None, None, 0

    def weight(self, z):
        return torch.exp(MARGIN * math.log(z.shape[1]) - entropies(z.detach()))

    def draw(self, number):
        self.draws += 1
        generator = torch.Generator().manual_seed(rng.key(self.seed, "cema", self.draws) >> 1)
        return [self.history[k] for k in torch.randperm(len(self.history), generator=generator)[:number].tolist()]

    def distil(self, images):
        x = torch.stack(images)
        with torch.no_grad():
            t = self.cloud(x, False)
        z = self.edge(x, True)
        p, q = torch.softmax(t, 1), torch.softmax(z, 1)
        kl = (p * (torch.log(p) - torch.log(q))).sum(1)
        ce = -torch.log(q)[torch.arange(len(q)), t.argmax(1)]
        self.edge.step(
            3 * (self.weight(z) * entropies(z)).mean() + 3 * (self.weight(t) * kl).mean() + (self.weight(t) * ce).mean()
        )

    def answer(self, x):
        with torch.no_grad():
            z = self.edge(x, False)
        h, log_k, chosen = entropies(z), math.log(z.shape[1]), []
        most = MARGIN * log_k * (1 if self.official or not self.seen else np.mean(self.seen) / self.first)
        self.first = float(h.mean()) if self.first is None else self.first
        self.seen += h.tolist()
        inside = [k for k in range(len(x)) if h[k] < most and (self.official or h[k] > 0.05 * log_k)]
        if self.official and inside:
            p = torch.softmax(z, 1)
            if self.mean is None:
                self.mean, chosen = p[inside].mean(0), inside
            else:
                cosine = [float(p[k] @ self.mean / p[k].norm() / self.mean.norm()) for k in inside]
                chosen = [k for k, c in zip(inside, cosine, strict=True) if c < self.similarity]
                self.mean = 0.9 * self.mean + 0.1 * p[chosen].mean(0) if chosen else self.mean
        else:
            chosen = inside
        self.waiting += [x[k] for k in chosen]
        self.history = (self.history + [x[k] for k in chosen])[-20:]
        stepped = False
        while len(self.waiting) >= 5:
            now, self.waiting, stepped = self.waiting[:5], self.waiting[5:], True
            t = self.cloud(torch.stack(now), True)
            self.cloud.step((self.weight(t) * entropies(t)).mean())
            self.distil(now + (self.draw(10) if len(self.history) >= (20 if self.official else 1) else []))
        if self.official and not stepped and len(self.history) > 20:
            self.distil(self.draw(15))
        return z, len(chosen)


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_against_a_naive_version(variant):
    options = {"low": 0.05} if variant == "paper" else {"similarity": 0.999}
    _, learner, pipeline = trained(
        variant=variant, margin=MARGIN, uploads=5, replayed=2, adapt_lr=0.05, teacher_adapt_lr=0.02, **options
    )
    naive, uploads, source = Naive(learner, variant == "official", 0.999), [], fingerprint(learner.source())
    for batch in batches(pipeline):
        before = learner.spent["uploads"]
        with torch.no_grad():
            z = learner.predict(batch)
        expected, number = naive.answer(batch.x)
        torch.testing.assert_close(z, expected, atol=2e-4, rtol=2e-3)
        uploads.append(number)
        assert learner.spent["uploads"] - before == number
    assert learner.spent["seen"] == 4 * 36 and 20 < sum(uploads) < 4 * 36 and naive.draws == learner.draws > 3
    for mine, plain in ((learner.adapted, naive.edge), (learner.guide, naive.cloud)):
        for a, b in zip(mine.weights.values(), plain.params, strict=True):
            torch.testing.assert_close(a.detach(), b.detach(), atol=2e-4, rtol=2e-3)
    assert fingerprint(learner.source()) == source and len(learner.memory) <= 20, "the source itself stays"
    moved = [float((a.detach() - learner.source()[n]).abs().max()) for n, a in learner.adapted.weights.items()]
    assert max(moved) > 1e-3


def test_limits_follow_the_mean_entropy_of_what_was_seen():
    """Two classes: entropies of logits (d, 0) by hand."""
    chosen = Selection(False, 0.5, 0.1, None)
    sure, unsure, between = [4.0, 0.0], [0.0, 0.0], [2.5, 0.0]
    h = {d: float(entropies(torch.tensor([[d, 0.0]]))) for d in (4.0, 2.5, 0.0)}
    z = torch.tensor([sure, unsure, between])
    assert chosen.limits(2) == pytest.approx((0.1 * math.log(2), 0.5 * math.log(2)))
    assert h[2.5] < 0.5 * math.log(2) and 0.1 * math.log(2) < h[4.0]
    assert chosen.rows(z).tolist() == [0, 2]
    assert chosen.limits(2)[1] == pytest.approx(0.5 * math.log(2)), "one batch is its own measure"
    assert chosen.rows(torch.tensor([sure, sure, sure])).tolist() == [0, 1, 2]
    first = (h[4.0] + h[0.0] + h[2.5]) / 3
    assert chosen.limits(2)[1] == pytest.approx(0.5 * math.log(2) * ((3 * first + 3 * h[4.0]) / 6) / first, rel=1e-5)
    assert Selection(False, 0.5, None, None).rows(torch.tensor([[9.0, 0.0]])).tolist() == [], "too little to learn from"
    assert Selection(True, 0.5, None, None).rows(torch.tensor([[9.0, 0.0]])).tolist() == [0]


def test_uploads_wait_and_the_oldest_go():
    held = Uploads(4)
    held.add(torch.arange(3.0).reshape(3, 1, 1, 1))
    assert held.take(2).flatten().tolist() == [0, 1] and held.waiting == 1
    held.add(torch.arange(3.0, 9).reshape(6, 1, 1, 1))
    assert len(held) == 7, "what waits is not thrown away"
    assert held.take(6).flatten().tolist() == [2, 3, 4, 5, 6, 7]
    drawn = held.draw(9, torch.Generator().manual_seed(0)).flatten().tolist()
    assert sorted(drawn) == [5, 6, 7, 8], "of the latest, each once"
    held.add(torch.zeros(0, 1, 1, 1))
    assert len(held) == 4 and held.num_bytes() == 16


@pytest.mark.parametrize("moves", [False, True])
def test_renormalisation_by_hand(moves):
    torch.manual_seed(0)
    net, averages = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval(), {}
    stored = detached(net.state_dict())
    x, later = torch.randn(7, 4), torch.randn(5, 4) * 3 + 1
    with renormalised(net, averages, moves):
        net(x)
        out = net(later)
    h, g = net[0](x), net[0](later)
    np.testing.assert_allclose(out.detach(), ((g - h.mean(0)) / (h.var(0) + 1e-5).sqrt()).detach(), atol=1e-5)
    share = 0.1 if moves else 0.0
    np.testing.assert_allclose(averages["1.mean"].flatten(), (h.mean(0) + share * (g.mean(0) - h.mean(0))).detach(), atol=1e-5)
    np.testing.assert_allclose(averages["1.var"].flatten(), (h.var(0) + share * (g.var(0) - h.var(0))).detach(), rtol=1e-4)
    assert fingerprint(net.state_dict()) == fingerprint(stored)
    np.testing.assert_allclose(net(x).detach(), (h / math.sqrt(1 + 1e-5)).detach(), atol=1e-6), "plain again"


def test_the_teacher_learns_the_source_in_the_same_visits():
    _, learner, pipeline = trained()
    assert learner.runtime.meter.visits == {"new": 4 * 72, "replayed": 0} and learner.runtime.meter.steps == 4 * 6
    right = {"edge": 0, "cloud": 0}
    for batch, y in open_eval(SHIFTED, 0, pipeline).batches(9):
        for place, net, head in (
            ("edge", learner.model.eval(), learner.head),
            ("cloud", learner.teacher.eval(), learner.teacher_head),
        ):
            right[place] += int((head(net.features(batch.x)).argmax(1) == y).sum())
    assert min(right.values()) > 12, f"{right} of 36, chance is 6"
    twin = trained(wide=False)[1]
    assert twin.teacher is not twin.model and twin.teacher.num_features == twin.model.num_features


def test_what_left_the_edge_is_counted_for_each_set():
    _, learner, pipeline = trained(margin=0.8, uploads=5)
    counts = evaluate(learner, [open_eval(SHIFTED, j, pipeline) for j in SETS], 6, 9, joined=False)
    spent = spent_of(counts)
    assert spent["seen"] == [36] * 4 and sum(spent["uploads"]) == learner.spent["uploads"] > 0
    assert len(set(spent["uploads"])) > 1 and all(0 <= n <= 36 for n in spent["uploads"])


def test_reset_and_resume():
    options = {"margin": 0.9, "uploads": 5, "adapt_lr": 0.05}
    t, learner, pipeline = trained(**options)
    first = [t.answers_of(learner, pipeline, j, 9) for j in (0, 1)]
    twin = t.start()[0]
    twin.load_state_dict(detached(learner.state_dict()))
    assert fingerprint(twin.state_dict()) == fingerprint(learner.state_dict())
    assert torch.equal(t.answers_of(twin, pipeline, 2, 9), t.answers_of(learner, pipeline, 2, 9))
    assert fingerprint(twin.state_dict()) == fingerprint(learner.state_dict())
    t, again, pipeline = trained(reset="set", **options)
    assert torch.equal(t.answers_of(again, pipeline, 0, 9), first[0])
    assert not torch.equal(t.answers_of(again, pipeline, 1, 9), first[1])
    fresh = trained(**options)[1]
    assert torch.equal(t.answers_of(fresh, pipeline, 2, 9), t.answers_of(again, pipeline, 2, 9))
    assert again.spent["seen"] == 3 * 36, "counts go on"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "code"}, r"learner\.variant=code: choose paper or official"),
        ({"statistics": "mine"}, r"learner\.statistics=mine"),
        ({"margin": 0.0}, r"learner\.margin must"),
        ({"low": -0.1}, r"learner\.low must"),
        ({"similarity": 0.0}, r"learner\.similarity must"),
        ({"kl": -1.0}, r"learner\.kl must"),
        ({"uploads": 1}, r"learner\.uploads=1"),
        ({"memory": 1}, r"learner\.memory must"),
        ({"memory": 21}, r"learner\.memory=21, the scenario's budget allows 20"),
        ({"reset": "always"}, r"learner\.reset"),
        ({"teacher": backbone(mlp(8))}, r"learner\.teacher=small has no normalisation layer"),
    ],
)
def test_refuses_in_one_line(options, words):
    with pytest.raises(UserError, match=words) as caught:
        trained(wide=False, **options)
    assert "\n" not in str(caught.value)


def test_the_teacher_must_see_the_same_pixels():
    other = backbone(Wide())
    other.profile = type(other.profile)("test", 16, (0.5,) * 3, (0.5,) * 3, resize=16, train="test", flip=False)
    with pytest.raises(UserError, match=r"learner\.teacher=small reads images of 16 pixels .* they must see the same"):
        trained(wide=False, teacher=other)
