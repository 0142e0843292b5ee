"""Signals, progress bar and log file of a run."""

from __future__ import annotations

import logging
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clbench.training.runtime import Interrupted, Runtime

log = logging.getLogger("clbench")


@contextmanager
def signals(runtime: Runtime) -> Iterator[None]:
    """First Ctrl-C or SIGTERM: stop after this step. Second: at once (the last snapshot stays)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        if runtime.stop:
            raise Interrupted
        runtime.stop = True

    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def bar_of(runtime: Runtime, progress: bool) -> Iterator[None]:
    """A progress bar on the terminal while `fit` runs."""
    if not progress or not sys.stderr.isatty():
        yield
        return
    from tqdm import tqdm

    bar: Any = tqdm(total=1, leave=False, unit="step", dynamic_ncols=True)

    def show(name: str, step: int, steps: int, loss: float) -> None:
        bar.set_description(f"experience {runtime.experience + 1} {name}", refresh=False)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if bar.total != steps or step == 1:
            bar.reset(steps)
        bar.update(step - bar.n)

    runtime.progress = show
    try:
        yield
    finally:
        bar.close()
        runtime.progress = None


@contextmanager
def logging_to(path: pathlib.Path) -> Iterator[None]:
    """Write the log of this job to its own folder too."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    log.debug("pid %d starts", os.getpid())
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
