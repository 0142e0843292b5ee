"""A measurement as text, and which of its targets are met. Pure functions of the file's content; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from clbench.bench.presets import Preset

Target = dict[str, Any]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be; the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    )


def plain(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of plain values; lists, and what no row has, are left out."""
    names = [n for n in rows[0] if any(row.get(n) is not None and not isinstance(row[n], list) for row in rows)]
    return aligned([names, *([("" if row.get(n) is None else str(row[n])) for n in names] for row in rows)])


def number(value: float | None, digits: int = 1, scale: float = 1.0) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else f"{value / scale:.{digits}f}"


def machine_text(found: Mapping[str, Any]) -> str:
    """What it was measured on."""
    m = found["machine"]
    gpu = f"{m['gpu']}, " if "gpu" in m else ""
    text = f"{gpu}{m['cpu']}, {m['cores']} cores, {m['threads']} threads, torch {m['versions']['torch']}"
    load = m["load"]
    if load is not None and load > 0.5:
        text += f"\nother work was going on (load {load:.1f} at the start): rates and ratios are not this machine's best"
    return text


def cases_text(found: Mapping[str, Any], targets: Sequence[Target]) -> str:
    """Rates, cases, phases, sweep, targets."""
    parts = [machine_text(found), rates_text(found), aligned(_case_rows(found)), phases_text(found)]
    if sweep := found.get("sweep"):
        text = f"sweep of {sweep['seeds']} seeds x {', '.join(sweep['learners'])}: {sweep['seconds']:.1f} s"
        if "ratio" in sweep:
            text += f", naive {sweep['naive_seconds']:.1f} s (one seed of each measured): {sweep['ratio']:.1f}x"
        parts.append(text)
    if moved := precision_rows(found):
        rows = [("bf16 against fp32", "fp32", "bf16", "moved", "standard error")]
        rows += [(r["case"], *(f"{100 * r[k]:.2f}" for k in ("fp32", "bf16", "moved", "error"))) for r in moved]
        parts.append(aligned(rows))
    if targets:
        rows = [("target", "wanted", "found", "met")]
        rows += [(t["what"], t["wanted"], t["found"], "yes" if t["met"] else "NO") for t in targets]
        parts.append(aligned(rows))
    return "\n\n".join(parts)


def rates_text(found: Mapping[str, Any]) -> str:
    """Images per second at best, and the share of the matrix peak of the precision."""
    rows: list[tuple[str, ...]] = [
        ("images/s", "precision", "forward", "adapter", "full", "of peak", "arithmetic of the best forward")
    ]
    for model, by_precision in found["rates"].items():
        for precision, paths in by_precision.items():
            best: dict[str, tuple[float, str]] = {}
            for path, measured in paths.items():
                for kind in ("forward", "adapter", "full"):
                    for rate in measured.get(kind, {}).values():
                        best[kind] = max(best.get(kind, (0.0, "")), (rate, path))
            peak = max(found["peak_flops"][precision].values())
            flop = next(iter(paths.values()))["flop"]
            shares = " / ".join(f"{100 * rate * flop[kind] / peak:.0f}" for kind, (rate, _) in best.items())
            cells = [number(best[k][0]) if k in best else "-" for k in ("forward", "adapter", "full")]
            rows.append((model, precision, *cells, f"{shares} %", best["forward"][1]))
    peaks = {way: rate for by in found["peak_flops"].values() for way, rate in by.items()}
    text = ", ".join(f"{way} {rate / 1e9:.0f}" for way, rate in peaks.items())
    return f"{aligned(rows)}\nmatrix products, GFLOP/s: {text}"


