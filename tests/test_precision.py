"""precision=bf16: the network's passes compute in bf16, everything made of them in fp32 or better."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from clbench.config.compose import build, compose, load_target
from clbench.config.registry import asks, choices
from clbench.evaluation.accuracy import evaluate
from clbench.interfaces import Budget, UserError, declared
from clbench.learners.icarl import exemplar_means
from clbench.models.backbone import Backbone
from clbench.models.decoder import build_decoder
from clbench.models.mae import build_mae
from clbench.models.precision import set_precision
from clbench.streams.eval_sets import EvalSet, open_eval
from clbench.streams.images.data import ImageData
from clbench.streams.images.pixels import Pipeline
from clbench.streams.scenario import ArrayImages
from clbench.testing.contract import Trial, small_stream
from clbench.training.gaussians import class_rows
from clbench.training.runtime import Runtime
from clbench.training.state import detached

NAMES = [name for name in choices("learner") if asks("learner", name) == "predict"]
CPU = torch.device("cpu")


class Passes:
    """Every pass of a `Backbone`: whether it ran under autocast, and what it returned. `replay` returns the same again."""

    def __init__(self, monkeypatch):
        self.lower, self.out, self.depth, self.again = [], [], 0, False
        count = Backbone._counted

        def counted(model, x):
            self.lower.append(torch.is_autocast_enabled("cpu"))
            return count(model, x)

        monkeypatch.setattr(Backbone, "_counted", counted)
        for name in ("features", "tokens"):
            real = getattr(Backbone, name)
            monkeypatch.setattr(Backbone, name, lambda model, batch, real=real: self.call(real, model, batch))

    def call(self, real, model, batch):
        if self.again:
            return self.out.pop(0)
        self.depth += 1
        try:
            found = real(model, batch)
        finally:
            self.depth -= 1
        self.out.append(found.detach())
        return found


class Outside(TorchFunctionMode):
    """Looks at every torch function that is called outside the network's passes: none under autocast, none on bf16."""

    def __init__(self, passes):
        super().__init__()
        self.passes, self.calls, self.lower = passes, 0, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if self.passes.depth == 0:
            self.calls += 1
            parts = [*args, *(found if isinstance(found, tuple) else (found,))]
            low = any(type(x) is torch.Tensor and x.dtype == torch.bfloat16 for x in parts)
            if low or torch.is_autocast_enabled("cpu"):
                self.lower.append(func)
        return found


class Answers:
    """A learner whose answers are kept, as `evaluate` got them."""

    def __init__(self, learner):
        self.learner, self.heads = learner, []

    def predict(self, batch):
        answer = self.learner.predict(batch)
        self.heads += [answer] if isinstance(answer, torch.Tensor) else list(answer.values())
        return answer


ALSO = {
    "bn_adapt": ["model=resnet32", "model.timm=test_resnet"],
    "hypernetwork": ["learner.offset=model"],
    "picle": ["learner.modules=1"],
    "laftr": ["model=mlp", "model.kwargs.img_size=8"],
    "sfr": ["model=mlp", "model.kwargs.img_size=8"],
}


