"""Who, what, where: the parts of a record that describe a run rather than measure it."""

from __future__ import annotations

import copy
import datetime
import functools
import hashlib
import importlib.metadata
import inspect
import os
import pathlib
import platform
import resource
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from clbench import __version__
from clbench.config.run_options import MACHINE
from clbench.interfaces import Capabilities, UserError
from clbench.records import record
from clbench.streams.operators import registry as operators
from clbench.streams.operators.registry import without_folders
from clbench.training import hardware

NO_PET = {"_target_": "clbench.models.pet_modules.none", "_partial_": True}
ADDED: dict[str, dict[str, Any]] = {  # options that came to a learner later: what it did before it had them
    "agem.Agem": {"columns": "seen", "head": "linear"},
    "coda_prompt.CodaPrompt": {"ovor": None},
    "cotta.Cotta": {"reset": "never", "steps": 1, "loss": "cross_entropy"},
    "derpp.DerPP": {"refresh": None},
    "dualprompt.DualPrompt": {"ovor": None},
    "er.ExperienceReplay": {"refresh": None, "project": None},
    "er_ace.ErAce": {"start": "second_batch", "past": False},
    "emmet.Emmet": {"clamp_by": "now"},
    "ewc.Ewc": {"refresh": None, "project": None},
    "feat_kd.FeatKd": {"refresh": None, "project": None},
    "finetune.Finetune": {"trainable": "all", "refresh": None, "optimizer": "sgd"},
    "gdumb.GDumb": {"optimizer": "sgd", "schedule": None},
    "gem.Gem": {"columns": "seen", "head": "linear"},
    "hypernetwork.Hypernetwork": {"grow": 0},
    "incremental_frozen.IncrementalFrozen": {
        **{"supcon": 0.0, "mirror": True, "etf": 0, "virtual": 0, "rotation": 0.0},
        **{"finetune": 0, "finetune_lr": 0.001, "subnet": 1.0},
    },
    "joint.Joint": {"optimizer": "sgd"},
    "l2p.L2p": {"ovor": None},
    "l2_reg.L2Reg": {"refresh": None, "project": None},
    "lwf.Lwf": {"trainable": "all", "refresh": None, "project": None},
    "mas.Mas": {"refresh": None, "project": None},
    "memit.Memit": {"clamp_by": "now"},
    "mir.Mir": {"columns": "seen", "score": "rise", "start": "second_batch"},
    "pretrain.Pretrain": {"adapt": None, "pet": NO_PET, "anneal": None, "rank": None, "pilot": 50},
    "picle.Picle": {"latent": 0, "suffix": 2},
    "pred_kd.PredKd": {"refresh": None, "project": None},
    "replay.Replay": {"optimizer": "sgd"},
    "rome.Rome": {"clamp_by": "now"},
    "rwalk.RWalk": {"refresh": None, "project": None},
    "scr.Scr": {"start": "second_batch", "past": False},
    "si.Si": {"boundaries": "told", "hazard": 0.01, "certain": 0.9, "summary": 4, "refresh": None, "project": None},
    "skill_it.SkillIt": {"graph": "spread", "pilot": 50, "repeats": 3},
    "slca.Slca": {"drift": None},
    "ssiat.Ssiat": {"drift": "shift"},
    "tent.Tent": {"reset": "never"},
    "text_finetune.TextFinetune": {"select": None},
}


