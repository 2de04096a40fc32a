"""Checkpoints that survive a kill at any moment: written aside, synced, renamed; the one before is kept."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mirl.errors import UserError
from mirl.training.files import atomic

KEEP = 2  # the newest, and the one before in case the newest is damaged later
UNDECAYED = "undecayed.pt"  # before the rate first decays: where a longer run begins


def save_tensors(tensors: dict[str, Tensor], path: Path, **metadata: str) -> None:
    """Write a safetensors file that those may read who may read others here: the library's own is its owner's alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    path.chmod(mode)


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.pt"


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in `folder`, newest first."""
    matches = (re.fullmatch(r"step_(\d{8,})\.pt", path.name) for path in folder.glob("step_*.pt"))
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint of `step` and delete all but the newest `KEEP`.

    Raises:
        UserError: if the disk is full or not writable; earlier checkpoints are untouched.
    """
    path = checkpoint_path(folder, step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary, open(temporary, "wb") as file:
            torch.save({"step": step, **state}, file)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        if isinstance(error, torch.OutOfMemoryError):
            raise
        cause = error if isinstance(error, OSError) else error.__context__ or error
        last = next(iter(saved_steps(folder)), None) if folder.is_dir() else None
        kept = f"the last good checkpoint is step {last}" if last is not None else "no checkpoint exists yet"
        raise UserError(
            f"cannot save {path}: {cause}; {kept}; free space or permit writing, then add --resume"
        ) from error
    for old in saved_steps(folder)[KEEP:]:
        checkpoint_path(folder, old).unlink(missing_ok=True)
    for cut_short in folder.glob("*.tmp"):  # by a kill while saving
        cut_short.unlink(missing_ok=True)
    return path


def keep_undecayed(folder: Path, step: int) -> None:
    """Keep the checkpoint of `step` for good, under a name of its own: later ones replace the others."""
    copy(checkpoint_path(folder, step), folder / UNDECAYED)


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
    """Return the step of a checkpoint without reading its tensors.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"])
    except Exception as error:  # a damaged file can raise nearly anything
        raise UserError(f"checkpoint {path} cannot be read ({_reason(error)}); start a new run") from error


def load_newest(folder: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Load the newest readable checkpoint on the CPU; name each unreadable one with `say` and try the one before.

    Returns None if there is no checkpoint at all.

    Raises:
        UserError: if checkpoints exist and none can be read.
    """
    steps = saved_steps(folder)
    for step in steps:
        path = checkpoint_path(folder, step)
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return state
        except Exception as error:  # a damaged file can raise nearly anything
            say(f"checkpoint {path} cannot be read ({_reason(error)}); trying the one before")
    if steps:
        raise UserError(f"none of the {len(steps)} checkpoints in {folder} can be read; start again with --overwrite")
    return None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__} {error}".splitlines()[0][:100].strip()
