"""What a file is that is not what was asked for, and what to do with it: by its first bytes, then by its name."""

from __future__ import annotations

from pathlib import Path

PACKED = (".gz", ".xz", ".bz2", ".zst")  # what is unpacked on the way
HEAD = 512  # bytes that are enough to know a file by
JSON_LINES = "to_json('{stem}.jsonl', orient='records', lines=True)"
PANDAS = "write its texts as JSON lines: python -c \"import pandas; pandas.{reader}('{name}')." + JSON_LINES + '"'
UNPACK = "unpack it ({command}) and give the files in it"

_BYTES: tuple[tuple[int, bytes, str], ...] = (  # offset, bytes, kind
    (0, b"PK\x03\x04", "zip"),
    (0, b"PK\x05\x06", "zip"),
    (257, b"ustar", "tar"),
    (0, b"7z\xbc\xaf\x27\x1c", "7z"),
    (0, b"Rar!\x1a\x07", "rar"),
    (0, b"PAR1", "parquet"),
    (0, b"ARROW1", "feather"),
    (0, b"\xff\xff\xff\xff", "arrow"),
    (0, b"\x93NUMPY", "npy"),
    (0, b"\x89HDF\r\n\x1a\n", "hdf5"),
    (0, b"SQLite format 3\0", "sqlite"),
    (0, b"%PDF-", "pdf"),
    (0, b"\x1f\x8b", "gz"),
    (0, b"\xfd7zXZ\0", "xz"),
    (0, b"BZh", "bz2"),
    (0, b"\x28\xb5\x2f\xfd", "zst"),
    (0, b"\x80\x02", "pickle"),
    (0, b"\x80\x03", "pickle"),
    (0, b"\x80\x04", "pickle"),
    (0, b"\x80\x05", "pickle"),
)
_NAMES = {".csv": "csv", ".tsv": "tsv", ".xlsx": "xlsx", ".docx": "docx", ".odt": "docx", ".epub": "docx", ".npz": "npz"}
_ANSWERS = {
    "zip": ("a zip archive", UNPACK.format(command="unzip {name}")),
    "tar": ("a tar archive", UNPACK.format(command="tar -xf {name}")),
    "7z": ("a 7z archive", UNPACK.format(command="7z x {name}")),
    "rar": ("a RAR archive", UNPACK.format(command="unrar x {name}")),
    "parquet": ("a table (Parquet)", PANDAS.replace("{reader}", "read_parquet")),
    "feather": ("a table (Feather)", PANDAS.replace("{reader}", "read_feather")),
    "arrow": ("an Arrow stream", "write its texts as JSON lines: datasets.Dataset.from_file('{name}').to_json('{stem}.jsonl')"),
    "csv": ("a table (CSV)", PANDAS.replace("{reader}", "read_csv")),
    "tsv": ("a table (TSV)", PANDAS.replace("{reader}('{name}')", "read_csv('{name}', sep='\\t')")),
    "xlsx": ("a spreadsheet", PANDAS.replace("{reader}", "read_excel")),
    "docx": ("a word processor's file", "save it as plain text"),
    "pdf": ("a PDF", "turn it into text (pdftotext {name} {stem}.txt)"),
    "npy": ("a NumPy array", "write its texts to a text file or JSON lines"),
    "npz": ("a file of NumPy arrays", "write its texts to a text file or JSON lines"),
    "hdf5": ("an HDF5 file", "write its texts to a text file or JSON lines"),
    "sqlite": ("an SQLite database", "write its texts to a text file or JSON lines"),
    "pickle": ("a pickle", "write its texts to a text file or JSON lines; pickles are never read"),
    "gz": ("compressed by gzip", "name it {name}.gz"),
    "xz": ("compressed by xz", "name it {name}.xz"),
    "bz2": ("compressed by bzip2", "name it {name}.bz2"),
    "zst": ("compressed by zstd", "name it {name}.zst"),
}


def no_text(path: Path, head: bytes) -> str | None:
    """What a file given as text is instead, and what to do: "a zip archive: unpack it ..."; None for what may be text.

    `head` are its first bytes, after decompression where the name asks for that.
    """
    found = next((kind for at, mark, kind in _BYTES if head[at : at + len(mark)] == mark), None)
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix not in PACKED]
    by_name = _NAMES.get(suffixes[-1]) if suffixes else None
    if by_name is not None and (found == "zip" or by_name in ("csv", "tsv")):
        found = by_name
    if found is None:
        return None
    what, mend = _ANSWERS[found]
    return f"{what}: {mend.replace('{name}', path.name).replace('{stem}', path.name.partition('.')[0])}"
