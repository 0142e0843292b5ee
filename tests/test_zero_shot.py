"""Zero-shot questions: made as the specification says, counted as one row after another, in records and reports."""

import re

import numpy as np
import pytest
import torch
from test_cpt_run import job, run
from token_models import Bigram

from clbench.config import compose
from clbench.config.registry import check, listing
from clbench.evaluation.evaluators import load
from clbench.evaluation.zero_shot import Cloze, Completion, Texts, counted
from clbench.interfaces import UserError
from clbench.records import record
from clbench.records.verify import verify
from clbench.run import provenance
from clbench.run.runner import prepare
from clbench.streams.manifest import Manifest
from clbench.streams.tokens import languages, questions
from clbench.streams.tokens.questions import Question
from clbench.streams.tokens.texts import synthetic, text

WORDS = "anna Bert cäsar dora Emil friedrich an it Gustav heinrich of quelle Zeppelin".split()
WORD = re.compile(rb"[A-Za-z\x80-\xff]+")


def prose(windows=40, context=64, seed=0):
    """Windows [N, L + 1] of made sentences."""
    drawn = np.random.default_rng(seed).integers(0, len(WORDS), windows * context)
    words = [WORDS[i] + (". " if i % 5 == 0 else ", " if i % 7 == 0 else " ") for i in drawn]
    text = np.frombuffer("".join(words).encode(), np.uint8).astype(np.int64)
    return np.stack([text[i * context : (i + 1) * context + 1] for i in range(windows)])


