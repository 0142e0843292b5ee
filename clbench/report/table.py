"""From a folder of records to the leaderboard: a pure function of the folder, byte for byte."""

from __future__ import annotations

import io
import math
import pathlib
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from clbench import metrics, record
from clbench.report import losses

SHOWN = ("step_macro", "step_micro", "last_macro", "last_micro", "forgetting", "bwt", "plasticity")
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
COLUMNS = (
    "scenario",
    "learner",
    "model",
    "variant",
    "manifest",
    "marks",
    "n_seeds",
    "seeds",
    *(f"{name}_{part}" for name in SHOWN for part in ("mean", "std")),
    "seconds_mean",
    "peak_memory_mb_mean",
    "stored_bytes",
    "exemplars",
    "failed",
    "dead",
    "running",
)


def variant(entry: Mapping[str, Any]) -> str:
    """Short hash of everything but the seed: rows with other settings, streams or weights never mix.

    Random weights (`source` "none") are drawn from the seed, so they do not count: their seeds are one row.
    """
    config = {key: value for key, value in entry["config"].items() if key != "seed"}
    model = entry["model"]
    weights = None if model.get("source") == "none" else model.get("state_sha256")
    parts = [config, entry["scenario"].get("manifest_sha256"), weights, entry["numbers_version"]]
    return record.digest([*parts, entry["learner"].get("plugin")])[:8]


def plain(text: Any) -> str:
    """One line without control characters, broken surrogates and text-direction marks: nothing that a terminal obeys."""
    word = " ".join(str(text).split())
    if word.isascii() and word.isprintable():
        return word
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") or c in _BIDI else c for c in word)


def safe(text: Any) -> str:
    """A cell that a spreadsheet does not take for a formula, on one line."""
    word = plain(text)
    return f"'{word}" if word[:1] in ("=", "+", "-", "@") else word


def rows(records: Sequence[Mapping[str, Any]], dead: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One row for each (scenario, learner, model, variant); runs without a result count, and are never missing."""
    groups: dict[tuple[str, str, str, str], list[Mapping[str, Any]]] = {}
    for entry in records:
        key = (entry["scenario"]["name"], entry["learner"]["name"], entry["model"]["name"], variant(entry))
        groups.setdefault(key, []).append(entry)
    made = [_row(key, sorted(group, key=lambda e: (e["seed"], e["run_id"])), set(dead)) for key, group in groups.items()]

    def order(row: dict[str, Any]) -> tuple:
        value = row["last_macro_mean"]
        return (row["scenario"], row["model"], math.inf if value is None else -value, row["learner"], row["variant"])

    return sorted(made, key=order)


def _row(key: tuple[str, str, str, str], group: list[Mapping[str, Any]], dead: set[str]) -> dict[str, Any]:
    done = [entry for entry in group if entry["status"] == "ok"]
    values = [metrics.summary(entry) for entry in done]
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= dict(zip(("scenario", "learner", "model", "variant"), key, strict=True))
    row["manifest"] = str(group[0]["scenario"].get("manifest_sha256", ""))[:8]
    row["marks"] = " ".join(sorted({mark for entry in group for mark in entry.get("marks", [])}))
    row["n_seeds"], row["seeds"] = len(done), " ".join(str(entry["seed"]) for entry in done)
    for name in SHOWN:
        row[f"{name}_mean"], row[f"{name}_std"] = mean_std([v[name] for v in values if name in v])
    row["seconds_mean"] = mean_std([float(e["seconds"].get("total", math.nan)) for e in done])[0]
    row["peak_memory_mb_mean"] = mean_std(
        [e["peak_memory_bytes"] / 1e6 for e in done if e.get("peak_memory_bytes") is not None]
    )[0]
    for name in ("stored_bytes", "exemplars"):
        found = [entry[name] for entry in done if entry.get(name) is not None]
        row[name] = max(found) if found else None
    row["failed"] = sum(entry["status"] == "failed" for entry in group)
    row["dead"] = sum(entry["run_id"] in dead for entry in group)
    row["running"] = sum(entry["status"] == "running" for entry in group) - row["dead"]
    return row


def mean_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and unbiased standard deviation; None where there is no value, or no spread to measure."""
    found = [v for v in values if math.isfinite(v)]
    if not found:
        return None, None
    mean = math.fsum(found) / len(found)
    if len(found) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in found) / (len(found) - 1))


def leaderboard(records: Sequence[Mapping[str, Any]], dead: Sequence[str] = ()) -> Any:
    """The leaderboard as a pandas DataFrame with `COLUMNS`."""
    return _frame(rows(records, dead))


def _frame(made: Sequence[Mapping[str, Any]]) -> Any:
    import pandas as pd

    return pd.DataFrame(made, columns=list(COLUMNS))


def to_csv(records: Sequence[Mapping[str, Any]], dead: Sequence[str] = ()) -> str:
    """The leaderboard as CSV text: fixed formats, so that a difference in review is a difference in results."""
    return _csv(rows(records, dead))


def _csv(made: Sequence[Mapping[str, Any]]) -> str:
    frame = _frame(made).astype(object)
    for name in COLUMNS:
        if name in ("seconds_mean", "peak_memory_mb_mean"):
            form = "{:.1f}".format
        elif name.endswith(("_mean", "_std")):
            form = _fraction
        else:
            form = safe
        frame[name] = ["" if row[name] is None else form(row[name]) for row in made]
    out = io.StringIO()
    frame.to_csv(out, index=False, lineterminator="\n")
    return out.getvalue()


