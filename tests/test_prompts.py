"""L2P, DualPrompt, CODA-Prompt and OVOR: what each paper says against a naive version; options that mark the record."""

import math

import pytest
import torch
from conftest import NARROW
from torch.nn import functional as F

from clbench.config.compose import build, compose
from clbench.config.registry import conf_dir
from clbench.interfaces import Capabilities, Place, UserError, declared
from clbench.learners import coda_prompt, dualprompt, l2p, ovor
from clbench.models.backbone import build_backbone
from clbench.models.prompt_pool import GrownPool, as_prefixes, attended, cosines, most_similar, orthonormal, query
from clbench.records import record
from clbench.report import cards
from clbench.run import provenance
from clbench.run.restored import restored
from clbench.streams.eval_sets import open_eval
from clbench.streams.images.data import ImageBatch, open_experience
from clbench.testing.contract import Trial, check_learner, small_stream
from clbench.training import virtual_outliers
from clbench.training.losses import masked_cross_entropy
from clbench.training.prompts import epoch_cosine, part_of
from clbench.training.runtime import Runtime
from clbench.training.state import detached, fingerprint

NAMES = ("l2p", "l2p_pp", "dualprompt", "coda_prompt", "ovor")
VARIANTS = (  # test_learners runs the contract for every learner's defaults
    "l2p learner.batchwise_prompt=true",
    "dualprompt learner.batchwise_prompt=true learner.compat_reshape=true",
    "coda_prompt learner.ortho=0.1",
    "ovor learner.variant=official learner.outlier_epochs=2",
)
SMALL = {"neighbours": 3, "boundary": 4, "candidates": 20, "per_class": 5, "noise": 0.1}


@pytest.mark.parametrize("words", VARIANTS)
def test_contract(words):
    (config,) = compose([f"learner={words.split()[0]}", *NARROW, *words.split()[1:]])
    assert [f"{check}: {message}" for check, ok, message in check_learner(config) if not ok] == []


def trial(*overrides, **stream):
    (config,) = compose(list(overrides))
    scenario = small_stream(**stream)
    return Trial(config, scenario, Capabilities())


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=5, seed=0):
    return ImageBatch.of(torch.randn(n, 3, 32, 32, generator=rng(seed)))


def learned(name, experiences, *overrides, **stream):
    """A learner that has learned some experiences -> learner, trial, its pipeline."""
    t = trial(f"learner={name}", *overrides, **stream)
    learner, runtime, pipeline = t.start()
    for i in range(experiences):
        t.learn(learner, runtime, pipeline, i)
    return learner, t, runtime, pipeline


# The pool


def test_query_is_the_bare_networks_and_has_no_gradient():
    bare = build(compose(["model=nano"])[0]["model"]).eval().net(images().x)
    for name in ("l2p", "dualprompt", "coda_prompt"):
        learner, *_ = learned(name, 1)
        q = query(learner.model, images())
        assert not q.requires_grad and torch.allclose(q, bare, atol=1e-5)
        assert all(pet.active for pet in learner.model.pets), "the modules are back at work"


@pytest.mark.parametrize("name", NAMES)
def test_passes(name):
    """Training: one pass with a gradient, one query (OVOR: none). Test: the query of a known image is remembered."""
    t = trial(f"learner={name}")
    learner, runtime, pipeline = t.start()
    t.learn(learner, runtime, pipeline, 0)
    stage2 = 36 if name == "ovor" else 0
    queries = 0 if name == "ovor" else 72
    assert learner.model.passes == {"train": 72, "eval": queries + stage2, "stored": 0}
    t.scores(learner, pipeline, 0, 6)
    t.scores(learner, pipeline, 0, 6)
    assert learner.model.passes["eval"] == queries + stage2 + (36 if name == "ovor" else 54)


def test_most_similar():
    s = torch.tensor([[0.9, 0.1, 0.8, 0.0], [0.1, 0.2, 0.9, 0.8], [0.7, 0.1, 0.9, 0.0], [0.0, 0.9, 0.1, 0.8]])
    assert [sorted(row) for row in most_similar(s, 2).tolist()] == [[0, 2], [2, 3], [0, 2], [1, 3]]
    assert most_similar(s, 2, batchwise=True).tolist() == [[2, 0]] * 4, "2 has three votes, 0 and 3 have two, 0 is lower"
    assert most_similar(s, 1, batchwise=True)[:, 0].tolist() == [2] * 4


