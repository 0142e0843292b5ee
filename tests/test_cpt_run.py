"""Pre-training through the runner: every learner, records that verify and report, killed processes, plan-time errors."""

import copy
import csv
import json
import signal
import time

import numpy as np
import pytest
import torch

from clbench.config import compose
from clbench.config.registry import asks, choices
from clbench.evaluation import loss_metrics
from clbench.interfaces import Capabilities, UserError
from clbench.records import record
from clbench.records.verify import verify
from clbench.report import report
from clbench.report.columns import LOSS
from clbench.report.table import rows
from clbench.run.runner import prepare, run_job
from clbench.training.fit import fit

ONE_DOMAIN = ("scenario.name=cpt_one", "scenario.order=[0,0,0]")
OF_IMAGES = ("cpt_lwf", "cpt_mas")  # refused here: they hold the features of an autoencoder
LEARNERS = [name for name in choices("learner") if asks("learner", name) == "loss" and name not in OF_IMAGES]
SMALL = (
    "scenario=cpt_synthetic",
    "scenario.symbols=8",
    "scenario.states=8",
    "scenario.tokens=1920",
    "scenario.context=16",
    "scenario.batch=8",
    "scenario.eval_tokens=320",
    "scenario.probe_sequences=2",
    "scenario.probe_evenly=2",
    "model.width=16",
    "model.depth=1",
    "model.heads=2",
    "num_threads=1",
    "device=cpu",
)


def job(*words):
    (made,) = compose.compose([*SMALL, *words])
    return made


