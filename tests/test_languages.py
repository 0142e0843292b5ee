"""Synthetic languages: entropies by hand, losses against enumeration, samples against their distributions."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.interfaces import UserError
from clbench.streams.tokens.languages import synthetic
from clbench.streams.tokens.markov import Hmm, Markov


def h(*p):
    return -sum(x * math.log(x) for x in p if x)


def test_entropy_of_a_two_state_chain_by_hand():
    # p(1 | 0) = 1/4, p(0 | 1) = 1/2: stationary (2/3, 1/3)
    chain = Markov(np.array([[6, 2], [4, 4]]))
    np.testing.assert_allclose(chain.stationary, [2 / 3, 1 / 3], atol=1e-12)
    assert chain.entropy_rate == pytest.approx(2 / 3 * h(0.25, 0.75) + math.log(2) / 3, abs=1e-9)
    assert chain.entropy_is_exact
    loss = [math.log(3), math.log(2), math.log(2), -math.log(0.75)]  # 1, then 1 -> 1 -> 0 -> 0
    np.testing.assert_allclose(chain.nats(np.array([1, 1, 0, 0])), loss, atol=1e-9)
    assert chain.bayes_loss(np.array([1, 1, 0, 0])) == pytest.approx(np.mean(loss), abs=1e-9)


def test_divergence_by_hand():
    first, second = Markov(np.array([[6, 2], [4, 4]])), Markov(np.array([[4, 4], [4, 4]]))
    assert first.divergence(second) == pytest.approx(2 / 3 * (math.log(2) - h(0.25, 0.75)), abs=1e-9)
    assert first.divergence(first) == 0
    never = Markov(np.array([[8, 0], [4, 4]]))
    assert first.divergence(never) == math.inf
    assert never.divergence(second) == pytest.approx(math.log(2), abs=1e-6)


def test_a_periodic_chain_has_a_stationary_distribution_and_no_entropy():
    chain = Markov(np.array([[0, 2], [2, 0]]))
    np.testing.assert_allclose(chain.stationary, [0.5, 0.5])
    assert chain.entropy_rate == 0
    assert chain.bayes_loss(np.array([0, 1, 0, 1])) == pytest.approx(math.log(2) / 4)
    assert set(map(tuple, chain.sample(1000, 3).reshape(-1, 2).tolist())) <= {(0, 1)} or chain.sample(1, 3)[0] == 1


def test_a_loss_of_order_two_is_the_chain_rule():
    """Against probabilities summed over all texts of the stationary chain."""
    source = synthetic(9, 3, "markov", 1.0, 1, 5)
    p, pi = source.probabilities, source.stationary
    total = 0.0
    for text in itertools.product(range(3), repeat=4):
        direct = pi[text[0] * 3 + text[1]] * p[text[0] * 3 + text[1], text[2]] * p[text[1] * 3 + text[2], text[3]]
        assert math.exp(-source.nats(np.array(text)).sum()) == pytest.approx(direct, rel=1e-9)
        total += direct
    assert total == pytest.approx(1)
    for length in (1, 2):  # shorter than a state and its successor
        texts = np.array(list(itertools.product(range(3), repeat=length)))
        assert np.exp(-source.nats(texts).sum(1)).sum() == pytest.approx(1)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_forward_algorithm_against_all_hidden_paths(data):
    states, vocab, length = (data.draw(st.integers(a, b)) for a, b in ((2, 3), (2, 3), (1, 5)))
    source = synthetic(states, vocab, "hmm", 1.0, data.draw(st.integers(0, 3)), data.draw(st.integers(0, 99)))
    text = data.draw(st.lists(st.integers(0, vocab - 1), min_size=length, max_size=length))
    move, word = source.transitions / source.transitions[0].sum(), source.emissions / source.emissions[0].sum()
    direct = 0.0
    for path in itertools.product(range(states), repeat=length):
        p = source.stationary[path[0]]
        for t, state in enumerate(path):
            p *= word[state, text[t]] * (move[path[t - 1], state] if t else 1)
        direct += p
    assert math.exp(-source.nats(np.array(text)).sum()) == pytest.approx(direct, rel=1e-9)


def test_hmm_that_shows_its_states_is_a_chain():
    moves = np.array([[12, 4], [8, 8]])
    shown = Hmm(moves, np.array([[2, 0], [0, 2]]))
    chain = Markov(moves)
    text = chain.sample(300, 1)
    np.testing.assert_allclose(shown.nats(text), chain.nats(text), atol=1e-9)
    assert shown.entropy_rate == pytest.approx(chain.entropy_rate, abs=0.01) and not shown.entropy_is_exact


@pytest.mark.parametrize(("kind", "states", "vocab"), [("markov", 8, 8), ("markov", 64, 8), ("hmm", 6, 12)])
def test_the_loss_of_a_sample_converges_to_the_entropy(kind, states, vocab):
    source = synthetic(states, vocab, kind, 0.5, 2, 11)
    text = source.sample(400_000, 4)
    assert text.dtype == np.uint16 and text.max() < vocab and len(text) == 400_000
    assert source.bayes_loss(text) == pytest.approx(source.entropy_rate, abs=0.01)


def test_samples_follow_the_tables():
    source = synthetic(16, 4, "markov", 0.0, 0, 3)
    text = source.sample(200_000, 9).astype(int)
    state = text[:-2] * 4 + text[1:-1]
    seen = np.zeros((16, 4))
    np.add.at(seen, (state, text[2:]), 1)
    expected = source.stationary[:, None] * source.probabilities * (len(text) - 2)
    # neighbouring draws are independent given the state, so the counts of a row are multinomial: chi-square, 48 degrees
    rows = seen.sum(1, keepdims=True)
    chi = ((seen - rows * source.probabilities) ** 2 / (rows * source.probabilities)).sum()
    assert 20 < chi < 90
    assert np.abs(seen - expected).max() < 6 * math.sqrt(expected.max())


def test_first_tokens_follow_the_stationary_distribution():
    chain = Markov(np.array([[15, 1], [8, 8]]))
    first = np.array([chain.sample(1, key)[0] for key in range(4000)])
    assert first.mean() == pytest.approx(1 / 9, abs=0.02)


@pytest.mark.parametrize(("kind", "states"), [("markov", 9), ("hmm", 5)])
def test_a_shorter_sample_is_the_front_of_a_longer(kind, states):
    source = synthetic(states, 3, kind, 1.0, 1, 0)
    long = source.sample(70_000, 2)  # across the generator's blocks
    for n in (0, 1, 2, 3, 65_536, 65_539):
        np.testing.assert_array_equal(source.sample(n, 2), long[:n])
    assert (source.sample(500, 3) != long[:500]).any()


def test_pinned_tokens():
    """Integer arithmetic only: these must be the same on every machine and never change."""
    assert synthetic(8, 8, "markov", 0.5, 1, 0).sample(16, 0).tolist() == PINNED[0]
    assert synthetic(4, 8, "hmm", 0.5, 1, 0).sample(16, 0).tolist() == PINNED[1]


PINNED = ([5, 7, 1, 1, 0, 7, 1, 5, 3, 1, 3, 0, 0, 1, 3, 0], [3, 3, 6, 2, 1, 7, 1, 1, 5, 3, 0, 6, 3, 5, 3, 2])


def test_shift_is_a_dial():
    zero = synthetic(64, 8, "markov", 0.0, 0, 1)
    found = [zero.divergence(synthetic(64, 8, "markov", shift, 1, 1)) for shift in np.linspace(0, 1, 11).tolist()]
    assert found[0] == 0 and found[1] > 0
    assert all(a <= b for a, b in itertools.pairwise(found)) and found[-1] > 0.5
    at_half = [synthetic(64, 8, "markov", 0.5, i, 1) for i in range(3)]
    assert (at_half[1].counts == at_half[0].counts).all(1).sum() >= 32
    assert at_half[1].divergence(at_half[2]) > 0
    assert (synthetic(64, 8, "markov", 0.0, 5, 1).counts == zero.counts).all()
    same = synthetic(64, 8, "markov", 0.001, 1, 1)  # rounded up: a shift above 0 is never without effect
    assert (same.counts != zero.counts).any(1).sum() == 1


@pytest.mark.parametrize("seed", range(3))
def test_shift_of_a_hidden_chain(seed):
    zero = synthetic(8, 16, "hmm", 0.0, 0, seed)
    found = [zero.divergence(synthetic(8, 16, "hmm", shift, 1, seed)) for shift in (0.0, 0.1, 0.3, 0.6, 1.0)]
    assert found[0] == 0 and all(a < b for a, b in itertools.pairwise(found)) and found[-1] > 0.5
    with pytest.raises(AssertionError):  # a table whose rows are of different sizes is no source
        Hmm(zero.transitions + np.arange(8)[:, None], zero.emissions)  # type: ignore[attr-defined]


def test_what_cannot_be_costs_infinitely_much():
    assert Markov(np.array([[0, 2], [2, 0]])).bayes_loss(np.array([0, 0, 1])) == math.inf
    assert Hmm(np.array([[0, 2], [2, 0]]), np.array([[2, 0], [0, 2]])).bayes_loss(np.array([0, 0])) == math.inf


def test_seeds_and_words():
    one, two = (synthetic(8, 8, "markov", 0.0, 0, seed) for seed in (0, 1))
    assert (one.counts != two.counts).any()
    assert (one.counts > 0).all()  # every divergence is finite
    assert len({int(row.sum()) for row in one.counts}) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "pcfg"}, "markov or hmm"),
        ({"states": 1}, "states of a language must be a whole number from 2"),
        ({"states": True}, "states"),
        ({"vocab": 70_000}, "vocab of a language must be a whole number from 2 to 65536"),
        ({"vocab": 8.0}, "vocab"),
        ({"states": 12}, "a markov language of 8 words has 8, 64, ... states, not 12"),
        ({"shift": 1.5}, "shift between languages must be from 0 to 1"),
        ({"shift": math.nan}, "shift"),
        ({"index": -1}, "index"),
        ({"kind": "hmm", "states": 100_000}, "too large"),
    ],
)
def test_bad_options(given, message):
    with pytest.raises(UserError, match=message):
        synthetic(**{"states": 8, "vocab": 8, "kind": "markov", "shift": 0.5, "index": 0, "seed": 0, **given})


def test_bad_tokens_and_pairs():
    source = synthetic(8, 8, "markov", 0.5, 0, 0)
    with pytest.raises(UserError, match=r"tokens of this language are 0\.\.7"):
        source.nats(np.array([1, 8]))
    with pytest.raises(UserError, match="at least one"):
        source.nats(np.array([], int))
    with pytest.raises(UserError, match="same states"):
        source.divergence(synthetic(64, 8, "markov", 0.5, 0, 0))
    with pytest.raises(UserError, match="same vocabulary"):
        synthetic(8, 8, "hmm", 0.5, 0, 0).divergence(source)
