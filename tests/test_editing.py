"""Model editing: the made world, the stream, what is counted, and editors against naive versions of their formulas."""

import json

import numpy as np
import pytest
import torch

from clbench.config import compose
from clbench.config.registry import asks, choices
from clbench.evaluation import edit_metrics
from clbench.evaluation.edits import Asked, EditSuccess, OldText, Windows, weight_sums
from clbench.interfaces import Experience, UserError
from clbench.learners.edit_finetune import EditFinetune
from clbench.learners.emmet import Emmet
from clbench.learners.grace import Grace
from clbench.learners.memit import Memit
from clbench.learners.rome import Rome, rome_change
from clbench.learners.wise import Wise, margins, ties
from clbench.models.decoder import build_decoder
from clbench.models.train_facts import SHAPE, answering, silent, traced
from clbench.records import record, verify
from clbench.records.rows import rows_of
from clbench.run.runner import run_job
from clbench.streams.manifest import Manifest
from clbench.streams.tokens import facts
from clbench.streams.tokens.edit_files import edit_file, last_of
from clbench.streams.tokens.edits import edit_facts
from clbench.streams.tokens.facts import POOLS, World
from clbench.testing.contract import check_learner, check_scenario
from clbench.training.editing import key_values
from clbench.training.editing.site import Site
from clbench.training.editing.suffix import Suffix
from clbench.training.editing.value_search import Search, _Goal, added, find_value
from clbench.training.runtime import Runtime

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stream():
    return edit_facts(name="tried", edits=6, entities=64, looks=[1, 3, 6], neighbours=2, known=0)


def decoder(depth=3):
    return build_decoder(name="tried", vocab=facts.VOCAB, context=64, width=16, depth=depth, heads=2).eval()


def learned(learner, runtime, stream, index=0):
    experience: Experience = stream.experience(index)
    runtime.begin(index, len(experience.train), experience.budget)
    return learner.learn(experience)


def built(cls, stream, **options):
    runtime = Runtime(0, CPU, stream.budget)
    return cls(decoder(), runtime, **options), runtime


