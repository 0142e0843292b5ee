"""Streams of class groups for masked autoencoders: what they hold, their runs on the embedded digits, what is refused."""

import json
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import Ridge

from clbench.config import compose
from clbench.config.registry import asks, choices
from clbench.evaluation import loss_metrics
from clbench.evaluation.linear_probe import hits
from clbench.interfaces import UserError
from clbench.records import record, rerun
from clbench.records.verify import verify
from clbench.report import report
from clbench.run.runner import prepare, run_job
from clbench.streams import rng
from clbench.streams.manifest import Manifest
from clbench.streams.tokens.class_groups import class_groups
from clbench.training.pretraining.data_mixture import Mixture, Replay

WRITERS = ("generated_replay", "generations")  # of text
LEARNERS = [name for name in choices("learner") if asks("learner", name) == "loss" and name not in WRITERS]
SMALL = (
    "scenario=cpt_mae_digits",
    "scenario.num_classes=6",
    "scenario.limit_train=16",
    "scenario.limit_test=10",
    "scenario.epochs=2",
    "scenario.batch=8",
    "scenario.probe_look=8",
    "scenario.probe_sequences=8",
    "scenario.probe_evenly=0",
    "model.width=16",
    "model.depth=1",
    "model.decoder_width=8",
    "num_threads=1",
    "device=cpu",
)
OPTIONS = {"name": "s", "dataset": "digits", "increment": 2, "epochs": 2, "batch": 8}


def job(*words):
    (made,) = compose.compose([*SMALL, *words])
    return made


