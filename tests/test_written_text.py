"""Text that a model writes: sampling against a naive version, what is replayed of it, generations that learn it."""

import functools

import numpy as np
import pytest
import torch
from test_cpt_train import INFINITE, STEPS, experiences, learn, learner, weights
from token_models import Bigram

from clbench.config import compose
from clbench.interfaces import UserError
from clbench.learners.generations import Generations
from clbench.learners.pretrain import Pretrain
from clbench.models.decoder import build_decoder
from clbench.run.runner import prepare
from clbench.streams.tokens.scenario import Domain, content_sha256, scenario
from clbench.training.pretraining import written_text
from clbench.training.pretraining.data_mixture import Replay
from clbench.training.pretraining.segments import PretrainRuntime
from clbench.training.schedules import cosine

WRITTEN = {"replay": Replay(share=0.3, source="generated")}
SHAPE = {"name": "d", "vocab": 11, "width": 16, "depth": 2, "heads": 2, "context": 7}


def decoder(**options):
    made = build_decoder(**SHAPE, **options)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(3)  # far from uniform
    return made.eval()


def by_hand(model, first, draws, temperature):
    """Every token from a pass over all before it."""
    rows = []
    for token, row in zip(first.tolist(), draws.tolist(), strict=True):
        text = [token]
        for draw in row:
            with torch.no_grad():
                p = torch.softmax(model(torch.tensor([text]))[0, -1].double() / temperature, -1).numpy()
            text.append(int(np.flatnonzero(np.cumsum(p) > draw * p.sum())[0]))
        rows.append(text)
    return torch.tensor(rows)


@pytest.mark.parametrize(
    "options",
    [{}, {"parallel": False}, {"rotary": 0.0, "activation": "relu"}, {"mup": 8}, {"tied": True}, {"attention": "sdpa"}],
    ids=str,
)
def test_kept_keys_change_nothing(options):
    model, draws = decoder(**options), torch.from_numpy(np.random.default_rng(1).random((5, 7)))
    first = torch.tensor([0, 3, 10, 3, 5])
    for temperature in (0.7, 1.5):
        found = model.sample(first, draws, temperature)
        assert found.tolist() == by_hand(model, first, draws, temperature).tolist() and found.dtype == torch.int64
    with pytest.raises(UserError, match="a text of 8 tokens is longer than the context of 7"):
        model.sample(first, torch.zeros(5, 8))


def test_texts_come_from_the_distribution_of_the_model():
    model, number = decoder(), 20_000
    draws = torch.from_numpy(np.random.default_rng(0).random((number, 1)))
    found = model.sample(torch.full((number,), 4), draws, 1.0)[:, 1]
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([[4]]))[0, 0].double(), -1)
    assert (torch.bincount(found, minlength=11) / number - p).abs().max() < 0.012
    assert (model.sample(torch.full((9,), 4), draws[:9], 1e-3)[:, 1] == p.argmax()).all(), "a low temperature is greedy"
    assert model.sample(torch.tensor([4]), torch.ones(1, 1, dtype=torch.float64)).max() < 11


def test_bf16_writes_too():
    model = decoder()
    model.precision = "bf16"
    found = model.sample(torch.tensor([1, 2]), torch.full((2, 7), 0.5, dtype=torch.float64))
    assert found.shape == (2, 8) and found.min() >= 0 and found.max() < 11


def writer(temperature=1.0):
    runtime = PretrainRuntime(seed=0, device=torch.device("cpu"), flops_per_token=3.0)
    return written_text.WrittenText(Bigram(8, 8, 6, seed=3), runtime, temperature)


