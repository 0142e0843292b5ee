"""Real processes that are killed at exact places, and go on: alone, twice, and as another number of processes."""

import random
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

DOOMED = """
import os
import pathlib
import signal

from clbench.learners.pretrain import Pretrain


class Doomed(Pretrain):
    def here(self, place):
        rank = os.environ.get("RANK", "0")
        if os.environ.get("DOOM") == place and os.environ.get("DOOM_RANK", "0") == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("FAIL") == place and os.environ.get("DOOM_RANK", "0") == rank:
            raise ValueError("a disk is gone")

    def run(self, experience, plan, shares=None, after_step=None, owner=None):
        real, log = self.model.loss, os.environ.get("IDS")

        def noted(tokens):
            if self.model.training and log:
                path = pathlib.Path(f"{log}.{os.environ.get('RANK', '0')}")
                with path.open("a") as file:
                    file.writelines(f"{row.tolist()}\\n" for row in tokens)
            return real(tokens)

        self.model.loss = noted
        try:
            result = super().run(experience, plan, shares, lambda s, n, *_: self.here(f"{s.experience}:{n}"), owner)
        finally:
            del self.model.loss
        self.here(f"{experience.index}:end")
        self.last = experience.index
        return result

    def loss(self, tokens):
        if hasattr(self, "last"):
            self.here(f"{self.last}:evaluated")
        return super().loss(tokens)
"""
RUN = (
    "run",
    "scenario=cpt_synthetic",
    "scenario.symbols=8",
    "scenario.states=8",
    "scenario.order=[0,1]",
    "scenario.tokens=768",
    "scenario.context=8",
    "scenario.batch=8",
    "scenario.eval_tokens=320",
    "scenario.probe_sequences=2",
    "scenario.probe_evenly=2",
    "model.width=16",
    "model.depth=2",
    "model.heads=2",
    "num_threads=1",
    "device=cpu",
    "learner=infinite",
    "learner._target_=doomed.Doomed",
    "learner.replay.share=0.25",
    "checkpoint_seconds=0",
)  # two experiences of 12 steps, of which the last 2 are a branch
SAME = ("run_id", "sum_loss", "sum_loss_start", "sum_loss_trunk", "curves", "ledger", "plan", "final_state_sha256", "steps")
COUNTS = ("run_id", "ledger", "plan", "steps", "tokens", "n")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, warm):
    """The record of the run that nobody kills, and the text it was trained on."""
    from conftest import CommandLine

    made = CommandLine(tmp_path_factory.mktemp("straight"), warm)
    (made.folder / "doomed.py").write_text(textwrap.dedent(DOOMED))
    made.env["IDS"] = str(made.folder / "ids")
    made(*RUN)
    (entry,) = made.records()
    return entry, (made.folder / "ids.0").read_text().splitlines()


@pytest.fixture
def doomed(clbench):
    (clbench.folder / "doomed.py").write_text(textwrap.dedent(DOOMED))
    return clbench


def kill(doomed, place, *words):
    doomed.env["DOOM"] = place
    doomed(*RUN, *words, code=-signal.SIGKILL)
    del doomed.env["DOOM"]
    (entry,) = doomed.records()
    assert entry["status"] == "running"


RANDOM = random.Random(5)
PLACES = {
    "at random steps, twice": [f"0:{RANDOM.randrange(2, 12)}", f"1:{RANDOM.randrange(2, 9)}"],
    "before, at and after a boundary": ["0:12", "0:end", "0:evaluated", "1:1"],
    "at the end of a trunk, inside its branch, at the very end": ["1:10", "1:11", "1:evaluated"],
}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_killed_and_equal_to_the_last_bit(doomed, straight, places):
    for place in places:
        kill(doomed, place)
    doomed(*RUN)
    (entry,) = doomed.records()
    assert {key: entry[key] for key in SAME} == {key: straight[0][key] for key in SAME}
    assert entry["resumed"] >= 1
    assert not list((doomed.folder / "results" / "runs").glob("*/journal/*"))