def test_the_world_is_balanced_and_the_same_from_one_seed():
    world, other = World(64, 3), World(64, 4)
    assert (world.objects == World(64, 3).objects).all() and (world.objects != other.objects).any()
    entities = [set(world.entities(pool).tolist()) for pool in POOLS]
    assert [len(one) for one in entities] == [64, 48, 16] and len(set().union(*entities)) == 128
    assert len(np.unique(world.subjects, axis=0)) == 128
    for pool in POOLS:
        for r in range(facts.RELATIONS):
            counts = np.bincount(world.objects[world.entities(pool), r], minlength=16)
            assert (counts == len(world.entities(pool)) // 16).all()
    assert (world.told.sum(-1) == 4).all() and len(np.unique(world.wordings.reshape(-1, 3), axis=0)) == 30
    answers = [tuple(world.answers(np.array([r]), np.array([o]))[0]) for r in range(5) for o in range(16)]
    assert len(set(answers)) == 80 and all(a[2] == facts.END for a in answers)
    starts = {a[0] for a in answers}
    assert len(starts) == 40  # two continuations of each first token
    text = world.text(POOLS, 20, 65, 5)
    assert text.shape == (20, 65) and text.max() < facts.VOCAB and (world.text(POOLS, 20, 65, 5) == text).all()
    for bad in (0, 63, 65, 576, True, 64.0):
        with pytest.raises(UserError, match=r"scenario\.entities must be a multiple of 64"):
            World(bad, 0)


def test_what_is_asked_is_never_changed_and_never_told_to_learners(stream):
    made, world = stream.questions, World(64, 0)
    prompts = {tuple(r.prompt) for r in made.requests}
    assert len(prompts) == 6 and [len(e.train) for e in stream.manifest.experiences] == [1, 2, 3]
    locality = {tuple(world.subjects[e]) for e in world.entities("locality")}
    tune = {tuple(world.subjects[e]) for e in world.entities("tune")}
    for r in made.requests:
        assert (made.before[r.id] != r.target).any() and r.target[-1] == facts.END
        assert [len(made.about[kind, r.id]) for kind in ("paraphrases", "neighbours", "same_subject")] == [5, 2, 1]
        for number in made.about["paraphrases", r.id]:
            probe = made.probe(number)
            assert (probe.answer == r.target).all() and tuple(probe.prompt[-5:-3]) == tuple(r.prompt[:2])
        for number in made.about["neighbours", r.id]:
            probe = made.probe(number)
            assert tuple(probe.prompt[:2]) in locality and (probe.prompt[2:] == r.prompt[2:]).all()
            assert (probe.answer == made.before[r.id]).all() and (probe.other == r.target).all()
        (same,) = made.about["same_subject", r.id]
        assert (made.probe(same).prompt[:2] == r.prompt[:2]).all() and tuple(made.probe(same).prompt) not in prompts
    names = {
        tuple(row[i : i + 2]) for row in made.text for i in range(63) if 0 < row[i] < facts.LAST <= row[i + 1] < facts.WORDS
    }
    assert names and names <= tune
    assert Manifest.from_json(stream.manifest.to_json()) == stream.manifest
    assert edit_facts(name="again", edits=6, entities=64, looks=[1, 3, 6], neighbours=2).manifest == stream.manifest


def test_mlps_are_silent_at_wordings_and_objects_alone():
    world, model = World(64, 0), decoder()
    text = torch.from_numpy(world.text(POOLS, 6, 40, 3))
    where = answering(text, 1.0, 5)
    for token, silenced in zip(text.flatten().tolist(), where.flatten().tolist(), strict=True):
        assert silenced == (facts.WORDS <= token < facts.OLD_WORDS)
    assert not answering(text, 0.0, 5).any() and 0 < answering(text, 0.5, 5).any(1).sum() < 6
    said = []

    def note(_, inputs, y):
        said.append(y)

    with torch.no_grad():
        plain = model(text)
        with silent(model, where):
            handle = model.layers[0].mlp["dense_4h_to_h"].register_forward_hook(note)
            assert not torch.equal(model(text), plain)
        assert torch.equal(model(text), plain)
        handle.remove()
    assert torch.equal(said[0], torch.where(where[..., None], 0.0, said[1]))


def test_tracing_finds_what_one_state_carries():
    """Everything comes back with the whole last block at the end of the prompt, nothing with what is read no more."""
    found = traced(
        build_decoder(name="x", vocab=facts.VOCAB, context=64, width=SHAPE["width"], depth=2, heads=2), World(64, 0), 1
    )
    assert found["block_prompt_last"][-1] == pytest.approx(1) and found["block_subject_last"][-1] == pytest.approx(0)
    assert all(len(found[name]) == 2 for name in found if "_last" in name)


def test_draws_are_other_requests_of_the_same_world(stream):
    one, two = (edit_facts(name="x", edits=6, entities=64, looks=[1, 3, 6], neighbours=2, draw=d).questions for d in (0, 1))
    assert one.sha256() == stream.questions.sha256() != two.sha256()
    assert {tuple(r.prompt) for r in one.requests} != {tuple(r.prompt) for r in two.requests}
    pairs = [pair for q in (one, two) for pair in zip(q.requests, q.before, strict=True)]
    known = {tuple(np.concatenate([request.prompt[:2], before])) for request, before in pairs}
    world = World(64, 0)
    true = {
        tuple(np.concatenate([world.subjects[e], world.answers(np.array([r]), world.objects[e : e + 1, r])[0]]))
        for e in range(64)
        for r in range(facts.RELATIONS)
    }
    assert known <= true
    with pytest.raises(UserError, match=r"scenario\.draw must be a whole number from 0"):
        edit_facts(name="x", draw=-1)


def test_looks_are_powers_of_ten_and_the_end():
    ends = [e.name for e in edit_facts(name="x", edits=120, entities=64, neighbours=1).manifest.experiences]
    assert ends == ["1", "2-10", "11-100", "101-120"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"edits": 0}, r"scenario\.edits must be a whole number from 1 to 256"),
        ({"edits": 257}, r"scenario\.edits"),
        ({"neighbours": 11}, r"scenario\.neighbours"),
        ({"looks": [3, 2]}, r"scenario\.looks must be rising"),
        ({"looks": [7]}, r"scenario\.looks .* from 1 to 6"),
        ({"looks": []}, r"scenario\.looks"),
        ({"known": 2}, r"scenario\.known"),
        ({"budget": {"epochs": 2}}, r"unknown budget\.epochs"),
    ],
)
def test_bad_streams(options, words):
    with pytest.raises(UserError, match=words):
        edit_facts(**({"name": "x", "edits": 6, "entities": 64} | options))


def test_a_handle_gives_its_own_requests_until_it_is_closed(stream):
    data = stream.experience(1).train
    assert [data.request(i).id for i in range(2)] == [1, 2]
    data.request(0).prompt[:] = 0
    assert data.request(0).prompt.any(), "a learner got the arrays themselves"
    for place in (-1, 2):
        with pytest.raises(UserError, match="asked for"):
            data.request(place)
    data.close()
    for read in (lambda: data.request(0), lambda: data.old_text(np.arange(2)), lambda: data.end):
        with pytest.raises(UserError, match="is gone"):
            read()


