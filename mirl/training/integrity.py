"""Damage of checkpoints, found before they are used.

PyTorch writes a CRC-32 of every record of a file and never compares it: a flipped bit in a tensor is loaded as if
nothing were wrong. Comparing costs a third of a second for a gigabyte, and old files have these sums too. A folder of
files, as several processes write it, has a manifest of digests.
"""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"  # of a folder: {"version": int, "step": int, "files": {name: digest}}; written last


class Damaged(Exception):
    """A file is not what was written."""


def digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_archive(path: Path) -> None:
    """Compare the sums of all records in a file that `torch.save` wrote.

    Raises:
        Damaged: if one differs, or a record has a property that PyTorch does not write but obeys: where one is marked
            as a folder, its tensor is left uninitialised.
        zipfile.BadZipFile, OSError and others: if the file is no archive, as one that is cut short.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if odd := next((record.filename for record in records if record.external_attr or record.compress_type), None):
            raise Damaged(f"record {odd} is not as it was written")
        if wrong := archive.testzip():
            raise Damaged(f"checksum of {wrong} differs")


def check_folder(folder: Path) -> dict[str, Any]:
    """Compare the digests of all files that a folder's manifest names; return the manifest.

    Raises:
        Damaged: if a digest differs, or the manifest is no such thing.
        OSError, ValueError: if a file is missing, or the manifest cannot be read.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        raise Damaged(f"{MANIFEST} names no files")
    if unnamed := {path.name for path in folder.glob("*.pt")} - set(files):
        raise Damaged(f"{MANIFEST} does not name {min(unnamed)}")
    for name, expected in files.items():
        if Path(name).name != name:  # nothing outside is read
            raise Damaged(f"{MANIFEST} names {name!r}")
        if digest(folder / name) != expected:
            raise Damaged(f"checksum of {name} differs")
    return manifest
