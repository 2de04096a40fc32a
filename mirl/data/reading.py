"""Reads that end: a file system that hangs, or fails for a moment, must not stop a run for ever.

The kernel may never come back from a read (a network disk whose server is gone), and then nothing can wake the thread
that called it. So another thread reads, and is left behind when it takes too long.
"""

import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
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


class Unread(OSError):
    """A file that could not be read, however often it was tried; the text follows its name."""


def patiently(read: Callable[..., T], path: str | os.PathLike[str], *arguments: Any) -> T:
    """Return `read(path, *arguments)`, called in another thread; try again when it hangs or fails for a moment.

    What `beforehand` has read is returned at once.

    Raises:
        Unread: if the last try took more than `SECONDS` or failed for a moment again.
        UserError: if so many reads of this process hang that the file system must be at fault.
        Exception: what else `read` raises, at once.
    """
    if (read, path) in (read_already := _at_hand()):
        return cast(T, read_already.pop((read, path)))
    for number in range(1, TRIES + 1):
        try:
            return _reader().call(partial(read, path, *arguments))
        except _Late:
            _leave_behind(path)
            fault = f"within {SECONDS:g} s"
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            fault = f"({error.strerror})"
        if number < TRIES:
            time.sleep(PAUSE * number)
    raise Unread(f"cannot be read {fault}, tried {TRIES} times")


def beforehand(read: Callable[..., Any], paths: Sequence[str]) -> int:
    """Read the first of some files together, for calls of `patiently` that follow; return how many were tried.

    Handing one read over makes this thread wait, often to go on with another core's cold caches: together, an image
    takes a tenth less time (docs/performance.md). A file that fails or hangs is left to `patiently`.
    """
    at_hand = _at_hand()
    at_hand.clear()
    tried: list[str] = []
    results: dict[str, Any] = {}
    try:
        _reader().call(partial(_read_together, read, paths, tried, results))
    except _Late:
        _leave_behind(tried[-1] if tried else paths[0])
    at_hand.update(((read, path), results[path]) for path in tried if path in results)
    return len(tried)


def _read_together(read: Callable[..., Any], paths: Sequence[str], tried: list[str], results: dict[str, Any]) -> None:
    size, began = 0, time.monotonic()
    for path in paths:
        tried.append(path)
        with suppress(Exception):
            results[path] = read(path)
        size += len(results[path]) if isinstance(results.get(path), bytes) else TOGETHER[0]
        if size >= TOGETHER[0] or time.monotonic() - began > TOGETHER[1]:
            return


def _at_hand() -> dict[tuple[Callable[..., Any], str | os.PathLike[str]], Any]:
    """Return what this thread has had read, and not asked for."""
    if not hasattr(_of_thread, "at_hand"):
        _of_thread.at_hand = {}
    return cast(dict[tuple[Callable[..., Any], str | os.PathLike[str]], Any], _of_thread.at_hand)


class _Late(Exception):
    """The reader has not answered in time."""


class _Reader:
    """A thread that calls what it is given, one after another, until this object is dismissed or gone."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[Any]] | None] = SimpleQueue()
        # The thread holds the queue alone, so that it ends with the thread whose reader this is.
        self.thread = threading.Thread(target=_answer, args=(self._calls,), daemon=True)
        self.thread.start()

    def call(self, function: Callable[[], T]) -> T:
        # A queue for each answer: that of a call which a signal broke off must not be taken for the next one's.
        answers: SimpleQueue[tuple[T, None] | tuple[None, Exception]] = SimpleQueue()
        self._calls.put((function, answers))
        try:
            value, error = answers.get(timeout=SECONDS)
        except Empty:
            raise _Late from None
        if error is not None:
            raise error
        return cast(T, value)

    def dismiss(self) -> None:
        """Let the thread end once it has done what it was given."""
        self._calls.put(None)

    __del__ = dismiss


def _answer(calls: "SimpleQueue[Any]") -> None:
    while (call := calls.get()) is not None:
        function, answers = call
        try:
            answers.put((function(), None))
        except Exception as error:
            answers.put((None, error))
        del call, function, answers  # they may hold an image while the next call is long in coming


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