def now() -> str:
    """The time in UTC, ISO 8601, whole seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def identity(config: dict[str, Any], can: Capabilities | None = None) -> dict[str, Any]:
    """The configuration without what may differ from machine to machine: device, threads, launcher, paths.

    The batch size of the evaluation stays for a learner whose capabilities `can` make its predictions depend on it.
    """
    kept = {key: copy.deepcopy(value) for key, value in config.items() if key not in MACHINE}
    if can is not None and (can.transductive or can.adapts_at_test):
        kept["eval_batch_size"] = config["eval_batch_size"]
    for part in ("scenario", "model"):
        for key in ("data_root", "download"):
            kept[part].pop(key, None)
    kept["model"].pop("weights", None)
    kept["model"].pop("seed", None)
    dataset = kept["scenario"].get("dataset")
    if isinstance(dataset, str) and ("/" in dataset or os.sep in dataset):
        kept["scenario"]["dataset"] = pathlib.PurePath(dataset).name
    elif isinstance(dataset, list):
        kept["scenario"]["dataset"] = [pathlib.PurePath(one).name for one in dataset]
    kept["scenario"].pop("path", None)
    for key in ("corpus", "tokenizer"):
        if isinstance(kept["scenario"].get(key), str):
            kept["scenario"][key] = pathlib.PurePath(kept["scenario"][key]).name
    _leave_out_added(kept["learner"])
    if kept["model"].get("norm") == "batch":  # what networks had before there was a choice
        del kept["model"]["norm"]
    if kept.get("optimizer_state") == "fresh":  # what every run did before there was another way
        del kept["optimizer_state"]
    if kept.get("continues") is None:
        kept.pop("continues", None)
    else:
        kept["continues"] = _named(kept["continues"])
    # streams that take none of these keep the identity that they had before
    absent = ("operators", "evaluators", "classes", "test_share", "test_seed", "draw", "junk", "stages", "old_share", "target")
    for key in (*absent, "all_told"):
        if key in kept["scenario"] and not kept["scenario"][key]:
            del kept["scenario"][key]
    if not (config["scenario"].get("target") or ()):  # of no effect then
        kept["scenario"].pop("target_lines", None)
    if kept["scenario"].get("family") == "apart":  # how languages lay before there was a line
        del kept["scenario"]["family"]
    if "operators" in kept["scenario"]:
        kept["scenario"]["operators"] = without_folders(kept["scenario"]["operators"])
    return kept


def _named(path: str) -> str:
    """What stands for a record in the identity of the run that goes on from it: its run id and its final state."""
    place = pathlib.Path(path).expanduser()
    try:
        return f"{place.stem}@{record.read(place)['final_state_sha256'][:16]}"
    except (UserError, KeyError, TypeError):  # the run is refused
        return place.stem


def _leave_out_added(learner: dict[str, Any]) -> None:
    """Drop options at the value that stands for what the learner did before it had them."""
    added = {"head_init": "normal", "head": "single", "streaming": False, "online": False}
    added |= ADDED.get(str(learner["_target_"]).removeprefix("clbench.learners."), {})
    if learner.get("online") is False:  # what is of no effect then
        added |= {"updates": 1.0} | ({"replay": None} if learner["_target_"].endswith(".Icarl") else {})
    for name, value in added.items():
        if name in learner and learner[name] == value and type(learner[name]) is type(value):
            del learner[name]
    schedule = learner.get("schedule")
    if isinstance(schedule, dict) and schedule.get("sequence", 0) is None:  # of `power`: what it counted before
        del schedule["sequence"]


def learner_name(config: dict[str, Any]) -> str:
    """The chosen name of a group file, else the class."""
    return config.get("names", {}).get("learner") or config["learner"]["_target_"].rsplit(".", 1)[-1].rsplit(":", 1)[-1]


def model_name(config: dict[str, Any]) -> str:
    """The model's own name."""
    return str(config["model"].get("name") or config["model"]["_target_"].rsplit(".", 1)[-1])


def plugin_version(config: dict[str, Any]) -> str | None:
    """The "name version" of the distribution that a learner comes from, a file hash for a loose file, None for clbench.

    Those of learner and model with "; " between where the model is from outside too.
    """
    from clbench.config.compose import load_target

    targets = [config[part]["_target_"] for part in ("learner", "model")]
    found = [_version(target, load_target(target)) for target in targets if target.split(".", 1)[0] != "clbench"]
    return "; ".join(found) or None


def evaluator_versions(evaluators: Sequence[Any]) -> dict[str, str]:
    """Name -> version of every evaluator that is not clbench's own: what is counted depends on the code."""
    kinds = {one.name: one if inspect.isfunction(one) else type(one) for one in evaluators}
    outside = {name: kind for name, kind in kinds.items() if kind.__module__.split(".", 1)[0] != "clbench"}
    return {name: _version(f"{kind.__module__}.{kind.__qualname__}", kind) for name, kind in outside.items()}


def stream_versions(scenario: dict[str, Any]) -> dict[str, str]:
    """Version of the code outside clbench that makes a scenario: its own, and that of its operators."""
    from clbench.config.compose import load_target

    names = [operators.parsed(one)[0] for one in scenario.get("operators") or ()]
    targets = {"scenario": scenario["_target_"]} | {f"operator {name}": operators.target_of(name) for name in names}
    outside = {name: target for name, target in targets.items() if target.split(".", 1)[0] != "clbench"}
    return {name: _version(target, load_target(target)) for name, target in outside.items()}