@pytest.mark.parametrize("name", NAMES)
def test_learners(name, monkeypatch):
    """Each pass is in bf16 and nothing else is: answers are what fp32 makes of the features of these passes."""
    (config,) = compose([f"learner={name}", "precision=bf16", *ALSO.get(name, [])])
    config["learner"] |= {key: 1 for key in ("align_epochs", "augmentations") if key in config["learner"]}
    can = declared(load_target(config["learner"]["_target_"]), config["learner"])
    kind = "task_incremental" if can.needs_task_id else "class_incremental"
    stream = small_stream(kind, sizes=[2, 2], num_classes=4)
    t = Trial(config, stream, can)
    learner, runtime, pipeline = t.start()
    passes = Passes(monkeypatch)
    outside = Outside(passes)
    with outside:
        for index in range(2):
            t.learn(learner, runtime, pipeline, index)
    assert passes.lower and (
        all(passes.lower) or name in ("cofima", "eata", "ewc", "ewc_online", "mas", "psmt", "fast_slow", "sfr", "sparse_mask")
    ), "a pass in another precision than the run's"
    passes.out.clear()  # importance of weights is a statistic: fp32
    lower, state = Answers(learner), detached(learner.state_dict())
    with outside:
        evaluate(lower, [open_eval(stream, 0, pipeline)], 4, 6)
    assert outside.calls > 50 and outside.lower == [], "work outside the network's passes in less than fp32"
    assert passes.out and {f.dtype for f in passes.out} == {torch.float32}
    assert all(torch.isfinite(z).all() and z.shape == (6, 4) and z.dtype != torch.bfloat16 for z in lower.heads)
    if can.adapts_at_test:
        learner.load_state_dict(state)
    passes.again, exact = True, Answers(learner)  # the same features, and no network
    evaluate(exact, [open_eval(stream, 0, pipeline)], 4, 6)
    assert not passes.out and len(exact.heads) == len(lower.heads) >= 2
    assert all(torch.equal(a, b) for a, b in zip(lower.heads, exact.heads, strict=True)), "other than fp32 gives"


def test_features_are_rounded_and_remembered_by_precision():
    model = build(compose(["model=nano"])[0]["model"])
    model.freeze()
    (batch,) = data_of(images_of(2, 3), model).test_batches(6)
    exact = model.features(batch)
    set_precision(model, "bf16")
    lower = model.features(batch)
    assert lower.dtype == torch.float32 and not torch.equal(lower, exact), "features of the other precision were taken"
    torch.testing.assert_close(lower, exact, atol=0.1, rtol=0.1)
    assert torch.equal(model.features(batch), lower) and model.passes["eval"] == 12
    assert model.tokens(batch).dtype == torch.float32
    with model.in_fp32():
        assert torch.equal(model.features(batch), exact)
    assert model.precision == "bf16"
    with pytest.raises(UserError, match=r"precision=bf16 has no effect on a Linear: it is no .*MixedPrecision"):
        set_precision(torch.nn.Linear(2, 2), "bf16")
    assert set_precision(torch.nn.Linear(2, 2), "fp32") is not None


# 100 classes that are hard to tell apart: a score rounded to bf16 would tie often


def images_of(classes, each, seed=0, share=0.57):
    """Images uint8 [classes * each, 32, 32, 3]: a pattern of each class under noise; labels."""
    rng, draw = np.random.default_rng(1), np.random.default_rng(seed + 2)
    patterns = rng.integers(0, 256, (classes, 8, 8, 3)).repeat(4, 1).repeat(4, 2)
    y = np.arange(classes).repeat(each)
    noise = draw.integers(0, 256, (len(y), 8, 8, 3)).repeat(4, 1).repeat(4, 2)
    return (share * patterns[y] + (1 - share) * noise).astype(np.uint8), y


def data_of(made, model, first=0):
    """Images and labels as data; ids from `first`."""
    (x, y), rows = made, np.arange(len(made[1]))
    return ImageData(ArrayImages(x), rows, rows + first, y, Pipeline(model.profile, CPU, "none"), None, "made")


@pytest.fixture(scope="module")
def hundred():
    """Training and test images of 100 classes."""
    return images_of(100, 3), images_of(100, 5, seed=1)


def prepared(hundred, *words):
    """A learner in bf16 as built, on the first block of a network; training data, the evaluation set."""
    (config,) = compose([*words, "precision=bf16"])
    model = set_precision(build(config["model"]), "bf16")
    model.net.blocks = model.net.blocks[:1]
    runtime = Runtime(0, CPU, Budget(epochs=1, exemplars=400), precision="bf16")
    learner = build(config["learner"], model=model, runtime=runtime)
    model.eval()
    train, test = data_of(hundred[0], model), data_of(hundred[1], model, first=1000)
    return learner, train, EvalSet("made", test, tuple(range(100)), None, 0)


