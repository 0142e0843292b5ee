"""Images that cannot be decoded, found before training: a quick look at the ends of files, and a check that decodes all."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

import numpy as np

from clbench.interfaces import UserError
from clbench.streams.images.decoding import decoded
from clbench.streams.pools import JoinedPools

LOOK_SECONDS = 3.0  # that the quick look takes at most
MOST_LINES = 20
_TAIL = 4096
_FIRST = 64  # images after which the time for all is known
_ORIENTATION = 0x0112
_LOOKED: set[tuple[str, str, float]] = set()  # streams without damage: data set, manifest, seconds


class EncodedSource(Protocol):
    """Images that are stored encoded, one by one, as files are."""

    def opened(self, i: int) -> tuple[IO[bytes], str]:
        """The bytes of image i to read from, and its name for messages."""
        ...


def encoded_in(scenario: Any) -> Iterator[tuple[EncodedSource, int]]:
    """The encoded images that a stream reads, with their numbers in their sources; images in memory are left out."""
    if hasattr(scenario, "dataset"):
        used = [entry.train for entry in scenario.manifest.experiences] + [entry.ids for entry in scenario.manifest.evals]
        yield from _encoded(scenario.dataset.images, np.concatenate(used))
        return
    for domain in getattr(scenario, "domains", ()):
        if hasattr(domain, "pictures"):
            yield from _encoded(domain.pictures.source, np.concatenate([domain.train, domain.validation]))


def _encoded(images: Any, ids: np.ndarray) -> Iterator[tuple[EncodedSource, int]]:
    """By source, each image once, in order of first use."""
    ids = np.asarray(list(dict.fromkeys(ids.tolist())), np.int64)
    if isinstance(images, JoinedPools):
        for source, first, end in zip(images.sources, images.first, images.first[1:], strict=False):
            yield from _encoded(source, ids[(ids >= first) & (ids < end)] - first)
    elif hasattr(images, "opened"):
        yield from ((images, i) for i in ids.tolist())


def looks_whole(head: bytes, tail: bytes, size: int) -> bool:
    """Whether the first 16 bytes, the last ones and the size are those of a whole file. False means: decode it to know."""
    if head.startswith(b"\xff\xd8\xff"):
        return tail.rstrip(b"\0").endswith(b"\xff\xd9")
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return tail.rstrip(b"\0\r\n").endswith(b"IEND\xaeB`\x82")
    if head.startswith(b"RIFF"):
        return size >= int.from_bytes(head[4:8], "little") + 8
    if head.startswith(b"BM"):
        return size >= int.from_bytes(head[2:6], "little")
    return head.startswith(b"GIF8") and tail.rstrip(b"\0").endswith(b";")


def _suspect(file: IO[bytes]) -> bool:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL))
    tail = file.read()
    file.seek(0)
    head = file.read(16)
    file.seek(0)
    return not looks_whole(head, tail, size)


def look(scenario: Any, seconds: float = LOOK_SECONDS) -> None:
    """Raise `UserError` with the first image that cannot be decoded, among those seen in `seconds`.

    Only files whose first and last bytes are suspect are decoded: empty and truncated ones, and those that are no images. A
    stream is looked at once a process, so that the jobs of a sweep do not repeat it.
    """
    key = (getattr(getattr(scenario, "dataset", None), "sha256", ""), scenario.manifest.sha256, seconds)
    if key in _LOOKED:
        return
    end = time.monotonic() + seconds
    for source, i in encoded_in(scenario):
        file, name = source.opened(i)
        with file:
            try:
                _ = decoded(file, name) if _suspect(file) else None
            except UserError as error:
                raise UserError(f"{error}; clbench manifest check with the same scenario names all such files") from None
        if time.monotonic() > end:
            break
    _LOOKED.add(key)


@dataclass
class Checked:
    """What a check of all images found: how many, in which modes, what is special about some, messages of damaged ones."""

    number: int = 0
    seconds: float = 0.0
    modes: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    damaged: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The result for people."""
        modes = ", ".join(f"{number} {mode}" for mode, number in sorted(self.modes.items()))
        said = [f"{self.number} images decoded in {self.seconds:.1f} s" + (f" ({modes})" if modes else "")]
        return "\n".join([*said, *(f"  {number} {what}" for what, number in sorted(self.remarks.items()))])


def check(scenario: Any, announce: Callable[[str], None]) -> Checked:
    """Decode every image that the stream reads; `announce` is told how long that takes, where it is more than seconds."""
    todo, found, start = list(encoded_in(scenario)), Checked(), time.monotonic()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for done, (message, mode, remarks) in enumerate(pool.map(lambda one: _checked(*one), todo), 1):
            found.damaged += [message] if message else []
            found.modes.update([mode] if mode else [])
            found.remarks.update(remarks)
            if done == _FIRST and (left := (time.monotonic() - start) / done * (len(todo) - done)) > 5:
                announce(f"decoding {len(todo)} images takes about {left:.0f} s")
    found.number, found.seconds = len(todo), time.monotonic() - start
    return found


def _checked(source: EncodedSource, i: int) -> tuple[str, str, list[str]]:
    """Message where it is damaged, mode, remarks."""
    try:
        file, name = source.opened(i)
        with file:
            decoded(file, name)
            file.seek(0)
            return "", *_described(file)
    except UserError as error:
        return str(error), "", []


def _described(file: IO[bytes]) -> tuple[str, list[str]]:
    """The mode of an image that can be decoded, and what is not obvious about how it is read."""
    from PIL import Image

    with Image.open(file) as image:
        remarks = {
            "with an EXIF orientation, which is not applied": image.getexif().get(_ORIENTATION, 1) not in (0, 1),
            "animated: the first frame is read": getattr(image, "is_animated", False),
            "with transparency, which is dropped": image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info,
            "of 16 bits, rounded to 8": image.mode.startswith("I"),
        }
        return image.mode, [what for what, holds in remarks.items() if holds]