def test_cosines_and_attended_weights_against_the_formula():
    q, a, k = (torch.randn(*shape, generator=rng(i)) for i, shape in enumerate([(3, 6), (4, 2, 6), (4, 2, 6)]))
    alpha = attended(q, a, k)
    assert alpha.shape == (3, 2, 4)
    for b in range(3):
        for n in range(2):
            for m in range(4):
                want = F.cosine_similarity(q[b] * a[m, n], k[m, n], dim=0)
                torch.testing.assert_close(alpha[b, n, m], want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(cosines(q, k[:, 0])[1, 2], F.cosine_similarity(q[1], k[2, 0], dim=0))


def test_orthonormal_rows():
    earlier = torch.randn(7, 30, generator=rng()) * 3  # trained rows: neither orthogonal nor of length 1
    new = orthonormal(earlier, 5, rng(1))
    torch.testing.assert_close(new @ new.T, torch.eye(5), atol=1e-6, rtol=0)
    assert (new @ earlier.T).abs().max() < 1e-5
    first = torch.randn(5, 30, generator=rng(1), dtype=torch.float64)[0]  # Gram-Schmidt leaves the first draw's side
    assert orthonormal(earlier[:0], 5, rng(1))[0] @ (first / first.norm()).float() > 0.999
    full = orthonormal(torch.eye(30), 5, rng(1))
    torch.testing.assert_close(full @ full.T, torch.eye(5), atol=1e-6, rtol=0)
    assert torch.equal(new, orthonormal(earlier, 5, rng(1)))


def test_grown_pool_trains_the_newest_and_loads_in_place():
    pool, other = GrownPool((2,)), GrownPool((2,))
    pool.add(torch.ones(3, 2)), pool.add(torch.zeros(1, 2)), other.add(torch.zeros(3, 2))
    first = other.parts[0]
    other.load_state_dict(pool.state_dict())
    assert other.parts[0] is first and torch.equal(other.rows(), pool.rows()) and len(other) == 4
    assert [p.requires_grad for p in other.parts] == [False, True] and other.newest.shape == (1, 2)
    other.load_state_dict({"parts.0": torch.full((3, 2), 5.0)})
    assert len(other) == 3 and other.parts[0] is first and first.requires_grad and (first == 5).all()


def multipliers(epochs, per_epoch=1):
    steps = epochs * per_epoch
    return [epoch_cosine(Place(0, step, steps, step), epochs=epochs) for step in range(steps)]


def test_epoch_cosine_by_hand():
    """The release moves the rate before every epoch but the first, and its first move sets what is there."""
    degrees = 99 * 180 / 200  # a quarter circle less half a percent, 89.1 degrees over K - 1 epochs
    five = [math.cos(math.radians(x)) for x in (0, 0, degrees / 4, degrees / 2, 3 * degrees / 4)]
    assert multipliers(5) == pytest.approx(five)
    assert five == pytest.approx([1, 1, 0.92538, 0.71264, 0.39354], abs=1e-5)
    twenty = multipliers(20)
    assert twenty[:3] == pytest.approx([1, 1, 0.99665], abs=1e-5) and twenty[-1] == pytest.approx(0.09740, abs=1e-5)
    assert multipliers(5, 3) == pytest.approx([m for m in five for _ in range(3)]), "moves once an epoch"
    assert multipliers(1) == [1] and multipliers(2) == [1, 1] and multipliers(1, 4) == [1] * 4
    second = part_of(lambda p: epoch_cosine(p, epochs=5), 6, 15)
    assert [second(Place(0, step, 9, step)) for step in range(9)] == pytest.approx(multipliers(5, 3)[6:])


def test_epoch_cosine_against_a_scheduler_that_counts_from_minus_one():
    """As the release: a counter that starts at -1, a step before every epoch but the first, the rate of the counter."""
    for epochs in range(2, 30):
        counter, rate, want = -1, 1.0, []
        for epoch in range(epochs):
            if epoch:
                counter += 1
                rate = math.cos(99 * math.pi * counter / (200 * (epochs - 1)))
            want.append(rate)
        assert multipliers(epochs) == pytest.approx(want)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("coda_prompt", [15, 15]), ("l2p_pp", [15, 15]), ("l2p", [15, 15, 6]), ("dualprompt", [15, 15, 6]), ("ovor", [15, 15, 6])],
)
def test_the_last_incomplete_batch(name, sizes, monkeypatch):
    """36 images in batches of 15: CODA-Prompt and L2P++ leave out the last 6 of every epoch, the other releases do not."""
    seen = []
    module = {"l2p_pp": l2p}.get(name) or globals()[name]
    real = module.fit

    def spy(runtime, part, learner, groups, loss, batches, recipe):
        if part == "train":
            seen.extend(len(batches(i)) for i in range(batches.steps))
        return real(runtime, part, learner, groups, loss, batches, recipe)

    monkeypatch.setattr(module, "fit", spy)
    _, _, runtime, _ = learned(name, 1, "learner.batch_size=15")
    assert seen == 2 * sizes and runtime.used_new == 2 * sum(sizes)


