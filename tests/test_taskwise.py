"""Learners of disclosed tasks against naive versions: task-aware optimisers."""

import math

import numpy as np
import pytest
import torch
from small_networks import SmallTrial, mlp

from clbench.interfaces import UserError
from clbench.learners import tag
from clbench.learners.tag import Tag


def refused(learner, message, make=lambda: mlp(4), **options):
    with pytest.raises(UserError, match=message):
        SmallTrial(make, learner, "task_incremental", **options).start()


# --- TAG


def tag_steps(monkeypatch, **options):
    """Three tasks with TAG -> for each task its steps, each as {name: (weights before, raw gradient, weights after)}."""
    tasks, real = [], tag.fit

    def spy(runtime, name, learner, groups, loss, batches, recipe, before_step, **hooks):
        named = dict(learner.model.named_parameters())
        head = learner.heads.at(len(learner.heads.tasks) - 1)
        named |= {f"head.{n}": p for n, p in head.named_parameters()}
        steps = []

        def before(params, grads):
            steps.append({n: [p.detach().clone(), p.grad.clone(), None] for n, p in named.items()})
            before_step(params, grads)

        def after(place, batch):
            for n, p in named.items():
                steps[-1][n][2] = p.detach().clone()

        log = real(runtime, name, learner, groups, loss, batches, recipe, before_step=before, after_step=after, **hooks)
        tasks.append(steps)
        return log

    monkeypatch.setattr(tag, "fit", spy)
    t = SmallTrial(lambda: mlp(5), Tag, "task_incremental", **({"batch_size": 10, "lr": 0.01} | options))
    learner, learn, _ = t.begin()
    for i in range(3):
        learn(i)
    return learner, tasks


def naive_tag(tasks, optimizer, b, beta2, per_epoch, lr=0.01, eps=1e-8):
    """Weights after each step of each task, from the raw gradients, weight by weight in float64."""
    found, old = [], {}
    for t, steps in enumerate(tasks):
        m, v, found_t = {}, {}, []
        for s, step in enumerate(steps):
            n, out = s % per_epoch + 1, {}
            for name, (theta, g, _) in step.items():
                theta, g = theta.double().numpy(), g.double().numpy()
                m[name] = 0.9 * m.get(name, 0 * g) + 0.1 * g
                keep, add = (1, 1) if optimizer == "adagrad" else (beta2, 1 - beta2)
                v[name] = keep * v.get(name, 0 * g) + add * g**2
                total = (1.0 if t == 0 else math.exp(-b)) * v[name]
                for frozen, squares in [] if name.startswith("head") else old.get(name, []):
                    norm = np.sqrt((m[name] ** 2).sum())
                    cosine = (frozen * m[name]).sum() / norm if norm > 0 else 0.0
                    total = total + math.exp(-b * cosine) * squares
                if optimizer == "adam":
                    out[name] = theta - lr * m[name] / (1 - 0.9**n) / (np.sqrt(total) / math.sqrt(1 - beta2**n) + eps)
                else:
                    out[name] = theta - lr * g / (np.sqrt(total) + eps)
            found_t.append(out)
        for name in m:
            norm = np.sqrt((m[name] ** 2).sum())
            old.setdefault(name, []).append((m[name] / norm if norm > 0 else m[name], v[name]))
        found.append(found_t)
    return found


@pytest.mark.parametrize(
    ("optimizer", "variant", "beta2"),
    [("rmsprop", "official", 0.99), ("adagrad", "official", 0.0), ("adam", "official", 0.999), ("adam", "paper", 0.999)],
)
def test_tag_against_the_paper(monkeypatch, optimizer, variant, beta2):
    learner, tasks = tag_steps(monkeypatch, optimizer=optimizer, variant=variant, sensitivity=2.0)
    per_epoch = 3 if variant == "official" else 6  # two epochs of 24 samples
    assert [len(steps) for steps in tasks] == [6, 6, 6]
    for steps, wanted in zip(tasks, naive_tag(tasks, optimizer, 2.0, beta2, per_epoch), strict=True):
        for step, out in zip(steps, wanted, strict=True):
            for name, (_, _, after) in step.items():
                np.testing.assert_allclose(after.numpy(), out[name], rtol=1e-4, atol=2e-6, err_msg=name)
    assert {len(v) for n, v in learner.squares.items() if n.startswith("model")} == {3}
    assert {len(v) for n, v in learner.squares.items() if n.startswith("heads")} == {1}


@pytest.mark.parametrize("optimizer", ["rmsprop", "adagrad", "adam"])
def test_tag_of_one_task_is_the_plain_optimiser(monkeypatch, optimizer):
    _, (steps, *_) = tag_steps(monkeypatch, optimizer=optimizer, variant="paper")
    params = {n: torch.nn.Parameter(before.clone()) for n, (before, _, _) in steps[0].items()}
    plain = {
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.99, eps=1e-8),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, eps=1e-8),
        "adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-8),
    }[optimizer](list(params.values()))
    for step in steps:
        for n, (_, g, _) in step.items():
            params[n].grad = g.clone()
        plain.step()
        for n, (_, _, after) in step.items():
            torch.testing.assert_close(params[n].detach(), after, rtol=1e-5, atol=1e-6)


def test_tag_weighs_tasks_by_agreement():
    m = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0], [0.0, 0.0], [5.0, 0.0]])
    wanted = [math.exp(-5), math.exp(5), 1.0, 1.0, math.exp(-5)]
    torch.testing.assert_close(tag.weights(m, 4, 5.0), torch.tensor(wanted))
    assert tag.weights(m, 4, 0.0).tolist() == [1.0] * 5
    none = tag.weights(torch.zeros(2, 3), 1, 5.0)  # a moment of 0: the cosine is 0, and not a number in the release
    torch.testing.assert_close(none, torch.tensor([1.0, math.exp(-5)]))


def test_tag_refuses():
    refused(Tag, r"unknown learner\.optimizer=sgd: choose rmsprop, adagrad or adam", optimizer="sgd")
    refused(Tag, r"unknown learner\.variant=code: choose official or paper", variant="code")
    refused(Tag, r"learner\.beta1 must lie in \[0, 1\), got 1", beta1=1.0)
    refused(Tag, r"learner\.beta2=0\.9 has no effect on learner\.optimizer=adagrad", beta2=0.9, optimizer="adagrad")
    refused(Tag, r"learner\.sensitivity must be at least 0, got -1", sensitivity=-1.0)
    refused(Tag, r"learner\.eps must be above 0, got 0", eps=0.0)
