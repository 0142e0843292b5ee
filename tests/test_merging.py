"""Operators that merge networks: worked by hand, against loops, and what each does with one or with equal models; `merge`."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import NARROW

from clbench.config.compose import compose
from clbench.interfaces import Capabilities, UserError
from clbench.learners.merge import AMOUNT, FOLDED, SCALE
from clbench.testing.contract import Trial, small_stream
from clbench.training import merging
from clbench.training.state import detached, fingerprint

SHAPES = {"w": (6, 5), "b": (6,), "k": (4, 3, 2, 2)}


def drawn(seed, number=3):
    """A start and some networks near it."""
    g = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in SHAPES.items()}
    made = [
        {n: v + 0.1 * torch.randn(v.shape, generator=g, dtype=torch.float64) for n, v in base.items()} for _ in range(number)
    ]
    return base, made


def close(a, b, tolerance=1e-12):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=0)


def operators(base):
    """Every operator of several models as a function of them."""
    ones = {name: torch.ones_like(value) for name, value in base.items()}
    return {
        "average": merging.average,
        "task_arithmetic": lambda s: merging.task_arithmetic(base, s, 0.3),
        "ties": lambda s: merging.ties(base, s, 1.0, 0.4),
        "ties of the whole": lambda s: merging.ties(base, s, 1.0, 0.4, "model"),
        "breadcrumbs": lambda s: merging.breadcrumbs(base, s, 0.3, 0.7, 0.1),
        "fisher": lambda s: merging.fisher(s, [ones] * len(s)),
        "model_stock": lambda s: merging.model_stock(base, s),
        "pcb": lambda s: merging.pcb(base, s, 1.0, 0.2),
        "iso_c": lambda s: merging.iso_c(base, s, 1.0),
    }


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_models_does_not_matter(seed):
    base, made = drawn(seed, 4)
    for merge in operators(base).values():
        close(merge(made), merge([made[i] for i in (2, 0, 3, 1)]), 1e-10)


def test_one_model_is_itself():
    base, (one,) = drawn(0, 1)
    ones = {name: torch.ones_like(value) for name, value in base.items()}
    close(merging.average([one]), one)
    close(merging.task_arithmetic(base, [one], 1.0), one)
    close(merging.ties(base, [one], 1.0, 1.0), one)
    close(merging.fisher([one], [ones]), one)
    close(merging.model_stock(base, [one]), one)
    close(merging.breadcrumbs(base, [one], 1.0, 1.0, 0.3), one)


def test_equal_models():
    """Average, Fisher, TIES of all entries and model stock return them; iso_c flattens the spectrum of T tau."""
    base, (one,) = drawn(1, 1)
    same = [one] * 3
    f = {name: torch.rand(v.shape, dtype=torch.float64) + 0.1 for name, v in base.items()}
    for found in (
        merging.average(same),
        merging.fisher(same, [f] * 3),
        merging.ties(base, same, 1.0, 1.0),
        merging.model_stock(base, same),
    ):
        close(found, one, 1e-10)
    iso = merging.iso_c(base, same, 1.0)
    u, s, vh = np.linalg.svd((one["w"] - base["w"]).numpy(), full_matrices=False)
    np.testing.assert_allclose((iso["w"] - base["w"]).numpy(), 3 * s.mean() * u @ vh, atol=1e-10)
    np.testing.assert_allclose(np.linalg.svd((iso["w"] - base["w"]).numpy())[1], 3 * s.mean(), atol=1e-10)
    close({"b": iso["b"]}, {"b": one["b"]}, 1e-12)


def test_pcb_of_equal_models_keeps_the_largest_entries():
    g = torch.Generator().manual_seed(0)
    tau = torch.randn(100, 100, generator=g, dtype=torch.float64)
    base, one = {"w": torch.zeros_like(tau)}, {"w": tau}
    found = merging.pcb(base, [one] * 2, 1.0, 0.1)["w"]
    chosen = found != 0
    assert int(chosen.sum()) == 999, "one of the 1,000 has the least score, which weighs 0"
    clamped = tau.abs().clamp_max(tau.abs().flatten().sort().values[-1])
    torch.testing.assert_close(found[chosen].abs(), clamped[chosen], atol=1e-12, rtol=0)
    assert float(tau[chosen].abs().min()) > float(tau[~chosen].abs().sort().values[-2])


def test_ties_by_hand():
    """Kept: the larger half of each; signs of the sums + - +; means over those who agree."""
    base = {"w": torch.zeros(4)}
    a, b = torch.tensor([4.0, -3.0, 1.0, 0.5]), torch.tensor([2.0, 1.0, -1.5, 0.5])
    kept = merging.trimmed(torch.stack([a, b]), 0.5)
    assert kept.tolist() == [[4.0, -3.0, 0.0, 0.0], [2.0, 0.0, -1.5, 0.0]]
    assert merging.elected(kept).tolist() == [3.0, -3.0, -1.5, 0.0]
    assert merging.ties(base, [{"w": a}, {"w": b}], 2.0, 0.5)["w"].tolist() == [6.0, -6.0, -3.0, 0.0]
    assert merging.elected(torch.tensor([[1.0], [-1.0]])).tolist() == [1.0], "a sum of 0 counts as positive"
    assert merging.trimmed(torch.tensor([[1.0, -1.0, 1.0]]), 1 / 3).tolist() == [[1.0, 0.0, 0.0]], "the lower index first"


def test_ties_against_a_loop():
    base, made = drawn(5, 4)
    found = merging.ties(base, made, 0.7, 0.3)
    for name, start in base.items():
        taus = [(m[name] - start).flatten().tolist() for m in made]
        n = len(taus[0])
        for tau in taus:
            order = sorted(range(n), key=lambda i, tau=tau: (-abs(tau[i]), i))[round(0.3 * n) :]
            for i in order:
                tau[i] = 0.0
        for i in range(n):
            column = [tau[i] for tau in taus]
            sign = 1 if sum(column) >= 0 else -1
            agree = [v for v in column if v * sign > 0]
            expected = 0.7 * sum(agree) / len(agree) if agree else 0.0
            assert float((found[name] - start).flatten()[i]) == pytest.approx(expected, abs=1e-12)


def test_dare_is_unbiased_and_drops_the_share():
    base, (one,) = drawn(2, 1)
    total = {name: torch.zeros_like(v) for name, v in base.items()}
    zeros = 0
    for seed in range(2000):
        found = merging.dropped(base, one, 0.6, torch.Generator().manual_seed(seed))
        for name, value in found.items():
            total[name] += value - base[name]
        zeros += int((found["b"] == base["b"]).sum())
    assert zeros / (2000 * 6) == pytest.approx(0.6, abs=0.02)
    for name, value in total.items():
        torch.testing.assert_close(value / 2000, one[name] - base[name], atol=0.03, rtol=0)
    close(merging.dropped(base, one, 0.0, torch.Generator()), one, 1e-12)


def test_breadcrumbs_by_hand_and_in_small_tensors():
    base, tau = {"w": torch.zeros(5)}, torch.tensor([5.0, -4.0, 3.0, 2.0, 1.0])
    assert merging.breadcrumbs(base, [{"w": tau}], 1.0, 0.4, 0.2)["w"].tolist() == [0.0, -4.0, 3.0, 0.0, 0.0]
    assert merging.breadcrumbs(base, [{"w": tau}], 1.0, 0.6, 0.01)["w"].tolist() == [5.0, -4.0, 3.0, 0.0, 0.0], "none on top"
    assert merging.breadcrumbs(base, [{"w": tau}], 1.0, 1.0, 0.5)["w"].tolist() == tau.tolist(), "no room for dropping"


def test_fisher_by_hand():
    a, b = {"w": torch.tensor([1.0, 1.0, 1.0])}, {"w": torch.tensor([3.0, 3.0, 3.0])}
    f, h = {"w": torch.tensor([1.0, 0.0, 0.0])}, {"w": torch.tensor([3.0, 2.0, 0.0])}
    assert merging.fisher([a, b], [f, h])["w"].tolist() == [2.5, 3.0, 2.0]


def test_model_stock_by_hand():
    """Two task vectors with the cosine c: t = 2 c / (1 + c); opposed ones leave the start."""
    base = {"w": torch.zeros(2, dtype=torch.float64)}
    a, b = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.6, 0.8], dtype=torch.float64)
    found = merging.model_stock(base, [{"w": a}, {"w": b}])["w"]
    torch.testing.assert_close(found, 2 * 0.6 / 1.6 * (a + b) / 2)
    assert merging.model_stock(base, [{"w": a}, {"w": -0.5 * a}])["w"].abs().max() == 0
    assert merging.model_stock(base, [{"w": 0 * a}, {"w": 0 * a}])["w"].abs().max() == 0


def test_slerp_by_hand():
    a, b = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}
    half = math.sin(math.pi / 4)
    assert merging.slerp(a, b, 0.5)["w"].tolist() == pytest.approx([half, 2 * half])
    for share, end in ((0.0, a), (1.0, b)):
        torch.testing.assert_close(merging.slerp(a, b, share)["w"], end["w"], atol=1e-7, rtol=0)
    line = merging.slerp(a, {"w": torch.tensor([3.0, 0.0])}, 0.25)["w"]
    assert line.tolist() == [1.5, 0.0], "parallel: on the line"
    assert merging.slerp(a, {"w": torch.zeros(2)}, 0.5)["w"].tolist() == [0.5, 0.0]


def test_a_moving_average_with_the_right_momentum_is_the_mean():
    _, made = drawn(3, 5)
    state = made[0]
    for n, new in enumerate(made[1:], 2):
        state = merging.moving_average(state, new, 1 - 1 / n)
    close(state, merging.average(made), 1e-12)


def test_numbers_come_back_as_they_were():
    base = {"w": torch.zeros(4, 4, dtype=torch.bfloat16)}
    made = [{"w": torch.randn(4, 4).bfloat16()} for _ in range(2)]
    assert all(merge(made)["w"].dtype == torch.bfloat16 for merge in operators(base).values())


# --- the learner


def taught(*words, experiences=3):
    (config,) = compose(
        ["learner=merge", *NARROW, "learner.lr=0.05", "learner.backbone_lr=0.02", "learner.batch_size=8", *words]
    )
    t = Trial(config, small_stream(), Capabilities())
    learner, runtime, pipeline = t.start()
    states = []
    for i in range(experiences):
        t.learn(learner, runtime, pipeline, i)
        states.append(detached(learner.state_dict()))
    return learner, states


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("learner.operator=mean", r"unknown learner\.operator=mean: choose average, task_arithmetic"),
        ("learner.start=old", r"unknown learner\.start=old"),
        ("learner.amount=0.5", r"learner\.amount=0\.5 has no effect with learner\.operator=average"),
        ("learner.operator=slerp learner.scale=1", r"learner\.scale=1 has no effect with learner\.operator=slerp"),
        ("learner.operator=ties learner.amount=2", r"learner\.amount must be a share"),
        ("learner.operator=dare learner.amount=1", r"learner\.amount must be a share"),
    ],
)
def test_refused(words, message):
    with pytest.raises(UserError, match=message):
        taught(*words.split(), experiences=0)


@pytest.mark.parametrize("operator", ["average", "task_arithmetic", "ties", "iso_c", "model_stock"])
def test_what_answers_is_the_operator_of_all_copies(operator):
    learner, states = taught(f"learner.operator={operator}")
    bank, first = learner.bank, learner.first
    assert len(bank) == 3 and all(fingerprint(a) != fingerprint(b) for a, b in itertools.pairwise(bank))
    made = {
        "average": lambda: merging.average(bank),
        "task_arithmetic": lambda: merging.task_arithmetic(first, bank, 0.3),
        "ties": lambda: merging.ties(first, bank, 1.0, 0.2),
        "iso_c": lambda: merging.iso_c(first, bank, 1.0),
        "model_stock": lambda: merging.model_stock(first, bank),
    }[operator]()
    for name, p in learner.model.named_parameters():
        if p.requires_grad:
            assert torch.equal(p, made[name]), name
    for block in range(2):
        key = f"blocks.{block}.weight"
        assert torch.equal(states[block]["head"][key], states[2]["head"][key]), "rows of an earlier experience moved"


@pytest.mark.parametrize("operator", ["dare", "breadcrumbs", "fisher", "pcb", "slerp", "ema"])
def test_every_operator_runs_and_goes_on(operator):
    learner, states = taught(f"learner.operator={operator}")
    assert (len(learner.bank), len(learner.information)) == (0 if operator in FOLDED else 3, 3 * (operator == "fisher"))
    # the second experience has one class: a softmax over it has no gradient, and its copy no information
    assert len({fingerprint(s["model"]) for s in states}) == 3 - (operator == "fisher")
    assert all(torch.isfinite(p).all() for p in learner.model.parameters())


def test_a_single_experience_is_training():
    """After one experience average, slerp and ema have nothing to merge."""
    prints = {fingerprint(taught(f"learner.operator={o}", experiences=1)[1][0]["model"]) for o in ("average", "slerp", "ema")}
    assert len(prints) == 1


def test_copies_start_from_the_first_weights_or_from_the_merged_ones():
    """With a rate of 0 every copy is its start: theta_0 both ways, and nothing ever moves."""
    for start in ("initial", "merged"):
        learner, _ = taught(f"learner.start={start}", "learner.backbone_lr=0")
        assert all(torch.equal(state[name], learner.first[name]) for state in learner.bank for name in learner.first)
    away, near = (taught(f"learner.start={start}", experiences=2)[0].bank[1] for start in ("initial", "merged"))
    assert fingerprint(away) != fingerprint(near)


def test_a_module_is_merged_alone():
    learner, states = taught("pet=lora")
    assert "model" not in states[0] and set(learner.first) == {name for name, _ in learner.pet.named_parameters()}
    assert SCALE.keys() & AMOUNT.keys() == {"ties", "breadcrumbs", "pcb"}
