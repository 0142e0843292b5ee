"""Baselines of continual pre-training: each formula against a naive version, what is read, exact resume, what is refused."""

import copy
import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_cpt_train import Killed, killed_at, learn
from test_cpt_train import experiences as texts
from test_cpt_train import learner as reader
from test_mae import build

from clbench.config import compose
from clbench.interfaces import UserError
from clbench.learners.cpt_er import CptEr
from clbench.learners.cpt_gdumb import CptGDumb
from clbench.learners.cpt_lwf import OTHER_MASK, CptLwf
from clbench.learners.cpt_mas import CptMas
from clbench.learners.pretrain import Pretrain
from clbench.models.mae import split_rows
from clbench.run.runner import DoesNotFit, prepare
from clbench.streams.tokens.class_groups import class_groups
from clbench.training.checkpoint import Journal
from clbench.training.pretraining.data_mixture import KeptShare
from clbench.training.pretraining.segments import PretrainRuntime
from clbench.training.schedules import cosine
from clbench.training.state import fingerprint

OPTIONS = {"lr": 1e-2, "boundary": "reset", "schedule": functools.partial(cosine, warmup=0.2, end=0.1)}


@functools.cache
def stream():
    return class_groups(
        name="s", dataset="digits", increment=2, num_classes=6, limit_train=20, limit_test=10, epochs=2, batch=8
    )


def experiences(number=2, past=False):
    return [stream().experience(i, past) for i in range(number)]


def made(kind, folder=None, **options):
    runtime = PretrainRuntime(seed=0, device=torch.device("cpu"), journal=Journal(folder, 0.0), flops_per_token=1.0)
    return kind(build(depth=1), runtime, **(OPTIONS | options))


def rows(experience, number=8):
    return torch.from_numpy(experience.train.read(np.arange(number)))


def weights(one):
    return fingerprint(one.model.state_dict())


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_lwf_is_the_distance_of_tokens_to_those_of_the_network_before(variant):
    first, second = experiences()
    one = learn(made(CptLwf, variant=variant, strength=0.5), [first])
    before, x = copy.deepcopy(one.model), rows(second)
    one.distilled(x)  # what it finds is the teacher
    with torch.no_grad():
        for p in one.model.parameters():
            p += 0.05 * torch.sin(torch.arange(p.numel()).float()).view_as(p)
        losses, penalty = one.distilled(x)
        images, keys = split_rows(x, 8)
        old = before.encode(images, before.masks(keys ^ OTHER_MASK if variant == "official" else keys)[0])
        new = one.model.encode(images, one.model.masks(keys)[0])
    found = []
    for b in range(new.shape[0] if variant == "paper" else new.shape[2]):
        for t in range(new.shape[1]):
            u, v = (new[b, t], old[b, t]) if variant == "paper" else (new[:, t, b], old[:, t, b])
            found.append(float(u @ v / (u.norm() * v.norm())))
    assert float(penalty) == pytest.approx(0.5 * (1 - np.mean(found)), rel=1e-4) and float(penalty) > 1e-4
    torch.testing.assert_close(losses, one.model.loss(x))


def test_lwf_of_no_strength_is_plain_training_and_a_strong_one_stays():
    plain = learn(made(Pretrain), experiences())
    assert weights(learn(made(CptLwf, strength=0.0), experiences())) == weights(plain)
    moved = {}
    for strength in (0.0, 50.0):
        one = made(CptLwf, strength=strength)
        learn(one, experiences(1))
        x = rows(experiences()[1], 16)
        with torch.no_grad():
            before = one.model.encoded(x)
        learn(one, experiences()[1:])
        with torch.no_grad():
            moved[strength] = float((one.model.encoded(x) - before).square().mean())
        assert one.teacher is None
    assert moved[50.0] < 0.5 * moved[0.0]


