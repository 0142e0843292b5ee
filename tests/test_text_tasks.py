"""Text tasks: made lines against naive solvers, levels, folders, what is counted, learners against their formulas, refusals."""

import difflib
import json
from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clbench.config.compose import compose
from clbench.evaluation import generated, metrics
from clbench.evaluation.answers import Answers, AskedLines, old_text_sums
from clbench.interfaces import Capabilities, UserError, mismatch
from clbench.learners.text_ewc import TextEwc
from clbench.learners.text_finetune import TextFinetune
from clbench.learners.text_isolated import TextIsolated
from clbench.learners.text_replay import TextReplay
from clbench.models.decoder import build_decoder
from clbench.records import record, verify_texts
from clbench.run.plan import plan_job
from clbench.run.runner import run_job
from clbench.streams.manifest import Manifest
from clbench.streams.tokens import base_text, made_tasks, text_folders
from clbench.streams.tokens.text_data import TextBatch, TextData, open_experience
from clbench.streams.tokens.text_folders import text_folder
from clbench.streams.tokens.text_lines import Lines
from clbench.streams.tokens.text_tasks import CL5_ORDERS, STREAMS, text_tasks
from clbench.testing.trial import small_tasks
from clbench.training.answer_loss import answer_loss
from clbench.training.runtime import Runtime

CPU = torch.device("cpu")
A = ord("a")


def lego_by_hand(payload):
    """The bit of the letter that is asked, by following references."""
    clauses = {payload[i]: (payload[i + 1], payload[i + 2]) for i in range(0, len(payload) - 1, 3)}

    def bit(letter):
        how, of = clauses[letter]
        value = int(of) if of.isdigit() else bit(of)
        return value if how == "v" else 1 - value

    return str(bit(payload[-1]))


SOLVED = {
    "copy": lambda p: p,
    "reverse": lambda p: p[::-1],
    "shift_3": lambda p: "".join(chr(A + (ord(c) - A + 3) % 26) for c in p),
    "sort": lambda p: "".join(sorted(p)),
    "modsum_7": lambda p: str((int(p[0]) + int(p[1]) + int(p[2])) % 7),
    "lego_4": lego_by_hand,
}


def drawn(name, level="L1", split="test", count=40):
    """(tag, payload, answer) of the lines of one task."""
    task = made_tasks.parse(name)
    found = made_tasks.lines([task], level, split, count, 0)[0]
    cut = 0 if level == "L3" else 2
    return [(p[:cut].decode(), p[cut:-1].decode(), a[:-1].decode()) for p, a in found]


@pytest.mark.parametrize("name", SOLVED)
def test_lines_are_what_a_naive_solver_answers(name):
    rows = drawn(name)
    assert all(answer == SOLVED[name](payload) for _, payload, answer in rows)
    assert len({tag for tag, _, _ in rows}) == 1
    if name.startswith("lego"):
        assert 10 <= sum(answer == "1" for _, _, answer in rows) <= 30


def test_facts_are_the_same_in_training_and_test_and_change_with_their_seed():
    train, test = ({p: a for _, p, a in drawn("facts_30", split=split, count=n)} for split, n in (("train", 300), ("test", 99)))
    assert len(test) == 30 and test.items() >= train.items()
    other = {p: a for _, p, a in drawn("facts_30_1", count=99)}
    assert other.keys() == test.keys() and sum(other[p] == test[p] for p in test) <= 2


def test_topics_can_be_told_and_versions_are_near():
    rows = drawn("topic_4", count=200)
    words = made_tasks.topic_words(4)
    right = made_tasks.topic_bayes([p for _, p, _ in rows], 4)
    assert np.mean([words[i] == a for i, (_, _, a) in zip(right, rows, strict=True)]) > 0.95
    assert made_tasks.topic_words(10)[:3] == words[:3] and len(set(made_tasks.topic_words(10))) == 10
    same = [(a.counts == b.counts).all(1).mean() for a, b in zip(made_tasks.chains(5, 0), made_tasks.chains(5, 1), strict=True)]
    assert same == [21 / 26] * 5
    text = made_tasks.walks(made_tasks.chains(4, 0)[0], 400, 32, 5)
    assert abs(made_tasks.chains(4, 0)[0].bayes_loss(text) - made_tasks.chains(4, 0)[0].entropy_rate) < 0.1


