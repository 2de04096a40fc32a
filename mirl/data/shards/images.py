"""Images in tar shards, as webdataset writes them and `mirl shard` does: read by index, from disk or from a store.

A stream would be simpler to read but not to repeat. With an index, image i is a read of its bytes, and order, resuming,
processes and workers are what they are for files (`mirl/data/order.py` for the order over shards).
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import numpy as np

from mirl.data import reading
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
        index: where they are. fetched: returns the path of a shard on this machine, or raises OSError; where one is
            elsewhere, `ahead=True` says that nobody waits for it yet.
        ahead: shards for which this machine has room beside those that are read at a time; None if none is elsewhere,
            or those have no room.
    """

    def __init__(
        self, index: Index, fetched: Callable[..., str], channels: int, warnings: tuple[str, ...] = (),
        ahead: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(channels, warnings)
        self.index, self.ends, self.fetched, self.ahead = index, index.ends, fetched, ahead
        self.ignored = sum(shard.ignored for shard in index.shards)
        self._files: OrderedDict[int, OpenFile] = OrderedDict()  # shard -> open file

    def __len__(self) -> int:
        return len(self.index.members)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}

    def shard_of(self, index: int) -> int:
        """Return the number of the shard that has the image."""
        return int(np.searchsorted(self.ends, index, side="right"))

    def name_of(self, index: int) -> str:
        """Return a name such as `shards/000000.tar/a/b.jpg`, in a form that can be printed."""
        return printable(f"{self.index.shards[self.shard_of(index)].name}/{self.index.members.name(index)}")

    def content(self, index: int) -> tuple[bytes, str]:
        """Return the bytes of an image's file and its name in the shard, or raise `BadImage`."""
        with only_bad_image():
            part = self._part_of(index)
            try:
                content = patiently(_part, *part)
            except OSError:
                del self._files[self.shard_of(index)]  # a handle may be stale for ever
                raise
        if len(content) < part[2]:
            raise BadImage("is missing: its shard is cut short")
        return content, self.index.members.name(index)

    def beforehand(self, indices: Sequence[int]) -> int:
        """Read the first of some images' files together, whose shards are open; one is left to `content` at least.

        Return how many need no further call. A shard is opened, and fetched, when its first image is read.
        """
        known = takewhile(lambda index: self.shard_of(index) in self._files, indices)
        return reading.beforehand(_part, list(map(self._part_of, known))) or 1

    def _part_of(self, index: int) -> "tuple[str, OpenFile, int, int]":
        """Return what `_part` takes."""
        shard, members = self.shard_of(index), self.index.members
        offset, size = int(members.blocks[index]) * BLOCK, int(members.sizes[index])
        return self.index.shards[shard].name, self._file(shard), size, offset

    def _file(self, shard: int) -> "OpenFile":
        """Return the open file of a shard; so many shards stay open."""
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                self._files.popitem(last=False)
            self._files[shard] = self._opened(self.index.shards[shard])
        self._files.move_to_end(shard)
        return self._files[shard]

    def _opened(self, shard: Shard) -> "OpenFile":
        try:
            return patiently(_open, self.fetched(shard))
        except FileNotFoundError:  # another process may have made room just now
            return patiently(_open, self.fetched(shard))


class OpenFile:
    """A file that is closed when nobody has it any more: a thread that hangs may still read from it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # when Python ends, `os` may be gone
        close(self.number)


def _open(path: str | os.PathLike[str]) -> OpenFile:
    return OpenFile(os.open(path, os.O_RDONLY))


def _part(_: str | os.PathLike[str], file: OpenFile, size: int, offset: int) -> bytes:
    return os.pread(file.number, size, offset)
