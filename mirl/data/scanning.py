"""A function of each of many files, computed by several processes, that no file can stop.

A file whose process is killed (by the kernel, for want of memory) is tried once more, alone; a process that a file
keeps for too long is killed. Either way the file is named, and another process goes on.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from mirl.errors import UserError

AT_ONCE = 32  # members that a process is given, so that it need not wait for more after each
HOPELESS = 100  # processes in a row that died before they could answer
TICK = 0.5  # seconds between looks at how long members take

Result = TypeVar("Result")


class Lost(str):
    """Why a member has no result; follows its name, as in "took more than 60 s"."""


def scan(
    task: Callable[[int], Result], members: np.ndarray, *, processes: int, timeout: float, at_once: int = AT_ONCE
) -> Iterator[tuple[int, Result | Lost]]:
    """Yield each of `members` once, with what `task` returns for it or why it was lost, in the order of completion.

    Args:
        task: called in other processes; must not raise.
        members: integers, usually indices of files.
        timeout: seconds that a member may take.
        at_once: members that a process is given.

    Raises:
        UserError: if processes cannot be started, or die again and again.
    """
    fresh = (members[start : start + at_once].tolist() for start in range(0, len(members), at_once))
    again: deque[list[int]] = deque()
    killed: set[int] = set()
    readers = [_Reader(task) for _ in range(max(1, min(processes, -(-len(members) // at_once))))]
    deaths = 0
    try:
        while True:
            for reader in readers:
                if not reader.share:
                    reader.begin(again.popleft() if again else next(fresh, []))
            busy = [reader for reader in readers if reader.share]
            if not busy:
                return
            wait([reader.connection for reader in busy], TICK)
            for reader in busy:
                alive = reader.process.is_alive()  # asked first: what it said before it died is read below
                if results := reader.results():
                    yield from results
                    deaths = 0
                elif not alive or reader.seconds > timeout:
                    yield from _mourn(reader, again, killed, timeout)
                    readers[readers.index(reader)] = _Reader(task)
                    deaths += not alive
            if deaths > HOPELESS:
                raise UserError(
                    f"{deaths} processes that read images died in a row, probably for want of memory; "
                    "give fewer --workers or free memory"
                )
    finally:
        for reader in readers:
            reader.end()


def _mourn(
    reader: "_Reader[Result]", again: deque[list[int]], killed: set[int], timeout: float
) -> Iterator[tuple[int, Lost]]:
    """Name what keeps a process too long, which ends it, or what one died of the second time; put back what it leaves.

    Args:
        killed: members at which a process died before; this one's is added.
    """
    suspect, *rest = reader.share
    late, code = reader.process.is_alive(), reader.process.exitcode or 0
    reader.end()
    if late:
        yield suspect, Lost(f"took more than {timeout:g} s")
    elif suspect in killed:
        by = f"by signal {-code}, out of memory?" if code == -signal.SIGKILL else f"with code {code}"
        yield suspect, Lost(f"ended the process that read it ({by})")
    else:  # it may have been another's memory
        killed.add(suspect)
        again.append([suspect])
    if rest:
        again.append(rest)


class _Reader(Generic[Result]):
    """A process and its share of the members.

    Attributes:
        share: what it was given to do, in order, and has not answered yet.
    """

    def __init__(self, task: Callable[[int], Result]) -> None:
        self.share: deque[int] = deque()
        self._since = time.monotonic()
        context = multiprocessing.get_context()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_read, args=(task, theirs), daemon=True)
        try:
            self.process.start()
        except OSError as error:
            raise UserError(f"cannot start a process to read images: {error.strerror}; give fewer --workers") from error
        theirs.close()

    @property
    def seconds(self) -> float:
        """How long it has been at the first of its share."""
        return time.monotonic() - self._since

    def begin(self, share: list[int]) -> None:
        self.share, self._since = deque(share), time.monotonic()
        if share:
            with contextlib.suppress(OSError):  # it is dead, as the next look will find
                self.connection.send(share)

    def results(self) -> list[tuple[int, Result]]:
        """Return members that are done, with their results; they are no more of its share."""
        found: list[tuple[int, Result]] = []
        with contextlib.suppress(EOFError, OSError):  # it is dead
            while self.connection.poll():
                result = self.connection.recv()
                found.append((self.share.popleft(), result))
                self._since = time.monotonic()
        return found

    def end(self) -> None:
        self.process.kill()
        self.process.join(TICK)  # a process that hangs in the kernel cannot be waited for
        self.connection.close()


def _read(task: Callable[[int], Any], connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    torch.set_num_threads(1)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")  # where memory is short, the kernel should end this process and not its parent
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        while True:
            for member in connection.recv():
                connection.send(task(member))


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
