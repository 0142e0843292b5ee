"""From an image file, or its bytes, to pixels: one rule for every mode that Pillow opens.

    1, L, P, RGB, YCbCr, CMYK, HSV   as Pillow converts them: 1 bit gives 0 and 255, CMYK is converted without its ICC profile
    LA, PA, RGBA, P with a           transparency is dropped, the stored colours count (as torchvision's loader does)
      transparent colour
    I;16 (16-bit grey)               0..65535 -> 0..255, rounded; TIFF of 12 bits 0..4095; TIFF whose white is 0 is inverted
    I (32-bit)                       from PGM, which Pillow scales to 0..65535: as 16-bit grey. Others are refused: they do not
                                     say which value is white
    F (float)                        0..1 -> 0..255, as float arrays are read; other values are refused
    LAB and all others               refused

16 bits a channel in colour keep their high byte, which is what Pillow reads. Of an animation the first frame is read. The EXIF
orientation is not applied: pixels count as they are stored, as for torchvision's loader and published numbers.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np

from clbench.interfaces import UserError

DIRECT = frozenset(("1", "L", "P", "RGB", "YCbCr", "CMYK", "HSV", "LA", "PA", "RGBA", "RGBX", "RGBa"))
GREY16 = frozenset(("I;16", "I;16B", "I;16L", "I;16N"))
_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262


def decode(path: Path) -> np.ndarray:
    """One image file -> uint8 [H, W, 3]. What cannot be decoded raises `UserError` naming it."""
    try:
        with path.open("rb") as file:
            return decoded(file, str(path))
    except OSError as error:
        raise UserError(f"cannot read image {path}: {error.strerror or error}") from None


def decoded(file: IO[bytes], name: str) -> np.ndarray:
    """An open file -> uint8 [H, W, 3]. A truncated, corrupt, oversized or ambiguous image raises `UserError` with its name."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if image.mode not in DIRECT:
                return _deep(image)
            rgba = image.mode in ("P", "PA", "LA") and "transparency" in image.info
            return np.asarray((image.convert("RGBA") if rgba else image).convert("RGB"), dtype=np.uint8)
    except UnidentifiedImageError:
        raise UserError(f"cannot decode image {name}: {_found_instead(file)}") from None
    except Exception as error:  # Pillow's decoders raise many kinds (OSError, SyntaxError, struct.error, ...)
        raise UserError(f"cannot decode image {name}: {' '.join(str(error).split()) or type(error).__name__}") from None


def _deep(image: Any) -> np.ndarray:
    """Grey images of more than 8 bits -> uint8 [H, W, 3]."""
    if image.mode in GREY16 or (image.mode == "I" and image.format == "PPM"):
        most = 65_535
        if image.format == "TIFF" and tuple(image.tag_v2.get(_TIFF_BITS, ())) == (12,):
            most = 4_095
        levels = np.asarray(image).astype(np.int64)
        grey = (np.clip(levels, 0, most) * 255 + most // 2) // most
    elif image.mode == "F":
        values = np.asarray(image, np.float64)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            found = f"{values.min():g}..{values.max():g}" if np.isfinite(values).all() else "NaN or infinity"
            raise ValueError(f"mode F with values {found}: float images must lie in 0..1")
        grey = np.rint(values * 255)
    else:
        why = " (32 bits), which does not say what value is white" if image.mode == "I" else ""
        raise ValueError(f"mode {image.mode}{why}: save it as RGB, or as grey of 8 or 16 bits")
    grey = grey.astype(np.uint8)
    if image.format == "TIFF" and image.tag_v2.get(_TIFF_PHOTOMETRIC) == 0:
        grey = 255 - grey
    return np.ascontiguousarray(np.broadcast_to(grey[..., None], (*grey.shape, 3)))


def _found_instead(file: IO[bytes]) -> str:
    """What a file holds that is no image."""
    file.seek(0)
    head = file.read(512).lstrip()
    if not head:
        return "it is empty"
    if head[:1] == b"<":
        return "it is an HTML or XML page, no image (a failed download?)"
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS: fetch the files with git lfs pull"
    return "Pillow knows no image format that begins like this"
