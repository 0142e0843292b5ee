"""EATA and SAR against naive versions in loops and float64, worked by hand, and where each becomes another method."""

import copy
import math

import numpy as np
import pytest
import torch
from small_networks import Net, SmallTrial, backbone, convnet, mlp
from torch import nn

from clbench.interfaces import Capabilities, UserError, declared
from clbench.learners.bn_adapt import BnAdapt
from clbench.learners.eata import Eata
from clbench.learners.sar import Sar, _late
from clbench.learners.tent import Tent
from clbench.streams.eval_sets import open_eval
from clbench.streams.images.data import open_experience
from clbench.testing.contract import small_stream
from clbench.training.adaptation import batch_statistics, distance, fisher_of_answers
from clbench.training.state import fingerprint

ADAPTS = Capabilities(transductive=True, adapts_at_test=True)
SHIFTED = small_stream(operators=[{"rotate": {"experiences": 3}}, {"test_time": {"batch_size": 9}}], budget={"epochs": 4})
PLAIN_EATA = {"margin": 2.0, "similarity": 2.0, "fisher": 0.0, "weighted": False}
PLAIN_SAR = {"margin": 2.0, "rho": 0.0, "recovery": 0.0, "spare_late": False}
SETS = range(4)


def trained(kind, make=convnet, sharp=1.0, **options):
    """A trial, a learner that knows the source, and the pipeline. `sharp`: a factor of the logits, for entropies far apart."""
    t = SmallTrial(make, kind, scenario=SHIFTED, can=ADAPTS, lr=0.1, backbone_lr=0.1, batch_size=12, **options)
    learner, learn, pipeline = t.begin()
    learn(0)
    for p in learner.head.parameters():
        p.data *= sharp
    return t, learner, pipeline


def batches(pipeline, *sets):
    """Decoded, so that they outlive their set."""
    return [batch for j in sets for batch, _ in open_eval(SHIFTED, j, pipeline).batches(9) if batch.x is not None]


def entropies(z):
    """In loops, nats."""
    found = []
    for row in np.asarray(z, dtype=np.float64):
        p = np.exp(row - row.max())
        p /= p.sum()
        found.append(-sum(q * math.log(q) for q in p if q > 0))
    return found


class Twin:
    """Network and head in float64 whose one BatchNorm uses the batch's statistics; what adapts are its scale and shift."""

    def __init__(self, learner):
        self.model, self.head = copy.deepcopy(learner.model.net).double(), copy.deepcopy(learner.head).double()
        norm = self.model[1]
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
        self.params = [norm.weight, norm.bias]
        self.source = [p.detach().clone() for p in self.params]

    def __call__(self, x):
        return self.head(self.model(x.double()))


def adapted(learner):
    return [value.detach() for value in learner.adapted.weights.values()]


# --- where each becomes another method


@pytest.mark.parametrize(("kind", "options"), [(Eata, {}), (Eata, {"fisher": 0.0}), (Sar, {}), (Sar, {"variant": "official"})])
def test_rate_0_is_bn_adapt(kind, options):
    t, learner, pipeline = trained(kind, adapt_lr=0.0, margin=0.9, **options)
    plain = trained(BnAdapt)[1]
    for j in SETS:
        torch.testing.assert_close(t.answers_of(learner, pipeline, j), t.answers_of(plain, pipeline, j), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    ("kind", "options"), [(Eata, PLAIN_EATA), (Sar, PLAIN_SAR), (Sar, {**PLAIN_SAR, "variant": "official"})]
)
def test_with_everything_off_it_is_tent(kind, options, optimizer):
    rates = {"adapt_lr": 0.05, "adapt_optimizer": optimizer, "steps": 2}
    t, learner, pipeline = trained(kind, **options, **rates)
    tent = trained(Tent, **rates)[1]
    for j in SETS:
        torch.testing.assert_close(t.answers_of(learner, pipeline, j), t.answers_of(tent, pipeline, j), atol=1e-5, rtol=1e-5)
    for a, b in zip(adapted(learner), adapted(tent), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("kind", "options"), [(Eata, {}), (Sar, {}), (Sar, {"variant": "official"})])
def test_a_reset_is_the_source_bit_for_bit(kind, options):
    """Moments too; the official SAR keeps those."""
    learner, pipeline = trained(kind, margin=0.9, adapt_optimizer="sgd", adapt_lr=0.1, **options)[1:]
    source = copy.deepcopy(learner.state_dict())
    for batch in batches(pipeline, 1):
        learner.predict(batch)
    assert fingerprint(learner.state_dict()) != fingerprint(source)
    learner.begin()
    if options:
        assert fingerprint(learner.state_dict()["adapted"]["weights"]) == fingerprint(source["adapted"]["weights"])
        moments = learner.state_dict()["adapted"]["moments"]
        assert moments and any(float(m["momentum_buffer"].abs().sum()) > 0 for m in moments.values())
    else:
        assert fingerprint(learner.state_dict()) == fingerprint(source)


