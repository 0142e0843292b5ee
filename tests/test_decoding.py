"""Every bit depth and mode that Pillow opens is scaled as its maker meant, or refused by name; damage is found early."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clbench.interfaces import UserError
from clbench.streams import generators
from clbench.streams.images import damage
from clbench.streams.images.decoding import decode, decoded

RAMP = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)


def stored(image: Image.Image, kind: str, **options) -> np.ndarray:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return decoded(file, "x")


def refused(image: Image.Image, kind: str, *words: str, **options) -> None:
    with pytest.raises(UserError, match="cannot decode image x") as caught:
        stored(image, kind, **options)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


def grey(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels[..., None], 3, 2)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bits_are_eight_bits_times_257(kind):
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    assert np.array_equal(stored(deep, kind), grey(RAMP))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 65_535), min_size=6, max_size=6))
def test_sixteen_bits_are_rounded(values):
    found = stored(Image.fromarray(np.array(values, np.uint16).reshape(2, 3)), "PNG")
    exact = [v * 255 / 65_535 for v in values]
    assert np.abs(found[..., 0].reshape(-1) - np.array(exact)).max() <= 0.5 + 1e-9 and np.array_equal(
        found, grey(found[..., 0])
    )


def test_eight_bits_are_what_they_were():
    """Grey, colour and palettes: as Pillow converts them, alpha dropped."""
    colour = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(stored(Image.fromarray(RAMP), "PNG"), grey(RAMP))
    assert np.array_equal(stored(Image.fromarray(colour), "PNG"), colour)
    alpha = np.dstack([colour, np.zeros((5, 7), np.uint8)])
    assert np.array_equal(stored(Image.fromarray(alpha, "RGBA"), "PNG"), colour), "hidden colours count"
    both = np.dstack([RAMP, RAMP])
    assert np.array_equal(stored(Image.fromarray(both, "LA"), "PNG"), grey(RAMP))
    palette = Image.fromarray((RAMP // 86).astype(np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    table = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]], np.uint8)
    for options in ({}, {"transparency": 1}):
        assert np.array_equal(stored(palette, "PNG", **options), table[RAMP // 86])


def test_one_bit_cmyk_and_first_frames():
    bits = Image.fromarray(RAMP > 100)
    assert bits.mode == "1" and np.array_equal(stored(bits, "PNG"), grey(np.where(RAMP > 100, 255, 0).astype(np.uint8)))
    ink = Image.new("CMYK", (4, 4), (255, 0, 0, 0))
    assert stored(ink, "TIFF")[0, 0].tolist() == [0, 255, 255]
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    for kind in ("GIF", "PNG", "TIFF"):
        options = {"save_all": True, "append_images": frames[1:]}
        assert stored(frames[0], kind, **options)[0, 0].tolist() == [200, 0, 0]


def test_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.fromarray(grey(RAMP[:4]))
    assert np.array_equal(stored(wide, "PNG", exif=exif), grey(RAMP[:4]))


def test_floats_must_lie_between_0_and_1():
    assert np.array_equal(stored(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF"), grey(RAMP))
    refused(Image.fromarray(RAMP.astype(np.float32)), "TIFF", "mode F", "0..255", "0..1")
    refused(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF", "NaN")


def test_modes_without_a_white_are_refused_by_name():
    refused(Image.fromarray(RAMP.astype(np.int32)), "TIFF", "mode I", "32 bits")
    refused(Image.new("LAB", (2, 2)), "TIFF", "mode LAB")


def test_tiff_whose_white_is_zero_is_inverted():
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    file = io.BytesIO()
    deep.save(file, "TIFF", tiffinfo={262: 0})
    with Image.open(file) as image:
        inverted = image.tag_v2[262] == 0
    assert inverted and np.array_equal(decoded(file, "x"), grey(255 - RAMP))


CONTENT = {
    "empty.png": (b"", "it is empty"),
    "page.jpg": (b"<!DOCTYPE html><html>404</html>", "HTML"),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS"),
    "noise.jpg": (b"\xff\xd8\xff\xe0 no image", "Truncated"),
    "text.png": (b"hello", "no image format"),
}


def cut(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()[: len(file.getvalue()) * 2 // 3]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for part, number in (("train", 4), ("test", 2)):
        for c in ("cat", "dog"):
            (root / part / c).mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (8, 8), (i, 9, 9)).save(root / part / c / f"{i}.{'jpg' if i % 2 else 'png'}")
    return root


def scenario(root: Path, **options):
    return generators.class_incremental("photos", str(root), increment=1, **options)


@pytest.mark.parametrize("name", [*CONTENT, "cut.jpg", "cut.png", "cut.webp", "cut.bmp", "cut.gif"])
def test_damage_is_seen_before_training(photos: Path, name: str):
    kinds = {"cut.jpg": "JPEG", "cut.png": "PNG", "cut.webp": "WEBP", "cut.bmp": "BMP", "cut.gif": "GIF"}
    content, reason = (cut(kinds[name]), "") if name in kinds else CONTENT[name]
    damage.look(scenario(photos))
    (photos / "train" / "dog" / name).write_bytes(content)
    with pytest.raises(UserError, match=f"cannot decode image .*{name}: .*{reason}") as caught:
        damage.look(scenario(photos))
    assert str(caught.value).count("\n") == 0 and "clbench manifest check" in str(caught.value)
    with pytest.raises(UserError, match=f"cannot decode image .*{name}"):
        decode(photos / "train" / "dog" / name)
    found = damage.check(scenario(photos), print)
    assert (found.number, len(found.damaged)) == (13, 1) and name in found.damaged[0]


def test_only_images_of_the_stream_are_looked_at(photos: Path):
    (photos / "train" / "dog" / "z.png").write_bytes(b"")
    damage.look(scenario(photos, limit_train=4))
    assert damage.check(scenario(photos, limit_train=2, limit_test=1), print).number == 6


def test_bytes_behind_the_end_are_no_damage(photos: Path):
    """Telephones append to JPEG files; a suspect file is decoded before anything is said."""
    path = photos / "train" / "cat" / "1.jpg"
    path.write_bytes(path.read_bytes() + b"trailer" * 9)
    damage.look(scenario(photos))


def test_the_look_ends_when_its_time_is_over(photos: Path):
    for path in sorted((photos / "train").rglob("*.*"))[1:]:
        path.write_bytes(b"")
    damage.look(scenario(photos), seconds=-1.0)
    with pytest.raises(UserError, match="it is empty"):
        damage.look(scenario(photos))


def test_manifest_check_names_every_damaged_file(clbench, photos: Path):
    words = ("scenario=cil_folder", f"scenario.dataset={photos}", "scenario.increment=1")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGBA", (8, 6)).save(photos / "train" / "cat" / "seven.png", exif=exif)
    Image.fromarray(RAMP.astype(np.uint16)).save(photos / "train" / "dog" / "deep.png")
    out = clbench("manifest", "check", *words).stdout
    assert "14 images decoded in" in out and "(1 I;16, 12 RGB, 1 RGBA)" in out and "ok, sha256" in out
    for line in ("1 of 16 bits, rounded to 8", "1 with an EXIF orientation, which is not applied", "1 with transparency"):
        assert f"  {line}" in out
    (photos / "train" / "cat" / "1.jpg").write_bytes(cut("JPEG"))
    (photos / "test" / "dog" / "0.png").write_bytes(b"")
    err = clbench("manifest", "check", *words, code=2).stderr
    assert err.count("\n") == 3 and "cat/1.jpg" in err and "dog/0.png: it is empty" in err and "2 of 14 images" in err
    for command in ("plan", "run"):
        err = clbench(command, *words, "learner=ncm", code=2).stderr
        assert err.count("\n") == 1 and "cat/1.jpg" in err, err
    assert not clbench.records()


def test_manifest_check_of_files_and_of_arrays(clbench):
    words = ("scenario.num_classes=4", "scenario.limit_train=5")
    clbench("manifest", "write", *words, "--out", "a=b.json")
    assert json.loads((clbench.folder / "a=b.json").read_text())["sha256"] in clbench("manifest", "check", "a=b.json").stdout
    assert "no image has to be decoded" in clbench("manifest", "check", *words).stdout