@torch.no_grad()
def features_of(learner, data):
    return torch.cat([learner.model.features(batch) for batch in data.test_batches(100)])


def means_of(f, y):
    return torch.stack([f[rows].mean(0) for rows in class_rows(torch.as_tensor(y), range(100)).values()])


def cosine_head(hundred):
    learner, train, test = prepared(hundred, "learner=ssiat")
    f, x = features_of(learner, train), features_of(learner, test.data)
    learner.head.grow(100, torch.Generator().manual_seed(0))
    learner.head.assign(0, means_of(f, train.y))
    return learner, test, F.normalize(x.double(), dim=1) @ F.normalize(means_of(f, train.y).double(), dim=1).T


def linear_head(hundred):
    learner, train, test = prepared(hundred, "learner=finetune")
    means, x = means_of(features_of(learner, train), train.y), features_of(learner, test.data)
    learner.head.grow(100, torch.Generator().manual_seed(0))
    with torch.no_grad():
        learner.head.blocks[0].weight.copy_(means)
        learner.head.blocks[0].bias.copy_(-means.square().sum(1) / 2)
    return learner, test, x.double() @ means.double().T - means.double().square().sum(1) / 2


def fecam(hundred):
    learner, train, test = prepared(hundred, "learner=fecam")
    f, x = features_of(learner, train), features_of(learner, test.data)
    learner._grow(100)
    for c, rows in class_rows(torch.as_tensor(train.y), range(100)).items():
        learner._add(c, f[rows])
    x, z = F.normalize(x.double(), dim=1), []
    for c in range(100):
        gap = x - learner.proto_KD[c].double()
        z.append(-(gap @ torch.linalg.pinv(learner.normalised_covariance(c)) * gap).sum(1))
    return learner, test, torch.stack(z, dim=1)


def ease(hundred):
    learner, train, test = prepared(hundred, "learner=ease")
    learner.bank = [{k: v + 0.02 * (j + 1) for k, v in learner.pet.state().items()} for j in range(2)]
    learner.experience_of_class = [0] * 50 + [1] * 50
    means, xs = [], []
    for j, state in enumerate(learner.bank):
        with learner.pet.use(state, tag=j):
            means.append(means_of(features_of(learner, train), train.y))
        with learner.pet.use(state):  # without a name: what `predict` asks for is not what is remembered here
            xs.append(features_of(learner, test.data))
    learner.means_KSD = torch.stack(means, dim=1)
    from clbench.learners.ease import complete

    owner = torch.tensor(learner.experience_of_class)
    full = complete(learner.means_KSD.double(), owner)
    z = torch.zeros(len(test.data), 100, dtype=torch.float64)
    for j in range(2):
        cosines = F.normalize(xs[j].double(), dim=1) @ F.normalize(full[:, j], dim=1).T
        z += torch.where(owner == j, 1.0, 0.1) * cosines
    return learner, test, z


def ranpac(hundred):
    learner, train, test = prepared(hundred, "learner=ranpac", "pet=none", "learner.projection=500")
    f, x = features_of(learner, train), features_of(learner, test.data)
    learner.sums.update(f, torch.as_tensor(train.y), 100, learner.expand)
    learner.readout_MK = learner.sums.solve(1e4).float()
    h, more = (torch.relu(v.double() @ learner.projection.double()) for v in (f, x))
    target = F.one_hot(torch.as_tensor(train.y), 100).double()
    return learner, test, more @ torch.linalg.solve(h.T @ h + 1e4 * torch.eye(500).double(), h.T @ target)


