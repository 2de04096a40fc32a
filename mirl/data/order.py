"""The order of an epoch over shards: few are read at a time, and each machine reads its own.

Where images are files, an epoch visits them in any order. Shards are fetched whole, so there an epoch passes through
them in a random order with `WINDOW` open at a time, and the images of those are mixed. It is a function of
(seed, epoch) all the same: resuming, processes and workers need to know nothing of it.
Symbols: s shards, n samples.
"""

from collections.abc import Sized

import numpy as np

WINDOW = 32  # shards whose images are mixed; 8 GiB of the usual size
HELD_OUT_SHARDS = 8  # that evaluation reads, where there are more than a window
SAMPLED_SHARDS = 4


class ShardOrder:
    """Where the shards of n samples end.

    Args:
        ends: number of samples up to the end of each shard, int64 [s].
    """

    def __init__(self, ends: np.ndarray) -> None:
        self.ends = ends

    @classmethod
    def of(cls, source: object, members: np.ndarray) -> "ShardOrder | None":
        """Return the order for sorted `members` of a source, None if it has no shards."""
        ends = ends_of(source)
        return None if ends is None else cls(np.searchsorted(members, ends))

    def epoch(self, seed: int, epoch: int, batch_size: int) -> np.ndarray:
        """Return the order of the n samples, int64 [n].

        Shard number k of the epoch spreads over the positions k to k + `WINDOW`, in units of a shard. The last ones go
        round to the beginning: at every moment as many are open. With `WINDOW` shards or fewer this is any order.
        Within a batch, images are sorted by the place that their shard has in the window as long as it is open. So the
        share of a process comes from few shards, and always from those of the same places.
        """
        shards = len(self.ends)
        generator = np.random.default_rng((seed, epoch))
        numbers = np.repeat(generator.permutation(shards), np.diff(self.ends, prepend=0))
        positions = (numbers + min(WINDOW, shards) * generator.random(len(numbers))) % shards
        order = np.argsort(positions, kind="stable")
        whole = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)
        places = np.argsort((numbers % WINDOW)[whole], axis=1, kind="stable")
        whole[:] = np.take_along_axis(whole, places, axis=1)
        return order


def ends_of(source: object) -> np.ndarray | None:
    """Return the number of images up to the end of each of a source's shards, int64 [s]; None if it has no shards."""
    ends: np.ndarray | None = getattr(source, "ends", None)
    return ends


def held_out_candidates(ends: np.ndarray, count: int) -> np.ndarray:
    """Return indices to hold out `count` of: all, or those of a few shards, since whoever evaluates fetches them.

    Args:
        ends: number of images up to the end of each shard, int64 [s].
    """
    if len(ends) <= WINDOW:
        return np.arange(ends[-1])
    chosen: list[np.ndarray] = []
    for shard in np.random.default_rng(0).permutation(len(ends)):
        chosen.append(np.arange(ends[shard - 1] if shard else 0, ends[shard]))
        if len(chosen) >= HELD_OUT_SHARDS and sum(map(len, chosen)) >= count:
            break
    return np.sort(np.concatenate(chosen))


def sampled_indices(source: Sized, count: int) -> np.ndarray:
    """Return indices of up to `count` images from all over a source, or from the first shards that have some."""
    ends = ends_of(source)
    last = len(source) if ends is None else int(np.unique(ends[ends > 0])[:SAMPLED_SHARDS][-1])
    return np.unique(np.linspace(0, last - 1, count).astype(int))
