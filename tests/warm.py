"""A process that has imported the heavy libraries once and forks a child for every command line: `clbench` without their 4 s.

Reads one JSON line per command on stdin, answers with the exit status on stdout. Nothing of clbench is imported before the
fork, and no tensor is made, so a child is what a fresh process would be. Tests of start-up itself use real processes.
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import sys
import traceback

for name in ("torch", "timm", "torchvision.datasets", "hydra", "omegaconf", "pandas", "sklearn.datasets", "safetensors.torch"):
    importlib.import_module(name)


def child(job):
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    for number, path in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
        os.dup2(os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
    sys.path[:0] = [job["cwd"], *job["env"]["PYTHONPATH"].split(os.pathsep)]
    sys.argv = ["clbench", *job["argv"]]
    importlib.invalidate_caches()
    code = 0
    try:
        runpy.run_module("clbench", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        pids = []
        for job in json.loads(line):  # several: the processes of one run, as torchrun would start them
            pids.append(os.fork())
            if pids[-1] == 0:
                child(job)
        codes = []
        for pid in pids:
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            if codes == [2]:
                for other in pids[1:]:
                    os.kill(other, signal.SIGTERM)
        print(json.dumps(codes), flush=True)
