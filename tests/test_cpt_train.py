"""Plans and training: against a loop written by hand, trunk and branch, optimiser policies, averages, exact resume."""

import functools
import math

import numpy as np
import pytest
import torch
from token_models import Bigram

from clbench.interfaces import UserError
from clbench.learners.generations import Generations
from clbench.learners.pretrain import Pretrain
from clbench.learners.skill_it import SkillIt
from clbench.streams.tokens.scenario import Domain, content_sha256, scenario
from clbench.training.checkpoint import Journal, unpack
from clbench.training.pretraining.data_mixture import Mixture, Replay
from clbench.training.pretraining.half_finetuning import categories, freeze_random_half
from clbench.training.pretraining.progress import differences
from clbench.training.pretraining.segments import PretrainRuntime, Segment, check_plan
from clbench.training.pretraining.weight_averaging import Average, Averager
from clbench.training.schedules import cosine
from clbench.training.state import fingerprint

STEPS = 12


def stable_then_anneal(place, *, anneal=0.25):
    """Constant, then a line to 0 over the last `anneal` share: the shape of every trunk and branch."""
    left = (place.steps - place.step) / place.steps
    return min(1.0, left / anneal)


def stream(domains=3, batch=4, context=6):
    rng = np.random.default_rng(0)
    made = []
    for d in range(domains):
        tokens = [(rng.integers(0, 8, size) + d) % 8 for size in (2000, 300)]
        train, held = (array.astype(np.uint8) for array in tokens)
        made.append(Domain(f"d{d}", train, held, content_sha256(train, held)))
    options = {"vocab": 8, "tokens": STEPS * batch * context, "context": context, "batch": batch, "eval_tokens": 60}
    return scenario("s", made, range(domains), **options)


def learner(kind=Pretrain, folder=None, **options):
    model = Bigram(8, 8, 6, seed=3)
    runtime = PretrainRuntime(seed=0, device=torch.device("cpu"), journal=Journal(folder, 0.0), flops_per_token=1.0)
    return kind(model, runtime, **({"lr": 1e-2} | options))


def experiences(number=3):
    made = stream()
    return [made.experience(i, True) for i in range(number)]


def learn(made, some):
    for experience in some:
        made.runtime.begin(experience.index)
        made.learn(experience)
        made.runtime.journal.finish_experience({"experience": experience.index})
    return made


def weights(made):
    return fingerprint(made.model.state_dict())


INFINITE = {"schedule": stable_then_anneal, "branch": 0.25, "boundary": "restore"}
REWARM = {"schedule": functools.partial(cosine, warmup=0.2, end=0.1), "boundary": "reset", "replay": Replay(share=0.3)}


