"""Reads that end: a file system that hangs, or fails for a moment, must not stop a run for ever.

The kernel may never come back from a read (a network disk whose server is gone), and then nothing can wake the thread
that called it. So another thread reads, and is left behind when it takes too long.
"""

import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, TypeVar, cast

from mirl.errors import UserError

SECONDS = 30.0  # that one try may take
TRIES = 3
PAUSE = 1.0  # seconds before the second try, twice as many before the third
MOST_LEFT_BEHIND = 8  # threads of a process that wait for the kernel
TOGETHER = 2**24, 1.0  # bytes and seconds, after which no further file is read beforehand

# What a network or a disk says when the same read may succeed a moment later.
TRANSIENT = {
    getattr(errno, name)
    for name in ("EAGAIN", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "EIO", "ENETDOWN",
                 "ENETUNREACH", "ENOTCONN", "EREMOTEIO", "ESTALE", "ETIMEDOUT")
    if hasattr(errno, name)
}  # fmt: skip

T = TypeVar("T")
Outcome = tuple[Any, None] | tuple[None, Exception]  # what a call returned, or what it raised


class Unread(OSError):
    """A file that could not be read, however often it was tried; the text follows its name."""


def patiently(read: Callable[..., T], path: str | os.PathLike[str], *arguments: Any) -> T:
    """Return `read(path, *arguments)`, called in another thread; try again when it hangs or fails for a moment.

    What came of the same call in `beforehand` is the first try.

    Raises:
        Unread: if the last try took more than `SECONDS` or failed for a moment again.
        UserError: if so many reads of this process hang that the file system must be at fault.
        Exception: what else `read` raises, at once.
    """
    at_hand = _at_hand()
    for number in range(1, TRIES + 1):
        value, error = at_hand.pop((read, path, *arguments), None) or _outcomes(read, [(path, *arguments)])[0]
        if error is None:
            return cast(T, value)
        if isinstance(error, _Late):
            fault = f"within {SECONDS:g} s"
        elif isinstance(error, OSError) and error.errno in TRANSIENT:
            fault = f"({error.strerror})"
        else:
            raise error
        if number < TRIES:
            time.sleep(PAUSE * number)
    raise Unread(f"cannot be read {fault}, tried {TRIES} times")


def beforehand(read: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> int:
    """Make the first of some calls together, for those of `patiently` that follow; return how many were made.

    Handing one read over makes this thread wait, often to go on with another core's cold caches: together, an image
    takes a tenth less time (docs/performance.md).

    Args:
        calls: a path and the other arguments of each.

    Raises:
        UserError: as `patiently` does.
    """
    at_hand = _at_hand()
    at_hand.clear()
    outcomes = _outcomes(read, calls) if calls else []
    at_hand.update(((read, *call), outcome) for call, outcome in zip(calls, outcomes, strict=False))
    return len(outcomes)


def _at_hand() -> dict[tuple[Any, ...], Outcome]:
    """Return what came of the calls that this thread had made beforehand, by function and arguments."""
    if not hasattr(_of_thread, "at_hand"):
        _of_thread.at_hand = {}
    return cast(dict[tuple[Any, ...], Outcome], _of_thread.at_hand)


def _outcomes(read: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Outcome]:
    """Return what came of the first of some calls; a reader that is late is left behind."""
    outcomes = _reader().read(read, calls)
    if isinstance(outcomes[-1][1], _Late):
        _leave_behind(calls[len(outcomes) - 1][0])
    return outcomes


def _read_together(read: Callable[..., Any], calls: Sequence[tuple[Any, ...]], outcomes: list[Outcome]) -> None:
    size, began = 0, time.monotonic()
    for call in calls:
        outcomes.append(_outcome(read, call))
        value, error = outcomes[-1]
        if error is None:
            size += len(value) if isinstance(value, bytes) else TOGETHER[0]
        if size >= TOGETHER[0] or time.monotonic() - began > TOGETHER[1]:
            return


def _outcome(read: Callable[..., Any], call: tuple[Any, ...]) -> Outcome:
    try:
        return read(*call), None
    except Exception as error:
        return None, error


class _Late(Exception):
    """A reader has not answered in time."""


class _Reader:
    """A thread that makes the calls it is given, until this object is dismissed or gone."""

    def __init__(self) -> None:
        self._shares: SimpleQueue[Any] = SimpleQueue()
        # The thread holds the queue alone, so that it ends with the thread whose reader this is.
        self.thread = threading.Thread(target=_answer, args=(self._shares,), daemon=True)
        self.thread.start()

    def read(self, read: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Outcome]:
        """Return what came of the first of some calls; `_Late` for the one that has no answer in time."""
        # For each share its own: the answer of one which a signal broke off must not be taken for the next one's.
        outcomes: list[Outcome] = []
        done: SimpleQueue[None] = SimpleQueue()
        self._shares.put((read, calls, outcomes, done))
        try:
            done.get(timeout=SECONDS)
        except Empty:  # the thread may go on with the list
            return [*outcomes, (None, _Late())][: len(calls)]
        return outcomes

    def dismiss(self) -> None:
        """Let the thread end once it has done what it was given."""
        self._shares.put(None)

    __del__ = dismiss


def _answer(shares: "SimpleQueue[Any]") -> None:
    while (share := shares.get()) is not None:
        *task, done = share
        _read_together(*task)
        done.put(None)
        del share, task, done  # they may hold an image while the next share is long in coming


_of_thread = threading.local()  # a reader for each thread that reads
_left_behind: list[threading.Thread] = []


def _reader() -> _Reader:
    """Return this thread's reader; in a forked process that of its parent is no more."""
    reader: _Reader | None = getattr(_of_thread, "reader", None)
    if reader is None or not reader.thread.is_alive():
        reader = _of_thread.reader = _Reader()
    return reader


def _end_reader() -> None:
    """Let a process fork without a second thread, which Python 3.12 warns of."""
    reader: _Reader | None = _of_thread.__dict__.pop("reader", None)
    if reader is not None:
        reader.dismiss()
        reader.thread.join(timeout=1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_end_reader)


def _leave_behind(path: str | os.PathLike[str]) -> None:
    reader: _Reader = _of_thread.reader
    del _of_thread.reader
    reader.dismiss()
    _left_behind[:] = [thread for thread in (*_left_behind, reader.thread) if thread.is_alive()]
    if len(_left_behind) >= MOST_LEFT_BEHIND:
        raise UserError(
            f"the file system hangs: {len(_left_behind)} reads did not come back within {SECONDS:g} s, the last of "
            f"{os.fspath(path)!r}; check the disk or the network, then add --resume"
        )
