"""The options that every run has (`conf/run.yaml`): what each may be."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clbench.config.signatures import nearest
from clbench.interfaces import UserError
from clbench.training import torchrun

MACHINE = (  # what may differ from machine to machine, and is no part of a run's identity
    "device",
    "num_threads",
    "arithmetic",
    "results_dir",
    "data_root",
    "download",
    "force",
    "checkpoint_seconds",
    "eval_batch_size",
    "micro_batch",
    "compile",
    "parallel",
    "feature_store",
    "feature_store_gb",
    "on_error",
    "save_model",
    "save_predictions",
    "gradient_norms",
    "track",
    "machine",
    "sweep",
    "names",
    "manifest_sha256",
)
OPTIONS: dict[str, tuple[str, Any]] = {
    "seed": ("a whole number from 0", lambda v: whole(v, 0)),
    "device": ("auto, cpu, cuda, cuda:N or mps", lambda v: re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", str(v))),
    "precision": ("fp32 or bf16", lambda v: v in ("fp32", "bf16")),
    "num_threads": ("auto or a whole number from 1", lambda v: v == "auto" or whole(v, 1)),
    "arithmetic": (
        "auto, reference, or highest, high or medium with +fused or +explicit, and +tail and +channels_last or not",
        lambda v: re.fullmatch(r"auto|reference|(highest|high|medium)\+(fused|explicit)(\+tail)?(\+channels_last)?", str(v)),
    ),
    "results_dir": ("a folder", lambda v: isinstance(v, str | int | float) and str(v) and not isinstance(v, bool)),
    "data_root": ("a folder or null", lambda v: v is None or isinstance(v, str)),
    "download": ("true or false", lambda v: isinstance(v, bool)),
    "force": ("true or false", lambda v: isinstance(v, bool)),
    "checkpoint_seconds": (
        "a number of seconds from 0, or null for none",
        lambda v: v is None or (isinstance(v, int | float) and not isinstance(v, bool) and v >= 0),
    ),
    "eval_batch_size": ("a whole number from 1", lambda v: whole(v, 1)),
    "micro_batch": ("a whole number from 1 or null", lambda v: v is None or whole(v, 1)),
    "compile": ("true or false", lambda v: isinstance(v, bool)),
    "parallel": (f"one of {', '.join(torchrun.KINDS)}", lambda v: v in torchrun.KINDS),
    "optimizer_state": ("fresh or keep", lambda v: v in ("fresh", "keep")),
    "feature_store": ("auto, on or off", lambda v: v in ("auto", "on", "off")),
    "feature_store_gb": (
        "a number from 0.001",
        lambda v: isinstance(v, int | float) and not isinstance(v, bool) and v >= 0.001,
    ),
    "save_model": ("true or false", lambda v: isinstance(v, bool)),
    "save_predictions": ("true or false", lambda v: isinstance(v, bool)),
    "gradient_norms": ("none, l1 or l2", lambda v: v in ("none", "l1", "l2")),
    "continues": ("the path of a record or null", lambda v: v is None or (isinstance(v, str) and v)),
    "manifest_sha256": (
        "a SHA-256 (64 hexadecimal digits) or null",
        lambda v: v is None or re.fullmatch(r"[0-9a-f]{64}", str(v)),
    ),
    "track": ("none, tensorboard, wandb or mlflow", lambda v: v in ("none", "tensorboard", "wandb", "mlflow")),
    "on_error": ("record or raise", lambda v: v in ("record", "raise")),
}


@dataclass(frozen=True)
class RunOptions:
    """The options of a run in their types: what `run/` reads instead of the configuration.

    num_threads         "auto": as many as are fastest here
    checkpoint_seconds  between two snapshots inside an experience; infinity: none
    micro_batch         sequences that pass the model at once; None: the whole batch
    """

    seed: int
    results: Path
    device: str = "auto"
    precision: str = "fp32"
    num_threads: int | str = "auto"
    arithmetic: str = "auto"
    force: bool = False
    checkpoint_seconds: float = math.inf
    eval_batch_size: int = 128
    micro_batch: int | None = None
    compile: bool = False
    parallel: str = "auto"
    optimizer_state: str = "fresh"
    feature_store: str = "off"
    feature_store_gb: float = 8
    save_model: bool = False
    save_predictions: bool = False
    gradient_norms: Literal["none", "l1", "l2"] = "none"
    continues: Path | None = None
    manifest_sha256: str | None = None
    track: str = "none"
    on_error: str = "record"

    @staticmethod
    def of(config: Mapping[str, Any]) -> RunOptions:
        """The options of a configuration. `UserError` names the first that cannot be."""
        for _, wrong in wrong_options(config):
            raise UserError(wrong)
        given = {name: config[name] for name in RunOptions.__dataclass_fields__ if name in config}
        if given.get("checkpoint_seconds", 0) is None:
            given["checkpoint_seconds"] = math.inf
        if given.get("continues") is not None:
            given["continues"] = Path(given["continues"]).expanduser()
        return RunOptions(**given, results=Path(str(config["results_dir"])).expanduser().resolve())


def whole(value: Any, least: int) -> bool:
    """Whether a value is a whole number from `least`; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def wrong_options(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(option, what is wrong with it) of every run option that cannot be."""
    known = (*OPTIONS, "scenario", "learner", "model", "names")
    for name in config:
        if name not in known:
            yield name, f"no option '{name}'{nearest(name, known)}"
    for name, (wanted, fits) in OPTIONS.items():
        if name in config and not fits(config[name]):
            yield name, f"{name} must be {wanted}, got {config[name]!r}"