def _fraction(value: float) -> str:
    """Four decimals; a value that rounds to zero has no sign, whatever the order of the sums."""
    text = f"{value:.4f}"
    return "0.0000" if text == "-0.0000" else text


def report(results_dir: str | pathlib.Path, strict: bool = False) -> tuple[str, int]:
    """Rebuild `leaderboard.csv` from `records/` -> (text for the terminal, exit code: 1 if strict and something is wrong)."""
    results = pathlib.Path(results_dir).expanduser()
    records, problems = record.read_all(results / "records")
    dead = [entry["run_id"] for entry in records if record.is_dead(entry, results)]
    path = results / "leaderboard.csv"
    made = rows(records, dead)
    if made or problems or path.exists():
        record.write_text(path, _csv(made))
    if not records and not problems:
        return f"no records in {results / 'records'}", 1 if strict else 0
    kinds = {losses.is_loss(entry) for entry in records}
    images = made if True not in kinds else rows([entry for entry in records if not losses.is_loss(entry)], dead)
    lines = [*([table_text(images), ""] if False in kinds else []), *losses.report(results, records, dead)]
    counts = Counter("dead" if e["run_id"] in dead else e["status"] for e in records)
    lines.append(f"{len(records)} records: " + ", ".join(f"{n} {status}" for status, n in sorted(counts.items())))
    lines += [line for entry in records if (line := _trouble(entry, entry["run_id"] in dead))]
    lines += [f"problem {plain(line)}" for line in problems]
    lines.append(f"written {path}")
    bad = bool(dead or problems or counts["failed"])
    return "\n".join(lines), 1 if strict and bad else 0


def _trouble(entry: Mapping[str, Any], dead: bool) -> str | None:
    what = f"{entry['run_id']}  {plain(entry['scenario']['name'])} {plain(entry['learner']['name'])} seed {entry['seed']}"
    if entry["status"] == "failed":
        error = entry["error"] or {}
        return f"failed  {what}: {plain(error.get('type', ''))}: {plain(error.get('message', ''))[:160]}"
    return f"dead    {what}: its process is gone; the same command goes on where it was" if dead else None


def table_text(made: Sequence[Mapping[str, Any]], width: int = 120) -> str:
    """The main columns of each scenario, aligned: mean ± standard deviation over seeds.

    Long names are cut to fit; marks never are, so a row with several of them may be wider.
    """
    names = ("step_macro", "last_macro", "last_micro", "forgetting")
    head = ("learner", "model", "variant", "seeds", *names, "seconds", "marks")
    cells: list[tuple[str, ...]] = [head]
    for row in made:
        numbers = [_pair(row[f"{name}_mean"], row[f"{name}_std"]) for name in names]
        seconds = "-" if row["seconds_mean"] is None else f"{row['seconds_mean']:.1f}"
        lost = "".join(f" +{row[k]} {k}" for k in ("failed", "dead", "running") if row[k])
        known = (plain(row["learner"]), plain(row["model"]), row["variant"], f"{row['n_seeds']}{lost}")
        cells.append((*known, *numbers, seconds, plain(row["marks"])))
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    over = sum(widths) + 2 * len(widths) - width
    while over > 0 and max(widths[:2]) > 12:
        longest = widths.index(max(widths[:2]))
        widths[longest] -= 1
        over -= 1
    lines, scenario = ["  " + _aligned(head, widths)], None
    for row, line in zip(made, cells[1:], strict=True):
        if row["scenario"] != scenario:
            scenario = row["scenario"]
            lines.append(_cut(plain(scenario), width))
        lines.append("  " + _aligned(line, widths))
    return "\n".join(lines)


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(_cut(cell, wide).ljust(wide) for cell, wide in zip(line, widths, strict=True)).rstrip()


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _pair(mean: float | None, std: float | None) -> str:
    if mean is None:
        return "-"
    return _fraction(mean) + ("" if std is None else "±" + f"{std:.4f}".lstrip("0"))


def accuracy_matrix_text(entry: Mapping[str, Any]) -> str:
    """Accuracy in percent after each experience (rows) on each evaluation set (columns); '.' where it was not evaluated."""
    names = [plain(name)[:12] for name in entry["scenario"].get("eval_names", range(len(entry["n"])))]
    a = metrics.accuracy(entry["correct"], entry["n"])
    mean = metrics.macro(a, entry["first_seen"])
    if len(names) > 12:
        last = "  ".join(f"{v:.4f}" for v in mean)
        return f"accuracy after each experience (macro over the sets seen)\n{last}"
    width = max(6, *(len(name) for name in names)) + 1
    lines = ["after".ljust(8) + "".join(name.rjust(width) for name in names) + "macro".rjust(width)]
    for i, row in enumerate(a):
        cells = "".join(("." if math.isnan(v) else f"{100 * v:.1f}").rjust(width) for v in row)
        lines.append(str(i + 1).ljust(8) + cells + f"{100 * mean[i]:.1f}".rjust(width))
    return "\n".join(lines)
