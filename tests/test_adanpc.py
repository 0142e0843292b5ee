"""AdaNPC against naive versions in loops and float64, worked by hand, and what joins its memory."""

import copy
import math

import numpy as np
import pytest
import torch
from small_networks import SmallTrial, convnet

from clbench.interfaces import Capabilities, UserError
from clbench.learners import adanpc
from clbench.learners.adanpc import AdaNpc, votes
from clbench.streams.eval_sets import open_eval
from clbench.streams.images.data import open_experience
from clbench.testing.contract import small_stream
from clbench.training.state import fingerprint

SHIFTED = small_stream(operators=[{"rotate": {"experiences": 3}}, {"test_time": {"batch_size": 9}}], budget={"epochs": 4})


def trained(**options):
    """A trial, a learner that knows the source, and the pipeline."""
    can = Capabilities(adapts_at_test=True)
    t = SmallTrial(convnet, AdaNpc, scenario=SHIFTED, can=can, lr=0.1, backbone_lr=0.1, batch_size=12, **options)
    learner, learn, pipeline = t.begin()
    learn(0)
    return t, learner, pipeline


def unit(f):
    f = np.asarray(f, dtype=np.float64)
    return f / np.sqrt((f**2).sum(1, keepdims=True))


def naive_votes(cosines, labels, classes, k, temperature):
    found = np.zeros((len(cosines), classes))
    for i, row in enumerate(cosines):
        near = sorted(range(len(row)), key=lambda j: -row[j])[:k]
        total = sum(math.exp(row[j] / temperature) for j in near)
        for j in near:
            found[i, labels[j]] += math.exp(row[j] / temperature) / total
    return found


def test_votes_in_loops_and_by_hand():
    rng = np.random.default_rng(0)
    for k, temperature in ((1, 0.1), (3, 0.05), (7, 0.5), (20, 0.1)):
        cosines, labels = rng.uniform(-1, 1, (5, 20)), rng.integers(0, 4, 20)
        s = votes(torch.as_tensor(cosines), torch.as_tensor(labels), 4, k, temperature)
        np.testing.assert_allclose(s.numpy(), naive_votes(cosines, labels, 4, k, temperature), atol=1e-12)
        np.testing.assert_allclose(s.sum(1).numpy(), 1)
    far = torch.tensor([[0.0, 0.1 * math.log(3), -1.0]], dtype=torch.float64)
    np.testing.assert_allclose(votes(far, torch.tensor([1, 0, 0]), 3, 2, 0.1).numpy(), [[0.75, 0.25, 0]])


@pytest.mark.parametrize(("variant", "threshold"), [("paper", 0.6), ("paper", 0.0), ("official", 0.3)])
def test_against_a_naive_version(variant, threshold):
    """Answers, and what joins the memory with which label, over two sets."""
    learner, pipeline = trained(variant=variant, threshold=threshold, neighbours=5)[1:]
    train = open_experience(SHIFTED, 0, pipeline).train
    with torch.no_grad():
        memory = unit(torch.cat([learner.model.features(b) for b in train.test_batches(12)]).numpy())
    labels, start = list(train.y), len(train)
    for j in (1, 2):
        for batch, _ in open_eval(SHIFTED, j, pipeline).batches(9):
            with torch.no_grad():
                f = unit(learner.model.features(batch).numpy())
            s = naive_votes(f @ memory.T, labels, 6, 5, 0.1)
            np.testing.assert_allclose(learner.predict(batch).exp().numpy(), s + 1e-5, atol=1e-4)
            for row, own in zip(s, f, strict=True):
                p = row if variant == "paper" else np.exp(row) / np.exp(row).sum()
                if p.max() >= threshold:
                    memory, labels = np.vstack([memory, own]), [*labels, int(row.argmax())]
    assert start < len(labels) <= start + 72
    assert (len(labels) == start + 72) == (threshold == 0), "all join at 0, not all above it"
    for c, (rows, n) in enumerate(zip(learner.memory, learner.num_source, strict=True)):
        np.testing.assert_allclose(rows.numpy(), memory[np.array(labels) == c], atol=1e-5)
        assert n == (train.y == c).sum()


@pytest.mark.parametrize(("variant", "threshold"), [("paper", 1.1), ("official", 0.4)])
def test_nothing_joins_above_what_a_confidence_can_be(variant, threshold):
    """The release's confidence stays below e / (e + K - 1), 0.352 for six classes."""
    assert math.e / (math.e + 5) == pytest.approx(0.3522, abs=1e-4)
    t, learner, pipeline = trained(variant=variant, threshold=threshold)
    before = fingerprint(learner.state_dict())
    first, second = t.answers_of(learner, pipeline, 1), t.answers_of(learner, pipeline, 1)
    assert fingerprint(learner.state_dict()) == before and torch.equal(first, second)


def test_resets_and_exact_resume(tmp_path):
    t, learner, pipeline = trained(threshold=0.0, reset="set")
    source = copy.deepcopy(learner.state_dict())
    alone = t.answers_of(learner, pipeline, 2)
    t.answers_of(learner, pipeline, 1)
    torch.save(learner.state_dict(), tmp_path / "state.pt")
    assert torch.equal(t.answers_of(learner, pipeline, 2), alone)
    learner.begin()
    assert fingerprint(learner.state_dict()) == fingerprint(source)
    ends = []
    for _ in range(2):
        other = t.start()[0]
        other.reset = "never"
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        ends.append((t.answers_of(other, pipeline, 2), fingerprint(other.state_dict())))
    assert torch.equal(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]
    assert not torch.equal(ends[0][0], alone), "without a reset the set before counts"


def test_the_loss_of_the_paper_in_loops(monkeypatch):
    """Every sample against the others of its batch; one alone has none and no gradient."""
    caught = {}
    monkeypatch.setattr(adanpc, "fit", lambda *args: caught.update(loss=args[4], groups=args[3]) or {})
    t = SmallTrial(convnet, AdaNpc, scenario=SHIFTED, can=Capabilities(adapts_at_test=True), training="knn", neighbours=4)
    learner, learn, pipeline = t.begin()
    learn(0)
    train = open_experience(SHIFTED, 0, pipeline).train
    batch, y = train.batch(np.arange(0, 72, 6)), train.y[::6]
    learner.model.eval()
    with torch.no_grad():
        f = unit(learner.model.features(batch).numpy())
    total = 0.0
    for i in range(12):
        others = [j for j in range(12) if j != i]
        s = naive_votes((f[i] @ f[others].T)[None], [int(y[j]) for j in others], 6, 4, 0.1)
        total -= math.log(s[0, int(y[i])] + 1e-5) / 12
    assert float(caught["loss"](batch).detach()) == pytest.approx(total, rel=1e-3)
    caught["loss"](batch).backward()
    grads = [p.grad for p in learner.model.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in grads) and any(float(g.abs().sum()) > 0 for g in grads)
    assert len(caught["groups"]) == 1, "the head is not trained"
    assert float(caught["loss"](train.batch(np.arange(1))).detach()) == pytest.approx(-math.log(1e-5))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "release"}, r"learner\.variant=release"),
        ({"training": "ce"}, r"learner\.training=ce: choose cross_entropy or knn"),
        ({"neighbours": 0}, r"learner\.neighbours"),
        ({"temperature": 0.0}, r"learner\.temperature"),
        ({"threshold": math.nan}, r"learner\.threshold"),
        ({"reset": "always"}, r"learner\.reset"),
    ],
)
def test_refused_in_one_line(options, words):
    with pytest.raises(UserError, match=words) as caught:
        trained(**options)
    assert "\n" not in str(caught.value)