def naive_importance(model, data, number, variant):
    """Mean of magnitudes of gradients, image after image (or batch after batch), by autograd alone."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    size = 1 if variant == "paper" else data.batch
    starts = range(0, number, size)
    for start in starts:
        x = torch.from_numpy(data.read(np.arange(start, min(start + size, number))))
        images, keys = split_rows(x, 8)
        tokens = model.encode(images, model.masks(keys)[0])
        if variant == "paper":
            value = sum(float_sum(tokens[0, t]) for t in range(tokens.shape[1])) / tokens.shape[1]
        else:
            value = sum(float_sum(tokens[:, t, d]) for t in range(tokens.shape[1]) for d in range(tokens.shape[2]))
            value = value / (tokens.shape[1] * tokens.shape[2])
        model.zero_grad()
        value.backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] += p.grad.abs()
    model.zero_grad()
    return {name: value / len(starts) for name, value in total.items()}


def float_sum(vector):
    return (vector * vector).sum()


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_mas_measures_and_holds_as_specified(variant):
    one = made(CptMas, variant=variant, decay=0.25, images=18)
    data = experiences(1)[0].train
    with torch.no_grad():  # a last LayerNorm with gains 1 and biases 0 makes all tokens equally long
        for p in (one.model.norm.weight, one.model.norm.bias):
            p += torch.linspace(-0.5, 0.5, len(p))
    found, wanted = one.importance_of(data), naive_importance(one.model, data, 18, variant)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6, msg=name)
    assert float(found["blocks.0.attn.qkv.weight"].abs().max()) > 0 and not found["decoder_pred.weight"].any()
    first = {name: 0.75 * v for name, v in learned(one, 0).items()}
    assert all(torch.equal(one.importance[name], value) for name, value in first.items())
    x = rows(experiences()[1])
    one.held(x)
    with torch.no_grad():
        for p in one.model.parameters():
            p += 0.1
    losses, penalty = one.held(x)
    gap = sum(float((value * 0.1**2).sum()) for value in first.values())
    assert float(penalty.detach()) == pytest.approx(0.1 * gap, rel=1e-3)
    torch.testing.assert_close(losses, one.model.loss(x))


def learned(one, index):
    """Learn an experience -> its importance alone, measured anew."""
    one.runtime.begin(index)
    one.learn(experiences(index + 1)[index])
    one.runtime.journal.finish_experience({"experience": index})
    with one.model.in_fp32():
        return one.importance_of(experiences(index + 1)[index].train)


def test_mas_adds_up_and_holds_the_encoder():
    plain = learn(made(Pretrain), experiences())
    assert weights(learn(made(CptMas, strength=0.0, images=4), experiences())) == weights(plain)
    moved = {}
    for strength in (0.0, 1e4):
        one = made(CptMas, strength=strength, decay=0.25, images=8, weight_decay=0.0)
        learned(one, 0)
        before, old = copy.deepcopy(one.model.state_dict()), one.importance
        new = learned(one, 1)
        for name, value in one.importance.items():
            torch.testing.assert_close(value, 0.25 * old[name] + 0.75 * new[name])
        gap = {name: (value - before[name]).abs().mean() for name, value in one.model.state_dict().items()}
        moved[strength] = float(gap["blocks.0.mlp.fc1.weight"]), float(gap["decoder_pred.weight"])
    assert moved[1e4][0] < 0.5 * moved[0.0][0] and moved[1e4][1] > 0.2 * moved[0.0][1]


class Noted:
    """A stand-in for `TokenData` that notes which of its own sequences are taken."""

    def __init__(self, data, notes):
        self._data, self._notes = data, notes

    def __getattr__(self, name):
        return getattr(self._data, name)

    def __len__(self):
        return len(self._data)

    def read(self, positions, size=None):
        return self.take(self._data.numbers(positions, size), "new", positions)

    def take(self, numbers, role, positions):
        self._notes += [(self._data.name, int(number)) for number in numbers]
        return self._data.take(numbers, role, positions)


def noted(one, number=3):
    """Learn experiences of texts with past -> what was read in each: lists of (experience, number)."""
    found = []
    for experience in texts(number):
        notes = []
        past = tuple(Noted(old, notes) for old in experience.past)
        learn(one, [replace(experience, train=Noted(experience.train, notes), past=past)])
        found.append(notes)
    return found


def test_alternating_replay_reads_half_of_each_batch_from_its_memory():
    found = noted(reader(CptEr, kept=0.25, steps="equal"))
    assert len({len(notes) for notes in found}) == 1  # 12 steps of 4 sequences
    for k, notes in enumerate(found[1:], 1):
        old = [note for note in notes if note[0] != f"d{k}"]
        assert len(old) == len(notes) // 2 == 24
        for i in range(k):
            assert sum(name == f"d{i}" for name, _ in old) == 24 // k
            assert len({number for name, number in old if name == f"d{i}"}) <= 12  # a quarter of 48
    kept = [{number for name, number in notes if name == "d0"} for notes in found[1:]]
    assert kept[1] <= kept[0] and len(kept[0]) == 12  # one memory, drawn once


def test_alternating_replay_may_double_its_steps():
    one = reader(CptEr, kept=0.25, steps="double")
    one.runtime.stream_steps = (12, 12, 12)
    plans = [one.plan(experience)[0] for experience in texts(3)]
    assert [(p.last, p.steps, p.before) for p in plans] == [(12, 12, 0), (24, 24, 12), (24, 24, 36)]
    assert [len(notes) for notes in noted(one)] == [48, 96, 96] and one.runtime.ledger.trained == 240 * 6


@pytest.mark.parametrize(("steps", "number"), [("equal", [48, 48, 48]), ("passes", [12, 24, 36])])
def test_gdumb_reads_its_memory_alone_from_the_first_weights(steps, number):
    one = reader(CptGDumb, kept=0.25, steps=steps)
    start = {name: value.clone() for name, value in one.model.state_dict().items()}
    found = noted(one)
    assert [len(notes) for notes in found] == number
    for k, notes in enumerate(found):
        for i in range(k + 1):
            own = [number for name, number in notes if name == f"d{i}"]
            assert abs(len(own) - len(notes) / (k + 1)) <= 1 and len(set(own)) <= 12
    kept = [{number for name, number in notes if name == "d0"} for notes in found]
    assert kept[1] <= kept[0] and len(kept[0]) == 12 and kept[2] <= kept[0]
    assert one.plan(texts(3)[2])[0].start_from == "init"
    one.inner.trunk.begin(one.plan(texts(3)[2])[0])
    assert (
        all(torch.equal(value, start[name]) for name, value in one.model.state_dict().items()) and not one.inner.optimizer.state
    )


@pytest.mark.parametrize(("kind", "options"), [(CptLwf, {}), (CptMas, {"images": 4, "strength": 10.0})])
def test_killed_inside_and_equal_to_the_last_bit(tmp_path, kind, options):
    straight = learn(made(kind, **options), experiences())
    one = learn(made(kind, folder=tmp_path, **options), experiences(1))
    state = copy.deepcopy(one.state_dict())
    one.runtime.begin(1)
    killed_at(one, 14)  # before the fifth of its ten steps
    with pytest.raises(Killed):
        one.learn(experiences()[1])
    again = made(kind, folder=tmp_path, **options)
    again.load_state_dict(state)
    again.runtime.journal.experience = 0
    again.runtime.begin(1)
    again.learn(experiences()[1])
    assert fingerprint(again.state_dict()) == fingerprint(straight.state_dict())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("learner=cpt_lwf",), "learner cpt_lwf holds the features of a masked autoencoder, model decoder_tiny is none"),
        (("learner=cpt_mas",), "learner cpt_mas holds the features of a masked autoencoder"),
        (("learner=cpt_er", "learner.kept=0"), "learner.kept must be a share above 0"),
        (("learner=cpt_gdumb", "learner.kept=1.5"), "learner.kept must be a share above 0"),
        (("learner=cpt_er", "scenario.budget.exemplar_bytes=0"), "stores_exemplars, and the budget allows none"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_planned(words, message):
    (job,) = compose.compose(["scenario=cpt_synthetic", "scenario.tokens=1920", "model.depth=1", "device=cpu", *words])
    with pytest.raises(DoesNotFit, match=message):
        prepare(job)


def test_options_out_of_range():
    for kind, options, message in (
        (CptLwf, {"strength": -1}, "learner.strength"),
        (CptLwf, {"variant": "code"}, "learner.variant"),
        (CptMas, {"decay": 1}, "learner.strength=.*decay=1"),
        (CptMas, {"variant": "code"}, "learner.variant"),
    ):
        with pytest.raises(UserError, match=message):
            made(kind, **options)
    with pytest.raises(UserError, match=r"learner.steps"):
        reader(CptEr, steps="twice")
    with pytest.raises(UserError, match=r"learner.steps"):
        reader(CptGDumb, steps="twice")
    assert KeptShare(share=0.5, kept=0.5).capacity(texts(1)[0].train, 3) == 24
