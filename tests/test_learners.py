"""Every learner under the contract, and what each paper says against a naive version."""

import numpy as np
import pytest
import torch
from conftest import NARROW
from torch.nn import functional as F

from clbench.config.compose import compose
from clbench.config.registry import asks, choices
from clbench.interfaces import BudgetExceeded, Capabilities, Facts, UserError, mismatch
from clbench.streams.eval_sets import open_eval
from clbench.streams.images.data import open_experience
from clbench.testing.contract import Trial, check_learner, mixed_stream, small_stream
from clbench.testing.score_checks import check_shapes
from clbench.training import arithmetic
from clbench.training.memory import Memory
from clbench.training.state import detached

NAMES = [name for name in choices("learner") if asks("learner", name) == "predict"]
VARIANTS = {
    "finetune": [
        "learner.masking=local",
        "learner.masking=batch learner.optimizer=lamb",
        "pet=adapter",
        "pet=ssf",
        "pet=dora",
        "pet=adalora",
        "pet=corda learner.optimizer=schedule_free_adamw",
    ],
    "joint": ["learner.mode=probe"],
    "text_ewc": ["learner.fisher=path"],
    "text_finetune": ["learner.targets=line"],
    "ncm": ["learner.metric=cosine", "learner.streaming=true"],
    "er": ["learner.updates=0.5", "learner.refresh={fisher:none} learner.combine=added learner.project=bloop"],
    "lwf": ["learner.refresh={fisher:none} learner.project=bloop learner.trainable={lisa:{blocks:1,every:2}}"],
    "rehearsal_free": ["learner.reg=ewc learner.anchor=previous learner.trainable=half"],
    "agem": ["learner.policy=reservoir"],
    "scr": ["learner.review=true"],
    "derpp": ["learner.online=true"],
    "icarl": ["learner.online=true"],
    "replay": ["learner.policy=herding", "learner.policy=balanced"],
    "mos": ["learner.variant=paper", "learner.variant=official_raw", "learner.covariance=multi-centroid"],
    "lae": ["pet=lora_lae", "pet=prefix_lae"],
    "aper": ["pet=none", "pet=vpt", "pet=ssf"],
    "ranpac": ["pet=none", "learner.projection=0"],
    "ease": ["learner.pretrained_weight=1.0"],
    "inflora": ["learner.variant=paper"],
    "sd_lora": ["learner.redundant=0.5 learner.reduce_at=[1] learner.reduce_to=[3]"],
    "cofima": ["learner.fisher=false", "learner.official_new_head=true"],
    "tuna": ["learner.variant=paper learner.start=previous learner.covariance=diagonal"],
    "ssiat": ["learner.compat_unpaired=true", "learner.drift=linear"],
    "rsiat": ["learner.variant=official"],
    "macil": ["learner.variant=official learner.patches=0"],
    "sldc": ["learner.variant=official learner.drift=shift"],
    "si": ["learner.variant=paper"],
    "mas": ["learner.variant=official"],
    "rwalk": ["learner.variant=official"],
    "ewc": ["learner.fisher=true"],
    "cbp": ["learner.rate=0.01 learner.maturity=1 learner.optimizer=adam"],
    "hat": ["learner.variant=paper"],
    "tag": ["learner.optimizer=adam learner.variant=paper"],
    "dst": ["learner.variant=official learner.prune=set learner.grow=momentum"],
    "rank_updates": ["learner.selector=new_only"],
    "shrink_perturb": ["learner.variant=official"],
    "sparse_mask": ["learner.how=graft learner.share=0.1"],
    "merge": ["learner.operator=fisher learner.start=merged"],
    "bcwi": ["learner.fisher=true learner.share=null learner.held_out=0.4"],
    "tent": ["learner.answer=after"],
    "eata": ["learner.fisher=0 learner.margin=0.9", "learner.margin=0.9"],
    "sar": ["learner.variant=official learner.margin=0.9"],
    "cema": ["learner.variant=official learner.margin=2 learner.similarity=2"],
    "hdc": ["learner.route=domain learner.quantile=0.1 learner.width=64"],
    "incremental_frozen": ["learner.finetune=1 learner.subnet=0.5 learner.supcon=0.5 learner.rotation=0.5 learner.virtual=2"],
    "lame": ["learner.affinity=rbf"],
    "adanpc": ["learner.variant=official learner.threshold=0", "learner.training=knn learner.threshold=0.5"],
    "randumb": ["learner.gamma=0.01", "learner.projection=0"],
    "klda": ["learner.models=2"],
    "sfr": ["learner.covariance=none"],
    "fetril": ["learner.train_first=false", "learner.classifier=svm"],
    "figmn": ["learner.variant=published"],
    "online_ensemble": ["learner.keys=fixed learner.top=hard learner.members=16 learner.chosen=4"],
    "der_expand": ["learner.balance=finetune learner.balance_epochs=2 learner.classifier=fresh"],
    "foster": ["learner.deploy=boosted learner.new_on_old=zero"],
    "gpm": ["learner.head=single"],
    "lucir": ["learner.balance_epochs=2"],
    "pass": ["learner.variant=pycil learner.reduction=mean"],
    "onpro": ["learner.start=second_batch learner.replay=4 learner.mix_p=1 learner.base_rate=0.5"],
    "slca": ["learner.restore_heads=false learner.drift=shift", "learner.fresh_norm=false", "learner.logit_norm=null"],
}
SMALL_MLP = ["model=mlp", "model.kwargs.hidden=[12,10]", "model.kwargs.img_size=8"]
MODELS = {"laftr": SMALL_MLP, "sfr": SMALL_MLP}  # what is made for them
NORMS = ["model=resnet32", "model.timm=test_resnet"]  # with batch norms, for those that adapt them
CASES = [(name, "") for name in NAMES] + [(name, option) for name, options in VARIANTS.items() for option in options]