def naive_spans(window, kind):
    """The span of a window by a regular expression, or None."""
    data, length = bytes(window.astype(np.uint8)), len(window) - 1
    whole = [m.span() for m in WORD.finditer(data) if m.start() > 0 and m.end() < len(data)]
    if kind == "cloze":
        least = min(4, length // 8)
        found = [(a, b) for a, b in whole if length // 2 <= a <= length * 3 // 4 and least <= b - a <= length // 8]
        return found[0] if found else None
    starts = [a for a, _ in whole if length // 2 <= a <= length * 3 // 4]
    ends = [b for a, b in whole if starts and a >= starts[0] and b <= starts[0] + length // 4]
    return (starts[0], ends[-1]) if ends else None


@pytest.mark.parametrize("kind", ["cloze", "completion"])
@pytest.mark.parametrize("context", [48, 64])
def test_questions_of_a_text_are_made_as_specified(kind, context):
    windows = prose(context=context)
    spans = [naive_spans(window, kind) for window in windows]
    pieces = [(j, bytes(windows[j, a:b].astype(np.uint8))) for j, (a, b) in ((j, s) for j, s in enumerate(spans) if s)]
    wanted = []
    for place, (j, right) in enumerate(pieces):
        options = [right]
        for _, other in pieces[place + 1 :] + pieces[:place]:
            alike = kind == "completion" or (right[:1].isupper() == other[:1].isupper())
            if alike and other not in options and len(options) < 4:
                options.append(other)
        if len(options) == 4:
            a, b = spans[j]
            behind = windows[j, b : b + context // 8] if kind == "cloze" else windows[j, b:b]
            wanted.append((windows[j, :a].tolist(), options, behind.tolist()))
    made = questions.KINDS[kind](windows, True)
    found = [(q.before.tolist(), [bytes(o.astype(np.uint8)) for o in q.options], q.after.tolist()) for q in made]
    assert found == wanted and len(found) > 10
    for q in made:
        assert max(len(q.before) + len(o) + len(q.after) for o in q.options) <= context + 1


def test_questions_of_other_tokens_are_spans_of_one_length():
    windows = np.random.default_rng(1).integers(0, 8, (30, 33))
    for made, size, behind in ((questions.clozes(windows, False), 1, 4), (questions.completions(windows, False), 8, 0)):
        assert len(made) == 30
        for window, q in zip(windows, made, strict=True):
            assert q.before.tolist() == window[:16].tolist() and q.options[0].tolist() == window[16 : 16 + size].tolist()
            assert q.after.tolist() == window[16 + size : 16 + size + behind].tolist() and len(q.after) == behind
            assert len({tuple(o) for o in q.options}) == 4 and {len(o) for o in q.options} == {size}


def texts(windows, of_bytes=False, batch=7, loss=None):
    def ask(learner, tokens):
        with torch.no_grad():
            return learner.loss(torch.from_numpy(tokens)).double().numpy()

    return Texts("set", windows, of_bytes, loss or ask, batch)


@pytest.mark.parametrize("kind", [Cloze, Completion])
def test_counts_are_those_of_one_row_after_another(kind):
    windows, model = prose(), Bigram(256, 8, 64, seed=3)
    sums = kind()(model, texts(windows, True))
    asked = questions.KINDS[kind.name](windows, True)
    right = {"correct": 0, "correct_per_token": 0}
    nats, size = 0.0, 0
    for q in asked:
        scores, sizes = [], []
        for option in q.options:
            row = np.concatenate([q.before, option, q.after])
            with torch.no_grad():
                scores.append(float(model.loss(torch.from_numpy(row[None]))[0, len(q.before) - 1 :].double().sum()))
            sizes.append(len(option) + len(q.after))
        right["correct"] += all(scores[0] < other for other in scores[1:])
        shares = [a / b for a, b in zip(scores, sizes, strict=True)]
        right["correct_per_token"] += all(shares[0] < other for other in shares[1:])
        nats, size = nats + scores[0], size + sizes[0]
    assert {name: sums[name] for name in right} == right and sums["correct_per_byte"] == right["correct_per_token"]
    assert sums["n"] == len(asked) and sums["tokens"] == size and sums["nats"] == pytest.approx(nats, rel=1e-5)


def test_the_normalisations_differ_and_ties_are_wrong():
    one, three = np.array([1]), np.array([2, 2, 2])
    front, nothing = np.array([0, 0]), np.array([], np.int64)

    def ask(learner, tokens):
        return np.where(tokens[:, 1:] == 1, 2.0, 1.0)  # token 1 costs 2 nats, all others 1

    def sums(*options):
        return counted(None, texts(np.zeros((1, 9)), loss=ask), [Question(front, options, nothing)])

    short_is_right = sums(one, three)  # 2 against 3 in all, 2 against 1 a token
    assert (short_is_right["correct"], short_is_right["correct_per_token"]) == (1, 0)
    long_is_right = sums(three, one)
    assert (long_is_right["correct"], long_is_right["correct_per_token"]) == (0, 1) and "correct_per_byte" not in long_is_right
    assert sums(np.array([3]), np.array([4]))["correct"] == 0
    assert long_is_right["nats"] == 3 and long_is_right["tokens"] == 3


def test_the_true_source_is_the_best_model_of_its_language():
    source = languages.synthetic(8, 8, "markov", 1.0, 0, 0)
    tokens = source.sample(32 * 400 + 1, 5).astype(np.int64)
    windows = np.stack([tokens[i * 32 : i * 32 + 33] for i in range(400)])

    def ask(learner, rows):
        return learner.nats(rows)[:, 1:]

    other = languages.synthetic(8, 8, "markov", 1.0, 1, 0)
    for kind in (Cloze(), Completion()):
        found = [kind(one, texts(windows, loss=ask, batch=100)) for one in (source, other)]
        assert found[0]["correct"] > 1.3 * found[0]["n"] / 4 and found[0]["correct"] > found[1]["correct"]
        assert found[0]["correct"] == found[0]["correct_per_token"]  # options are of one length
    for q in questions.clozes(windows, False)[:20]:  # the answer of the source is the arg max of two transitions
        p = source.probabilities
        best = max(q.options, key=lambda o, q=q: p[q.before[-1], o[0]] * p[o[0], q.after[0]])
        rows = [np.concatenate([q.before, o, q.after]) for o in q.options]
        nats = texts(windows, loss=ask).nats(source, rows, [len(q.before)] * 4)
        assert int(nats.argmin()) == next(i for i, o in enumerate(q.options) if o is best)


def test_records_hold_the_counts_and_looking_changes_nothing(tmp_path):
    asked = run(tmp_path, "scenario.evaluators=[cloze,completion]")
    plain = run(tmp_path)
    assert asked["final_state_sha256"] == plain["final_state_sha256"] and asked["sum_loss"] == plain["sum_loss"]
    assert asked["run_id"] != plain["run_id"]
    rows = [row for row in asked["rows"] if row["evaluator"] in ("cloze", "completion")]
    assert [row["experience"] for row in rows] == [-1, -1, 0, 0, 1, 1, 2, 2]
    for row in rows:
        assert row["step"] is None and set(row["sums"]) == {"n", "correct", "correct_per_token", "nats", "tokens"}
        assert all(0 <= c <= n <= 20 for c, n in zip(row["sums"]["correct"], row["sums"]["n"], strict=True))
        assert all(n > 0 for n in row["sums"]["n"])
    assert (
        asked["ledger"]["evaluation"] == plain["ledger"]["evaluation"] and asked["ledger"]["probe"] > plain["ledger"]["probe"]
    )
    text, code = verify(tmp_path)
    assert code == 0 and "2 verified" in text, text
    last = rows[-2]["sums"]
    share = np.mean([c / n for c, n in zip(last["correct"], last["n"], strict=True)])
    (found,) = [one for one in record.read_all(tmp_path / "records")[0] if one["run_id"] == asked["run_id"]]
    from clbench.evaluation import metrics

    assert metrics.summary(found)["cloze/correct"] == pytest.approx(share)


def test_the_manifest_names_them_and_without_them_nothing_moves():
    options = {"name": "s", "order": [0, 1], "symbols": 8, "states": 8, "tokens": 1920, "context": 16, "batch": 8}
    plain, asked = (synthetic(**options, eval_tokens=320, evaluators=names).manifest for names in ((), ["cloze", "cloze"]))
    assert "evaluators" not in plain.to_json() and asked.evaluators == ("cloze",) and asked.sha256 != plain.sha256
    assert Manifest.from_json(asked.to_json()) == asked
    assert "evaluators" not in provenance.identity(job())["scenario"]
    assert provenance.identity(job("scenario.evaluators=[cloze]"))["scenario"]["evaluators"] == ["cloze"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("scenario.evaluators=[activations]",), "evaluator activations is for streams that ask predict, this one asks loss"),
        (("scenario.evaluators=[closze]",), "did you mean 'cloze'"),
        (("scenario.evaluators=[cloze]", "scenario.context=8"), "evaluator cloze needs scenario.context of at least 16"),
        (("scenario.evaluators=cloze",), "scenario.evaluators must be list, got 'cloze'"),
        (("scenario.evaluators=[completion]", "scenario.eval_tokens=48"), "finds no question in language_0"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_planned(words, message):
    with pytest.raises(UserError, match=message):
        made = job(*words)
        check(made)
        prepare(made)


def test_streams_of_images_have_no_such_questions():
    for words, message in (
        (["learner=ncm", "scenario.operators=[{evaluators:{names:[cloze]}}]"], "cloze is for streams that ask loss"),
        (["scenario=cpt_mae_digits", "scenario.evaluators=[cloze]"], "scenario.evaluators"),
    ):
        with pytest.raises(UserError, match=message):
            check(compose.compose(words)[0])
    with pytest.raises(UserError, match="asks loss"):
        load(["activations"], {}, "loss")
    assert "  cloze " in listing(["evaluators"])


def test_texts_ask_for_bytes(tmp_path):
    drawn = np.random.default_rng(0).integers(0, len(WORDS), (6, 300))
    body = "\n".join(f"<|doc|>{i}\n" + " ".join(WORDS[k] for k in row) for i, row in enumerate(drawn))
    (tmp_path / "one.txt").write_text(body)
    stream = text(
        name="s",
        corpora=["one"],
        tokens=2048,
        context=64,
        batch=4,
        eval_tokens=2048,
        data_root=str(tmp_path),
        evaluators=["cloze"],
    )
    assert stream.of_bytes
    sums = Cloze()(Bigram(256, 8, 64, seed=3), texts(stream.evaluation(0), True))
    assert sums["correct_per_byte"] == sums["correct_per_token"] and sums["n"] > 10


class Longest:
    """An evaluator from outside: the loss of whole windows."""

    name = "longest"
    asks = "loss"

    def __call__(self, learner, data):
        rows = list(data.windows)
        return {"n": len(data), "nats": float(data.nats(learner, rows, [1] * len(rows)).sum())}


def test_evaluators_from_outside_read_texts_too(tmp_path):
    entry = run(tmp_path, f"scenario.evaluators=[{__name__}.Longest]")
    (row,) = [row for row in entry["rows"] if row["evaluator"] == "longest" and row["experience"] == 2]
    assert row["sums"]["nats"] == pytest.approx(entry["sum_loss"][2], rel=1e-6) and list(entry["evaluators"]) == ["longest"]
    with pytest.raises(UserError, match="asks predict"):
        load([f"{__name__}.Longest"], {"evaluators": [f"{__name__}.Longest"]})
