"""`clbench new`: writes a small plug-in package that runs as it is."""

from __future__ import annotations

import keyword
import re
import shlex
from importlib.metadata import entry_points
from pathlib import Path

from clbench.config.registry import choices
from clbench.config.signatures import find_module
from clbench.evaluation.evaluators import BUILT_IN, GROUP
from clbench.interfaces import UserError
from clbench.streams.operators.registry import targets

_PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "0.1.0"
dependencies = ["clbench"]

[project.entry-points."{group}"]
{name} = "{entry}"
"""

_LEARNER = '''\
"""{title}: say here what it does, and cite the paper."""

from torch.nn.functional import cross_entropy

from clbench import Capabilities, LinearHead, Recipe, collect, fit, parameters_of, restore, shuffled


class {title}:
    capabilities = Capabilities()

    def __init__(self, model, runtime, *, lr: float = 0.01, batch_size: int = 32):
        self.model, self.runtime, self.lr, self.batch_size = model, runtime, lr, batch_size
        self.head = LinearHead(model.num_features).to(runtime.device)

    def learn(self, experience):
        if experience.new_classes:
            self.head.grow(len(experience.new_classes), self.runtime.generator("head"))
        self.model.train()
        groups = [{{"params": parameters_of(self.model, self.head), "lr": self.lr}}]
        batches = shuffled(experience.train, self.batch_size, self.runtime.epochs(None), self.runtime.key("train"))
        return fit(self.runtime, "train", self, groups, self.loss, batches, Recipe("sgd", momentum=0.9))

    def loss(self, batch):
        return cross_entropy(self.head(self.model.features(batch)), batch.y)

    def predict(self, batch):
        self.model.eval()
        return self.head(self.model.features(batch))

    def state_dict(self):
        return collect(self, "model", "head")

    def load_state_dict(self, state):
        restore(self, state)
'''

_LEARNER_YAML = """\
# {title}: one line for `clbench list`
# Its options are the arguments of the class, with their defaults; write here what differs from those
_target_: {name}.learner.{title}
"""

_SCENARIO = '''\
"""{title}: say here what the stream asks of a learner."""

from dataclasses import asdict

import numpy as np

from clbench import Budget, EvalEntry, ExperienceEntry, Manifest, Scenario, datasets


def {name}(name: str = "{name}", increment: int = 2, epochs: int = 5) -> Scenario:
    data = datasets.load("digits")
    experiences, evals = [], []
    for i, first in enumerate(range(0, data.num_classes, increment)):
        classes = tuple(range(first, min(first + increment, data.num_classes)))
        train, test = (np.flatnonzero(np.isin(data.y, classes) & (data.split == part)) for part in (0, 1))
        experiences.append(ExperienceEntry(f"exp{{i}}", None, classes, train))
        evals.append(EvalEntry(f"exp{{i}}", None, classes, test, first_seen=i))
    budget = Budget(epochs=epochs, exemplars=200)
    manifest = Manifest(
        kind="class_incremental",
        dataset={{"name": data.name, "sha256": data.sha256, "num_samples": len(data)}},
        class_order=tuple(range(data.num_classes)),
        experiences=tuple(experiences),
        evals=tuple(evals),
        discloses_task=False,
        has_boundaries=True,
        budget=asdict(budget),
    )
    return Scenario(name, manifest, data, budget, augment="none")
'''

_SCENARIO_YAML = """\
# {title}: one line for `clbench list`
_target_: {name}.scenario.{name}
name: {name}
increment: 2
epochs: 5
"""

_OPERATOR = '''\
"""{title}: say here what it changes of a stream. It must be a pure function: chance comes from `clbench.rng` alone."""

from dataclasses import replace

from clbench import Scenario


def {name}(stream: Scenario, every: int = 2) -> Scenario:
    """Every second, third, ... training sample of each experience alone."""
    experiences = []
    for entry in stream.manifest.experiences:
        labels = None if entry.labels is None else entry.labels[::every]
        experiences.append(replace(entry, train=entry.train[::every], labels=labels))
    return replace(stream, manifest=replace(stream.manifest, experiences=tuple(experiences)))
'''

_EVALUATOR = '''\
"""{title}: say here what it counts."""

from clbench import EvaluationSet


class {title}:
    name = "{name}"  # of its rows in the record, and before its columns

    def __call__(self, learner, data: EvaluationSet) -> dict[str, int | float]:
        n = hits = 0
        for scores, labels in data.answers(learner):  # [B, num_seen] float32, [B] int64
            best = scores.topk(min(3, data.num_seen), dim=1).indices
            hits += int((best == labels[:, None]).any(dim=1).sum())
            n += len(labels)
        return {{"n": n, "hits": hits}}
'''

# kind -> code, its configuration file, entry point group, what the entry point names, how it is chosen
_FILES = {
    "learner": (_LEARNER, _LEARNER_YAML, "clbench.plugins", "{name}", "learner={name}"),
    "scenario": (_SCENARIO, _SCENARIO_YAML, "clbench.plugins", "{name}", "scenario={name}"),
    "operator": (_OPERATOR, None, "clbench.operators", "{name}.operator:{name}", "'scenario.operators=[{name}]'"),
    "evaluator": (
        _EVALUATOR,
        None,
        "clbench.evaluators",
        "{name}.evaluator:{title}",
        "'scenario.operators=[{{evaluators:{{names:[{name}]}}}}]'",
    ),
}
KINDS = tuple(_FILES)


def write(kind: str, name: str, folder: Path) -> str:
    """Write package `folder`/`name` with one of `KINDS` -> what to do next. Overwrites nothing (`UserError`)."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        guess = re.sub(r"\W+", "_", name.strip().lower()).strip("_")
        hint = f"; did you mean '{guess}'?" if re.fullmatch(r"[a-z][a-z0-9_]*", guess) and not keyword.iskeyword(guess) else ""
        raise UserError(f"'{name}' is no Python name in lower case{hint}")
    project = folder.expanduser() / name
    if project.exists():
        raise UserError(f"{project} exists already; nothing was written")
    if name in (choices(kind) if kind in ("learner", "scenario") else known(kind)):
        raise UserError(f"there is a {kind} '{name}' already; choose another name")
    if find_module(name) is not None:
        raise UserError(f"there is a Python package '{name}' already; choose another name")
    title = "".join(part.capitalize() for part in name.split("_"))
    code, settings, group, entry, chosen = (text and text.format(name=name, title=title) for text in _FILES[kind])
    files = {
        project / "pyproject.toml": _PYPROJECT.format(name=name, group=group, entry=entry),
        project / name / "__init__.py": "",
        project / name / f"{kind}.py": str(code),
    }
    if settings:
        files[project / name / "conf" / kind / f"{name}.yaml"] = settings
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {project}: {error.strerror}") from None
    target = f"{name}.{kind}.{title if kind in ('learner', 'evaluator') else name}"
    if kind in ("learner", "scenario"):
        at_once = f"{kind}._target_={target}"
    else:
        at_once = f"learner=ncm {str(chosen).replace(f'[{name}]', f'[{target}]')}"
    return "\n".join(
        [
            *(f"wrote {path}" for path in files),
            "next:",
            f"  cd {shlex.quote(str(project))}",
            f"  clbench run {at_once}",
            "  pip install -e .",
            f"  clbench check {chosen if kind in ('learner', 'scenario') else f'scenario=cil_digits {chosen}'}",
            f"  clbench run {chosen}",
        ]
    )


def known(kind: str) -> set[str]:
    """Names that operators or evaluators have already."""
    return set(targets()) if kind == "operator" else {*BUILT_IN, *(entry.name for entry in entry_points(group=GROUP))}
