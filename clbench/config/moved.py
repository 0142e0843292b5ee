"""Where the modules of the first edition are now. Imports nothing of clbench, so that it can be read at any time.

The identity of a run knows the targets of its configuration by their first-edition names, so that a record keeps its run id.
"""

from __future__ import annotations

from importlib.machinery import ModuleSpec

MOVED = {
    "counter": "streams.rng",
    "hardware": "training.hardware",
    "ranks": "training.torchrun",
    "evaluate": "evaluation.accuracy",
    "linear_probe": "evaluation.linear_probe",
    "metrics": "evaluation.metrics",
    "metrics_loss": "evaluation.loss_metrics",
    "compat": "evaluation.peer_metrics",
    "record": "records.record",
    "schema": "records.form",
    "faults": "records.fault",
    "migrations": "records.migrations",
    "report.verify": "records.verify",
    "report.verify_losses": "records.verify_losses",
    "report.evidence": "records.verify_artifacts",
    "report.rerun_losses": "records.rerun",
    "report.rerun": "records.rerun",
    "report.loss_facts": "records.loss_facts",
    "report.html": "report.page.html",
    "report.page_data": "report.page.contents",
    "report.page_detail": "report.page.detail",
    "report.pages": "report.subcommands",
    "report.plots": "report.figures.plots",
    "report.figures_board": "report.figures.board",
    "report.figures_data": "report.figures.data",
    "report.figures_losses": "report.figures.losses",
    "report.figures_runs": "report.figures.runs",
    "report.figures_style": "report.figures.style",
    "runner": "run.runner",
    "walk": "run.loop",
    "loss_stream": "run.token_stream",
    "matching": "run.build_model",
    "isolate": "run.subprocess_job",
    "tracking": "run.tracking",
    "provenance": "run.provenance",
    "planning": "run.plan",
    "terminal": "run.terminal",
    "testing": "testing.contract",
    "catalog": "config.registry",
    "config": "config.compose",
    "options": "config.run_options",
    "words": "config.overrides",
    "signatures": "config.signatures",
    "cli": "cli.main",
    "commands": "cli.commands",
    "examples": "cli.help_text",
    "corpus_command": "cli.corpus_command",
    "schedule_show": "cli.schedule_command",
    "scaffold": "cli.scaffold",
    "verification": "cli.verify_command",
    "streams.images": "streams.images.data",
    "streams.pixels": "streams.images.pixels",
    "streams.resample": "streams.images.resample",
    "streams.arrays": "streams.images.arrays",
    "streams.folders": "streams.images.folders",
    "streams.vision": "streams.images.vision",
    "streams.corpus": "streams.tokens.corpus",
    "streams.corpus_build": "streams.tokens.corpus_build",
    "streams.cpt": "streams.tokens.scenario",
    "streams.cpt_images": "streams.tokens.image_scenario",
    "streams.documents": "streams.tokens.documents",
    "streams.encoders": "streams.tokens.tokenizers",
    "streams.languages": "streams.tokens.languages",
    "streams.pictures": "streams.tokens.mae_images",
    "streams.sequences": "streams.tokens.sequences",
    "streams.sources": "streams.tokens.markov",
    "streams.texts": "streams.tokens.texts",
    "streams.class_groups": "streams.tokens.class_groups",
    "training.journal": "training.checkpoint",
    "training.parallel": "training.distributed",
    "training.shards": "training.distributed_checkpoint",
    "training.importance": "training.fisher",
    "training.calibration": "training.kernel_timing",
    "training.averages": "training.pretraining.weight_averaging",
    "training.halves": "training.pretraining.half_finetuning",
    "training.ledger": "training.pretraining.ledger",
    "training.mixing": "training.pretraining.data_mixture",
    "training.places": "training.pretraining.data_cursor",
    "training.predictors": "training.pretraining.scaling_laws",
    "training.pretrain": "training.pretraining.segments",
    "training.progress": "training.pretraining.progress",
    "training.schedule_free": "training.pretraining.schedule_free",
    "training.trunk": "training.pretraining.trunk_and_branch",
}
JOINED = {  # what became part of a module that goes by another name of the first edition
    "report.explain_losses": "report.explain",
    "report.loss_data": "report.figures.data",
    "report.loss_panel": "report.folder",
    "report.losses": "report.table",
    "report.page_losses": "report.page.contents",
    "streams.token_manifest": "streams.manifest",
    "testing_loss": "testing.contract",
}
_NEW = MOVED | JOINED
_OLD = {new: old for old, new in MOVED.items()}


def current(target: str) -> str:
    """A dotted target with the module's name of today: `clbench.walk.Walk` -> `clbench.run.loop.Walk`."""
    return _renamed(target, _NEW)


def first_edition(target: str) -> str:
    """The same the other way round."""
    return _renamed(target, _OLD)


def _renamed(target: str, table: dict[str, str]) -> str:
    package, _, rest = target.partition(".")
    parts = rest.split(".")
    for length in range(len(parts), 0, -1):
        if package == "clbench" and (found := table.get(".".join(parts[:length]))):
            return ".".join([package, found, *parts[length:]])
    return target


class Finder:
    """Last on `sys.meta_path`: an import of a module that has moved fails with its new name."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """None for every other module."""
        if name.startswith("clbench.") and (found := _NEW.get(name.removeprefix("clbench."))):
            raise ModuleNotFoundError(f"{name} is now clbench.{found}; plug-ins import from clbench itself", name=name)
        return None
