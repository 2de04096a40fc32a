"""Moving broken files out of a data set, so that it can be undone."""

import os
import shlex
import shutil
from pathlib import Path
from typing import IO

import numpy as np

from mirl.checkup.records import Records
from mirl.data.inspection import Trait
from mirl.errors import UserError

UNDO = "moved.txt"


def check_quarantine(folder: Path, data: Path) -> None:
    """Raise UserError if broken files cannot be moved from `data` to `folder`."""
    if not data.is_dir():
        raise UserError(f"--move_bad needs a folder of images, which {data} is not; give the folder")
    inner, outer = folder.resolve(), data.resolve()
    if outer.is_relative_to(inner):
        raise UserError(f"--move_bad {folder} is around {data}; give a folder beside it")
    hidden = any(part.startswith(".") for part in inner.parts[len(outer.parts) :])
    if inner.is_relative_to(outer) and not hidden:
        raise UserError(f"--move_bad {folder} is inside {data} and would be taken for data; give another folder")


def move_broken(records: Records, folder: Path) -> tuple[np.ndarray, list[str]]:
    """Move broken files to `folder`, where they keep their paths; return the positions moved, and what went wrong.

    Nothing is overwritten. `moved.txt` there is a shell script of the moves back, each written before it is made.

    Raises:
        UserError: if the folder cannot be written.
    """
    moved, problems = [], []
    positions = np.flatnonzero(records.having(Trait.BROKEN))
    if len(positions):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / UNDO, "ab", buffering=0) as undo:
                for position in map(int, positions):
                    if problem := _move(records, position, folder, undo):
                        problems.append(f"{records.name(position)} stays: {problem}")
                    else:
                        moved.append(position)
        except OSError as error:
            said = f"cannot write to {folder}: {error.strerror}; {len(moved)} files were moved"
            raise UserError(f"{said}; give another --move_bad") from error
    return np.array(moved, np.int64), problems


def _move(records: Records, position: int, folder: Path, undo: IO[bytes]) -> str:
    """Move a file; return why it was not."""
    source, member = records.source, int(records.members[position])
    origin = source.path_of(member)
    target = folder / os.path.relpath(origin, source.root)
    if os.path.lexists(target):
        return f"there is a {target} already"
    target.parent.mkdir(parents=True, exist_ok=True)
    places = (shlex.quote(os.path.abspath(place)) for place in (target, origin))
    undo.write(os.fsencode("mv -n -- {} {}\n".format(*places)))
    try:
        shutil.move(origin, target)
    except OSError as error:
        return error.strerror or str(error)
    return ""