def test_levels():
    tasks = [made_tasks.parse(one) for one in STREAMS["made8"]]
    alphabets = [{b for p, a in part for b in p[:-1] + a[:-1]} for part in made_tasks.lines(tasks, "L0", "test", 50, 0)]
    assert not any(a & b for i, a in enumerate(alphabets) for b in alphabets[:i])
    shifts = [made_tasks.parse(f"shift_{k}") for k in (1, 2, 3)]
    untagged = made_tasks.lines(shifts, "L3", "test", 60, 0)
    assert all([p for p, _ in part] == [p for p, _ in untagged[0]] for part in untagged)
    votes = [Counter(part[i][1] for part in untagged).most_common(1)[0][1] for i in range(60)]
    assert set(votes) == {1}, "no answer to a payload without a tag is right in more than one of three tasks"
    tagged = made_tasks.lines([*shifts, made_tasks.parse("sort")], "L2", "test", 9, 0)
    assert {len(p) for part in tagged for p, _ in part} == {11} and len({part[0][0][:2] for part in tagged}) == 4


def test_streams_and_orders():
    made = text_tasks(name="x", tasks="made_cl5", order="pp5", lines=4, test_lines=3)
    assert [e.name for e in made.manifest.experiences] == ["topic_5_1", "topic_10", "topic_5", "topic_14", "topic_4"]
    assert {len(order) for name, order in CL5_ORDERS.items() if name.startswith("o")} == {4}
    assert len(STREAMS["made15"]) == 15 and sorted(STREAMS["made_trace"]) == sorted(STREAMS["made8"])
    again = Manifest.from_json(made.manifest.to_json())
    assert again == made.manifest and again.asks == "next_token"
    other = text_tasks(name="x", tasks="made_cl5", order="pp5", lines=4, test_lines=3, seed=1)
    assert other.manifest.sha256 != made.manifest.sha256 and other.manifest.dataset["name"] == made.manifest.dataset["name"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": ["copi"]}, "unknown task 'copi' in scenario.tasks; did you mean"),
        ({"tasks": ["shift"]}, "write shift_K with numbers"),
        ({"tasks": ["shift_26"]}, "k of shift_26 must be a whole number from 1 to 25"),
        ({"tasks": ["copy", "copy"]}, "names a task twice"),
        ({"tasks": "made9"}, "unknown scenario.tasks=made9"),
        ({"tasks": ["copy", "lego_3"], "level": "L3"}, "scenario.level=L3 needs tasks with payloads of one kind"),
        ({"level": "L4"}, "unknown scenario.level=L4"),
        ({"order": "pp4"}, "unknown scenario.order=pp4 of these tasks: choose random or null"),
        ({"lines": 0}, "scenario.lines must be a whole number from 1, got 0"),
        ({"budget": {"epoch": 1}}, "unknown budget.epoch; did you mean budget.epochs"),
    ],
)
def test_bad_scenarios_are_refused_in_one_line(options, said):
    with pytest.raises(UserError) as error:
        text_tasks(name="x", **{"lines": 2, "test_lines": 2, **options})
    assert said in str(error.value) and "\n" not in str(error.value)


def test_base_text_counts_answers_and_markov_rows():
    rows, counts = base_text.text(12, 97, 3)
    for row, count in zip(rows, counts, strict=True):
        text = bytes(row.astype(np.uint8).tolist())
        if b"=" not in text:
            assert count.all()
            continue
        inside = False
        for byte, counted in zip(text, count, strict=True):
            assert counted == inside
            inside = byte == made_tasks.EQUALS or (inside and byte != made_tasks.END)


