"""Selection of lines: IFD and LESS by hand and against naive versions, tasks where the right choice is known, refusals."""

import copy
import functools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clbench.config import compose as composing
from clbench.config.compose import compose
from clbench.interfaces import UserError, mismatch
from clbench.learners.text_finetune import TextFinetune
from clbench.models.decoder import build_decoder
from clbench.models.pet_modules import lora
from clbench.run.plan import plan_job
from clbench.run.provenance import identity
from clbench.streams.tokens.text_data import TextBatch, open_experience
from clbench.streams.tokens.text_tasks import text_tasks
from clbench.training import line_selection as ls
from clbench.training.runtime import Runtime
from clbench.training.state import fingerprint

CPU = torch.device("cpu")
POOL = {"name": "t", "tasks": ["copy", "shift_3", "facts_20"], "stages": [3], "lines": 40, "test_lines": 4}
SCENARIO = text_tasks(**POOL, target=["shift_3"], target_lines=8)


def decoder(seed=1):
    return build_decoder(name="d", vocab=256, width=16, depth=2, heads=2, context=64, rotary=0.5, seed=seed)


def runtime(seed=0):
    made = Runtime(seed, CPU, budget=SCENARIO.budget)
    made.begin(0)
    return made


def batch(*pairs):
    lines = [np.frombuffer(prompt + answer, np.uint8).astype(np.int64) for prompt, answer in pairs]
    return TextBatch.of_lines(lines, np.array([len(p) for p, _ in pairs]), CPU)


class Table:
    """Nats of the answer by hand: token a costs .4 behind `xy=`, b .2; behind `=` alone .9 and .3."""

    def __call__(self, tokens):
        z = torch.full((*tokens.shape, 256), -30.0)
        for row, out in zip(tokens, z, strict=True):
            after = row.tolist().index(ord("="))
            for place, (token, nats) in enumerate(zip((97, 98), (0.4, 0.2) if after else (0.9, 0.3), strict=True)):
                if after + place < len(row):
                    p = float(np.exp(-nats))
                    out[after + place, token], out[after + place, 0] = np.log(p), np.log(1 - p)
        return z


def test_ifd_by_hand():
    """(.4 + .2) / (.9 + .3) = .5, a ratio of losses; that of perplexities would be .741."""
    found = ls.difficulty(Table(), batch((b"xy=", b"ab"), (b"xxxy=", b"ab")))
    assert found.tolist() == pytest.approx([0.5, 0.5], abs=1e-5)


def test_difficulty_of_a_decoder_against_single_lines():
    model, pairs = decoder().eval(), [(b"copyab=", b"ab\n"), (b"k=", b"1\n"), (b"shiftxyz=", b"abcd\n")]
    with torch.no_grad():
        wanted = []
        for prompt, answer in pairs:
            nats = []
            for before in (prompt, prompt[-1:]):
                row = torch.tensor([*before, *answer])[None]
                z = model(row[:, :-1])[0, len(before) - 1 :]
                nats.append(float(F.cross_entropy(z, row[0, len(before) :])))
            wanted.append(nats[0] / nats[1])
    assert ls.difficulty(model, batch(*pairs)).tolist() == pytest.approx(wanted, rel=1e-4)


def test_the_highest_below_the_limit_are_chosen():
    assert ls.chosen(np.array([0.2, 0.9, -np.inf, 0.9, 0.5]), 0.4).tolist() == [1, 3]
    assert ls.chosen(np.array([0.2, 0.9, -np.inf, 0.9, 0.5]), 0.2).tolist() == [1], "of equal ones the first"
    assert ls.chosen(np.array([0.3, -np.inf]), 1.0).tolist() == [0]
    with pytest.raises(UserError, match="drops every line"):
        ls.chosen(np.array([-np.inf, -np.inf]), 0.5)


def test_adams_direction_by_hand():
    found = ls.adam_direction(torch.tensor([[1.0, 1.0]]), torch.tensor([0.1, -0.2]), torch.tensor([0.01, 0.04]))
    assert found[0].tolist() == pytest.approx([1.81240, -0.39528], abs=1e-5)


def test_gradients_of_lines_against_single_backward_passes():
    model = decoder()
    pet = lora(model, runtime(), rank=2, targets=("q", "fc1"))
    with torch.no_grad():
        for value in pet.values.values():
            value.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    pairs = [(b"copyab=", b"ab\n"), (b"k=", b"1\n"), (b"shiftxyz=", b"abcd\n")]
    found = ls.row_gradients(model, pet, batch(*pairs))
    for i, pair in enumerate(pairs):
        pet.values.zero_grad()
        for value in pet.values.values():
            value.grad = None
        ls.row_nats(model, batch(pair))[0].backward()
        for name, value in pet.values.items():
            assert torch.allclose(found[name][i], value.grad, rtol=1e-3, atol=1e-6), name


