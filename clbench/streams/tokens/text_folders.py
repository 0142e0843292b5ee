"""Scenario `text_folder`: published streams of text tasks from folders in their layouts. Nothing is bundled. Imports no torch.

layout standard_cl5, long15   the files that O-LoRA released (Wang et al. 2023): FAMILY/SET/train.json, test.json and
    labels.json; rows {"label", "sentence"}. A prompt is an instruction of the family, `Option: ` with what is in labels.json,
    the sentence, `Answer:`; the answer is the label. COPA has no instruction. There `dev.json` and `test.json` are the same,
    so nothing here reads `dev.json`: validation on it would be validation on test data
layout trace                  TRACE (Wang et al. 2023): SET/train.json, eval.json and test.json; rows {"prompt", "answer"}

Orders (`order`), as published. Five sets: `pp4`, `pp5`, `pp6` (Razdaibiedina et al. 2023), `slm7` (Peng et al. 2024); four of
them, without Yelp: `o1`, `o2`, `o3` (O-LoRA). Fifteen: `shipped` (as the code of O-LoRA has it), and two that are recalled, not
read again: `recalled5`, `recalled6`. TRACE: `order1`; `order2` is recalled.

Own choices: the words of instructions (`instructions` names a JSON file {family: text} with others); a prompt that is too long
loses tokens of its front; answers end with the mark of the tokenizer.
Scores beside exact matches: all answers of the first two layouts normalised as O-LoRA does; of TRACE the first character for
ScienceQA, ROUGE-L for MeetingBank, similarity for Py150. SARI of 20Minuten is not computed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clbench.interfaces import UserError
from clbench.streams import rng
from clbench.streams.tokens.edit_files import find_file, old_rows
from clbench.streams.tokens.made_tasks import suggestion
from clbench.streams.tokens.text_lines import Task, TextScenario, scenario
from clbench.streams.tokens.text_tasks import CL5_ORDERS
from clbench.streams.tokens.tokenizers import Bytes, Encoder, TokenizerFile

_LONG = (
    ("yelp", "amazon", "mnli", "cb", "copa", "qqp", "rte", "imdb", "sst2", "dbpedia", "ag", "yahoo", "multirc", "boolq", "wic"),
    ("mnli", "cb", "wic", "copa", "qqp", "boolq", "rte", "imdb", "yelp", "amazon", "sst2", "dbpedia", "ag", "multirc", "yahoo"),
    ("multirc", "boolq", "wic", "mnli", "cb", "copa", "qqp", "rte", "imdb", "sst2", "dbpedia", "ag", "yelp", "amazon", "yahoo"),
)
_TRACE = (
    ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten"),
    ("NumGLUE-cm", "NumGLUE-ds", "FOMC", "20Minuten", "C-STANCE", "Py150", "MeetingBank", "ScienceQA"),
)
ORDERS: dict[str, dict[str, tuple[str, ...]]] = {
    "standard_cl5": CL5_ORDERS,
    "long15": dict(zip(("shipped", "recalled5", "recalled6"), _LONG, strict=True)),
    "trace": dict(zip(("order1", "order2"), _TRACE, strict=True)),
}
SPELLED = {"ag": ("agnews", "ag"), "sst2": ("sst2", "sst"), "boolq": ("boolqa", "boolq"), "dbpedia": ("dbpedia", "dbpedia14")}
SCORES = {"ScienceQA": ("first_character",), "MeetingBank": ("rouge_l",), "Py150": ("similarity",)}
INSTRUCTIONS = {
    "SC": "Say which of the options is the sentiment of the text.",
    "TC": "Say which of the options is the topic of the text.",
    "NLI": "Say which of the options is how the second sentence follows from the first.",
    "QQP": "Say which of the options holds: whether the two questions ask the same.",
    "BoolQA": "Say which of the options answers the question about the text.",
    "MultiRC": "Say which of the options holds: whether the answer to the question is right by the text.",
    "WiC": "Say which of the options holds: whether the word means the same in both sentences.",
}
Row = tuple[str, str]  # prompt, answer


def text_folder(
    *,
    name: str,
    path: str,
    layout: Literal["standard_cl5", "long15", "trace"],
    order: str | Sequence[str] | None = None,
    corpus: str | None = None,
    tokenizer: str | None = None,
    instructions: str | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
    context: int = 512,
    seed: int = 0,
    discloses_task: bool = False,
    data_root: str | None = None,
    budget: Mapping[str, Any] | None = None,
) -> TextScenario:
    """The tasks of a folder in a published order.

    path          the folder, as given or under `data_root` or CLBENCH_DATA
    order         the name of a published order of the layout, or names of sets; None: the first of the layout
    corpus        plain text of the kind that the decoder was pre-trained on; None: no old text is asked
    tokenizer     a file tokenizer.json of the decoder; None: bytes
    instructions  a JSON file {family: text} in place of our own words
    limit_train, limit_test  lines of each task, drawn by `seed`; None: all
    context       tokens of the longest line, and of a row of old text
    """
    if layout not in ORDERS:
        raise UserError(f"unknown scenario.layout={layout}{suggestion(str(layout), ORDERS)}: choose {', '.join(ORDERS)}")
    for key, value, least in (("limit_train", limit_train, 1), ("limit_test", limit_test, 1), ("context", context, 16)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise UserError(f"scenario.{key} must be a whole number from {least}, got {value!r}")
    folder, names = _folder(path, data_root), _order(layout, order)
    encoder: Encoder = Bytes() if tokenizer is None else TokenizerFile(find_file("tokenizer", tokenizer, data_root))
    said = INSTRUCTIONS if instructions is None else _json(find_file("instructions", instructions, data_root), dict)
    tasks = []
    for one in names:
        parts = _trace(folder, one) if layout == "trace" else _olora(folder, one, said)
        limits, key = (limit_train, limit_test), rng.key("text_folder", seed, one)
        drawn = [_drawn(rows, limit, key) for rows, limit in zip(parts, limits, strict=True)]
        scores = SCORES.get(one, ()) if layout == "trace" else ("normalised",)
        train, test = (_encoded(encoder, rows, context, one) for rows in drawn)
        tasks.append(Task(one, train, test, scores))
    old = None if corpus is None else old_rows(find_file("corpus", corpus, data_root), encoder, context)[0]
    options: dict[str, Any] = {"vocab": encoder.vocab, "discloses_task": discloses_task, "budget": budget}
    return scenario(name, layout, tasks, old=old, decode=_decoder(encoder), **options)


def _folder(path: str, data_root: str | None) -> Path:
    root = data_root or os.environ.get("CLBENCH_DATA")
    places = [Path(path).expanduser(), *([Path(root).expanduser() / path] if root else [])]
    for place in places:
        if place.is_dir():
            return place
    raise UserError(f"scenario.path={path}: no folder {' or '.join(map(str, places))}")


def _order(layout: str, order: str | Sequence[str] | None) -> Sequence[str]:
    """Names of sets in the order in which they come."""
    known = ORDERS[layout]
    sets = list(dict.fromkeys(one for names in known.values() for one in names))
    if order is None:
        return next(iter(known.values()))
    if isinstance(order, str):
        if order not in known:
            raise UserError(
                f"unknown scenario.order={order}{suggestion(order, known)}: choose {', '.join(known)} or a list of sets"
            )
        return known[order]
    for one in order:
        if one not in sets:
            raise UserError(f"scenario.order: {layout} has no set {one!r}{suggestion(str(one), sets)} ({', '.join(sets)})")
    if not order or len(set(order)) < len(order):
        raise UserError(f"scenario.order must name sets once each, got {list(order)}")
    return list(order)


def _json(path: Path, kind: type) -> Any:
    """What a JSON file holds; `UserError` where it is another kind of thing."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(body, kind):
        raise UserError(f"{path} must hold a {'list' if kind is list else 'mapping'}, it holds a {type(body).__name__}")
    return body