def batch_of(*lines):
    """Lines `prompt=answer` as a batch, with their ends."""
    cut = [line.partition("=") for line in lines]
    parts = [(f"{a}=".encode(), f"{b}\n".encode()) for a, _, b in cut]
    made = Lines.of(parts)
    return TextBatch.of_lines([made.line(i) for i in range(len(made))], made.prompts, CPU)


def test_batches_mark_answers_and_loss_is_a_mean_over_their_tokens():
    batch = batch_of("ab=cde", "x=y")
    assert batch.asked.tolist() == [[False, False, True, True, True, True], [False, True, True, False, False, False]]
    assert batch.real.sum().item() == 6 + 3
    model = build_decoder(name="x", vocab=256, width=16, depth=1, heads=2, context=16)
    z = model(batch.tokens).log_softmax(-1)
    nats = [[-z[b, t - 1, batch.tokens[b, t]] for t in range(n, m)] for b, (n, m) in enumerate([(3, 7), (2, 4)])]
    torch.testing.assert_close(answer_loss(model, batch), torch.stack([v for row in nats for v in row]).mean())
    longer = TextBatch.cat([batch_of("x=y"), batch])
    assert longer.tokens.shape == (3, 7) and longer.prompts.tolist() == [2, 3, 2]
    torch.testing.assert_close(
        answer_loss(model, TextBatch.cat([batch_of("x=y"), batch_of("x=y")])), answer_loss(model, batch_of("x=y"))
    )


class Parrot:
    """Says known answers to prompts, one byte after another, and `?` to others."""

    def __init__(self, known):
        self.known = known

    def next_token(self, batch):
        z = torch.zeros(*batch.tokens.shape, 256)
        for b, (row, n) in enumerate(zip(batch.tokens.tolist(), batch.prompts.tolist(), strict=True)):
            said = self.known.get(bytes(row[:n]), b"?\n")
            for t in range(n - 1, len(row)):
                z[b, t, said[t - n + 1] if t - n + 1 < len(said) else 0] = 5.0
        return z


def test_answers_and_generated_ones_are_counted_as_a_naive_reader_does():
    pairs = [(b"a=", b"x y\n"), (b"bb=", b"z\n"), (b"c=", b"Qq\n"), (b"d=", b"?\n")]
    lines = Lines.of(pairs)
    learner = Parrot({b"a=": b"x y\n", b"bb=": b"zz\n", b"c=": b"qq.\n"})
    asked = AskedLines("x", lines, np.arange(4), CPU, 256, 3, None, ("normalised", "first_character"))
    sums = Answers()(learner, asked)
    assert (sums["n"], sums["correct"], sums["tokens"]) == (4, 2, sum(len(a) for _, a in pairs))
    assert sums["token_hits"] == 4 + 1 + 1 + 2
    z = torch.tensor([5.0] + [0.0] * 255).log_softmax(0)
    assert sums["nats"] == pytest.approx(-(8 * z[0] + (sums["tokens"] - 8) * z[1]).item(), rel=1e-5)
    made = generated.Generated(lambda tokens: bytes(tokens.tolist()).partition(b"\n")[0].decode())(learner, asked)
    assert made == {"n": 4, "normalised": 3.0, "first_character": 3.0}
    rows = base_text.old_text(3, 9, 1)
    found = old_text_sums(learner, rows, CPU, 256, 2)
    assert found["n"] == 3 and found["tokens"] == 24 and found["nats"] > 0


def test_scores_of_texts():
    assert generated.normalised("The  CAT!", "the cat") == 1 and generated.normalised("cat", "the cat") == 0
    assert generated.normalised("", ".") == 0 and generated.first_character("B. no", "B") == 1
    assert generated.rouge_l("the cat sat", "the dog sat down") == pytest.approx(2 * 2 / (3 + 4))
    assert generated.rouge_l("", "a") == 0 and generated.similarity("", "abc") == 0
    assert (
        generated.similarity("abcd", "bcde")
        == pytest.approx(2 * 3 / 8)
        == difflib.SequenceMatcher(None, "abcd", "bcde").ratio()
    )