def test_a_changed_constant_is_an_error_with_a_difference(doomed):
    """The journal of one run under the identity of another: what a restored backup or a renamed folder would be."""
    kill(doomed, "1:7")
    (entry,) = doomed.records()
    words = (*RUN, "learner.schedule.constant=0.5")
    doomed.env["DOOM"] = "0:1"
    doomed(*words, code=-signal.SIGKILL)
    del doomed.env["DOOM"]
    other = next(e for e in doomed.records() if e["run_id"] != entry["run_id"])
    runs = doomed.folder / "results" / "runs"
    (runs / entry["run_id"] / "journal").rename(runs / "kept")
    for path in (runs / other["run_id"] / "journal").iterdir():
        path.unlink()
    for path in (runs / "kept").iterdir():
        path.rename(runs / other["run_id"] / "journal" / path.name)
    done = doomed(*words, code=1)
    assert "the saved run had another plan" in done.stdout + done.stderr
    assert "schedule.constant: 0.55 -> 0.5" in done.stdout + done.stderr


def test_counters_of_another_text_are_not_reused(clbench):
    """(vi): the text is exchanged under a killed run, then its journal is put under the new run."""
    (clbench.folder / "doomed.py").write_text(textwrap.dedent(DOOMED))
    texts = ("scenario=cpt_text_weak", "scenario.corpora=[one,two]", "data_root=.", "scenario.name=mine")
    words = (RUN[0], *texts, *(w for w in RUN[2:] if not w.startswith(("scenario.sym", "scenario.st", "scenario.order"))))

    def write(start):
        for i, name in enumerate(("one", "two")):
            lines = [f"<|doc|>{d}\n" + " ".join(f"{(start + d * 7 + k * (i + 3)) % 97}" for k in range(90)) for d in range(20)]
            (clbench.folder / f"{name}.txt").write_text("\n".join(lines))

    write(0)
    clbench.env["DOOM"] = "1:7"
    clbench(*words, code=-signal.SIGKILL)
    (killed,) = clbench.records()
    write(5)
    clbench.env["DOOM"] = "0:1"
    clbench(*words, code=-signal.SIGKILL)
    del clbench.env["DOOM"]
    clbench(*words, "results_dir=straight")
    clbench(*words)
    fresh = next(e for e in clbench.records() if e["run_id"] != killed["run_id"])
    (straight,) = clbench.records("straight")
    assert {key: fresh[key] for key in SAME} == {key: straight[key] for key in SAME}
    runs = clbench.folder / "results" / "runs"
    for path in (runs / killed["run_id"] / "journal").iterdir():
        path.rename(runs / fresh["run_id"] / "journal" / path.name)
    (clbench.folder / "results" / "records" / f"{fresh['run_id']}.json").unlink()
    done = clbench(*words, code=1)
    assert "the saved run read other data: its manifest is" in done.stdout + done.stderr


def close(entry, other):
    """Equal counts; losses equal up to the order of sums."""
    assert {key: entry[key] for key in COUNTS} == {key: other[key] for key in COUNTS}
    for key in ("sum_loss", "sum_loss_start", "sum_loss_trunk"):
        np.testing.assert_allclose(entry[key], other[key], rtol=2e-4)
    for name, values in other["curves"]["loss"].items():
        np.testing.assert_allclose(entry["curves"]["loss"][name], values, atol=2e-3)
    for key in ("tokens", "lr", "step", "role", "experience", "boundaries"):
        assert entry["curves"][key] == other["curves"][key]


def by_step(lines, batch=8):
    return [sorted(lines[i : i + batch]) for i in range(0, len(lines), batch)]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_read_the_same_text(doomed, straight, parallel):
    entry, text = straight
    words = (*RUN, f"parallel={parallel}", "checkpoint_seconds=null")
    ended = doomed.together(2, *words, IDS=str(doomed.folder / "ids"))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert "final_loss" in ended[0][1] and ended[1][1:] == ("", "")
    (made,) = doomed.records()
    close(made, entry)
    assert made["machine"]["parallel"] == parallel and made["machine"]["processes"] == 2
    parts = [(doomed.folder / f"ids.{rank}").read_text().splitlines() for rank in (0, 1)]
    both = [line for i in range(0, len(parts[0]), 4) for part in parts for line in part[i : i + 4]]
    assert both == text  # row for row


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_then_two_then_one_process(doomed, straight, parallel):
    kill(doomed, "0:8")
    seconds = "checkpoint_seconds=0" if parallel == "ddp" else "checkpoint_seconds=0.5"
    ended = doomed.together(2, *RUN, f"parallel={parallel}", seconds, DOOM="1:11", DOOM_RANK="1")
    assert ended[1][0] == -signal.SIGKILL and ended[0][0] == 130, ended
    assert "another process was lost; the same command goes on" in ended[0][2] and "Traceback" not in ended[0][2]
    assert doomed.records()[0]["status"] == "running"
    doomed(*RUN)
    (entry,) = doomed.records()
    close(entry, straight[0])
    assert entry["resumed"] >= 1 and entry["machine"]["processes"] == 1


