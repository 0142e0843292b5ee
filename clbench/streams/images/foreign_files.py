"""Files that are given as a data set and are none that is read: what they are, and what to do with them."""

from __future__ import annotations

from pathlib import Path

from clbench.interfaces import UserError

_FOLDER = "and give the folder that holds train/ and test/, as scenario.dataset=FOLDER"
_ARRAYS = "store images and labels as .npz (numpy.savez: train_x, train_y, test_x, test_y) and give that file"
KINDS: dict[str, tuple[str, str]] = {
    ".tar": ("a tar archive", f"unpack it (tar -xf {{name}}) {_FOLDER}"),
    ".tgz": ("a compressed tar archive", f"unpack it (tar -xf {{name}}) {_FOLDER}"),
    ".zip": ("a zip archive", f"unpack it (unzip {{name}}) {_FOLDER}"),
    ".7z": ("a 7-Zip archive", f"unpack it (7z x {{name}}) {_FOLDER}"),
    ".rar": ("a RAR archive", f"unpack it (unrar x {{name}}) {_FOLDER}"),
    ".zst": ("compressed with Zstandard", "decompress it (zstd -d {name}) and give what comes out"),
    ".gz": ("compressed with gzip", "decompress it (gunzip -k {name}) and give what comes out"),
    ".bz2": ("compressed with bzip2", "decompress it (bunzip2 -k {name}) and give what comes out"),
    ".xz": ("compressed with xz", "decompress it (xz -dk {name}) and give what comes out"),
    ".arrow": ("one part of a folder that save_to_disk wrote", "give the folder"),
    ".npy": ("a single NumPy array", _ARRAYS),
    ".pkl": ("a pickle, which is never loaded because it can run code", _ARRAYS),
    ".pickle": ("a pickle, which is never loaded because it can run code", _ARRAYS),
    ".pt": ("a file of torch", _ARRAYS),
    ".pth": ("a file of torch", _ARRAYS),
    ".mat": ("a file of MATLAB", _ARRAYS),
    ".h5": ("an HDF5 file", _ARRAYS),
    ".hdf5": ("an HDF5 file", _ARRAYS),
    ".tfrecord": ("a file of TensorFlow", _ARRAYS),
    ".json": (
        "JSON",
        "a saved stream runs with scenario=manifest scenario.path={name}; a table of paths is .csv or .parquet",
    ),
    ".jsonl": ("JSON lines", "write the columns path and label as a table, .csv or .parquet"),
    ".txt": ("text", "write the columns path and label as a table, .csv or .parquet"),
    ".xlsx": ("a spreadsheet", "save it as .csv, with columns path and label"),
}
_MAGIC = {b"PK\x03\x04": ".zip", b"\x28\xb5\x2f\xfd": ".zst", b"\x1f\x8b": ".gz", b"\x89HDF": ".h5", b"\xfd7zXZ": ".xz"}
_IMAGE = ("one image", "give the folder that holds train/ and test/, or a table with columns path and label")


def refusal(path: Path, images: frozenset[str]) -> UserError:
    """What to say of a file that is not read; `images` are suffixes of image files."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    found = ".tar" if ".tar" in suffixes[-2:] else suffixes[-1] if suffixes else ""
    if found not in KINDS and found not in images:
        try:
            with path.open("rb") as file:
                head = file.read(6)
        except OSError as error:
            return UserError(f"cannot read {path}: {error.strerror or error}")
        found = next((suffix for magic, suffix in _MAGIC.items() if head.startswith(magic)), found)
    readable = "read are .npz, .csv, .tsv and .parquet files and folders"
    if found not in KINDS and found not in images:
        return UserError(f"{path} is no data set that is read; {readable}")
    what, advice = _IMAGE if found in images else KINDS[found]
    return UserError(f"{path} is {what}: {advice.format(name=path.name)} ({readable})")
