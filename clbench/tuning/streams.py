"""On what a study tunes: the stream of each protocol, and which samples and classes it shares with the evaluation stream.

Guarantees, all read from the manifests (sample ids and the data set's SHA-256), so they hold on any machine:

two_phase         no sample that the evaluation stream is tested on is trained on or tested on while tuning; else refused.
                  `tune.on=rest` also shares no class and no training sample. `tune.on=SCENARIO` may share classes of the same
                  data set: then it warns and the record is marked `classes_tuned`. Of another data set only the
                  data's hash is compared: images or classes that occur in both under other names are not noticed.
first_experience  only training samples of the first experience are used; later classes and all test samples are not.
validation        only training samples are used, but of all experiences: a real learner would not have them in advance.
test              none. The test samples chose the options; the record is marked `test_tuned`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clbench.config.compose import build, compose
from clbench.interfaces import UserError
from clbench.streams.manifest import EvalEntry, ExperienceEntry, Manifest
from clbench.streams.scenario import Scenario
from clbench.streams.splits import drawn
from clbench.tuning.options import Options

REST = "rest"


def rest(evaluation: Scenario, node: Mapping[str, Any]) -> Scenario:
    """The classes of the same data set that the evaluation stream leaves out, dealt in experiences of the same sizes.

    `node` is the scenario's configuration: its limits hold here too. Training and test samples of these classes are used.
    """
    if not {"num_classes", "increment", "sizes", "order"} <= set(node):
        raise UserError(f"scenario {evaluation.name} has no classes to leave out: say tune.on=SCENARIO")
    single = {"num_classes": None, "base": 0, "increment": 1, "sizes": None, "order": "natural", "order_seed": 0}
    single |= {key: None if key == "classes" else [] for key in ("classes", "operators") if key in node}
    every = build({**node, **single}).manifest
    used = set(evaluation.manifest.class_order)
    left = [i for i, e in enumerate(every.experiences) if e.classes[0] not in used]
    if len(left) < 2:
        raise UserError(
            f"tune.protocol=two_phase: {evaluation.name} leaves {len(left)} of {len(every.class_order)} classes to tune on; "
            "keep some back (such as scenario.num_classes=6), name another stream (tune.on=SCENARIO), "
            "or take tune.protocol=first_experience or validation"
        )
    steps, sets = [], []
    for size in _new_classes(evaluation.manifest):
        part, left = left[:size], left[size:]
        if not part or (steps and len(part) < size):
            break
        old, tests = [every.experiences[i] for i in part], [every.evals[i] for i in part]
        steps.append((tuple(e.classes[0] for e in old), np.sort(np.concatenate([e.train for e in old]))))
        sets.append(np.sort(np.concatenate([e.ids for e in tests])))
    return _like(evaluation, steps, sets, REST)


def first_experience(evaluation: Scenario, share: float) -> Scenario:
    """The first experience alone, with a share of each class's training samples set aside to evaluate on."""
    entry = evaluation.manifest.experiences[0]
    labels = evaluation.dataset.y[entry.train]
    parts = [drawn(entry.train[labels == c], round(share * 10_000), "tune", int(c)) for c in np.unique(labels).tolist()]
    aside = np.sort(np.concatenate(parts))
    if len(aside) == 0:
        raise UserError(f"the first experience of {evaluation.name} has no samples to set aside (two of a class are needed)")
    return _like(evaluation, [(entry.classes, np.setdiff1d(entry.train, aside))], [aside], "first")


def _new_classes(manifest: Manifest) -> list[int]:
    """How many classes each experience brings, those that bring none left out."""
    seen: set[int] = set()
    made = []
    for entry in manifest.experiences:
        made.append(len(set(entry.classes) - seen))
        seen |= set(entry.classes)
    return [count for count in made if count]