def test_equal_to_a_loop_written_by_hand():
    made = learn(learner(**REWARM), experiences(2))
    model = Bigram(8, 8, 6, seed=3)
    params = list(model.parameters())
    data = [experience.train for experience in experiences(2)]
    replay = Replay(share=0.3)
    for k, mixture in enumerate(
        (
            Mixture(data[0], [], replay, np.ones((STEPS, 1))),
            Mixture(data[1], [data[0]], replay, replay.table(STEPS, [48]), seen=[48]),
        )
    ):
        groups = [
            {"params": [p for p in params if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        for step in range(STEPS):
            warm = round(0.2 * STEPS)
            share = (step - warm) / (STEPS - warm)
            factor = (step + 1) / warm if step < warm else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share))
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * factor
            tokens = torch.from_numpy(mixture(step))
            assert tokens.shape == (4, 7) and (k == 1 or (tokens[:, 0] >= 0).all())
            optimizer.zero_grad()
            model.loss(tokens).mean().backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
    assert weights(made) == fingerprint(model.state_dict())


def test_the_branch_is_evaluated_and_the_trunk_goes_on():
    some = experiences(2)
    made = learn(learner(**INFINITE), some[:1])
    trunk = made.trunk.kept
    alone = learn(learner(schedule=stable_then_anneal), some[:1])  # the same steps without a branch
    assert weights(made) == weights(alone) != fingerprint(trunk["model"])
    assert made.cursor.new == 48 and trunk["places"]["new"] == trunk["places"]["seen"][0] == 36
    plan = made.plan(some[1])
    assert [(s.role, s.first, s.last, s.start_from, s.optimizer) for s in plan] == [
        ("trunk", 0, 9, "trunk", "restore"),
        ("branch", 9, 12, "here", "keep"),
    ]
    before = fingerprint(trunk)
    made.trunk.begin(plan[0])
    assert weights(made) == fingerprint(trunk["model"]) and fingerprint(trunk) == before
    assert fingerprint(made.optimizer.state_dict()["state"]) == fingerprint(trunk["optimizer"]["state"])
    assert made.cursor.seen == [36] and made.cursor.trained == [36]


def moments(optimizer):
    state = optimizer.state_dict()["state"]
    return [(float(s["step"]), float(s["exp_avg"].abs().sum()), float(s["exp_avg_sq"].sum())) for s in state.values()]


@pytest.mark.parametrize("policy", ["keep", "reset", "reset_moments", "restore"])
def test_what_happens_to_the_optimiser(policy):
    some = experiences(2)
    made = learn(learner(**(INFINITE | {"boundary": policy})), some[:1])
    trunk, annealed = made.trunk.kept["optimizer"], moments(made.optimizer)
    made.trunk.begin(made.plan(some[1])[0])
    now = moments(made.optimizer)
    if policy == "keep":
        assert now == annealed and now[0][0] == 12
    elif policy == "reset":
        assert now == []
    elif policy == "reset_moments":
        assert all(m == (9.0, 0.0, 0.0) for m in now) and now
    else:
        assert fingerprint(made.optimizer.state_dict()["state"]) == fingerprint(trunk["state"]) and now[0][0] == 9


def test_both_accountings():
    some = experiences(1)
    compute, data = (learner(**INFINITE, accounting=a) for a in ("equal_compute", "equal_data"))
    assert [(s.first, s.last, s.steps) for s in compute.plan(some[0])] == [(0, 9, 12), (9, 12, 12)]
    assert [(s.first, s.last, s.steps) for s in data.plan(some[0])] == [(0, 12, 16), (12, 16, 16)]
    learn(compute, some)
    learn(data, some)
    tokens = 4 * 6
    ledgers = [made.runtime.ledger for made in (compute, data)]
    assert [(one.trunk_new, one.branch_new, one.repeated) for one in ledgers] == [
        (9 * tokens, 3 * tokens, 0),
        (12 * tokens, 4 * tokens, 4 * tokens),  # the branch reads text again
    ]
    assert all(one.trained == one.unique + one.repeated == one.flops for one in ledgers)


def test_a_trunk_with_a_part_of_the_anneal_in_it_is_refused():
    with pytest.raises(UserError, match=r"learner\.branch=0\.1 does not fit the schedule: the trunk of experience 0 would end"):
        learner(schedule=stable_then_anneal, branch=0.1).plan(experiences(1)[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"branch": 1.0}, "branch must be"),
        ({"passes": 0}, "passes must be"),
        ({"until": 0}, "until must be"),
        ({"lr": 0.0}, "lr must be"),
        ({"accounting": "equal_data"}, "no effect without a branch"),
        ({"boundary": "restore"}, "needs a branch or an average"),
        ({"branch": 0.1, "average": Average("ema")}, "exclude each other"),
        ({"start": "scratch"}, "needs boundary=reset"),
        ({"start": "scratch", "boundary": "reset", "replay": Replay(share=0.1)}, "no replay"),
        ({"data": "union"}, "needs start=scratch"),
        ({"anneal": Replay(share=0.5)}, "learner.anneal has no effect without a branch"),
        (INFINITE | {"anneal": Replay(share=0.5, source="generated")}, "learner.anneal replays stored text"),
        (INFINITE | {"anneal": Replay(share=0.5, timing="first", window=0.5)}, "learner.anneal replays stored text"),
    ],
)
def test_impossible_options(options, words):
    with pytest.raises(UserError, match=words):
        learner(**options)


def test_plans_are_checked_before_they_start():
    def piece(first, last, **changes):
        options = {"role": "trunk", "start_from": "here", "optimizer": "keep", "steps": 10, "lr": 1.0, "schedule": cosine}
        return Segment(**({"experience": 0, "first": first, "last": last} | options | changes))

    check_plan([piece(0, 4), piece(4, 10, role="branch")], 100, 10)
    for plan, words in (
        ([piece(0, 0)], "has no steps"),
        ([piece(0, 4), piece(5, 10)], "does not start where"),
        ([piece(0, 4, role="branch"), piece(4, 10)], "cannot follow its branch"),
        ([piece(0, 10)], "trains on 100 tokens, the budget allows 99"),
    ):
        with pytest.raises(UserError, match=words):
            check_plan(plan, 99, 10)


def test_frozen_scratch_union_and_passes():
    some = experiences(3)
    frozen = learn(learner(until=1), some)
    assert weights(frozen) == weights(learn(learner(), some[:1])) and frozen.runtime.ledger.trained == STEPS * 24
    scratch = learn(learner(start="scratch", boundary="reset"), some)
    assert scratch.runtime.ledger.trained == 3 * STEPS * 24 and scratch.runtime.ledger.trunk_replay == 0
    joint = learn(learner(start="scratch", boundary="reset", data="union"), some)
    ledger = joint.runtime.ledger
    assert ledger.trained == (1 + 2 + 3) * STEPS * 24 and ledger.trunk_replay == (1 + 2) * STEPS * 24
    assert joint.capabilities_of(data="union").stores_all_data and not joint.capabilities_of().stores_exemplars
    several = learn(learner(passes=4), some[:1])
    assert several.runtime.ledger.unique == 12 * 6 and several.runtime.ledger.repeated == 36 * 6


