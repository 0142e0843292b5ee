"""The training room: schedules, losses, Gaussians, memories, the loop, the journal. Values worked by hand or naively."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clbench.interfaces import Budget, BudgetExceeded, Place, UserError
from clbench.training import schedules
from clbench.training.checkpoint import Journal, pack
from clbench.training.fit import Recipe, fit
from clbench.training.gaussians import ClassGaussians
from clbench.training.losses import masked_cross_entropy, normalised_cross_entropy
from clbench.training.memory import herd
from clbench.training.runtime import Interrupted, Runtime
from clbench.training.state import collect, detached, fingerprint, num_bytes, restore


def place(step, steps=100):
    return Place(0, step, steps, step)


def test_schedules_by_hand():
    assert [schedules.multistep(place(s), milestones=[0.9], gamma=0.1) for s in (0, 89, 90, 99)] == [1, 1, 0.1, 0.1]
    assert schedules.cosine(place(0)) == 1 and schedules.cosine(place(50)) == pytest.approx(0.5)
    assert schedules.cosine(place(0), warmup=0.1) == pytest.approx(0.1)
    assert schedules.cosine(place(9), warmup=0.1) == schedules.cosine(place(10), warmup=0.1) == 1
    assert schedules.linear(place(50), end=0.5) == pytest.approx(0.75)
    assert schedules.stepwise_cosine(place(19), periods=5) == 1
    assert schedules.stepwise_cosine(place(20), periods=5) == pytest.approx((1 + math.cos(math.pi / 5)) / 2)


def test_stepwise_cosine_is_torch_cosine_annealing():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)
    for epoch in range(7):
        assert schedules.stepwise_cosine(place(epoch * 3, 21), periods=7) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("masking", ["local", "batch"])
def test_masked_cross_entropy_is_minus_infinity_masking(masking):
    z = torch.randn(6, 7, requires_grad=True)
    y = torch.tensor([4, 5, 6, 4, 5, 6])
    loss = masked_cross_entropy(z, y, masking, (4, 5, 6))
    loss.backward()
    other = z.detach().clone()
    other[:, :4] = -torch.inf
    torch.testing.assert_close(loss, F.cross_entropy(other, y))
    assert z.grad is not None and (z.grad[:, :4] == 0).all() and (z.grad[:, 4:] != 0).any()


def test_unknown_masking():
    with pytest.raises(UserError, match="local, seen, batch"):
        masked_cross_entropy(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), "old", (0,))


def test_logit_normalisation_ignores_scale():
    z, y = torch.randn(8, 5), torch.randint(5, (8,))
    a, b = (normalised_cross_entropy(z * s, y, (2, 3), 0.1) for s in (1.0, 30.0))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    norm = (z[:1, :2].norm() + z[:1, 2:].norm()) / 2
    torch.testing.assert_close(
        normalised_cross_entropy(z[:1], y[:1], (2, 3), 0.1), F.cross_entropy(z[:1] / norm / 0.1, y[:1]), rtol=1e-4, atol=1e-5
    )


def test_gaussians_statistics_and_sampling_moments():
    f = torch.randn(200, 4) @ torch.tensor([[1.0, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0.3, 0.1]]) + 3
    g = ClassGaussians(1e-4)
    g.add(f)
    g.add(f[:1])
    expected = np.cov(f.numpy().T.astype(np.float64)) + 1e-4 * np.eye(4)
    np.testing.assert_allclose(g.cov_KDD[0].numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(g.cov_KDD[1].numpy(), 1e-4 * np.eye(4), atol=1e-9)
    assert (torch.linalg.eigvalsh(g.cov_KDD) > 0).all()
    torch.testing.assert_close(g.cov_KDD, g.cov_KDD.transpose(1, 2))
    x, y = g.sample(20000, torch.tensor([0.9, 1.0]), torch.Generator().manual_seed(0))
    torch.testing.assert_close(x[y == 0].mean(0), 0.9 * g.mean_KD[0], atol=0.06, rtol=0)
    np.testing.assert_allclose(np.cov(x[y == 0].numpy().T), expected, atol=0.1)


def naive_herding(features, count):
    f = F.normalize(features.double(), dim=1)
    chosen = []
    for _ in range(min(count, len(f))):
        gaps = [
            ((f.mean(0) - f[[*chosen, i]].mean(0)).norm().item(), i) if i not in chosen else (math.inf, i)
            for i in range(len(f))
        ]
        chosen.append(min(gaps)[1])
    return chosen


def test_herding_is_the_naive_loop():
    features = torch.randn(15, 6, generator=torch.Generator().manual_seed(3))
    assert herd(features, 9) == naive_herding(features, 9)
    assert herd(features, 4) == herd(features, 9)[:4]
    assert sorted(herd(features, 99)) == list(range(15))


class Line:
    """y = w x: a learner with one weight and batches that depend on the step only."""

    steps = 12

    def __init__(self):
        self.weight = nn.Linear(1, 1)
        nn.init.zeros_(self.weight.weight)
        nn.init.zeros_(self.weight.bias)

    def __call__(self, step):
        return torch.tensor([[float(step % 5)]])

    def loss(self, x):
        return ((self.weight(x) - 2 * x) ** 2).mean()

    def state_dict(self):
        return collect(self, "weight")

    def load_state_dict(self, state):
        restore(self, state)

    def fit(self, runtime, **options):
        groups = [{"params": list(self.weight.parameters()), "lr": 0.01}]
        return fit(runtime, "train", self, groups, self.loss, self, Recipe(**options))


def runtime(folder=None, **budget):
    made = Runtime(0, torch.device("cpu"), Budget(**budget), journal=Journal(folder, 0.0))
    made.begin(0)
    return made


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("stops", [[1], [5, 6], [11], [12]])
def test_fit_resumes_to_the_last_bit(tmp_path, optimizer, stops):
    straight = Line()
    log = straight.fit(runtime(), optimizer=optimizer, schedule=schedules.cosine)
    for stop in stops:
        line, run = Line(), runtime(tmp_path)
        run.progress = lambda name, step, steps, loss, run=run, stop=stop: setattr(run, "stop", step == stop)
        with pytest.raises(Interrupted):
            line.fit(run, optimizer=optimizer, schedule=schedules.cosine)
    line = Line()
    again = line.fit(runtime(tmp_path), optimizer=optimizer, schedule=schedules.cosine)
    assert fingerprint(line.state_dict()) == fingerprint(straight.state_dict())
    assert again == log


def test_fit_accumulates_the_mean_gradient():
    one, two = Line(), Line()
    one.fit(runtime(), accumulate=3, momentum=0.0)
    w = torch.zeros(2, requires_grad=True)
    for first in range(0, 12, 3):
        loss = torch.stack([((w[0] * x + w[1] - 2 * x) ** 2).mean() for x in (two(first + i) for i in range(3))]).mean()
        (grad,) = torch.autograd.grad(loss, w)
        w = (w - 0.01 * grad).detach().requires_grad_()
    torch.testing.assert_close(one.weight.weight.item(), w[0].item())


def test_fit_clips_and_calls_its_functions():
    line, seen = Line(), []
    groups = [{"params": list(line.weight.parameters()), "lr": 0.01}]
    norms = []

    def before(params, grads):
        norms.append(torch.cat([g.flatten() for g in grads]).norm().item())

    fit(
        runtime(),
        "train",
        line,
        groups,
        line.loss,
        line,
        Recipe(clip=0.5),
        before_step=before,
        after_step=lambda place, batch: seen.append(place.step),
    )
    assert seen == list(range(12)) and max(norms) <= 0.5 + 1e-6 and max(norms) > 0.49


def test_nan_stops_with_the_place():
    line = Line()
    groups = [{"params": list(line.weight.parameters()), "lr": 0.25}]
    with pytest.raises(FloatingPointError, match=r"experience 0, fit 'train', step 3 of 12, learning rate 0\.25"):
        fit(runtime(), "train", line, groups, lambda x: line.loss(x) * (math.nan if x.item() == 3 else 1), line)


def test_no_parameter_is_an_error():
    with pytest.raises(UserError, match="no parameter to train"):
        fit(runtime(), "train", Line(), [{"params": [], "lr": 1}], lambda x: x, Line())


def test_epochs_within_the_budget():
    run = runtime(epochs=3)
    assert run.epochs(None) == 3 and run.epochs(2) == 2
    with pytest.raises(BudgetExceeded, match="wants 4 epochs"):
        run.epochs(4)


@pytest.mark.parametrize(
    "bad", [{"epochs": 0}, {"sample_visits": -1}, {"exemplars": -5}, {"exemplar_bytes": 1.5}, {"epochs": True}]
)
def test_bad_budget(bad):
    with pytest.raises(UserError, match=f"budget.{next(iter(bad))}"):
        Budget(**bad)


def test_visits_are_limited():
    run = runtime(epochs=2, sample_visits=10)
    run.begin(0, num_train=4)
    run.count_visits(4, 4)
    with pytest.raises(BudgetExceeded, match="12 sample visits, the budget allows 10"):
        run.count_visits(4, 0)
    run = runtime(epochs=1)
    run.begin(0, num_train=4)
    with pytest.raises(BudgetExceeded, match="5 visits to its 4 samples"):
        run.count_visits(5, 100)


def test_fingerprint_and_bytes():
    a = {"w": torch.arange(4.0), "n": [1, "x"], "m": {"b": torch.zeros(2, dtype=torch.int64)}}
    b = {"m": {"b": torch.zeros(2, dtype=torch.int64)}, "n": [1, "x"], "w": torch.arange(4.0)}
    assert fingerprint(a) == fingerprint(b) == fingerprint(detached(a))
    assert num_bytes(a) == 16 + 16 + 8 + 1 and num_bytes([a["w"], a["w"]]) == 16
    for change in ({"w": torch.arange(4.0).double()}, {"n": [1, "y"]}, {"w": torch.arange(4.0).reshape(2, 2)}):
        assert fingerprint(a | change) != fingerprint(a)
    assert fingerprint({"w": torch.tensor([1.0], dtype=torch.bfloat16)}) != fingerprint({"w": torch.tensor([1.0])})


def test_small_tensors_lie_together_in_a_snapshot(tmp_path):
    """Every type, shape and layout comes back; a tensor met twice is written once, a large one by itself."""
    twice, large = torch.randn(300, 5), torch.randn(600, 600)
    kinds = (torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8)
    state = {
        "experience": 0,
        "bank": [{f"value{i}": torch.randn(12, i) for i in range(4)} for _ in range(9)],
        "kinds": tuple(torch.ones(2, 3).to(kind) for kind in kinds),
        "odd": {0: torch.tensor(3), "turned": torch.randn(3, 4).T, "text": "packed float32 0 3", "none": None, "number": 1.5},
        "twice": [twice, twice],
        "large": large,
        "trained": torch.nn.Parameter(torch.randn(2)),
    }
    packed = pack(state)
    assert set(packed["tensors"]) == {"float32", "bfloat16", "float64", "int64", "bool", "uint8"}
    assert packed["tree"]["large"] is large and packed["tensors"]["float32"].numel() == 9 * 12 * 6 + 12 + 1500 + 2
    journal = Journal(tmp_path, 0.0)
    journal.save("experience", state)
    found = journal.load("experience")
    assert found is not None and fingerprint(found) == fingerprint(state) and found["odd"][0].shape == ()
    assert [t.dtype for t in found["kinds"]] == [t.dtype for t in state["kinds"]]
    torch.save(state, tmp_path / "experience.pt")  # as older versions wrote it
    assert fingerprint(journal.load("experience")) == fingerprint(state)


def test_journal_full_disk_keeps_the_old_snapshot(tmp_path, monkeypatch):
    journal = Journal(tmp_path, 0.0)
    journal.save("experience", {"experience": 0})
    monkeypatch.setattr(torch, "save", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left"):
        journal.save("experience", {"experience": 1})
    monkeypatch.undo()
    loaded = journal.load("experience")
    assert loaded is not None and loaded["experience"] == 0 and not list(tmp_path.glob("*.tmp"))
