"""Corrupted pictures: by hand, against scipy's distributions, and the same whatever batch a sample comes in."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from clbench.interfaces import UserError
from clbench.streams import rng, transforms
from clbench.streams.images import corruptions
from clbench.streams.pools import JoinedPools
from clbench.streams.scenario import ArrayImages
from clbench.streams.transforms import CORRUPTIONS, TransformedImages

SMOOTH = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "pixelate", "contrast")


def corrupted(
    image: np.ndarray, kind: str, severity: int = 3, sample: int = 7, seed: int = 0, table: str = "auto"
) -> np.ndarray:
    return corruptions.corrupt(image, sample, kind=kind, severity=severity, seed=seed, table=table)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = rng.integers(seed, (height // 4 + 2) * (width // 4 + 2) * 3, 256).astype(np.uint8)
    small = Image.fromarray(coarse.reshape(height // 4 + 2, width // 4 + 2, 3))
    return np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))


def test_fifteen_kinds_with_constants_for_five_severities():
    assert len(CORRUPTIONS) == 15 == len(set(CORRUPTIONS)) == len(corruptions._WORK)
    for table in corruptions._TABLES.values():
        assert list(table) == list(CORRUPTIONS) and all(len(c) == 5 for c in table.values())


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_any_size_stays_and_noise_belongs_to_the_sample(kind: str):
    for shape in ((1, 1), (3, 2), (8, 8), (32, 20), (70, 90)):
        image = picture(*shape)
        before = image.copy()
        for severity in (1, 5):
            out = corrupted(image, kind, severity)
            assert out.shape == image.shape and out.dtype == np.uint8
            assert np.array_equal(out, corrupted(image, kind, severity)), "drawn twice, it is the same"
        assert np.array_equal(image, before), "what is stored stays"
    image = picture(32, 32)
    draws = kind not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    other = (corrupted(image, kind, 3, sample=8), corrupted(image, kind, 3, seed=1))
    assert [not np.array_equal(corrupted(image, kind), one) for one in other] == [draws, draws]
    assert not np.array_equal(corrupted(image, kind, 5), image)


@pytest.mark.parametrize("kind", SMOOTH)
def test_what_moves_pixels_leaves_a_plain_picture_plain(kind: str):
    plain = np.full((21, 30, 3), (40, 90, 200), np.uint8)
    for table in ("cifar", "imagenet"):
        assert np.array_equal(corrupted(plain, kind, 4, table=table), plain)


def test_by_hand():
    image = np.zeros((1, 2, 3), np.uint8)
    image[0, 0], image[0, 1] = (100, 50, 0), (0, 0, 0)
    # severity 4 of CIFAR: V rises by 0.2 = 51 levels: 100 -> 151, and the others in proportion; black becomes grey
    assert corrupted(image, "brightness", 4).tolist() == [[[151, 76, 0], [51, 51, 51]]]
    # severity 2: half of the distance to the channel's mean
    assert corrupted(image, "contrast", 2).tolist() == [[[75, 38, 0], [25, 12, 0]]]
    # ImageNet's severity 1: a share of 0.4 of it
    assert corrupted(image, "contrast", 1, table="imagenet").tolist() == [[[70, 35, 0], [30, 15, 0]]]
    four = np.arange(16, dtype=np.uint8).reshape(4, 4, 1).repeat(3, 2) * 10
    # severity 2 of ImageNet: 4 * 0.5 = 2 blocks of 2 x 2 pixels
    blocks = corrupted(four, "pixelate", 2, table="imagenet")[..., 0]
    assert blocks.tolist() == [[25, 25, 45, 45], [25, 25, 45, 45], [105, 105, 125, 125], [105, 105, 125, 125]]
    file = io.BytesIO()
    big = picture(16, 24)
    Image.fromarray(big).save(file, "JPEG", quality=50)
    assert np.array_equal(corrupted(big, "jpeg_compression", 4), np.asarray(Image.open(file).convert("RGB")))


def test_noise_has_the_stated_distribution():
    grey = np.full((60, 60, 3), 128, np.uint8)
    for severity, sigma in enumerate((0.04, 0.06, 0.08, 0.09, 0.10), 1):
        found = (corrupted(grey, "gaussian_noise", severity).astype(float) - 128) / 255
        assert abs(found.std() - sigma) < 0.03 * sigma and abs(found.mean()) < 0.003
        hit = corrupted(grey, "impulse_noise", severity)
        share = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
        assert set(np.unique(hit).tolist()) == {0, 128, 255} and abs((hit != 128).mean() - share) < 0.005
        assert abs((hit == 0).sum() / (hit != 128).sum() - 0.5) < 0.15


@pytest.mark.parametrize("c", [500, 50, 3])
def test_counts_of_photons_are_those_of_scipy(c: int):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    draws = corruptions._Draws(5)
    found = corruptions.shot_noise(levels, c, 1.0, draws)
    u = corruptions._Draws(5).uniform(16, 16, 3)
    assert np.array_equal(np.rint(found * c), stats.poisson.ppf(u, levels / 255 * c))


def test_tables_follow_the_shorter_side():
    small, large = picture(64, 200), picture(65, 200)
    for kind in ("gaussian_noise", "contrast"):
        assert np.array_equal(corrupted(small, kind), corrupted(small, kind, table="cifar"))
        assert np.array_equal(corrupted(large, kind), corrupted(large, kind, table="imagenet"))


def test_a_sample_looks_the_same_wherever_it_lies():
    """Alone, in a batch, in another order, and behind another data set in one pool."""
    x = np.stack([picture(12, 12, k) for k in range(4)])
    steps: Any = (
        {"resize": {"size": 10}},
        {"corrupt": {"kind": "gaussian_noise", "severity": 5, "seed": 3, "table": "auto"}},
    )
    source = TransformedImages(ArrayImages(x), steps)
    assert source.shape == (10, 10)
    together = source.raw(np.arange(4))
    for i, k in enumerate((2, 0, 3)):
        assert np.array_equal(source.raw(np.array([2, 0, 3]))[i], together[k])
        assert np.array_equal(source.raw(np.array([k]))[0], together[k])
    assert not np.array_equal(together[0].astype(int) - together[1], x[0, :10, :10].astype(int) - x[1, :10, :10])
    pool = JoinedPools([ArrayImages(x), ArrayImages(x.copy())])
    behind, rows = pool.part(np.array([5, 6]))
    alone = TransformedImages(behind, steps, 4).raw(rows)
    mixed = TransformedImages(pool, steps).raw(np.array([1, 5, 6]))
    assert all(np.array_equal(a, b) for a, b in zip(alone, mixed[1:], strict=True))
    assert not np.array_equal(mixed[0], mixed[1]), "the same picture of another sample has noise of its own"


@pytest.mark.parametrize(
    "wrong", [{"kind": "rain"}, {"severity": 0}, {"severity": 6}, {"seed": -1}, {"table": "mnist"}, {"strength": 1}]
)
def test_a_manifest_can_only_name_what_there_is(wrong: dict[str, Any]):
    step = {"corrupt": {"kind": "fog", "severity": 3, "seed": 0, "table": "auto"} | wrong}
    with pytest.raises(UserError, match=r"here: transform corrupt needs kind, severity, seed, table"):
        transforms.checked([step], "here")