@pytest.mark.parametrize("name", ["coda_prompt", "l2p_pp"])
def test_an_experience_smaller_than_a_batch_is_one_batch(name):
    """6 images of two classes, then 3 of one class, in batches of 128: trained all the same, once an epoch."""
    t = trial(f"learner={name}", sizes=[2, 1], num_classes=3, limit_train=3)
    learner, runtime, pipeline = t.start()
    for i, count in enumerate((6, 3)):
        assert len(open_experience(t.scenario, i, pipeline).train) == count < learner.batch_size
        log = t.learn(learner, runtime, pipeline, i)
        assert runtime.used_new == 2 * count and runtime.meter.steps == 2 * (i + 1), log
    bias = [block.bias.detach().abs().max() for block in learner.head.blocks]
    assert bias[0] == pytest.approx(0.002, rel=0.01), "two steps of Adam at 0.001 from a bias of 0"
    assert bias[1] == 0, "the cross-entropy of one class is 0"


# Sizes, options, what is refused


def big(depth=5):
    return build_backbone("small", "vit_base_patch16_224", {"img_size": 32, "depth": depth})


def test_published_sizes():
    """Prompts and keys of ViT-B/16 (blocks beyond the fifth carry none)."""

    def size(*modules):
        return sum(p.numel() for module in modules for p in module.parameters())

    clock = Runtime(0, torch.device("cpu"))
    learner = l2p.L2p(big(1), clock)
    assert size(learner.prompts, learner.keys) == 46_080
    coda = coda_prompt.CodaPrompt(big(), clock)
    for _ in range(10):
        coda.grow()
    assert size(coda.components, coda.keys, coda.attention) == 3_840_000
    one = ovor.Ovor(big(), clock)
    assert size(one.early, one.late) == 107_520


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *((f"{name} model=resnet32", "pet=pr") for name in NAMES),
        ("l2p learner.top_k=11", "top_k must lie between 1 and learner.pool=10"),
        ("l2p learner.blocks=0:2", "has no effect"),
        ("l2p_pp learner.length=5", "must be even"),
        ("coda_prompt learner.length=7", "must be even"),
        ("coda_prompt learner.components_per_experience=161", "model's 160 features"),
        ("ovor learner.candidates=0", "candidates must be at least 1"),
        ("ovor learner.outlier_epochs=-1", "outlier_epochs must be at least 0"),
    ],
)
def test_refused(words, message):
    name, *options = words.replace("0:2", "'0:2'").split()
    with pytest.raises(UserError, match=message):
        trial(f"learner={name}", *options).start()


def test_options_that_look_at_the_batch_mark_the_record(tmp_path):
    from clbench.run.runner import prepare

    for words, marks in {
        "l2p": [],
        "l2p learner.batchwise_prompt=true": ["transductive"],
        "dualprompt": [],
        "dualprompt learner.batchwise_prompt=true": ["transductive"],
        "dualprompt learner.compat_reshape=true": ["transductive"],
        "coda_prompt": [],
    }.items():
        (config,) = compose([f"learner={words.split()[0]}", *words.split()[1:], f"results_dir='{tmp_path}'"])
        entry = provenance.describe(prepare(config), [])
        assert entry["marks"] == marks and entry["learner"]["capabilities"]["transductive"] == bool(marks)
    with pytest.raises(UserError, match="needs_pretrained"):
        prepare(compose(["learner=l2p", "model=nano_random", f"results_dir='{tmp_path}'"])[0])


@pytest.mark.parametrize(
    ("words", "depends"),
    [
        ("learner=l2p", False),
        ("learner=l2p learner.batchwise_prompt=true", True),
        ("learner=dualprompt learner.batchwise_prompt=true", True),
        ("learner=mos", False),
        ("learner=mos learner.variant=official_raw", True),
        ("learner=ncm", False),
    ],
)
def test_the_evaluation_batch_size_is_in_the_identity_where_numbers_depend_on_it(tmp_path, words, depends):
    from clbench.run.runner import prepare

    jobs = [
        prepare(compose([*words.split(), f"results_dir='{tmp_path}'", f"eval_batch_size={size}", "feature_store=off"])[0])
        for size in (10, 128)
    ]
    assert (jobs[0].run_id != jobs[1].run_id) == depends
    entry = provenance.describe(jobs[0], [])
    assert entry["config"].get("eval_batch_size") == (10 if depends else None)
    assert record.run_id(entry["config"], *run_parts(entry)) == jobs[0].run_id
    if depends:
        assert restored(entry | {"machine": {}}, None)["eval_batch_size"] == 10
        assert cards.command(entry, ["0"], conf_dir()).split()[-2:] == ["eval_batch_size=10", "seed=0"]


def run_parts(entry):
    return entry["scenario"]["manifest_sha256"], entry["model"]["state_sha256"], entry["learner"]["plugin"]


