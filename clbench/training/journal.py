"""Where a run writes down how far it is, so that a killed run goes on bit-identically.

Files in the run's own folder, each written to a temporary name and moved with `os.replace`:
`experience.pt` (the state after the last finished experience) and `fit-<k>.pt` (the k-th `fit` call of the current one:
its middle, or its end). At most one plus the number of `fit` calls in one `learn`; the latter go when the experience ends.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import time
from typing import Any

import torch

from clbench.interfaces import UserError
from clbench.training import shards
from clbench.training.parallel import ALONE, Group


def save_atomic(path: pathlib.Path, state: Any) -> None:
    """Write a state with `torch.save`; a full disk or an unwritable folder raises `UserError` and leaves the old file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        full = shutil.disk_usage(path.parent).free < temporary.stat().st_size if temporary.exists() else False
        temporary.unlink(missing_ok=True)
        reason = "No space left on device" if full else str(error).splitlines()[0]  # torch hides the system's own words
        raise UserError(f"cannot write the checkpoint {path}: {reason}") from error


class Journal:
    """Snapshots of the run in `folder`; `Journal()` keeps none. `seconds` is the least time between two snapshots of a fit.

    Of several processes in `group` the first writes and all read; tensors that are spread over them are written by all.
    `data` names the stream (its manifest's SHA-256): counters and weights of another one are refused.
    """

    def __init__(self, folder: pathlib.Path | None = None, seconds: float = 60.0, group: Group = ALONE, data: str = ""):
        self.folder, self.seconds, self.group, self.data = folder, seconds, group, data
        self.calls, self.experience = 0, -1
        self.last = time.monotonic()
        if folder is not None and group.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob("*.tmp"):
                left.unlink()

    def begin(self, experience: int) -> None:
        """A new `learn` starts: `fit` calls are numbered from 0."""
        self.calls, self.experience = 0, experience

    def next_call(self, name: str) -> str:
        """The key of the next `fit` call."""
        self.calls += 1
        return f"fit-{self.calls - 1}"

    def load(self, key: str) -> dict[str, Any] | None:
        """The snapshot under a key, or None. `UserError` where it belongs to another stream."""
        path = None if self.folder is None else self.folder / f"{key}.pt"
        if path is None or not path.exists():
            return None
        state = torch.load(path, map_location="cpu", weights_only=True)
        if (data := state.pop("data", "")) and self.data and data != self.data:
            raise UserError(
                f"the saved run read other data: its manifest is {data[:12]}, not {self.data[:12]}; force=true starts anew"
            )
        if state["experience"] != self.experience and key != "experience":
            return None
        return shards.load(path.parent, state, self.group) if "shards" in state else state

    def save(self, key: str, state: dict[str, Any]) -> None:
        """Write a snapshot now."""
        if self.folder is not None:
            if self.group.kind == "fsdp":
                state = shards.save(self.folder, key, state, self.group)
            if self.group.rank == 0:
                state = {**state, "data": self.data}
                save_atomic(self.folder / f"{key}.pt", state)
                shards.remove(self.folder, key, besides=state.get("shards"))
        self.last = time.monotonic()

    def due(self) -> bool:
        """Whether enough time has passed for another snapshot."""
        return self.folder is not None and self.group.rank == 0 and time.monotonic() - self.last >= self.seconds

    def finish_experience(self, state: dict[str, Any]) -> None:
        """Write the state after an experience, then drop the snapshots of its `fit` calls."""
        self.save("experience", state)
        self._drop("fit-*")

    def clear(self) -> None:
        """The run is over: its record says everything."""
        self._drop("*")

    def _drop(self, pattern: str) -> None:
        if self.folder is not None and self.group.rank == 0:
            for path in self.folder.glob(f"{pattern}.pt"):
                path.unlink()
            shards.remove(self.folder, pattern)