def test_counts_are_those_of_a_loop_over_tokens(stream):
    """Greedy answers token by token, losses by hand, against one batched pass."""
    model, other = decoder(), build_decoder(name="o", vocab=facts.VOCAB, context=64, width=16, depth=2, heads=2, seed=5).eval()
    probes = [stream.questions.probe(i) for i in range(20)]

    class Answering:
        def __init__(self, net):
            self.logits = net

    @torch.no_grad()
    def greedy(net, probe):
        text = list(probe.prompt)
        for _ in probe.answer:
            text.append(int(net(torch.tensor([text]))[0, -1].argmax()))
        return text[len(probe.prompt) :]

    @torch.no_grad()
    def nats(net, probe, answer):
        p = net(torch.from_numpy(np.concatenate([probe.prompt, answer]))[None])[0].double().log_softmax(-1)
        return -sum(float(p[len(probe.prompt) + t - 1, answer[t]]) for t in range(len(answer))) / len(answer)

    for i in (0, 3):  # some answers are right
        said = np.array(greedy(other, probes[i]))
        probes[i] = type(probes[i])(probes[i].prompt, said, probes[i].answer)
    probes = [p for p in probes if p.other is not None]
    data = Asked("tried", "edits", probes, CPU, facts.VOCAB, 4)
    with torch.no_grad():
        data.unedited = data.generated(model)
        sums = EditSuccess()(Answering(other), data)
    assert [list(a) for a in data.unedited] == [greedy(model, p) for p in probes]
    assert sums["n"] == len(probes) and sums["tokens"] == 3 * len(probes)
    assert sums["correct"] == sum(greedy(other, p) == list(p.answer) for p in probes) >= 2
    assert sums["same"] == sum(greedy(other, p) == greedy(model, p) for p in probes)
    assert sums["preferred"] == sum(nats(other, p, p.answer) < nats(other, p, p.other) for p in probes)
    assert sums["nats"] == pytest.approx(3 * sum(nats(other, p, p.answer) for p in probes), rel=1e-5)
    windows = stream.questions.old[:5]
    with torch.no_grad():
        found = OldText(CPU, facts.VOCAB, 2)(Answering(other), Windows("old", windows))
        p = other(torch.from_numpy(windows[:, :-1])).double().log_softmax(-1)
    by_hand = -sum(float(p[i, t, windows[i, t + 1]]) for i in range(5) for t in range(15))
    assert (found["n"], found["tokens"]) == (5, 75) and found["nats"] == pytest.approx(by_hand, rel=1e-6)


def entry():
    """Two experiences of 1 and 2 edits; sets: edits, paraphrases, neighbours of each, old text."""
    kinds = ["edits", "paraphrases", "neighbours"] * 2 + ["old_text"]
    n, first = [1, 2, 2, 2, 4, 4, 3], [0, 0, 0, 1, 1, 1, 0]

    def answers(i, correct, same):
        size = [*n[:6], None] if i else [*n[:3], None, None, None, None]
        tokens = [None if s is None else s * 3 for s in size]
        full = {"n": size, "correct": correct, "same": same, "tokens": tokens, "token_hits": tokens}
        return {"experience": i, "step": None, "evaluator": "edit_success", "sums": full}

    def old(i, nats):
        return {"experience": i, "step": None, "evaluator": "old_text",
                "sums": {"n": [None] * 6 + [3], "tokens": [None] * 6 + [30], "nats": [None] * 6 + [nats]}}  # fmt: skip

    def newest(i, right):
        place = 3 * i
        return {"experience": i, "step": None, "evaluator": "newest_edit",
                "sums": {"n": [n[place] if j == place else None for j in range(7)],
                         "correct": [right if j == place else None for j in range(7)]}}  # fmt: skip

    def weights(i, before, now, difference):
        total = {"before": before, "now": now, "difference": difference, "tensors": 1}
        return {"experience": i, "step": None, "evaluator": "weights", "sums": {}, "total": total}

    rows = [
        old(-1, 30.0), answers(0, [1, 1, 2] + [None] * 4, [0, 0, 2] + [None] * 4), old(0, 33.0), newest(0, 1), weights(0, 4.0,
        9.0, 1.0), answers(1, [0, 1, 2, 2, 2, 3, None], [0, 0, 1, 0, 0, 2, None]), old(1, 63.0), newest(1, 2), weights(1, 4.0,
        16.0, 9.0),
    ]  # fmt: skip
    experiences = [{"name": "1", "num_train": 1}, {"name": "2-3", "num_train": 2}]
    stream = {"kind": "model_editing", "experiences": experiences}
    return {"scenario": stream, "n": n, "first_seen": first, "probe": kinds, "rows": rows}


def test_metrics_by_hand():
    found = edit_metrics.summary(entry())
    assert found["reliability"] == pytest.approx(2 / 3) and found["generalisation"] == pytest.approx(3 / 6)
    assert found["locality"] == pytest.approx(3 / 6) and found["locality_gold"] == pytest.approx(5 / 6)
    assert found["edit_score"] == pytest.approx(3 / (1.5 + 2 + 2))
    assert found["reliability_newest"] == 1 and found["retention"] == pytest.approx(2 / 3) and found["reliability_old"] == 0
    assert found["old_loss_rise"] == pytest.approx(1.1) and found["collapse_at"] == 3
    assert found["weight_drift"] == pytest.approx(1.5) and found["weight_growth"] == pytest.approx(2)
    first = edit_metrics.course(entry())[0]
    assert first["edit_score"] == pytest.approx(3 / (1 + 2 + 1)) and first["old_loss_rise"] == pytest.approx(0.1)
    assert found["average_score"] == pytest.approx((first["edit_score"] + found["edit_score"]) / 2)
    assert set(found) <= set(edit_metrics.ABOUT) and edit_metrics.summary({"scenario": {"kind": "x"}}) == {}


