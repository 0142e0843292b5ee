"""Crops, resizes and profiles against Pillow and torchvision; batches as pure functions of their keys."""

from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from clbench.interfaces import UserError
from clbench.models.backbone import Family
from clbench.streams import rng
from clbench.streams.handles import opened
from clbench.streams.images.data import ImageBatch, ImageData, shuffled
from clbench.streams.images.pixels import Pipeline, make_profile, random_boxes
from clbench.streams.images.resample import crop_resize, crop_resize_one
from clbench.streams.scenario import ArrayImages

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def images(n, h, w, seed=0):
    rng = np.random.default_rng(seed)
    smooth = rng.integers(0, 256, (n, 6, 6, 3), dtype=np.uint8)
    large = np.stack([np.asarray(Image.fromarray(i).resize((w, h), Image.Resampling.BICUBIC)) for i in smooth])
    return np.clip(large.astype(int) + rng.integers(-40, 40, large.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [16, 32, 77, 224])
def test_crop_and_resize_agree_with_pillow(kernel, size):
    x = images(12, 40, 56)
    boxes = random_boxes(5, np.arange(12), np.tile([40, 56], (12, 1)), (0.05, 1.0))
    ours = crop_resize(torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(boxes), size, kernel) * 255
    for image, (top, left, height, width), mine in zip(x, boxes, ours, strict=True):
        part = Image.fromarray(image[top : top + height, left : left + width])
        theirs = np.asarray(part.resize((size, size), RESAMPLING[kernel])).astype(float)
        gap = np.abs(mine.permute(1, 2, 0).numpy() - theirs)
        assert gap.max() <= 1.3 and gap.mean() < 0.4, (gap.max(), gap.mean())  # Pillow rounds twice, each time by up to 1/2


@pytest.mark.parametrize(("name", "size"), [("timm", 224), ("pilot", 224), ("unit", 32), ("small", 32), ("slca_cifar", 64)])
@pytest.mark.parametrize("shape", [(32, 32), (50, 90), (300, 260)])
def test_test_view_agrees_with_pillow(name, size, shape):
    profile = make_profile(name, size, {"crop_pct": 0.9, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    x = images(2, *shape)
    z = Pipeline(profile, torch.device("cpu"))(x, np.arange(2), None)
    mean, std = (torch.tensor(v)[:, None, None] for v in (profile.mean, profile.std))
    short = min(shape)
    height, width = (profile.resize if s == short else profile.resize * s // short for s in shape)
    for image, mine in zip(x, z * std + mean, strict=True):
        large = Image.fromarray(image).resize((width, height), RESAMPLING[profile.test_kernel])
        top, left = round((height - size) / 2), round((width - size) / 2)
        theirs = np.asarray(large.crop((left, top, left + size, top + size))).astype(float)
        gap = np.abs(255 * mine.permute(1, 2, 0).numpy() - theirs)
        assert gap.max() <= 1.3, gap.max()


def test_crop_distribution_is_torchvisions():
    from torchvision.transforms import RandomResizedCrop

    shape, n = (40, 60), 4000
    ours = random_boxes(11, np.arange(n), np.tile(shape, (n, 1)), (0.08, 1.0))
    torch.manual_seed(0)
    blank = torch.zeros(3, *shape)
    theirs = np.array([RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    for f in (lambda b: b[:, 2] * b[:, 3], lambda b: np.log(b[:, 3] / b[:, 2]), lambda b: b[:, 0], lambda b: b[:, 1]):
        a, b = np.sort(f(ours).astype(float)), np.sort(f(theirs).astype(float))
        points = np.unique(np.concatenate([a, b]))
        gap = np.abs(np.searchsorted(a, points, "right") - np.searchsorted(b, points, "right")).max() / n
        assert gap < 1.95 * (2 / n) ** 0.5, gap  # Kolmogorov-Smirnov, p = 0.001
    assert (ours[:, 0] + ours[:, 2] <= 40).all() and (ours[:, 1] + ours[:, 3] <= 60).all()


def data(n=10, augment="profile", profile="small", size=32, shape=(20, 24)):
    pipeline = Pipeline(make_profile(profile, size), torch.device("cpu"), augment)
    source = ArrayImages(images(n, *shape))
    return ImageData(source, np.arange(n), np.arange(n) + 100, np.arange(n) % 3, pipeline, None, "experience 0")


@pytest.mark.parametrize("profile", ["small", "timm", "pilot", "slca_cifar", "slca_finegrained"])
def test_augmentation_of_a_sample_depends_on_no_other(profile):
    d = data(profile=profile)
    whole = d.batch(np.arange(10), key=7).x
    for rows in ([3], [9, 3], [0, 1, 2, 3]):
        torch.testing.assert_close(d.batch(rows, key=7).x[rows.index(3)], whole[3])
    assert not torch.equal(d.batch([3], key=8).x[0], whole[3])
    assert len({float(v.sum()) for v in d.batch([3] * 1, key=7).x}) == 1


@pytest.mark.parametrize("key", [None, 7])
def test_a_large_batch_is_made_in_pieces(key):
    """37 images at once are those of 5 at a time, to the bit."""
    d = data(37)
    singles = torch.cat([d.batch(np.arange(i, min(i + 5, 37)), key).x for i in range(0, 37, 5)])
    assert torch.equal(d.batch(np.arange(37), key).x, singles)


def test_array_and_list_sources_agree():
    for profile in ("timm", "small", "slca_finegrained"):
        d = data(profile=profile)
        listed = ImageData.of_arrays(d.raw(range(10)), d.y, d.ids, d.pipeline)
        mixed = ImageData.of_arrays([*d.raw(range(9)), images(1, 33, 21)[0]], d.y, d.ids, d.pipeline)
        for key in (None, 5):
            torch.testing.assert_close(listed.batch(range(10), key).x, d.batch(range(10), key).x)
            gap = (mixed.batch(range(9), key).x - d.batch(range(9), key).x).abs().max().item()
            assert gap <= 1.3 / 255 / min(d.pipeline.profile.std), gap


def test_flips_are_half_and_none_without_profile():
    n = 2000
    flips = (rng.uniform(rng.key(3, "flip"), np.arange(n)) < 0.5).mean()
    assert abs(flips - 0.5) < 0.04
    d = data(augment="none")
    assert torch.equal(d.batch(range(10), 3).x, d.batch(range(10)).x)
    assert not torch.equal(data(augment="shift").batch(range(10), 3).x, d.batch(range(10)).x)


def test_batches_are_a_pure_function_of_the_step():
    d = data(10)
    a, b = shuffled(d, 4, 3, key=1), shuffled(d, 4, 3, key=1)
    assert a.steps == 9 and a.visits == 30
    forward = [a(i) for i in range(9)]
    backward = [b(i) for i in reversed(range(9))][::-1]
    for one, two in zip(forward, backward, strict=True):
        assert torch.equal(one.ids, two.ids) and torch.equal(one.x, two.x)
    for epoch in range(3):
        ids = torch.cat([forward[3 * epoch + i].ids for i in range(3)])
        assert sorted(ids.tolist()) == sorted(d.ids.tolist())
    assert [batch.ids.tolist() for batch in forward[:3]] != [batch.ids.tolist() for batch in forward[3:6]]
    assert [len(shuffled(d, 4, 1, 0, drop_last=True)(i)) for i in range(2)] == [4, 4]


def test_closed_data_is_gone():
    d = data()
    d.close()
    with pytest.raises(UserError, match="data of experience 0 is gone"):
        d.batch([0])


def test_joined_batches():
    d = data()
    both = ImageBatch.cat([d.batch([0, 1]), d.batch([2], 5)])
    assert len(both) == 3 and both.y is not None and not both.plain and both.x.shape == (3, 3, 32, 32)
    assert torch.equal(ImageData.join([d, data()]).batch([12]).x, d.batch([2]).x)


def test_unknown_profile_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'slca_cifar'"):
        make_profile("slca_cifer", 224)


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(97, 61), (35, 33), (8, 30)])
def test_batched_and_single_resampling_agree_on_noise(kernel, shape):
    """Row pass first, whatever the shape: with the other order, clipped overshoot differs by up to 20 levels on noise."""
    x = np.random.default_rng(2).integers(0, 256, (9, *shape, 3), dtype=np.uint8)
    boxes = random_boxes(3, np.arange(9), np.tile(shape, (9, 1)), (0.05, 1.0))
    ours = crop_resize(torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(boxes), (20, 32), kernel) * 255
    theirs = np.stack([crop_resize_one(i, tuple(b), (20, 32), kernel) for i, b in zip(x, boxes.tolist(), strict=True)])
    gap = np.abs(ours.permute(0, 2, 3, 1).numpy() - theirs)
    assert gap.max() <= 1.01 and gap.mean() < 0.03, (gap.max(), gap.mean())


def test_weights_take_pixels_of_the_crop_only():
    x = torch.full((1, 3, 20, 20), 255, dtype=torch.uint8)
    x[:, :, 5:13, 6:17] = 40
    for kernel in RESAMPLING:
        assert (crop_resize(x, torch.tensor([[5, 6, 8, 11]]), 32, kernel) * 255 - 40).abs().max() < 1e-3


def test_autocast_does_not_reach_the_pixels():
    p = Pipeline(make_profile("unit", 32), "cpu")
    x = images(2, 20, 20)
    with torch.autocast("cpu", torch.bfloat16):
        inside = p(x, np.arange(2), 1)
    assert inside.dtype == torch.float32 and torch.equal(inside, p(x, np.arange(2), 1))


@pytest.mark.parametrize("extra", [1, 3, 5, 6])
def test_centre_crop_is_torchvisions(extra):
    from torchvision.transforms import CenterCrop

    x = images(1, 32 + extra, 32)
    ours = Pipeline(make_profile("unit", 32), "cpu")(x, np.arange(1), None)[0]
    theirs = np.asarray(CenterCrop(32)(Image.fromarray(x[0])))
    assert torch.equal(ours, torch.from_numpy(theirs.copy()).permute(2, 0, 1).float() / 255)


def test_small_is_a_padded_crop_with_a_flip():
    x = images(1, 32, 32)
    p = Pipeline(make_profile("small", 32), "cpu")
    padded = np.pad(x[0].astype(np.float32) / 255, ((4, 4), (4, 4), (0, 0)))
    places = set()
    for key in range(40):
        mine = (p(x, np.array([5]), key)[0] * 0.5 + 0.5).permute(1, 2, 0).numpy()
        fits = [
            (i, j, s)
            for i in range(9)
            for j in range(9)
            for s in (1, -1)
            if np.allclose(padded[i : i + 32, j : j + 32][:, ::s], mine, atol=1e-5)
        ]
        assert len(fits) == 1
        places.add(fits[0])
    assert len(places) > 30 and {s for *_, s in places} == {1, -1}


def test_fecam_does_not_augment_and_shift_does_not_flip():
    x, ids = images(6, 40, 30), np.arange(6)
    p = Pipeline(make_profile("fecam", 32), "cpu")
    assert torch.equal(p(x, ids, 3), p(x, ids, None))
    ramp = np.broadcast_to(np.arange(0, 128, 4, dtype=np.uint8)[None, None, :, None] + 1, (50, 32, 32, 3)).copy()
    moved = Pipeline(make_profile("unit", 32), "cpu", "shift")(ramp, np.arange(50), 3)[:, 0, 16]
    inner = moved[:, 4:-4]
    assert (inner[:, 1:] > inner[:, :-1]).all(), "a mirrored ramp falls"
    assert (moved[:, 0] == 0).any() and (moved[:, -1] == 0).any()


def test_brightness_stays_in_its_range():
    grey = np.full((500, 8, 8, 3), 100, np.uint8)
    p = Pipeline(make_profile("slca_cifar", 8), "cpu")
    gain = (p(grey, np.arange(500), 1) * p._std + p._mean)[:, 0, 0, 0] * 255 / 100
    assert 1 - 63 / 255 - 1e-4 <= gain.min() < 0.78 and 1.22 < gain.max() <= 1 + 63 / 255 + 1e-4
    white = p(np.full((50, 8, 8, 3), 255, np.uint8), np.arange(50), 1) * p._std + p._mean
    assert white.max() <= 1 + 1e-5


def test_timm_profile_takes_the_weights_own_numbers():
    config = {
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "interpolation": "bilinear",
        "mean": (0.1, 0.2, 0.3),
        "std": (1.0, 2.0, 3.0),
    }
    profile = make_profile("timm", 32, config)
    assert profile.squash and (profile.resize, profile.test_kernel, profile.train_kernel) == (32, "bilinear", "bilinear")
    x = images(1, 60, 40)
    ours = Pipeline(profile, "cpu")(x, np.arange(1), None)[0]
    theirs = crop_resize_one(x[0], (0, 0, 60, 40), (32, 32), "bilinear")
    theirs = (theirs / 255 - np.array(config["mean"])) / np.array(config["std"])
    assert np.abs(ours.permute(1, 2, 0).numpy() - theirs).max() <= 1.01 / 255
    with pytest.raises(UserError, match="profile timm: interpolation 'lanczos'"):
        make_profile("timm", 32, {"interpolation": "lanczos"})


@pytest.mark.parametrize("name", get_args(Family))
def test_every_profile_at_every_size(name):
    for size, shape in ((32, (8, 8)), (64, (1, 90))):
        for augment in ("profile", "none", "shift"):
            d = data(3, augment, name, size, shape)
            for key in (None, 1):
                x = d.batch([0, 1, 2], key).x
                assert x.shape == (3, 3, size, size) and torch.isfinite(x).all()


def test_profiles_are_the_ones_that_the_model_option_lists():
    with pytest.raises(UserError) as error:
        make_profile("?", 32)
    assert f"(one of {', '.join(sorted(get_args(Family)))})" in str(error.value)


def test_resident_arrays_give_the_same_pixels():
    d = data()
    rows = np.array([7, 2])
    apart, resident = d.batch(rows).x, opened(d.pipeline._resident)
    d.pipeline.resident_bytes = 1 << 20
    assert torch.equal(d.batch(rows).x, apart) and len(resident) == 1
    d.close()
    assert len(resident) == 0, "the copy goes with its source"
