"""A function of each of many files, computed by several processes, that no file can stop.

A file whose process is killed (by the kernel, for want of memory) is tried once more, alone; a process that a file
keeps for too long is killed. Either way the file is named, and another process goes on.
"""

import contextlib
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from mirl.errors import UserError

AT_ONCE = 32  # files that a process is given
HOPELESS = 100  # processes in a row that died before they could answer
TICK = 0.5  # seconds between looks at how long files take

Result = TypeVar("Result")


class Lost(str):
    """Why a file has no result; follows its name, as in "took more than 60 s"."""


def scan(
    task: Callable[[int], Result], members: np.ndarray, *, processes: int, timeout: float
) -> Iterator[tuple[int, Result | Lost]]:
    """Yield each of `members` once, with what `task` returns for it or why it was lost, in the order of completion.

    Args:
        task: called in other processes; must not raise.
        members: integers, usually indices of files.
        timeout: seconds that a member may take.

    Raises:
        UserError: if processes cannot be started, or die again and again.
    """
    fresh = (members[start : start + AT_ONCE].tolist() for start in range(0, len(members), AT_ONCE))
    again: deque[list[int]] = deque()
    readers = [_Reader(task) for _ in range(max(1, min(processes, -(-len(members) // AT_ONCE))))]
    deaths = 0
    try:
        while True:
            for reader in readers:
                if not reader.share:
                    reader.begin(again.popleft() if again else next(fresh, []))
            busy = [reader for reader in readers if reader.share]
            if not busy:
                return
            ready = wait([reader.connection for reader in busy], TICK)
            for reader in busy:
                if reader.connection in ready and (results := reader.results()) is not None:
                    yield from zip(reader.share, results, strict=True)
                    reader.share, deaths = [], 0
                elif reader.connection in ready or reader.seconds > timeout:
                    yield from _mourn(reader, again, timeout)
                    readers[readers.index(reader)] = _Reader(task)
                    deaths += 1
            if deaths > HOPELESS:
                raise UserError(
                    f"{deaths} processes that read images died in a row, probably for want of memory; "
                    "give fewer --workers or free memory"
                )
    finally:
        for reader in readers:
            reader.end()


def _mourn(reader: "_Reader[Result]", again: deque[list[int]], timeout: float) -> Iterator[tuple[int, Lost]]:
    """Name what a process died of, or is killed for, and put back what it leaves."""
    killed_here = reader.process.is_alive()
    reader.end()
    suspect, rest = reader.member, [member for member in reader.share if member != reader.member]
    if killed_here and reader.seconds > timeout:
        yield suspect, Lost(f"took more than {timeout:g} s")
    elif rest or killed_here:  # it may have been another's memory, or it was done just then
        again.append([suspect])
    else:
        code = reader.process.exitcode or 0
        by = f"by signal {-code}, out of memory?" if code == -signal.SIGKILL else f"with code {code}"
        yield suspect, Lost(f"ended the process that read it ({by})")
    if rest:
        again.append(rest)


class _Reader(Generic[Result]):
    """A process and its share of the members.

    Attributes:
        share: what it was given to do, and has not answered yet.
    """

    def __init__(self, task: Callable[[int], Result]) -> None:
        self.share: list[int] = []
        context = multiprocessing.get_context()
        self.connection, theirs = context.Pipe()
        # Since when (monotonic seconds), and which member: shared, so that it outlives the process.
        self._current = multiprocessing.RawArray("d", 2)
        self.process = context.Process(target=_read, args=(task, theirs, self.connection, self._current), daemon=True)
        try:
            self.process.start()
        except OSError as error:
            raise UserError(f"cannot start a process to read images: {error.strerror}; give fewer --workers") from error
        theirs.close()

    @property
    def member(self) -> int:
        return int(self._current[1])

    @property
    def seconds(self) -> float:
        """How long it has been at this member."""
        return time.monotonic() - self._current[0]

    def begin(self, share: list[int]) -> None:
        self.share = share
        if share:
            self._current[:] = [time.monotonic(), share[0]]
            with contextlib.suppress(OSError):  # it is dead, as the next look will find
                self.connection.send(share)

    def results(self) -> list[Result] | None:
        """Return what it has to say; None if it died."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join(TICK)
            return None

    def end(self) -> None:
        self.process.kill()
        self.process.join(TICK)  # a process that hangs in the kernel cannot be waited for
        self.connection.close()


def _read(task: Callable[[int], Any], connection: Connection, parents: Connection, current: Any) -> None:
    parents.close()  # or this process would wait for ever when the parent is killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")  # where memory is short, the kernel should end this process and not its parent
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        while True:
            results = []
            for member in connection.recv():
                current[:] = [time.monotonic(), member]
                results.append(task(member))
            connection.send(results)
