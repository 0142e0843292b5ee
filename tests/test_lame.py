"""LAME against a naive version in loops and float64, worked by hand, and where it is the source."""

import math

import numpy as np
import pytest
import torch
from small_networks import SmallTrial, convnet

from clbench.interfaces import Capabilities, UserError
from clbench.learners.finetune import Finetune
from clbench.learners.lame import Lame, adjusted, affinity
from clbench.streams.eval_sets import open_eval
from clbench.testing.contract import small_stream
from clbench.training.state import fingerprint

SHIFTED = small_stream(operators=[{"rotate": {"experiences": 3}}, {"test_time": {"batch_size": 9}}], budget={"epochs": 4})
SETS = range(4)


def trained(kind, **options):
    """A trial, a learner that knows the source, and the pipeline."""
    can = Capabilities(transductive=True)
    t = SmallTrial(convnet, kind, scenario=SHIFTED, can=can, lr=0.1, backbone_lr=0.1, batch_size=12, **options)
    learner, learn, pipeline = t.begin()
    learn(0)
    return t, learner, pipeline


def naive_affinity(f, kind, k, symmetric):
    """In loops, float64."""
    f = [row / np.sqrt((row**2).sum()) for row in np.asarray(f, dtype=np.float64)]
    n = len(f)
    d = np.array([[math.sqrt(((a - b) ** 2).sum()) for b in f] for a in f])
    w = np.zeros((n, n))
    if kind == "knn":
        for i in range(n):
            for j in sorted((j for j in range(n) if j != i), key=lambda j: d[i, j])[:k]:
                w[i, j] = 1
    elif kind == "rbf":
        sigma = np.mean([sorted(d[i])[min(k, n) - 1] for i in range(n)])
        w = np.exp(-(d**2) / (2 * sigma**2))
    else:
        w = np.array([[float((a * b).sum()) for b in f] for a in f])
    return (w + w.T) / 2 if symmetric else w


def naive_lame(z, w):
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    y, old = p, None
    for number in range(100):
        a = np.log(p) + w @ y
        y = np.exp(a - a.max(1, keepdims=True))
        y /= y.sum(1, keepdims=True)
        energy = (y * (-np.log(p)) - y * (w @ y) + y * np.log(y)).sum()
        if number and abs(energy - old) <= 1e-8 * abs(old):
            break
        old = energy
    return y


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ["knn", "rbf", "linear"])
def test_lame_against_a_naive_version(kind, symmetric):
    learner, pipeline = trained(Lame, affinity=kind, neighbours=3, symmetric=symmetric)[1:]
    before = fingerprint(learner.state_dict())
    for batch, _ in [one for j in (1, 2) for one in open_eval(SHIFTED, j, pipeline).batches(9) if one[0].x is not None]:
        with torch.no_grad():
            f = learner.model.eval().features(batch.x)
            z = learner.head(f).double().numpy()
            w = naive_affinity(f, kind, 3, symmetric)
            np.testing.assert_allclose(affinity(f, kind, 3, symmetric).numpy(), w, atol=1e-6)
            np.testing.assert_allclose(learner.predict(batch).softmax(1).numpy(), naive_lame(z, w), atol=1e-4)
    assert fingerprint(learner.state_dict()) == before


def test_lame_by_hand():
    """Two neighbours that agree drag along the third; a row without neighbours stays what it was."""
    f = torch.tensor([[1.0, 0.0], [2.0, 0.1], [1.0, 0.2], [0.0, 1.0]])
    w = affinity(f, "knn", 1, False)
    assert w.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    assert affinity(f, "knn", 1, True).tolist() == [[0, 1, 0, 0], [1, 0, 0.5, 0], [0, 0.5, 0, 0.5], [0, 0, 0.5, 0]]
    assert affinity(f, "knn", 9, False).sum(1).tolist() == [3, 3, 3, 3], "never more than there are"
    assert affinity(f[:1], "knn", 5, False).tolist() == [[0]]
    twins = torch.ones(3, 2)
    assert torch.equal(affinity(twins, "rbf", 2, False), torch.ones(3, 3, dtype=torch.float64)), "no distance at all"
    assert affinity(twins, "knn", 2, False).diagonal().tolist() == [0, 0, 0], "no edge to itself, among equal ones either"


@pytest.mark.parametrize("kind", ["knn", "rbf", "linear"])
def test_lame_without_edges_is_the_source(kind):
    t, learner, pipeline = trained(Lame, affinity=kind, strength=0.0)
    source = trained(Finetune)[1]
    for j in SETS:
        z = t.answers_of(source, pipeline, j).log_softmax(1)
        torch.testing.assert_close(t.answers_of(learner, pipeline, j), z, atol=1e-5, rtol=1e-5)


def test_every_step_of_lame_goes_down():
    """Of the energy with half of Z W Z, of which an iteration with a symmetric and positive W minimises a bound."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        f, z = torch.as_tensor(rng.normal(size=(8, 4))), torch.as_tensor(rng.normal(size=(8, 5)) * 3)
        w = affinity(f, "rbf", 3, True)
        log_p, energies = z.log_softmax(1), []
        log_y = log_p
        for _ in range(30):
            log_y = (log_p + w @ log_y.exp()).log_softmax(1)
            y = log_y.exp()
            energies.append(float((y * (log_y - log_p) - y * (w @ y) / 2).sum()))
        assert (np.diff(energies) <= 1e-8).all()
        np.testing.assert_allclose(adjusted(z, w).exp().numpy(), y.numpy(), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"affinity": "cosine"}, r"learner\.affinity=cosine: choose knn, rbf, linear"),
        ({"neighbours": 0}, r"learner\.neighbours"),
        ({"strength": -1.0}, r"learner\.strength"),
        ({"strength": math.nan}, r"learner\.strength"),
    ],
)
def test_refused_in_one_line(options, words):
    with pytest.raises(UserError, match=words) as caught:
        trained(Lame, **options)
    assert "\n" not in str(caught.value)