@pytest.fixture
def one_thread(monkeypatch):
    """Workers side by side share the processors: more threads than that wait for each other."""
    monkeypatch.setattr(arithmetic, "choose_threads", lambda wanted: 1)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "option"), CASES)
def test_contract(name, option):
    (config,) = compose([f"learner={name}", *(NORMS if name == "bn_adapt" else MODELS.get(name, NARROW)), *option.split()])
    names = ("align_epochs", "augmentations", "head_epochs", "interval", "passes")
    fewer = dict.fromkeys(names, 2)  # the same phases in fewer steps
    fewer["align_samples"] = 32
    config["learner"] |= {key: value for key, value in fewer.items() if key in config["learner"]}
    assert [f"{check}: {message}" for check, ok, message in check_learner(config) if not ok] == []


def trial(*overrides, **stream):
    (config,) = compose(list(overrides))
    scenario = small_stream(**stream)
    return Trial(config, scenario, Capabilities())


def test_slca_against_the_paper():
    t = trial("learner=slca")
    learner, runtime, pipeline = t.start()
    first = t.learn(learner, runtime, pipeline, 0)
    assert torch.equal(learner.head.blocks[0].weight, learner.aligned.blocks[0].weight), "no alignment in the first experience"
    before = detached(learner.head.blocks[0].weight)
    features = torch.cat([learner.model.features(b) for b in first.train.test_batches(7)]).detach()
    y = torch.as_tensor(first.train.y)
    for c in range(3):
        f = features[y == c].double().numpy()
        np.testing.assert_allclose(learner.gaussians.mean_KD[c].numpy(), f.mean(0), atol=1e-4)
        np.testing.assert_allclose(learner.gaussians.cov_KDD[c].numpy(), np.cov(f.T) + 1e-4 * np.eye(f.shape[1]), atol=1e-4)
    norm = [m for m in learner.model.modules() if isinstance(m, torch.nn.LayerNorm)][-1]
    assert norm.eps == 1e-5
    second = t.learn(learner, runtime, pipeline, 1)
    assert torch.equal(learner.head.blocks[0].weight, before), "an old head moved, or alignment was not thrown away"
    assert not torch.equal(learner.aligned.blocks[0].weight, before), "alignment trained nothing"
    torch.testing.assert_close(learner.rescale(second), torch.tensor([0.95, 0.95, 0.95, 1.0]))
    learner.official_task_index = True
    torch.testing.assert_close(learner.rescale(second), 0.9 + 0.1 * (torch.arange(4) + 1) / 2)