def test_numbers_of_a_record():
    """The golden values of the specification: three tasks of 20 lines."""
    r, b = [[0.9, 0.2, 0.1], [0.7, 0.8, 0.15], [0.6, 0.75, 0.85]], (0.25, 0.2, 0.1)
    correct = [[round(20 * v) for v in row] for row in r]
    rows = [
        {"experience": i, "evaluator": "answers", "sums": {"correct": c, "nats": [1.0 + i, 2.0, 3.0], "tokens": [2, 2, 2]}}
        for i, c in zip(range(-1, 3), [[round(20 * v) for v in b], *correct], strict=True)
    ]
    rows += [
        {"experience": i, "evaluator": "old_text", "sums": {}, "total": {"nats": n, "tokens": 4}} for i, n in ((-1, 8), (2, 10))
    ]
    rows = [{"step": None, **row} for row in rows]
    entry = {"correct": correct, "n": [20] * 3, "first_seen": [0, 1, 2], "scenario": {"kind": "text_tasks"}, "rows": rows}
    found = metrics.summary(entry)
    wanted = {"last_macro": 0.7333, "bwt": -0.175, "forward_gain": 0.025, "forgetting": 0.175, "plasticity": 0.85}
    wanted |= {"old_text_rise": 0.5, "answer_loss": (1.5 + 1 + 1.5) / 3, "answer_loss_rise": 0.5}
    assert {name: round(found[name], 4) for name in wanted} == {name: round(v, 4) for name, v in wanted.items()}
    assert not any(name.startswith("answers/") for name in found)
    assert metrics.macro(metrics.accuracy(correct, [20] * 3), [0, 1, 2]).round(4).tolist() == [0.9, 0.75, 0.7333]


def write(folder, name, **files):
    """JSON files of one set."""
    place = folder / name
    place.mkdir(parents=True)
    for part, body in files.items():
        (place / f"{part}.json").write_text(json.dumps(body))


@pytest.fixture
def published(tmp_path):
    """Small sets in the layouts of O-LoRA and of TRACE."""
    for name, labels in (
        ("TC/agnews", ["World", "Sports"]),
        ("TC/dbpedia", ["Company", "Plant"]),
        ("SC/amazon", ["bad", "good"]),
    ):
        rows = [{"label": labels[i % 2], "sentence": f"Text: row {i} of {name}"} for i in range(6)]
        write(tmp_path, name, train=rows, dev=rows[:2], test=[*rows[4:], {"label": labels[0], "sentence": "z"}], labels=labels)
    for name in ("FOMC", "ScienceQA"):
        rows = [{"prompt": f"{name} {i}?", "answer": "AB"[i % 2]} for i in range(5)]
        write(tmp_path, name, train=rows, eval=rows, test=[{"prompt": "q", "answer": "A"}])
    return tmp_path


