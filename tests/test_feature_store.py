"""The feature store: the same values with and without it, one pass for a whole sweep, bounded, safe for many jobs."""

import copy
import multiprocessing
import os

import numpy as np
import pytest
import torch

from clbench.interfaces import UserError
from clbench.models import feature_store
from clbench.models.feature_store import FeatureStore, open_store, same_in_any_batch
from clbench.models.pet_modules import adapter
from clbench.training.runtime import Runtime
from tests.test_models import SIX, nano, plain_data


def store_at(folder, limit=1 << 30, **context):
    return FeatureStore(folder, limit, {"dataset": "d", **context})


def frozen(store):
    model = nano()
    model.freeze()
    model.memory.attach(store, SIX)
    return model


def everything(model, size=4):
    return torch.cat([model.features(b) for b in plain_data(model).test_batches(size)])


def test_values_are_those_of_a_pass_and_no_image_passes_twice(tmp_path):
    without = everything(frozen(None))
    first = frozen(store_at(tmp_path))
    assert torch.equal(everything(first), without) and first.passes == {"train": 0, "eval": 6, "stored": 0}
    first.memory.flush()
    second = frozen(store_at(tmp_path))
    assert torch.equal(everything(second, 5), without) and second.passes == {"train": 0, "eval": 0, "stored": 6}
    assert second.features(plain_data(second).batch([3, 3, 1])).equal(without[[3, 3, 1]])
    assert second.passes["stored"] == 6, "memory answers before the disk is asked again"


def test_what_is_not_known_passes_and_only_that(tmp_path):
    model = frozen(store_at(tmp_path))
    data = plain_data(model)
    model.features(data.batch([0, 2, 4]))
    model.memory.flush()
    other = frozen(store_at(tmp_path))
    got = other.features(plain_data(other).batch([0, 1, 2, 3]))
    assert other.passes == {"train": 0, "eval": 2, "stored": 2}
    assert torch.equal(got, everything(frozen(None))[:4])


@pytest.mark.parametrize("change", ["weights", "context", "norm", "autocast", "hook"])
def test_another_state_finds_nothing(tmp_path, change):
    first = frozen(store_at(tmp_path))
    everything(first)
    first.memory.flush()
    store = store_at(tmp_path, profile="other") if change == "context" else store_at(tmp_path)
    model = frozen(store)
    if change == "weights":
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] += 1e-6
    if change == "norm":
        model.fresh_norm()
    if change == "hook":
        model.net.norm.register_forward_hook(lambda layer, inputs, out: out + 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        got = everything(model)
    assert model.passes == {"train": 0, "eval": 6, "stored": 0}
    assert change == "context" or not torch.equal(got, everything(frozen(None)))
    if change == "hook":
        store.flush()
        assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 1, "what hangs on it is unknown: nothing is kept"


def test_modules_count_by_their_values_and_tags(tmp_path):
    def trained(scale):
        model = frozen(store_at(tmp_path))
        pet = adapter(model, Runtime(seed=0, device=torch.device("cpu")), bottleneck=2)
        with torch.no_grad():
            pet.values["0/up"].fill_(scale)
        return model, pet

    model, pet = trained(1.0)
    with torch.no_grad():
        everything(model)
        assert not len(model.memory), "values that may still change are never remembered"
        with pet.use(tag="t"):
            one = everything(model)
        with pet.off():
            bare = everything(model)
    model.memory.flush()
    again, pet = trained(1.0)
    with torch.no_grad(), pet.use(tag="another name for the same values"):
        assert torch.equal(everything(again), one) and again.passes["stored"] == 6
    third, pet = trained(2.0)
    with torch.no_grad(), pet.use(tag="t"):
        assert not torch.equal(everything(third), one) and third.passes["stored"] == 0
    with pet.off():
        assert torch.equal(everything(third), bare) and third.passes["stored"] == 6


def test_a_copy_shares_the_store_but_not_the_memory(tmp_path):
    model = frozen(store_at(tmp_path))
    everything(model)
    twin = copy.deepcopy(model)
    assert twin.memory is not model.memory and not len(twin.memory)
    everything(twin)
    assert model.passes["stored"] == 6 and model.passes["eval"] == 6


def test_damaged_and_foreign_files_are_not_believed(tmp_path):
    model = frozen(store_at(tmp_path))
    truth = everything(model)
    model.memory.flush()
    (path,) = tmp_path.glob("*/*.npy")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    (path.parent / "0123.npy").write_text("no features")
    (path.parent / ".half.npy.1.tmp").write_text("half")
    other = frozen(store_at(tmp_path))
    assert torch.equal(everything(other), truth) and other.passes["stored"] == 0
    assert not path.exists(), "a file that is wrong is removed, not asked again"


def test_room_is_made_by_age(tmp_path):
    rows = torch.arange(40.0).view(10, 4)
    for age, name in enumerate("abcd"):
        store = store_at(tmp_path)
        store.add(name, range(10), rows)
        store.flush()
        os.utime(tmp_path / name / "used", (1000 + age, 1000 + age))
    size = sum(f.stat().st_size for f in (tmp_path / "a").iterdir())
    store = store_at(tmp_path, limit=3 * size)
    assert store.take("a", [3])[3].tolist() == rows[3].tolist()
    store.add("e", range(10), rows)
    store.flush()
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["a", "d", "e"], "b and c were used longest ago"
    assert store.take("a", [9])[9].tolist() == rows[9].tolist()


def test_a_full_disk_costs_nothing_but_the_saving(tmp_path, monkeypatch):
    model = frozen(store_at(tmp_path))
    truth = everything(model)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_store.os, "replace", full)
    model.memory.flush()
    model.forget()
    assert torch.equal(everything(model), truth) and model.passes["stored"] == 6, "they stay in memory"
    assert not list(tmp_path.glob("*/*"))