def _case_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    head = (
        "case",
        "precision",
        "seconds",
        "floor",
        "share",
        "naive",
        "ratio",
        "train",
        "forward",
        "naive fwd",
        "MB",
        "naive MB",
    )
    rows: list[tuple[str, ...]] = [head]
    for r in found["cases"]:
        old = r.get("naive") or {}
        share = f"{100 * r['share']:.0f} %" if "share" in r else "-"
        memory = [number(r["peak_bytes"], 0, 1e6), number(old.get("peak_bytes"), 0, 1e6)]
        times = [number(r["seconds"]), number(r.get("floor")), share, number(old.get("seconds")), number(r.get("ratio"))]
        passes = [str(r["passes"]["train"]), str(r["passes"]["eval"]), str(old["passes"]["eval"]) if old else "-"]
        rows.append((r["case"], r["precision"], *times, *passes, *memory))
    return rows


def phases_text(found: Mapping[str, Any]) -> str:
    """Seconds of each phase of each case. `learn` holds the others but `evaluate`."""
    lines = ["seconds by phase"]
    for r in found["cases"]:
        inner = ", ".join(f"{name} {seconds:.2f}" for name, seconds in sorted(r["phases"].items()))
        lines.append(f"  {r['case']} {r['precision']}: {inner}")
        if "naive" in r and r["precision"] == found["cases"][0]["precision"]:
            inner = ", ".join(f"{name} {seconds:.2f}" for name, seconds in sorted(r["naive"]["phases"].items()))
            lines.append(f"  {r['case']} naive: {inner}")
    return "\n".join(lines)


def precision_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Last accuracy of each case in both precisions, how far it moved, and the standard error of an accuracy on n images."""
    by = {(r["case"], r["precision"]): r for r in found["cases"]}
    out = []
    for case in dict.fromkeys(r["case"] for r in found["cases"]):
        a, b = by.get((case, "fp32")), by.get((case, "bf16"))
        if a is not None and b is not None:
            p = a["accuracy"]
            error = math.sqrt(p * (1 - p) / a["n"])
            out.append({"case": case, "fp32": p, "bf16": b["accuracy"], "moved": abs(b["accuracy"] - p), "error": error})
    return out


def targets_of(preset: Preset, found: Mapping[str, Any]) -> list[Target]:
    """What the preset wants against what was found."""
    out: list[Target] = []

    def add(what: str, wanted: str, value: str, met: bool) -> None:
        out.append({"what": what, "wanted": wanted, "found": value, "met": met})

    cases = {c.name: c for c in preset.cases}
    for r in found["cases"]:
        case, name = cases[r["case"]], f"{r['case']}, {r['precision']}"
        if preset.share is not None and "share" in r:
            add(f"{name}: share of the floor", f"{preset.share:.0%}", f"{r['share']:.0%}", r["share"] >= preset.share)
        least = (case.least_ratio or {}).get(r["precision"])
        if least is not None and "ratio" in r:
            add(f"{name}: times faster than naive", f"{least:g}", f"{r['ratio']:.1f}", r["ratio"] >= least)
        if case.most_seconds is not None:
            add(f"{name}: seconds", f"{case.most_seconds:g}", f"{r['seconds']:.0f}", r["seconds"] <= case.most_seconds)
        old = (r.get("naive") or {}).get("peak_bytes")
        if preset.share is not None and old and r["peak_bytes"]:
            pair = (f"{old / 1e6:.0f} MB", f"{r['peak_bytes'] / 1e6:.0f} MB")
            add(f"{name}: memory, at most naive", *pair, r["peak_bytes"] <= old)
    for row in precision_rows(found) if preset.share is not None else ():
        pair = (f"{100 * row['error']:.2f}", f"{100 * row['moved']:.2f}")
        add(f"{row['case']}: bf16 moves accuracy less than its error", *pair, row["moved"] < row["error"])
    for kind, least in (preset.rates or {}).items():
        for model, by_precision in found["rates"].items():
            rate = max(v for path in by_precision[preset.precisions[-1]].values() for v in path[kind].values())
            add(f"{model}: {kind}, images/s", f"{least:.0f}", f"{rate:.0f}", rate >= least)
    if "ratio" in found.get("sweep", {}):
        ratio = found["sweep"]["ratio"]
        add("sweep: times faster than naive", f"{preset.sweep_ratio:g}", f"{ratio:.1f}", ratio >= preset.sweep_ratio)
    return out