def icarl(hundred):
    learner, train, test = prepared(hundred, "learner=icarl")
    f, x = features_of(learner, train), features_of(learner, test.data)
    learner.head.grow(100, torch.Generator().manual_seed(0))
    learner.means_KD = exemplar_means(f, torch.as_tensor(train.y), 100)
    return learner, test, F.normalize(x.double(), dim=1) @ learner.means_KD.double().T


@pytest.mark.parametrize("made", [cosine_head, linear_head, fecam, ease, ranpac, icarl], ids=lambda made: made.__name__)
def test_answers_among_a_hundred_classes(made, hundred):
    """The same classes as in float64 from the same features, so none that bf16's ties would give to an older class."""
    learner, test, exact = made(hundred)
    answers = Answers(learner)
    evaluate(answers, [test], 100, 100)
    z = torch.cat(answers.heads[:: len(answers.heads) // 5])  # the first head of each of the five batches
    given, wanted, truth = z.argmax(1), exact.argmax(1), torch.as_tensor(test.data.y)
    accuracy = float((wanted == truth).double().mean())
    assert 0.33 < accuracy < 0.55, f"{accuracy}: of no use as a test"
    rounded = exact.bfloat16().argmax(1)
    moved = rounded != wanted
    assert moved.any() and (rounded < wanted)[moved].double().mean() > 0.9, "bf16 would not show"
    top = exact.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 1e-5 * top.abs().amax()
    assert clear.double().mean() > 0.95 and torch.equal(given[clear], wanted[clear])


# Pre-training models


def test_the_decoder_is_judged_in_fp32():
    tokens = torch.randint(29, (3, 9), generator=torch.Generator().manual_seed(0))
    model = set_precision(build_decoder(name="d", vocab=29, width=32, depth=2, heads=4, context=16), "bf16")
    seen = {}
    model.final_layer_norm.register_forward_hook(lambda m, args, out: seen.update(hidden=out))
    model.layers[0].mlp["dense_h_to_4h"].register_forward_hook(lambda m, args, out: seen.update(inside=out))
    with torch.no_grad():
        logits = model(tokens)
        loss = model.loss(tokens)
    assert seen["inside"].dtype == torch.bfloat16 and logits.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(model(tokens[:, :-1]).float(), logits[:, :-1], atol=0.05, rtol=0.05)
    with torch.no_grad():
        model(tokens)
    assert torch.equal(logits, F.linear(seen["hidden"].float(), model.embed_out.weight)), "rounded on the way"
    assert model(tokens).dtype == torch.bfloat16, "the product that training pays for"
    training = model.loss(tokens)
    assert training.dtype == torch.float32
    training.mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    set_precision(model, "fp32")
    exact = model.loss(tokens)
    assert not torch.equal(exact, loss) and torch.allclose(exact, loss, atol=0.05)


def test_the_autoencoder_draws_in_fp32():
    rows = torch.randint(256, (3, 16 * 16 * 3 + 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    shape = {"width": 32, "depth": 1, "heads": 2, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    model = build_mae(name="m", image=16, patch=4, **shape)
    exact = model.loss(rows)
    set_precision(model, "bf16")
    seen = {}
    model.decoder_pred.register_forward_hook(lambda m, args, out: seen.update(last=(args[0].dtype, out.dtype)))
    model.decoder_blocks[0].mlp.fc1.register_forward_hook(lambda m, args, out: seen.update(inside=out.dtype))
    loss = model.loss(rows)
    assert seen == {"last": (torch.float32, torch.float32), "inside": torch.bfloat16}
    assert loss.dtype == model.features(rows).dtype == torch.float32
    assert not torch.equal(loss, exact) and torch.allclose(loss, exact, rtol=0.02)


def test_a_run_says_which_numbers_it_makes(clbench):
    small = ("scenario.num_classes=4", "scenario.limit_train=10", "scenario.limit_test=6", "num_threads=1")
    clbench("run", "learner=ncm", *small, "precision=bf16")
    (entry,) = clbench.records()
    assert entry["numbers_version"] == 2 and entry["marks"] == []
