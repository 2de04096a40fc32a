"""What a search for images found, kept for the next start: one file for each folder or list, which memory maps.

Ten million paths are walked in minutes and mapped at once, and data workers share the pages. An index is believed if
its checksum fits and nothing that was looked at has changed since; else the search is done again.
"""

import hashlib
import json
import os
import tempfile
import time
import zlib
from array import array
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mirl.data.packed import PackedStrings
from mirl.data.walking import Found, mark
from mirl.errors import UserError

FORMAT = "mirl-paths-1"
FROM = 100_000  # paths; fewer are found in less than a second
# A change can keep the time of modification within a clock's tick, which is two seconds on some file systems.
SETTLED = 2 * 10**9  # ns


def remembered(place: str, suffixes: Collection[str], search: Callable[[], Found]) -> Found:
    """Return what `search` finds in `place`, a folder or a list, from its index where there is a valid one."""
    place = os.path.abspath(place)
    try:
        folder = cache_folder() / "paths"
    except UserError:  # it does not need one
        return search()
    key = hashlib.sha256(os.fsencode("\0".join([FORMAT, place, *sorted(suffixes)]))).hexdigest()
    file = folder / f"{key}.safetensors"
    known = _load(file, place)
    if known:
        return known
    began = time.time_ns()
    found = search()
    settled = max(found.marks[::3], default=0) < began - SETTLED
    if len(found.paths) >= FROM and settled and not found.unreadable and not found.dangling:
        _save(file, found)
    return found


def cache_folder() -> Path:
    """Return where this project keeps what can be made again, or downloaded.

    Raises:
        UserError: if this user has no home folder, as in some containers.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "mirl"
    except RuntimeError as error:
        raise UserError("there is no home folder for caches; set XDG_CACHE_HOME to a folder") from error


def _save(file: Path, found: Found) -> None:
    """Write an index whole or not at all; where that cannot be, the next start searches again."""
    letters, ends = found.paths.arrays()
    folder_letters, folder_ends = found.listed.arrays()
    arrays: dict[str, NDArray[Any]] = {
        "ends": ends, "marks": np.frombuffer(found.marks, np.int64), "folder_ends": folder_ends, "letters": letters,
        "folder_letters": folder_letters,
    }  # fmt: skip
    temporary = ""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")  # several processes may write at once
        os.close(handle)
        save_file(arrays, temporary, {"ignored": str(found.ignored), "checksum": str(_checksum(arrays, found.ignored))})
        os.replace(temporary, file)
    except (OSError, SafetensorError):
        pass
    finally:  # also after Ctrl-C
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def _load(file: Path, place: str) -> Found | None:
    """Return what an index holds, if it is whole and nothing has changed since."""
    try:
        arrays, about = _mapped(file)
        ignored = int(about["ignored"])
        if _checksum(arrays, ignored) != int(about["checksum"]):
            return None
        marks, listed = arrays["marks"], PackedStrings.of(arrays["folder_letters"], arrays["folder_ends"])
        for index, known in enumerate(marks.reshape(-1, 3).tolist()):
            path = os.path.join(place, listed[index]) if listed[index] else place
            if mark(os.stat(path)) != tuple(known):
                return None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError):
        return None
    paths = PackedStrings.of(arrays["letters"], arrays["ends"])
    return Found(paths, ignored, [], listed, array("q", marks.tobytes()), remembered=True)


def _mapped(file: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Return the tensors of a safetensors file, mapped, and its metadata."""
    with safe_open(file, "numpy") as checked:  # the library holds the header to the format and to the file's size
        about = checked.metadata() or {}
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    types = {"I64": np.int64, "U8": np.uint8}
    content = np.memmap(file, np.uint8, mode="r", offset=8 + size)
    arrays: dict[str, NDArray[Any]] = {
        name: np.asarray(content[slice(*entry["data_offsets"])]).view(types[entry["dtype"]])
        for name, entry in header.items()
        if name != "__metadata__"
    }
    return arrays, about


def _checksum(arrays: dict[str, NDArray[Any]], ignored: int) -> int:
    """Return a checksum of everything an index says; a second for each gigabyte."""
    value = zlib.crc32(str(ignored).encode())
    for name in sorted(arrays):
        value = zlib.crc32(np.ascontiguousarray(arrays[name]).data, zlib.crc32(name.encode(), value))
    return value
