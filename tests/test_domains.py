"""S-Prompts and incremental-frozen against naive versions."""

import pytest
import torch
from small_networks import SmallTrial, mlp
from torch.nn import functional as F

from clbench.config.compose import compose
from clbench.interfaces import Capabilities, UserError
from clbench.learners.incremental_frozen import IncrementalFrozen
from clbench.models.prompt_pool import query
from clbench.streams.eval_sets import open_eval
from clbench.streams.images.data import open_experience
from clbench.testing.contract import Trial, small_stream
from clbench.training.state import detached, fingerprint

ROTATED = [{"rotate": {"experiences": 3, "draw": "evenly"}}]


def s_prompts(*options, operators=ROTATED, **changes):
    (config,) = compose(["learner=s_prompts", "learner.lr=0.1", "learner.batch_size=16", *options])
    t = Trial(config, small_stream(operators=operators, limit_train=6, **changes), Capabilities())
    return t, *t.start()


def test_the_domain_of_the_nearest_centre_answers():
    t, learner, runtime, pipeline = s_prompts("learner.centres=2")
    for i in range(3):
        t.learn(learner, runtime, pipeline, i)
    assert [len(c) for c in learner.centres] == [2, 2, 2] and len(learner.prompts) == 3
    right = 0
    for j in range(3):
        data = open_eval(t.scenario, j, pipeline).data
        batch = data.batch(range(len(data)))
        f = F.normalize(query(learner.model, batch), dim=1)
        naive = []
        for row in f:
            gaps = [(float((row - c).abs().sum()), d) for d, centres in enumerate(learner.centres) for c in centres]
            naive.append(min(gaps)[1])
        chosen = learner.domains(batch)
        assert chosen.tolist() == naive
        right += sum(d == j for d in naive)
        with torch.no_grad():
            z = learner.predict(batch)
            for d in set(naive):
                rows = torch.tensor([i for i, one in enumerate(naive) if one == d])
                with learner.pet.use({"tokens": learner.prompts.parts[d][0]}):
                    own = learner.heads.at(d)(learner.model.features(batch.select(rows).x))
                torch.testing.assert_close(z[rows], own, atol=1e-4, rtol=1e-4)
    assert right > 60, f"{right} of 108 images are taken for their own domain's"


def test_centres_are_those_of_k_means_and_do_not_depend_on_prompts():
    found = []
    for lr in ("0.1", "0"):
        t, learner, runtime, pipeline = s_prompts("learner.centres=3", f"learner.lr={lr}")
        experience = t.learn(learner, runtime, pipeline, 0)
        f = torch.cat([F.normalize(query(learner.model, b), dim=1) for b in experience.train.test_batches(7)])
        nearest = torch.cdist(f, learner.centres[0]).argmin(1)
        for k in range(3):
            torch.testing.assert_close(learner.centres[0][k], f[nearest == k].mean(0), atol=1e-5, rtol=1e-4)
        found.append(learner.centres[0])
    assert torch.equal(*found)


def test_the_paper_takes_the_euclidean_distance():
    t, learner, runtime, pipeline = s_prompts("learner.variant=paper")
    t.learn(learner, runtime, pipeline, 0)
    data = open_eval(t.scenario, 0, pipeline).data
    batch = data.batch(range(8))
    f = F.normalize(query(learner.model, batch), dim=1)
    apart = torch.zeros(160)
    apart[:100] = 0.1  # L1 10, L2 1
    single = torch.zeros(160)
    single[0] = 2.0  # L1 2, L2 2
    learner.centres = [f[:1] + apart, f[:1] + single]
    learner.power = 2.0
    assert int(learner.domains(batch)[0]) == 0
    learner.power = 1.0
    assert int(learner.domains(batch)[0]) == 1


def test_earlier_domains_stand_still_and_the_network_does():
    t, learner, runtime, pipeline = s_prompts()
    network = fingerprint(learner.model.state_dict())
    t.learn(learner, runtime, pipeline, 0)
    first = detached(learner.state_dict())
    t.learn(learner, runtime, pipeline, 1)
    now = learner.state_dict()
    assert torch.equal(now["prompts"]["parts.0"], first["prompts"]["parts.0"])
    assert torch.equal(now["heads"]["heads.0.blocks.0.weight"], first["heads"]["heads.0.blocks.0.weight"])
    assert torch.equal(now["centres"][0], first["centres"][0])
    assert not torch.equal(now["prompts"]["parts.1"], now["prompts"]["parts.0"])
    assert fingerprint(learner.model.state_dict()) == network