def _rows(path: Path, prompt: str, answer: str) -> list[Row]:
    """The rows of a file with two texts each."""
    found = []
    for i, one in enumerate(_json(path, list)):
        row = (one.get(prompt), one.get(answer)) if isinstance(one, dict) else (None, None)
        if not all(isinstance(text, str) and text for text in row):
            raise UserError(f"{path}: row {i} must have the texts {prompt!r} and {answer!r}")
        found.append(row)
    return found


def _trace(folder: Path, name: str) -> tuple[list[Row], list[Row]]:
    """Training and test rows of a set of TRACE."""
    return _rows(folder / name / "train.json", "prompt", "answer"), _rows(folder / name / "test.json", "prompt", "answer")


def _olora(folder: Path, name: str, instructions: Mapping[str, str]) -> tuple[list[Row], list[Row]]:
    """Training and test rows of a set in the layout of O-LoRA."""
    spelled = SPELLED.get(name, (name,))
    places = [p for p in sorted(folder.glob("*/*")) if p.is_dir() and re.sub("[^a-z0-9]", "", p.name.lower()) in spelled]
    if not places:
        raise UserError(f"{folder} has no folder FAMILY/{name} (spelled {' or '.join(spelled)})")
    place, labels = places[0], [str(one) for one in _json(places[0] / "labels.json", list)]
    family = place.parent.name
    said = "" if family == "COPA" else instructions.get(family)
    if said is None:
        raise UserError(f"no instruction for family {family} of {place}: there are those of {', '.join(instructions)}")
    head = f"{said}\n" * bool(said) + f"Option: {', '.join(labels)} \n"
    parts = []
    for part in ("train", "test"):
        rows = _rows(place / f"{part}.json", "sentence", "label")
        if wrong := next((label for _, label in rows if label not in labels), None):
            raise UserError(f"{place}/{part}.json: label {wrong!r} is not in labels.json ({', '.join(labels)})")
        parts.append([(f"{head}{sentence}\nAnswer:", label) for sentence, label in rows])
    return parts[0], parts[1]


def _drawn(rows: list[Row], limit: int | None, key: int) -> list[Row]:
    """`limit` of the rows, in their order."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(rng.permutation(key, len(rows))[:limit])]


def _encoded(encoder: Encoder, rows: list[Row], context: int, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Prompts and answers as tokens; a long prompt loses its front."""
    prompts, answers = (encoder.encode([row[i] for row in rows]) for i in (0, 1))
    made = []
    for prompt, answer in zip(prompts, answers, strict=True):
        full = np.append(answer.astype(np.int32), encoder.end)
        room = context - len(full)
        if room < 1:
            raise UserError(
                f"set {name}: an answer has {len(answer)} tokens, scenario.context={context} leaves none for its prompt"
            )
        made.append((prompt.astype(np.int32)[-room:], full))
    return made


def _decoder(encoder: Encoder) -> Any:
    """Tokens of an answer -> text, for scores that compare texts."""

    def decode(tokens: np.ndarray) -> str:
        stop = np.flatnonzero(tokens == encoder.end)
        return encoder.decode(tokens[: stop[0]] if len(stop) else tokens)  # type: ignore[attr-defined]

    return decode
