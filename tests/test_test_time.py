"""Test-time adaptation: the operator, and bn_adapt, TENT and CoTTA against naive versions."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_networks import Net, SmallTrial, convnet, mlp
from torch import nn

from clbench.interfaces import Capabilities, UserError
from clbench.learners.bn_adapt import BnAdapt
from clbench.learners.cotta import Cotta
from clbench.learners.finetune import Finetune
from clbench.learners.tent import Tent
from clbench.streams.eval_sets import eval_batches, open_eval
from clbench.streams.manifest import Manifest
from clbench.streams.operators import test_time as operator
from clbench.testing.contract import small_stream
from clbench.training.adaptation import batch_statistics, entropy
from clbench.training.state import fingerprint

ROTATED = {"rotate": {"experiences": 4}}


def stream(*operators, **changes):
    return small_stream(operators=list(operators), **changes)


# --- the operator


def test_a_source_and_a_set_for_each_shift():
    s = stream(ROTATED, {"test_time": {"batch_size": 7}})
    m = s.manifest
    (source,) = m.experiences
    plain = stream().manifest
    assert source.transform == () and len(source.train) == 72 and source.classes == plain.class_order == m.class_order
    assert sorted(source.train.tolist()) == sorted(i for e in plain.experiences for i in e.train.tolist())
    assert [e.name for e in m.evals] == ["clean", "rotated1", "rotated2", "rotated3", "clean after"]
    assert [e.transform for e in m.evals] == [
        (), *(({"rotate": {"degrees": a, "interpolation": "nearest"}},) for a in (45.0, 90.0, 135.0)), (),
    ]  # fmt: skip
    tested = sorted(i for e in plain.evals for i in e.ids.tolist())
    for e in m.evals:
        assert (e.order, e.batch_size, e.first_seen, e.task) == ("given", 7, 0, None)
        assert sorted(e.ids.tolist()) == tested and e.ids.tolist() != tested
    assert m.evals[0].ids.tolist() != m.evals[1].ids.tolist(), "each set is in an order of its own"
    assert m.sha256 == stream(ROTATED, {"test_time": {"batch_size": 7}}).manifest.sha256
    assert Manifest.from_json(m.to_json()).sha256 == m.sha256 and m.kind == "test_time"
    assert m.operators[-1]["test_time"]["clean"] == "both"


def test_batches_come_as_declared():
    t = SmallTrial(convnet, Finetune, scenario=stream(ROTATED, {"test_time": {"batch_size": 7, "order": "sorted"}}))
    _, _, pipeline = t.begin()
    one = open_eval(t.scenario, 1, pipeline)
    parts = [(len(batch), y) for batch, y in one.batches(128)]
    assert [n for n, _ in parts] == [7] * 5 + [1]
    y = torch.cat([y for _, y in parts])
    assert y.tolist() == sorted(y.tolist()), "sorted by class"
    assert all(batch.y is None for batch, _ in one.batches(128))


@pytest.mark.parametrize("order", ["random", "sorted", "given"])
def test_orders(order):
    m = stream(ROTATED, {"test_time": {"order": order, "clean": "after", "rounds": 2}})
    y, listed = m.dataset.y, stream(ROTATED).manifest.evals[1].ids
    names = ["rotated1", "rotated2", "rotated3", "rotated1 (2)", "rotated2 (2)", "rotated3 (2)", "clean after"]
    assert [e.name for e in m.manifest.evals] == names
    ids = m.manifest.evals[0].ids
    if order == "given":
        assert ids.tolist() == listed.tolist()
    elif order == "sorted":
        assert (np.diff(y[ids]) >= 0).all() and sorted(ids.tolist()) == sorted(listed.tolist())
    else:
        others = [stream(ROTATED, {"test_time": {"seed": seed}}).manifest.evals[1].ids.tolist() for seed in range(3)]
        assert len({tuple(o) for o in others}) == 3 and all(sorted(o) == sorted(listed.tolist()) for o in others)


def test_sets_of_the_same_pictures_stay_apart():
    """Class-incremental digits alone: all classes are the source, the stream's sets are what comes in turn."""
    m = stream({"test_time": {}}).manifest
    assert [len(e.classes) for e in m.evals] == [6, 3, 1, 2, 6] and len(m.experiences) == 1
    assert m.evals[-1].name == "clean after" and m.num_seen(0) == 6