def test_projections_keep_inner_products_and_come_from_the_seed():
    draw = torch.Generator().manual_seed(0)
    grads = {"a": torch.randn(6, 3, 40, generator=draw), "b": torch.randn(6, 25, generator=draw)}
    flat = torch.cat([grads["a"].flatten(1), grads["b"]], 1)
    found = ls.projected(grads, 20_000, key=5)
    assert found.shape == (6, 20_000)
    assert torch.allclose(found @ found.T / 20_000, flat @ flat.T, atol=6.0)
    cosine, real = (F.normalize(x, dim=1) @ F.normalize(x, dim=1).T for x in (found, flat))
    assert (cosine - real).abs().max() < 0.03
    one = ls.projected({"a": torch.ones(1, 1)}, 8, key=5)
    assert set(one[0].tolist()) == {-1.0, 1.0}, "random signs"
    assert torch.equal(ls.projected(grads, 64, key=5), ls.projected(grads, 64, key=5))
    assert not torch.equal(ls.projected(grads, 64, key=5), ls.projected(grads, 64, key=6))


def test_the_best_task_counts():
    similar = torch.tensor([[0.1, 0.3, 0.9], [0.5, 0.7, -1.0]])
    assert ls.nearest(similar, torch.tensor([4, 4, 2])).tolist() == pytest.approx([0.9, 0.6])


def naive_less(model, experience, made, rt):
    """Everything line by line, with moments from Adam's formulas."""
    from clbench.streams import rng

    twin = copy.deepcopy(model)
    pet = lora(twin, rt, rank=made.rank, targets=ls.LAYERS)
    train, target = experience.train, experience.target
    number = round(made.warm * len(train))
    rows = rng.permutation(rt.key("lines"), len(train))[:number]
    m, v = ({n: torch.zeros_like(p) for n, p in pet.values.items()} for _ in range(2))
    total, step = np.zeros(len(train)), 0

    def gradient(data, rows, mean=None):
        nats = ls.row_nats(twin, data.batch(rows)) if mean is None else mean(data.batch(rows))
        return dict(zip(pet.values, torch.autograd.grad(nats.sum(), list(pet.values.values())), strict=True))

    for epoch in range(made.epochs):
        order = rows[rng.permutation(rng.key(rt.key("warm"), epoch), number)]
        for first in range(0, number, made.batch_size):
            g = gradient(train, order[first : first + made.batch_size], functools.partial(ls.answer_loss, twin))
            step += 1
            with torch.no_grad():
                for n, p in pet.values.items():
                    m[n] = 0.9 * m[n] + 0.1 * g[n]
                    v[n] = 0.999 * v[n] + 0.001 * g[n] ** 2
                    p -= made.lr * (m[n] / (1 - 0.9**step)) / ((v[n] / (1 - 0.999**step)).sqrt() + 1e-8)

        def direction(data, row, adam):
            g = gradient(data, [row])
            u = {n: (0.9 * m[n] + 0.1 * g[n]) / (0.999 * v[n] + 0.001 * g[n] ** 2 + 1e-8).sqrt() if adam else g[n] for n in g}
            return F.normalize(ls.projected({n: x[None] for n, x in u.items()}, made.size, rt.key("projection")), dim=1)[0]

        wanted = torch.stack([direction(target, i, False) for i in range(len(target))])
        total += np.array([float((wanted @ direction(train, i, True)).mean()) for i in range(len(train))]) / made.epochs
    return total


def test_less_against_a_version_line_by_line():
    tiny = text_tasks(**(POOL | {"lines": 6}), target=["shift_3"], target_lines=3)
    experience, model = open_experience(tiny, 0, CPU), decoder()
    made = ls.Less(warm=0.5, epochs=2, rank=2, size=64, batch_size=4)
    before = fingerprint(model.state_dict())
    found = made.scores(model, experience, runtime())
    assert np.allclose(found, naive_less(model, experience, made, runtime()), atol=2e-3)
    assert fingerprint(model.state_dict()) == before and not model.pets, "done on a copy"


def known():
    """The decoder that knows `copy`, and a pool of three tasks."""
    (job,) = compose(["scenario=text_tasks", "scenario.tasks=[copy]"])
    return composing.build(job["model"]), open_experience(SCENARIO, 0, CPU)