@pytest.mark.parametrize("kind", [Eata, Sar])
def test_reset_before_every_set_and_exact_resume(kind, tmp_path):
    t, learner, pipeline = trained(kind, margin=0.9, adapt_lr=0.05, reset="set")
    never = trained(kind, margin=0.9, adapt_lr=0.05)[1]
    source = copy.deepcopy(never.state_dict())
    for j in (1, 2):
        never.load_state_dict(copy.deepcopy(source))
        assert torch.equal(t.answers_of(learner, pipeline, j), t.answers_of(never, pipeline, j))
    torch.save(never.state_dict(), tmp_path / "state.pt")
    last = t.answers_of(never, pipeline, 3)
    other = SmallTrial(convnet, kind, scenario=SHIFTED, can=ADAPTS, margin=0.9, adapt_lr=0.05).start()[0]
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(t.answers_of(other, pipeline, 3), last)
    assert fingerprint(other.state_dict()) == fingerprint(never.state_dict())


# --- EATA


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("fisher", [0.0, 30.0])
def test_eata_against_a_naive_version(fisher, weighted):
    options = {"margin": 0.5, "similarity": 0.6, "fisher": fisher, "weighted": weighted}
    learner, pipeline = trained(Eata, sharp=6.0, adapt_optimizer="sgd", adapt_lr=0.1, **options)[1:]
    twin, mean, shares = Twin(learner), None, []
    sgd = torch.optim.SGD(twin.params, lr=0.1, momentum=0.9)
    importance = [learner.fisher[name].double() for name in learner.adapted.weights] if fisher else []
    for batch in batches(pipeline, 0, 1, 2):
        z = twin(batch.x)
        limit, kept = 0.5 * math.log(6), []
        h = entropies(z.detach())
        p = z.detach().softmax(1).numpy()
        for i in range(len(p)):
            if h[i] >= limit:
                continue
            if mean is not None:
                cosine = sum(p[i] * mean) / math.sqrt(sum(p[i] ** 2) * sum(mean**2))
                if abs(cosine) >= 0.6:
                    continue
            kept.append(i)
        loss = z.new_zeros(())
        for i in kept:
            w = math.exp(limit - h[i]) if weighted else 1.0
            loss = loss - w * (z[i].softmax(0) * z[i].log_softmax(0)).sum() / len(kept)
        if kept:
            new = p[kept].mean(0)
            mean = new if mean is None else 0.9 * mean + 0.1 * new
            for value, source, f in zip(twin.params, twin.source, importance, strict=True) if fisher else ():
                loss = loss + fisher * (f * (value - source) ** 2).sum()
            sgd.zero_grad()
            loss.backward()
            sgd.step()
        shares.append(len(kept) / len(p))
        torch.testing.assert_close(learner.predict(batch).double(), z.detach(), atol=2e-4, rtol=1e-3)
    np.testing.assert_allclose(learner.mean_K.numpy(), mean, atol=1e-4)
    for a, b in zip(adapted(learner), twin.params, strict=True):
        torch.testing.assert_close(a.double(), b.detach(), atol=1e-4, rtol=1e-3)
    assert 0 < min(s for s in shares if s) < 1 and len(set(shares)) > 2, "batches differ in what is kept of them"


def test_fisher_of_answers_against_loops():
    """Batches of unlike size; the square of a batch's mean gradient, then the mean over batches, in float64."""
    net = backbone(convnet()).double().eval()
    g = torch.Generator().manual_seed(1)
    parts = [torch.randn(n, 3, 8, 8, generator=g, dtype=torch.float64) for n in (4, 4, 2)]

    class Shown:
        def __init__(self, x):
            self.x = x

    with batch_statistics(net):
        found = fisher_of_answers(net, net.net, map(Shown, parts))
        for name, p in net.named_parameters():
            expected = torch.zeros_like(p)
            for x in parts:
                z = net.net(x)
                loss = -sum(z[i].log_softmax(0)[int(z[i].argmax())] for i in range(len(x))) / len(x)
                (grad,) = torch.autograd.grad(loss, p, allow_unused=True)
                expected += 0 if grad is None else grad**2 / len(parts)
            torch.testing.assert_close(found[name], expected.detach())


