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


# --- ViDA

NANO = ["model=nano"]


def vida(*options):
    words = ("learner.lr=0.05", "learner.backbone_lr=0.01", "learner.batch_size=18", "learner.augmentations=3")
    (config,) = compose([*NANO, "learner=vida", "learner.low=1", "learner.high=4", *words, *options])
    t = Trial(config, SHIFTED, ADAPTS)
    learner, runtime, pipeline = t.start()
    t.learn(learner, runtime, pipeline, 0)
    return t, learner, pipeline


def naive_scores(learner, weights, x, scales):
    """The network with W + s_low U D + s_high U D in place of each W: no hooks, no adapters beside."""
    merged = {n: v for n, v in weights.items() if not n.startswith(("low.", "high."))}
    for word, scale in zip(("low", "high"), scales, strict=True):
        for i in range(4):
            for layer in ("qkv", "proj"):
                name, at = f"model.net.blocks.{i}.attn.{layer}.weight", f"{word}.{i}/{layer}"
                merged[name] = merged[name] + scale * weights[f"{at}/b"] @ weights[f"{at}/a"]
    with learner.low.off(), learner.high.off():
        return functional_call(Network(learner.model, learner.head), merged, (x,))


@pytest.mark.parametrize(("variant", "threshold"), [("official", 1e-9), ("paper", 1e-9), ("paper", 1e9)])
def test_vida_against_a_naive_version(variant, threshold):
    """Two batches: uncertainty over views, scales, one step at two rates, two moving averages, the drawn restore."""
    _, learner, pipeline = vida(
        f"learner.variant={variant}", f"learner.threshold={threshold}", "learner.adapt_lr=0.2", "learner.adapter_lr=0.05",
        "learner.adapt_optimizer=sgd", "learner.alpha=0.9", "learner.adapter_alpha=0.7", "learner.restore=0.3",
    )  # fmt: skip
    source = {n: v.clone() for n, v in learner.source().items()}
    assert sum(n.startswith(("low.", "high.")) for n in source) == 32
    student, teacher = {n: v.clone().requires_grad_() for n, v in source.items()}, {n: v.clone() for n, v in source.items()}
    adapters = [n for n in source if n.startswith(("low.", "high."))]
    groups = [
        {"params": [v for n, v in student.items() if n not in adapters], "lr": 0.2},
        {"params": [student[n] for n in adapters], "lr": 0.05},
    ]
    sgd, scales = torch.optim.SGD(groups, momentum=0.9), (1.0, 1.0)
    for batch in two_batches(pipeline):
        views = [naive_scores(learner, teacher, learner.view(batch.x, k), scales).detach().numpy() for k in range(3)]
        u = 0.1 * np.mean(np.var(np.stack(views), axis=0, ddof=1))
        scales = (1 - u, 1 + u) if u >= threshold else (1 + u, 1 - u)
        scales = scales if variant == "paper" else (scales[0], 1.0)
        target = naive_scores(learner, teacher, batch.x, scales).detach()
        own = naive_scores(learner, student, batch.x, scales)
        loss = -(target.softmax(1) * own.log_softmax(1)).sum(1).mean()
        for value, grad in zip(student.values(), torch.autograd.grad(loss, list(student.values())), strict=True):
            value.grad = grad
        sgd.step()
        mask = learner._generator("restore")
        with torch.no_grad():
            z = learner.predict(batch)
            for n in source:
                alpha = 0.7 if n in adapters else 0.9
                teacher[n] = alpha * teacher[n] + (1 - alpha) * student[n]
                back = torch.rand(student[n].shape, generator=mask) < 0.3
                student[n][back] = source[n][back]
        assert u > 1e-3 and learner.scales == pytest.approx(list(scales), rel=1e-4)
        torch.testing.assert_close(z, target, atol=1e-4, rtol=1e-4)
    for n in source:
        torch.testing.assert_close(learner.teacher[n], teacher[n], atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(learner.student.weights[n].detach(), student[n].detach(), atol=1e-5, rtol=1e-3)
    assert fingerprint(learner.source()) == fingerprint(source)


def test_adapters_of_vida_start_as_nothing_and_learn_on_the_source():
    t, learner, _ = vida()
    fresh = t.start()[0]
    for pet, rank in ((fresh.low, 1), (fresh.high, 4)):
        downs = torch.cat([v.detach().flatten() for n, v in pet.values.items() if n.endswith("/a")])
        assert all(v.eq(0).all() for n, v in pet.values.items() if n.endswith("/b"))
        assert float(downs.std()) == pytest.approx(rank**-2, rel=0.25) and len(downs) == 8 * rank * 160
    assert all(not v.eq(0).all() for pet in (learner.low, learner.high) for n, v in pet.values.items() if n.endswith("/b"))
    assert all(p.requires_grad for p in learner.model.parameters()), "the network is trained too"
    assert any(not torch.equal(a, b) for a, b in zip(fresh.model.parameters(), learner.model.parameters(), strict=True))


def test_vida_resumes_exactly_and_begins_again_with_a_set(tmp_path):
    t, learner, pipeline = vida("learner.variant=paper", "learner.adapt_lr=0.01", "learner.reset=set")
    one, two = two_batches(pipeline)
    with torch.no_grad():
        first = learner.predict(one)
        torch.save(learner.state_dict(), tmp_path / "state.pt")
        other = t.start()[0]
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert other.scales == learner.scales != [1.0, 1.0]
        assert torch.equal(learner.predict(two), other.predict(two))
        assert fingerprint(learner.state_dict()) == fingerprint(other.state_dict())
        one.begins, learner.answered = True, 0
        assert torch.equal(learner.predict(one), first), "student, teacher, scales and moments began again"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("model=convnet", "has no linear layers of attention"),
        ("learner.variant=code", r"learner\.variant=code"),
        ("learner.low=4", r"learner\.low=4 must be at least 1 and below learner\.high=4"),
        ("learner.adapter_alpha=2", r"learner\.adapter_alpha"),
    ],
)
def test_vida_refuses_in_one_line(words, said):
    (config,) = compose([*([] if words.startswith("model") else NANO), "learner=vida", "learner.high=4", words])
    with pytest.raises(UserError, match=said) as caught:
        Trial(config, SHIFTED, ADAPTS).start()
    assert "\n" not in str(caught.value)


