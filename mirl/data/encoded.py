"""Images that a source holds as the bytes of files: in shards, in tables. They are decoded as files are."""

from abc import ABC, abstractmethod

import torch

from mirl.data.pictures import Picture, picture_in


class EncodedImages(ABC):
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
