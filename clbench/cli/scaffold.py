"""`clbench new`: writes a small plug-in package that runs as it is."""

from __future__ import annotations

import keyword
import re
import shlex
from pathlib import Path

from clbench.config.registry import choices
from clbench.config.signatures import find_module
from clbench.interfaces import UserError

_PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "0.1.0"
dependencies = ["clbench"]

[project.entry-points."clbench.plugins"]
{name} = "{name}"
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

_FILES = {"learner": (_LEARNER, _LEARNER_YAML), "scenario": (_SCENARIO, _SCENARIO_YAML)}


def write(kind: str, name: str, folder: Path) -> str:
    """Write package `folder`/`name` with a learner or a scenario -> what to do next. Overwrites nothing (`UserError`)."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        guess = re.sub(r"\W+", "_", name.strip().lower()).strip("_")
        hint = f"; did you mean '{guess}'?" if re.fullmatch(r"[a-z][a-z0-9_]*", guess) and not keyword.iskeyword(guess) else ""
        raise UserError(f"'{name}' is no Python name in lower case{hint}")
    project = folder.expanduser() / name
    if project.exists():
        raise UserError(f"{project} exists already; nothing was written")
    if name in choices(kind):
        raise UserError(f"there is a {kind} '{name}' already; choose another name")
    if find_module(name) is not None:
        raise UserError(f"there is a Python package '{name}' already; choose another name")
    title = "".join(part.capitalize() for part in name.split("_"))
    code, settings = (text.format(name=name, title=title) for text in _FILES[kind])
    files = {
        project / "pyproject.toml": _PYPROJECT.format(name=name),
        project / name / "__init__.py": "",
        project / name / f"{kind}.py": code,
        project / name / "conf" / kind / f"{name}.yaml": settings,
    }
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {project}: {error.strerror}") from None
    target = f"{name}.{kind}.{title if kind == 'learner' else name}"
    return "\n".join(
        [
            *(f"wrote {path}" for path in files),
            "next:",
            f"  cd {shlex.quote(str(project))}",
            f"  clbench run {kind}._target_={target}",
            "  pip install -e .",
            f"  clbench check {kind}={name}",
            f"  clbench run {kind}={name}",
        ]
    )
