"""From a folder of records to the leaderboard: a pure function of the folder, byte for byte."""

from __future__ import annotations

import io
import math
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from clbench import metrics, record

SHOWN = ("step_macro", "step_micro", "last_macro", "last_micro", "forgetting", "bwt", "plasticity")
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
    """Short hash of everything but the seed: rows with other settings, streams or weights never mix."""
    config = {key: value for key, value in entry["config"].items() if key != "seed"}
    parts = [config, entry["scenario"].get("manifest_sha256"), entry["model"].get("state_sha256"), entry["numbers_version"]]
    return record.digest([*parts, entry["learner"].get("plugin")])[:8]


def safe(text: Any) -> str:
    """A cell that a spreadsheet does not take for a formula, on one line."""
    word = " ".join(str(text).split())
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
    row["peak_memory_mb_mean"] = mean_std([e["peak_memory_bytes"] / 1e6 for e in done if "peak_memory_bytes" in e])[0]
    for name in ("stored_bytes", "exemplars"):
        found = [entry[name] for entry in done if entry.get(name) is not None]
        row[name] = max(found) if found else None
    row["failed"] = sum(entry["status"] == "failed" for entry in group)
    row["dead"] = sum(entry["run_id"] in dead for entry in group)
    row["running"] = sum(entry["status"] == "running" for entry in group) - row["dead"]
    return row


def mean_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and unbiased standard deviation; None where there is no value, or no spread to measure."""
    found = [v for v in values if not math.isnan(v)]
    if not found:
        return None, None
    mean = math.fsum(found) / len(found)
    if len(found) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in found) / (len(found) - 1))


def leaderboard(records: Sequence[Mapping[str, Any]], dead: Sequence[str] = ()) -> Any:
    """The leaderboard as a pandas DataFrame with `COLUMNS`."""
    import pandas as pd

    return pd.DataFrame(rows(records, dead), columns=list(COLUMNS))


def to_csv(records: Sequence[Mapping[str, Any]], dead: Sequence[str] = ()) -> str:
    """The leaderboard as CSV text: fixed formats, so that a difference in review is a difference in results."""
    frame = leaderboard(records, dead).astype(object)
    for name in COLUMNS:
        if name in ("seconds_mean", "peak_memory_mb_mean"):
            form = "{:.1f}".format
        elif name.endswith(("_mean", "_std")):
            form = "{:.4f}".format
        else:
            form = safe
        frame[name] = ["" if value is None or value != value else form(value) for value in frame[name]]
    out = io.StringIO()
    frame.to_csv(out, index=False, lineterminator="\n")
    return out.getvalue()


def report(results_dir: str | pathlib.Path, strict: bool = False) -> tuple[str, int]:
    """Rebuild `leaderboard.csv` from `records/` -> (text for the terminal, exit code: 1 if strict and something is wrong)."""
    results = pathlib.Path(results_dir).expanduser()
    records, problems = record.read_all(results / "records")
    dead = [entry["run_id"] for entry in records if record.is_dead(entry, results)]
    if not records and not problems:
        return f"no records in {results / 'records'}", 1 if strict else 0
    record.write_text(results / "leaderboard.csv", to_csv(records, dead))
    lines = [table_text(rows(records, dead)), ""]
    counts = Counter("dead" if e["run_id"] in dead else e["status"] for e in records)
    lines.append(f"{len(records)} records: " + ", ".join(f"{n} {status}" for status, n in sorted(counts.items())))
    for entry in records:
        what = f"{entry['run_id']}  {entry['scenario']['name']} {entry['learner']['name']} seed {entry['seed']}"
        if entry["status"] == "failed":
            error = entry.get("error") or {}
            lines.append(f"failed  {what}: {error.get('type', '')}: {' '.join(str(error.get('message', '')).split())[:160]}")
        elif entry["run_id"] in dead:
            lines.append(f"dead    {what}: its process is gone; the same command goes on where it was")
    lines += [f"problem {line}" for line in problems]
    lines.append(f"written {results / 'leaderboard.csv'}")
    bad = bool(dead or problems or counts["failed"])
    return "\n".join(lines), 1 if strict and bad else 0


def table_text(made: Sequence[Mapping[str, Any]]) -> str:
    """The main columns, aligned; mean and standard deviation over seeds."""
    head = (
        "scenario",
        "learner",
        "model",
        "variant",
        "seeds",
        "step_macro",
        "last_macro",
        "last_micro",
        "forgetting",
        "seconds",
    )
    cells = []
    for row in made:
        numbers = [_pair(row[f"{n}_mean"], row[f"{n}_std"]) for n in ("step_macro", "last_macro", "last_micro", "forgetting")]
        seconds = "-" if row["seconds_mean"] is None else f"{row['seconds_mean']:.1f}"
        name = row["learner"] + (f" ({row['marks']})" if row["marks"] else "")
        lost = "".join(f" +{row[k]} {k}" for k in ("failed", "dead", "running") if row[k])
        cells.append((row["scenario"], name, row["model"], row["variant"], f"{row['n_seeds']}{lost}", *numbers, seconds))
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in [head, *cells])


def _pair(mean: float | None, std: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.4f}" + ("" if std is None else f" ± {std:.4f}")


def accuracy_matrix_text(entry: Mapping[str, Any]) -> str:
    """Accuracy in percent after each experience (rows) on each evaluation set (columns); '.' where it was not evaluated."""
    names = [str(name)[:12] for name in entry["scenario"].get("eval_names", range(len(entry["n"])))]
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
