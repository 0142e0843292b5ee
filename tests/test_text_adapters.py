"""O-LoRA, progressive prompts, Q-tuning, SLM: each formula against a naive version, and what may be forgotten."""

import math

import numpy as np
import pytest
import torch
from test_pet_decoder import naive as naive_logits

from clbench.interfaces import UserError
from clbench.learners import o_lora, q_tuning, slm
from clbench.learners.o_lora import OLora
from clbench.learners.progressive_prompts import ProgressivePrompts
from clbench.learners.q_tuning import QTuning
from clbench.learners.slm import Slm
from clbench.learners.text_finetune import TextFinetune
from clbench.models.decoder import build_decoder
from clbench.models.pet_modules import lora
from clbench.streams.tokens.text_data import asked_batches, open_experience
from clbench.streams.tokens.text_tasks import text_tasks
from clbench.training.answer_loss import answer_loss
from clbench.training.runtime import Runtime
from clbench.training.state import fingerprint

CPU = torch.device("cpu")
SCENARIO = text_tasks(
    name="t", tasks=["copy", "reverse", "sort"], lines=24, test_lines=8, gap=None, budget={"epochs": 2, "exemplars": 0}
)
SHORT = {"epochs": 1, "batch_size": 8}


def made(kind, context=64, **options):
    model = build_decoder(name="d", vocab=256, width=16, depth=2, heads=2, context=context, rotary=0.5, seed=1)
    return kind(model, Runtime(0, CPU, budget=SCENARIO.budget), **(SHORT | options))


def learn(learner, *tasks):
    for i in tasks:
        learner.runtime.begin(i)
        learner.learn(open_experience(SCENARIO, i, CPU))
    return learner


def asked(j, task=True):
    entry = SCENARIO.manifest.evals[j]
    ((_, batch),) = asked_batches(SCENARIO.lines, entry.ids, 8, CPU, entry.task if task else None)
    return batch


def scores(learner, j, task=True):
    with torch.no_grad():
        return learner.next_token(asked(j, task))


def first_batch(i=0):
    return open_experience(SCENARIO, i, CPU).train.batch(np.arange(6))


# O-LoRA


def test_the_overlap_of_known_rows():
    past, new = torch.tensor([[1.0, 0, 0], [0, 1, 0]]), torch.tensor([[0.6, 0.8, 0], [0, 0.1, 1]])
    found = [float(o_lora.overlap(past, new, norm)) for norm in o_lora.NORMS]
    assert found == pytest.approx([1.5, 1.5 / 4, 1.01])


def naive_o_lora(learner, batch, values):
    """The loss with weights W + s (B_1 A_1 + B_2 A_2 + ...) set row by row, entries of the overlap added up one by one."""
    model = build_decoder(name="d", vocab=256, width=16, depth=2, heads=2, context=64, rotary=0.5, seed=1)
    state, total = {k: v.clone() for k, v in model.state_dict().items()}, 0.0
    for i in range(2):
        name = f"layers.{i}.attention.query_key_value.weight"
        for target, part in (("q", 0), ("v", 2)):
            past, new = ({k: source[f"{i}/{target}/{k}"] for k in "ab"} for source in (learner.past, values))
            for head in range(2):
                for d in range(8):
                    row, at = head * 24 + part * 8 + d, head * 8 + d
                    for old in (past, new):
                        state[name] = state[name].clone()
                        state[name][row] = state[name][row] + 4.0 * sum(
                            old["b"][at, r] * old["a"][r] for r in range(len(old["a"]))
                        )
            total = total + 0.5 * sum((p * n).sum().abs() for p in past["a"] for n in new["a"])
            total = total + 0.1 * (new["a"].square().sum().sqrt() + new["b"].square().sum().sqrt())
    z = torch.func.functional_call(model, state, (batch.tokens,))
    nats = torch.log_softmax(z, -1)
    asked = [
        -nats[b, t - 1, batch.tokens[b, t]]
        for b in range(len(batch))
        for t in range(int(batch.prompts[b]), int(batch.lengths[b]))
    ]
    return torch.stack(asked).mean() + total


