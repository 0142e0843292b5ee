"""clbench: continual learning measured so that it can be trusted.

Everything that a plug-in needs is imported from here and loaded when it is first asked for: importing clbench loads no torch.
The other modules are private: they may move without notice.
"""

import difflib
import importlib
import sys
from typing import TYPE_CHECKING, Any

from clbench.config import moved

if TYPE_CHECKING:
    from clbench.config.compose import compose
    from clbench.evaluation import loss_metrics, metrics, peer_metrics
    from clbench.interfaces import (
        Batch,
        Budget,
        BudgetExceeded,
        Capabilities,
        Data,
        EvaluationSet,
        Evaluator,
        Experience,
        Learner,
        Place,
        Schedule,
        UserError,
    )
    from clbench.models import pet_modules
    from clbench.models.backbone import Backbone
    from clbench.models.heads import CosineHead, LinearHead, PrototypeHead
    from clbench.models.pet import Pet
    from clbench.run.saved_learner import SavedLearner, load
    from clbench.streams import datasets, rng
    from clbench.streams.entries import EvalEntry, ExperienceEntry
    from clbench.streams.images.data import ImageBatch, shuffled
    from clbench.streams.manifest import Manifest
    from clbench.streams.scenario import Dataset, Scenario
    from clbench.testing import check_learner, check_scenario
    from clbench.training import schedules, schedules_infinite
    from clbench.training.distillation import feature_distillation, frozen_copy, prediction_distillation
    from clbench.training.features import extract
    from clbench.training.fit import Recipe, fit
    from clbench.training.gaussians import ClassGaussians
    from clbench.training.losses import masked_cross_entropy
    from clbench.training.memory import Memory
    from clbench.training.runtime import Runtime
    from clbench.training.state import collect, groups_of, parameters_of, restore

__version__ = "0.2.0"
_WHERE = {
    "config.compose": ("compose",),
    "evaluation": ("loss_metrics", "metrics", "peer_metrics"),
    "interfaces": (
        "Batch",
        "Budget",
        "BudgetExceeded",
        "Capabilities",
        "Data",
        "EvaluationSet",
        "Evaluator",
        "Experience",
        "Learner",
        "Place",
        "Schedule",
        "UserError",
    ),
    "models": ("pet_modules",),
    "models.backbone": ("Backbone",),
    "models.heads": ("CosineHead", "LinearHead", "PrototypeHead"),
    "models.pet": ("Pet",),
    "run.saved_learner": ("SavedLearner", "load"),
    "streams": ("datasets", "rng"),
    "streams.entries": ("EvalEntry", "ExperienceEntry"),
    "streams.images.data": ("ImageBatch", "shuffled"),
    "streams.manifest": ("Manifest",),
    "streams.scenario": ("Dataset", "Scenario"),
    "testing": ("check_learner", "check_scenario"),
    "training": ("schedules", "schedules_infinite"),
    "training.distillation": ("feature_distillation", "frozen_copy", "prediction_distillation"),
    "training.features": ("extract",),
    "training.fit": ("Recipe", "fit"),
    "training.gaussians": ("ClassGaussians",),
    "training.losses": ("masked_cross_entropy",),
    "training.memory": ("Memory",),
    "training.runtime": ("Runtime",),
    "training.state": ("collect", "groups_of", "parameters_of", "restore"),
}
_HOME = {name: module for module, names in _WHERE.items() for name in names}
__all__ = [
    "Backbone",
    "Batch",
    "Budget",
    "BudgetExceeded",
    "Capabilities",
    "ClassGaussians",
    "CosineHead",
    "Data",
    "Dataset",
    "EvalEntry",
    "EvaluationSet",
    "Evaluator",
    "Experience",
    "ExperienceEntry",
    "ImageBatch",
    "Learner",
    "LinearHead",
    "Manifest",
    "Memory",
    "Pet",
    "Place",
    "PrototypeHead",
    "Recipe",
    "Runtime",
    "SavedLearner",
    "Scenario",
    "Schedule",
    "UserError",
    "check_learner",
    "check_scenario",
    "collect",
    "compose",
    "datasets",
    "extract",
    "feature_distillation",
    "fit",
    "frozen_copy",
    "groups_of",
    "load",
    "loss_metrics",
    "masked_cross_entropy",
    "metrics",
    "parameters_of",
    "peer_metrics",
    "pet_modules",
    "prediction_distillation",
    "restore",
    "rng",
    "schedules",
    "schedules_infinite",
    "shuffled",
]
sys.meta_path.append(moved.Finder)


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for."""
    if name not in _HOME:
        if (place := moved.current(f"clbench.{name}")) != f"clbench.{name}":
            raise ImportError(f"clbench.{name} is now {place}; plug-ins import from clbench itself", name=f"clbench.{name}")
        near = difflib.get_close_matches(name, __all__, 1, 0.6)
        hint = f"; did you mean {near[0]!r}?" if near else f" (it has {', '.join(__all__)})"
        raise AttributeError(f"clbench has no public name {name!r}{hint}")
    home = importlib.import_module(f"clbench.{_HOME[name]}")
    if not hasattr(home, name):
        importlib.import_module(f"clbench.{_HOME[name]}.{name}")
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