def test_a_class_incremental_stream_answers_with_the_classes_of_the_domain():
    t, learner, runtime, pipeline = s_prompts(operators=[], sizes=[3, 3])
    for i in range(2):
        t.learn(learner, runtime, pipeline, i)
    z = t.scores(learner, pipeline, 0, 6)
    data = open_eval(t.scenario, 0, pipeline).data
    domain = learner.domains(data.batch(range(len(data))))
    assert z.shape[1] == 6 and (z.argmax(1) // 3 == domain).all()


def test_no_centre_is_refused():
    with pytest.raises(UserError, match=r"learner\.centres"):
        s_prompts("learner.centres=0")


# --- incremental-frozen


def frozen(**options):
    options = {"lr": 0.05, "batch_size": 8} | options
    t = SmallTrial(lambda: mlp(24), IncrementalFrozen, **options)
    return t, *t.begin()


def test_the_network_is_trained_in_the_base_session_alone():
    _, learner, learn, _ = frozen()
    start = fingerprint(learner.model.state_dict())
    learn(0)
    base = fingerprint(learner.model.state_dict())
    assert base != start and learner.model.frozen
    learn(1)
    learn(2)
    assert fingerprint(learner.model.state_dict()) == base


def test_answers_are_cosines_with_class_means():
    t, learner, learn, pipeline = frozen()
    rows, labels = [], []
    for i in range(3):
        learn(i)
        data = open_experience(t.scenario, i, pipeline).train
        rows += [learner.model.features(batch) for batch in data.test_batches(5)]
        labels.append(torch.as_tensor(data.y))
    f, y = torch.cat(rows).double(), torch.cat(labels)
    means = torch.stack([f[y == c].mean(0) for c in range(6)])
    for j in range(3):
        x = torch.cat([learner.model.features(b) for b, _ in open_eval(t.scenario, j, pipeline).batches(6)]).double()
        naive = F.cosine_similarity(x[:, None], means[None], dim=2)
        torch.testing.assert_close(t.answers_of(learner, pipeline, j).double(), naive, atol=1e-5, rtol=1e-4)


def test_later_sessions_in_another_order_give_the_same():
    ends = []
    for order in ([0, 1, 2, 3, 4, 5], [0, 1, 4, 5, 2, 3]):
        t = SmallTrial(
            lambda: mlp(24), IncrementalFrozen, scenario=small_stream(sizes=[2, 2, 2], order=order), lr=0.05, batch_size=8
        )
        learner, learn, _ = t.begin()
        for i in range(3):
            learn(i)
        ends.append((learner.prototypes.means_KD[torch.tensor(order).argsort()], fingerprint(learner.model.state_dict())))
    assert ends[0][1] == ends[1][1]
    torch.testing.assert_close(ends[0][0], ends[1][0])


def test_the_temperature_is_fixed_and_in_the_loss(monkeypatch):
    from clbench.learners import incremental_frozen

    seen = []

    def spy(runtime, name, learner, groups, loss, batches, recipe, **_):
        batch = batches(0)
        f = F.normalize(learner.model.features(batch), dim=1)
        w = F.normalize(learner.base_head.blocks[0].weight, dim=1)
        seen.append((loss(batch).detach(), F.cross_entropy(7.0 * f @ w.T, batch.y).detach(), recipe))
        trained = [p for group in groups for p in group["params"]]
        assert all(p is not learner.base_head.sigma for p in trained)
        return {}

    monkeypatch.setattr(incremental_frozen, "fit", spy)
    _, _, learn, _ = frozen(temperature=7.0)
    learn(0)
    ((got, expected, recipe),) = seen
    torch.testing.assert_close(got, expected)
    assert recipe.nesterov and recipe.momentum == 0.9 and recipe.weight_decay == 5e-4


def test_a_restored_learner_is_frozen_where_the_base_session_is_over():
    t, learner, learn, _ = frozen()
    empty = detached(learner.state_dict())
    learn(0)
    other, learn_too, _ = t.begin()
    other.load_state_dict(detached(learner.state_dict()))
    assert other.model.frozen
    learn(1)
    learn_too(1)
    assert fingerprint(other.state_dict()) == fingerprint(learner.state_dict())
    other.load_state_dict(empty)
    assert not other.model.frozen and all(p.requires_grad for p in other.model.parameters())


def test_temperature_above_0():
    with pytest.raises(UserError, match=r"learner\.temperature"):
        frozen(temperature=0.0)
