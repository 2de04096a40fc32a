"""Shards of other machines, fetched before they are read.

Who reads an image fetches its shard first, one after the other, and an epoch begins with 32 of them. So another process
fetches the shards of the batches to come, several at a time, in the order of their first use. It may be ended in the
middle of a fetch, as threads may not, and the training's own process has none that hold a network's locks when it forks
data workers. Batches stay the same: what could not be fetched, the reader of an image tries again, and names.
"""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from mirl.data.loading import Key, Views
from mirl.data.shards.images import ShardImages

AT_ONCE = 4  # shards that are fetched
REACH = 2**16  # images, the next ones of this process, whose shards are fetched


def fetched_ahead(keys: Iterable[list[Key]], views: Views, *, processes: int) -> Iterable[list[Key]]:
    """Return the keys of batches of `views`; while they are asked for, the shards of the next ones are fetched.

    No more are than have room in the cache beside those that are read, whose place they would take.

    Args:
        processes: so many share the cache and do the same, each for its own batches.
    """
    source = views.source
    if not isinstance(source, ShardImages) or source.ahead is None:
        return keys
    return _ahead_of(keys, source, views.members, source.ahead // processes)


def _ahead_of(keys: Iterable[list[Key]], source: ShardImages, members: np.ndarray, free: int) -> Iterator[list[Key]]:
    """Yield `keys`; let the shards be fetched that are first used by them, and by later ones `free` more."""
    rest = _first_uses(keys, source, members)
    waiting: deque[tuple[list[Key], list[int]]] = deque()
    shards: deque[int] = deque()  # that `waiting` uses first, and are still to be fetched
    images = 0  # in `waiting`
    with _fetching(partial(source.fetched, ahead=True)) as fetch:
        while True:
            while (not waiting or (len(shards) < free and images < REACH)) and (coming := next(rest, None)):
                waiting.append(coming)
                images += len(coming[0])
                shards += coming[1]
            if not waiting:
                return
            batch, used = waiting.popleft()
            images -= len(batch)
            free += len(used)
            while shards and free:
                fetch(source.index.shards[shards.popleft()])
                free -= 1
            yield batch


def _first_uses(
    keys: Iterable[list[Key]], source: ShardImages, members: np.ndarray
) -> Iterator[tuple[list[Key], list[int]]]:
    """Yield each batch's keys with the shards that no earlier batch of the epoch had, in their order."""
    epoch, before = -1, set[int]()
    for batch in keys:
        if batch[0][0] != epoch:  # what was fetched an epoch ago may be gone
            epoch, before = batch[0][0], set()
        indices = members[[index for _, index in batch]]
        found = dict.fromkeys(np.searchsorted(source.ends, indices, side="right").tolist())
        new = [shard for shard in found if shard not in before]
        before.update(new)
        yield batch, new


@contextmanager
def _fetching(fetched: Callable[..., Any]) -> Iterator[Callable[[Any], None]]:
    """Return what lets another process call `fetched`, and end it with the block."""
    context = multiprocessing.get_context()
    theirs, ours = context.Pipe(duplex=False)
    process = context.Process(target=_fetch, args=(fetched, theirs, ours), daemon=True)
    process.start()
    theirs.close()

    def fetch(shard: Any) -> None:
        with suppress(OSError):  # it was killed; readers fetch what they need
            ours.send(shard)

    try:
        yield fetch
    finally:
        process.kill()
        process.join()
        ours.close()


def _fetch(fetched: Callable[..., Any], shards: Connection, parents: Connection) -> None:
    parents.close()  # or this process would not see the parent's end
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent's handlers save a state
        signal.signal(number, signal.SIG_DFL)
    pool = ThreadPoolExecutor(AT_ONCE)
    with suppress(EOFError):
        while True:
            pool.submit(fetched, shards.recv())
    os._exit(0)  # what is being fetched is of no use any more