# --- HDC


def hdc(*options, experiences=3, **stream):
    (config,) = compose([*NANO, "learner=hdc", "learner.width=96", "learner.batch_size=5", *options])
    t = Trial(config, small_stream(**stream), Capabilities())
    learner, runtime, pipeline = t.start()
    return t, learner, pipeline, [t.learn(learner, runtime, pipeline, i) for i in range(experiences)]


def vectors(learner, data):
    """Bipolar vectors of images, one after another, and labels."""
    f = torch.cat([learner.model.features(b) for b in data.test_batches(50)]).detach().double().numpy()
    signs = learner.signs_DW.numpy()
    return np.array([[1 if v >= 0 else -1 for v in row @ signs] for row in f])


@pytest.mark.parametrize("one_bit", ["false", "true"])
def test_hdc_against_a_naive_version(one_bit):
    t, learner, pipeline, seen = hdc(f"learner.one_bit={one_bit}")
    assert set(learner.signs_DW.unique().tolist()) == {-1.0, 1.0}
    sums = np.zeros((6, 96), int)
    for e in seen:
        for h, c in zip(vectors(learner, open_experience(t.scenario, e.index, pipeline).train), e.train.y, strict=True):
            sums[c] += h
    assert not learner.bundles[0].is_floating_point()
    for row, c in enumerate(learner.classes[0]):
        assert learner.bundles[0][row].tolist() == sums[c].tolist()
    sums = np.where(sums >= 0, 1, -1) if one_bit == "true" else sums
    one = open_eval(t.scenario, 2, pipeline)
    z = torch.cat([learner.predict(b) for b, _ in one.batches(7)]).numpy()
    for scores, h in zip(z, vectors(learner, one.data), strict=True):
        expected = [h @ s / (np.linalg.norm(h) * np.linalg.norm(s)) for s in sums]
        np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_bundles_do_not_depend_on_the_order_and_later_classes_change_none():
    _, one, _, _ = hdc()
    _, other, _, _ = hdc("learner.batch_size=3", order=[5, 3, 1, 0, 2, 4])
    natural = dict(zip(one.classes[0], one.bundles[0].tolist(), strict=True))
    back = {i: original for i, original in enumerate([5, 3, 1, 0, 2, 4])}
    assert {back[c]: b for c, b in zip(other.classes[0], other.bundles[0].tolist(), strict=True)} == natural
    _, first, _, _ = hdc(experiences=1)
    assert one.bundles[0][: len(first.bundles[0])].tolist() == first.bundles[0].tolist()