def test_o_lora_against_loops():
    learner = learn(made(OLora, shrink=0.1, rank=3), 0, 1)
    assert {value.shape[0] for name, value in learner.past.items() if name.endswith("/a")} == {6}
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in learner.pet.values.values():
            value.normal_(0, 0.2, generator=draw)
    batch = first_batch(2)
    with learner.pet.use(o_lora.joined(learner.past, learner.pet.values)):
        loss = answer_loss(learner.model, batch) + learner.penalty()
    loss.backward()
    values = {name: value.detach().clone().requires_grad_() for name, value in learner.pet.values.items()}
    expected = naive_o_lora(learner, batch, values)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, value in learner.pet.values.items():
        torch.testing.assert_close(value.grad, values[name].grad, atol=2e-5, rtol=1e-4)
    assert all(p.grad is None for p in learner.model.parameters())


def test_o_lora_of_one_task_is_sequential_lora_and_pairs_can_be_merged():
    learner = learn(made(OLora, rank=3), 0)

    def pair(model, runtime):
        return lora(model, runtime, rank=3, targets=("q", "v"), scale=4.0)

    other = learn(made(TextFinetune, pet=pair, lr=3e-3), 0)
    assert fingerprint(learner.pet.state()) == fingerprint(other.pet.state())
    learn(learner, 1, 2)
    apart = scores(learner, 0)
    for i in range(2):
        weight = learner.model.layers[i].attention["query_key_value"].weight
        cut = weight.detach().view(2, 3, 8, 16)
        for target, part in (("q", 0), ("v", 2)):
            cut[:, part] += 4.0 * (learner.past[f"{i}/{target}/b"] @ learner.past[f"{i}/{target}/a"]).view(2, 8, 16)
    with torch.no_grad(), learner.pet.off():
        torch.testing.assert_close(learner.model(asked(0).tokens), apart, atol=1e-5, rtol=1e-4)


def test_the_overlap_falls_where_it_is_penalised():
    def final(orthogonal):
        learner = learn(made(OLora, orthogonal=orthogonal, lr=1e-2), 0, 1)
        pairs = [value.split(8) for name, value in learner.past.items() if name.endswith("/a")]
        return sum(float(o_lora.overlap(old, new, "l1_sum")) for old, new in pairs)

    assert final(0.5) < 0.8 * final(0.0)


# prompts


def test_progressive_prompts_stand_newest_first_and_forget_nothing():
    learner = made(ProgressivePrompts, length=2)
    at_once = []
    for i in range(3):
        learn(learner, i)
        at_once.append(scores(learner, i))
    table = {tuple(row.tolist()) for row in learner.model.embed_in.weight}
    fresh = made(ProgressivePrompts, length=2, lr=0.0)
    learn(fresh, 0)
    assert all(tuple(row.tolist()) in table for row in fresh.past), "a prompt starts as embeddings of tokens"
    for i, before in enumerate(at_once):
        assert torch.equal(scores(learner, i), before), "to the last bit"
    assert not torch.equal(learner.past[:2], learner.past[2:4]) and learner.number(None) == 0
    one = asked(1).tokens[0]
    with torch.no_grad():
        vectors = torch.cat([learner.past[2:4], learner.past[4:6], learner.model.embed_in.weight[one]])
        torch.testing.assert_close(scores(learner, 1)[0], naive_logits(learner.model, vectors)[4:], atol=2e-5, rtol=1e-4)
        with learner.pet.off():
            torch.testing.assert_close(scores(learner, 0, task=False), learner.model(asked(0).tokens))
    blind = made(ProgressivePrompts, length=2, task_id="none")
    learn(blind, 0)
    before = scores(blind, 0)
    learn(blind, 1)
    assert not torch.allclose(scores(blind, 0), before, atol=1e-4), "without the task a new prompt changes old answers"
    assert ProgressivePrompts.capabilities_of(task_id="none").needs_task_id is False


