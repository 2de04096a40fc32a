"""One writer for each folder: a lock that ends with its process, however that ends."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TextIO

from mirl.errors import UserError

LOCK = ".lock"  # the file; it stays, because removing it while another process opens it would give two of them a lock
HELD = (errno.EAGAIN, errno.EACCES)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


def take_lock(folder: Path) -> TextIO | None:
    """Become the only writer of `folder` until the returned file is closed or this process has ended.

    A lock of POSIX's kind: unlike flock's it is not inherited, so that data workers that outlive a killed run for some
    seconds do not hold it. It keeps out other processes, not a second run in this one. None is returned where the file
    system has no locks.

    Raises:
        UserError: if another process holds it.
        OSError: if the folder cannot be written.
    """
    file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - closed by the caller
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _holder(file)
        file.close()
        if error.errno in NO_LOCKS:
            return None
        if error.errno not in HELD:
            raise
        raise UserError(
            f"{folder} is in use by {holder}; wait until it ends, stop it, or choose another --out"
        ) from error
    since = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
    file.flush()
    return file


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only writer of `folder`, which is made if it is missing, while the block runs.

    Raises:
        UserError: if another process is, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = take_lock(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another --out") from error
    try:
        yield
    finally:
        if file:
            file.close()


def _holder(file: TextIO) -> str:
    file.seek(0)
    words = " ".join(file.readline(200).split())
    return words if words.startswith("process ") else "another process"
