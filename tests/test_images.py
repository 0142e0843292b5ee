"""Experiences and evaluation sets as learners and the evaluation are handed them; images in files; joined batches."""

import numpy as np
import pytest
import torch
from PIL import Image

from clbench.interfaces import Experience, UserError
from clbench.streams.eval_sets import opaque, open_eval
from clbench.streams.generators import class_incremental, task_incremental
from clbench.streams.images.data import ImageBatch, ImageData, open_experience, shuffled
from clbench.streams.images.pixels import Pipeline, make_profile
from clbench.streams.scenario import ArrayImages, FileImages

STREAM = {
    "dataset": "digits",
    "increment": 2,
    "num_classes": 6,
    "order": [3, 1, 5, 0, 2, 4],
    "limit_train": 7,
    "limit_test": 4,
    "budget": {"epochs": 1},
}


def pipeline(augment="none", profile="small", size=32):
    return Pipeline(make_profile(profile, size), "cpu", augment)


@pytest.fixture(scope="module")
def scenario():
    return class_incremental(name="s", **STREAM)


def test_experiences_are_renumbered_by_appearance(scenario):
    p = pipeline()
    found = [open_experience(scenario, i, p) for i in range(3)]
    assert all(isinstance(e, Experience) for e in found)
    assert [e.classes for e in found] == [e.new_classes for e in found] == [(0, 1), (2, 3), (4, 5)]
    assert [e.original_classes for e in found] == [(3, 1), (5, 0), (2, 4)]
    assert [e.num_seen for e in found] == [2, 4, 6] and {e.task for e in found} == {None}
    for e in found:
        assert e.train.y.dtype == np.int64 and len(e.train) == 14
        for row in range(len(e.train)):
            original = int(scenario.dataset.y[e.train.ids[row]])
            assert e.original_classes[e.classes.index(int(e.train.y[row]))] == original
        batch = e.train.batch([3, 0])
        assert batch.ids.dtype == torch.int64 and batch.ids.tolist() == e.train.ids[[3, 0]].tolist()
        assert batch.y is not None and batch.y.tolist() == e.train.y[[3, 0]].tolist()
        assert batch.x.dtype == torch.float32 and batch.x.shape == (2, 3, 32, 32) and batch.x.is_contiguous()


def test_evaluation_batches_hide_labels(scenario):
    for j in range(3):
        e = open_eval(scenario, j, pipeline())
        assert e.first_seen == j and set(e.classes) == {2 * j, 2 * j + 1} and e.task is None
        labels, ids = [], []
        for batch, y in e.batches(3):
            assert batch.y is None and batch.plain and y.dtype == torch.int64 and len(batch) == len(y) <= 3
            labels += y.tolist()
            ids += batch.ids.tolist()
        assert labels == e.data.y.tolist() and ids == opaque(e.data.ids).tolist() and len(ids) == 8
        assert not set(ids) & set(open_experience(scenario, j, pipeline()).train.ids.tolist())


def test_tasks_are_disclosed_where_the_scenario_says_so():
    s = task_incremental(name="t", **STREAM)
    e, v = open_experience(s, 1, pipeline()), open_eval(s, 1, pipeline())
    assert e.task == v.task == 1 and e.train.batch([0]).task == 1
    other = open_experience(s, 0, pipeline())
    assert ImageBatch.cat([e.train.batch([0]), e.train.batch([1])]).task == 1
    assert ImageBatch.cat([e.train.batch([0]), other.train.batch([1])]).task is None


def test_pixels_are_read_when_asked_for_and_once():
    class Counting(ArrayImages):
        reads = 0

        def raw(self, ids):
            Counting.reads += 1
            return super().raw(ids)

    source = Counting(np.zeros((4, 8, 8, 3), np.uint8))
    data = ImageData(source, np.arange(4), np.arange(4), np.arange(4), pipeline(), None, "d")
    made = []
    data.pipeline.stored = lambda s, rows: made.append(len(rows)) or torch.zeros(len(rows), 3, 8, 8, dtype=torch.uint8)
    both = ImageBatch.cat([data.batch([0, 1]), data.batch([2])])
    assert made == [] and len(both) == 3
    assert both.x is both.x and made == [2, 1]