def test_the_fisher_term_by_hand_and_from_source_images():
    w = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.5])}
    s = {"a": torch.tensor([0.0, 4.0]), "b": torch.tensor([0.0])}
    assert float(distance(w, s, {"a": torch.tensor([3.0, 0.5]), "b": torch.tensor([2.0])})) == 3 * 1 + 0.5 * 4 + 2 * 0.25
    t, learner, pipeline = trained(Eata, fisher_samples=70)
    x = open_experience(SHIFTED, 0, pipeline).train
    rows = torch.randperm(len(x), generator=t_generator(t))[:70]
    with batch_statistics(learner.model):
        parts = [x.batch(part.numpy()) for part in (rows[:64], rows[64:])]
        expected = fisher_of_answers(learner.model, lambda x: learner.head(learner.model.features(x)), parts)
    assert set(learner.fisher) == {"net.1.weight", "net.1.bias"}
    for name, f in learner.fisher.items():
        torch.testing.assert_close(f, expected[name])
    assert trained(Eata, fisher=0.0)[1].fisher == {}


def t_generator(t):
    """The one that draws the images of the Fisher information in experience 0."""
    runtime = t.start()[1]
    runtime.experience = 0
    return runtime.generator("fisher")


def test_what_eata_keeps_by_hand():
    learner = trained(Eata, similarity=0.5)[1]
    sure, other, unsure = [9.0, 0, 0, 0, 0, 0], [0, 0, 9.0, 0, 0, 0], [1.0, 0, 0, 0, 0, 0]
    limit = 0.4 * math.log(6)
    assert learner.kept(torch.tensor([unsure]), limit).tolist() == [] and learner.mean_K is None
    assert learner.kept(torch.tensor([sure, unsure, sure]), limit).tolist() == [0, 2], "the first time nothing is too near"
    first = learner.mean_K.clone()
    torch.testing.assert_close(first, torch.tensor(sure).softmax(0))
    assert learner.kept(torch.tensor([sure, unsure, other]), limit).tolist() == [2]
    torch.testing.assert_close(learner.mean_K, 0.9 * first + 0.1 * torch.tensor(other).softmax(0))
    before = learner.mean_K.clone()
    assert learner.kept(torch.tensor([sure]), limit).tolist() == [] and torch.equal(learner.mean_K, before)


def test_a_batch_of_which_nothing_is_kept_moves_nothing():
    """Neither by the Fisher term nor by moments."""
    learner, pipeline = trained(Eata, margin=0.9, adapt_lr=0.1)[1:]
    one, two = batches(pipeline, 1)[:2]
    learner.predict(one)
    before = fingerprint(learner.state_dict())
    learner.margin = 1e-9
    learner.predict(two)
    assert fingerprint(learner.state_dict()) == before


def test_images_are_asked_for_again_by_the_fisher_term_alone():
    assert declared(Eata, {}).needs_random_access and not declared(Eata, {"fisher": 0.0}).needs_random_access


# --- SAR


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_sar_against_a_naive_version(variant):
    """Three sets; the way back is taken, and some batches keep nothing."""
    options = {"variant": variant, "margin": 0.2, "rho": 0.3, "recovery": 0.3}
    learner, pipeline = trained(Sar, sharp=6.0, adapt_lr=0.1, **options)[1:]
    twin, average, back, empty = Twin(learner), None, 0, 0
    momentum, limit = [torch.zeros_like(p) for p in twin.params], 0.2 * math.log(6)
    for batch in batches(pipeline, 1, 2, 3):
        z = twin(batch.x)
        kept = [i for i, h in enumerate(entropies(z.detach())) if h < limit]
        empty += not kept
        loss = z.sum() * 0
        for i in kept:
            loss = loss - (z[i].softmax(0) * z[i].log_softmax(0)).sum() / len(kept)
        here = [p.detach().clone() for p in twin.params]
        grads = torch.autograd.grad(loss, twin.params)
        length = math.sqrt(sum(float((g**2).sum()) for g in grads))
        with torch.no_grad():
            for p, g in zip(twin.params, grads, strict=True):
                p += 0.3 * g / (length + 1e-12)
        second = twin(batch.x)
        h = entropies(second.detach())
        kept = [i for i in kept if h[i] < limit]
        loss = second.sum() * 0
        for i in kept:
            loss = loss - (second[i].softmax(0) * second[i].log_softmax(0)).sum() / len(kept)
        grads = torch.autograd.grad(loss, twin.params)
        with torch.no_grad():
            for p, old, g, m in zip(twin.params, here, grads, momentum, strict=True):
                if kept or variant == "official":
                    m.mul_(0.9).add_(g)
                    p.copy_(old - 0.1 * m)
                else:
                    p.copy_(old)
        if kept:
            new = sum(h[i] for i in kept) / len(kept)
            average = new if average is None else 0.9 * average + 0.1 * new
        if average is not None and average < 0.3:
            back += 1
            with torch.no_grad():
                for p, s in zip(twin.params, twin.source, strict=True):
                    p.copy_(s)
            if variant == "paper":
                average, momentum = None, [torch.zeros_like(p) for p in twin.params]
        torch.testing.assert_close(learner.predict(batch).double(), z.detach(), atol=5e-4, rtol=2e-3)
        assert (learner.average is None) == (average is None)
        assert average is None or learner.average == pytest.approx(average, abs=1e-3)
    assert back and empty
    for a, b in zip(adapted(learner), twin.params, strict=True):
        torch.testing.assert_close(a.double(), b.detach(), atol=1e-4, rtol=1e-3)