def test_writing_is_a_function_of_the_key_and_begins_as_texts_do(monkeypatch):
    text = experiences(1)[0].train
    made = writer()
    made.note(text)
    counts = np.bincount(text.read(np.arange(len(text))).ravel(), minlength=8)
    assert np.allclose(made.shares.numpy(), counts / counts.sum())
    made.shares[3] = 0
    made.write(300, 6, key=5)
    whole = made.tokens.clone()
    assert whole.shape == (300, 7) and not (whole[:, 0] == 3).any() and (whole[:, 1:] == 3).any()
    shares = np.bincount(whole[:, 0].numpy(), minlength=8) / 300
    assert np.abs(shares - (made.shares / made.shares.sum()).numpy()).max() < 0.07
    monkeypatch.setattr(written_text, "AT_ONCE", 37)
    made.write(300, 6, key=5)
    assert (made.tokens == whole).all(), "in any pieces"
    made.write(10, 6, key=6, after=True)
    assert len(made) == 310 and (made.tokens[:300] == whole).all() and (made.tokens[300:] != whole[:10]).any()
    assert made.runtime.ledger.written == 610 * 6 and made.runtime.ledger.flops == pytest.approx(610 * 6)
    made.write(4, 6, key=5)
    assert (made.tokens == whole[:4]).all(), "a longer text begins as a shorter one"
    made.note(text, alone=True)
    assert made.shares.sum() == pytest.approx(1)


def test_written_text_stands_in_for_old_text():
    made = learner(Pretrain, **INFINITE, **WRITTEN)
    assert not Pretrain.capabilities_of(replay=vars(WRITTEN["replay"])).stores_exemplars
    assert Pretrain.capabilities_of(replay={"share": 0.0, "source": "generated"}) == Pretrain.capabilities_of()
    some = experiences(3)
    alone = [type(e)(**{**vars(e), "past": ()}) for e in some]
    learn(made, alone[:1])
    assert made.runtime.ledger.written == 0
    evaluated = writer()
    evaluated.model.load_state_dict(made.model.state_dict())
    evaluated.note(some[0].train)
    number = int(np.ceil(0.3 * 4 * STEPS)) + 1
    made.runtime.begin(1)
    evaluated.write(number, 6, made.runtime.key("write"))
    seen = []
    clear, made.written.clear = made.written.clear, lambda: (seen.append(made.written.tokens.clone()), clear())
    made.learn(alone[1])
    assert (seen[0] == evaluated.tokens).all(), "by the weights that were evaluated, not by the trunk"
    ledger = made.runtime.ledger
    replayed = ledger.trunk_replay + ledger.branch_replay
    assert abs(replayed - 0.3 * STEPS * 4 * 6) < 6 and ledger.written == number * 6 and ledger.replay_bytes == 0
    assert len(made.written) == 0, "what was learned is not kept"


def test_every_written_text_is_replayed_once():
    made = learner(Pretrain, **WRITTEN)
    some = [type(e)(**{**vars(e), "past": ()}) for e in experiences(2)]
    learn(made, some[:1])
    read, real = [], written_text.WrittenText.read
    made.written.read = lambda places: read.extend(places) or real(made.written, places)
    made.runtime.begin(1)
    made.learn(some[1])
    assert len(read) == len(set(read)) == round(0.3 * STEPS * 4)


def one_domain(tokens=STEPS * 4 * 6):
    text = np.random.default_rng(2).integers(0, 8, 3000).astype(np.uint8)
    made = Domain("d", text, text[:300], content_sha256(text))
    options = {"vocab": 8, "tokens": tokens, "context": 6, "batch": 4, "eval_tokens": 60}
    return scenario("s", [made], [0, 0, 0], **options)


def rows(data):
    return sorted(map(tuple, data.read(np.arange(len(data))).tolist()))


def generations(data):
    """A learner after two generations, what the third learns, and D_0."""
    stream = one_domain()
    made = learner(Generations, data=data)
    made.runtime.stream_steps = (STEPS,) * 3
    written = []
    for k in range(3):
        experience = stream.experience(k, data != "replace")
        if k:
            experience.train.close()  # the real text of a later generation is not read
        learned, real = {}, made.inner.run
        made.inner.run = lambda e, plan, owner, learned=learned, real=real: (
            learned.update(e=e, plan=plan),
            real(e, plan, owner=owner),
        )[1]
        learn(made, [experience])
        made.inner.run = real
        if k:
            written.append([tuple(row) for row in made.written.tokens[-STEPS * 4 :].tolist()])
    return made, learned, stream.experience(0, False).train, written


