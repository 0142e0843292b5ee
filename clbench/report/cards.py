"""Reproduction cards: what was published beside what was measured here. `cards.yaml` + records -> CARDS.md, cards.csv.

A pure function of the cards, the finished records and the configuration files (which say what a command need not repeat).
An entry of ours takes the records of its learner, scenario and model in which every option that it names has the value that it
names. Where they fall into several variants of the leaderboard, each is a line of its own: no mean runs over settings.
"""

from __future__ import annotations

import functools
import pathlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from clbench.config import defaults
from clbench.config.overrides import word
from clbench.config.signatures import nearest
from clbench.interfaces import UserError
from clbench.records import record
from clbench.records.variant import variant
from clbench.report import table
from clbench.report.card_text import COLUMNS, to_csv, to_markdown

Kinds = dict[str, tuple[type, ...]]
_NUMBER, _WORDS = (int, float), (str, type(None))
_FILE: Kinds = {"streams": (dict,), "cards": (dict,)}
_STREAM: Kinds = {"about": (str,), "scenario": (str,), "model": (str,), "options": (dict,)}
_CARD: Kinds = {
    "title": (str,),
    "paper": (str,),
    "year": (int, type(None)),
    "link": _WORDS,
    "published": (list,),
    "ours": (list,),
    "gap": (str,),
    "quirks": (str,),
}
_PUBLISHED: Kinds = {
    "protocol": (str,),
    "model": (str,),
    "last": (*_NUMBER, type(None)),
    "average": (*_NUMBER, type(None)),
    "source": (str,),
    "checked": (bool,),
}
_OURS: Kinds = {"stream": (str,), "overrides": (dict,), "tuning": (dict, type(None))}
_TUNING: Kinds = {"grid": (str,), "stream": (str,), "runs": (int,), "seconds": _NUMBER}
_PARTS = ("scenario", "learner", "model", "precision")
_PLAIN = {"scenario.operators": []}  # a record names them only where there are some


def write(results: pathlib.Path, conf: pathlib.Path) -> list[pathlib.Path]:
    """Write `CARDS.md` and `cards.csv` beside `cards.yaml` -> their paths; nothing where there are no cards.

    `conf` is the folder of configuration files. A card that does not fit is a `UserError` of one line.
    """
    source = results / "cards.yaml"
    if not source.exists():
        return []
    cards = load(source)
    made = lines(cards, record.read_all(results / "records", details=False)[0], conf)
    texts = {"CARDS.md": to_markdown(cards, made), "cards.csv": to_csv(made)}
    for name, text in texts.items():
        record.write_text(results / name, text)
    return [results / name for name in texts]


def load(path: pathlib.Path) -> dict[str, Any]:
    """Read and check a file of cards. `UserError` names the file and the place."""
    cards = _read_yaml(path)
    _fields(cards, _FILE, "", path)
    for name, stream in cards["streams"].items():
        _fields(stream, _STREAM, f"streams.{name}", path)
        _options(stream["options"], f"streams.{name}.options", path)
    for learner, card in cards["cards"].items():
        _fields(card, _CARD, f"cards.{learner}", path)
        for i, entry in enumerate(card["published"]):
            where = f"cards.{learner}.published[{i}]"
            _fields(entry, _PUBLISHED, where, path)
            if any(not 0 <= (entry[key] or 0) <= 100 for key in ("last", "average")):
                raise UserError(f"{path}: {where} must hold percentages from 0 to 100")
        for i, entry in enumerate(card["ours"]):
            where = f"cards.{learner}.ours[{i}]"
            _fields(entry, _OURS, where, path)
            if entry["stream"] not in cards["streams"]:
                hint = nearest(entry["stream"], cards["streams"])
                raise UserError(f"{path}: {where}.stream is {entry['stream']!r}, which streams does not have{hint}")
            _options(entry["overrides"], f"{where}.overrides", path)
            if entry["tuning"] is not None:
                _fields(entry["tuning"], _TUNING, f"{where}.tuning", path)
    return cards


def _read_yaml(path: pathlib.Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{path}, line {line}: {error.problem}") from None
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:160]}") from None


