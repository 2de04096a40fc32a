"""Batches read by other processes, which may be killed: others then go on with the next batch that was not read.

A batch depends on its keys alone, so what a run sees stays the same, bit for bit.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch.utils.data import DataLoader

from mirl.data.loading import Batch, Key, Views, collate
from mirl.errors import UserError
from mirl.training.allocation import keep_freed_memory

MOST_KILLED, WITHIN = 3, 600.0  # so many times in so many seconds, and the machine must be at fault


class Batches:
    """What a data set returns for lists of keys, in their order.

    Args:
        workers: number of processes that read; 0: this one.
        pin: whether tensors come in pinned memory, from which a GPU copies while it computes.
        told: is given a line when workers were killed and others go on.

    Raises:
        UserError: while iterating, if workers are killed again and again, or the data set raises it.
    """

    def __init__(
        self, dataset: Views, keys: Iterable[list[Key]], *, workers: int, pin: bool,
        told: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        self.dataset, self.keys, self.workers, self.pin, self.told = dataset, keys, workers, pin, told

    def __iter__(self) -> Iterator[Any]:
        rest = iter(self.keys)
        asked: deque[list[Key]] = deque()  # for and not yet come
        killed: deque[float] = deque(maxlen=MOST_KILLED)
        while True:
            again = list(asked)
            asked.clear()
            with _deaths_unnoticed():
                batches = iter(self._loader(_noted(chain(again, rest), asked)))
            # Not this process's children: one that died at once would not be among them any more.
            workers = getattr(batches, "_workers", [])
            try:
                for batch in batches:
                    asked.popleft()
                    yield batch
                return
            except UserError as error:  # from a worker it comes with the text of its traceback
                last = str(error).strip().splitlines()[-1]
                raise UserError(last.removeprefix(f"{UserError.__module__}.UserError: ")) from error
            except (RuntimeError, OSError, EOFError):  # what comes of a worker that dies depends on the moment
                line = _how_killed(workers)
                if not line:
                    raise
                for worker in workers:  # the others may wait for what the killed one held
                    worker.kill()
            del batches
            killed.append(time.monotonic())
            if len(killed) == MOST_KILLED and killed[-1] - killed[0] < WITHIN:
                raise UserError(
                    f"{line}, {MOST_KILLED} times in {WITHIN / 60:g} minutes; what was saved is kept: free memory or "
                    f"give fewer --workers than {self.workers}, and add --resume; mirl doctor finds huge images"
                )
            self.told(f"{line}; new workers go on with the same batches")

    def _loader(self, keys: Iterable[list[Key]]) -> DataLoader[Batch]:
        return DataLoader(
            self.dataset,
            batch_sampler=keys,
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=self.pin,
            worker_init_fn=begin_worker,
            prefetch_factor=2 if self.workers else None,
            generator=torch.Generator(),  # or starting workers once more would move the global one on
        )


def _noted(keys: Iterable[list[Key]], asked: deque[list[Key]]) -> Iterator[list[Key]]:
    for batch in keys:
        asked.append(batch)
        yield batch


def _how_killed(workers: Sequence[multiprocessing.process.BaseProcess]) -> str:
    """Say what ended workers, which may be just about to end; nothing if none did."""
    closed = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=5) if workers else []
    ended = [worker for worker in workers if worker.sentinel in closed]
    for worker in ended:  # the kernel closes its files a moment before it has an exit code
        worker.join(5)
    codes = [worker.exitcode for worker in ended if worker.exitcode]
    if not codes:
        return ""
    if -signal.SIGKILL in codes:
        return "a data worker was killed (SIGKILL, as the kernel does when memory runs out)"
    if hasattr(signal, "SIGBUS") and -signal.SIGBUS in codes:
        return "a data worker was killed (SIGBUS, as when /dev/shm is full; containers need --shm-size)"
    how = signal.Signals(-codes[0]).name if codes[0] < 0 else f"exit code {codes[0]}"
    return f"a data worker ended ({how})"


@contextmanager
def _deaths_unnoticed() -> Iterator[None]:
    """Undo that PyTorch raises when a worker dies, wherever this process is then, in the middle of saving too.

    It also looks after its workers whenever a batch is five seconds late, and raises then, where it is expected.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


def begin_worker(_: int) -> None:
    """Prepare this process to read images for another."""
    # It may have been forked from a training that keeps all it frees; a huge image would stay here as well.
    keep_freed_memory(largest=2**25, spare=2**26)
    _leave_signals_to_parent()


def _leave_signals_to_parent() -> None:
    """Outlive Ctrl-C, `timeout` and Slurm, which signal every process: the parent saves, then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if sys.platform == "linux" and parent is not None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told_by, args=(parent.pid,), daemon=True).start()


def _end_when_told_by(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
