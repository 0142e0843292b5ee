"""Trackers: the numbers of a run, experience by experience, shown elsewhere while it runs. The record stays the source.

`track=tensorboard | wandb | mlflow` imports that package and no other. All of them write into the run's own folder and ask no
network, unless the user's own environment says otherwise (WANDB_MODE, MLFLOW_TRACKING_URI). A tracker that fails is left out
with one warning: the run goes on.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from clbench.interfaces import UserError

log = logging.getLogger("clbench")
Values = Mapping[str, float]
PROJECT = "clbench"


@dataclass
class Tracker:
    """Takes numbers by step until it is closed. `write` and `end` are None where nothing is tracked, or no longer."""

    kind: str = "none"
    write: Callable[[int, dict[str, float]], Any] | None = None
    end: Callable[[], Any] | None = None

    def log(self, step: int, values: Values) -> None:
        """Show the finite ones of `values` at a step."""
        if self.write is not None:
            shown = {re.sub(r"[^\w\-. :/]", "_", name): float(v) for name, v in values.items() if math.isfinite(v)}
            self._try(lambda write=self.write: write(step, shown))

    def close(self) -> None:
        """Write what is left and let go of everything; once."""
        end, self.write, self.end = self.end, None, None
        if end is not None:
            self._try(end)

    def _try(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:  # whatever a tracker raises, the run is worth more
            self.write = None
            reason = (str(error).splitlines() or [""])[0][:200]
            log.warning("track=%s failed and is left out: %s: %s", self.kind, type(error).__name__, reason)


def open_tracker(kind: str, folder: pathlib.Path, entry: Mapping[str, Any], first: int | None = None) -> Tracker:
    """A tracker for a run: `folder` is its own, `entry` its record so far, `first` the step that a resumed one goes on with.

    Raises `UserError` for an unknown kind and for a package that is not installed; whatever else goes wrong is a warning.
    """
    if kind == "none":
        return Tracker()
    check(kind)
    tracker = Tracker(kind)

    def start() -> None:
        tracker.write, tracker.end = TRACKERS[kind](folder, entry, first)

    tracker._try(start)
    return tracker


def check(kind: str) -> None:
    """Import the package of a tracker, or raise `UserError` with the command that installs it."""
    if kind == "none":
        return
    if kind not in TRACKERS:
        raise UserError(f"track must be one of none, {', '.join(TRACKERS)}, got {kind!r}")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        importlib.import_module(PACKAGES[kind])
    except ImportError as error:
        raise UserError(f"track={kind} needs a package that is not installed: pip install 'clbench[track]' ({error})") from None


def params(entry: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """The configuration of a run as dotted keys and plain values, with its names and hashes."""
    made = {"run_id": entry["run_id"], "manifest": entry["scenario"]["manifest_sha256"], **_flat(entry["config"])}
    return {key: value if isinstance(value, str | int | float | bool) else json.dumps(value) for key, value in made.items()}


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in node.items():
        made |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return made


def title(entry: Mapping[str, Any]) -> str:
    """What a run is called in a list of runs."""
    return f"{entry['scenario']['name']} {entry['learner']['name']} {entry['model']['name']} seed {entry['seed']}"


Opened = tuple[Callable[[int, dict[str, float]], Any], Callable[[], Any]]


def _tensorboard(folder: pathlib.Path, entry: Mapping[str, Any], first: int | None) -> Opened:
    """Event files in `folder`/tensorboard; a resumed run hides what the killed one wrote from the same step on."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=first or 0)
    if first is None:
        lines = [f"    {key}: {value}" for key, value in params(entry).items()]
        writer.add_text("config", "\n".join([f"{title(entry)}\n", *lines]), 0)

    def write(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name.replace(" ", "_"), value, step)
        writer.flush()

    return write, writer.close


def _wandb(folder: pathlib.Path, entry: Mapping[str, Any], first: int | None) -> Opened:
    """A run under the run's own id, offline in `folder`/wandb unless WANDB_MODE says otherwise; `wandb sync` sends it."""
    import wandb  # type: ignore[import-not-found]

    folder.mkdir(parents=True, exist_ok=True)
    run: Any = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=entry["run_id"],
        name=title(entry),
        mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
        dir=str(folder),
        config=params(entry),
        resume=None if first is None else "allow",
        settings=wandb.Settings(silent=True, console="off"),
    )
    return lambda step, values: run.log(values, step=step), run.finish


def _mlflow(folder: pathlib.Path, entry: Mapping[str, Any], first: int | None) -> Opened:
    """A run in `folder`/mlflow.db unless MLFLOW_TRACKING_URI names a server; a resumed run is found by its run id.

    The client is used without mlflow's global active run, so nothing is left behind for the next job of a process.
    """
    from mlflow.entities import Metric, Param  # type: ignore[import-not-found]
    from mlflow.tracking import MlflowClient  # type: ignore[import-not-found]

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    own = not os.environ.get("MLFLOW_TRACKING_URI")
    client: Any = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}" if own else None)
    known = client.get_experiment_by_name(PROJECT)
    place = {"artifact_location": (folder / "mlflow-artifacts").as_uri()} if own else {}
    experiment = known.experiment_id if known is not None else client.create_experiment(PROJECT, **place)
    wanted = f"tags.`clbench.run_id` = '{entry['run_id']}'"
    found = client.search_runs([experiment], filter_string=wanted, max_results=1)
    if found and (first is not None or found[0].info.status == "RUNNING"):  # the latter: killed before its first step
        run_id = found[0].info.run_id
        client.set_terminated(run_id, "RUNNING")
    else:
        tags = {"clbench.run_id": entry["run_id"]}
        run_id = client.create_run(experiment, tags=tags, run_name=title(entry)).info.run_id
        given = [Param(re.sub(r"[^\w\-. :/]", "_", key), str(value)[:500]) for key, value in params(entry).items()]
        for i in range(0, len(given), 100):
            client.log_batch(run_id, params=given[i : i + 100])

    def write(step: int, values: dict[str, float]) -> None:
        now = int(1000 * time.time())
        made = [Metric(name, value, now, step) for name, value in values.items()]
        for i in range(0, len(made), 1000):
            client.log_batch(run_id, metrics=made[i : i + 1000])

    return write, lambda: client.set_terminated(run_id)


TRACKERS: dict[str, Callable[[pathlib.Path, Mapping[str, Any], int | None], Opened]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}  # neither reports about its own use
PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