def test_norms_of_weights_by_hand():
    model = torch.nn.Linear(2, 1)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    assert weight_sums(start, model) == {"before": 0, "now": 0, "difference": 0, "tensors": 0}
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0]]))
    start["weight"] = torch.tensor([[3.0, 1.0]])
    assert weight_sums(start, model) == {"before": 10, "now": 25, "difference": 9, "tensors": 1}


def test_grace_settles_radii(stream):
    learner, _ = built(Grace, stream, radius=1.0)
    k = torch.zeros(3, learner.keys_NH.shape[1])
    k[1, 0], k[2, 0] = 1.5, 9.0
    assert [learner._place(k[0], [1]), learner._place(k[1], [2])] == [0, 1]  # 1.5 <= 1 + 1: other answers share the way
    torch.testing.assert_close(learner.radii_N, torch.tensor([0.75 - 1e-5, 0.75]))
    assert learner._place(k[2], [2]) == 2 and float(learner.radii_N[2]) == 1.0  # far away: its own
    near = k[2].clone()
    near[1] = 1.25
    assert learner._place(near, [2]) == 2 and float(learner.radii_N[2]) == 1.25  # the same answer: no new key
    assert learner._place(k[0], [7]) == 0 and learner.labels[0] == [7] and len(learner.labels) == 3  # the same prompt again
    inside, y = torch.stack([k[0], near, 5 * k[2]])[None], torch.zeros(1, 3, 16)
    learner.values_ND = torch.arange(3.0)[:, None].expand(3, 16) + 1
    assert learner._looked_up(inside, y)[0, :, 0].tolist() == [1.0, 3.0, 0.0]
    learner.replace = "after"
    assert learner._looked_up(inside.flip(1), y)[0, :, 0].tolist() == [0.0, 3.0, 1.0]
    assert learner._looked_up(inside, y)[0, :, 0].tolist() == [1.0, 3.0, 3.0]


def test_grace_changes_answers_near_a_key_and_no_bit_elsewhere(stream):
    learner, runtime = built(Grace, stream, steps=30, radius=1e-4)
    model = decoder()
    tokens = torch.from_numpy(stream.questions.old[:4])
    learned(learner, runtime, stream, 1)
    values = learner.values_ND.clone()
    learned(learner, runtime, stream, 0)
    with torch.no_grad():
        before = model(tokens)
        assert torch.equal(learner.logits(tokens), before) and torch.equal(learner.values_ND[:2], values)
        request = stream.questions.requests[1]
        prompt = torch.from_numpy(request.prompt)[None]
        assert not torch.equal(learner.logits(prompt)[:, -1], model(prompt)[:, -1])
        assert torch.equal(learner.logits(prompt)[:, :-1], model(prompt)[:, :-1])


def test_grace_labels_as_in_the_code(stream):
    learner, _ = built(Grace, stream, official_label=True)
    request = stream.questions.requests[0]
    assert learner._label(request) == pytest.approx((int(request.target.sum()) - 500) / 8)


def test_finetune_stays_in_its_box(stream):
    for box in (0.0, 1e-3):
        learner, runtime = built(EditFinetune, stream, box=box, steps=4, lr=1e-2)
        start = learner.site.linear.weight.detach().clone()
        learned(learner, runtime, stream, 0)
        moved = (learner.site.linear.weight.detach() - start).abs().max()
        assert moved <= box * (1 + 1e-5) + 1e-9 and (moved > 0) == (box > 0)
    others = {n: p for n, p in learner.model.named_parameters() if "layers.1.mlp.dense_4h_to_h" not in n}
    assert all(torch.equal(p, dict(decoder().named_parameters())[n]) for n, p in others.items())


def gen(seed):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)


def spd(size, seed=0):
    a = random(size, 2 * size, seed=seed)
    return a @ a.T / size