def test_folders_in_published_layouts(published):
    made = text_folder(
        name="x", path=str(published), layout="standard_cl5", order=["dbpedia", "ag"], context=128, limit_train=4
    )
    assert [e.name for e in made.manifest.experiences] == ["dbpedia", "ag"] and len(made.manifest.experiences[0].train) == 4
    i = int(made.manifest.evals[1].ids[2])
    line, n = bytes(made.lines.line(i).tolist()), made.lines.prompts[i]
    assert (
        line[:n].decode() == text_folders.INSTRUCTIONS["TC"] + "\nOption: World, Sports \nz\nAnswer:" and line[n:] == b"World\0"
    )
    assert made.scores == (("normalised",),) * 2 and made.decode(made.lines.line(i)[n:]) == "World"
    trace = text_folder(name="x", path=str(published), layout="trace", order=["FOMC", "ScienceQA"], context=16)
    assert trace.scores == ((), ("first_character",)) and trace.manifest.context == max(trace.lines.lengths)
    short = text_folder(name="x", path=str(published), layout="standard_cl5", order=["ag"], context=16)
    assert short.lines.lengths.max() == 16 and bytes(short.lines.line(0).tolist()).endswith(b"Answer:World\0")
    assert {len(order) for order in text_folders.ORDERS["long15"].values()} == {15}
    assert {frozenset(order) for order in text_folders.ORDERS["long15"].values()} == {
        frozenset(text_folders.ORDERS["long15"]["shipped"])
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layout": "trac"}, "unknown scenario.layout=trac; did you mean 'trace'?"),
        ({"order": "o9"}, "unknown scenario.order=o9"),
        ({"order": ["ag", "agg"]}, "standard_cl5 has no set 'agg'; did you mean 'ag'?"),
        ({"order": ["yelp"]}, "has no folder FAMILY/yelp"),
        ({"path": "nowhere"}, "scenario.path=nowhere: no folder nowhere"),
        ({"context": 3}, "scenario.context must be a whole number from 16"),
    ],
)
def test_bad_folders_are_refused_in_one_line(published, options, said):
    with pytest.raises(UserError) as error:
        text_folder(**{"name": "x", "path": str(published), "layout": "standard_cl5", **options})
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_label_that_is_no_option_is_named(published):
    (published / "TC" / "agnews" / "labels.json").write_text('["World"]')
    with pytest.raises(UserError, match=r"train.json: label 'Sports' is not in labels.json \(World\)"):
        text_folder(name="x", path=str(published), layout="standard_cl5", order=["ag"])


def start(kind, scenario, **options):
    """A learner of a small decoder, with its runtime."""
    with torch.random.fork_rng([]):
        sizes = {"width": 16, "depth": 3, "heads": 2, "context": scenario.manifest.context}
        model = build_decoder(name="x", vocab=256, **sizes)
    runtime = Runtime(0, CPU, scenario.budget, exempt=kind is TextFinetune)
    return kind(model, runtime, **options), runtime


def learn(learner, runtime, scenario, index, past=()):
    """One task."""
    experience = open_experience(scenario, index, CPU)
    runtime.begin(index, len(experience.train))
    return learner.learn(type(experience)(**{**vars(experience), "past": past}))


def state(learner):
    """A copy of the weights."""
    return {name: value.clone() for name, value in learner.model.state_dict().items()}


def same(a, b):
    """Whether all tensors are equal to the last bit."""
    return all(torch.equal(a[name], b[name]) for name in a)


def test_ewc_without_strength_is_fine_tuning_and_fisher_is_the_mean_of_squares():
    scenario = small_tasks()
    plain, plain_runtime = start(TextFinetune, scenario)
    ewc, runtime = start(TextEwc, scenario, strength=0.0)
    for i in range(2):
        learn(plain, plain_runtime, scenario, i)
        learn(ewc, runtime, scenario, i)
    assert same(state(plain), state(ewc))
    fresh, runtime = start(TextEwc, scenario)
    data = open_experience(scenario, 0, CPU).train
    experience = open_experience(scenario, 0, CPU)
    found = fresh._per_line(experience)
    total = {name: torch.zeros_like(p) for name, p in fresh.model.named_parameters()}
    for i in range(len(data)):
        batch = data.batch([i])
        z = fresh.model(batch.tokens[:, :-1])
        nats = F.cross_entropy(z[batch.asked], batch.tokens[:, 1:][batch.asked], reduction="sum")
        grads = torch.autograd.grad(nats, list(fresh.model.parameters()))
        total = {name: total[name] + g.square() / len(data) for name, g in zip(total, grads, strict=True)}
    for name, value in total.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-7)