@pytest.mark.parametrize("kind", ["ema", "schedule_free"])
def test_averaged_weights_that_are_spread_over_processes(doomed, kind):
    """The average lies in pieces as the weights do."""
    words = (*RUN, "learner=rewarm_replay", f"learner.average.kind={kind}")
    doomed(*words, "results_dir=alone")
    (alone,) = doomed.records("alone")
    ended = doomed.together(2, *words, "parallel=fsdp")
    assert [code for code, _, _ in ended] == [0, 0], ended
    (made,) = doomed.records()
    close(made, alone)


def test_torchrun_with_an_error_in_one_process(doomed):
    """The real launcher: its processes end, the first says why, in words."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "clbench"]
    env = {**doomed.env, "OMP_NUM_THREADS": "1", "FAIL": "0:5", "DOOM_RANK": "1"}
    done = subprocess.run([*command, *RUN], cwd=doomed.folder, env=env, capture_output=True, text=True, timeout=120)
    (entry,) = doomed.records()
    assert done.returncode == 1 and entry["status"] == "failed", done.stderr
    assert entry["error"]["message"] == "rank 1: ValueError: a disk is gone" in done.stderr


@pytest.mark.parametrize(
    ("ranks", "words", "message"),
    [
        (2, ("run", "learner=ncm"), "scenario cil_digits is made of images: such a run is for one process"),
        (2, (*RUN, "parallel=none"), "parallel=none, and 2 processes were started"),
        (1, (*RUN, "parallel=fsdp"), "parallel=fsdp needs several processes: torchrun --nproc-per-node 2 -m clbench"),
        (2, (*RUN, "scenario.batch=1"), "scenario.batch=1 is too small for 2 processes"),
        (2, (*RUN, "parallel=fsdp", "scenario.batch=7", "micro_batch=3"), "gives some more pieces"),
        (2, (*RUN, "parallel=fsdp", "learner.trainable=half"), "which parallel=fsdp cannot"),
        (2, (*RUN, "device=cuda:1"), "say device=cuda, each takes one of its own"),
        (2, ("list",), "clbench list is for one process, not by torchrun, which starts 2"),
        (2, (*RUN, "-m", "seed=0,1"), "a sweep is launched by machine=..., not by torchrun"),
        (2, (*RUN, "parallel=dpp"), "parallel must be one of auto, none, ddp, fsdp, got 'dpp'"),
    ],
)
def test_what_several_processes_cannot_do_is_said_once(doomed, ranks, words, message):
    first, *others = doomed.together(ranks, *words)
    assert first[0] == 2 and message in first[2], first
    assert all(err == "" for _, _, err in others)
    assert not doomed.records()


def test_rows_of_all_processes_are_the_batch():
    from clbench.training.distributed import Group

    for batch in range(1, 20):
        for size in range(1, batch + 1):
            found = [np.arange(batch)[Group(rank, size).rows(batch)] for rank in range(size)]
            assert np.array_equal(np.concatenate(found), np.arange(batch)) and min(map(len, found)) >= 1


def test_one_run_over_several_tasks_of_a_cluster(doomed, straight):
    """Under submitit's local executor, as slurm_parallel would do it."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    doomed(*RUN, "-m", "machine=submitit_local_parallel")
    (entry,) = doomed.records()
    assert entry["machine"]["processes"] == 2 and entry["machine"]["parallel"] == "ddp"
    close(entry, straight[0])


@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_error_in_one_process_ends_all(doomed, rank):
    ended = doomed.together(2, *RUN, FAIL="0:5", DOOM_RANK=rank)
    assert [code for code, _, _ in ended] == [1, 1], ended
    (entry,) = doomed.records()
    assert entry["status"] == "failed" and "a disk is gone" in entry["error"]["message"] + entry["error"]["traceback"]
    assert "self.here" in entry["error"]["traceback"] and ended[1][1] == ""
    assert entry["error"]["message"] == ("a disk is gone" if rank == "0" else "rank 1: ValueError: a disk is gone")