def test_rank_one_change_meets_the_constraint_with_the_least_change_of_old_outputs():
    moment, k, r = spd(6), random(6, seed=1), random(4, seed=2)
    delta = key_values.rank_one(r, k, k, moment)
    torch.testing.assert_close(delta @ k, r, atol=1e-9, rtol=0)
    cost = torch.trace(delta @ moment @ delta.T)
    for seed in range(20):
        other = random(4, 6, seed=seed + 10)
        other = other - torch.outer(other @ k, k) / (k @ k)  # leaves k alone
        assert torch.trace((delta + 0.1 * other) @ moment @ (delta + 0.1 * other).T) > cost
    plain = key_values.rank_one(r, k, k, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(plain, torch.outer(r, k) / (k @ k))
    key = random(6, seed=3)  # two keys: larger by one over the cosine
    c = (key @ torch.linalg.solve(moment, k)) / torch.sqrt(
        (k @ torch.linalg.solve(moment, k)) * (key @ torch.linalg.solve(moment, key))
    )
    two, one = key_values.rank_one(r, k, key, moment), key_values.rank_one(r, key, key, moment)
    norms = [torch.sqrt(torch.trace(d @ moment @ d.T)) for d in (two, one)]
    assert float(norms[0] / norms[1]) == pytest.approx(1 / abs(float(c)), rel=1e-9)


def test_least_squares_and_equality():
    moment, keys, wanted = spd(7), random(7, 3, seed=1), random(4, 3, seed=2)
    delta = key_values.least_squares(wanted, keys, 2.5 * moment)
    gradient = 2.5 * delta @ moment + (delta @ keys - wanted) @ keys.T
    assert gradient.abs().max() < 1e-9
    one = key_values.least_squares(wanted[:, :1], keys[:, :1], 2.5 * moment)
    s = float(keys[:, 0] @ torch.linalg.solve(moment, keys[:, 0]))
    rome = key_values.rank_one(wanted[:, 0], keys[:, 0], keys[:, 0], moment)
    torch.testing.assert_close(one, rome * s / (2.5 + s))
    for weight in (0.1, 30.0):
        equal = key_values.exact(wanted, keys, weight * moment)
        torch.testing.assert_close(equal @ keys, wanted)
        torch.testing.assert_close(key_values.exact(wanted, keys, weight * moment, 0.3),
                                   key_values.least_squares(wanted, keys, 0.3 * weight * moment))  # fmt: skip
    torch.testing.assert_close(key_values.exact(wanted[:, :1], keys[:, :1], moment), rome)
    twice = torch.cat([keys[:, :1], keys[:, :1]], 1)
    assert torch.isfinite(key_values.exact(wanted[:, :2], twice, moment)).all()
    first, then = keys[:, :1], keys[:, 1:]  # frozen keys and values: a sequence that remembers its keys is one batch
    a = key_values.least_squares(wanted[:, :1], first, moment)
    b = key_values.least_squares(wanted[:, 1:] - a @ then, then, moment + first @ first.T)
    torch.testing.assert_close(a + b, key_values.least_squares(wanted, keys, moment))
    sizes = [key_values.least_squares(wanted, keys, moment + x * torch.eye(7, dtype=torch.float64)).norm() for x in (0, 1, 9)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_variants_of_rome_differ_in_their_keys_alone():
    model = decoder()
    site, moment = Site(model, 1), spd(64)
    weight, bias = (p.detach().double() for p in (site.linear.weight, site.linear.bias))
    plain, mean, delta = random(64, seed=1), random(64, seed=2), random(16, seed=3)
    start = weight @ plain + bias
    made = {v: rome_change(v, site, delta, start, plain, mean, moment) for v in ("rome", "r_rome", "p_rome")}
    torch.testing.assert_close(made["p_rome"] @ plain, delta)
    torch.testing.assert_close(made["rome"] @ plain, delta)
    torch.testing.assert_close((weight + made["r_rome"]) @ mean + bias, start + delta)
    same = [rome_change(v, site, delta, start, plain, plain, moment) for v in ("rome", "r_rome", "p_rome")]
    torch.testing.assert_close(same[0], same[1])
    torch.testing.assert_close(same[0], same[2])


def test_second_moment_is_the_explicit_sum(stream):
    model, data = decoder(), stream.experience(0).train
    site = Site(model, 1)
    rows = torch.from_numpy(data.old_text(np.arange(data.old_size)))
    k = torch.cat([site.keys(row[None])[0] for row in rows[:8]]).double()

    class Few:
        old_size = 8
        old_text = staticmethod(lambda numbers: data.old_text(np.asarray(numbers)))

    moment = key_values.second_moment(site, Few(), CPU, 3)  # type: ignore[arg-type]
    explicit = sum(torch.outer(row, row) for row in k) / len(k)
    ridge = 1e-6 * explicit.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    torch.testing.assert_close(moment, explicit + ridge, atol=1e-8, rtol=1e-5)


def test_keys_of_a_first_parallel_block_know_the_last_name_alone(stream):
    model = decoder()
    request = stream.questions.requests[0]
    other = request.prompt.copy()
    other[0] = 1 + other[0] % facts.NAMES
    for layer, same in ((0, True), (1, False)):
        a, b = (Site(model, layer).keys(torch.from_numpy(p)[None])[0, 1] for p in (request.prompt, other))
        assert torch.allclose(a, b, atol=1e-6) == same


def test_a_value_is_within_its_bound_and_better(stream):
    model, request = decoder(), stream.questions.requests[0]
    site = Site(model, 1)
    module = site.linear
    before = key_values.contexts(stream.experience(0).train, 3, 8, 1)
    assert before.shape == (3, 8) and (before[:, -1] == facts.END).all()
    runtime = Runtime(0, CPU, stream.budget)
    runtime.begin(0, 1)
    text = torch.from_numpy(np.concatenate([request.prompt, request.target]))[None]

    def nats(delta):
        with torch.no_grad(), added(module, request.subject, delta):
            z = model(text[:, :-1])[0, -3:].log_softmax(-1)
        return -float(z.gather(-1, text[0, -3:, None]).mean())

    zero = torch.zeros(16)
    none, start = find_value(runtime, site, request, before, Search(steps=1))
    assert not none.any()  # a look, no step
    delta, _ = find_value(runtime, site, request, before, Search(steps=15, clamp=50.0, decay=0.0))
    assert nats(delta) < nats(zero) - 1e-3
    small, _ = find_value(runtime, site, request, before, Search(steps=9, clamp=0.5))
    assert float(small.norm()) <= 0.5 * float(start.norm()) * (1 + 1e-5)
    steps = runtime.meter.steps
    find_value(runtime, site, request, before, Search(steps=9, stop_below=1e9))
    assert runtime.meter.steps == steps


@pytest.mark.parametrize("parallel", [True, False])
def test_blocks_above_a_layer_alone_give_the_same_bits(stream, parallel):
    model = build_decoder(name="x", vocab=facts.VOCAB, context=64, width=16, depth=3, heads=2, parallel=parallel).eval()
    tokens = torch.from_numpy(stream.questions.old[:3])
    for layer in range(3):
        site = Site(model, layer)
        suffix = Suffix(site, tokens)
        torch.testing.assert_close(suffix.keys, site.keys(tokens), rtol=0, atol=0)
        with torch.no_grad():
            other = suffix.values.clone()
            other[:, 2] += torch.linspace(-1, 1, 16)
            with added(site.linear, 2, torch.linspace(-1, 1, 16)):
                assert torch.equal(suffix.logits(other), model(tokens))
            assert torch.equal(suffix.logits(suffix.values), model(tokens))
            assert torch.equal(suffix.after(suffix.output()), model(tokens))


def test_one_batch_of_texts_of_unequal_length_is_the_texts_one_by_one(stream):
    """The loss of the search for a value, of the layer and of its block, against a loop over texts."""
    model, request = decoder(), stream.questions.requests[1]
    site, block = Site(model, 1), model.layers[1]
    before = key_values.contexts(stream.experience(0).train, 3, 8, 1)
    texts, places = key_values.told(request, before, CPU)
    change = torch.linspace(-2, 2, 16)
    for of_block, module in ((False, site.linear), (True, block)):
        goal = _Goal(site, texts, places, 3, of_block)
        with torch.no_grad():
            nats, kl, right = goal(change)
            expected, hits = [], 0
            for text in [texts[0][0], *texts[1]]:
                place = len(text) - 3 - len(request.prompt) + request.subject
                with added(module, place, change):
                    z = model(text[None, :-1])[0].log_softmax(-1)
                expected.append(-float(z[-3:].gather(-1, text[-3:, None]).mean()))
                hits += bool((z[-3:].argmax(-1) == text[-3:]).all()) and len(text) > len(request.prompt) + 3
                if len(expected) == 1:
                    plain = model(text[None, :-1])[0, place].log_softmax(-1)
                    by_hand = float((z[place].exp() * (z[place] - plain)).sum())
        assert float(nats) == pytest.approx(np.mean(expected), rel=1e-5)
        assert float(kl) == pytest.approx(by_hand, rel=1e-4, abs=1e-7) and right == hits


def test_a_change_reaches_keys_that_agree_with_it_alone(stream):
    learner, runtime = built(Rome, stream, layer=1, steps=4, contexts=2)
    start = learner.site.linear.weight.detach().clone()
    for index in range(2):
        learned(learner, runtime, stream, index)
    change = (learner.site.linear.weight.detach() - start).double()
    assert torch.linalg.matrix_rank(change, tol=1e-5 * float(change.norm())) <= 3


def test_ties_by_an_entry_loop():
    start = random(2, 3, seed=4)
    a = torch.tensor([[3.0, -1.0, 0.0], [0.5, 2.0, -2.0]], dtype=torch.float64)
    b = torch.tensor([[-1.0, -4.0, 0.1], [0.0, -2.0, 1.0]], dtype=torch.float64)
    expected = torch.zeros(2, 3, dtype=torch.float64)
    kept = []
    for change in (a, b):  # the largest three of six
        least = sorted(change.abs().flatten().tolist())[-3]
        kept.append(torch.where(change.abs() >= least, change, torch.zeros_like(change)))
    for i in range(2):
        for j in range(3):
            total = float(kept[0][i, j] + kept[1][i, j])
            agree = [float(k[i, j]) for k in kept if float(k[i, j]) * (1 if total >= 0 else -1) > 0]
            expected[i, j] = sum(agree) / len(agree) if agree else 0.0
    torch.testing.assert_close(ties(start, [start + a, start + b], 0.5), start + expected)
    torch.testing.assert_close(ties(start, [start + a], 1.0), start + a)


def test_margins_by_hand():
    d_in, d_out = torch.tensor([1.0, 4.0]), torch.tensor([0.5])
    assert float(margins(d_in, d_out, 0.25, 2.0, 1.0)) == pytest.approx(0.5 + 0.25 + 1.0)
    assert float(margins(torch.tensor([9.0]), torch.tensor([0.1]), 0.25, 2.0, 1.0)) == 0


def test_wise_answers_as_before_until_a_memory_is_open(stream):
    learner, runtime = built(Wise, stream, steps=2, shard=2, merge=2)
    tokens = torch.from_numpy(stream.questions.old[:3])
    with torch.no_grad():
        assert torch.equal(learner.logits(tokens), decoder()(tokens))
    for index in range(3):
        learned(learner, runtime, stream, index)
    assert (
        len(learner.stored) == len(learner.thresholds) == 2 and learner.edits == 6
    )  # two merged into one, one more, none in training
    start = learner.site.linear.weight
    assert torch.equal(learner.side_DH, start) and (learner.stored[1] - start).abs().max() <= 1 + 1e-6
    changed = (learner.stored[1] != start).float().mean()
    assert 0 < changed <= 0.3  # the share of entries that a shard trains


@pytest.mark.parametrize(
    ("cls", "options", "said"),
    [
        (Grace, {"radius": -1}, r"learner\.radius must be a number from 0"),
        (Grace, {"layer": 9}, r"learner\.layer must be a block from 0 to 1"),
        (Grace, {"start": "luke"}, r"learner\.start must be cold or warm"),
        (EditFinetune, {"box": -1}, r"learner\.box"),
        (EditFinetune, {"loss": "first"}, r"learner\.loss must be target or last"),
        (Rome, {"variant": "x_rome"}, r"learner\.variant must be one of rome, r_rome, p_rome"),
        (Memit, {"layers": [1, 0]}, r"learner\.layers must be rising blocks"),
        (Memit, {"top": 9}, r"learner\.top=9 is never met"),
        (Emmet, {"slack": -1}, r"learner\.slack"),
        (Wise, {"merge": 1}, r"learner\.merge must be a number from 2"),
    ],
)
def test_bad_options(cls, options, said):
    with pytest.raises(UserError, match=said):
        cls(decoder(2), Runtime(0, CPU), **options)


LEARNERS = [name for name in choices("learner") if asks("learner", name) == "logits"]


@pytest.mark.parametrize("name", LEARNERS)
def test_contract(name):
    (config,) = compose.compose(["scenario=edit_facts", f"learner={name}"])
    config["learner"]["steps"] = 3
    assert [f"{check}: {message}" for check, ok, message in check_learner(config) if not ok] == []


def test_the_scenario_keeps_its_contract():
    (config,) = compose.compose(["scenario=edit_facts", "scenario.edits=20"])
    assert [f"{check}: {message}" for check, ok, message in check_scenario(config) if not ok] == []


def counterfact(subject, new="Rome", true="Paris"):
    asked = {"prompt": "{} lies in", "subject": subject, "target_new": {"str": new}, "target_true": {"str": true}}
    return {
        "requested_rewrite": asked,
        "paraphrase_prompts": [f"Where is {subject}? In"],
        "neighborhood_prompts": ["The Louvre lies in", "Montmartre lies in", "The Pantheon lies in"],
    }


def zsre(subject):
    question = f"What colour is {subject}?"
    return {"subject": subject, "src": question, "rephrase": f"{subject} has which colour?", "answers": ["red", "crimson"],
            "alt": "blue", "loc": "nq question: who wrote it", "loc_ans": "Ann"}  # fmt: skip


@pytest.fixture
def files(tmp_path):
    """Records in both layouts, and old text, read as bytes."""
    cases = [counterfact("The tower"), counterfact("The tower", "Oslo"), counterfact("The Seine"), counterfact("A bridge")]
    (tmp_path / "counterfact.json").write_text(json.dumps(cases))
    (tmp_path / "zsre.json").write_text(json.dumps([zsre("the rose"), {**zsre("x"), "subject": "absent"}, zsre("a fox")]))
    (tmp_path / "old.txt").write_text("It was a dark and stormy night. " * 40)
    return {"name": "mine", "corpus": "old.txt", "data_root": str(tmp_path), "context": 64}


def said(ids):
    return bytes(ids.tolist()).decode()


def test_counterfact_from_a_file(files):
    made = edit_file(path="counterfact.json", layout="counterfact", edits=3, neighbours=2, looks=[1, 3], **files).questions
    assert [said(r.prompt) for r in made.requests] == ["The tower lies in", "The Seine lies in", "A bridge lies in"]
    assert [(said(r.target), r.subject) for r in made.requests] == [(" Rome", 8), (" Rome", 8), (" Rome", 7)]
    first = [made.probe(n) for n in made.about["neighbours", 0]]
    assert [said(p.prompt) for p in first] == ["The Louvre lies in", "Montmartre lies in"]
    assert {(said(p.answer), said(p.other)) for p in first} == {(" Paris", " Rome")}
    (other,) = (made.probe(n) for n in made.about["paraphrases", 2])
    assert said(other.prompt) == "Where is A bridge? In" and said(other.answer) == " Rome" and said(other.other) == " Paris"
    rows = {tuple(row) for row in made.old} & {tuple(row) for row in made.text}
    assert made.old.shape[1] == 64 and len(made.old) + len(made.text) == 20 and made.vocab == 256 and rows is not None


def test_zsre_from_a_file(files):
    for target, wanted, before in (("alt", " blue", " red"), ("answers", " red", " blue")):
        made = edit_file(path="zsre.json", layout="zsre", edits=2, target=target, **files).questions
        assert [said(r.prompt) for r in made.requests] == ["What colour is the rose?", "What colour is a fox?"]
        assert {said(r.target) for r in made.requests} == {wanted} and {said(b) for b in made.before} == {before}
        assert said(made.requests[0].prompt[: made.requests[0].subject + 1]) == "What colour is the rose"
        near = made.probe(made.about["neighbours", 1][0])
        assert said(near.prompt) == "nq question: who wrote it" and said(near.answer) == " Ann"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path": "nowhere.json"}, r"scenario\.path=nowhere\.json: no file"),
        ({"corpus": "nowhere.txt"}, r"scenario\.corpus=nowhere\.txt: no file"),
        ({"path": "old.txt"}, "is not JSON"),
        ({"path": "zsre.json"}, "record 0 is not in the layout of counterfact: KeyError"),
        ({"layout": "mend"}, r"scenario\.layout must be counterfact or zsre"),
        ({"edits": 4}, r"scenario\.edits=4: counterfact\.json has 3 records"),
        ({"context": 20}, r"scenario\.context=20: a prompt with its answer has"),
        ({"edits": 0}, r"scenario\.edits must be a whole number from 1"),
    ],
)
def test_bad_files(files, options, words):
    with pytest.raises(UserError, match=words) as caught:
        edit_file(**({"path": "counterfact.json", "layout": "counterfact", "edits": 2} | files | options))
    assert "\n" not in str(caught.value)


