"""Files that are whole or not there; apart from checkpoints, whose PyTorch those who only read or draw do without."""

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mirl.errors import UserError, first_line

FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE)


def fault_of_disk(error: Exception) -> str | None:
    """Return what a disk that is full, fails or must not be written says, and None for any other error.

    The libraries in Rust say it in words that end in (os error NUMBER).
    """
    told = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    return os.strerror(number) if number in FAULTS else None


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, sync it and rename it to `path`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # on a disk that has come to be read-only
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path, remedy: str = "choose another --out") -> Iterator[None]:
    """Turn an error of the disk into a UserError that says what cannot be written, why, and the `remedy`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {first_line(error)}; {remedy}") from error


def check_writable(path: Path, option: str = "out") -> None:
    """Make sure, before the work begins, that a file can be written to `path`, whose folders may be missing still.

    Raises:
        UserError: if it cannot be, which names the `option` that chooses another.
    """
    with writing(path, f"choose another --{option}"):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=next(folder for folder in path.absolute().parents if folder.exists())):
            pass  # permissions alone do not tell, for root or on a disk of others


def sync(path: Path) -> None:
    """Wait until a file, or the list of files in a folder, is on the disk."""
    opened = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(opened)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # as some network file systems
            raise
    finally:
        os.close(opened)