def test_mixed_sources_and_labels():
    rng = np.random.default_rng(0)
    p = pipeline("profile")
    small = [rng.integers(0, 256, (9, 9, 3), dtype=np.uint8) for _ in range(3)]
    uneven = [rng.integers(0, 256, (n, 12, 3), dtype=np.uint8) for n in (7, 30, 12)]
    a = ImageData.of_arrays(small, np.array([0, 1, 2]), np.array([10, 11, 12]), p)
    b = ImageData.of_arrays(uneven, np.array([3, 4, 5]), np.array([20, 21, 22]), p)
    both = ImageBatch.cat([a.batch([2, 0], key=1), b.batch([1], key=2)])
    assert both.ids.tolist() == [12, 10, 21] and both.y is not None and both.y.tolist() == [2, 0, 4]
    assert torch.equal(both.x, torch.cat([a.batch([2, 0], key=1).x, b.batch([1], key=2).x]))
    assert ImageBatch.cat([a.batch([0]), ImageBatch.of(torch.zeros(1, 3, 32, 32))]).y is None
    joined = ImageData.join([a, b])
    assert len(joined) == 6 and joined.ids.tolist() == [10, 11, 12, 20, 21, 22]
    for row, image in enumerate([*small, *uneven]):
        assert np.array_equal(joined.raw([row])[0], image)
    assert torch.equal(joined.batch([4, 1]).x[0], b.batch([1]).x[0])
    part = joined.subset([5, 0])
    assert part.y.tolist() == [5, 0] and np.array_equal(part.raw([0])[0], uneven[2])
    assert len(ImageData.of_arrays([], np.zeros(0, np.int64), np.zeros(0, np.int64), p)) == 0


def test_files_keep_their_order_and_agree_with_arrays(tmp_path):
    rng = np.random.default_rng(1)
    stored = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((30, 41), (64, 20), (8, 8)) for _ in range(7)]
    for i, image in enumerate(stored):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    ids = np.arange(len(stored))
    for profile in ("small", "timm", "slca_finegrained"):
        p = pipeline("profile", profile)
        files = ImageData(FileImages([tmp_path / f"{i}.png" for i in ids]), ids, ids, ids % 5, p, None, "files")
        listed = ImageData.of_arrays(stored, ids % 5, ids, p)
        for key in (None, 9):
            x = files.batch(ids, key).x
            assert torch.equal(x, listed.batch(ids, key).x) and torch.isfinite(x).all()
            assert torch.equal(x[11], files.batch([11], key).x[0])
    (tmp_path / "3.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot decode image .*3\.png"):
        _ = files.batch([1, 3]).x


def test_closed_data_gives_no_pixels(scenario):
    train = open_experience(scenario, 0, pipeline()).train
    train.close()
    for access in (
        lambda: train.batch([0]),
        lambda: train.raw([0]),
        lambda: train.subset([0]),
        lambda: [*train.test_batches(4)],
    ):
        with pytest.raises(UserError, match=r"data of experience 0 .* is gone"):
            access()


def test_visits_and_steps_of_partial_batches():
    data = ImageData.of_arrays([np.zeros((8, 8, 3), np.uint8)] * 5, np.zeros(5, np.int64), np.arange(5), pipeline())
    assert [len(shuffled(data, 2, 1, 0)(i)) for i in range(3)] == [2, 2, 1]
    dropped = shuffled(data, 2, 2, 0, drop_last=True)
    assert dropped.steps == 4 and dropped.visits == 8
    assert shuffled(data, 8, 1, 0, drop_last=True).steps == 1, "a set below one batch is still learned"
    with pytest.raises(UserError, match="batch_size must be at least 1, got 0"):
        shuffled(data, 0, 1, 0)
