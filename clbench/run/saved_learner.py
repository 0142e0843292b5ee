"""`save_model=true`: the learner as a run leaves it, on disk; `load` gives it back, ready to answer for new images.

    RUNS/<run id>/learner.safetensors   tensors of its `state_dict()` by number; in the metadata, as JSON, the tree they hang on

The network's own weights are in it where the learner trains them; else they come from where the record says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clbench.evaluation.accuracy import checked
from clbench.interfaces import UserError
from clbench.records import record
from clbench.run.restored import restored
from clbench.run.saved_model import write_whole
from clbench.streams.images.data import ImageBatch
from clbench.streams.images.decoding import decode
from clbench.training.state import fingerprint

if TYPE_CHECKING:
    from clbench.run.runner import Job

FORM = "1"
FILE = "learner.safetensors"


class SavedLearner:
    """A learner of images at the end of its run.

    learner  as it was: the same answers as in the run's last evaluation
    record   its record
    classes  names of the classes it knows, by place in its scores
    tasks    where the stream discloses tasks, names of its experiences -> places of their classes; else empty
    """

    def __init__(self, job: Job, entry: dict[str, Any]):
        self.learner, self.record = job.learner, entry
        self._pipeline, self._batch_size = job.pipeline, job.options.eval_batch_size
        manifest, scenario = job.scenario.manifest, job.scenario
        order = manifest.class_order[: manifest.num_seen(len(manifest.experiences) - 1)]
        self.classes = [scenario.class_name(c) for c in order]
        self.tasks: dict[str, list[int]] = {}
        self._task_of: dict[str, int] = {}
        for one in manifest.experiences if manifest.discloses_task else ():
            assert one.task is not None
            self.tasks[one.name] = sorted(manifest.renumber[c] for c in one.classes)
            self._task_of[one.name] = one.task

    def predict(self, images: Sequence[Any], task: str | None = None) -> Tensor:
        """Scores [N, K] of images over `classes`, on the CPU; -inf outside a task's classes where tasks are disclosed.

        images  paths of image files, or arrays uint8 [H, W, 3], or both; they are seen under the model's test transform
        task    the name of an experience, needed where the stream disclosed tasks, else refused
        `UserError` names an image that cannot be read. A learner that adapts while it is tested adapts to these images.
        """
        return torch.cat([torch.empty(0, len(self.classes)), *self._scores(images, task)])

    def _scores(self, images: Sequence[Any], task: str | None) -> Iterator[Tensor]:
        if self.tasks and task not in self.tasks:
            raise UserError(f"the stream discloses tasks: task must be one of {', '.join(self.tasks)}, got {task}")
        if task is not None and not self.tasks:
            raise UserError(f"task={task} has no effect: the stream of this learner discloses no tasks")
        number = None if task is None else self._task_of[task]
        for first in range(0, len(images), self._batch_size):
            part = images[first : first + self._batch_size]
            ids = np.arange(first, first + len(part))
            x = self._pipeline([lambda one=one: _pixels(one) for one in part], ids, None)
            batch = ImageBatch(torch.from_numpy(ids), None, number, lambda x=x: x, plain=True)
            batch.begins = first == 0
            with torch.no_grad():
                answer = self.learner.predict(batch)
            z = next(iter(answer.values())) if isinstance(answer, dict) else answer
            z = checked(z, len(part), len(self.classes), type(self.learner).__name__)
            if task is not None:
                keep = torch.zeros(len(self.classes), dtype=torch.bool)
                keep[self.tasks[task]] = True
                z = z.masked_fill(~keep, -torch.inf)
            yield z


def _pixels(image: Any) -> np.ndarray:
    if isinstance(image, str | Path):
        return decode(Path(image))
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise UserError(f"an image must be a path or uint8 [H, W, 3], got {array.dtype} {list(array.shape)}")
    return array


def load(path: str | Path, data_root: str | Path | None = None, device: str = "auto") -> SavedLearner:
    """The learner of a record whose run had `save_model=true`, checked against the record's fingerprint.

    path       RESULTS/records/<run id>.json; the learner lies in RESULTS/runs/<run id>
    data_root  where data and weights lie (the environment's CLBENCH_DATA): the stream must be readable as for a run
    `UserError` where there is no such learner, where its file was changed, or for streams of tokens. Sets the process's
    arithmetic (threads, kernels) as a run does.
    """
    path = Path(path)
    entry, state = kept(path)
    from clbench.run import runner

    config = restored(entry, None if data_root is None else str(data_root), path.parent)
    job = runner.prepare(config | {"device": device, "results_dir": str(path.resolve().parent.parent)})
    if job.scenario.asks != "predict":
        raise UserError(f"{path} is of a stream of losses: load answers for labelled images")
    runner.build_learner(job)
    job.learner.load_state_dict(state)
    return SavedLearner(job, entry)


def found(path: Path) -> tuple[dict[str, Any], Path]:
    """A finished record and the file of its learner; `UserError` where there is none."""
    entry = record.read(path)
    if entry["status"] != "ok":
        raise UserError(f"{path} is {entry['status']}: only a finished run has a learner")
    file = path.resolve().parent.parent / "runs" / entry["run_id"] / FILE
    if not file.exists():
        raise UserError(f"{file} does not exist: run it with save_model=true (force=true where it is done already)")
    return entry, file


def kept(path: Path) -> tuple[dict[str, Any], Any]:
    """A finished record and the state of its learner, whose fingerprint is the record's; `UserError` where there is none."""
    entry, file = found(path)
    state = read(file)
    if fingerprint(state) != entry["final_state_sha256"]:
        raise UserError(f"{file} is not the learner of {path}: its fingerprint is another")
    return entry, state


def place(job: Job) -> Path:
    """The file of a run's learner."""
    return job.folder / FILE


def save(job: Job) -> Path:
    """Write the learner of a finished run, whole or not at all -> where. `UserError` where the disk is full."""
    tree, tensors = flat(job.learner.state_dict())
    write_whole(tensors, place(job), {"form": FORM, "run_id": job.run_id, "tree": json.dumps(tree)})
    return place(job)


def read(path: Path) -> Any:
    """The state that `save` wrote. `UserError` where the file is no such file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            if about.get("form") != FORM:
                raise UserError(f"{path} is no learner that save_model=true wrote")
            return _grown(json.loads(about["tree"]), {name: file.get_tensor(name) for name in file.keys()})
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def flat(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """A nested state -> a tree that JSON can hold, and its tensors by number. `UserError` names what neither can hold.

    A node is [kind, value]: "t" tensor, "n" NumPy array, "d" dict (pairs of nodes), "l" list, "u" tuple, "v" any other value.
    """
    tensors: dict[str, Tensor] = {}

    def node(value: Any, where: str) -> list[Any]:
        if isinstance(value, Tensor | np.ndarray):
            name = str(len(tensors))
            tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
            tensors[name] = tensor.contiguous().clone()
            return ["t" if isinstance(value, Tensor) else "n", name]
        if isinstance(value, dict):
            return ["d", [[node(key, where), node(item, f"{where}.{key}")] for key, item in value.items()]]
        if isinstance(value, list | tuple):
            return ["l" if isinstance(value, list) else "u", [node(item, where) for item in value]]
        if value is None or type(value) in (bool, int, float, str):
            return ["v", value]
        raise UserError(f"save_model: the learner's state holds a {type(value).__name__} at {where.lstrip('.')}")

    return node(state, ""), tensors


def _grown(node: Any, tensors: dict[str, Tensor]) -> Any:
    kind, value = node
    if kind == "t":
        return tensors[value]
    if kind == "n":
        return tensors[value].numpy()
    if kind == "d":
        return {_grown(key, tensors): _grown(item, tensors) for key, item in value}
    if kind in ("l", "u"):
        made = [_grown(item, tensors) for item in value]
        return made if kind == "l" else tuple(made)
    if kind != "v":
        raise ValueError(f"unknown kind {kind!r}")
    return value