def run(folder, *words):
    return record.read(run_job(job(f"results_dir={folder}", "on_error=raise", *words)).path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A record of every learner, one without replay, one where nothing shifts."""
    folder = tmp_path_factory.mktemp("results")
    made = {name: run(folder, f"learner={name}") for name in LEARNERS}
    made["plain"] = run(folder, "learner.replay.share=0")
    made["same"] = run(folder, "scenario.name=cpt_mae_same", "scenario.groups=[0,0,0]", "scenario.epochs=3")
    return folder, made


def test_a_stream_of_class_groups():
    made = class_groups(**OPTIONS, num_classes=6)
    m = made.manifest
    assert [d.classes for d in made.domains] == [(0, 1), (2, 3), (4, 5)] and made.side == 8 and not made.iid
    for i, entry in enumerate(m.experiences):
        data, domain = made.data(i), made.domains[i]
        assert entry["steps"] == 2 * len(data) // 8 and len(data) == len(domain.train) == entry["sequences"]
        first = data.ids(np.arange(len(data)))
        assert sorted(first) == list(range(len(data)))  # one pass is every image once
        second = data.ids(len(data) + np.arange(len(data)))
        assert sorted(second) == sorted(first) and not np.array_equal(first, second)
        assert not np.intersect1d(domain.train, domain.validation).size
        assert set(domain.y[domain.train]) == set(domain.classes)
    assert [e["first_seen"] for e in m.evals] == [0, 1, 2] and m.evals[0]["tokens"] == len(made.evaluation(0))
    assert "images of 8 pixels" in m.text() and "tokens" not in m.text()


def test_images_come_with_the_keys_of_their_masks():
    made = class_groups(**OPTIONS)
    data = made.data(1)
    a, b = data.read(np.array([3, 4])), data.read(np.array([4, 3 + len(data)]))
    assert a.dtype == np.uint8 and a.shape == (2, 8 * 8 * 3 + 8) and np.array_equal(a[1], b[0])
    stored = made.domains[1].pictures.source.array[made.domains[1].train[data.ids(np.array([3]))[0]]]
    assert np.array_equal(a[0, :-8].reshape(8, 8, 3), stored)
    again = data.take(data.numbers(np.array([3])), "replay", np.array([3]))
    assert np.array_equal(again[0, :-8], a[0, :-8]) and not np.array_equal(again[0, -8:], a[0, -8:])
    keys = data.read(np.arange(500))[:, -8:]
    assert len(np.unique(keys, axis=0)) == 500  # a new mask each time an image is seen
    fixed = made.evaluation(0)
    assert np.array_equal(fixed, class_groups(**OPTIONS).evaluation(0))
    assert len(np.unique(fixed[:, -8:], axis=0)) == len(fixed)


def test_replayed_images_displace_new_ones():
    made = class_groups(**OPTIONS, num_classes=4)
    some = [made.experience(i, True) for i in range(2)]
    old, new, replay = some[0].train, some[1].train, Replay(share=0.25, source="reshuffled")
    mixture = Mixture(new, [old], replay, replay.table(20, [40]), seen=[40])
    assert mixture.used(0, 20).tolist() == [40, 120]
    batch = mixture(5)
    assert batch.shape == (8, 200) and batch.dtype == np.uint8
    pool = {made.domains[0].pictures.source.array[i].tobytes() for i in made.domains[0].train}
    assert [row[:-8].tobytes() in pool for row in batch[:2]] == [True, True]
    assert replay.held_bytes([old], [40]) == 40 * 192
    with pytest.raises(UserError, match="holds no sequence of 192 bytes"):
        Replay(share=0.1, source="buffer", buffer_bytes=191).held_bytes([old], [40])


def test_groups_that_come_again_read_other_images():
    made = class_groups(**OPTIONS, groups=[1, 0, 1])
    m = made.manifest
    assert [e["name"] for e in m.experiences] == ["group1_1", "group0", "group1_2"]
    assert [(e["name"], e["first_seen"]) for e in m.evals] == [("group1", 0), ("group0", 1)]
    parts = [made.data(i).ids(np.arange(len(made.data(i)))) for i in (0, 2)]
    assert not np.intersect1d(*parts).size
    assert class_groups(**OPTIONS, groups=[0, 0]).iid


def test_the_manifest_is_saved_and_tells_streams_apart(tmp_path):
    made = class_groups(**OPTIONS)
    made.manifest.save(tmp_path / "m.json")
    assert Manifest.load(tmp_path / "m.json") == made.manifest
    hashes = {
        class_groups(**(OPTIONS | more)).manifest.sha256
        for more in (
            {},
            {"epochs": 3},
            {"batch": 9},
            {"order": "random"},
            {"limit_train": 50},
            {"augment": "flip"},
            {"size": 16},
        )
    }
    assert len(hashes) == 7


def test_folders_of_images_of_any_size(tmp_path):
    rng = np.random.default_rng(0)
    for part, number in (("train", 9), ("test", 3)):
        for label in ("ant", "bee"):
            (tmp_path / "set" / part / label).mkdir(parents=True)
            for i in range(number):
                shape = (rng.integers(20, 40), 30, 3)
                Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8)).save(tmp_path / "set" / part / label / f"{i}.png")
    options = OPTIONS | {"dataset": "set", "data_root": str(tmp_path), "increment": 1}
    with pytest.raises(UserError, match=r"set scenario\.size"):
        class_groups(**options)
    made = class_groups(**options, size=16, augment="crop")
    assert made.data(0).read(np.arange(3)).shape == (3, 16 * 16 * 3 + 8) and made.evaluation(1).shape == (3, 776)
    words = ("scenario=cpt_mae_folder", "scenario.dataset=set", f"data_root={tmp_path}", "scenario.increment=1")
    words += ("scenario.size=16", "scenario.batch=8", "scenario.epochs=1", *SMALL[-5:])
    (found,) = compose.compose([*words, f"results_dir={tmp_path}/results", "on_error=raise"])
    assert record.read(run_job(found).path)["status"] == "ok" and verify(tmp_path / "results")[1] == 0


@pytest.mark.data("cifar100.npz")
def test_cifar100_in_groups(tmp_path):
    (found,) = compose.compose(["scenario=cpt_mae_cifar100", f"results_dir={tmp_path}"])
    scenario = prepare(found).scenario
    assert len(scenario.manifest.experiences) == 5 and scenario.side == 32
    assert all(e["sequences"] == 10_000 and e["steps"] == 781 for e in scenario.manifest.experiences)
    assert scenario.evaluation(4).shape == (1000, 3080) and set(scenario.labelled(1).train_y) == set(range(20, 40))


def test_every_learner_gives_a_record_that_is_verified(finished):
    folder, made = finished
    text, code = verify(folder)
    assert code == 0 and f"{len(made)} records: {len(made)} verified" in text, text
    text, code = report(folder, strict=True)
    assert code == 0 and "cpt_mae_digits" in text
    header, *lines = (folder / "leaderboard_loss.csv").read_text().splitlines()
    assert "probe_own_mean" in header.split(",") and len(lines) == len(made)


def test_what_a_record_holds(finished):
    entry = finished[1]["infinite"]
    assert np.shape(entry["sum_loss"]) == (3, 3) and entry["n"] == entry["tokens"] == [20, 20, 20]
    assert entry["scenario"]["unit"] == "images" and entry["floor"] == [None] * 3
    ledger, steps = entry["ledger"], 2 * 32 // 8
    assert ledger["branch_new"] + ledger["branch_replay"] == 3 * (steps - round(steps * 0.85)) * 8
    assert sum(ledger[name] for name in ("trunk_new", "trunk_replay", "branch_new", "branch_replay")) == 3 * steps * 8
    assert entry["plan"][1]["role"] == "branch" and entry["sum_loss_trunk"][0] is not None
    assert np.shape(entry["probe"]["own"]) == (3, 3) and entry["probe"]["seen"][0][1:] == [None, None]
    values = loss_metrics.summary(entry)
    own = np.array(entry["probe"]["own"]) / 20
    assert values["probe_own"] == pytest.approx(own[-1].mean()) and 0 <= values["min_acc"] <= 1
    seen = [np.mean([c for c in row if c is not None]) / 20 for row in entry["probe"]["seen"]]
    assert values["probe_seen"] == pytest.approx(seen[-1])
    assert values["probe_seen_average"] == pytest.approx(np.mean(seen))
    assert values["probe_gain"] == pytest.approx(own[-1].mean() - np.mean(entry["probe"]["own_start"]) / 20)
    replays = finished[1]["rewarm_replay"]["ledger"]["trunk_replay"]
    assert abs(replays - 2 * steps * 8 * 0.05) < 1 and finished[1]["plain"]["ledger"]["trunk_replay"] == 0
    assert finished[1]["frozen"]["sum_loss"][0] == finished[1]["frozen"]["sum_loss"][2]
    assert finished[1]["frozen"]["probe"]["own"][0] == finished[1]["frozen"]["probe"]["own"][2]


def test_wrong_counts_of_the_probe_are_refused(finished, tmp_path):
    folder, made = finished
    (tmp_path / "manifests").symlink_to(folder / "manifests")
    for path, value, words in (
        (("own", 0, 0), 21, "not made of counts"),
        (("seen", 0, 2), 3, "not made of counts"),
        (("n",), [20, 20, 21], "other images"),
        (("own",), [], "a row for each experience"),
    ):
        entry = json.loads(json.dumps(made["plain"]))
        inner = entry["probe"]
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        record.write(entry, tmp_path / "records")
        text, code = verify(tmp_path)
        assert code == 1 and words in text, text
    record.write({k: v for k, v in made["plain"].items() if k != "probe"}, tmp_path / "records")
    assert "streams of images have a linear probe" in verify(tmp_path)[0]


def test_a_repeat_compares_losses_and_probe(finished):
    entry = finished[1]["plain"]
    (note,) = rerun.compare("x", entry, entry).notes
    assert "repeated 3 experiences: all 30 losses and counts are equal" in note
    for path, words in (
        (("probe", "own", 1, 0), "linear_probe[1].own[0] most"),
        (("sum_loss", 1, 2), "reconstruction[1].loss[2] most: the record says"),
    ):
        again = json.loads(json.dumps(entry))
        inner = again
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] -= 1
        verdict = rerun.compare("x", entry, again)
        assert verdict.verdict == "failed" and "1 of 30 losses and counts differ, " + words in verdict.reasons[0]


def test_evaluation_does_not_depend_on_batch_sizes(finished, tmp_path):
    entry = run(tmp_path, "learner.replay.share=0", "eval_batch_size=7")
    old = finished[1]["plain"]
    assert np.allclose(entry["sum_loss"], old["sum_loss"], rtol=1e-5)
    assert entry["final_state_sha256"] == old["final_state_sha256"] and entry["probe"]["n"] == old["probe"]["n"]
    again = run(tmp_path, "learner.replay.share=0", "force=true")
    assert again["sum_loss"] == old["sum_loss"] and again["curves"] == old["curves"] and again["probe"] == old["probe"]


def test_pieces_of_a_batch(finished, tmp_path):
    entry = run(tmp_path, "learner.replay.share=0", "micro_batch=3")
    assert np.allclose(entry["sum_loss"], finished[1]["plain"]["sum_loss"], rtol=1e-3)


def test_training_lowers_the_loss_and_shifts_are_forgotten(tmp_path):
    entry = run(tmp_path, "scenario.epochs=30", "learner.replay.share=0", "scenario.num_classes=4")
    start = np.array(entry["sum_loss_start"]) / entry["n"]
    matrix = np.array(entry["sum_loss"]) / entry["n"]
    assert matrix[0, 0] < 0.6 * start[0] and matrix[1, 1] < 0.6 * start[1]
    assert matrix[0, 1] > 1.1 * matrix[0, 0] and matrix[1, 0] > 1.1 * matrix[0, 0]  # the other group is drawn worse
    assert loss_metrics.summary(entry)["forgetting_after"] > 0


def test_the_linear_probe_is_ridge_regression():
    rng = np.random.default_rng(0)
    y, z = rng.integers(0, 3, 90), rng.integers(0, 3, 60)
    centres = rng.normal(size=(3, 5)) * [1, 10, 0.1, 1, 0]
    x, t = (centres[labels] + rng.normal(size=(len(labels), 5)) * [1, 10, 0.1, 1, 0] for labels in (y, z))
    mean, spread = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1)
    fitted = Ridge(alpha=1.0).fit((x - mean) / spread, 2.0 * np.eye(3)[y] - 1)
    expected = fitted.predict((t - mean) / spread).argmax(1) == z
    assert np.array_equal(hits(x, y, t, z), expected) and expected.mean() > 0.5
    assert hits(x[:1], y[:1], t, z).tolist() == (z == y[0]).tolist()  # one class: it is the answer


KILL = (*SMALL, "scenario.epochs=3", "learner=infinite", "learner.replay.share=0.25", "checkpoint_seconds=0")


def test_a_killed_process_goes_on_to_the_same_record(clbench):
    """Killed in the first trunk, then in a later experience."""
    clbench("run", *KILL, "results_dir=straight")
    (straight,) = clbench.records("straight")
    for name in ("fit-0.pt", "experience.pt"):
        process = clbench.popen("run", *KILL, "results_dir=killed")
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            folders = list((clbench.folder / "killed" / "runs").glob("*/journal"))
            if folders and (folders[0] / name).exists():
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    clbench("run", *KILL, "results_dir=killed")
    (killed,) = clbench.records("killed")
    same = ("run_id", "sum_loss", "sum_loss_start", "curves", "ledger", "plan", "final_state_sha256", "steps", "probe")
    assert {key: killed[key] for key in same} == {key: straight[key] for key in same}
    assert killed["resumed"] >= 1


def test_as_a_newcomer_types_it(clbench):
    done = clbench("plan", "scenario=cpt_mae_digits")
    assert "mae_nano" in done.stdout and "rewarm_replay" in done.stdout and "1 new" in done.stdout
    shown = clbench("manifest", "show", "scenario=cpt_mae_digits").stdout
    assert "group4" in shown and "images" in shown
    wrong = clbench("run", "scenario=cpt_mae_digits", "scenario.epoch=3", code=2)
    assert "did you mean 'scenario.epochs'" in wrong.stderr
    lines = clbench("check", "scenario=cpt_mae_digits").stdout.splitlines()
    assert len(lines) == 4 and all(line.startswith("ok") for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model=decoder_tiny",), "model decoder_tiny reads tokens: scenario cpt_mae_digits is made of images"),
        (("model=nano",), "model nano has no loss: scenario cpt_mae_digits needs a mae_... model"),
        (("scenario=cpt_synthetic", "model=mae_nano"), "model mae_nano reads images: scenario cpt_synthetic is made of tokens"),
        (("scenario=cil_digits", "model=mae_nano", "learner=ncm"), "masked autoencoder: scenario cil_digits asks for classes"),
        *(((f"learner={name}",), f"learner {name} does not fit scenario cpt_mae_digits: writes_text") for name in WRITERS),
        (("learner=slca",), "learner slca does not fit scenario cpt_mae_digits: asks=predict"),
        (("scenario=cil_digits", "model=nano", "learner=infinite"), "learner infinite does not fit scenario cil_digits"),
        (
            ("model=mae_base",),
            "reads images of 224 pixels, scenario cpt_mae_digits has 8: set model.image=8 or scenario.size=224",
        ),
        (("model.patch=3",), "model.image=8 is not a multiple of model.patch=3"),
        (("scenario.batch=2000",), "has 288 images for an experience"),
        (("scenario.epochs=0",), "scenario.epochs must be a whole number from 1"),
        (("scenario.augment=blur",), "scenario.augment must be one of none, flip, crop"),
        (("scenario.groups=[0,5]",), "scenario.groups must name groups 0..4"),
        (("scenario.size=3",), "scenario.size must be a whole number from 4"),
        (("scenario.budget.processed=100",), "the budget allows 100"),
        (("scenario.dataset=cifa10",), "did you mean cifar10"),
        (("learner.branch=0.1", "learner=infinite"), "does not fit the schedule"),
    ],
)
def test_what_cannot_run_is_refused_before_it_starts(tmp_path, words, message):
    base = [] if any(word.startswith("scenario=") for word in words) else ["scenario=cpt_mae_digits"]
    with pytest.raises(UserError) as error:
        (found,) = compose.compose([*base, *words, f"results_dir={tmp_path}"])
        prepare(found)
    assert message in str(error.value) and not (tmp_path / "records").exists()


def test_no_torch_is_needed_to_build_the_stream():
    data = class_groups(**OPTIONS).data(0)
    assert data.sequence_bytes == 192 and data.context == 1 and torch.from_numpy(data.read(np.arange(2))).dtype == torch.uint8
    assert rng.key("order", int(class_groups(**OPTIONS).domains[0].sha256[:16], 16)) == data.key
