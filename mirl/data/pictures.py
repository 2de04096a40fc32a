"""Images whose size is known before their pixels are: a view asks for a box, and no more is decoded than that needs.

A JPEG's cosine transform can be inverted at a half, a quarter or an eighth of the resolution, which saves most of the
time of a large photograph. Its entropy is decoded to the end, so damage is found wherever it is.
Symbols: c channels, h and w image height and width.
"""

import os
from collections.abc import Callable
from typing import Protocol

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from mirl.data.decode import (
    array_in,
    array_to_tensor,
    decoded,
    file_in_memory,
    image_in,
    image_to_tensor,
    is_array,
    only_bad_image,
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

# How to turn pixels [h, w, c], as Pillow turns images.
TURNS: dict[Image.Transpose | None, Callable[[np.ndarray], np.ndarray]] = {
    None: lambda pixels: pixels,
    Image.Transpose.FLIP_LEFT_RIGHT: np.fliplr,
    Image.Transpose.ROTATE_180: lambda pixels: np.rot90(pixels, 2),
    Image.Transpose.FLIP_TOP_BOTTOM: np.flipud,
    Image.Transpose.TRANSPOSE: lambda pixels: pixels.swapaxes(0, 1),
    Image.Transpose.ROTATE_270: lambda pixels: np.rot90(pixels, 3),
    Image.Transpose.TRANSVERSE: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    Image.Transpose.ROTATE_90: np.rot90,
}

# Colours of a JPEG and the channels asked for, and what simplejpeg decodes to the same as Pillow.
COLOURS = {("YCbCr", 3): "RGB", ("RGB", 3): "RGB", ("Gray", 3): "RGB", ("Gray", 1): "GRAY"}

JPEG = b"\xff\xd8\xff"  # its first bytes


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

    simplejpeg decodes most of them. It and Pillow are libjpeg-turbo with the same pixels, but Pillow hands it the file
    in pieces and stores four bytes a pixel. What simplejpeg cannot decode, or finds damaged, is Pillow's to decode or
    to judge.

    Args:
        content: the file; channels: 1, 3 or 4.
    """

    def __init__(self, content: bytes, channels: int) -> None:
        self.content, self.channels = content, channels
        self._height, self._width, self._colours = _header(content, channels)
        image = image_in(content, channels)
        self.turn = turn_of(image)
        if (self._width, self._height) != image.size:
            (self._width, self._height), self._colours = image.size, None
        size = (self._height, self._width)
        self.size: Size = (size[1], size[0]) if self.turn in QUARTERS else size

    def region(self, box: Box, size: Size) -> Tensor:
        """Return what is in `box`, uint8 [c, h, w]; where it is decoded smaller, its edges move to the next pixel."""
        smaller = reduction(box, size)
        with only_bad_image():
            pixels = self._quickly(smaller)
            if pixels is not None:
                pixels = TURNS[self.turn](pixels)
                left, top, right, bottom = _reduced(box, smaller, (pixels.shape[1], pixels.shape[0]))
                return torch.from_numpy(np.ascontiguousarray(pixels[top:bottom, left:right])).permute(2, 0, 1)
            image = image_in(self.content, self.channels)
            image.draft(None, (image.width // smaller, image.height // smaller))
            image.load()
            if self.turn is not None:
                image = image.transpose(self.turn)
            return image_to_tensor(image.crop(_reduced(box, smaller, image.size)), self.channels)

    def _quickly(self, smaller: int) -> np.ndarray | None:
        """Return the pixels [h, w, c], or None if Pillow has to decode them."""
        if not self._colours:
            return None
        height, width = -(-self._height // smaller), -(-self._width // smaller)
        try:
            pixels: np.ndarray = simplejpeg.decode_jpeg(
                self.content, self._colours, fastdct=False, fastupsample=False, min_height=height, min_width=width,
                strict=True,
            )  # fmt: skip
        except ValueError:
            return None
        return pixels if pixels.shape[:2] == (height, width) else None


def _header(content: bytes, channels: int) -> tuple[int, int, str | None]:
    """Return height, width, and what simplejpeg shall decode to; None if Pillow has to look at the file."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return 0, 0, None
    small = Image.MAX_IMAGE_PIXELS is None or height * width <= Image.MAX_IMAGE_PIXELS
    return height, width, COLOURS.get((colours, channels)) if small else None


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
        content = file_in_memory(path)
        return _in_bytes(content, channels) if isinstance(content, bytes) else _decoded(content, channels)


def picture_in(content: bytes, name: str, channels: int = 3) -> Picture:
    """Open an image in memory that has the bytes and the name of a file; as `open_picture` does."""
    with only_bad_image():
        if is_array(name):
            return DecodedPicture(array_to_tensor(array_in(content), channels))
        return _in_bytes(content, channels)


def _in_bytes(content: bytes, channels: int) -> Picture:
    if content.startswith(JPEG):
        return JpegPicture(content, channels)
    return _decoded(image_in(content, channels), channels)


def _decoded(image: Image.Image, channels: int) -> Picture:
    with image:
        return DecodedPicture(decoded(image, channels))


def _reduced(box: Box, smaller: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return left, upper, right, lower of `box` in an image of `size`, (width, height), that is so much smaller."""
    top, left, height, width = (max(low, round(edge / smaller)) for edge, low in zip(box, (0, 0, 1, 1), strict=True))
    top, left = min(top, size[1] - height), min(left, size[0] - width)
    return left, top, left + width, top + height