def test_capabilities_may_depend_on_options():
    class Plain:
        capabilities = Capabilities(needs_passes=2)

    class Chosen(Plain):
        @staticmethod
        def capabilities_of(strength=1, **options):
            return Capabilities(needs_passes=strength) if options == {"other": 0} else None

    node = {"_target_": "mine.Plain", "strength": 3, "other": 0}
    assert declared(Plain, node).needs_passes == 2 and declared(Chosen, node).needs_passes == 3
    for wrong, given in ((Chosen, {"_target_": "mine.Plain"}), (object, node)):
        with pytest.raises(UserError, match=r"mine\.Plain declares no"):
            declared(wrong, given)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_local(name):
    """Heads of classes that are not here stand still, also where classes come back."""
    learner, t, runtime, pipeline = learned(name, 1)
    before = detached(learner.head.state_dict())
    t.learn(learner, runtime, pipeline, 1)
    assert torch.equal(learner.head.blocks[0].weight, before["blocks.0.weight"])
    assert learner.head.widths == [3, 1]
    z = torch.randn(4, 4, generator=rng())
    assert masked_cross_entropy(z, torch.full((4,), 3), "local", (3,)) == 0


# L2P


@pytest.mark.parametrize("count", [1, 3])
def test_l2p_tokens_against_a_naive_pass(count):
    learner, *_ = learned("l2p", 1, f"learner.top_k={count}")
    batch, net = images(4), learner.model.net
    features, similarity = learner.prompted(batch)
    with torch.no_grad():
        for b in range(4):
            q = query(learner.model, batch)[b]
            cos = torch.stack([F.cosine_similarity(q, key, dim=0) for key in learner.keys.newest])
            best = cos.argsort(descending=True)[:count]
            torch.testing.assert_close(similarity[b], cos[best], atol=1e-5, rtol=1e-4)
            tokens = torch.cat([learner.prompts.newest[i] for i in best])
            assert tokens.shape == (5 * count, 160)
            with learner.pet.off():
                x = net.patch_embed(batch.x[b : b + 1]) + net.pos_embed[:, 1:]
                first = net.cls_token + net.pos_embed[:, :1]
                x = torch.cat([first, tokens[None] + net.pos_embed[:, :1], x], dim=1)
                for block in net.blocks:
                    x = block(x)
            torch.testing.assert_close(features[b], net.norm(x)[0, 1 : 1 + 5 * count].mean(0), atol=2e-4, rtol=1e-3)


def test_l2p_gradients_go_to_what_was_chosen():
    learner, *_ = learned("l2p", 1, "learner.top_k=2", "learner.pool=9")
    features, similarity = learner.prompted(images(2))
    chosen = most_similar(cosines(query(learner.model, images(2)), learner.keys.newest), 2).flatten().unique()
    features.square().sum().backward()
    assert learner.keys.newest.grad is None, "the choice has no gradient"
    touched = learner.prompts.newest.grad.abs().sum((1, 2)) > 0
    assert touched.nonzero()[:, 0].tolist() == chosen.tolist()
    similarity.sum().backward()
    assert (learner.keys.newest.grad.abs().sum(1) > 0).nonzero()[:, 0].tolist() == chosen.tolist()


def test_l2p_loss(monkeypatch):
    """The pull of both forms, worked out by hand from the cosines."""
    got = {}

    def first_loss(runtime, name, learner, groups, loss, batches, recipe):
        got["loss"], got["recipe"] = loss(batches(0)), recipe
        got["batch"], got["rates"] = batches(0), [group["lr"] for group in groups]
        return {}

    monkeypatch.setattr(l2p, "fit", first_loss)
    for name in ("l2p", "l2p_pp"):
        learner, *_ = learned(name, 1)
        batch = got["batch"]
        features, similarity = learner.prompted(batch)
        ce = F.cross_entropy(learner.head(features), batch.y)
        pull = -0.1 * similarity.sum() / len(batch) if name == "l2p" else (1 - similarity).sum()
        torch.testing.assert_close(got["loss"], ce + pull)
        last = got["recipe"].schedule(Place(0, 99, 100, 99))
        if name == "l2p":
            assert got["recipe"].clip == 1.0 and last == 1 and set(got["rates"]) == {0.001875} and len(batch) == 16
        else:
            assert got["recipe"].clip is None and set(got["rates"]) == {0.001}
            schedule = got["recipe"].schedule
            assert schedule.func is epoch_cosine and schedule.keywords == {"epochs": 2}


def test_l2p_pp_prefixes(monkeypatch):
    learner, *_ = learned("l2p_pp", 1, "learner.blocks='0:2'", "learner.top_k=3", "learner.length=4")
    values = {}
    monkeypatch.setattr(learner.pet, "use", lambda v, rows: values.update(v) or learner.pet.off())
    learner.prompted(images(4))
    assert {name: tuple(v.shape) for name, v in values.items()} == dict.fromkeys(("0/k", "0/v", "1/k", "1/v"), (4, 6, 160))
    chosen = most_similar(cosines(query(learner.model, images(4)), learner.keys.newest), 3)
    pool = learner.prompts.newest  # [M, blocks, 2, L / 2, D]
    for b in range(4):
        for part, name in enumerate("kv"):
            want = torch.cat([pool[i, 1, part] for i in chosen[b]])
            assert torch.equal(values[f"1/{name}"][b], want)
    assert pool.shape == (30, 2, 2, 2, 160)


