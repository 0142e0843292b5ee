"""Learners for shifting domains, against naive versions: PSMT, ViDA, HDC."""

import copy

import numpy as np
import pytest
import torch
from small_networks import SmallTrial, convnet
from torch.func import functional_call

from clbench.config.compose import compose
from clbench.interfaces import Capabilities, UserError
from clbench.learners.cotta import Network
from clbench.learners.psmt import Psmt, least
from clbench.streams.eval_sets import open_eval
from clbench.streams.images.data import open_experience
from clbench.testing.contract import Trial, small_stream
from clbench.training.adaptation import batch_statistics
from clbench.training.state import fingerprint

ADAPTS = Capabilities(transductive=True, adapts_at_test=True)
ROTATED = [{"rotate": {"experiences": 3}}, {"test_time": {"batch_size": 9}}]
SHIFTED = small_stream(operators=ROTATED, budget={"epochs": 2})


def trained(kind, make=convnet, **options):
    t = SmallTrial(make, kind, scenario=SHIFTED, can=ADAPTS, lr=0.1, backbone_lr=0.1, batch_size=12, **options)
    learner, learn, pipeline = t.begin()
    learn(0)
    return t, learner, pipeline


def two_batches(pipeline):
    data = open_eval(SHIFTED, 1, pipeline).data
    return [data.batch(np.arange(i, i + 9)) for i in (0, 9)]


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (Psmt, {"variant": "code"}, r"learner\.variant=code: choose official or paper"),
        (Psmt, {"fisher": -1.0}, r"learner\.fisher must"),
        (Psmt, {"fisher_samples": 1}, r"learner\.fisher_samples"),
        (Psmt, {"restore": 1.5}, r"learner\.restore"),
        (Psmt, {"reset": "always"}, r"learner\.reset"),
    ],
)
def test_adapting_learners_refuse_in_one_line(kind, options, words):
    with pytest.raises(UserError, match=words) as caught:
        trained(kind, **options)
    assert "\n" not in str(caught.value)


# --- PSMT


def symmetric(z, y):
    """Half the cross-entropy each way, sample by sample."""
    total = 0.0
    for own, other in zip(z, y, strict=True):
        p, q = torch.exp(own) / torch.exp(own).sum(), torch.exp(other) / torch.exp(other).sum()
        total = total - 0.5 * (q * torch.log(p)).sum() - 0.5 * (p * torch.log(q)).sum()
    return total / len(z)


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_psmt_against_a_naive_version(variant):
    """Two batches: loss, step, moving average, and the weights with the smallest squared gradients at the source again."""
    options = {"threshold": 1.1, "augmentations": 2} if variant == "paper" else {}
    _, learner, pipeline = trained(
        Psmt, variant=variant, fisher=40.0, restore=0.3, alpha=0.9, adapt_lr=0.2, adapt_optimizer="sgd", **options
    )
    source = {name: value.clone() for name, value in learner.source().items()}
    student = {n: v.clone().requires_grad_() for n, v in source.items()}
    teacher = {n: v.clone() for n, v in source.items()}
    sgd, moved, back_at_source = torch.optim.SGD(student.values(), lr=0.2, momentum=0.9), 0, 0
    for batch in two_batches(pipeline):
        with batch_statistics(learner.model):
            own = learner.scores(student, batch.x)
            if variant == "paper":
                y = (learner.scores(teacher, learner.view(batch.x, 0)) + learner.scores(teacher, learner.view(batch.x, 1))) / 2
                loss = 0.5 * symmetric(own, y.detach()) + 0.5 * symmetric(
                    learner.scores(student, learner.view(batch.x, 2)), y.detach()
                )
            else:
                y = learner.scores(teacher, batch.x)
                loss = symmetric(own, y.detach())
        for name, value in student.items():
            loss = loss + 40.0 * (learner.fisher[name] * (value - source[name]) ** 2).sum()
        grads = dict(zip(student, torch.autograd.grad(loss, list(student.values())), strict=True))
        squares = np.sort(np.concatenate([(g**2).flatten().numpy() for g in grads.values()]))
        limit = squares[int(0.3 * len(squares)) - 1]
        for name, value in student.items():
            value.grad = grads[name]
        sgd.step()
        with torch.no_grad():
            z = learner.predict(batch)
            for name in source:
                teacher[name] = 0.9 * teacher[name] + 0.1 * student[name]
                small = grads[name] ** 2 <= limit * (1 + 1e-6)
                student[name][small] = source[name][small]
                teacher[name][small] = source[name][small]
                moved, back_at_source = moved + int((~small).sum()), back_at_source + int(small.sum())
        torch.testing.assert_close(z, (y + own).detach(), atol=1e-5, rtol=1e-4)
    assert back_at_source >= 0.3 * (moved + back_at_source) - 2 and moved > 100
    same = [
        np.mean(np.isclose(mine[n].detach().numpy(), value.detach().numpy(), atol=1e-4, rtol=1e-3))
        for mine, naive in ((learner.student.weights, student), (learner.teacher, teacher))
        for n, value in naive.items()
    ]
    assert min(same) > 0.97, "but for gradients that lie at the limit within rounding, all weights are the naive ones"
    assert fingerprint(learner.source()) == fingerprint(source)