def test_allocation_counts_replayed_tokens_too():
    made = learn(learner(replay=Replay(share=0.25)), experiences(3))
    assert made.cursor.trained == [48 + 12 + 8, 36 + 4, 36] and made.cursor.seen == [48, 36, 36]  # 60 : 36 of 12, 7.5 and 4.5
    ledger = made.runtime.ledger
    assert ledger.trunk_replay == 24 * 6 and ledger.replay_bytes == (48 + 36) * 6


def test_pieces_of_a_batch_give_the_same_gradients():
    whole, pieces = learner(), learner()
    pieces.runtime.micro_batch = 3  # of 4: uneven
    learn(whole, experiences(1))
    learn(pieces, experiences(1))
    for a, b in zip(whole.model.parameters(), pieces.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert whole.runtime.ledger == pieces.runtime.ledger


def test_averages_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    ema, last = Averager(model, Average("ema", decay=0.5)), Averager(model, Average("last_k", last=3, every=0.2))
    expected, values = None, []
    for step in range(1, 11):
        with torch.no_grad():
            model.weight.fill_(float(step**2))
        ema.after_step(step, 10)
        last.after_step(step, 10)
        decay = min(0.5, step / (9 + step))
        expected = step**2 if expected is None else expected * decay + step**2 * (1 - decay)
        values.append(step**2)
    assert float(ema.weights["weight"]) == pytest.approx(expected)
    assert float(last.weights["weight"]) == pytest.approx((36 + 64 + 100) / 3)
    for options in ({"decay": 1.0}, {"last": 0}, {"every": 0.5, "last": 3}):
        with pytest.raises(UserError, match="average needs"):
            Average("ema", **options)


def test_an_average_is_evaluated_and_the_last_weights_go_on():
    some = experiences(2)
    options = {"average": Average("last_k", last=1, every=0.1), "boundary": "restore"}
    plain, made = learn(learner(), some), learn(learner(**options), some)
    assert weights(plain) == weights(made)  # the mean of the last weights alone, and nothing lost at the boundary
    ema = learn(learner(average=Average("ema"), boundary="restore"), some)
    assert weights(ema) != weights(plain) == fingerprint(ema.trunk.kept["model"])


def test_a_random_half_rests():
    model = Bigram(8, 8, 6, seed=3)
    assert {k: len(v) for k, v in categories(model).items()} == {
        "0 attention": 1, "0 feed-forward": 1, "1 attention": 1, "1 feed-forward": 1,
    }  # fmt: skip
    frozen = freeze_random_half(model, 5)
    assert len(frozen) == 2 and [n for n, p in model.named_parameters() if not p.requires_grad] == frozen
    assert freeze_random_half(model, None) == [] and all(p.requires_grad for p in model.parameters())
    some = experiences(2)
    made = learn(learner(trainable="half"), some[:1])
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    learn(made, some[1:])
    same = [name for name, value in made.model.state_dict().items() if torch.equal(value, before[name])]
    assert len(same) == 2 and all("blocks" in name for name in same)


def test_skill_it_moves_shares_towards_high_losses():
    made = learn(learner(SkillIt, updates=4, eta=5.0), experiences(2))
    assert len(made.losses) == 4 and made.shares[0] + made.shares[1] == pytest.approx(1)
    score = 5.0 * np.sum(made.losses[-3:], 0)
    assert made.shares == pytest.approx(np.exp(score - score.max()) / np.exp(score - score.max()).sum())
    assert made.runtime.ledger.trunk_replay > 0 and made.runtime.ledger.trained == 2 * STEPS * 24


def test_a_loss_that_is_no_number_says_where():
    made = learner(lr=1e-2)
    with torch.no_grad():
        made.model.head.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"loss is nan in experience 0, trunk, step 0 of 12, learning rate 0\.01"):
        learn(made, experiences(1))


class Killed(BaseException):
    pass


def killed_at(made, step):
    """Make the learner's process end before update number `step` of the whole run, after a snapshot."""
    optimizer = getattr(made, "inner", made).optimizer
    real, seen = optimizer.step, [made.runtime.meter.steps]

    def step_or_die():
        if seen[0] == step:
            raise Killed
        seen[0] += 1
        real()

    optimizer.step = step_or_die


def start_again(folder, some, kind, options, state):
    made = learner(kind, folder, **options)
    if state is not None:
        made.load_state_dict(state["learner"])
        made.runtime.meter.load_state_dict(state["meter"])
        made.runtime.ledger.load_state_dict(state["ledger"])
        made.runtime.journal.calls = 0
    return made, some[0 if state is None else state["experience"] + 1 :]


