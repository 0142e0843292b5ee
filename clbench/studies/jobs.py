"""The runs of a study: each in a process of its own, skipped where it is done -> its record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clbench.run.subprocess_job import run_alone
from clbench.tuning.trials import finished, work


def record_of(job: Mapping[str, Any], command: list[str]) -> dict[str, Any] | str:
    """The record of a resolved configuration's run, done now or before; or in one line why there is none.

    Ctrl-C ends the study (KeyboardInterrupt) when the run has written its snapshot.
    """
    results = Path(str(job["results_dir"])).expanduser().resolve()
    ended = run_alone(work, {**job, "on_error": "record"}, command, None)
    if ended["stopped"] or ended["status"] == "interrupted":
        raise KeyboardInterrupt
    entry = finished(results, ended)
    return entry if entry is not None else (ended["text"].splitlines() or ["?"])[0]
