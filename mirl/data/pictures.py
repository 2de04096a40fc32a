"""Images whose size is known before their pixels are: a view asks for a box, and no more is decoded than that needs.

A JPEG's cosine transform can be inverted at a half, a quarter or an eighth of the resolution, which saves most of the
time of a large photograph. Its entropy is decoded to the end, so damage is found wherever it is.
Symbols: c channels, h and w image height and width.
"""

import io
import os
from typing import Protocol

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from mirl.data.decode import (
    array_in,
    array_to_tensor,
    decoded,
    image_in,
    image_to_tensor,
    is_array,
    only_bad_image,
    open_image,
    read_image,
    turn_of,
)
from mirl.models.patches import Size

Box = tuple[int, int, int, int]  # top, left, height, width in pixels

REDUCTIONS = (8, 4, 2)  # by how much a JPEG can be decoded smaller

# Pixels that are left for each pixel of the view, along a side. With 2 a view is 40 dB or more from that of all pixels,
# closer than bicubic is to Lanczos; with 1 it is 29 dB.
LEFT = 2

# Turns by a quarter, and their mirror images, exchange height and width.
QUARTERS = (
    Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270, Image.Transpose.TRANSPOSE, Image.Transpose.TRANSVERSE,
)  # fmt: skip


class Picture(Protocol):
    """An image of `size`, (height, width) in pixels."""

    @property
    def size(self) -> Size: ...

    def region(self, box: Box, size: Size) -> Tensor:
        """Return what is in `box`, for a view of `size`: uint8 [c, h, w], or raise `BadImage`.

        It may be smaller than `box`, but keeps enough pixels for the view.
        """
        ...


class DecodedPicture:
    """An image whose pixels, uint8 [c, h, w], are known."""

    def __init__(self, image: Tensor) -> None:
        self.image = image

    @property
    def size(self) -> Size:
        height, width = self.image.shape[-2:]
        return height, width

    def region(self, box: Box, size: Size) -> Tensor:
        """Return the pixels of `box`, as they are."""
        top, left, height, width = box
        return self.image[:, top : top + height, left : left + width]


class JpegPicture:
    """A JPEG in memory of which the header is decoded.

    Args:
        image: what Pillow opened; file: what it reads; channels: 1, 3 or 4.
    """

    def __init__(self, image: JpegImageFile, file: io.BytesIO, channels: int) -> None:
        self._header: Image.Image | None = image
        self._file, self.channels = file, channels
        self.turn = turn_of(image)
        self.size: Size = (image.width, image.height) if self.turn in QUARTERS else (image.height, image.width)

    def region(self, box: Box, size: Size) -> Tensor:
        """Return what is in `box`, uint8 [c, h, w]; where it is decoded smaller, its edges move to the next pixel."""
        smaller = reduction(box, size)
        with only_bad_image():
            image = self._unread()
            image.draft(None, (image.width // smaller, image.height // smaller))
            image.load()
            if self.turn is not None:
                image = image.transpose(self.turn)
            return image_to_tensor(image.crop(_reduced(box, smaller, image.size)), self.channels)

    def _unread(self) -> Image.Image:
        """Return the image before its pixels are decoded, which happens once; so open it again the second time."""
        image, self._header = self._header, None
        return image or Image.open(io.BytesIO(self._file.getvalue()), formats=("JPEG",))


def reduction(box: Box, size: Size) -> int:
    """Return by how much smaller a box can be decoded for a view of `size`: 8, 4, 2 or 1."""
    pixels = min(box[2] / size[0], box[3] / size[1])
    return next((smaller for smaller in REDUCTIONS if pixels >= LEFT * smaller), 1)


def open_picture(path: str | os.PathLike[str], channels: int = 3) -> Picture:
    """Open an image file; what is not a JPEG is decoded at once. The table of `read_image` holds.

    Raises:
        BadImage: as `read_image`, but for damage to a JPEG behind its header, which `region` finds.
    """
    with only_bad_image():
        if is_array(path):
            return DecodedPicture(read_image(path, channels))
        return _picture(open_image(path, channels), channels)


def picture_in(content: bytes, name: str, channels: int = 3) -> Picture:
    """Open an image in memory that has the bytes and the name of a file; as `open_picture` does."""
    with only_bad_image():
        if is_array(name):
            return DecodedPicture(array_to_tensor(array_in(content), channels))
        return _picture(image_in(content, channels), channels)


def _picture(image: Image.Image, channels: int) -> Picture:
    if isinstance(image, JpegImageFile) and isinstance(image.fp, io.BytesIO):
        return JpegPicture(image, image.fp, channels)
    with image:
        return DecodedPicture(decoded(image, channels))


def _reduced(box: Box, smaller: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return left, upper, right, lower of `box` in an image of `size`, (width, height), that is so much smaller."""
    top, left, height, width = (max(low, round(edge / smaller)) for edge, low in zip(box, (0, 0, 1, 1), strict=True))
    top, left = min(top, size[1] - height), min(left, size[0] - width)
    return left, top, left + width, top + height
