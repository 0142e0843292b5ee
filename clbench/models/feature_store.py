"""Features of frozen networks on disk: computed once, used by every learner, seed, class order and job of a sweep.

An entry belongs to a *group*, the SHA-256 of all that its value depends on: weights, values of the modules at
work, preprocessing, data set, arithmetic (precision, kernels, threads, processor, versions). Within a group it is found by
sample id. So nothing ever has to be thrown away because it is wrong, only because room is needed.

    FOLDER/<group>/<sha256 of the content, 24 digits>.npy    rows (id int64, x float32 [D]), memory-mapped; never changed
    FOLDER/<group>/used                                       its time says when the group was last used
    FOLDER/lock                                               held while groups are removed

Many jobs may read and write at once: files appear whole (`os.replace`) and are never changed; a sample that two jobs computed
is there twice, with the same value. A file whose content does not fit its name is ignored and removed.

That a value is the same whatever batch it was computed in is *measured* (`same_in_any_batch`); where it is not, features from
another batch could move a result in its last digits, so `feature_store=auto` leaves the store off there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import pathlib
import platform
import secrets
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clbench.interfaces import UserError
from clbench.streams.scenario import Scenario

log = logging.getLogger("clbench")
PENDING = 4096  # rows of a group that wait in memory for a file of their own
MODES = ("auto", "on", "off")
LEAST_GB = 0.001


def default_folder() -> pathlib.Path:
    """`$CLBENCH_CACHE/features`, else `clbench/features` in the user's cache folder."""
    own = os.environ.get("CLBENCH_CACHE")
    if own:
        return pathlib.Path(own).expanduser() / "features"
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "clbench" / "features"