@pytest.mark.parametrize(("name", "low"), [("l2p", -1), ("l2p_pp", 0), ("dualprompt", -1), ("ovor", 0)])
def test_starts_are_uniform(name, low, monkeypatch):
    module = {"l2p_pp": l2p}.get(name) or globals()[name]
    monkeypatch.setattr(module, "fit", lambda *args: {})
    learner, *_ = learned(name, 1, *(["learner.outlier_epochs=0"] if name == "ovor" else []))
    values = [p for part in vars(learner).values() if isinstance(part, GrownPool) for p in part.parameters()]
    pets = [getattr(learner, part) for part in ("general", "early", "late") if hasattr(learner, part)]
    values += [p for pet in pets for p in pet.parameters()]
    assert len(values) >= 2
    for value in values:
        assert low <= value.min() < low + 0.1 and 0.9 < value.max() <= 1
        assert value.detach().mean() == pytest.approx((low + 1) / 2, abs=0.1)


def test_choosing_one_by_one_or_by_vote():
    (config,) = compose(["learner=l2p"])
    for batchwise in (False, True):
        config["learner"] |= {"batchwise_prompt": batchwise, "top_k": 1}
        t = Trial(config, small_stream(), Capabilities())
        learner, *_ = t.start()
        learner.head.grow(3, rng())
        q = query(learner.model, images(5))
        with torch.no_grad():
            learner.keys.newest[:5] = q  # each image has a prompt of its own
        whole = learner.predict(images(5))
        alone = torch.cat([learner.predict(ImageBatch.of(images(5).x[i : i + 1])) for i in range(5)])
        assert torch.allclose(whole, alone, atol=1e-4) != batchwise


# DualPrompt


def test_reshape_error_by_hand():
    shared = {"0/k": torch.tensor([[1.0]]), "0/v": torch.tensor([[2.0]])}
    wrong = dualprompt.reshaped(shared, None, 4)
    assert wrong["0/k"].flatten().tolist() == [1, 1, 2, 2] and wrong["0/v"].flatten().tolist() == [1, 1, 2, 2]
    pool = {"2/k": torch.tensor([[[10.0]], [[20.0]]]), "2/v": torch.tensor([[[11.0]], [[21.0]]])}
    wrong = dualprompt.reshaped(pool, torch.tensor([1, 0]), 2)  # keys 20, 10 and values 21, 11, handed out in that order
    assert wrong["2/k"].flatten().tolist() == [20, 21] and wrong["2/v"].flatten().tolist() == [10, 11]


def test_prefixes_are_handed_out_correctly():
    learner, *_ = learned("dualprompt", 2)
    pool = learner.experts.rows()
    assert pool.shape == (2, 2, 2, 5, 160), "experiences, blocks 2 and 3, keys and values, length, width"
    values = as_prefixes(learner.expert, pool)
    assert list(values) == ["2/k", "2/v", "3/k", "3/v"]
    assert torch.equal(values["3/v"][1], pool[1, 1, 1]) and torch.equal(values["2/k"][0], pool[0, 0, 0])
    assert {name: tuple(v.shape) for name, v in learner.general.values.items()} == dict.fromkeys(
        ("0/k", "0/v", "1/k", "1/v"), (5, 160)
    )


def test_each_image_gets_the_expert_of_the_nearest_key():
    learner, t, _, pipeline = learned("dualprompt", 3)
    batch = open_eval(t.scenario, 0, pipeline).data.batch(range(6))
    q = query(learner.model, batch)
    with torch.no_grad():
        learner.keys.parts[1].copy_(q[2:3]), learner.keys.parts[2].copy_(q[4:5])
        for e, part in enumerate(learner.experts.parts):
            part.copy_(3 * torch.randn(part.shape, generator=rng(e)))
        answer = learner.predict(batch)
        picked = set()
        for b in range(6):
            best = max(range(3), key=lambda e: float(F.cosine_similarity(q[b], learner.keys.parts[e][0], dim=0)))
            picked.add(best)
            with learner.expert.use(as_prefixes(learner.expert, learner.experts.parts[best][0])):
                z = learner.head(learner.model.features(batch.x[b : b + 1]))
            torch.testing.assert_close(answer[b], z[0], atol=1e-4, rtol=1e-3)
    assert {1, 2} <= picked


