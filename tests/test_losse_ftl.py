"""Losse-FTL against a dense encoding in loops, ridge regression and minima over blocks."""

import copy
import itertools

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from test_closed_forms import Flat
from test_naive_bayes import blobs, runtime
from test_online import online

from clbench.interfaces import UserError
from clbench.learners.losse_ftl import Losse, LosseFtl
from clbench.models.heads import LOWEST

TINY = ("model=mlp", "model.kwargs.hidden=[24,16]")


def naive_encoding(layer, x):
    """Dense features [N, M], in loops."""
    h = np.zeros((len(x), layer.width))
    for n, row in enumerate(x.double().numpy()):
        at = row / np.linalg.norm(row) @ layer.weight_DR.numpy()
        for g in range(layer.grids):
            lows, shares = [], []
            for p in at[g * layer.dims : (g + 1) * layer.dims]:
                place = (np.clip(p / layer.reach, -1, 1) + 1) / 2 * layer.bins
                lows.append(min(int(place), layer.bins - 1))
                shares.append(place - lows[-1])
            for up in itertools.product((0, 1), repeat=layer.dims):
                index = 0
                for low, u in zip(lows, up, strict=True):
                    index = index * (layer.bins + 1) + low + u
                h[n, g * layer.size + index] += np.prod([s if u else 1 - s for s, u in zip(shares, up, strict=True)])
    return h


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_encoding(dims):
    layer = Losse(6, 5, 4, dims, 1.0, 11)
    x, _ = blobs(4, n=20)
    places, values = layer(x)
    dense = torch.zeros(20, layer.width).double().scatter_add(1, places, values)
    np.testing.assert_allclose(dense, naive_encoding(layer, x), atol=1e-12)
    assert places.shape == (20, 5 * 2**dims) and layer.width == 5 * 5**dims
    np.testing.assert_allclose(dense.view(20, 5, -1).sum(2), 1)
    assert int((np.abs(x.numpy() @ layer.weight_DR.numpy()) > 0).sum()) and bool((values == 1).any() or dims > 1)
    near = layer(x + 1e-9)[1]
    torch.testing.assert_close(near, values, atol=1e-7, rtol=0)
    opposite = torch.zeros(20, layer.width).double().scatter_add(1, *layer(-x))
    assert float((dense * opposite).sum()) < 0.3 * float(dense.square().sum()), "distant samples share little"


def losse(x, y, size, classes=3, passes=1, **options):
    options = {"grids": 6, "bins": 3, "reach": 1.0, "ridge": 0.3} | options
    found = LosseFtl(Flat(), runtime(), **options)
    for _ in range(passes):
        for xs, ys in zip(x.split(size), y.split(size), strict=True):
            found.update(xs, ys, classes)
    return found


def test_exact_is_ridge_regression_in_any_order():
    x, y = blobs(5)
    order = torch.from_numpy(np.random.default_rng(0).permutation(60))
    for found in (losse(x, y, 7, update="exact"), losse(x[order], y[order], 1, update="exact")):
        h = naive_encoding(found.encode, x)
        naive = Ridge(alpha=0.3, fit_intercept=False, solver="cholesky").fit(h, np.eye(3)[y]).coef_.T
        np.testing.assert_allclose(found.readout(), naive, atol=1e-9)
        np.testing.assert_allclose(found.predict(x), h @ naive, atol=1e-5)
        np.testing.assert_allclose(found.sums.gram_MM, h.T @ h, atol=1e-10)


def test_a_sparse_step_is_the_minimum_over_the_active_weights_and_never_raises_the_objective():
    x, y = blobs(6, n=25)
    found, h = losse(x[:0], y[:0], 1), np.zeros((0, 0))
    targets, naive = np.eye(3)[y], None
    for n in range(25):
        before = found.weight_MK.numpy().copy() if n else np.zeros((found.encode.width, 3))
        found.update(x[n : n + 1], y[n : n + 1], 3)
        h = naive_encoding(found.encode, x[: n + 1])
        active = found.encode(x[n : n + 1])[0][0].numpy()
        a, naive = h.T @ h + 0.3 * np.eye(h.shape[1]), before.copy()
        rest = np.setdiff1d(np.arange(h.shape[1]), active)
        right = (h.T @ targets[: n + 1])[active] - a[np.ix_(active, rest)] @ before[rest]
        naive[active] = np.linalg.solve(a[np.ix_(active, active)], right)
        np.testing.assert_allclose(found.weight_MK, naive, atol=1e-9)
        cost = [((h @ w - targets[: n + 1]) ** 2).sum() + 0.3 * (w**2).sum() for w in (before, naive)]
        assert cost[1] <= cost[0]
    assert not found.weight_MK[np.setdiff1d(np.arange(h.shape[1]), np.flatnonzero(h.sum(0)))].any()


def test_sparse_steps_lead_to_the_leader():
    x, y = blobs(7, n=40)
    found = losse(x, y, 40)
    exact = losse(x, y, 40, update="exact").readout()
    gaps = [float((found.weight_MK - exact).norm())]
    for _ in range(6):  # more steps on the same sums
        for active, _ in zip(*found.encode(x), strict=True):
            rows, own = found.sums.gram_MM[active], found.weight_MK[active]
            rest = rows @ found.weight_MK - rows[:, active] @ own
            block = rows[:, active] + 0.3 * torch.eye(len(active)).double()
            found.weight_MK[active] = torch.linalg.solve(block, found.sums.cross_MK[active] - rest)
        gaps.append(float((found.weight_MK - exact).norm()))
    assert gaps[0] < 0.5 * float(exact.norm()) and gaps[-1] < 1e-2 * gaps[0] and sorted(gaps, reverse=True) == gaps


def test_losse_state_and_unseen_classes():
    x, y = blobs(8)
    for update in ("sparse", "exact"):
        found = losse(x, y, 9, classes=4, update=update)
        again = losse(x[:0], y[:0], 9, update=update)
        again.load_state_dict(copy.deepcopy(found.state_dict()))
        z = found.predict(x)
        assert torch.equal(again.predict(x), z) and (z[:, 3] == LOWEST).all()
        assert float((z.argmax(1) == y).float().mean()) > 0.7
        for one in (found, again):
            one.update(x[:5], y[:5], 5)
        assert torch.equal(again.predict(x), found.predict(x))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("learner.update=dense", "learner.update=dense"),
        ("learner.bins=0", "learner.bins=0"),
        ("learner.dims=5", "at most 20000 features"),
        ("learner.ridge=0", "learner.ridge=0"),
        ("learner.reach=-1", "learner.reach=-1"),
    ],
)
def test_bad_options_are_one_line(words, line):
    with pytest.raises(UserError, match=line.replace(".", r"\.")) as caught:
        online("learner=losse_ftl", *TINY, words).start()
    assert "\n" not in str(caught.value)
