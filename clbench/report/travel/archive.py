"""An archive of records: files, their SHA-256 in `checksums.txt`, and on request a signature over that list.

A signature says that the holder of a key hands in exactly these bytes. It does not say that they are true.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from clbench.interfaces import UserError

SUMS, SIGNATURE, NAMESPACE = "checksums.txt", "checksums.txt.sig", "clbench"
LARGEST = 2_000_000_000  # bytes of all files of an archive that is opened


@dataclass(frozen=True)
class Signature:
    """Who signed: the key's fingerprint, and the name that a list of allowed signers gives it, if one was asked."""

    key: str
    name: str | None


def pack(files: Mapping[str, bytes], path: Path, key: Path | None = None) -> None:
    """Write the archive: the same files give the same bytes. `key`: a private SSH key, or a public one of a running agent."""
    sums = checksums(files)
    held = {**files, SUMS: sums}
    if key is not None:
        held[SIGNATURE] = sign(sums, key)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(held):
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), held[name], zipfile.ZIP_DEFLATED)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(made.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def checksums(files: Mapping[str, bytes]) -> bytes:
    """A line for each file: its SHA-256 and its name, as `sha256sum -c` reads it."""
    return "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files)).encode()


def unpack(path: Path) -> dict[str, bytes]:
    """Name -> bytes. `UserError` where a file is missing, added, changed or has a name that leads elsewhere."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(one.file_size for one in archive.infolist()) > LARGEST:
                raise UserError(f"{path} holds more than {LARGEST // 10**9} GB")
            held = {one.filename: archive.read(one) for one in archive.infolist()}
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{path} is no archive: {error}") from None
    if SUMS not in held:
        raise UserError(f"{path} has no {SUMS}: it was not made by clbench submit")
    if odd := [n for n in held if not re.fullmatch(r"(?:[\w-][\w.-]*/)*[\w-][\w.-]*", n)]:
        raise UserError(f"{path} holds a file named {odd[0]!r}")
    inner = {name: data for name, data in held.items() if name not in (SUMS, SIGNATURE)}
    if held[SUMS] != checksums(inner):
        raise UserError(f"{path}: its files are not those that {SUMS} lists")
    return held


def sign(data: bytes, key: Path) -> bytes:
    """A signature of OpenSSH over bytes."""
    if not key.is_file():
        raise UserError(f"--sign {key}: no such key")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / SUMS
        file.write_bytes(data)
        done = _keygen(["-Y", "sign", "-q", "-f", str(key), "-n", NAMESPACE, str(file)])
        made = file.with_name(SIGNATURE)
        if done.returncode or not made.is_file():
            raise UserError(f"--sign {key}: {(done.stderr or b'').decode(errors='replace').strip()[:200]}")
        return made.read_bytes()


def signature(held: Mapping[str, bytes], signers: Path | None = None) -> Signature | None:
    """Who signed an opened archive; None where nobody did. A signature that does not fit is a `UserError`.

    `signers`: a file of allowed signers (`man ssh-keygen`), each with a name; a key that is not in it is a `UserError` too.
    """
    if SIGNATURE not in held:
        return None
    if signers is not None and not signers.is_file():
        raise UserError(f"--signers {signers}: no such file")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / SIGNATURE
        file.write_bytes(held[SIGNATURE])
        words = ["-Y", "check-novalidate", "-n", NAMESPACE, "-s", str(file)]
        done = _keygen(words, held[SUMS])
        found = re.search(rb"key (SHA256:\S+)", done.stdout)
        if done.returncode or found is None:
            raise UserError("its signature does not fit its files")
        if signers is None:
            return Signature(found[1].decode(), None)
        named = _keygen(["-Y", "find-principals", "-s", str(file), "-f", str(signers)])
        name = named.stdout.decode(errors="replace").strip().partition("\n")[0]
        words = ["-Y", "verify", "-n", NAMESPACE, "-s", str(file), "-f", str(signers), "-I", name]
        if named.returncode or not name or _keygen(words, held[SUMS]).returncode:
            raise UserError(f"its signature is by a key that {signers} does not list ({found[1].decode()})")
        return Signature(found[1].decode(), name)


def _keygen(words: list[str], data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    program = shutil.which("ssh-keygen")
    if program is None:
        raise UserError("signatures need ssh-keygen (OpenSSH 8.2 or newer), which is not installed")
    return subprocess.run([program, *words], input=data, capture_output=True)
