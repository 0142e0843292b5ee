"""Answers of a run, sample by sample (`save_predictions=true`): RESULTS_DIR/predictions/RUN_ID.npz, beside the records.

Arrays, i the row of the matrix and j the evaluation set, both from 0; classes are renumbered in order of first appearance:
    about          JSON text: form, run_id, sets (their names)
    ids_j          [N] int64, the data set's numbers of the samples      y_j  [N] int32, their classes
    classes_i_j    [N, up to 5] int32, the classes with the highest scores, highest first; the first is the answer
    scores_i_j     [N, up to 5] float32, their scores
Where a set discloses its task, the task's classes alone are answered with. Sets that were not evaluated have no arrays.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clbench.interfaces import UserError

FORM = 1
TOP = 5


@dataclass(frozen=True)
class Predictions:
    """What the file of a run holds; `answers[i, j]` are the classes [N, up to 5], `scores[i, j]` their scores."""

    run_id: str
    sets: tuple[str, ...]
    ids: tuple[np.ndarray, ...]
    y: tuple[np.ndarray, ...]
    answers: Mapping[tuple[int, int], np.ndarray]
    scores: Mapping[tuple[int, int], np.ndarray]

    def right(self, row: int, place: int) -> np.ndarray | None:
        """Which samples of a set were answered right in a row [N]; None where it was not evaluated."""
        found = self.answers.get((row, place))
        return None if found is None else found[:, 0] == self.y[place]


def path_of(results: Path, run_id: str) -> Path:
    """Where a run's answers lie."""
    return results / "predictions" / f"{run_id}.npz"


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays, compressed, in one move. `UserError` where the disk is full."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"save_predictions: cannot write {path}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file. `UserError` where it is none, or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} does not hold predictions: {error}") from None


def read(path: Path) -> Predictions:
    """The answers of a run. `UserError` where the file is none of this form."""
    arrays = load(path)
    try:
        about = json.loads(str(arrays.pop("about")))
        if about["form"] != FORM:
            raise UserError(f"{path} has form {about['form']} of predictions; this clbench reads {FORM}")
        places = range(len(about["sets"]))
        at = {name: tuple(int(part) for part in name.split("_")[1:]) for name in arrays}
        answers = {(place[0], place[1]): arrays[n] for n, place in at.items() if n.startswith("classes_")}
        scores = {(place[0], place[1]): arrays[n] for n, place in at.items() if n.startswith("scores_")}
        ids, y = tuple(arrays[f"ids_{j}"] for j in places), tuple(arrays[f"y_{j}"] for j in places)
        if any(found.shape[:1] != y[j].shape for (_, j), found in answers.items()):
            raise UserError(f"{path} is damaged: answers and labels differ in number")
    except (KeyError, IndexError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} does not hold predictions: {type(error).__name__}: {error}") from None
    return Predictions(str(about["run_id"]), tuple(about["sets"]), ids, y, answers, scores)