def run_with_kills(folder, kind, options, kills, number=2):
    """Run experiences in a process that is killed at each of `kills` updates of the whole run."""
    some, state = experiences(number), None
    for kill in [*kills, None]:
        made, left = start_again(folder, some, kind, options, state)
        try:
            for experience in left:
                made.runtime.begin(experience.index)
                saved = made.runtime.journal.load("fit-0")
                if kill is not None:
                    if saved is not None:
                        made.runtime.meter.load_state_dict(saved["meter"])
                    killed_at(made, kill)
                made.learn(experience)
                plain = {"learner": made.state_dict(), "meter": made.runtime.meter.state_dict()}
                state = {"experience": experience.index, "ledger": made.runtime.ledger.state_dict(), **plain}
                made.runtime.journal.finish_experience(state)
                state = unpack(torch.load(folder / "experience.pt", weights_only=True))
        except Killed:
            continue
    return made


PLANS = {
    "rewarm": (Pretrain, REWARM),
    "infinite": (Pretrain, INFINITE | {"replay": Replay(share=0.3, source="buffer", buffer_bytes=60)}),
    "ema": (Pretrain, {"average": Average("ema"), "boundary": "restore", "trainable": "half"}),
    "schedule_free": (Pretrain, {"average": Average("schedule_free"), "boundary": "restore", "betas": (0.0, 0.95)}),
    "skill_it": (SkillIt, {"updates": 4, "eta": 5.0}),
    "written": (Pretrain, INFINITE | {"replay": Replay(share=0.3, source="generated")}),
    "generations": (Generations, {"data": "subsample"}),
    "ranked": (Pretrain, {"passes": [1, 3], "rank": "lowest", "pilot": 3, "replay": Replay(share=0.3)}),
}


@pytest.mark.parametrize("kills", [(5,), (11,), (12,), (13,), (22,), (7, 9), (3, 23)], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_killed_anywhere_and_equal_to_the_last_bit(tmp_path, plan, kills):
    """Within a trunk (5), around the boundary (11, 12, 13), inside a branch (11, 22), twice."""
    kind, options = PLANS[plan]
    straight = learn(learner(kind, **options), experiences(2))
    made = run_with_kills(tmp_path, kind, options, kills)
    assert fingerprint(made.state_dict()) == fingerprint(straight.state_dict())
    assert made.runtime.ledger == straight.runtime.ledger and made.runtime.meter.steps == straight.runtime.meter.steps == 24


def test_a_changed_schedule_is_an_error_with_a_difference(tmp_path):
    some = experiences(1)
    made = learner(folder=tmp_path, **REWARM)
    made.runtime.begin(0)
    killed_at(made, 6)
    with pytest.raises(Killed):
        made.learn(some[0])
    other = learner(folder=tmp_path, **(REWARM | {"schedule": functools.partial(cosine, warmup=0.2, end=0.2)}))
    other.runtime.begin(0)
    with pytest.raises(UserError) as caught:
        other.learn(some[0])
    text = str(caught.value)
    assert "another plan; force=true" in text and "[0].schedule.end: 0.1 -> 0.2" in text and "[0].rates.11" in text
    assert "warmup" not in text


def test_differences_of_plain_values():
    assert differences({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == ["a[1].b: 2 -> 3"]
    assert differences({"a": 1}, {"b": 1}) == ["a: 1 -> None", "b: None -> 1"] and differences([1], [1, 2]) == [
        ": [1] -> [1, 2]"
    ]


def test_the_branch_reads_a_mixture_of_its_own():
    """The trunk reads new text alone, half of the branch is old; the next trunk knows nothing of it."""
    made = learner(Pretrain, **INFINITE, anneal=Replay(share=0.5))
    some = experiences(2)
    learn(made, some)
    ledger, size = made.runtime.ledger, 4 * 6
    assert (ledger.trunk_replay, ledger.branch_replay) == (0, round(0.5 * 3 * size)) and ledger.branch_new == 4.5 * size
    assert ledger.replay_bytes == 9 * 4 * 6, "what the trunk of the first experience read"
    trunk, branch = made.plan(some[1])
    assert trunk.mixture["replay"]["share"] == 0.0 and branch.mixture["replay"]["share"] == 0.5
    plain = learn(learner(Pretrain, **INFINITE), experiences(2))
    assert made.trunk.kept is not None and fingerprint(made.trunk.kept) == fingerprint(plain.trunk.kept)
    assert weights(made) != weights(plain)
    assert Pretrain.capabilities_of(anneal={"share": 0.5}).stores_exemplars
    assert not Pretrain.capabilities_of(anneal=None).stores_exemplars
