"""`save_predictions=true`: a part after every evaluation in the run's folder, joined beside the record when the run is done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clbench.interfaces import UserError
from clbench.records import predictions

if TYPE_CHECKING:
    from clbench.run.runner import Job


def _part(job: Job, row: int) -> Path:
    return job.folder / "predictions" / f"{row}.npz"


def place(job: Job) -> Path:
    """The file of a run's answers."""
    return predictions.path_of(job.results, job.run_id)


def keep(job: Job, row: int, kept: Mapping[int, Sequence[tuple[Tensor, Tensor]]], sets: Sequence[Any]) -> None:
    """Write the answers of one evaluation: (scores [B, K], labels [B]) of the batches of each set, by its place."""
    arrays: dict[str, np.ndarray] = {}
    for j, parts in kept.items():
        scores = torch.cat([z for z, _ in parts])
        if sets[j].task is not None:
            own = torch.tensor(sorted(sets[j].classes))
            values, places = _top(scores[:, own])
            classes = own[places]
        else:
            values, classes = _top(scores)
        arrays[f"classes_{row}_{j}"] = classes.to(torch.int32).numpy()
        arrays[f"scores_{row}_{j}"] = values.to(torch.float32).numpy()
    predictions.write(_part(job, row), arrays)


def _top(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The highest scores and their places, highest first; the first is what arg-max says, also where scores are equal."""
    order = scores.sort(dim=1, descending=True, stable=True)
    return order.values[:, : predictions.TOP], order.indices[:, : predictions.TOP]


def check(job: Job, rows: int) -> None:
    """`UserError` where a run goes on whose first `rows` evaluations were not kept."""
    if missing := [row for row in range(rows) if not _part(job, row).exists()]:
        raise UserError(
            f"save_predictions: the run that goes on here did not save the answers after experience {missing[0] + 1}; "
            "force=true starts anew"
        )


def join(job: Job, rows: int, sets: Sequence[Any]) -> str:
    """Join the parts beside the record -> SHA-256 of the file."""
    about = {"form": predictions.FORM, "run_id": job.run_id, "sets": [one.name for one in sets]}
    arrays = {"about": np.array(json.dumps(about))}
    for j, (one, entry) in enumerate(zip(sets, job.scenario.manifest.evals, strict=True)):
        arrays |= {f"ids_{j}": np.asarray(entry.ids, np.int64), f"y_{j}": np.asarray(one.data.y, np.int32)}
    for row in range(rows):
        arrays |= predictions.load(_part(job, row))
    predictions.write(place(job), arrays)
    shutil.rmtree(_part(job, 0).parent, ignore_errors=True)
    return predictions.sha256(place(job))
