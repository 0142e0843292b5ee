"""Schedules against golden tables and by hand; every file in conf/schedule; what makes no sense."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.config import compose
from clbench.config.registry import choices
from clbench.interfaces import Place, UserError
from clbench.training import schedules as plain
from clbench.training import schedules_infinite as infinite
from clbench.training.pretraining.schedule_free import ScheduleFree


def at(schedule, step, steps=1000, experience=0, **options):
    return schedule(Place(experience, step, steps, experience * steps + step), **options)


GOLDEN_STEPS = (0, 5, 10, 100, 305, 600, 700, 850, 925, 1000)
GOLDEN = {  # rates for a peak of 3e-4, constant 1.65e-4, end 3e-5; warm-up 10, cool-down to 600, constant to 850 of 1000 steps
    "cosine": (0, 1.5e-4, 3e-4, 2.9240e-4, 2.3250e-4, 1.65e-4, 1.65e-4, 1.65e-4, 7.0356e-5, 3e-5),
    "linear": (0, 1.5e-4, 3e-4, 2.7941e-4, 2.3250e-4, 1.65e-4, 1.65e-4, 1.65e-4, 7.0356e-5, 3e-5),
    "inverse_sqrt": (0, 1.5e-4, 3e-4, 2.2835e-4, 1.8563e-4, 1.65e-4, 1.65e-4, 1.65e-4, 7.0356e-5, 3e-5),
}


@pytest.mark.parametrize("shape", sorted(GOLDEN))
def test_infinite_schedule_against_the_golden_table(shape):
    found = [3e-4 * at(infinite.infinite, n, shape=shape) for n in GOLDEN_STEPS]
    np.testing.assert_allclose(found, GOLDEN[shape], rtol=5e-5)


def test_infinite_schedule_in_later_experiences():
    for n, want in ((0, 0.55), (5, 0.55), (300, 0.55), (850, 0.55), (925, math.sqrt(0.55 * 0.1)), (1000, 0.1)):
        assert at(infinite.infinite, n, experience=3) == pytest.approx(want)
    assert at(infinite.infinite, 0, experience=0) == 0


def test_wsd_by_hand():
    shape = {"warmup": 0.1, "anneal": 0.2}
    assert [at(infinite.wsd, n, 100, **shape) for n in (0, 5, 10, 50, 80)] == [0, 0.5, 1, 1, 1]
    values = {"linear": 0.75, "sqrt": 0.5, "square": 1 - 1 / 16, "cosine": 0.5 * (1 + math.cos(math.pi / 4))}
    for name, value in values.items():
        assert at(infinite.wsd, 85, 100, shape=name, **shape) == pytest.approx(value)
        assert at(infinite.wsd, 85, 100, shape=name, end=0.2, **shape) == pytest.approx(0.2 + 0.8 * value)
        assert at(infinite.wsd, 100, 100, shape=name, end=0.2, **shape) == pytest.approx(0.2)
    assert at(infinite.wsd, 90, 100, shape="exponential", end=0.01, **shape) == pytest.approx(0.1)
    assert at(infinite.wsd, 90, 100, shape="inverse", end=0.1, **shape) == pytest.approx(1 / 5.5)
    assert at(infinite.wsd, 5, 100, experience=1, **shape) == 1  # the trunk goes on at the full rate
    assert at(infinite.wsd, 5, 100, experience=1, rewarm=True, **shape) == 0.5


def test_wsd_s_goes_on_after_its_anneals():
    found = [at(infinite.wsd, n, 100, warmup=0, anneal=0.2, shape="linear", periods=2) for n in range(100)]
    assert found[:41] == [1] * 41 and found[50:91] == [1] * 41
    np.testing.assert_allclose(found[41:50], np.arange(0.9, 0, -0.1))
    np.testing.assert_allclose(found[91:], np.arange(0.9, 0, -0.1))


def test_cosine_infinite():
    found = [at(infinite.cosine_infinite, n, 100, warmup=0.1, cooldown=0.9) for n in (0, 10, 50, 90, 99)]
    np.testing.assert_allclose(found, [0, 1, 0.55, 0.1, 0.1])
    assert at(infinite.cosine_infinite, 0, 100, experience=1) == 0.1


def test_repeated_cosine_from_zero_and_from_the_minimum():
    zero = [at(plain.repeated_cosine, n, 100, 1, warmup=0.1) for n in (0, 9, 10, 55, 99)]
    np.testing.assert_allclose(zero, [0.1, 1, 1, 0.55, 0.1 + 0.45 * (1 + math.cos(math.pi * 89 / 90))])
    assert [at(plain.repeated_cosine, n, 100, 1, warmup=0.1) for n in range(100)] == [
        at(plain.cosine, n, 100, warmup=0.1, end=0.1) for n in range(100)
    ]
    low = [at(plain.repeated_cosine, n, 100, 1, warmup=0.1, rewarm="end") for n in (0, 4, 9, 10)]
    np.testing.assert_allclose(low, [0.1 + 0.09, 0.1 + 0.45, 1, 1])
    assert at(plain.repeated_cosine, 0, 100, 0, warmup=0.1, rewarm="end") == 0.1  # the first warm-up starts at 0


@pytest.mark.parametrize("steps", [10, 11, 13])
def test_repeated_cosine_repeats_within_an_experience(steps):
    found = [at(plain.repeated_cosine, n, steps, warmup=0, end=0, repeats=3) for n in range(steps)]
    assert sum(value == 1 for value in found) == 3 and found[0] == 1
    tops = [i for i, value in enumerate(found) if value == 1]
    assert all(abs(b - a - steps / 3) <= 1 for a, b in zip(tops, [*tops[1:], steps], strict=True))


def test_autoregressive_cosine():
    peaks = [max(at(plain.autoregressive_cosine, n, 100, k, warmup=0.1, end=0.1) for n in range(100)) for k in range(3)]
    np.testing.assert_allclose(peaks, [1, 0.55, 0.1 + 0.45 * (1 + math.cos(math.pi * 2 / 3))])
    assert at(plain.autoregressive_cosine, 4, 100, 1, warmup=0.1, end=0.1) == pytest.approx(0.55 / 2)
    assert at(plain.autoregressive_cosine, 55, 100, 1, warmup=0.1, end=0.1) == pytest.approx(0.1 + 0.45 / 2)
    uneven = plain.autoregressive_cosine(Place(1, 0, 100, 300), warmup=0, end=0)  # 300 steps before, 100 here
    assert uneven == pytest.approx(0.5 * (1 + math.cos(math.pi * 3 / 4)))


def test_inverse_sqrt():
    options = {"warmup": 0.1, "scale": 0.1}
    assert at(plain.inverse_sqrt, 9, 100, **options) == at(plain.inverse_sqrt, 10, 100, **options) == 1
    assert at(plain.inverse_sqrt, 40, 100, **options) == pytest.approx(0.5)  # tau = (40 - 10 + 10) / 10
    assert at(plain.inverse_sqrt, 60, 100, 1, **options) == pytest.approx(0.25)  # goes on: tau = (160 - 10 + 10) / 10
    assert at(plain.inverse_sqrt, 40, 100, 1, restart=True, **options) == pytest.approx(0.5)
    assert at(plain.inverse_sqrt, 99, 100, end=0.4, **options) == 0.4
    top = at(plain.inverse_sqrt, 80, 100, **options)
    assert at(plain.inverse_sqrt, 90, 100, anneal=0.2, **options) == pytest.approx(top / 2)
    assert at(plain.inverse_sqrt, 0, 100, 1, anneal=0.2, **options) == at(plain.inverse_sqrt, 0, 100, 1, **options)


def test_rex_and_beta():
    assert at(plain.rex, 0, 100) == 1
    assert at(plain.rex, 50, 100) == pytest.approx(0.5 / 0.75)
    assert at(plain.rex, 50, 100, beta=0.0) == 0.5  # linear
    assert all(at(plain.rex, n, 100) > at(plain.linear, n, 100) for n in range(1, 100))


def test_exponential_by_hand():
    found = [at(plain.exponential, n, 5, gamma=0.9) for n in range(5)]
    np.testing.assert_allclose(found, [1, 0.9, 0.81, 0.729, 0.6561])
    assert at(plain.exponential, 50, 100, end=0.01) == pytest.approx(0.1)
    assert at(plain.exponential, 100, 100, end=0.5) == 0.5 == at(plain.exponential, 100, 100, experience=2, end=0.5)
    assert [at(plain.exponential, n, 100, warmup=0.02, gamma=0.5) for n in range(5)] == [0.5, 1, 1, 0.5, 0.25]
    assert at(plain.exponential, 51, 100, warmup=0.02, end=0.04) == pytest.approx(0.2)


def test_one_cycle_against_the_golden_values_and_torch():
    golden = [0.04, 0.52, 1, 0.950485, 0.811746, 0.611262, 0.388742, 0.188258, 0.049520, 4e-6]
    np.testing.assert_allclose([at(plain.one_cycle, n, 10) for n in range(10)], golden, atol=1e-6)
    for steps, shape, torchs in ((37, "cosine", "cos"), (20, "linear", "linear"), (2, "cosine", "cos")):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        options = {"total_steps": steps, "pct_start": 0.4, "anneal_strategy": torchs, "cycle_momentum": False}
        reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, div_factor=10, final_div_factor=100, **options)
        for n in range(steps):
            found = at(plain.one_cycle, n, steps, warmup=0.4, start=0.1, end=0.001, shape=shape)
            assert found == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
            optimizer.step()
            if n + 1 < steps:
                reference.step()
    assert at(plain.one_cycle, 0, 10, warmup=0.1) == 1  # the peak is the first update


def test_table_by_hand():
    assert [at(plain.table, n, 8, values=[0, 1, 0.5]) for n in (0, 2, 4, 6, 8)] == [0, 0.5, 1, 0.75, 0.5]
    assert [at(plain.table, n, 7) for n in range(8)] == pytest.approx([at(plain.linear, n, 7) for n in range(8)])
    assert at(plain.table, 3, 4, experience=5, values=(0, 0, 0, 1, 2)) == 1


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        (plain.exponential, {"end": 0}, "schedule.end must be above 0: an exponential decay never gets to 0"),
        (plain.exponential, {"gamma": 1.5}, "schedule.gamma must be above 0 and at most 1, got 1.5"),
        (plain.one_cycle, {"warmup": 1}, "schedule.warmup must be below 1"),
        (plain.one_cycle, {"start": -1}, "schedule.start must lie from 0 to 1, got -1"),
        (plain.table, {"values": [1]}, "schedule.values must be two numbers or more"),
        (plain.table, {"values": [1, -1]}, "schedule.values must be two numbers or more"),
        (plain.table, {"values": [0, 0]}, "schedule.values must be two numbers or more"),
        (plain.power, {"batch": 1, "context": 1, "sequence": 0}, "schedule.sequence must be at least 1 or null, got 0"),
    ],
)
def test_schedules_refuse(schedule, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        at(schedule, 0, **options)


def test_power_in_sequences_of_the_paper():
    """16 rows of 64 tokens are a quarter of a sequence of 4096: the law binds early instead of after 7.46 M tokens."""
    for tokens, rate in ((102_400, 2.784e-3), (400_000, 1.390e-3), (2_000_000, 6.116e-4)):
        place = Place(0, tokens // 1024, 10**6, tokens // 1024)
        options = {"batch": 16, "context": 64, "warmup": 0}
        assert 0.02 * plain.power(place, **options, sequence=4096) == pytest.approx(rate, rel=2e-3)
        assert plain.power(place, **options) == 1


@pytest.mark.parametrize(("billions", "rate"), [(1, 1.32e-2), (10, 4.07e-3), (100, 1.26e-3), (1000, 3.9e-4)])
def test_power_against_published_rates(billions, rate):
    step = billions * 10**9 // (128 * 4096)
    place = Place(0, step, 10**8, step)
    assert 0.02 * plain.power(place, batch=128, context=4096, warmup=0) == pytest.approx(rate, rel=0.005)


def test_power_has_a_lid_and_an_anneal():
    options = {"batch": 128, "context": 4096}
    assert at(plain.power, 500, 1000, **options) == 1  # 2.6e8 tokens: the law's rate is above the peak
    late = {"batch": 1, "context": 100, "anneal": 0.2, "end": 0.01}
    top = at(plain.power, 800, 1000, 3, **late)
    assert at(plain.power, 900, 1000, 3, **late) == pytest.approx(math.sqrt(top * 0.01))
    assert at(plain.power, 1000, 1000, 3, **late) == pytest.approx(0.01)


def test_constant_after_warmup():
    assert [at(plain.constant_after_warmup, n, 100, warmup=0.04) for n in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1, 1, 1]
    assert at(plain.constant_after_warmup, 0, 100, 1, warmup=0.04) == 1


def schedules():
    for name in choices("schedule"):
        yield name, compose.build(compose.compose(["learner=finetune", f"schedule={name}"])[0]["learner"]["schedule"])


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 400), st.integers(0, 4), st.data())
def test_every_schedule_is_a_finite_multiplier_at_every_place(steps, experience, data):
    place = Place(experience, step := data.draw(st.integers(0, steps)), steps, experience * steps + step)
    for name, schedule in ALL:
        value = schedule(place)
        assert isinstance(value, float | int) and 0 <= value <= 1 + 1e-12, name
        assert schedule(place) == value


ALL = list(schedules())


def test_every_schedule_has_a_file():
    assert {name for name, _ in ALL} >= {
        "constant", "linear", "cosine", "repeated_cosine", "autoregressive_cosine", "inverse_sqrt", "wsd", "wsd_s",
        "cosine_infinite", "infinite", "rex", "power", "schedule_free", "multistep",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        (plain.repeated_cosine, {"warmup": 1.5}, "schedule.warmup must lie from 0 to 1, got 1.5"),
        (plain.repeated_cosine, {"repeats": 0}, "schedule.repeats must be from 1 to the number of steps, 1000"),
        (plain.autoregressive_cosine, {"end": -0.1}, "schedule.end"),
        (plain.inverse_sqrt, {"scale": 0.0}, "schedule.scale must be above 0"),
        (plain.rex, {"beta": 1.0}, "schedule.beta"),
        (plain.power, {"batch": 1, "context": 1, "end": 0.0}, "never gets to 0"),
        (infinite.wsd, {"shape": "exponential"}, "schedule.end must be above 0: an anneal of shape exponential"),
        (infinite.wsd, {"shape": "tanh"}, "schedule.shape must be one of linear"),
        (infinite.wsd, {"periods": 1001}, "schedule.periods"),
        (infinite.infinite, {"end": 0.0}, "never gets to 0"),
        (infinite.infinite, {"cooldown": 0.9}, "the phases must follow each other"),
        (infinite.infinite, {"warmup": 0.7}, "the phases must follow each other"),
        (infinite.infinite, {"shape": "sqrt"}, "schedule.shape must be cosine, inverse_sqrt or linear"),
        (infinite.cosine_infinite, {"cooldown": 0.0}, "the phases must follow"),
    ],
)
def test_what_makes_no_sense(schedule, options, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        for n in (0, 500, 990):
            at(schedule, n, **options)


def test_schedule_free_is_the_average_of_its_iterates():
    """SGD on a quadratic: against the recursion written out."""
    target, beta, rates = torch.tensor([1.0, -2.0]), 0.8, (0.1, 0.3, 0.3, 0.2)
    p = torch.zeros(2, requires_grad=True)
    rule = ScheduleFree([p], beta)
    x = z = torch.zeros(2)
    total = 0.0
    for rate in rates:
        y = (1 - beta) * z + beta * x
        torch.testing.assert_close(p.detach(), y)
        z = z - rate * (y - target)
        total += rate**2
        x = x + rate**2 / total * (z - x)
        p.grad = p.detach() - target
        torch.optim.SGD([p], lr=rate).step()
        rule.after_step(rate)
    training = p.detach().clone()
    rule.evaluate()
    torch.testing.assert_close(p.detach(), x)
    rule.train()
    torch.testing.assert_close(p.detach(), training)
    twin = ScheduleFree([torch.zeros(2)], beta)
    twin.load_state_dict(rule.state_dict())
    twin.train()
    torch.testing.assert_close(twin.params[0], training)
    assert twin.weight == rule.weight and twin.average[0] is not rule.average[0]


def test_schedule_free_with_one_rate_is_the_mean():
    p = torch.zeros(1, requires_grad=True)
    rule = ScheduleFree([p], 0.0)
    seen = []
    for _ in range(5):
        with torch.no_grad():
            p += 1.0
        seen.append(float(p.detach()))
        rule.after_step(0.5)
    rule.evaluate()
    assert float(p.detach()) == pytest.approx(np.mean(seen))
    with pytest.raises(UserError, match="beta"):
        ScheduleFree([p], 1.0)