def _version(target: str, made: Any) -> str:
    found = importlib.metadata.packages_distributions().get(target.split(".", 1)[0])
    name = f"{found[0]} {importlib.metadata.version(found[0])}" if found else target
    files = _source_files(made)
    text = b"".join(file.read_bytes() for file in files)
    return f"{name} {hashlib.sha256(text).hexdigest()[:16] if files else 'unknown'}"


def _source_files(made: Any) -> list[pathlib.Path]:
    """The file of a class or function, then those of the modules of its own that it uses, directly or through others.

    Its own are those that lie in the same folder, or below it, and are not clbench's: helpers beside a loose file, the other
    modules of a package.
    """
    source = inspect.getsourcefile(made)
    if source is None:
        return []
    home = pathlib.Path(source).resolve().parent
    package = sys.modules.get(made.__module__.split(".", 1)[0])
    if package is not None and (init := getattr(package, "__file__", None)) and hasattr(package, "__path__"):
        home = pathlib.Path(init).resolve().parent
    found, waiting = {made.__module__: pathlib.Path(source)}, [sys.modules.get(made.__module__)]
    while waiting:
        for value in list(vars(waiting.pop() or object).values()):
            name = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
            if not isinstance(name, str) or name in found or name.split(".", 1)[0] == "clbench":
                continue
            module = sys.modules.get(name)
            file = getattr(module, "__file__", None)
            if module is not None and file and _is_below(pathlib.Path(file).resolve(), home):
                found[module.__name__] = pathlib.Path(file)
                waiting.append(module)
    first = found.pop(made.__module__)
    return [first, *(found[name] for name in sorted(found))]


def _is_below(file: pathlib.Path, home: pathlib.Path) -> bool:
    """Whether a source file lies below a folder, but not in an environment that lies there too."""
    return file.suffix == ".py" and file.is_relative_to(home) and "site-packages" not in file.relative_to(home).parts


@functools.cache
def git_state() -> dict[str, Any]:
    """Revision of the checkout this package lies in, and whether it has uncommitted changes; None where there is none."""
    here = pathlib.Path(__file__).resolve().parent.parent.parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    if not (here / ".git").exists():
        return {"revision": None, "dirty": None}
    return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "clbench", "conf"))}


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    names = ("torch", "torchvision", "timm", "numpy", "pillow", "hydra-core")
    return {"clbench": __version__, "python": platform.python_version()} | {n: importlib.metadata.version(n) for n in names}


def peak_memory(device: Any) -> int:
    """Peak bytes of this process: device memory on a GPU, else resident memory."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def command_line(words: list[str]) -> str:
    """The command as one would type it, without the path of the program."""
    return shlex.join([pathlib.PurePath(words[0]).name, *words[1:]]) if words else ""


def describe(job: Any, command: list[str]) -> dict[str, Any]:
    """A fresh record with status `running`: everything that is known before learning starts. `job` is a `runner.Job`."""
    config, can = job.config, job.capabilities
    marks = [name for name in ("transductive", "adapts_at_test") if getattr(can, name)]
    marks += ["reference"] if can.stores_all_data else []
    return {
        "schema": record.SCHEMA,
        "run_id": job.run_id,
        "status": "running",
        "numbers_version": record.numbers_version(config),
        "config": identity(config, can),
        "machine": {
            "device": str(job.device),
            "processor": platform.processor() or platform.machine(),
            "cpu": hardware.cpu(),
            "platform": platform.platform(),
            "flags": job.flags,
            "eval_batch_size": job.options.eval_batch_size,
            "micro_batch": job.options.micro_batch,
            "compile": job.options.compile,
            "parallel": job.group.kind,
            "processes": job.group.size,
            "command": command_line(command),
        },
        **job.scenario.describe(),
        "learner": {
            "name": learner_name(config),
            "target": config["learner"]["_target_"],
            "plugin": plugin_version(config),
            "capabilities": asdict(can),
        },
        "model": dict(job.model.identity),
        "seed": job.options.seed,
        "correct": None,
        "seconds": {"total": 0.0},
        "versions": versions(),
        "git": git_state(),
        "created": now(),
        "finished": None,
        "pid": os.getpid(),
        "resumed": 0,
        "marks": marks,
        "error": None,
        **({"evaluators": outside} if (outside := evaluator_versions(job.evaluators)) else {}),
        **({"code": made_by} if (made_by := stream_versions(job.config["scenario"])) else {}),
    }