@pytest.mark.parametrize("quantile", ["null", "0.4"])
def test_domains_of_hdc_by_hand(quantile):
    """Nearest domain, the limit of its training images, and the joint bundles for what is outside."""
    t, learner, pipeline, seen = hdc("learner.route=domain", f"learner.quantile={quantile}")

    def cos(a, b):
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))

    sums, limits = [], []
    for e in seen:
        h = vectors(learner, open_experience(t.scenario, e.index, pipeline).train)
        sums.append({c: h[e.train.y == c].sum(0) for c in e.classes})
        whole = sum(sums[-1].values())
        limits.append(np.quantile([cos(row, whole) for row in h], 0.4) if quantile == "0.4" else -np.inf)
    counted = {"inside": 0, "outside": 0}
    for j in range(3):
        one = open_eval(t.scenario, j, pipeline)
        z = torch.cat([learner.predict(b) for b, _ in one.batches(7)]).numpy()
        for scores, h in zip(z, vectors(learner, one.data), strict=True):
            near = [cos(h, sum(s.values())) for s in sums]
            place = int(np.argmax(near))
            if abs(near[place] - limits[place]) < 1e-9:
                continue  # at the limit, rounding decides
            outside = near[place] < limits[place]
            counted["outside" if outside else "inside"] += 1
            bundles = {c: b for s in (sums if outside else [sums[place]]) for c, b in s.items()}
            expected = [cos(h, bundles[c]) if c in bundles else -1e30 for c in range(6)]
            np.testing.assert_allclose(scores, np.float32(expected), atol=1e-6)
    assert counted["inside"] > 0 and (counted["outside"] > 0) == (quantile == "0.4")


def test_many_bits_are_near_the_nearest_mean():
    """Of wide vectors one bit a number keeps most answers of the class means of the same features."""
    t, learner, pipeline, seen = hdc("learner.width=4096", "learner.one_bit=true", limit_train=20)
    f = [torch.cat([learner.model.features(b) for b in open_experience(t.scenario, e.index, pipeline).train.test_batches(50)])
         for e in seen]  # fmt: skip
    y = torch.cat([torch.as_tensor(e.train.y) for e in seen])
    means = torch.stack([torch.nn.functional.normalize(torch.cat(f), dim=1)[y == c].mean(0) for c in range(6)])
    same = []
    for j in range(3):
        for batch, _ in open_eval(t.scenario, j, pipeline).batches(50):
            ncm = torch.nn.functional.cosine_similarity(learner.model.features(batch)[:, None], means[None], dim=2)
            same.append(learner.predict(batch).argmax(1) == ncm.argmax(1))
    assert torch.cat(same).float().mean() > 0.75


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("learner.width=0", r"learner\.width"),
        ("learner.route=task", r"learner\.route=task: choose none or domain"),
        ("learner.quantile=0.1", "choose learner.route=domain"),
        ("learner.route=domain learner.quantile=2", r"learner\.quantile"),
    ],
)
def test_hdc_refuses_in_one_line(words, said):
    with pytest.raises(UserError, match=said):
        hdc(*words.split(), experiences=0)