def test_slca_rates_and_alignment_steps(monkeypatch):
    from clbench.learners import slca
    from clbench.training import gaussians

    calls = {}
    real = slca.fit

    def spy(runtime, name, learner, groups, loss, batches, recipe):
        calls[name] = ([group["lr"] for group in groups], batches.steps, recipe)
        return real(runtime, name, learner, groups, loss, batches, recipe)

    for module in (slca, gaussians):
        monkeypatch.setattr(module, "fit", spy)
    t = trial("learner=slca")
    learner, runtime, pipeline = t.start()
    t.learn(learner, runtime, pipeline, 0)
    assert calls["train"][0] == pytest.approx([1e-4, 1e-2]) and "align" not in calls
    t.learn(learner, runtime, pipeline, 1)
    rates, steps, recipe = calls["align"]
    assert rates == [0.01] and steps == 5 * 4 and recipe.weight_decay == 5e-4 and recipe.momentum == 0.9


def test_ncm_is_the_naive_nearest_mean_and_ignores_the_order():
    last = {}
    for order in ("natural", [5, 3, 1, 0, 2, 4]):
        for metric in ("euclidean", "cosine"):
            t = trial("learner=ncm", f"learner.metric={metric}", order=order)
            learner, runtime, pipeline = t.start()
            rows, labels = [], []
            for i in range(3):
                e = t.learn(learner, runtime, pipeline, i)
                rows.append(torch.cat([learner.model.features(b) for b in e.train.test_batches(50)]).detach())
                labels.append(torch.as_tensor(e.train.y))
            f, y = torch.cat(rows), torch.cat(labels)
            means = torch.stack([f[y == c].mean(0) for c in range(6)])
            z = torch.cat([t.scores(learner, pipeline, j, 9) for j in range(3)])
            tests = [open_experience]  # the evaluation sets, batch by batch

            x = torch.cat(
                [learner.model.features(b) for j in range(3) for b, _ in open_eval(t.scenario, j, pipeline).batches(9)]
            )
            x = x.detach()
            naive = -torch.cdist(x, means) if metric == "euclidean" else F.cosine_similarity(x[:, None], means[None], dim=2)
            assert torch.equal(z.argmax(1), naive.argmax(1)) and tests
            truth = torch.cat([y for j in range(3) for _, y in open_eval(t.scenario, j, pipeline).batches(9)])
            last.setdefault(metric, []).append(int((z.argmax(1) == truth).sum()))
    assert all(a == b for a, b in last.values())


@pytest.mark.parametrize("policy", ["reservoir", "balanced", "herding"])
def test_memory_limits_and_balance(policy):
    t = trial("learner=ncm")
    learner, _, pipeline = t.start()
    memory = Memory(policy, 10, None, seed=1)
    for i in range(3):
        data = open_experience(t.scenario, i, pipeline).train
        candidates = memory.candidates(data)
        features = torch.cat([learner.model.features(b) for b in candidates.test_batches(64)]).detach()
        memory.update(data, features)
        assert len(memory) == 10 and memory.num_bytes() == 10 * 8 * 8 * 3
        counts = np.bincount(memory.y, minlength=t.scenario.manifest.num_seen(i))
        if policy != "reservoir":
            assert counts.max() - counts.min() <= 1, counts
    again = Memory(policy, 10, None, seed=1)
    again.load_state_dict(memory.state_dict())
    assert (again.ids == memory.ids).all() and all((a == b).all() for a, b in zip(again.images, memory.images, strict=True))


def test_memory_in_bytes():
    t = trial("learner=ncm")
    _, _, pipeline = t.start()
    memory = Memory("balanced", None, 5 * 192 + 100, seed=0)
    memory.update(open_experience(t.scenario, 0, pipeline).train)
    assert len(memory) == 5 and memory.num_bytes() == 960