def test_ewc_holds_what_matters_and_path_fisher_adds_up():
    scenario = small_tasks()
    free, free_runtime = start(TextEwc, scenario, strength=0.0, batch_size=2)
    held, held_runtime = start(TextEwc, scenario, strength=1e6, batch_size=2)
    moved = []
    for learner, runtime in ((free, free_runtime), (held, held_runtime)):
        learn(learner, runtime, scenario, 0)
        before, importance = state(learner), dict(learner.fisher)
        learn(learner, runtime, scenario, 1)
        moved.append(sum((importance[n] * (learner.model.state_dict()[n] - before[n]).square()).sum() for n in importance))
    assert moved[1] < 0.2 * moved[0]
    path, runtime = start(TextEwc, scenario, fisher="path", clip=None)
    squares = {name: torch.zeros_like(p) for name, p in path.model.named_parameters()}
    steps = []
    step = torch.optim.AdamW.step

    def noted(self, *args, **kwargs):
        steps.append(1)
        for name, p in path.model.named_parameters():
            squares[name] += p.grad.square()
        return step(self, *args, **kwargs)

    torch.optim.AdamW.step = noted
    try:
        learn(path, runtime, scenario, 0)
    finally:
        torch.optim.AdamW.step = step
    assert len(steps) == 2 and path.sums == {}
    for name, value in squares.items():
        torch.testing.assert_close(path.fisher[name], value)  # 16 lines: one step an epoch


def test_replay_takes_no_further_steps_and_keeps_a_share_of_each_batch():
    scenario = text_tasks(
        name="x", tasks=["copy", "facts_8", "lego_2"], lines=40, test_lines=4, budget={"epochs": 2, "exemplars": 6}
    )
    learner, runtime = start(TextReplay, scenario, batch_size=8)
    for i in range(3):
        log = learn(learner, runtime, scenario, i)
        assert log["train_steps"] == 10 and log["exemplars"] == 6
    assert runtime.meter.visits == {"new": 80 + 2 * (7 * 6 - 2 + 3 * 6), "replayed": 2 * 20}
    assert sorted(learner.memory.y.tolist()) == [0, 0, 1, 1, 2, 2]
    kept = learner.memory.data(open_experience(scenario, 0, CPU).train).batch([0])
    own = {bytes(scenario.lines.line(i).tolist()) for i in scenario.manifest.experiences[0].train}
    task = [bytes(row[:n]) for row, n in zip(kept.tokens.tolist(), kept.lengths.tolist(), strict=True)]
    assert kept.y.tolist() != [0] or set(task) <= own
    with pytest.raises(UserError, match=r"learner.share must be from 0 to below 1"):
        start(TextReplay, scenario, share=1.0)


def test_isolated_models_forget_nothing_and_answer_the_unknown_from_the_start():
    scenario = small_tasks()
    learner, runtime = start(TextIsolated, scenario)
    batch = open_experience(scenario, 0, CPU).train.batch([0, 1])
    begun = learner.next_token(batch)
    learn(learner, runtime, scenario, 0)
    own = learner.next_token(batch)
    learn(learner, runtime, scenario, 1)
    assert torch.equal(learner.next_token(batch), own) and not torch.equal(own, begun)
    batch.task = 2
    assert torch.equal(learner.next_token(batch), begun)
    batch.task = None
    assert torch.equal(learner.next_token(batch), begun)


def test_joint_training_begins_anew_on_all_lines():
    scenario = small_tasks()
    joint, runtime = start(TextFinetune, scenario, data="union")
    first = open_experience(scenario, 0, CPU)
    learn(joint, runtime, scenario, 0)
    log = learn(joint, runtime, scenario, 1, (first.train,))
    other, other_runtime = start(TextFinetune, scenario)
    union = TextData.join([first.train, open_experience(scenario, 1, CPU).train])
    assert len(union) == 32 and log["train_steps"] == 4 and union.task is None
    experience = open_experience(scenario, 1, CPU)
    other_runtime.begin(1, len(union))
    other.learn(type(experience)(**{**vars(experience), "train": union}))
    assert same(state(joint), state(other))