def test_prompts_that_do_not_fit():
    with pytest.raises(
        UserError, match=r"30 prompt vectors before lines of \d+ tokens need model.context=\d+ or more, it is 40"
    ):
        learn(made(ProgressivePrompts, context=40, length=30), 0)


def test_q_tuning_with_ones_is_a_row_of_prompts():
    queue, shared = torch.randn(3, 2, 5), torch.randn(4, 5)
    made_of = q_tuning.behind(shared, queue, torch.ones(6), torch.ones(5))
    assert torch.equal(made_of, torch.cat([shared, *queue]))
    u, v = torch.randn(6), torch.randn(5)
    found = q_tuning.behind(shared[:0], queue, u, v)
    for row in range(6):
        for d in range(5):
            assert float(found[row, d]) == pytest.approx(float(u[row] * v[d] * queue[row // 2, row % 2, d]), rel=1e-5)


def test_a_full_queue_keeps_the_directions_of_its_prompts():
    queue = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(3))
    left = q_tuning.without_one(queue)
    assert left.shape == (3, 2, 5)
    rows, mean = queue.flatten(1).double().numpy(), queue.flatten(1).double().numpy().mean(0)
    values, vectors = np.linalg.eigh(np.cov(rows.T, bias=True) * 4)
    for j, row in enumerate(left.flatten(1).double().numpy() - mean):
        direction = vectors[:, -1 - j]
        direction = direction * np.sign(direction[np.abs(direction).argmax()])
        np.testing.assert_allclose(row, math.sqrt(values[-1 - j]) * direction, atol=1e-5)
    assert torch.allclose(q_tuning.without_one(queue[:1].expand(3, 2, 5)), queue[:1].expand(2, 2, 5), atol=1e-6)


def test_the_price_of_a_moving_prefix():
    learner, batch = made(QTuning, shared=2), first_batch()
    before = learner.shared.detach() + 0.5
    found = learner.drift(before, batch)
    assert learner.drift(learner.shared.detach().clone(), batch).item() == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        parts = []
        for vectors in (before, learner.shared):
            with learner.pet.use({"tokens": vectors}):
                parts.append(torch.log_softmax(learner.model(batch.tokens), -1).double())
        old, new = parts
        terms = [
            float((old[b, t].exp() * (old[b, t] - new[b, t])).sum())
            for b in range(len(batch))
            for t in range(int(batch.lengths[b]) - 1)
        ]
    assert found.item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    found.backward()
    assert learner.shared.grad.abs().sum() > 0


def test_what_q_tuning_forgets():
    alone = made(QTuning, shared=0, capacity=2, length=2)
    at_once = []
    for i in range(3):
        learn(alone, i)
        at_once.append(scores(alone, i))
    assert len(alone.queue) == 2 and [len(kept["queue"]) for kept in alone.kept] == [1, 2, 2]
    for i, before in enumerate(at_once):
        assert torch.equal(scores(alone, i), before), "without P* nothing is forgotten"
    present = learn(made(QTuning, shared=0, capacity=2, length=2, queue="present"), 0, 1, 2)
    assert not torch.allclose(scores(present, 0), at_once[0], atol=1e-4) and torch.equal(scores(present, 2), at_once[2])
    prefix = learn(made(QTuning, shared=2, length=2), 0)
    before = scores(prefix, 0)
    learn(prefix, 1)
    assert not torch.equal(scores(prefix, 0), before), "P* moves"


# SLM


def test_keys_against_loops():
    draw = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(*shape, generator=draw) for shape in ((3, 8), (2, 4, 4)))
    dropped = torch.rand(3, 2, 4, generator=draw) < 0.4
    total, count = 0.0, 0
    for b in range(3):
        for g in range(2):
            q = queries[b, g * 4 : g * 4 + 4]
            cosines = [float(q @ k / q.norm() / k.norm()) for k in keys[g]]
            order = sorted(range(4), key=lambda n: -100.0 if dropped[b, g, n] else cosines[n], reverse=True)
            total, count = total + sum(cosines[n] for n in order[:2]), count + 2
    assert float(slm.key_loss(queries, keys, 2, dropped)) == pytest.approx(-total / count, rel=1e-5)
    rows, weights = slm.retrieved(queries, keys, 2, False)
    for b in range(3):
        means = [
            np.mean([float(torch.cosine_similarity(queries[b, g * 4 : g * 4 + 4], keys[g, n], dim=0)) for g in range(2)])
            for n in range(4)
        ]
        best = sorted(range(4), key=lambda n: -means[n])[:2]
        assert rows[b].tolist() == best
        assert weights[b].tolist() == pytest.approx([means[n] / (sum(means[m] for m in best) + 1e-9) for n in best], rel=1e-4)
    together, _ = slm.retrieved(queries, keys, 2, True)
    assert (together == together[0]).all()


def test_a_mixture_is_a_change_of_the_weights_of_each_line():
    learner = learn(made(Slm, rank=2), 0, 1)
    batch, found = asked(0), scores(learner, 0)
    rows, weights = slm.retrieved(learner.query(batch), learner.keys, 2, False)
    assert learner.keys.shape == (4, 4, 4) and {len(value) for value in learner.bank.values()} == {4}
    for b in range(3):
        model = build_decoder(name="d", vocab=256, width=16, depth=2, heads=2, context=64, rotary=0.5, seed=1)
        with torch.no_grad():
            for i in range(2):
                for k, w in zip(rows[b], weights[b], strict=True):
                    change = w * learner.bank[f"{i}/proj/b"][k] @ learner.bank[f"{i}/proj/a"][k]
                    model.layers[i].attention["dense"].weight += change
            torch.testing.assert_close(model(batch.tokens[b : b + 1])[0], found[b], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_slm_asks_prompts_alone_and_starts_as_the_network():
    learner, batch, other = made(Slm), asked(0), asked(0)
    other.tokens[:, int(batch.prompts.max()) :] = 7
    torch.testing.assert_close(learner.query(batch), learner.query(other))
    values = learner.own_entries()
    found = slm.retrieved(learner.query(batch), torch.randn(4, 2, 4), 2, False)
    with learner.pet.use(*slm.mixed(values, *found)):
        start = learner.model(batch.tokens)
    with learner.pet.off():
        torch.testing.assert_close(start, learner.model(batch.tokens))


def test_slm_forgets_by_wrong_retrieval_alone():
    learner = learn(made(Slm, entries=1, top=1), 0)
    before, batch = scores(learner, 0), asked(0)
    learn(learner, 1, 2)
    after = scores(learner, 0)
    right = slm.retrieved(learner.query(batch), learner.keys, 1, False)[0][:, 0] == 0
    assert right.any()
    torch.testing.assert_close(after[right], before[right], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (OLora, {"norm": "l2"}, "unknown learner.norm=l2"),
        (OLora, {"orthogonal": -1.0}, "must be at least 0"),
        (OLora, {"layers": ("w",)}, "unknown LoRA targets"),
        (ProgressivePrompts, {"task_id": "maybe"}, "unknown learner.task_id=maybe"),
        (QTuning, {"queue": "old"}, "unknown learner.queue=old"),
        (QTuning, {"capacity": 1}, "learner.capacity must be at least 2"),
        (Slm, {"query": "task"}, "unknown learner.query=task"),
        (Slm, {"groups": 3}, "learner.groups must divide the width of 16"),
        (Slm, {"key_dropout": 1.0}, "learner.key_dropout must be"),
        (Slm, {"targets": "prompt"}, "unknown learner.targets=prompt"),
    ],
)
def test_wrong_options(kind, options, message):
    with pytest.raises(UserError, match=message):
        made(kind, **options)