def _fill(folder, barrier, number):
    store = store_at(folder)
    barrier.wait()
    for round_ in range(20):
        ids = [(number * 7 + round_ * 3 + k) % 50 for k in range(10)]
        known = store.take("g", ids)
        new = [i for i in ids if i not in known]
        store.add("g", new, torch.tensor([[float(i)] * 3 for i in new]).view(-1, 3))
        store.flush()


def test_many_jobs_write_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    jobs = [context.Process(target=_fill, args=(tmp_path, barrier, n)) for n in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0] * 4
    known = store_at(tmp_path).take("g", range(50))
    assert known and all(row.tolist() == [float(i)] * 3 for i, row in known.items())
    assert not list(tmp_path.glob("*/*.tmp"))


@pytest.mark.parametrize("ids", [np.array([5, 1, 9]), [0], list(range(100))])
def test_rows_come_back_as_they_were(tmp_path, ids):
    rows = torch.randn(len(ids), 7, generator=torch.Generator().manual_seed(1))
    store = store_at(tmp_path)
    store.add("g", [int(i) for i in ids], rows)
    before = store.take("g", [int(i) for i in ids])
    store.flush()
    after = store_at(tmp_path).take("g", [*map(int, ids), 10_000])
    for i, row in zip(ids, rows, strict=True):
        assert torch.equal(before[int(i)], row) and torch.equal(after[int(i)], row)
    assert 10_000 not in after


def test_the_probe_tells_networks_apart():
    model = nano()
    model.freeze()
    here = torch.device("cpu")
    assert same_in_any_batch(model, 32, here, torch.autocast("cpu", enabled=False)) in (True, False)
    assert model.passes == {"train": 0, "eval": 0, "stored": 0}
    model.net.norm.register_forward_hook(lambda layer, inputs, out: out + len(out))
    assert not same_in_any_batch(model, 32, here, torch.autocast("cpu", enabled=False))


@pytest.mark.parametrize(
    ("mode", "size", "message"),
    [
        ("maybe", 8, "feature_store must be one of auto, on, off"),
        ("on", 0, "feature_store_gb"),
        ("on", "big", "feature_store_gb"),
    ],
)
def test_wrong_options(mode, size, message):
    with pytest.raises(UserError, match=message):
        open_store(mode, size, {}, None, lambda: True)


def test_modes(tmp_path, monkeypatch):
    monkeypatch.setenv("CLBENCH_CACHE", str(tmp_path))
    assert open_store("off", 1, {}, None, lambda: True) is None
    assert open_store("auto", 1, {}, None, lambda: False) is None, "not where features depend on the batch"
    assert open_store("on", 1, {}, None, lambda: False).folder == tmp_path / "features"
    monkeypatch.setenv("CLBENCH_CACHE", str(tmp_path / "features" / "lock" / "x"))
    (tmp_path / "features" / "lock").write_text("")
    assert open_store("auto", 1, {}, None, lambda: True) is None, "a folder that cannot be: no store"
    with pytest.raises(UserError, match="cannot write"):
        open_store("on", 1, {}, None, lambda: True)


def test_a_sweep_extracts_once(clbench):
    """Two learners, two class orders: each image goes through the network once; numbers as without the store."""
    words = [
        "scenario.num_classes=4",
        "scenario.limit_train=8",
        "scenario.limit_test=5",
        "scenario.order=random",
        "num_threads=1",
    ]
    made = {}
    for mode in ("off", "on"):
        for learner in ("ncm", "fecam"):
            for order in (0, 1):
                clbench(
                    "run",
                    f"learner={learner}",
                    f"scenario.order_seed={order}",
                    *words,
                    f"feature_store={mode}",
                    f"results_dir={mode}",
                )
        made[mode] = {entry["run_id"]: entry for entry in clbench.records(mode)}
    assert made["off"].keys() == made["on"].keys() and len(made["on"]) == 4, "where the store lies is no part of a run"
    for name, entry in made["off"].items():
        for key in ("correct", "class_correct", "correct_top5", "final_state_sha256"):
            assert entry[key] == made["on"][name][key]
    passed = [entry["passes"] for entry in made["on"].values()]
    assert sum(p["eval"] for p in passed) == 4 * (8 + 5)
    assert sum(p["stored"] for p in passed) == 3 * 4 * (8 + 5)
    assert all(entry["passes"]["stored"] == 0 for entry in made["off"].values())