def _fields(node: Any, wanted: Kinds, where: str, path: pathlib.Path) -> None:
    """Every field is there, none is unknown, each is of its kind."""
    dot = f"{where}." if where else ""
    if not isinstance(node, dict):
        raise UserError(f"{path}: {where or 'the file'} must hold {', '.join(wanted)}, got {str(node)[:40]!r}")
    for key in node:
        if key not in wanted:
            raise UserError(f"{path}: {dot}{key} is not a field{nearest(str(key), wanted)}")
    for key, kinds in wanted.items():
        if key not in node:
            raise UserError(f"{path}: {dot}{key} is missing")
        value = node[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            kind = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise UserError(f"{path}: {dot}{key} must be {kind}, got {str(value)[:40]!r}")


def _options(given: Mapping[Any, Any], where: str, path: pathlib.Path) -> None:
    for key in given:
        if not isinstance(key, str) or key.split(".")[0] not in _PARTS:
            raise UserError(f"{path}: {where} names {key!r}; an option begins with one of {', '.join(_PARTS)}")


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration as dotted keys; an empty mapping stays a value."""
    made: dict[str, Any] = {}
    for key, value in node.items():
        made |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return made


def same(a: Any, b: Any) -> bool:
    """Equal values of a configuration; YAML 1.1 reads `5e-4` as a word, so words that are numbers count as such."""
    a, b = (float(v) if isinstance(v, str) and re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", v) else v for v in (a, b))
    numbers = [isinstance(v, int | float) and not isinstance(v, bool) for v in (a, b)]
    return a == b if all(numbers) else type(a) is type(b) and a == b


def matching(learner: str, stream: Mapping[str, Any], overrides: Mapping[str, Any], records: Sequence[Any]) -> list[Any]:
    """Finished records of the learner on the stream in which every option named has its value; a missing option differs.

    Operators make another stream: where none are named, records that have some are left out.
    """
    wanted = _PLAIN | {**stream["options"], **overrides}
    found = []
    for entry in records:
        names = (entry["learner"]["name"], entry["scenario"]["name"], entry["model"]["name"])
        if entry["status"] == "ok" and names == (learner, stream["scenario"], stream["model"]):
            given = _PLAIN | flat(entry["config"])
            if all(key in given and same(given[key], value) for key, value in wanted.items()):
                found.append(entry)
    return found


def lines(cards: Mapping[str, Any], records: Sequence[Mapping[str, Any]], conf: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of `cards.csv`, in the order of the cards: published numbers, then ours. Values are fractions."""
    made = []
    for learner, card in cards["cards"].items():
        for entry in card["published"]:
            values = {key: None if entry[key] is None else entry[key] / 100 for key in ("last", "average")}
            known = {"kind": "published", "name": entry["protocol"], "model": entry["model"], "source": entry["source"]}
            made.append(_line(learner, known | values | {"checked": entry["checked"]}))
        for entry in card["ours"]:
            stream, tuning = cards["streams"][entry["stream"]], entry["tuning"] or {}
            found = matching(learner, stream, entry["overrides"], records)
            cost = {"tuning_runs": tuning.get("runs", 0), "tuning_seconds": tuning.get("seconds", 0)}
            known = {"kind": "ours", "name": entry["stream"], "model": stream["model"], "n_seeds": 0} | cost
            rows = table.rows(found)
            made += [_line(learner, known | _measured(row, found, conf)) for row in rows] or [_line(learner, known)]
    return made


def _line(learner: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(COLUMNS) | {"learner": learner, **values}


def _measured(row: Mapping[str, Any], found: Sequence[Mapping[str, Any]], conf: pathlib.Path) -> dict[str, Any]:
    """What a row of the leaderboard gives to a card."""
    runs = [entry for entry in found if variant(entry) == row["variant"]]
    return {
        "last": row["last_macro_mean"],
        "last_std": row["last_macro_std"],
        "average": row["step_macro_mean"],
        "average_std": row["step_macro_std"],
        "seconds": row["seconds_mean"],
        **{name: row[name] for name in ("n_seeds", "seeds", "stored_bytes", "marks", "variant")},
        "command": command(runs[0], row["seeds"].split(), conf),
    }


def command(entry: Mapping[str, Any], seeds: Sequence[str], conf: pathlib.Path) -> str:
    """The words that make runs like this one: the chosen names, and what its configuration has that their files have not."""
    config = entry["config"]
    words = ["clbench", "run", *(["-m"] if len(seeds) > 1 and "continues" not in config else [])]
    for part in ("learner", "scenario", "model"):
        name = entry[part]["name"]
        words.append(f"{part}={name}")
        words += _changes(config.get(part, {}), conf, part, name)
    if config.get("precision", "fp32") != "fp32":
        words.append(f"precision={config['precision']}")
    words += [f"{name}={config[name]}" for name in ("eval_batch_size", "optimizer_state") if name in config]  # where they count
    if "continues" in config:  # each seed goes on from a record of its own
        words.append(f"continues=results/records/{str(config['continues']).split('@')[0]}.json")
        seeds = [str(config["seed"])]
    return " ".join(shlex.quote(word) for word in [*words, f"seed={','.join(seeds)}"])


def _changes(node: Mapping[str, Any], conf: pathlib.Path, part: str, name: str) -> Iterator[str]:
    """Words for what a node has that its file has not; `pet=` and `schedule=` where a file of theirs says it."""
    default = options_of(conf, part, name)
    left = dict(node)
    for group in ("pet", "schedule") if part == "learner" else ():
        own = left.get(group)
        if isinstance(own, Mapping) and not _alike(flat({group: own}), default, f"{group}."):
            for file in sorted((conf / group).glob("*.yaml")):
                if _alike(flat(own), _defaults(file, file.stat().st_mtime_ns)):
                    yield f"{group}={file.stem}"
                    del left[group]
                    break
    for key, value in flat(left).items():
        if key not in default:
            yield f"{'+' if default else ''}{part}.{key}={word(value)}"
        elif not same(value, default[key]):
            yield f"{part}.{key}={word(value)}"


def options_of(conf: pathlib.Path, part: str, name: str) -> Mapping[str, Any]:
    """The options of a configuration file as dotted keys, with the defaults of its target; empty where there is none."""
    path = conf / part / f"{name}.yaml"
    return _defaults(path, path.stat().st_mtime_ns) if path.is_file() else {}


@functools.lru_cache(maxsize=512)
def _defaults(path: pathlib.Path, stamp: int) -> Mapping[str, Any]:
    """A configuration file as dotted keys, read once for each `stamp`, the time of its last change."""
    node = _read_yaml(path)
    return flat(defaults.filled(node) if path.parent.name in defaults.GROUPS else node)


def _alike(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> bool:
    b = {key: value for key, value in b.items() if key.startswith(prefix)}
    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