def test_a_plain_source():
    steps = ({"rotate": {"experiences": 3, "angles": [30, 60, 90]}}, {"test_time": {"source": "plain"}})
    m = stream(*steps).manifest
    assert m.experiences[0].transform == () and [len(e.transform) for e in m.evals] == [0, 1, 1, 1, 0]
    shared = [{"permute": {"experiences": 3, "identity_first": False}}]
    s = stream(*shared, {"test_time": {}})
    assert len(s.manifest.experiences[0].transform) == 1


def test_pictures_that_come_again_are_a_set_of_their_own():
    """A gradual shift, up and down again; and neighbours of one angle that hold the classes apart are one set."""
    angles = {"rotate": {"experiences": 5, "angles": [0, 30, 60, 30, 30]}}
    names = ["clean", "rotated1", "rotated2", "rotated3", "rotated4", "clean after"]
    assert [e.name for e in stream(angles, {"test_time": {}}).manifest.evals] == names
    apart = stream({"rotate": {"experiences": 1, "angles": [0]}})
    split = small_stream(sizes=[3, 3])
    turned = ({"rotate": {"degrees": 90.0, "interpolation": "nearest"}},)
    evals = (*apart.manifest.evals, *(replace(e, transform=turned, first_seen=0) for e in split.manifest.evals))
    made = operator.test_time(replace(apart, manifest=replace(apart.manifest, evals=evals)), order="given")
    assert [(e.name, len(e.ids), len(e.classes)) for e in made.manifest.evals][1:2] == [(split.manifest.evals[0].name, 36, 6)]
    assert len(made.manifest.evals) == 3


@pytest.mark.parametrize(
    ("operators", "words"),
    [
        ([{"test_time": {"batch_size": 0}}], r"test_time\.batch_size"),
        ([{"test_time": {"order": "sort"}}], r"test_time\.order must be one of random, sorted, given"),
        ([{"test_time": {"order": "given", "seed": 3}}], "no effect with test_time.order=given"),
        ([{"test_time": {"source": "plain"}}], r"test_time\.source=plain has no effect"),
        ([{"rotate": {"experiences": None}}, {"test_time": {}}], "holds classes .* that the source does not teach"),
        ([{"test_time": {"rounds": 0}}], r"test_time\.rounds"),
        ([{"test_time": {"batches": 3}}], "did you mean"),
    ],
)
def test_bad_options(operators, words):
    with pytest.raises(UserError, match=words) as caught:
        stream(*operators)
    assert "\n" not in str(caught.value)


# --- statistics of the batch


@pytest.mark.parametrize("prior", [0.0, 5.0, 1e12])
def test_batch_statistics_by_hand(prior):
    norm = nn.BatchNorm2d(3).eval()
    norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    norm.running_var.copy_(torch.tensor([4.0, 1.0, 0.25]))
    x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    before = copy.deepcopy(norm.state_dict())
    with batch_statistics(norm, prior):
        y = norm(x).detach()
    flat = x.movedim(1, 0).flatten(1)
    own = flat.mean(1), flat.var(1, correction=0)
    share = 6 / (prior + 6)
    mean, var = ((1 - share) * before[n] + share * s for n, s in zip(("running_mean", "running_var"), own, strict=True))
    expected = (x - mean[:, None, None]) / (var[:, None, None] + norm.eps).sqrt()
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    assert fingerprint(norm.state_dict()) == fingerprint(before), "stored statistics stay"
    if prior > 1e6:
        torch.testing.assert_close(y, norm(x).detach(), atol=1e-5, rtol=1e-5)