def test_the_last_token_of_a_subject_also_where_it_is_joined_with_what_follows():
    prompt = np.array([5, 6, 7, 8])
    for lead, place in (([5, 6], 1), ([5, 9], 1), ([5], 0), ([5, 6, 7, 8], 3), ([5, 6, 1, 2], 2)):
        assert last_of(np.array(lead), prompt) == place


RUN = (
    *("scenario=edit_facts", "scenario.edits=3", "scenario.entities=64", "scenario.looks=[1,3]", "scenario.neighbours=1"),
    *("scenario.known=0", "model=decoder_tiny", "model.width=16", "model.heads=2", "learner.steps=3", "on_error=raise"),
)


def test_a_run_is_recorded_and_verified(tmp_path):
    (job,) = compose.compose([*RUN, f"results_dir={tmp_path}"])
    outcome = run_job(job)
    assert outcome.status == "ok" and "reliability" in outcome.text, outcome.text
    found = record.read(outcome.path)
    assert [row["experience"] for row in found["rows"] if row["evaluator"] == "edit_success"] == [-1, 0, 1]
    assert {row["evaluator"] for row in found["rows"]} == set(edit_metrics.EVALUATORS)
    (verdict,) = verify.verdicts(tmp_path)
    assert verdict.verdict == "verified", verdict
    assert run_job(job).status == "skipped"
    for name, column, value in (("correct", 0, 99), ("same", 1, -1), ("nats", 0, -1.0)):
        form = json.loads(json.dumps(rows_of(found)))
        row = next(r for r in form["rows"] if r["evaluator"] == "edit_success" and r["experience"] == 1)
        row["sums"][name][column] = value
        folder = tmp_path / name
        (folder / "records").mkdir(parents=True)
        body = form | {"schema": record.SCHEMA}
        body.pop("checksum", None)
        path = folder / "records" / outcome.path.name
        path.write_text(json.dumps(body | {"checksum": record.checksum(body)}))
        assert verify.verdicts(folder)[0].verdict == "failed", name


def test_wrong_combinations_are_refused_in_one_line(tmp_path):
    from clbench.run.plan import plan_job

    for words, said in (
        (("learner=slca",), "learner slca does not fit scenario edit_facts: asks=predict, the scenario asks logits"),
        (("model=nano",), "model nano has no loss: scenario edit_facts needs a decoder_... model"),
        (("model=decoder_tiny",), "model decoder_tiny knows 0% of the facts that scenario edit_facts changes"),
        (("optimizer_state=keep", "scenario.known=0", "model=decoder_tiny"), "optimizer_state has no effect"),
    ):
        (job,) = compose.compose(
            ["scenario=edit_facts", "scenario.edits=2", "scenario.entities=64", *words, f"results_dir={tmp_path}"]
        )
        with pytest.raises(UserError, match=said.replace("...", r"\.\.\.")) as caught:
            plan_job(job)
        assert "\n" not in str(caught.value)
