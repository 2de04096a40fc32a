"""Images that a source has as files or as the bytes of files, in shards, in tables: one can ask for them undecoded."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from mirl.data.pictures import Picture, picture_in


class Undecoded(ABC):
    """What a source may offer beside whole images."""

    @abstractmethod
    def open(self, index: int) -> Picture:
        """Return the image as one to ask for boxes, or raise `BadImage`."""

    def beforehand(self, indices: Sequence[int]) -> int:
        """Read the first of some images' files together, for `open` or `read`; return how many need no further call."""
        return len(indices)


class EncodedImages(Undecoded):
    """What reading needs beside `content`, of which subclasses say where it is.

    Args:
        channels: channels of every image read.
        warnings: what users should know about the data before a run begins, a line each.
    """

    def __init__(self, channels: int, warnings: tuple[str, ...] = ()) -> None:
        self.channels, self.warnings = channels, warnings

    @abstractmethod
    def content(self, index: int) -> tuple[bytes, str]:
        """Return the bytes of an image's file and its name, whose suffix tells `.npy`, or raise `BadImage`."""

    def open(self, index: int) -> Picture:
        """Return the image as one to ask for boxes, or raise `BadImage`."""
        return picture_in(*self.content(index), channels=self.channels)

    def read(self, index: int) -> torch.Tensor:
        """Return uint8 [c, h, w], or raise `BadImage`."""
        picture = self.open(index)
        return picture.region((0, 0, *picture.size), picture.size)
