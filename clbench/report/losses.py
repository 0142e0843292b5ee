"""The leaderboard of pre-training: losses (nats, for images squared errors), ledger, what pairs of runs say together."""

from __future__ import annotations

import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from clbench import metrics_loss, record

KIND = "continual_pretraining"
SHOWN = (
    "final_loss",
    "average_loss",
    "learned_loss",
    "retained_loss",
    "forgetting_after",
    "forgetting_best",
    "forward_transfer",
    "regret",
    "final_bpb",
    "recovery_ratio",
    "gap_depth",
    "gap_area",
    "gap_tokens",
    "gap_recovered",
    "rate_share",
    "anneal_gain_new",
    "anneal_gain_old",
    "min_acc",
    "wc_acc",
    "probe_own",
    "probe_seen",
    "probe_seen_average",
    "probe_gain",
)
OPTIONS = ("replay", "branch", "accounting", "boundary")
LEDGER = ("trunk_new", "trunk_replay", "branch_new", "branch_replay", "unique", "repeated", "probe", "replay_bytes")
COLUMNS = (
    *("scenario", "learner", "model", "variant", "manifest", "marks", *OPTIONS, "n_seeds", "seeds"),
    *(f"{name}_{part}" for name in SHOWN for part in ("mean", "std")),
    *(f"tokens_{name}" if name != "replay_bytes" else name for name in LEDGER),
    *("flops", "seconds_mean", "failed", "dead", "running"),
)


def is_loss(entry: Mapping[str, Any]) -> bool:
    """Whether a record is of a pre-training run, finished or not."""
    return entry["scenario"].get("kind") == KIND


def usable(entry: Mapping[str, Any]) -> bool:
    """Whether everything that the table needs is there and of the right kind."""
    try:
        values = metrics_loss.summary(entry)
        ledger = all(isinstance(entry["ledger"][name], int) for name in LEDGER)
        return entry["status"] == "ok" and bool(values) and ledger and isinstance(entry["ledger"]["flops"], int | float)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError):
        return False