def test_dualprompt_trains_its_newest_expert(monkeypatch):
    seen = {}
    real = dualprompt.fit

    def spy(runtime, name, learner, groups, loss, batches, recipe):
        i = runtime.experience
        copied = i == 0 or torch.equal(learner.experts.parts[i], learner.experts.parts[i - 1])
        z = loss(batches(0))
        features = learner.features(batches(0), as_prefixes(learner.expert, learner.experts.parts[i][0]), None)
        local = masked_cross_entropy(learner.head(features), batches(0).y, "local", ((0, 1, 2), (3,), (4, 5))[i])
        q = query(learner.model, batches(0))
        pull = torch.stack([F.cosine_similarity(row, learner.keys.parts[i][0], dim=0) for row in q]).mean()
        torch.testing.assert_close(z, local - 1.0 * pull)
        before = [p.clone() for p in (learner.experts.parts[0], learner.keys.parts[0])]
        log = real(runtime, name, learner, groups, loss, batches, recipe)
        after = (learner.experts.parts[0], learner.keys.parts[0])
        seen[i] = copied, [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        return log

    monkeypatch.setattr(dualprompt, "fit", spy)
    learner, *_ = learned("dualprompt", 3)
    assert seen == {0: (True, [False, False]), 1: (True, [True, True]), 2: (True, [True, True])}
    assert len(learner.keys) == 3 and not torch.equal(learner.keys.parts[0], learner.keys.parts[1])


def test_the_reshape_error_is_the_experts_alone(monkeypatch):
    """The release picks the general prefix batch first, so with it every image has the same keys and the same values."""
    learner, *_ = learned("dualprompt", 2, "learner.compat_reshape=true")
    general, expert = learner.general, learner.expert
    seen = []
    monkeypatch.setattr(learner.model, "features", lambda batch: seen.append((dict(general.in_use()), expert.in_use())))
    experts = as_prefixes(expert, learner.experts.newest[0])
    learner.features(images(4), experts, None)
    ((shared, own),) = seen
    for name, value in general.values.items():
        assert torch.equal(shared[name], value), "[length, D]: one for the batch, neither reshaped nor stacked"
    k, v = experts["2/k"], experts["2/v"]
    assert torch.equal(own["2/k"], torch.stack([k, k, v, v])) and torch.equal(own["2/v"], torch.stack([k, k, v, v]))


def test_the_general_prefix_of_the_reshape_error_against_a_naive_pass():
    """Where the expert's keys and values are equal the reshape changes nothing, whatever the general prefix holds."""
    outputs = []
    for wrong in (False, True):
        learner, *_ = learned("dualprompt", 1, f"learner.compat_reshape={str(wrong).lower()}", "learner.lr=0")
        with torch.no_grad():
            for name, value in learner.general.values.items():
                value.copy_(torch.randn(value.shape, generator=rng(len(name) + ord(name[-1]))))
            same = learner.experts.newest[0].clone()
            same[:, 1] = same[:, 0]
            outputs.append(learner.features(images(4), as_prefixes(learner.expert, same), None))
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-4)


def test_the_reshape_error_leaks():
    """With it an image's scores change with its neighbours; the permuted default's do not."""
    gaps = {}
    for wrong in (False, True):
        learner, *_ = learned("dualprompt", 2, f"learner.compat_reshape={str(wrong).lower()}")
        with torch.no_grad():
            whole, part = learner.predict(images(4)), learner.predict(ImageBatch.of(images(4).x[2:]))
        gaps[wrong] = (whole[2:] - part).abs().max().item()
    assert gaps[False] < 1e-4 < 1e-3 < gaps[True]


# CODA-Prompt


def test_coda_components_start_orthogonal_and_then_stand_still():
    learner, t, runtime, pipeline = learned("coda_prompt", 1)
    pools = (learner.components, learner.keys, learner.attention)
    before = [pool.parts[0].clone() for pool in pools]
    runtime.begin(1)
    learner.grow()
    for pool in pools:
        for block in range(4):
            old, new = (part[:, block].flatten(1) for part in pool.parts)
            assert (old @ new.T).abs().max() < 1e-5 * max(1.0, float(old.norm()))
            torch.testing.assert_close(new @ new.T, torch.eye(10), atol=1e-5, rtol=0)
    assert not torch.allclose(before[0][:, 0].flatten(1) @ before[0][:, 0].flatten(1).T, torch.eye(10), atol=1e-5), "trained"
    learner.features(images(3)).square().sum().backward()
    for pool in pools:
        assert pool.parts[0].grad is None and pool.parts[1].grad.abs().sum() > 0
    t.learn(learner, runtime, pipeline, 1)
    assert all(torch.equal(pool.parts[0], old) for pool, old in zip(pools, before, strict=True))


