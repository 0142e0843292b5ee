"""What a batch is made of: exact quotas, allocation, source and timing of replay, what is counted as repeated."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.interfaces import UserError
from clbench.streams.entries import ExperienceEntry
from clbench.streams.tokens.data import TokenData, text_source
from clbench.training.pretraining.data_mixture import Mixture, Replay, quotas
from clbench.training.pretraining.ledger import Ledger


def text(domain=0, size=40, batch=8, context=4, steps=10, first=0):
    tokens = np.arange(1000 * domain, 1000 * domain + size * context + 1, dtype=np.uint16)
    entry = ExperienceEntry(f"d{domain}", domain=domain, first=first, sequences=size, steps=steps)
    return TokenData.of(entry, text_source(tokens, context), context, batch, key=17 + domain)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0.0, 1.0), min_size=1, max_size=5).filter(lambda x: sum(x) > 0.01),
    st.integers(1, 40),
    st.integers(1, 120),
)
def test_no_source_is_ever_a_sequence_away_from_its_share(weights, batch, steps):
    shares = np.array(weights) / np.sum(weights)
    counts, carry = quotas(np.repeat(shares[None], steps, 0), batch)
    assert (counts >= 0).all() and (counts.sum(1) == batch).all()
    owed = np.cumsum(np.repeat(shares[None] * batch, steps, 0), 0) - np.cumsum(counts, 0)
    assert np.abs(owed).max() < 1 + 1e-6 and np.allclose(owed[-1], carry)


def test_one_per_cent_of_batches_of_32_is_one_per_cent():
    counts, _ = quotas(np.repeat([[0.01, 0.99]], 100, 0), 32)
    assert counts[:, 0].sum() == 32 and counts[:, 0].max() == 1
    gaps = np.diff(np.flatnonzero(counts[:, 0]))
    assert gaps.min() >= 3 and gaps.max() <= 4  # one in 3.125 batches


def test_quotas_go_on_where_a_table_ended():
    shares = np.repeat([[0.03, 0.07, 0.9]], 50, 0)
    whole, _ = quotas(shares, 8)
    front, carry = quotas(shares[:20], 8)
    assert (np.concatenate([front, quotas(shares[20:], 8, carry)[0]]) == whole).all()


def test_shares_of_old_experiences():
    assert np.allclose(Replay(share=0.05).shares([300, 100]), [0.0375, 0.0125, 0.95])
    assert np.allclose(Replay(share=0.05, allocation="equal").shares([300, 100]), [0.025, 0.025, 0.95])
    assert np.allclose(Replay(share=None, allocation="inverse_t").shares([300, 100]), [1 / 3] * 3)
    assert Replay(share=0.5).shares([]).tolist() == [1.0]


def test_ibrahims_third_stage():
    """5 % of stage 3 over 300 B tokens and 300 B, of which 5 % were replayed: 51.2 : 48.8 (the paper's mixture weights)."""
    first, second = 300.0 + 0.05 * 300, 0.95 * 300
    shares = Replay(share=0.05).shares([first, second])  # type: ignore[list-item]
    assert shares[0] / shares[1] == pytest.approx(315 / 285)


def test_timing():
    assert Replay(share=0.1, timing="first", window=0.3).on(10).tolist() == [True] * 3 + [False] * 7
    assert Replay(share=0.1, timing="last", window=0.3).on(10).tolist() == [False] * 7 + [True] * 3
    table = Replay(share=0.5, timing="last", window=0.2).table(10, [40])
    made = Mixture(text(1), [text(0)], Replay(share=0.5, timing="last", window=0.2), table, seen=[40])
    assert made.counts[:, 0].tolist() == [0] * 8 + [4, 4] and made.counts.sum() == 80


@pytest.mark.parametrize(
    "options",
    [
        {"share": 1.0},
        {"share": -0.1},
        {"share": None},
        {"share": 0.1, "allocation": "inverse_t"},
        {"share": 0.1, "source": "buffer"},
        {"share": 0.1, "buffer_bytes": 10},
        {"share": 0.1, "source": "buffer", "buffer_bytes": 0},
        {"share": 0.1, "window": 0.5},
        {"share": 0.1, "timing": "first", "window": 0.0},
    ],
)
def test_options_that_contradict_each_other(options):
    with pytest.raises(UserError, match=r"replay\."):
        Replay(**options)


def batch_domains(made, steps=10):
    return [made(step)[:, 0] // 1000 for step in range(steps)]


def test_replay_displaces_new_text_and_keeps_the_original_order():
    replay = Replay(share=0.25)
    old, new = text(0), text(1)
    made = Mixture(new, [old], replay, replay.table(10, [40]), seen=[12])
    assert all((domain == 0).sum() == 2 and len(domain) == 8 for domain in batch_domains(made))
    replayed = [row for step in range(10) for row in made(step) if row[0] < 1000]
    expected = old.read(np.array([*range(12), *range(8)]))  # again from the front once the twelve are through
    assert (np.array(replayed) == expected).all()
    fresh = [row for step in range(10) for row in made(step) if row[0] >= 1000]
    assert (np.array(fresh[:40]) == new.read(np.arange(40))).all()


def test_a_batch_is_a_function_of_its_step_alone():
    replay = Replay(share=0.2, source="reshuffled")
    one, other = (Mixture(text(1), [text(0)], replay, replay.table(10, [40]), seen=[40]) for _ in range(2))
    for step in (7, 2, 9, 2):
        assert (one(step) == other(step)).all()
    late = Mixture(
        text(1), [text(0)], replay, replay.table(10, [40])[4:], first=4, seen=[40], starts=one.used(0, 4), carry=quotas(
            replay.table(10, [40])[:4], 8)[1].tolist(),
    )  # fmt: skip
    assert all((late(step) == one(step)).all() for step in range(4, 10))


def test_reshuffled_passes_visit_all_that_was_seen():
    replay = Replay(share=0.5, source="reshuffled")
    old = text(0)
    made = Mixture(text(1), [old], replay, replay.table(10, [40]), seen=[20])
    rows = np.array([row for step in range(10) for row in made(step) if row[0] < 1000])[:, 0]
    seen = old.read(np.arange(20))[:, 0]
    assert sorted(rows[:20]) == sorted(rows[20:40]) == sorted(seen) and rows[:20].tolist() != rows[20:40].tolist()


def test_a_buffer_keeps_its_bytes_and_shrinks_without_taking_anything_back():
    old = text(0)
    assert old.sequence_bytes == 8
    held = []
    for number in (1, 2, 4):
        replay = Replay(share=0.5, source="buffer", buffer_bytes=64)
        found = {int(i) for i in replay.numbers(old, 40, number, np.arange(200))}
        assert len(found) == 8 // number and replay.held_bytes([old] * number, [40] * number) <= 64
        held.append(found)
    assert held[2] < held[1] < held[0]
    with pytest.raises(UserError, match="holds no sequence of 8 bytes"):
        Replay(share=0.5, source="buffer", buffer_bytes=9).numbers(old, 40, 2, np.arange(3))
    assert Replay(share=0.5).held_bytes([old], [40]) == 320 and Replay().held_bytes([old], [40]) == 0


def test_what_counts_as_repeated():
    replay = Replay(share=0.25)
    made = Mixture(text(1, size=40), [text(0)], replay, replay.table(10, [40]), seen=[40])
    assert made.repeated(0, 10) == 20 + (60 - 40)  # 20 replayed, 60 new ones of which only 40 are different
    assert made.repeated(0, 6) == 12 and made.repeated(6, 10) == made.repeated(0, 10) - made.repeated(0, 6)
    again = Mixture(text(1, size=40), [], Replay(), np.ones((10, 1)), size=10)
    assert again.repeated(0, 10) == 70
    rows = np.array([row for step in range(5) for row in again(step)])[:, 0]
    assert all(sorted(rows[:10]) == sorted(rows[i : i + 10]) for i in (10, 20, 30))


def test_the_ledger_adds_up():
    ledger = Ledger()
    ledger.train("trunk", 90, 10, 10, 6.0)
    ledger.train("branch", 50, 0, 25, 6.0)
    ledger.look("probe", 30, 6.0)
    assert ledger.trained == 150 == ledger.unique + ledger.repeated and ledger.unique == 115
    assert ledger.flops == 900 and ledger.probe_flops == 60 and ledger.probe == 30
    other = Ledger()
    other.load_state_dict(ledger.state_dict())
    assert other == ledger


def test_quotas_of_many_sources_stay_exact():
    rng = np.random.default_rng(0)
    for batch, sources in itertools.product((1, 7, 32), (2, 9, 30)):
        shares = rng.dirichlet(np.ones(sources))
        counts, _ = quotas(np.repeat(shares[None], 400, 0), batch)
        assert np.abs(counts.sum(0) - 400 * batch * shares).max() < 1.5