def test_fisher_of_psmt_is_the_mean_of_squared_gradients_of_batches():
    _, learner, pipeline = trained(Psmt)
    twin = copy.deepcopy(learner.model).eval()
    head = copy.deepcopy(learner.head)
    train, total = open_experience(SHIFTED, 0, pipeline).train, {}
    order = torch.randperm(len(train), generator=learner.runtime.generator("fisher"))
    parts = [part for part in order.split(64) if len(part) > 1]
    for part in parts:
        with batch_statistics(twin):
            z = head(twin.features(train.batch(part.numpy()).x))
        loss = -z.log_softmax(1)[torch.arange(len(z)), z.argmax(1)].mean()
        named = dict(twin.named_parameters(prefix="model")) | dict(head.named_parameters(prefix="head"))
        for name, g in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
            total[name] = total.get(name, 0) + g**2 / len(parts)
    assert total.keys() == learner.fisher.keys() == learner.source().keys()
    for name, value in total.items():
        torch.testing.assert_close(learner.fisher[name], value, atol=1e-7, rtol=1e-3)
    assert len(trained(Psmt, fisher_samples=5)[1].fisher) == len(total)


def test_the_share_of_smallest_values_counts_over_all_tensors():
    parts = [torch.tensor([[4.0, 1.0]]), torch.tensor([3.0, 2.0, 5.0])]
    assert [least(parts, share) for share in (0.2, 0.5, 0.6, 1.0)] == [1.0, 2.0, 3.0, 5.0]
    assert least(parts, 0.1) == -np.inf, "not even one"


def test_psmt_goes_back_wholly_or_never():
    """share 1: every batch is answered by the source, twice; a strong hold without a way back keeps the student near."""
    t, learner, pipeline = trained(Psmt, restore=1.0, adapt_lr=0.1)
    source = copy.deepcopy(learner.source())
    z = t.answers_of(learner, pipeline, 1)
    with batch_statistics(learner.model), torch.no_grad():
        own = [learner.scores(source, b.x) for b, _ in open_eval(SHIFTED, 1, pipeline).batches(6)]
    torch.testing.assert_close(z, 2 * torch.cat(own), atol=1e-5, rtol=1e-4)
    assert all(torch.equal(learner.student.weights[n], v) and torch.equal(learner.teacher[n], v) for n, v in source.items())
    free = trained(Psmt, restore=0.0, fisher=0.0, adapt_lr=0.01)[1]
    t.answers_of(free, pipeline, 1)
    assert sum(torch.equal(free.student.weights[n], v) for n, v in source.items()) < len(source) / 2


def test_psmt_resumes_exactly_and_answers_before_or_after(tmp_path):
    t, learner, pipeline = trained(Psmt)
    after = trained(Psmt, answer="after")[1]
    one, two = two_batches(pipeline)
    first, second = learner.predict(one), after.predict(one)
    assert not torch.equal(first, second) and fingerprint(learner.state_dict()) == fingerprint(after.state_dict())
    torch.save(learner.state_dict(), tmp_path / "state.pt")
    other = t.begin()[0]
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(learner.predict(two), other.predict(two))
    assert fingerprint(learner.state_dict()) == fingerprint(other.state_dict())
