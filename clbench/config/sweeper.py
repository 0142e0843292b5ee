"""How a sweep gives its jobs to a launcher: in batches, whose results are not kept. Hydra's own sweeper keeps all of them.

Named in `conf/run.yaml`; `hydra/sweeper=...` chooses another, such as a search.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

NAME = "hydra_plugins.clbench.Sweep"  # Hydra takes plug-ins of this package alone
BATCH = {"BasicLauncher": 1, "JoblibLauncher": 256}  # jobs that a launcher is handed at a time
MOST = 1000  # of the others; Slurm's default limit of an array is 1,001
_given: list[Sequence[list[str]]] = []


class Sweep(Sweeper):
    """The jobs that `given` names, else the product of choices. `params` are choices that come before those of the command."""

    def __init__(self, max_batch_size: int | None = None, params: dict[str, str] | None = None) -> None:
        self.max_batch_size, self.params = max_batch_size, params or {}
        self.config: Any = None
        self.hydra_context: Any = None
        self.launcher: Any = None

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """What every sweeper is told before it sweeps."""
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Launch batch after batch. An exception of a launcher ends the sweep."""
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        jobs = _given[-1] if _given else self._product(arguments)
        size = self.max_batch_size or BATCH.get(type(self.launcher).__name__, MOST)
        for first in range(0, len(jobs), size):
            for ended in self.launcher.launch(list(jobs[first : first + size]), initial_job_idx=first):
                _ = ended.return_value  # raises what a job raised

    def _product(self, arguments: list[str]) -> list[list[str]]:
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        return product(parser.parse_overrides([*(f"{key}={value}" for key, value in self.params.items()), *arguments]))


def product(parsed: list[Any]) -> list[list[str]]:
    """Overrides of every job, in the order in which Hydra's own sweeper has them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    return BasicSweeper.split_arguments(parsed, None)[0]


@contextmanager
def given(jobs: Sequence[list[str]] | None) -> Iterator[None]:
    """Within the block a sweep has these jobs, which are composed and checked already; None: those of its overrides."""
    if jobs is None:
        yield
        return
    _given.append(jobs)
    try:
        yield
    finally:
        _given.pop()


def register() -> None:
    """Make the sweeper known to Hydra."""
    from hydra.core.config_store import ConfigStore

    Plugins.instance().register(Sweep)
    Plugins.instance().class_name_to_class[NAME] = Sweep
    node = {"_target_": NAME, "max_batch_size": None, "params": None}
    ConfigStore.instance().store(group="hydra/sweeper", name="batches", node=node, provider="clbench")