def test_less_finds_the_lines_of_the_target_task():
    model, experience = known()
    scores, y = ls.Less(warm=0.5, epochs=4, size=256).scores(model, experience, runtime()), experience.train.y
    assert (y[ls.chosen(scores, 0.1)] == 1).all(), "of shift_3, a third of the pool"
    assert (y[ls.chosen(scores, 1 / 3)] == 1).mean() > 0.7
    drawn = ls.Random().scores(model, experience, runtime())
    assert len(set(y[ls.chosen(drawn, 1 / 3)])) == 3


def test_ifd_knows_what_a_decoder_can_do_already():
    """Behind its prompt an answer of `copy` costs next to nothing; an unknown fact costs as much as without it."""
    model, experience = known()
    scores = ls.Ifd(warm=0.0, most=1e9).scores(model, experience, runtime())
    by_task = [scores[experience.train.y == task] for task in range(3)]
    assert by_task[0].max() < 0.2 and np.median(by_task[2]) > 0.7
    limited = ls.Ifd(warm=0.0, most=1.0).scores(model, experience, runtime())
    assert ((scores > 1) == np.isneginf(limited)).all() and (limited[scores <= 1] == scores[scores <= 1]).all()
    chosen = ls.chosen(limited, 0.25)
    assert not (experience.train.y[chosen] == 0).any()
    warmed = ls.Ifd(warm=0.5, most=1e9).scores(model, experience, runtime())
    assert warmed[experience.train.y == 2].mean() < 0.7 * by_task[2].mean(), "facts come again, and are learned"


@pytest.mark.parametrize(
    "select", ["random", {"ifd": {"kept": 0.2, "warm": 0.1, "most": 9.0}}, {"less": {"warm": 0.1, "epochs": 1, "size": 32}}]
)
@pytest.mark.parametrize("pet", [False, True])
def test_only_the_chosen_lines_are_trained_on(select, pet):
    options = {"pet": functools.partial(lora, rank=2)} if pet else {}
    made = TextFinetune(decoder(), runtime(), select=select, epochs=1, **options)
    read, experience = set(), open_experience(SCENARIO, 0, CPU)
    log = made.learn(experience)
    share = {"random": 0.1, "ifd": 0.2, "less": 0.05}[select if isinstance(select, str) else next(iter(select))]
    assert log["kept"] == round(share * 120) and made.runtime.used_visits == log["kept"], read
    again = TextFinetune(decoder(), runtime(), select=select, epochs=1, **options)
    again.learn(open_experience(SCENARIO, 0, CPU))
    assert fingerprint(made.state_dict()) == fingerprint(again.state_dict())


def test_target_lines_are_neither_trained_on_nor_asked():
    plain = text_tasks(**POOL)
    assert len(SCENARIO.target) == 8 and set(SCENARIO.owner[SCENARIO.target]) == {1} and len(plain.target) == 0
    used = {int(i) for e in SCENARIO.manifest.experiences for i in e.train} | {
        int(i) for e in SCENARIO.manifest.evals for i in e.ids
    }
    assert not used & set(SCENARIO.target.tolist())
    assert plain.manifest.sha256 != SCENARIO.manifest.sha256 and open_experience(plain, 0, CPU).target is None
    (job,) = compose(["scenario=text_tasks"])
    assert not {"target", "target_lines"} & set(identity(job)["scenario"]) and "select" not in identity(job)["learner"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("learner.select=less",), "needs_target, and the scenario has no target lines"),
        (("learner.select=best",), r"unknown learner\.select=best: choose random, ifd, less"),
        (("learner.select={ifd:{kept:0}}",), "kept must be a share above 0"),
        (("learner.select={ifd:{keep:0.1}}",), r"learner\.select\.ifd has no option 'keep'"),
        (("learner.select={less:{epochs:0}}", "scenario.target=[copy]"), "epochs, rank and size must be at least 1"),
        (("learner=text_joint", "learner.select=random"), "it needs data=new"),
        (("scenario.target=[sort]",), r"scenario\.target must be a list of tasks of the stream \(copy, reverse\)"),
    ],
    ids=str,
)
def test_refused_before_anything_is_trained(tmp_path, words, said):
    base = ["scenario=text_tasks", "scenario.tasks=[copy,reverse]", "scenario.lines=8", f"results_dir={tmp_path}"]
    with pytest.raises(UserError, match=said):
        plan_job(compose([*base, *words])[0])


def test_what_is_declared():
    assert TextFinetune.capabilities_of(select={"less": {}}).needs_target and not TextFinetune.capabilities_of().needs_target
    assert mismatch("x", TextFinetune.capabilities_of(select="less"), SCENARIO.facts(), True) is None