class FeatureStore:
    """Rows of features [D] float32 by (group, sample id).

    `context` is everything that values depend on besides the network's own state (JSON-able), `modules` the same for the
    modules that hang on it (their fixed settings). `limit` bytes: the least recently used groups go first, those of this
    process last.
    """

    def __init__(self, folder: pathlib.Path, limit: int, context: dict[str, Any], modules: Any = None):
        self.folder, self.limit, self.context, self.modules = folder, limit, context, modules
        self._found: dict[str, dict[int, tuple[np.ndarray, int]]] = {}
        self._new: dict[str, dict[int, np.ndarray]] = {}
        self._files: dict[str, set[str]] = {}
        _ensure_writable(folder)

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureStore:
        return self

    def group(self, lower: bool, weights: str, kinds: Sequence[str], modules: Sequence[str]) -> str:
        """Name of the group of a state: autocast or not, SHA-256 of the weights, classes of the layers, SHA-256 of modules."""
        parts = [self.context, lower, weights, list(kinds), [self.modules, *modules] if modules else []]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def take(self, group: str, ids: Sequence[int]) -> dict[int, Tensor]:
        """What is known of the samples -> {id: features [D]}; the others are missing."""
        known, new = self._index(group), self._new.get(group, {})
        out: dict[int, Tensor] = {}
        for i in ids:
            if i in new:
                out[i] = torch.from_numpy(new[i].copy())
            elif i in known:
                rows, place = known[i]
                out[i] = torch.from_numpy(np.array(rows[place]["x"]))
        return out

    def add(self, group: str, ids: Sequence[int], rows: Tensor) -> None:
        """Keep features [B, D] of samples; written when enough of them wait, and by `flush`."""
        new, known = self._new.setdefault(group, {}), self._index(group)
        for i, row in zip(ids, rows.detach().float().cpu().numpy(), strict=True):
            if i not in known:
                new.setdefault(int(i), row.copy())
        if len(new) >= PENDING:
            self._write(group)

    def flush(self) -> None:
        """Write what waits and keep the size bound. A full disk is reported and harms nothing."""
        wrote = [self._write(group) for group in list(self._new)]
        if any(wrote):
            self._evict()

    def _index(self, group: str) -> dict[int, tuple[np.ndarray, int]]:
        if group not in self._found:
            self._found[group], self._files[group] = {}, set()
            folder = self.folder / group
            for path in sorted(folder.glob("*.npy")) if folder.is_dir() else ():
                self._open(group, path)
            with contextlib.suppress(OSError):
                os.utime(folder / "used")
        return self._found[group]

    def _open(self, group: str, path: pathlib.Path) -> None:
        """Map a file whose content fits its name; remove one whose content does not."""
        try:
            if hashlib.sha256(path.read_bytes()).hexdigest()[:24] != path.stem:
                raise ValueError("its content does not fit its name")
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
            if rows.ndim != 1 or rows.dtype.names != ("id", "x"):
                raise ValueError("it holds something else")
        except FileNotFoundError:
            return  # another job made room
        except (OSError, ValueError, EOFError) as error:
            log.warning("feature store: %s is not used: %s", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return
        self._files[group].add(path.name)
        known = self._found[group]
        for place, i in enumerate(rows["id"].tolist()):
            known.setdefault(i, (rows, place))

    def _write(self, group: str) -> bool:
        new = self._new.pop(group, {})
        if not new:
            return False
        width = len(next(iter(new.values())))
        rows = np.empty(len(new), dtype=[("id", "<i8"), ("x", "<f4", (width,))])
        rows["id"], rows["x"] = list(new), np.stack(list(new.values()))
        file = io.BytesIO()
        np.save(file, rows, allow_pickle=False)
        content = file.getvalue()
        folder = self.folder / group
        path = folder / f"{hashlib.sha256(content).hexdigest()[:24]}.npy"
        temporary = folder / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        self._index(group)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            os.replace(temporary, path)
            (folder / "used").touch()
        except OSError as error:
            log.warning("feature store: cannot write %s: %s; features stay in memory", path, error.strerror or error)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            self._found[group] |= {int(i): (rows, place) for place, i in enumerate(rows["id"])}
            return False
        self._open(group, path)
        return True

    def _evict(self) -> None:
        """Remove whole groups, oldest use first, until the bound holds; this process's own only if nothing else is left."""
        from filelock import FileLock, Timeout

        try:
            with FileLock(str(self.folder / "lock"), timeout=5):
                groups = [p for p in self.folder.iterdir() if p.is_dir()]
                sizes = {p: sum(_size(f) for f in p.glob("*")) for p in groups}
                total = sum(sizes.values())
                for path in sorted(groups, key=lambda p: (p.name in self._found, _time(p / "used"))):
                    if total <= self.limit:
                        break
                    total -= sizes[path]
                    shutil.rmtree(path, ignore_errors=True)  # a file that is mapped stays readable where it is mapped
                    log.info("feature store: removed group %s to keep below %.1f GB", path.name, self.limit / 1e9)
        except (Timeout, OSError) as error:
            log.warning("feature store: could not make room: %s", error)


def _ensure_writable(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write features to {folder}: {error.strerror or error}; feature_store=off needs none") from None


def _size(path: pathlib.Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _time(path: pathlib.Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def same_in_any_batch(model: Any, size: int, device: torch.device, autocast: contextlib.AbstractContextManager) -> bool:
    """Whether features of an image are the same to the last bit in batches of other sizes, orders and mates: measured.

    Probes random images [., 3, size, size] through the network as it stands, outside the count of passes. A single image
    is never asked for alone (see `Backbone.features`), so batches start at 2.
    """
    x = torch.randn(33, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    before, training = dict(model.passes), model.net.training
    model.net.eval()
    try:
        with torch.no_grad(), autocast:
            whole = model.net(x)
            orders = [torch.arange(33).roll(k) for k in (1, 16)]
            parts = [slice(0, 2), slice(2, 5), slice(5, 12), slice(12, 29), slice(31, 33)]
            same = all(torch.equal(model.net(x[order]), whole[order]) for order in orders)
            return same and all(torch.equal(model.net(x[part]), whole[part]) for part in parts)
    finally:
        model.net.train(training)
        model.passes.update(before)


def open_store(mode: str, gigabytes: Any, context: dict[str, Any], modules: Any, probe: Callable[[], bool]) -> Any:
    """The `FeatureStore` of a run, or None where it is off. `probe()` says whether features are the same in any batch.

    Raises `UserError` for a mode or a size that is none, and with mode "on" for a folder that cannot be written.
    """
    if mode not in MODES:
        raise UserError(f"feature_store must be one of {', '.join(MODES)}, got {mode!r}")
    if isinstance(gigabytes, bool) or not isinstance(gigabytes, int | float) or not gigabytes >= LEAST_GB:
        raise UserError(f"feature_store_gb must be a number from {LEAST_GB}, got {gigabytes!r}")
    if mode == "off":
        return None
    if mode == "auto" and not probe():
        log.debug("feature store off: features depend on the batch that they are computed in")
        return None
    try:
        return FeatureStore(default_folder(), int(gigabytes * 1e9), context, modules)
    except UserError as error:
        if mode == "on":
            raise
        log.debug("feature store off: %s", error)
        return None


def attach(
    model: Any, scenario: Scenario, device: torch.device, flags: dict[str, Any], modules: Any, mode: str, gigabytes: Any
) -> None:
    """Give a run's model its store, as its options `feature_store` (mode) and `feature_store_gb` say.

    `flags` are the arithmetic in force. Sample ids point into the scenario's whole data set, whatever the stream takes of it;
    `modules`, the learner's settings, only matter for features under modules of its own.
    """
    import timm
    import torchvision

    context = {
        "dataset": scenario.manifest.dataset["sha256"],
        "profile": repr(model.profile),
        "flags": {key: flags[key] for key in sorted(flags) if key != "arithmetic"},  # who chose does not matter
        "device": _device_name(device),
        "versions": [torch.__version__, torchvision.__version__, timm.__version__],
    }

    def probe() -> bool:
        return same_in_any_batch(model, model.profile.size, device, model.lowered(device.type))

    model.memory.attach(open_store(mode, gigabytes, context, modules, probe), scenario.dataset.images)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