@pytest.mark.parametrize("data", ["replace", "accumulate", "subsample"])
def test_what_a_generation_learns(data):
    made, learned, real, (first, second) = generations(data)
    found, plan, number = rows(learned["e"].train), learned["plan"][0], STEPS * 4
    pool = [*rows(real), *first, *second]
    if data == "replace":
        assert found == sorted(second) and len(made.written) == number and made.runtime.ledger.replay_bytes == 0
    else:
        assert len(made.written) == 2 * number and made.runtime.ledger.replay_bytes == number * 6
    if data == "accumulate":
        assert found == sorted(pool) and (plan.steps, plan.before) == (3 * STEPS, STEPS + 2 * STEPS)
        assert made.runtime.ledger.trunk_new == (1 + 2 + 3) * STEPS * 24
    else:
        assert (plan.steps, plan.before) == (STEPS, 2 * STEPS)
    if data == "subsample":
        places = learned["e"].train.ids(np.arange(number))
        assert len(set(places.tolist())) == len(found) == number and set(found) <= set(pool)
        assert all(((places >= a) & (places < a + number)).any() for a in (0, number, 2 * number)), "of all that there is"
    assert (plan.start_from, plan.optimizer) == ("init", "reset") and plan.mixture["data"] == data


def test_a_generation_starts_from_fresh_weights():
    schedule = functools.partial(cosine, warmup=0.1, end=0.1)
    made, stream = learner(Generations, schedule=schedule), one_domain()
    learn(made, [stream.experience(0, False)])
    plain = learn(learner(Pretrain, schedule=schedule), [stream.experience(0, False)])
    assert weights(made.inner) == weights(plain)
    experience = stream.experience(1, False)
    learn(made, [experience])
    again = learner(Pretrain, schedule=schedule)
    learned = type(experience)(**{**vars(experience), "train": made._learned(experience).train})
    learn(again, [learned])
    assert weights(made.inner) == weights(again)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("learner=generations",), "learner generations does not fit scenario cpt_synthetic: needs_one_domain"),
        (
            ("learner=generations", "scenario.order=[0,0]", "learner.data=add"),
            "learner.data must be one of replace, accumulate",
        ),
        (
            ("learner=generations", "scenario.order=[0,0]", "learner.temperature=0"),
            "learner.temperature must be above 0, got 0",
        ),
        (("learner=generated_replay", "learner.replay.allocation=equal"), "replay.allocation must be tokens"),
        (
            ("learner=generations", "scenario.order=[0,0]", "learner.data=accumulate", "scenario.budget.processed=400000"),
            "experience 1: the plan trains on 798720 tokens, the budget allows 400000",
        ),
        (
            ("learner=generations", "scenario.order=[0,0]", "learner.data=accumulate", "scenario.budget.exemplar_bytes=0"),
            "stores_exemplars, and the budget allows none",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_it_starts(tmp_path, words, message):
    with pytest.raises(UserError) as error:
        prepare(compose.compose(["scenario=cpt_synthetic", *words, f"results_dir={tmp_path}"])[0])
    assert message in str(error.value)


def test_generated_replay_needs_no_room_for_old_text(tmp_path):
    words = ["scenario=cpt_synthetic", "learner=generated_replay", "scenario.budget.exemplar_bytes=0"]
    assert prepare(compose.compose([*words, f"results_dir={tmp_path}"])[0])


def test_a_model_that_cannot_write_is_named():
    model = Bigram(8, 8, 6, seed=3)
    model.sample = None
    with pytest.raises(UserError, match="text is written by a model that has `sample`, as decoders do; Bigram has not"):
        written_text.WrittenText(model, PretrainRuntime(seed=0, device=torch.device("cpu")))
