"""`machine=ray`: the jobs of a sweep as tasks of Ray, on this machine or on a cluster that is there. Imports Hydra, no torch.

A task asks for processors and for a share of a GPU, so that several jobs run on one; Ray starts as many at a time as fit. As
with the other launchers every job is a process of its own beneath its task: one that raises or is killed loses only itself.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import open_dict

from clbench.interfaces import UserError

NAME = "hydra_plugins.clbench.RayLauncher"  # Hydra takes plug-ins of this package alone


class RayLauncher(Launcher):
    """Runs a batch of jobs as Ray tasks.

    address        null: a Ray of this machine's own, stopped at the end; auto: the cluster that runs here; or ray://HOST:PORT
    num_cpus       processors of the Ray of this machine's own; null: all
    num_gpus       its GPUs; null: those that it finds
    cpus_per_job   processors that a job asks for; num_threads should not be more
    gpus_per_job   share of a GPU that a job asks for: 0.25 lets four run on one. Memory is not divided: all of them must fit
    max_retries    how often Ray starts a task anew whose node is lost; the job goes on from its snapshot
    """

    def __init__(
        self,
        address: str | None = None,
        num_cpus: float | None = None,
        num_gpus: float | None = None,
        cpus_per_job: float = 1,
        gpus_per_job: float = 0,
        max_retries: int = 3,
    ) -> None:
        self.address, self.num_cpus, self.num_gpus = address, num_cpus, num_gpus
        self.per_job = {"num_cpus": cpus_per_job, "num_gpus": gpus_per_job, "max_retries": max_retries}
        self.config: Any = None
        self.hydra_context: Any = None
        self.task_function: Any = None

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """What every launcher is told before it launches."""
        self.config, self.hydra_context, self.task_function = config, hydra_context, task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs, as many at a time as fit -> one return each, without their configurations."""
        ray = imported()
        setup_globals()
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        started, waiting = not ray.is_initialized(), []
        if started:
            _start(ray, self.address, self.num_cpus, self.num_gpus)
        try:
            task = ray.remote(**self.per_job)(execute)
            state, work = ray.put(Singleton.get_state()), ray.put((self.hydra_context, self.config, self.task_function))
            waiting = [task.remote(initial_job_idx + k, list(words), work, state) for k, words in enumerate(job_overrides)]
            return ray.get(waiting)
        except KeyboardInterrupt:
            for one in waiting:
                ray.cancel(one)
            ray.wait(waiting, num_returns=len(waiting), timeout=60)
            raise
        finally:
            if started:
                ray.shutdown()


def imported() -> Any:
    """Ray, or a `UserError` that says how to get it."""
    try:
        import ray  # type: ignore[reportMissingImports] of an extra
    except ImportError:
        raise UserError("machine=ray needs Ray: pip install 'clbench[ray]'") from None
    return ray


def _start(ray: Any, address: str | None, num_cpus: float | None, num_gpus: float | None) -> None:
    """Connect to a cluster, or start a Ray of this machine's own; its workers find the same modules as this process."""
    paths = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    if address is not None:
        if num_cpus is not None or num_gpus is not None:
            raise UserError("hydra.launcher.num_cpus and num_gpus are of a Ray of this machine's own, not of address=...")
        options = {"log_to_driver": False, "logging_level": logging.ERROR, "address": address}
    else:
        options |= {"num_cpus": num_cpus, "num_gpus": num_gpus}
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own is 15: jobs would yield to all else on the machine
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": paths}}, **options)


def execute(number: int, words: list[str], work: tuple[Any, Any, Any], state: Any) -> JobReturn:
    """One job, in a worker of Ray."""
    hydra_context, config, task_function = work
    setup_globals()
    Singleton.set_state(state)
    composed = hydra_context.config_loader.load_sweep_config(config, words)
    with open_dict(composed):
        composed.hydra.job.id, composed.hydra.job.num = f"ray_{number}", number
    ended = run_job(
        hydra_context=hydra_context,
        config=composed,
        task_function=task_function,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
    if ended.status is JobStatus.COMPLETED:
        ended.cfg = ended.hydra_cfg = None  # nobody reads them, and they are large
    return ended


def register() -> None:
    """Make the launcher known to Hydra; Ray itself is loaded when it launches."""
    from hydra.core.config_store import ConfigStore

    Plugins.instance().register(RayLauncher)
    Plugins.instance().class_name_to_class[NAME] = RayLauncher
    node = {"_target_": NAME, "address": None, "num_cpus": None, "num_gpus": None}
    node |= {"cpus_per_job": 1, "gpus_per_job": 0, "max_retries": 3}
    ConfigStore.instance().store(group="hydra/launcher", name="ray", node=node, provider="clbench")