def run(folder, *words):
    outcome = run_job(job(f"results_dir={folder}", "on_error=raise", *words))
    return record.read(outcome.path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A record of every learner, and of re-warming without replay and on the control."""
    folder = tmp_path_factory.mktemp("results")
    made = {name: run(folder, f"learner={name}", *(ONE_DOMAIN if name == "generations" else ())) for name in LEARNERS}
    made["plain"] = run(folder, "learner.replay.share=0")
    made["iid"] = run(folder, "scenario.name=cpt_iid", "scenario.order=[0,0,0]")
    return folder, made


def test_every_learner_gives_a_record_that_is_verified(finished):
    folder, made = finished
    text, code = verify(folder)
    assert code == 0 and f"{len(made)} verified, 0 self-reported, 0 failed" in text, text
    assert record.read_all(folder / "records")[1] == []


def test_records_hold_losses_curves_ledger_and_plan(finished):
    _, made = finished
    entry = made["rewarm_replay"]
    assert np.shape(entry["sum_loss"]) == (3, 3) and entry["tokens"] == entry["n"] == [320] * 3 and entry["correct"] is None
    assert entry["ledger"]["trunk_new"] + entry["ledger"]["trunk_replay"] == 3 * 1920
    assert entry["ledger"]["trunk_replay"] == 2 * 15 * 128 * 0.05  # 6 of 120 sequences, twice
    assert entry["curves"]["step"][:8] == [0, 1, 2, 4, 8, 15, 0, 1] and entry["curves"]["boundaries"] == [0, 1920, 3840]
    assert entry["curves"]["tokens"][:6] == [0, 128, 256, 512, 1024, 1920]
    assert entry["curves"]["lr"][5] < 1e-3 and len(entry["plan"]) == 3 and entry["plan"][1]["optimizer"] == "reset"
    start = loss_metrics.loss_matrix([entry["sum_loss_start"]], entry["tokens"])[0]
    assert abs(start.mean() - np.log(8)) < 0.3
    assert made["joint_union"]["marks"] == ["reference"]
    assert made["frozen"]["sum_loss"][0] == made["frozen"]["sum_loss"][2]


def test_what_is_probed_is_what_is_evaluated(finished, tmp_path):
    """With the whole evaluation set as the probe, the last look at an experience is its row of the matrix."""
    entry = run(tmp_path, "scenario.probe_sequences=20")
    matrix = loss_metrics.loss_matrix(entry["sum_loss"], entry["tokens"])
    ends = [i for i, step in enumerate(entry["curves"]["step"]) if step == 15]
    for row, at in zip(matrix, ends, strict=True):
        assert [entry["curves"]["loss"][name][at] for name in entry["scenario"]["eval_names"]] == pytest.approx(row, abs=2e-5)
    assert entry["final_state_sha256"] == finished[1]["rewarm_replay"]["final_state_sha256"]  # looking changes nothing


class Plain:
    """Trains through `fit` without a plan."""

    capabilities = Capabilities(asks="loss")

    def __init__(self, model, runtime):
        self.model, self.runtime, self.steps = model, runtime, 6

    def __call__(self, step):
        return torch.from_numpy(self.text.read(np.arange(4) + 4 * step))

    def learn(self, experience):
        self.text = experience.train
        self.model.train()
        groups = [{"params": self.model.parameters(), "lr": 0.1}]
        made = fit(self.runtime, "train", self, groups, lambda tokens: self.model.loss(tokens).mean(), self)
        del self.text
        return made

    def loss(self, tokens):
        return self.model.eval().loss(tokens)

    def state_dict(self):
        return self.model.state_dict()

    def load_state_dict(self, state):
        self.model.load_state_dict(state)


def test_a_learner_of_losses_without_a_plan(tmp_path):
    config = job(f"results_dir={tmp_path}", "on_error=raise")
    config["learner"] = {"_target_": f"{__name__}.Plain"}
    entry = json.loads(run_job(config).path.read_text())
    assert entry["status"] == "ok" and entry["steps"] == 18 and entry["plan"] == [] and "fit:train" in entry["seconds"]
    assert [row["step"] for row in entry["rows"]] == [None] * 4, "looks are those of a plan"
    assert entry["rows"][1]["sums"]["loss"][0] < entry["rows"][0]["sums"]["loss"][0]


def test_a_second_run_is_a_skip(finished):
    folder, made = finished
    outcome = run_job(job(f"results_dir={folder}"))
    assert outcome.status == "skipped" and made["rewarm_replay"]["run_id"] == outcome.run_id
    assert "final_loss" in outcome.text and "floor" in outcome.text


def test_the_leaderboard_of_losses(finished):
    folder, made = finished
    text, code = report(folder, strict=True)
    assert code == 0 and "final_loss" in text and "leaderboard_loss.csv" in text and "step_macro" not in text
    with open(folder / "leaderboard_loss.csv") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == list(LOSS.columns) and len(table) == len(made)
    streams = {row["scenario"] for row in table}
    assert streams == {"cpt_synthetic", "cpt_iid", "cpt_one"}
    values = {(row["scenario"], row["learner"], row["replay"]): row for row in table}
    ours, plain = (values["cpt_synthetic", "rewarm_replay", share] for share in ("0.05", "0"))
    final = loss_metrics.summary(made["rewarm_replay"])["final_loss"]
    assert float(ours["final_loss_mean"]) == pytest.approx(final, abs=1e-4) and ours["tokens_trunk_replay"] == "192"
    union = loss_metrics.summary(made["joint_union"])["final_loss"]
    without = loss_metrics.summary(made["plain"])["final_loss"]
    assert float(ours["recovery_ratio_mean"]) == pytest.approx((without - final) / (without - union), abs=1e-3)
    assert plain["recovery_ratio_mean"] == "" and ours["rate_share_mean"] != ""
    assert not (folder / "leaderboard.csv").exists()
    before = (folder / "leaderboard_loss.csv").read_bytes()
    report(folder)
    assert (folder / "leaderboard_loss.csv").read_bytes() == before


def changed(entry, path, value):
    entry = copy.deepcopy(entry)
    inner = entry
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return entry


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("sum_loss", 0, 0), -1.0, "not 3 finite numbers"),
        (("sum_loss", 0, 0), float("nan"), "sums.loss must be a list of numbers"),
        (("sum_loss", 2, 1), 1.0, "is below the exact floor"),
        (("sum_loss_start",), [1.0], "not 3 finite numbers"),
        (("tokens", 0), 319, "'tokens' and 'n' differ"),
        (("ledger", "trunk_new"), 1, "unique and"),
        (("ledger", "repeated"), -1, "whole numbers from 0"),
        (("ledger", "evaluation"), 0, "rounds over all sets"),
        (("steps",), 44, "44 steps are not 5760 tokens"),
        (("plan", 0, "last"), 14, "the plan has"),
        (("curves", "lr"), [], "differ in length"),
        (("curves", "tokens", 3), 10**9, "run backwards"),
        (("curves", "boundaries"), [0], "1 boundaries for 3 experiences"),
        (("scenario", "context"), 17, "differs from the manifest"),
        (("floor", 0), 0.1, "floor differs from the manifest"),
        (("scenario", "kind"), "class_incremental", "kind differs from the manifest"),
        (("curves",), None, "a part is missing or of the wrong kind"),
        (("curves", "loss", "language_0", 2), float("nan"), "losses that are no finite numbers from 0"),
    ],
)
def test_records_that_contradict_themselves_are_refused(finished, tmp_path, path, value, words):
    folder, made = finished
    entry = changed(made["rewarm_replay"], path, value)
    (tmp_path / "manifests").symlink_to(folder / "manifests")
    record.write(entry, tmp_path / "records")
    text, code = verify(tmp_path)
    assert code == 1 and words in text, text
    report(tmp_path)  # says what it can, and stops nothing


def test_a_running_record_has_a_row_and_no_numbers(finished):
    _, made = finished
    bare = {k: v for k, v in made["scratch"].items() if k not in ("sum_loss", "curves", "ledger", "plan")} | {
        "status": "running"
    }
    (row,) = rows([bare], board=LOSS)
    assert row["running"] == 1 and row["n_seeds"] == 0 and row["final_loss_mean"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("learner=slca",), "learner slca does not fit scenario cpt_synthetic: asks=predict, the scenario asks loss"),
        (("model=nano",), "model nano has no loss: scenario cpt_synthetic needs a decoder_... model"),
        (("scenario.context=1",), "scenario.context must be at least 2"),
        (("model.context=8",), "model decoder_tiny has context 8, scenario cpt_synthetic needs 16"),
        (("model.vocab=4",), "model decoder_tiny has vocab 4, scenario cpt_synthetic needs 8"),
        (("learner.replay.share=2",), "replay.share must be at least 0 and below 1"),
        (("scenario.budget.processed=100",), "the plan trains on 1920 tokens, the budget allows 100"),
        (("learner.replay.source=buffer", "learner.replay.buffer_bytes=10"), "replay.buffer_bytes=10 holds no sequence"),
        (("scenario.states=7",), "a markov language of 8 words"),
        (("scenario.budget.exemplar_bytes=0",), "stores_exemplars, and the budget allows none"),
    ],
)
def test_what_cannot_run_is_refused_before_it_starts(tmp_path, words, message):
    options = [w for w in SMALL if not (words == ("model=nano",) and w.startswith("model."))]
    (found,) = compose.compose([*options, f"results_dir={tmp_path}", *words])
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace("...", r"\.\.\.")):
        prepare(found)
    assert not (tmp_path / "records").exists()


def test_a_learner_of_losses_on_images():
    (found,) = compose.compose(["learner=rewarm_replay"])
    with pytest.raises(UserError, match="learner rewarm_replay does not fit scenario cil_digits: asks=loss"):
        prepare(found)
    (found,) = compose.compose(["model=decoder_tiny", "learner=ncm"])
    with pytest.raises(UserError, match="model decoder_tiny reads tokens: scenario cil_digits is made of images"):
        prepare(found)


def test_pieces_of_a_batch_are_no_part_of_the_identity(finished, tmp_path):
    entry = run(tmp_path, "micro_batch=3")
    assert entry["run_id"] == finished[1]["rewarm_replay"]["run_id"] and entry["machine"]["micro_batch"] == 3
    (found,) = compose.compose(["micro_batch=3", "learner=ncm"])
    with pytest.raises(UserError, match="micro_batch has no effect in scenario cil_digits"):
        prepare(found)


def test_the_contract_suite_knows_both_families(clbench):
    done = clbench("check", "learner=infinite", "scenario=cpt_synthetic", *SMALL[1:9])
    lines = done.stdout.splitlines()
    assert len(lines) == 13 and all(line.startswith("ok") for line in lines)


def test_more_text_than_the_budget_allows_is_a_failed_record(tmp_path):
    found = job(f"results_dir={tmp_path}", "scenario.budget.exemplar_bytes=100")
    outcome = run_job(found)
    assert outcome.status == "failed" and "bytes of old text, the budget allows 100" in outcome.text


def test_texts_run_in_bits_per_byte(tmp_path):
    for i, name in enumerate(("eltec_eng", "peps_eng")):
        lines = [f"<|doc|>{name} {d}\n" + " ".join(f"w{(d * 7 + k * (i + 3)) % 97}" for k in range(300)) for d in range(12)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    words = (
        "scenario=cpt_text_weak",
        "scenario.tokens=2048",
        "scenario.context=16",
        "scenario.batch=8",
        "scenario.eval_tokens=512",
    )
    small = ("model.width=16", "model.depth=1", "model.heads=2", "num_threads=1", "device=cpu", "on_error=raise")
    (found,) = compose.compose([*words, *small, f"data_root={tmp_path}", f"results_dir={tmp_path}/results"])
    entry = record.read(run_job(found).path)
    values = loss_metrics.summary(entry)
    assert values["final_bpb"] == pytest.approx(values["final_loss"] / np.log(2)) and verify(tmp_path / "results")[1] == 0


KILL = (*SMALL, "learner.replay.share=0.25", "checkpoint_seconds=0")


def test_a_killed_process_goes_on_to_the_same_record(clbench):
    """Killed in the first trunk, then in a later experience."""
    words = ("run", *KILL, "scenario.tokens=6400")
    clbench(*words, "results_dir=straight")
    (straight,) = clbench.records("straight")
    for name in ("fit-0.pt", "experience.pt"):
        process = clbench.popen(*words, "results_dir=killed")
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            folders = list((clbench.folder / "killed" / "runs").glob("*/journal"))
            if folders and (folders[0] / name).exists():
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    clbench(*words, "results_dir=killed")
    (killed,) = clbench.records("killed")
    same = ("run_id", "sum_loss", "sum_loss_start", "curves", "ledger", "plan", "final_state_sha256", "steps", "experiences")
    assert {key: killed[key] for key in same} == {key: straight[key] for key in same}
    assert killed["resumed"] >= 1 and json.dumps(killed["ledger"])


def test_as_a_newcomer_types_it(clbench):
    done = clbench("plan", "scenario=cpt_synthetic", "learner=rewarm_replay")
    assert "decoder_tiny" in done.stdout and "1 new" in done.stdout
    wrong = clbench("run", "scenario=cpt_synthetic", "learner=rewarm_repay", code=2)
    assert "did you mean 'rewarm_replay'" in wrong.stderr
    wrong = clbench("run", "scenario=cpt_synthetic", "learner.replay.shar=0.1", code=2)
    assert "did you mean 'learner.replay.share'" in wrong.stderr
    shown = clbench("manifest", "show", *SMALL[:8]).stdout
    assert "language_0" in shown and "floor" in shown
