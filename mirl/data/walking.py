"""Where the images of a folder or a list file are, and which folders were listed to find them."""

import os
from array import array
from collections.abc import Collection
from dataclasses import dataclass, field

from mirl.data.packed import PackedStrings

RUN = {"config.yaml", "log.txt", "metrics.jsonl"}  # what a run folder holds
REPORT = ("doctor.json", "sizes.png")  # what `mirl doctor` writes
OURS = RUN.union(REPORT)


@dataclass
class Found:
    """Paths of images.

    Attributes:
        paths: relative to the folder, or as the list has them.
        ignored: number of files left out because their suffix is not an image's.
        unreadable: folders that could not be listed.
        listed: the folders read, relative to the first, or "" for a list file.
        marks: three numbers for each of `listed`, which change when it does.
        dangling: whether a link leads nowhere; when there is a folder behind it, no mark changes.
        remembered: whether an earlier search is the source.
    """

    paths: PackedStrings = field(default_factory=PackedStrings)
    ignored: int = 0
    unreadable: list[str] = field(default_factory=list)
    listed: PackedStrings = field(default_factory=PackedStrings)
    marks: "array[int]" = field(default_factory=lambda: array("q"))
    dangling: bool = False
    remembered: bool = False


def mark(info: os.stat_result) -> tuple[int, int, int]:
    """Return what changes when a folder gains or loses an entry, or a file is written."""
    return info.st_mtime_ns, info.st_size, info.st_ino & (2**63 - 1)


def walk(folder: str, suffixes: Collection[str]) -> Found:
    """Find all images below a folder, sorted by relative path, without a system call for each file."""
    found = Found()
    visited: set[tuple[int, int]] = set()
    # Relative paths; a folder's ends in "/", which makes this walk's order that of the full paths ("a-b/x" < "a/x").
    waiting = [""]
    while waiting:
        relative = waiting.pop()
        if relative and not relative.endswith("/"):
            found.paths.append(relative)
            continue
        path = os.path.join(folder, relative)
        try:
            info = os.stat(path)
            if (info.st_dev, info.st_ino) in visited:  # a symbolic link to a folder that was seen, or a loop
                continue
            visited.add((info.st_dev, info.st_ino))
            entries = _entries(path, relative, suffixes, found)
        except OSError:
            found.unreadable.append(path)
            continue
        found.listed.append(relative)
        found.marks.extend(mark(info))
        waiting += entries
    return found


def _entries(path: str, relative: str, suffixes: Collection[str], found: Found) -> list[str]:
    """Return a folder's images and folders, the last first, and count its other files.

    What this project writes is no data: a run, with its pictures, and what `mirl doctor` found.
    """
    with os.scandir(path) as scanned:
        entries = list(scanned)
    ours = OURS.intersection(entry.name for entry in entries)
    if ours >= RUN:
        return []
    not_data = {"__MACOSX"}.union(REPORT if ours.issuperset(REPORT) else ())
    wanted = []
    for entry in entries:
        name = entry.name
        if name.startswith(".") or name in not_data:
            continue
        if _is_folder(entry):
            wanted.append(f"{relative}{name}/")
        elif suffix(name) in suffixes:
            wanted.append(relative + name)
        else:
            found.ignored += 1
            found.dangling = found.dangling or (entry.is_symlink() and not os.path.exists(entry.path))
    return sorted(wanted, reverse=True)


def read_list(path: str) -> Found:
    """Read the paths in a list file: one a line; blank lines and those that start with # are skipped."""
    found = Found()
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
        found.listed.append("")
        found.marks.extend(mark(os.fstat(lines.fileno())))
        for line in map(str.strip, lines):
            if line and not line.startswith("#"):
                found.paths.append(line)
    return found


def suffix(name: str) -> str:
    """Return a file's suffix in lower case, such as ".jpg"."""
    return os.path.splitext(name)[1].lower()


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symbolic link that cannot be followed
        return False
