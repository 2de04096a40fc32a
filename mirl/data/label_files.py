"""Label files: PNGs whose values, of the palette or of grey, say what each pixel shows."""

import os
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mirl.data.decode import BadImage, check_file, only_bad_image
from mirl.data.reading import patiently

LARGEST_VALUE = 255
BIT_DEPTH = 24  # where a PNG file has it


def read_values(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Return the values [h, w] of a label file.

    Raises:
        BadImage: if it is not a PNG, is damaged, has colours in place of values, or values over 255.
    """
    with only_bad_image():
        return patiently(_values, path)


def _values(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    check_file(path)
    with Image.open(path, formats=("PNG",)) as image:
        if image.mode not in ("1", "L", "P") and image.mode[0] != "I":
            raise BadImage(f"is an {image.mode} label; give palette or greyscale values")
        values = np.asarray(image)
    if image.mode == "L":
        return values // _stretch_of(path)
    if values.max() > LARGEST_VALUE:
        raise BadImage(f"has values up to {values.max()}; labels are at most {LARGEST_VALUE}")
    return values.astype(np.uint8, copy=False)


def in_words(values: Iterable[int]) -> str:
    """Return sorted numbers in the form `0 to 11, 255`."""
    numbers = list(values)
    starts = [numbers[0], *(new for old, new in pairwise(numbers) if new != old + 1)]
    ends = [*(old for old, new in pairwise(numbers) if new != old + 1), numbers[-1]]
    return ", ".join(
        f"{start}" if start == end else f"{start} to {end}" for start, end in zip(starts, ends, strict=True)
    )


def _stretch_of(path: str | os.PathLike[str]) -> int:
    """Return the number by which Pillow multiplies grey values of 2 or 4 bits, so that the largest becomes 255."""
    with open(path, "rb") as file:
        bits = file.read(BIT_DEPTH + 1)[BIT_DEPTH]
    return int(255 // (2**bits - 1))
