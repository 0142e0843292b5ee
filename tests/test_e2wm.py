"""E2WM: the penalty by hand, Fisher information against single rows, its limits, refusals."""

import pytest
import torch
from torch.nn import functional as F

from clbench.config.compose import compose
from clbench.interfaces import UserError
from clbench.learners.e2wm import LENGTH, E2wm, penalty
from clbench.learners.text_finetune import TextFinetune
from clbench.models.decoder import build_decoder
from clbench.models.pet_modules import lora
from clbench.run.plan import plan_job
from clbench.streams.tokens import base_text
from clbench.streams.tokens.text_data import open_experience
from clbench.streams.tokens.text_tasks import text_tasks
from clbench.training.runtime import Runtime

CPU = torch.device("cpu")
SCENARIO = text_tasks(name="t", tasks=["copy", "topic_4"], lines=24, test_lines=4, budget={"epochs": 8})
SHORT = {"epochs": 1, "rank": 2, "old_lines": 6}


def made(kind=E2wm, **options):
    model = build_decoder(name="d", vocab=256, width=16, depth=2, heads=2, context=64, rotary=0.5, seed=1)
    options = (SHORT if kind is E2wm else {}) | options
    return kind(model, Runtime(0, CPU, budget=SCENARIO.budget), **options)


def learn(learner, *tasks):
    for i in tasks:
        learner.runtime.begin(i)
        learner.learn(open_experience(SCENARIO, i, CPU))
    return learner


def test_penalty_by_hand():
    """A = (.5, -1), B = (1, 2)^T, s = 4: change ((2, -4), (4, -8))."""
    values = {"0/q/a": torch.tensor([[0.5, -1.0]]), "0/q/b": torch.tensor([[1.0], [2.0]])}
    fisher = {"0/q": torch.tensor([[1.0, 0.1], [0.2, 0.3]])}
    assert float(penalty(values, fisher, 4.0)) == pytest.approx(28.0)
    values |= {"1/fc1/a": torch.tensor([[1.0]]), "1/fc1/b": torch.tensor([[0.5]])}
    assert float(penalty(values, fisher | {"1/fc1": torch.tensor([[3.0]])}, 4.0)) == pytest.approx(28.0 + 3 * 4)


def test_fisher_of_single_rows():
    """The mean of squares of each row's own gradient, for the rows of q in each head."""
    learner = made()
    found = learner.old_fisher()
    assert not any(p.requires_grad for p in learner.model.parameters() if p is not None), "frozen again"
    rows = torch.from_numpy(base_text.old_text(6, LENGTH, learner.runtime.key("old text")))
    model = build_decoder(name="d", vocab=256, width=16, depth=2, heads=2, context=64, rotary=0.5, seed=1)
    qkv = model.layers[1].attention["query_key_value"].weight
    mlp = model.layers[0].mlp["dense_4h_to_h"].weight
    total = [torch.zeros_like(qkv), torch.zeros_like(mlp)]
    for row in rows:
        nats = F.cross_entropy(model(row[None])[0, :-1], row[1:], reduction="sum")
        total = [t + g.square() / 6 for t, g in zip(total, torch.autograd.grad(nats, [qkv, mlp]), strict=True)]
    of_q = total[0].view(2, 3, 8, 16)[:, 0].reshape(16, 16)
    assert torch.allclose(found["1/q"], of_q, rtol=1e-3, atol=1e-5) and torch.allclose(
        found["0/fc2"], total[1], rtol=1e-3, atol=1e-5
    )
    assert set(found) == {f"{i}/{layer}" for i in range(2) for layer in ("q", "k", "v", "proj", "fc1", "fc2")}


def test_without_strength_it_is_sequential_lora():
    def same(model, runtime):
        return lora(model, runtime, rank=2, targets=("q", "k", "v", "proj", "fc1", "fc2"), scale=4.0)

    plain = learn(made(TextFinetune, pet=same, lr=3e-3, epochs=1), 0, 1)
    free = learn(made(strength=0.0), 0, 1)
    assert free.fisher == {}
    for name, value in plain.pet.values.items():
        assert torch.equal(value, free.pet.values[name]), name
    held = learn(made(strength=10.0), 0)
    assert any(not torch.equal(v, held.pet.values[n]) for n, v in learn(made(strength=0.0), 0).pet.values.items())


def test_the_harder_it_holds_the_less_old_text_needs_changes():
    change = []
    for strength in (0.0, 1.0, 1e4):
        learner = learn(made(strength=strength, epochs=8), 0)
        fisher = learner.fisher or made().old_fisher()
        change.append(float(penalty(learner.pet.state(), fisher, 4.0)))
    assert change[0] > change[1] > change[2] and change[2] < change[0] / 5


def test_the_penalty_pulls_nothing_where_nothing_changed():
    learner = made()
    learner.fisher = learner.old_fisher()
    total = penalty(learner.pet.values, learner.fisher, 4.0)
    assert float(total.detach()) == 0
    total.backward()
    assert all(float(v.grad.abs().max()) == 0 for v in learner.pet.values.values())


def test_a_state_brings_the_fisher_information_back():
    learner = learn(made(), 0)
    other = made()
    other.load_state_dict(learner.state_dict())
    learn(learner, 1), learn(other, 1)
    for name, value in learner.pet.values.items():
        assert torch.equal(value, other.pet.values[name]), name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("learner.strength=-1",), r"learner\.strength must be from 0"),
        (("learner.old_lines=0",), "old_lines from 1"),
    ],
    ids=str,
)
def test_refused_before_anything_is_trained(tmp_path, words, said):
    base = ["scenario=text_tasks", "scenario.tasks=[copy]", "scenario.lines=8", "learner=e2wm", f"results_dir={tmp_path}"]
    with pytest.raises(UserError, match=said):
        plan_job(compose([*base, *words])[0])


def test_a_decoder_of_other_tokens_is_refused():
    model = build_decoder(name="words", vocab=300, width=16, depth=1, heads=2, context=64)
    with pytest.raises(UserError, match="model words reads 300 tokens: model=decoder_base"):
        E2wm(model, Runtime(0, CPU, budget=SCENARIO.budget))
