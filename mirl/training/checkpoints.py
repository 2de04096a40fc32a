"""Checkpoints that survive a kill at any moment: written aside, synced, renamed; the one before is kept."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mirl.errors import UserError
from mirl.training import parts
from mirl.training.files import atomic
from mirl.training.integrity import MANIFEST, check_archive, check_folder

KEEP = 2  # the newest, and the one before in case the newest is damaged later
FORM = re.compile(r"step_(\d{8,})(\.pt)?")  # a file, or a folder of files
UNDECAYED = "undecayed.pt"  # before the rate first decays: where a longer run begins


def save_tensors(tensors: dict[str, Tensor], path: Path, **metadata: str) -> None:
    """Write a safetensors file that those may read who may read others here: the library's own is its owner's alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    path.chmod(mode)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of `step` is written as one file."""
    return folder / f"step_{step:08d}.pt"


def sharded_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of `step` is written as a folder, with a file of each process."""
    return folder / f"step_{step:08d}"


def saved(folder: Path) -> dict[int, list[Path]]:
    """Return the checkpoints in `folder` by step, newest first; a step may be there as a file and as a folder."""
    found: dict[int, list[Path]] = {}
    for path in sorted(folder.glob("step_*"), reverse=True):  # the file before the folder
        match = FORM.fullmatch(path.name)
        if match and (match[2] or (path / MANIFEST).is_file()):
            found.setdefault(int(match[1]), []).append(path)
    return dict(sorted(found.items(), reverse=True))


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in `folder`, newest first."""
    return list(saved(folder))


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint of `step` and delete all but this and the one before it.

    Raises:
        UserError: if the disk is full or not writable; earlier checkpoints are untouched.
    """
    path = checkpoint_path(folder, step)
    with faults_named(path):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary, open(temporary, "wb") as file:
            torch.save({"version": VERSION, "step": step, **state}, file)
    tidy(folder, step)
    return path


@contextmanager
def faults_named(path: Path) -> Iterator[None]:
    """Turn what a disk does while the checkpoint `path` is written into one line.

    Raises:
        UserError: if the disk is full or not writable.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"cannot save {path}: {cause.strerror or cause}; {last_good(path.parent)}; free space or permit writing, "
            "then add --resume"
        ) from error


def last_good(folder: Path) -> str:
    """Say which checkpoint there is."""
    step = next(iter(saved_steps(folder)), None) if folder.is_dir() else None
    return "no checkpoint exists yet" if step is None else f"the last good checkpoint is step {step}"


def tidy(folder: Path, step: int) -> None:
    """Delete all checkpoints but that of `step`, just written, and those before it that make `KEEP`.

    Those of later steps could not be read when the run went on. What a kill cut short goes too.
    """
    known = saved(folder)
    steps = [earlier for earlier in known if earlier <= step][:KEEP]
    kept = {path for earlier in steps for path in known[earlier]}
    ours = {path for path in folder.glob("step_*") if FORM.fullmatch(path.name)}  # and not a copy of a user's
    for path in (ours | set(folder.glob("*.tmp"))) - kept:
        delete(path)


def forget_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps, which a rollback undoes."""
    for path in (path for later, paths in saved(folder).items() if later > step for path in paths):
        delete(path)


def delete(path: Path) -> None:
    """Delete a checkpoint, or what a kill has left of one."""
    if path.is_dir():
        (path / MANIFEST).unlink(missing_ok=True)  # first: what is left of it is none
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def keep_undecayed(folder: Path, step: int) -> None:
    """Keep the checkpoint of `step` for good, as one file of its own name: later ones replace the others.

    Raises:
        UserError: if the disk is full or not writable.
    """
    (source, *_), target = saved(folder)[step], folder / UNDECAYED
    (join if source.is_dir() else copy)(source, target)


def join(source: Path, target: Path) -> None:
    """Write a checkpoint that is a folder as one file.

    Raises:
        UserError: if the disk is full or not writable.
        Exception: nearly any, if the checkpoint is damaged.
    """
    state = load(source)
    with faults_named(target), atomic(target) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)


def copy(source: Path, target: Path) -> None:
    """Copy a checkpoint.

    Raises:
        UserError: if the disk is full or not writable.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic(target) as temporary:
            shutil.copyfile(source, temporary)
    except OSError as error:
        raise UserError(
            f"cannot copy {source} to {target}: {error.strerror}; free space or permit writing, then try again"
        ) from error


def step_of(path: Path) -> int:
    """Return the step of a checkpoint that is whole.

    Raises:
        UserError: if it is damaged.
    """
    try:
        check_archive(path)
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"])
    except Exception as error:  # a damaged file can raise nearly anything
        raise UserError(f"checkpoint {path} cannot be read ({_reason(error)}); start a new run") from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, a file or a folder, on the CPU, after comparing its sums; bring it up to today's version.

    Raises:
        UserError: if it is of a later version.
        Exception: nearly any, if it is damaged.
    """
    return parts.joined(load_in_parts(path))


def load_in_parts(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Do what `load` does, but leave a folder's sharded tensors as `Rows`, of which a process reads those it needs.

    With `mapped` a file's tensors stay in the file until they are copied, which has to be done before it is deleted.
    """
    if path.is_dir():
        check_folder(path)
        state = parts.read(path)
    else:
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    int(state["step"])
    return up_to_date(state, path)


def up_to_date(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Bring what an older version of mirl wrote to `path` up to today's version.

    Raises:
        UserError: if a later version wrote it.
    """
    version = int(state.get("version", 0))  # it was not written before version 1
    if version > VERSION:
        raise UserError(
            f"checkpoint {path} is of version {version}, and this mirl reads versions up to {VERSION}; "
            "upgrade it: pip install --upgrade mirl"
        )
    for change in MIGRATIONS[version:]:
        state = change(state)
    return {**state, "version": VERSION}


def _from_0(state: dict[str, Any]) -> dict[str, Any]:
    """Early runs do not say what they are about, and need not; they had no rollbacks."""
    return {"about": {}, "jumps": [], "losses": [], **state}


def _from_1(state: dict[str, Any]) -> dict[str, Any]:
    """Version 1 knows the last usual losses, and not whether trouble lasted."""
    rest = {name: value for name, value in state.items() if name != "losses"}
    return {**rest, "watch": {"losses": state["losses"]}}


# The function at place v changes what version v wrote into what version v + 1 writes.
MIGRATIONS: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = (_from_0, _from_1)
VERSION = len(MIGRATIONS)


def load_newest(
    folder: Path, say: Callable[[str], None], read: Callable[[Path], dict[str, Any]] = load
) -> dict[str, Any] | None:
    """Load the newest whole checkpoint; name each damaged one with `say` and try the one before.

    Returns None if there is no checkpoint at all.

    Raises:
        UserError: if checkpoints exist and none can be read, or a later version of mirl wrote the newest.
    """
    paths = [path for of_step in saved(folder).values() for path in of_step]
    for path in paths:
        try:
            return read(path)
        except UserError:
            raise
        except Exception as error:  # a damaged file can raise nearly anything
            say(f"checkpoint {path} cannot be read ({_reason(error)}); trying the one before")
    if paths:
        raise UserError(f"none of the {len(paths)} checkpoints in {folder} can be read; start again with --overwrite")
    return None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__} {error}".splitlines()[0][:100].strip()