def test_reservoir_is_uniform_over_the_stream():
    t = trial("learner=ncm", limit_train=100)
    _, _, pipeline = t.start()
    data = [open_experience(t.scenario, i, pipeline).train for i in range(3)]
    share = np.zeros(6)
    for seed in range(40):
        memory = Memory("reservoir", 60, None, seed=seed)
        for part in data:
            memory.update(part)
        share += np.bincount(memory.y, minlength=6)
    assert np.abs(share / share.sum() - 1 / 6).max() < 0.02


def test_replay_refuses_more_than_the_budget():
    with pytest.raises(BudgetExceeded, match=r"learner\.memory=500, the scenario's budget allows 12"):
        trial("learner=replay", "learner.memory=500").start()


@pytest.mark.parametrize("name", ["replay", "derpp", "icarl", "bic", "wa"])
def test_an_unlimited_budget_needs_a_number(name):
    with pytest.raises(UserError, match=r"learner\.memory=N"):
        trial(f"learner={name}", budget={"epochs": 1}).start()


@pytest.mark.parametrize(
    ("can", "facts", "words"),
    [
        (Capabilities(asks="loss"), {}, "asks=loss"),
        (Capabilities(needs_task_id=True), {}, "does not disclose tasks"),
        (Capabilities(needs_boundaries=True), {"has_boundaries": False}, "needs_boundaries"),
        (Capabilities(needs_new_classes=True), {"every_experience_has_new_classes": False}, "needs_new_classes"),
        (Capabilities(needs_disjoint_classes=True), {"every_class_comes_once": False}, "needs_disjoint_classes"),
        (Capabilities(needs_passes=2), {}, "needs_passes=2"),
        (Capabilities(writes_text=True), {}, "not made of tokens"),
        (Capabilities(needs_target=True), {}, "no target lines"),
        (Capabilities(needs_one_domain=True), {"has_text": True}, "experiences are of several"),
        (Capabilities(needs_pretrained=True), {}, "random weights"),
    ],
)
def test_mismatch_names_both(can, facts, words):
    all_facts = {"asks": "predict", "discloses_task": False, "has_boundaries": True, "every_experience_has_new_classes": True}
    why = mismatch("mine", can, Facts("stream", **(all_facts | facts)), pretrained=False)
    assert why is not None and words in why and "mine" in why and "stream" in why


def old_beside_new(tmp_path):
    """Domains with the classes 0 1 2, 1 2 3 and 0 3 4: later ones bring old classes and one new class together."""
    draw, arrays = np.random.default_rng(0), {}
    for part, number in (("train", 6), ("test", 3)):
        y = np.repeat([0, 1, 2, 1, 2, 3, 0, 3, 4], number)
        arrays |= {f"{part}_y": y, f"domain_{part}": np.repeat([0, 1, 2], 3 * number)}
        arrays[f"{part}_x"] = draw.integers(0, 256, (len(y), 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "mixed.npz", **arrays)
    return ("scenario=dil_pacs", f"scenario.dataset={tmp_path / 'mixed.npz'}", "scenario.name=mixed")


NEED_DISJOINT = ("cofima", "ease", "inflora", "macil", "rsiat", "seed_ensemble", "slca", "slca_pp", "sldc", "ssiat", "tuna")


@pytest.mark.parametrize("name", NEED_DISJOINT)
def test_heads_of_new_classes_alone_refuse_old_ones_beside_them(name, tmp_path, clbench):
    words = (*old_beside_new(tmp_path), f"learner={name}")
    for command in ("plan", "run"):
        err = clbench(command, *words, code=2).stderr
        assert err.count("\n") == 1 and "needs_disjoint_classes, and some experience brings classes of an earlier one" in err


def test_all_others_learn_old_classes_beside_new_ones():
    """The contract runs such a stream for every learner that does not declare the need; those above would fail there."""
    for name in NEED_DISJOINT:
        (config,) = compose([f"learner={name}"])
        config["learner"]["epochs"] = None
        with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|non-negative"):
            check_shapes(Trial(config, mixed_stream(2), Capabilities()))


def test_fresh_norm_needs_a_norm():
    with pytest.raises(UserError, match=r"[Nn]orm"):
        trial("learner=slca", "model=resnet32").start()
