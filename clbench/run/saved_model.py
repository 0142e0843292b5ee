"""`save_model=true`: the network as a run leaves it, on disk, in a form that `model.weights=...` takes.

    RUNS/<run id>/model.safetensors              networks of images
    RUNS/<run id>/model/{config.json, model.safetensors}    decoders, as GPT-NeoX checkpoints

Heads and parameter-efficient modules belong to the learner and are not in it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from clbench.interfaces import UserError
from clbench.models import checkpoint
from clbench.models.decoder import Decoder
from clbench.models.weights import state_sha256

if TYPE_CHECKING:
    from clbench.run.runner import Job

log = logging.getLogger("clbench")


def check(wanted: bool, parallel: str) -> None:
    """`UserError` where no process holds the whole network."""
    if wanted and parallel == "fsdp":
        raise UserError("save_model=true needs parallel=ddp or none: under fsdp no process holds the whole network")


def place(job: Job) -> Path:
    """The file or folder of a run's network."""
    return job.folder / ("model" if isinstance(job.model, Decoder) else "model.safetensors")


def save(job: Job) -> Path:
    """Write the network of a finished run, whole or not at all -> where. `UserError` where the disk is full."""
    path, state = place(job), _state(job.model)
    config = checkpoint.config_of(vars(job.model.shape)) if isinstance(job.model, Decoder) else None
    write_whole(state, path, config=config)
    if state_sha256(state) == job.model.identity["state_sha256"]:
        learner = type(job.learner).__name__
        log.info("save_model: %s trained nothing of the network itself; the file holds it as it began", learner)
    return path


def _state(model: Any) -> dict[str, Tensor]:
    """The network's tensors under the names that its weights have: copies, on the CPU."""
    net = getattr(model, "net", model)
    net = getattr(net, "own", net)
    return {name: value.detach().cpu().contiguous().clone() for name, value in net.state_dict().items()}


def write_whole(
    state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None, config: dict[str, Any] | None = None
) -> None:
    """Write tensors to a safetensors file, or with a `config` into a folder beside it, whole or not at all.

    `UserError` where it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if config is not None:
            part.mkdir(parents=True, exist_ok=True)
            (part / "config.json").write_text(json.dumps(config, indent=1) + "\n")
            _write(state, part / checkpoint.SINGLE, metadata)
            shutil.rmtree(path, ignore_errors=True)
        else:
            part.parent.mkdir(parents=True, exist_ok=True)
            _write(state, part, metadata)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"save_model: cannot write {path}: {error.strerror or error}") from None


def _write(state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(state, str(path), metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from None