def _like(
    evaluation: Scenario, steps: Sequence[tuple[Sequence[int], np.ndarray]], sets: Sequence[np.ndarray], end: str
) -> Scenario:
    """A stream with the rules, budget and transforms of another, on other samples: (classes, training ids) and test ids."""
    if evaluation.manifest.operators:
        raise UserError(
            f"scenario {evaluation.name} has operators, which cannot be repeated on a part of its data: "
            "take tune.protocol=validation, or name another stream (tune.on=SCENARIO)"
        )
    tasks = [i if evaluation.manifest.discloses_task else None for i in range(len(steps))]
    present = [set(evaluation.dataset.y[ids].tolist()) for ids in sets]
    entries = [
        ExperienceEntry(f"exp{i}", task, tuple(c), ids) for i, (task, (c, ids)) in enumerate(zip(tasks, steps, strict=True))
    ]
    evals = [
        EvalEntry(f"exp{i}", tasks[i], tuple(c for c in steps[i][0] if c in present[i]), ids, i) for i, ids in enumerate(sets)
    ]
    order = tuple(dict.fromkeys(c for classes, _ in steps for c in classes))
    manifest = replace(evaluation.manifest, class_order=order, experiences=tuple(entries), evals=tuple(evals))
    return replace(evaluation, name=f"{evaluation.name}-{end}", manifest=manifest)


def source(
    options: Options, fixed: Sequence[str], evaluation: Scenario, node: Mapping[str, Any]
) -> tuple[list[str], Scenario, bool]:
    """The tuning stream -> (overrides of its runs, the stream, whether it is stored rather than composed from the overrides).

    `fixed` are the overrides of the evaluation, `node` its scenario's configuration.
    """
    protocol, own = options.protocol, list(options.stream)
    if protocol == "test":
        return list(fixed), evaluation, False
    if protocol == "first_experience":
        return list(fixed), first_experience(evaluation, options.validation), True
    if protocol == "validation":
        if "validation" not in node or "evaluate_on" not in node:
            raise UserError(f"scenario {evaluation.name} sets no validation data aside: take tune.protocol=first_experience")
        share = [] if node["validation"] else [f"scenario.validation={options.validation}"]
        overrides = [*fixed, *share, *own, "scenario.evaluate_on=validation"]
        return overrides, build(compose(overrides)[0]["scenario"]), False
    if options.on == REST:
        return list(fixed), rest(evaluation, compose([*fixed, *own])[0]["scenario"]), True
    others = [override for override in fixed if override.lstrip("+~").split("=")[0].split(".")[0] != "scenario"]
    overrides = [*others, f"scenario={options.on}", *own]
    return overrides, build(compose(overrides)[0]["scenario"]), False


def stored(scenario: Scenario, node: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write a stream that no generator makes beside the study's records -> the configuration that runs it."""
    path = folder / "manifests" / f"{scenario.manifest.sha256}.json"
    scenario.manifest.save(path)
    made = {"_target_": "clbench.streams.generators.from_manifest", "path": str(path), "name": scenario.name}
    data = {key: node.get(key) for key in ("dataset", "data_root")} | {"download": bool(node.get("download"))}
    return made | data | {"augment": scenario.augment}


def shared(tuning: Manifest, evaluation: Manifest) -> dict[str, Any]:
    """What two streams have in common: evaluation samples and training samples used in tuning, and classes.

    Ids mean the same images only in the same data set; of two data sets nothing can be counted (None).
    """
    if tuning.dataset["sha256"] != evaluation.dataset["sha256"]:
        return {"same_data": False, "shared_test": 0, "shared_train": 0, "shared_classes": None}
    used = _ids([e.train for e in tuning.experiences] + [e.ids for e in tuning.evals])
    return {
        "same_data": True,
        "shared_test": len(np.intersect1d(used, _ids([e.ids for e in evaluation.evals]))),
        "shared_train": len(np.intersect1d(used, _ids([e.train for e in evaluation.experiences]))),
        "shared_classes": len(set(tuning.class_order) & set(evaluation.class_order)),
    }


def _ids(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate(parts))


def guard(protocol: str, tuning: Scenario, evaluation: Scenario) -> dict[str, Any]:
    """`shared` of the two streams and what the tuning stream is; `UserError` if the protocol's guarantee does not hold."""
    found = shared(tuning.manifest, evaluation.manifest)
    if protocol != "test" and found["shared_test"]:
        raise UserError(
            f"tune.protocol={protocol}: stream {tuning.name} uses {found['shared_test']} of the samples that {evaluation.name} "
            "is tested on; tune on other classes or other data (tune.on=), or say tune.protocol=test, which marks the record"
        )
    about = {"scenario": tuning.name, "manifest_sha256": tuning.manifest.sha256, "dataset": tuning.manifest.dataset["name"]}
    sizes = [[len(e.classes) for e in m.experiences] for m in (tuning.manifest, evaluation.manifest)]
    return {**about, "experiences": len(sizes[0]), "same_shape": sizes[0] == sizes[1], **found}