def test_lisa_moves_one_block_and_half_leaves_matrices():
    scenario = small_tasks()
    for trainable, expected in (({"lisa": {"blocks": 1, "every": 20}}, 1), ("half", 3)):
        learner, runtime = start(TextFinetune, scenario, trainable=trainable)
        before = state(learner)
        learn(learner, runtime, scenario, 0)
        after = state(learner)
        matrices = [n for n in before if n.startswith("layers.") and n.endswith("weight") and before[n].ndim == 2]
        moved = [n for n in matrices if not torch.equal(before[n], after[n])]
        assert len({n.split(".")[1] for n in moved}) == expected and len(moved) == (4 if expected == 1 else len(matrices) // 2)
        assert not torch.equal(before["embed_in.weight"], after["embed_in.weight"])


def test_old_lines_cannot_be_read_after_their_task():
    scenario = small_tasks()
    data = open_experience(scenario, 0, CPU).train
    batch = data.batch([0, 3])
    data.close()
    assert len(batch) == 2
    for ask in (lambda: data.batch([0]), lambda: data.raw([0]), lambda: TextData.join([data, data]).batch([0])):
        with pytest.raises(UserError, match="is gone"):
            ask()


SMALL = ("scenario=text_tasks", "scenario.tasks=[copy,facts_8]", "scenario.lines=16", "scenario.test_lines=4", "num_threads=1")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("learner=finetune", "model=decoder_base"), "learner finetune does not fit scenario text_tasks: asks=predict"),
        (("learner=edit_finetune",), "learner edit_finetune does not fit scenario text_tasks: asks=logits"),
        (("learner=text_isolated", "scenario.discloses_task=false"), "needs_task_id, and the scenario does not disclose tasks"),
        (("model=decoder_facts",), "model decoder_facts has vocab 200, scenario text_tasks needs 256"),
        (("model.weights=none",), "nats a byte worse than the source of the old text, scenario.gap=0.3 is allowed"),
        (("learner.trainable=lisa", "pet=lora"), "learner.trainable=lisa has no effect with pet=lora"),
        (("learner=text_replay", "learner.policy=herding"), "unknown learner.policy=herding of lines"),
        (("pet=prompt", "model.context=64"), "model.context="),
        (("model=nano",), "needs a decoder_... model"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, overrides, said):
    with pytest.raises(UserError) as error:
        (job,) = compose([*SMALL, *overrides, f"results_dir={tmp_path}"])
        plan_job(job)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_images_do_not_take_a_learner_of_text():
    scenario = small_tasks()
    assert "asks=next_token, the scenario asks predict" in str(
        mismatch(
            "x", Capabilities(asks="next_token"), type(scenario.facts())(**{**vars(scenario.facts()), "asks": "predict"}), True
        )
    )


def test_a_run_ends_in_a_record_whose_faults_are_found(tmp_path):
    (job,) = compose([*SMALL, f"results_dir={tmp_path}"])
    entry = record.read(run_job(job).path)
    assert not list(verify_texts.check(entry)) and entry["visits"] == {"new": 2 * 4 * 16, "replayed": 0}
    assert entry["scenario"]["old_floor"] > 1.5 and metrics.summary(entry)["old_text_rise"] > 0
    (answers,) = (r for r in entry["rows"] if r["evaluator"] == "answers" and r["experience"] == 1)
    answers["sums"]["correct"][0] += 1
    assert any("correct is" in line for line in verify_texts.check(entry))
    answers["sums"]["correct"][0] -= 1
    answers["sums"]["token_hits"][1] = 10**6
    assert any("tokens" in line for line in verify_texts.check(entry))
    answers["sums"]["token_hits"][1] = answers["sums"]["correct"][1]
    (old,) = (r for r in entry["rows"] if r["evaluator"] == "old_text" and r["experience"] == 1)
    old["total"]["nats"] = 0.5 * old["total"]["tokens"]
    assert any("the floor is" in line for line in verify_texts.check(entry))