def test_one_value_a_channel_is_refused_in_one_line():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    with pytest.raises(UserError, match="batch of one sample"), batch_statistics(net):
        net(torch.ones(1, 4))
    assert net[2].running_mean is not None, "the statistics are back"
    with batch_statistics(net, 3.0):
        assert torch.isfinite(net(torch.ones(1, 4))).all()


def test_entropy():
    z = torch.tensor([[0.0, 0.0, 0.0], [100.0, 0.0, 0.0], [0.0, float(np.log(3)), -1e30]])
    expected = [np.log(3), 0.0, -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))]
    np.testing.assert_allclose(entropy(z).numpy(), expected, atol=1e-6)


# --- learners

ADAPTS = Capabilities(transductive=True, adapts_at_test=True)
SHIFTED = stream(ROTATED, {"test_time": {"batch_size": 9}}, budget={"epochs": 4})


def trained(kind, make=convnet, **options):
    t = SmallTrial(make, kind, scenario=SHIFTED, can=ADAPTS, lr=0.1, backbone_lr=0.1, batch_size=12, **options)
    learner, learn, pipeline = t.begin()
    learn(0)
    return t, learner, pipeline


def test_bn_adapt_is_the_network_in_training_mode():
    t, learner, pipeline = trained(BnAdapt)
    before = fingerprint(learner.state_dict())
    z = t.answers_of(learner, pipeline, 1, 9)
    assert fingerprint(learner.state_dict()) == before
    twin = copy.deepcopy(learner.model).train()
    with torch.no_grad():
        naive = torch.cat([learner.head(twin.features(b.x)) for b, _ in open_eval(SHIFTED, 1, pipeline).batches(9)])
    torch.testing.assert_close(z, naive, atol=1e-5, rtol=1e-4)
    many = trained(BnAdapt, prior=1e12)[1]
    torch.testing.assert_close(
        t.answers_of(many, pipeline, 1, 9), t.answers_of(trained(Finetune)[1], pipeline, 1, 9), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("kind", [Tent, Cotta])
def test_rate_0_is_bn_adapt(kind):
    """methods that adapt, without a step, a view or a restore: the answers of bn_adapt."""
    options = {"threshold": 0.0, "restore": 0.0} if kind is Cotta else {}
    t, learner, pipeline = trained(kind, adapt_lr=0.0, **options)
    plain = trained(BnAdapt)[1]
    for j in range(5):
        torch.testing.assert_close(t.answers_of(learner, pipeline, j), t.answers_of(plain, pipeline, j), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_tent_against_a_naive_version(steps, optimizer):
    t, learner, pipeline = trained(Tent, steps=steps, adapt_optimizer=optimizer, adapt_lr=0.05)
    twin, head = copy.deepcopy(learner.model), copy.deepcopy(learner.head)
    kept = fingerprint({"model": learner.model.state_dict(), "head": learner.head.state_dict()})
    norm = twin.net[1]
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    make = {"sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), "adam": lambda p: torch.optim.Adam(p, lr=0.05)}
    optimiser = make[optimizer]([norm.weight, norm.bias])
    for j in range(3):
        z = t.answers_of(learner, pipeline, j)
        naive = []
        for batch, _ in open_eval(SHIFTED, j, pipeline).batches(9):
            for _ in range(steps):
                out = head(twin.features(batch.x))
                loss = -(out.softmax(1) * out.log_softmax(1)).sum(1).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            naive.append(out.detach())
        torch.testing.assert_close(z, torch.cat(naive), atol=1e-4, rtol=1e-3)
    assert set(learner.adapted.weights) == {"net.1.weight", "net.1.bias"}
    torch.testing.assert_close(learner.adapted.weights["net.1.weight"].detach(), norm.weight.detach(), atol=1e-5, rtol=1e-4)
    assert not torch.equal(learner.adapted.weights["net.1.bias"], learner.model.net[1].bias)
    assert fingerprint({"model": learner.model.state_dict(), "head": learner.head.state_dict()}) == kept


def test_the_gradient_of_tent_touches_scale_and_shift_alone():
    t, learner, pipeline = trained(Tent)
    t.answers_of(learner, pipeline, 1)
    assert all(p.grad is None for p in (*learner.model.parameters(), *learner.head.parameters()))
    norms = Net(nn.Flatten(), nn.Linear(192, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 6), num_features=6)
    _, learner, _ = trained(Tent, make=lambda: norms)
    assert set(learner.adapted.weights) == {"net.2.weight", "net.2.bias"}
    with pytest.raises(UserError, match=r"learner\.norms=batch"):
        trained(Tent, make=lambda: norms, norms="batch")


def test_answers_before_or_after_the_step():
    _, before, pipeline = trained(Tent, adapt_lr=0.05)
    after = trained(Tent, adapt_lr=0.05, answer="after")[1]
    batch = open_eval(SHIFTED, 1, pipeline).data.batch(np.arange(9))
    with torch.no_grad():
        first, second = before.predict(batch), after.predict(batch)
        assert float(entropy(second).mean()) < float(entropy(first).mean()), "a step lowers the entropy of its own batch"
        assert fingerprint(before.state_dict()) == fingerprint(after.state_dict())
        with batch_statistics(before.model):
            torch.testing.assert_close(second, before.scores(batch.x))


@pytest.mark.parametrize("kind", [Tent, Cotta])
def test_learn_starts_from_the_source_again_and_resume_is_exact(kind, tmp_path):
    options = {"augmentations": 2} if kind is Cotta else {}
    t, learner, pipeline = trained(kind, **options)
    saved = copy.deepcopy(learner.state_dict())
    file = tmp_path / "state.pt"
    z = [t.answers_of(learner, pipeline, j) for j in range(3)]
    torch.save(learner.state_dict(), file)
    last = [t.answers_of(learner, pipeline, j) for j in (3, 4)]
    assert fingerprint(saved) != fingerprint(learner.state_dict())
    other, learn, _ = t.begin()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(t.answers_of(other, pipeline, j), one) for j, one in zip((3, 4), last, strict=True))
    assert fingerprint(other.state_dict()) == fingerprint(learner.state_dict())
    other.load_state_dict(saved)
    assert all(torch.equal(t.answers_of(other, pipeline, j), one) for j, one in enumerate(z))
    adapted = fingerprint(other.state_dict())
    learn(0)
    again, learn_too, _ = t.begin()
    again.load_state_dict(saved)
    learn_too(0)
    ends = [fingerprint({k: v for k, v in one.state_dict().items() if k != "answered"}) for one in (other, again)]
    assert ends[0] == ends[1] != adapted, "what was adapted leaves no trace in what is trained next"


@pytest.mark.parametrize("kind", [Tent, Cotta])
def test_reset_before_every_set(kind):
    """Each set is answered as if it were the only one; within a set, adaptation goes on. `evaluate` says where a set begins."""
    options = {"augmentations": 2, "restore": 0.1} if kind is Cotta else {}
    t, learner, pipeline = trained(kind, reset="set", adapt_lr=0.05, **options)
    source = copy.deepcopy(learner.state_dict())
    never = t.start()[0]
    never.reset = "never"
    for j in (1, 2, 1):
        asked = getattr(learner, "answered", 0)
        never.load_state_dict(source | ({"answered": asked} if kind is Cotta else {}))
        alone, first = t.answers_of(never, pipeline, j), t.answers_of(learner, pipeline, j)
        assert torch.equal(first, alone)
    assert fingerprint(learner.state_dict()) != fingerprint(source)
    never.load_state_dict(source)
    goes_on = [t.answers_of(never, pipeline, j) for j in (1, 2)][1]
    learner.load_state_dict(source)
    assert not torch.equal(goes_on, [t.answers_of(learner, pipeline, j) for j in (1, 2)][1])
    sets = [open_eval(SHIFTED, j, pipeline) for j in (1, 2)]
    begins = [batch.begins for batch, _, _ in eval_batches(sets, 128, joined=False)]
    assert begins == [True, False, False, False] * 2
    plain = [open_eval(small_stream(), j, pipeline) for j in range(3)]
    assert [batch.begins for batch, _, _ in eval_batches(plain, 20, joined=True)] == [True, True]
    assert [batch.begins for batch, _ in plain[0].batches(5)] == [True, False, False, False]


def test_reset_before_every_batch_without_a_second_step_is_bn_adapt():
    t, learner, pipeline = trained(Tent, reset="batch", adapt_lr=0.5)
    plain = trained(BnAdapt)[1]
    for j in range(3):
        torch.testing.assert_close(t.answers_of(learner, pipeline, j), t.answers_of(plain, pipeline, j), atol=1e-5, rtol=1e-4)
    two, fresh = trained(Tent, reset="batch", adapt_lr=0.05, steps=2)[1], trained(Tent, adapt_lr=0.05, steps=2)[1]
    source, z = copy.deepcopy(fresh.state_dict()), []
    for batch, _ in open_eval(SHIFTED, 1, pipeline).batches(9):
        fresh.load_state_dict(copy.deepcopy(source))
        z.append(fresh.predict(batch))
    assert torch.equal(t.answers_of(two, pipeline, 1), torch.cat(z))


def test_two_steps_of_cotta_are_two_visits_of_a_batch():
    options = {"augmentations": 2, "restore": 0.2, "threshold": 1.1, "adapt_lr": 0.05}
    one, pipeline = trained(Cotta, **options)[1:]
    two = trained(Cotta, steps=2, **options)[1]
    batch = open_eval(SHIFTED, 1, pipeline).data.batch(np.arange(9))
    one.predict(batch)
    assert torch.equal(one.predict(batch), two.predict(batch)) and two.answered == 2
    assert fingerprint(one.state_dict()) == fingerprint(two.state_dict())


def test_the_symmetric_loss_of_cotta_by_hand():
    z, own = torch.tensor([[0.0, float(np.log(3))], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [float(np.log(4)), 0.0]])
    p, q = np.array([[0.25, 0.75], [0.5, 0.5]]), np.array([[0.5, 0.5], [0.8, 0.2]])
    there, back = -(p * np.log(q)).sum(1).mean(), -(q * np.log(p)).sum(1).mean()
    for loss, expected in (("cross_entropy", there), ("symmetric", (there + back) / 2)):
        assert float(trained(Cotta, loss=loss)[1].gap(z, own)) == pytest.approx(expected, rel=1e-5)


def test_cotta_teacher_restore_and_target():
    """Two batches by hand: target of the teacher, step of the student, moving average, restore by the drawn mask."""
    _, learner, pipeline = trained(
        Cotta, alpha=0.9, restore=0.3, threshold=1.1, augmentations=2, adapt_lr=0.5, adapt_optimizer="sgd"
    )
    source = learner.source()
    one, two = (open_eval(SHIFTED, 1, pipeline).data.batch(np.arange(i, i + 9)) for i in (0, 9))
    names = list(source)
    student = {n: v.clone().requires_grad_() for n, v in source.items()}
    teacher = {n: v.clone() for n, v in source.items()}
    sgd = torch.optim.SGD(student.values(), lr=0.5, momentum=0.9)
    for number, batch in enumerate((one, two)):
        with batch_statistics(learner.model):
            views = [learner.scores(teacher, learner.view(batch.x, k)).detach() for k in range(2)]
            target = (views[0] + views[1]) / 2
            own = learner.scores(student, batch.x)
            loss = -(target.softmax(1) * own.log_softmax(1)).sum(1).mean()
        for value, grad in zip(student.values(), torch.autograd.grad(loss, list(student.values())), strict=True):
            value.grad = grad
        sgd.step()
        mask = learner._generator("restore")
        with torch.no_grad():
            z = learner.predict(batch)
            for n in names:
                teacher[n] = 0.9 * teacher[n] + 0.1 * student[n]
                back = torch.rand(student[n].shape, generator=mask) < 0.3
                student[n].copy_(torch.where(back, source[n], student[n]))
        torch.testing.assert_close(z, target)
        assert learner.answered == number + 1
        for n in names:
            torch.testing.assert_close(learner.teacher[n], teacher[n].detach(), atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(learner.student.weights[n].detach(), student[n].detach(), atol=1e-6, rtol=1e-4)
    back = torch.cat([(learner.student.weights[n] == source[n]).flatten() for n in names]).float().mean()
    assert 0.25 < float(back) < 0.6, "about a third of the weights are where they began"
    assert fingerprint(learner.source()) == fingerprint(source)


def test_cotta_without_views_stands_still():
    """Teacher and student begin as one, so the gradient is 0 until views make them differ."""
    t, learner, pipeline = trained(Cotta, threshold=0.0, adapt_optimizer="sgd", adapt_lr=0.5)
    t.answers_of(learner, pipeline, 1)
    for n, value in learner.source().items():
        torch.testing.assert_close(learner.student.weights[n].detach(), value, atol=1e-5, rtol=1e-4)


def test_cotta_averages_views_where_the_source_is_unsure():
    _, learner, pipeline = trained(Cotta, threshold=1.1, augmentations=3)
    batch = open_eval(SHIFTED, 1, pipeline).data.batch(np.arange(9))
    views = [learner.view(batch.x, k) for k in range(3)]
    assert torch.equal(views[0], learner.view(batch.x, 0)) and not torch.equal(views[0], views[1])
    mean, std = 0.5, 0.5
    assert all(v.shape == batch.x.shape and float(v.min()) >= -mean / std and float(v.max()) <= mean / std for v in views)
    model = copy.deepcopy(learner.model).eval()
    with batch_statistics(model), torch.no_grad():
        naive = torch.stack([learner.head(model.features(v)) for v in views]).mean(0)
        plain = learner.head(model.features(batch.x))
    with torch.no_grad():
        z = learner.predict(batch)
    torch.testing.assert_close(z, naive)
    assert not torch.allclose(z, plain)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (BnAdapt, {"make": lambda: mlp(4)}, "has no BatchNorm"),
        (BnAdapt, {"prior": -1.0}, r"learner\.prior"),
        (Tent, {"steps": 0}, r"learner\.steps"),
        (Tent, {"make": lambda: mlp(4)}, "no such layer"),
        (Cotta, {"alpha": 2.0}, r"learner\.alpha"),
        (Cotta, {"augmentations": 0}, r"learner\.augmentations"),
        (Cotta, {"steps": 0}, r"learner\.steps"),
        (Cotta, {"loss": "entropy"}, r"learner\.loss"),
        (Cotta, {"reset": "always"}, r"learner\.reset"),
        (Tent, {"reset": "always"}, r"learner\.reset=always: choose never, set or batch"),
    ],
)
def test_learners_refuse_in_one_line(kind, options, words):
    with pytest.raises(UserError, match=words) as caught:
        trained(kind, **options)
    assert "\n" not in str(caught.value)


def test_the_command_line(clbench):
    """A run with a source and shifted sets: error of each, marks, and a checkable record."""
    operators = "scenario.operators=[{rotate:{experiences:3}},{test_time:{batch_size:5}}]"
    small = ("scenario.num_classes=3", "scenario.limit_train=10", "scenario.limit_test=4", "scenario.budget.epochs=1")
    out = clbench("run", "learner=tent", "learner.reset=set", *small, operators).stdout
    assert "clean after" in out and "rotated2" in out
    (entry,) = clbench.records()
    assert entry["scenario"]["eval_names"] == ["clean", "rotated1", "rotated2", "clean after"]
    assert entry["correct"][0] and all(n == 12 for n in entry["n"]) and len(entry["correct"][0]) == 4
    assert {"transductive", "adapts_at_test"} <= set(entry["marks"])
    clbench("verify")
