"""Every Eval Ever: rows of the leaderboard of accuracies in its form, and its files as a table.

The form is `eval.schema.json`, version 0.2.1, of evaleval/every_eval_ever (read 2026-12). A document is one row of ours:
`model_info` is learner, network and setting together (what was trained there is what is scored), each number is one of
`evaluation_results`, its spread that over seeds. Records, with their counts, do not fit in: `additional_details` says which
they are. So a document of ours read again gives the numbers of the row, not the records.

Only numbers between -1 and 1 are written: the form wants a smallest and a largest value.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clbench import __version__
from clbench.evaluation import metrics
from clbench.interfaces import UserError
from clbench.report.board import Group
from clbench.report.columns import SHOWN
from clbench.report.formats import Table
from clbench.report.travel.submission import table_file

VERSION = "0.2.1"
LOWER = ("forgetting",)
SIGNED = ("forgetting", "bwt", "plasticity")  # below 0 too
COLUMNS = ("source", "library", "model", "evaluation", "data", "score", "deviation", "n", "better", "file")
_NEEDED = ("schema_version", "evaluation_id", "retrieved_timestamp", "source_metadata", "model_info", "eval_library")


def document(group: Group, organization: str, now: int) -> dict[str, Any]:
    """One row as a document. `now`: seconds since 1970, when it was made."""
    row = group.row
    done = [run for run in group.runs if run.usable and run.status == "ok"]
    first = done[0]
    name = table_file(f"{row['learner']}-{row['model']}-{row['variant']}")
    setting = {key: json.dumps(value) for key, value in sorted(first.settings.items())}
    facts = {
        "manifest_sha256": first.stream,
        "marks": row["marks"],
        "seeds": row["seeds"],
        "records": " ".join(r.run_id for r in done),
    }
    return {
        "schema_version": VERSION,
        "evaluation_id": f"clbench_{row['scenario']}/clbench/{name}/{now}",
        "retrieved_timestamp": str(now),
        "source_metadata": {
            "source_name": "clbench",
            "source_type": "evaluation_run",
            "source_organization_name": organization,
            "evaluator_relationship": "other",
            "additional_details": {key: str(value) for key, value in facts.items()},
        },
        "eval_library": {"name": "clbench", "version": __version__},
        "model_info": {
            "name": f"{row['learner']} on {row['model']}",
            "id": f"clbench/{name}",
            "additional_details": {"learner": row["learner"], "model": row["model"], "variant": row["variant"], **setting},
        },
        "evaluation_results": [_result(group, number) for number in SHOWN if row[f"{number}_mean"] is not None],
    }


def _result(group: Group, name: str) -> dict[str, Any]:
    row = group.row
    std, n = row[f"{name}_std"], int(row["n_seeds"])
    details: dict[str, Any] = {"score": row[f"{name}_mean"]}
    if std is not None and math.isfinite(std):
        error = {"value": std / math.sqrt(n), "method": "analytic, over seeds"}
        details["uncertainty"] = {"standard_deviation": std, "standard_error": error, "num_samples": n}
    return {
        "evaluation_name": f"{row['scenario']}: {name}",
        "source_data": {"dataset_name": row["scenario"], "source_type": "other"},
        "metric_config": {
            "evaluation_description": metrics.FORMULAS[name].text,
            "lower_is_better": name in LOWER,
            "score_type": "continuous",
            "min_score": -1 if name in SIGNED else 0,
            "max_score": 1,
            "additional_details": {"number": name, "spread": "over seeds, not over samples"},
        },
        "score_details": details,
    }


def write(groups: Sequence[Group], folder: Path, organization: str, now: int) -> list[Path]:
    """A file for each row, where the database of that project has them: BENCHMARK/DEVELOPER/MODEL/UUID.json."""
    made = []
    for group in groups:
        if not group.row["n_seeds"]:
            continue
        found = document(group, organization, now)
        benchmark, developer, model, _ = found["evaluation_id"].split("/")
        text = json.dumps(found, indent=2, allow_nan=False) + "\n"
        path = folder / table_file(benchmark) / developer / model / f"{uuid.uuid5(uuid.NAMESPACE_URL, text)}.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None
        made.append(path)
    return made


def read(paths: Sequence[Path]) -> Table:
    """Files, or folders of them, as one table: a row for each score, of whatever library. `UserError` names file and key."""
    files = [file for path in paths for file in (sorted(path.rglob("*.json")) if path.is_dir() else [path])]
    if not files:
        raise UserError(f"no JSON file in {', '.join(map(str, paths))}")
    return Table("external", "", COLUMNS, [row for file in files for row in _rows(file)], digits={"score": 4, "deviation": 4})


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())[:160]}") from None
    for key in (*_NEEDED, "evaluation_results"):
        if not isinstance(found, Mapping) or key not in found:
            raise UserError(f"{file} is not of Every Eval Ever: {key} is missing")
    try:
        for i, result in enumerate(found["evaluation_results"]):
            where = f"evaluation_results[{i}]"
            score = result["score_details"]["score"]
            if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
                raise UserError(f"{file}: {where}.score_details.score must be a finite number, got {str(score)[:40]!r}")
            spread = result["score_details"].get("uncertainty") or {}
            yield {
                "source": found["source_metadata"]["source_organization_name"],
                "library": f"{found['eval_library']['name']} {found['eval_library']['version']}",
                "model": found["model_info"]["id"],
                "evaluation": result["evaluation_name"],
                "data": result["source_data"]["dataset_name"],
                "score": float(score),
                "deviation": spread.get("standard_deviation"),
                "n": spread.get("num_samples"),
                "better": "lower" if result["metric_config"]["lower_is_better"] else "higher",
                "file": file.name,
            }
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not of Every Eval Ever: {type(error).__name__}: {error}") from None
