"""Images in tar shards, as webdataset writes them and `mirl shard` does: read by index, from disk or from a store.

A stream would be simpler to read but not to repeat. With an index, image i is a read of its bytes, and order, resuming,
processes and workers are what they are for files (`mirl/data/order.py` for the order over shards).
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from mirl.data.decode import BadImage, only_bad_image
from mirl.data.encoded import EncodedImages
from mirl.data.order import HELD_OUT_SHARDS, WINDOW
from mirl.data.reading import patiently
from mirl.data.shards.tar_index import BLOCK, Index, Shard
from mirl.errors import printable

OPEN_FILES = WINDOW + HELD_OUT_SHARDS  # of a process


class ShardImages(EncodedImages):
    """The images of tar shards.

    Args:
        index: where they are. fetched: returns the path of a shard on this machine, or raises OSError.
    """

    def __init__(
        self, index: Index, fetched: Callable[[Shard], str], channels: int, warnings: tuple[str, ...] = ()
    ) -> None:
        super().__init__(channels, warnings)
        self.index, self.ends, self.fetched = index, index.ends, fetched
        self.ignored = sum(shard.ignored for shard in index.shards)
        self._files: OrderedDict[int, int] = OrderedDict()  # shard -> open file

    def __len__(self) -> int:
        return len(self.index.members)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # when Python ends, `os` may be gone
        while getattr(self, "_files", None):
            close(self._files.popitem()[1])

    def shard_of(self, index: int) -> int:
        """Return the number of the shard that has the image."""
        return int(np.searchsorted(self.ends, index, side="right"))

    def name_of(self, index: int) -> str:
        """Return a name such as `shards/000000.tar/a/b.jpg`, in a form that can be printed."""
        return printable(f"{self.index.shards[self.shard_of(index)].name}/{self.index.members.name(index)}")

    def content(self, index: int) -> tuple[bytes, str]:
        """Return the bytes of an image's file and its name in the shard, or raise `BadImage`."""
        offset, size = int(self.index.members.blocks[index]) * BLOCK, int(self.index.members.sizes[index])
        shard = self.shard_of(index)
        with only_bad_image():
            file = self._file(shard)
            try:
                content = patiently(_part, self.index.shards[shard].name, file, size, offset)
            except OSError:
                os.close(self._files.pop(shard))  # a handle may be stale for ever
                raise
        if len(content) < size:
            raise BadImage("is missing: its shard is cut short")
        return content, self.index.members.name(index)

    def _file(self, shard: int) -> int:
        """Return the open file of a shard; so many shards stay open."""
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = self._opened(self.index.shards[shard])
        self._files.move_to_end(shard)
        return self._files[shard]

    def _opened(self, shard: Shard) -> int:
        try:
            return patiently(os.open, self.fetched(shard), os.O_RDONLY)
        except FileNotFoundError:  # another process may have made room just now
            return patiently(os.open, self.fetched(shard), os.O_RDONLY)


def _part(_: str | os.PathLike[str], file: int, size: int, offset: int) -> bytes:
    return os.pread(file, size, offset)