def test_ways_back_by_hand():
    """The paper's average begins anew; the release's stays low and sends the next batch back too, until it has been lifted."""
    for variant, averages, ways in (
        ("paper", [None, 0.2, 0.23], [True, False, False]),
        ("official", [0.194, 0.1946, 0.22514], [True, True, False]),
    ):
        learner = trained(Sar, variant=variant)[1]
        learner.average, found, back = 0.21, [], []
        for new in (0.05, 0.2, 0.5):
            learner._put({name: value + 1 for name, value in learner.source().items()})
            learner._watch(new)
            found.append(learner.average)
            back.append(all(torch.equal(a, s) for a, s in zip(adapted(learner), learner.source().values(), strict=True)))
        assert [a if a is None else round(a, 6) for a in found] == averages and back == ways


def test_an_empty_selection():
    """The paper's variant stands still; momentum moves the release's, and never to NaN."""
    for variant in ("paper", "official"):
        learner, pipeline = trained(Sar, variant=variant, margin=0.9, adapt_lr=0.1, recovery=0.0)[1:]
        one, two = batches(pipeline, 1)[:2]
        learner.predict(one)
        before, average = [a.clone() for a in adapted(learner)], learner.average
        moments = [m["momentum_buffer"].clone() for m in learner.state_dict()["adapted"]["moments"].values()]
        learner.margin = 1e-9
        assert torch.isfinite(learner.predict(two)).all() and learner.average == average
        for old, new, m in zip(before, adapted(learner), moments, strict=True):
            torch.testing.assert_close(new, old - (0.09 * m if variant == "official" else 0), atol=1e-7, rtol=1e-6)
            assert torch.isfinite(new).all()


def test_late_norms_are_spared():
    vit = {f"net.blocks.{k}.norm{i}.weight" for k in range(12) for i in (1, 2)} | {"net.norm.weight", "net.fc_norm.bias"}
    late = {name for name in vit if any(f"blocks.{k}." in name for k in (9, 10, 11))} | {"net.norm.weight", "net.fc_norm.bias"}
    assert _late(vit) == late
    resnet = {"net.bn1.weight"} | {f"net.layer{k}.{i}.bn1.bias" for k in (1, 2, 3, 4) for i in (0, 1)}
    assert _late(resnet) == {"net.layer4.0.bn1.bias", "net.layer4.1.bn1.bias"}
    assert _late({"net.1.weight", "net.layers.0.norm.weight"}) == set()

    class Late(Net):
        def __init__(self):
            super().__init__(num_features=6)
            self.flat, self.fc, self.norm = nn.Flatten(), nn.Linear(192, 6), nn.LayerNorm(6)

    with pytest.raises(UserError, match=r"learner\.spare_late=true: model small"):
        trained(Sar, make=Late)
    assert set(trained(Sar, make=Late, spare_late=False)[1].adapted.weights) == {"net.norm.weight", "net.norm.bias"}


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (Eata, {"margin": 0.0}, r"learner\.margin"),
        (Eata, {"margin": math.inf}, r"learner\.margin"),
        (Eata, {"similarity": math.nan}, r"learner\.similarity"),
        (Eata, {"fisher": -1.0}, r"learner\.fisher"),
        (Eata, {"fisher_samples": 1}, r"learner\.fisher_samples"),
        (Eata, {"reset": "always"}, r"learner\.reset"),
        (Eata, {"make": lambda: mlp(4)}, "no such layer"),
        (Sar, {"variant": "release"}, r"learner\.variant=release: choose paper or official"),
        (Sar, {"margin": -1.0}, r"learner\.margin"),
        (Sar, {"rho": math.inf}, r"learner\.rho"),
        (Sar, {"recovery": -0.1}, r"learner\.recovery"),
        (Sar, {"steps": 0}, r"learner\.steps"),
    ],
)
def test_refused_in_one_line(kind, options, words):
    with pytest.raises(UserError, match=words) as caught:
        trained(kind, **options)
    assert "\n" not in str(caught.value)