def test_coda_prefix_against_the_formula():
    learner, *_ = learned("coda_prompt", 2)
    q = query(learner.model, images(3))
    got = learner.prefixes(q)
    assert got.shape == (3, 4, 2, 4, 160)
    p, k, a = learner.components.rows(), learner.keys.rows(), learner.attention.rows()
    assert p.shape == (20, 4, 8, 160)
    for b in range(3):
        for block in range(4):
            want = sum(F.cosine_similarity(q[b] * a[m, block], k[m, block], dim=0) * p[m, block] for m in range(20))
            torch.testing.assert_close(got[b, block, 0], want[:4], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(got[b, block, 1], want[4:], atol=1e-5, rtol=1e-4)


def test_coda_penalty():
    learner, *_ = learned("coda_prompt", 0)
    learner.grow()
    assert learner.penalty() < 1e-9
    with torch.no_grad():
        for pool in (learner.components, learner.keys, learner.attention):
            pool.newest.add_(0.1 * torch.randn(pool.newest.shape, generator=rng()))
    learner.grow()
    want = 0.0
    for pool in (learner.components, learner.keys, learner.attention):
        for block in range(4):
            x = pool.rows()[:, block].flatten(1)
            want += (x @ x.T - torch.eye(20)).square().mean()
    torch.testing.assert_close(learner.penalty(), want)
    learner.penalty().backward()
    assert learner.keys.parts[0].grad is None and learner.keys.newest.grad is not None


def test_coda_goes_on_where_no_room_is_left():
    learner, t, runtime, pipeline = learned("coda_prompt", 2, "learner.components_per_experience=100")
    assert len(learner.keys) == 200 > 160
    assert torch.isfinite(t.scores(learner, pipeline, 0, 6)).all() and runtime.experience == 1


# OVOR


def cloud(n=30, d=8):
    """Features on a ring of directions with norms from 5 to 9; two lie apart."""
    x = F.normalize(torch.randn(n, d, generator=rng()) * 0.1 + torch.eye(d)[0], dim=1)
    x[3], x[17] = torch.eye(d)[1], -torch.eye(d)[0]
    return x * torch.linspace(5, 9, n)[:, None]


def test_kth_distance():
    x = torch.randn(6, 4, generator=rng())
    for k in (1, 3, 9):
        want = torch.stack([(x - row).norm(dim=1).sort().values[min(k, 6) - 1] for row in x])
        torch.testing.assert_close(virtual_outliers.kth_distance(x, x, k), want, atol=1e-4, rtol=1e-4)


def test_outliers_as_described_lie_around_boundary_points():
    f = cloud()
    made = virtual_outliers.around_boundary(f, 2, rng(1), **(SMALL | {"noise": 0.01}))
    assert made.shape == (10, 8)
    inside = F.normalize(f, dim=1)
    rim = virtual_outliers.kth_distance(inside, inside, 3).argsort(descending=True)[:4].tolist()
    assert {3, 17} <= set(rim)
    for row in made:
        gaps = (row / f.norm(dim=1, keepdim=True) - inside).norm(dim=1)
        assert gaps.min() < 0.1 and int(gaps.argmin()) in rim
    # the farthest of all candidates, one by one
    offsets = 0.01 * torch.randn(20, 8, generator=rng(1))
    every = [
        (float((inside - (inside[i] + o)).norm(dim=1).sort().values[2]), (inside[i] + o) * f[i].norm())
        for i in rim
        for o in offsets
    ]
    best = sorted(every, key=lambda pair: -pair[0])[:10]
    torch.testing.assert_close(made, torch.stack([point for _, point in best]), atol=1e-4, rtol=1e-4)


def test_outliers_as_released_lie_around_the_origin():
    f = cloud()
    made = virtual_outliers.around_origin(f, 2, rng(1), **SMALL)
    assert made.shape == (10, 8) and made.norm(dim=1).max() < 1 < f.norm(dim=1).min()
    assert len(made.unique(dim=0)) == 3, "duplicates: each draw stands there once for every boundary point"
    offsets = 0.1 * torch.randn(20, 8, generator=rng(1))
    far = torch.stack([(F.normalize(f, dim=1) - o).norm(dim=1).sort().values[2] for o in offsets])
    assert torch.equal(made[0], offsets[far.argmax()])


def test_fewer_features_than_neighbours():
    for make in (virtual_outliers.around_boundary, virtual_outliers.around_origin):
        made = make(cloud()[:2], 1, rng(), neighbours=50, boundary=50, candidates=7, per_class=40, noise=0.1)
        assert made.shape == (14, 8) and torch.isfinite(made).all()


def test_hinge():
    assert virtual_outliers.hinge(torch.tensor([-3.0, 0.5, 4.0])) == pytest.approx((0.125 + 3.5) / 3)
    assert virtual_outliers.hinge(torch.zeros(0)) == 0


def test_stage_2_trains_the_head_alone(monkeypatch):
    calls = []
    real = ovor.fit

    def spy(runtime, name, learner, groups, loss, batches, recipe):
        before = fingerprint([learner.early.state_dict(), learner.late.state_dict()]), fingerprint(learner.head.state_dict())
        rates = [round(recipe.schedule(Place(0, step, batches.steps, step)), 4) for step in range(batches.steps)]
        if name == "outliers":
            features, y, outliers = batches(0)
            z, zo = learner.head(features), learner.head(outliers)
            inside, outside = (15 - z.logsumexp(1)).relu(), (zo.logsumexp(1) - 3).relu()

            def huber(x):
                return torch.where(x < 1, x * x / 2, x - 0.5).mean()

            want = F.cross_entropy(z, y) + 0.1 * (huber(inside) + huber(outside))
            torch.testing.assert_close(loss(batches(0)), want)
            epochs = [batches(step)[2] for step in range(batches.steps)]
            assert not torch.equal(epochs[0], epochs[2]) and sum(len(e) for e in epochs[:2]) == 120
            assert torch.equal(batches(0)[2], epochs[0]), "a pure function of the step"
        log = real(runtime, name, learner, groups, loss, batches, recipe)
        after = fingerprint([learner.early.state_dict(), learner.late.state_dict()]), fingerprint(learner.head.state_dict())
        calls.append((name, before[0] == after[0], before[1] == after[1], rates))
        return log

    monkeypatch.setattr(ovor, "fit", spy)
    learned("ovor", 1, "learner.batch_size=18", "learner.outlier_epochs=2")
    want = [round(math.cos(99 * math.pi * e / 600), 4) for e in (0, 0, 0, 0, 1, 1, 2, 2)]
    assert calls == [("train", False, False, want[:4]), ("outliers", True, False, want[4:])]


def test_ovor_without_outliers_is_oneprompt(monkeypatch):
    monkeypatch.setattr(ovor, "extract", None)
    learner, *_ = learned("ovor", 1, "learner.outlier_epochs=0")
    assert learner.early.num_values() == 2 * 2 * 5 * 160 and learner.late.num_values() == 2 * 2 * 20 * 160
    assert not torch.allclose(learner.early.values["0/k"], learner.late.values["2/k"][:5], atol=0.1)


def test_one_prefix_with_the_option_is_ovor():
    """L2P++ with one prompt that is always chosen, no pull, and prefixes as OVOR has them: the same two stages."""
    both = ("learner.batch_size=18", "learner.lr=0.01")
    one = trial("learner=ovor", *both, *(f"learner.{w}" for w in ("early_length=3", "late_length=3", "late_blocks='2:4'")))
    other = trial(
        "learner=l2p_pp", *both, "learner.pool=1", "learner.top_k=1", "learner.length=6", "learner.blocks='0:4'",
        "learner.pull=0", "learner.ovor={}",
    )  # fmt: skip
    learner, runtime, pipeline = one.start()
    twin, twins_runtime, _ = other.start()
    parts = {**learner.early.values, **learner.late.values}
    rows = [torch.stack([parts[f"{i}/{part}"].detach() for part in "kv"]) for i in range(4)]
    with torch.no_grad():
        next(twin.prompts.parameters()).copy_(torch.stack(rows)[None])
    one.learn(learner, runtime, pipeline, 0)
    other.learn(twin, twins_runtime, pipeline, 0)
    for a, b in zip(learner.head.parameters(), twin.head.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(one.scores(learner, pipeline, 0, 6), other.scores(twin, pipeline, 0, 6), atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["l2p", "dualprompt", "coda_prompt"])
def test_outliers_for_other_prompts(name, monkeypatch):
    """The second stage trains the head alone, on the features that the learner answers with, at the rates behind the first."""
    calls, real = [], virtual_outliers.fit

    def spy(runtime, word, learner, groups, loss, batches, recipe):
        before = (
            fingerprint({k: v for k, v in learner.state_dict().items() if k != "head"}),
            fingerprint(learner.head.state_dict()),
        )
        rates = [recipe.schedule(Place(0, step, batches.steps, step)) for step in range(batches.steps)]
        features = batches(0)[0]
        assert ((learner.head(features)[:, None] - every).abs().amax(2).amin(1) < 1e-3).all()
        log = real(runtime, word, learner, groups, loss, batches, recipe)
        after = (
            fingerprint({k: v for k, v in learner.state_dict().items() if k != "head"}),
            fingerprint(learner.head.state_dict()),
        )
        calls.append((word, before[0] == after[0], before[1] == after[1], len(rates)))
        return log

    every = None

    def extracted(runtime, net, data, size):
        nonlocal every
        with torch.no_grad():
            every = torch.cat([learner.predict(batch) for batch in data.test_batches(size)])
        return real_extract(runtime, net, data, size)

    real_extract = virtual_outliers.extract
    monkeypatch.setattr(virtual_outliers, "fit", spy)
    monkeypatch.setattr(virtual_outliers, "extract", extracted)
    t = trial(f"learner={name}", "learner.batch_size=18", "learner.ovor={epochs:2,candidates:30}")
    learner, runtime, pipeline = t.start()
    t.learn(learner, runtime, pipeline, 0)
    assert calls == [("outliers", True, False, 4)]
    assert (
        type(learner).capabilities_of(ovor={}).needs_random_access and not type(learner).capabilities_of().needs_random_access
    )
    with pytest.raises(UserError, match="ovor has no option 'radius'"):
        trial(f"learner={name}", "learner.ovor={radius:2}").start()