def rows(records: Sequence[Mapping[str, Any]], dead: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One row for each (scenario, learner, model, variant) of pre-training, lowest final loss first."""
    from clbench.report.table import variant

    losses = [entry for entry in records if is_loss(entry)]
    good = [entry for entry in losses if usable(entry)]
    pairs = _Pairs(good)
    groups: dict[tuple[str, str, str, str], list[Mapping[str, Any]]] = {}
    for entry in losses:
        key = (entry["scenario"]["name"], entry["learner"]["name"], entry["model"]["name"], variant(entry))
        groups.setdefault(key, []).append(entry)
    made = [_row(key, sorted(group, key=lambda e: e["seed"]), pairs, set(dead)) for key, group in groups.items()]

    def order(row: dict[str, Any]) -> tuple:
        value = row["final_loss_mean"]
        return (row["scenario"], row["model"], math.inf if value is None else value, row["learner"], row["variant"])

    return sorted(made, key=order)


def _row(key: tuple[str, ...], group: list[Mapping[str, Any]], pairs: _Pairs, dead: set[str]) -> dict[str, Any]:
    from clbench.report.table import mean_std

    done = [entry for entry in group if usable(entry)]
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= dict(zip(("scenario", "learner", "model", "variant"), key, strict=True))
    row |= options(group[0])
    row["manifest"] = str(group[0]["scenario"].get("manifest_sha256", ""))[:8]
    row["marks"] = " ".join(sorted({mark for entry in group for mark in entry.get("marks", [])}))
    row["n_seeds"], row["seeds"] = len(done), " ".join(str(entry["seed"]) for entry in done)
    values = [metrics_loss.summary(entry) | pairs.values(entry) for entry in done]
    for name in SHOWN:
        row[f"{name}_mean"], row[f"{name}_std"] = mean_std([v[name] for v in values if name in v])
    for name in LEDGER:
        column = name if name == "replay_bytes" else f"tokens_{name}"
        row[column] = max((entry["ledger"][name] for entry in done), default=None)
    row["flops"] = max((float(entry["ledger"]["flops"]) for entry in done), default=None)
    row["seconds_mean"] = mean_std([float(e["seconds"].get("total", math.nan)) for e in done])[0]
    row["failed"] = sum(entry["status"] == "failed" for entry in group)
    row["dead"] = sum(entry["run_id"] in dead for entry in group)
    row["running"] = sum(entry["status"] == "running" for entry in group) - row["dead"]
    return row


def options(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a learner that the literature compares, where it has them."""
    learner = entry["config"].get("learner", {})
    replay = learner.get("replay")
    share = replay.get("share") if isinstance(replay, Mapping) else None
    return {"replay": share, **{name: learner.get(name) for name in OPTIONS[1:]}}


class _Pairs:
    """What two or three runs say together: recovery by replay, and the share of forgetting that is the rate's."""

    def __init__(self, records: Sequence[Mapping[str, Any]]):
        self.plain: dict[str, float] = {}
        self.union: dict[str, list[float]] = {}
        self.iid: dict[str, Mapping[str, Any]] = {}
        for entry in records:
            final = metrics_loss.summary(entry)["final_loss"]
            learner = entry["config"]["learner"]
            if not options(entry)["replay"] and learner.get("data", "new") == "new":
                self.plain[_without_replay(entry)] = final
            if learner.get("data") == "union":
                self.union.setdefault(_stream(entry), []).append(final)
            if entry["scenario"].get("iid"):
                self.iid[_first_set(entry)] = entry

    def values(self, entry: Mapping[str, Any]) -> dict[str, float]:
        """`recovery_ratio` and `rate_share`, where the runs to compare with are there."""
        made = {}
        without, union = self.plain.get(_without_replay(entry)), self.union.get(_stream(entry))
        if without is not None and union and options(entry)["replay"]:
            final = metrics_loss.summary(entry)["final_loss"]
            made["recovery_ratio"] = metrics_loss.recovery_ratio(without, final, sum(union) / len(union))
        same = self.iid.get(_first_set(entry))
        if same is not None and not entry["scenario"].get("iid"):
            name = entry["scenario"]["eval_names"][0]
            made["rate_share"] = metrics_loss.rate_share(same["curves"], entry["curves"], name)
        return made


def _without_replay(entry: Mapping[str, Any]) -> str:
    learner = {key: value for key, value in entry["config"]["learner"].items() if key != "replay"}
    return record.digest([learner, entry["config"]["model"], entry["seed"], entry["scenario"]["manifest_sha256"]])


def _stream(entry: Mapping[str, Any]) -> str:
    return record.digest([entry["scenario"]["manifest_sha256"], entry["config"]["model"]])


def _first_set(entry: Mapping[str, Any]) -> str:
    """The same learner, model and seed, and the same first evaluation set under the same budget."""
    stream = entry["scenario"]
    shape = [stream["context"], stream["batch"], stream["experiences"][0]["steps"], stream["eval_names"][0]]
    first = [entry["n"][0], entry["floor"][0], *shape]
    return record.digest([entry["config"]["learner"], entry["config"]["model"], entry["seed"], first])


def to_csv(made: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV text in fixed formats."""
    import pandas as pd

    from clbench.report.table import safe

    frame = pd.DataFrame(made, columns=list(COLUMNS)).astype(object)
    for name in COLUMNS:
        form = safe
        if name == "seconds_mean":
            form = "{:.1f}".format
        elif name in ("gap_area_mean", "gap_area_std", "gap_tokens_mean", "gap_tokens_std"):
            form = "{:.0f}".format
        elif name == "flops":
            form = "{:.4e}".format
        elif name.endswith(("_mean", "_std")):
            form = _number
        frame[name] = ["" if row[name] is None else form(row[name]) for row in made]
    out = io.StringIO()
    frame.to_csv(out, index=False, lineterminator="\n")
    return out.getvalue()


def _number(value: float) -> str:
    text = f"{value:.4f}"
    return "0.0000" if text == "-0.0000" else text


def report(results: pathlib.Path, records: Sequence[Mapping[str, Any]], dead: Sequence[str]) -> list[str]:
    """Write `leaderboard_loss.csv` if there are pre-training runs, or were -> lines for the terminal."""
    path, made = results / "leaderboard_loss.csv", rows(records, dead)
    if not made and not path.exists():
        return []
    record.write_text(path, to_csv(made))
    broken = [e["run_id"] for e in records if is_loss(e) and e["status"] == "ok" and not usable(e)]
    return [table_text(made), "", *(f"problem {name}: its losses cannot be read" for name in broken), f"written {path}"]


def table_text(made: Sequence[Mapping[str, Any]]) -> str:
    """The main columns of each scenario, aligned: nats per token, mean ± standard deviation over seeds."""
    from clbench.report.table import plain

    names = ("final_loss", "learned_loss", "forgetting_after", "regret", "gap_depth")
    head = ("learner", "model", "replay", "variant", "seeds", *names, "Mtokens", "seconds", "marks")
    cells: list[tuple[str, ...]] = [head]
    for row in made:
        lost = "".join(f" +{row[k]} {k}" for k in ("failed", "dead", "running") if row[k])
        numbers = [_pair(row[f"{name}_mean"], row[f"{name}_std"]) for name in names]
        counts = [row[f"tokens_{name}"] or 0 for name in LEDGER[:4]]
        seconds = "-" if row["seconds_mean"] is None else f"{row['seconds_mean']:.1f}"
        share = "-" if row["replay"] is None else f"{row['replay']:g}"
        words = (plain(row["learner"]), plain(row["model"]), share, row["variant"], f"{row['n_seeds']}{lost}")
        cells.append((*words, *numbers, f"{sum(counts) / 1e6:.2f}", seconds, plain(row["marks"])))
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines, scenario = ["  " + _aligned(head, widths)], None
    for row, line in zip(made, cells[1:], strict=True):
        if row["scenario"] != scenario:
            scenario = row["scenario"]
            lines.append(plain(scenario))
        lines.append("  " + _aligned(line, widths))
    return "\n".join(lines)


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(wide) for cell, wide in zip(line, widths, strict=True)).rstrip()


def _pair(mean: float | None, std: float | None) -> str:
    return "-" if mean is None else _number(mean) + ("" if std is None else f"±{std:.4f}")


def closing_text(entry: Mapping[str, Any], path: pathlib.Path) -> str:
    """The loss matrix, the headline numbers and the ledger of a finished run."""
    values, ledger = metrics_loss.summary(entry), entry["ledger"]
    names = (
        "final_loss",
        "learned_loss",
        "forgetting_after",
        "regret",
        "gap_depth",
        "anneal_gain_new",
        "probe_own",
        "probe_seen",
    )
    shown = "   ".join(f"{n} {values[n]:.4f}" for n in names if n in values and math.isfinite(values[n]))
    trained = sum(ledger[name] for name in LEDGER[:4])
    parts = f"branch {(ledger['branch_new'] + ledger['branch_replay']) / 1e6:.2f} M, repeated {ledger['repeated'] / 1e6:.2f} M"
    unit = entry["scenario"].get("unit", "tokens")
    used = f"{trained / 1e6:.2f} M {unit} trained on ({parts}), {ledger['flops']:.2e} FLOPs, {entry['seconds']['total']:.0f} s"
    return f"{matrix_text(entry)}\n\n{shown}\n{used}\nrecord {path}"


def matrix_text(entry: Mapping[str, Any]) -> str:
    """Nats per token after each experience (rows) on each evaluation set (columns), the floor below where it is known."""
    from clbench.report.table import plain

    names = [plain(name)[:14] for name in entry["scenario"]["eval_names"]]
    tokens = entry["tokens"]
    start = metrics_loss.loss_matrix([entry["sum_loss_start"]], tokens)[0]
    after = metrics_loss.loss_matrix(entry["sum_loss"], tokens)
    table = [("before", start), *((str(i + 1), row) for i, row in enumerate(after))]
    if all(value is not None for value in entry["floor"]):
        table.append(("floor", entry["floor"]))
    width = max(7, *(len(name) for name in names)) + 2
    lines = ["after".ljust(8) + "".join(name.rjust(width) for name in names) + "mean".rjust(width)]
    for label, row in table:
        mean = sum(row) / len(names)
        lines.append(label.ljust(8) + "".join(f"{v:.4f}".rjust(width) for v in row) + f"{mean:.4f}".rjust(width))
    return "\n".join(lines)
