"""Files and Pillow images to uint8 tensors, safely: what comes out is a valid tensor or a `BadImage`.

Images come from strangers, so sizes are checked before pixels are decoded, nothing is unpickled, no other program is
started, and no Pillow safety setting is loosened. Symbols: c channels, h and w image height and width.
"""

import io
import math
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from PIL import ExifTags, Image

from mirl.data.reading import Unread, patiently
from mirl.errors import UserError, printable

MODES = {1: "L", 3: "RGB", 4: "RGBA"}

# EPS starts Ghostscript; IPTC opens whatever it contains, EPS too; Pillow can name the others but not decode them.
EXCLUDED_FORMATS = {"EPS", "IPTC", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}

# Files up to this size are read by one call, which Pillow's many small ones cost more than; 32 MiB.
READ_AT_ONCE = 2**25

# EXIF orientation (1 is upright) -> how to turn the stored pixels.
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):
    """A file that cannot be used as an image; `reason` follows its name, as in "is empty (0 bytes)"."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class OtherChannels(BadImage):
    """A file that may be good, but is not of the number of channels that was asked for."""


@cache
def openable_formats() -> tuple[str, ...]:
    """Return the names of the formats that `read_image` accepts, the common ones first."""
    Image.init()
    accepted = (name for name in Image.OPEN if name not in EXCLUDED_FORMATS)
    return tuple(sorted(accepted, key=lambda name: (name not in ("JPEG", "PNG"), name)))


@cache
def image_suffixes(channels: int = 3) -> frozenset[str]:
    """Return the lower-case file suffixes, such as ".jpg", that can hold images of that many channels."""
    suffixes = {".npy"}
    if channels in MODES:
        suffixes |= {s for s, name in Image.registered_extensions().items() if name in openable_formats()}
    return frozenset(suffixes)


@contextmanager
def only_bad_image() -> Iterator[None]:
    """Turn every error of a decoder into `BadImage`, and keep its warnings from the user."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (BadImage, UserError):
        raise
    except Exception as error:  # broken files make Pillow raise nearly every built-in exception
        raise BadImage(_reason(error)) from error


def read_image(path: str | os.PathLike[str], channels: int = 3) -> torch.Tensor:
    """Read the first frame of an image file, turned upright by its EXIF orientation.

    | file                             | 1 channel      | 3 channels            | 4 channels                |
    | ---------------------------------- | -------------- | --------------------- | ------------------------- |
    | grey, bilevel                      | as is          | replicated            | replicated, opaque        |
    | RGB, palette, CMYK, YCbCr, LAB ... | luminance      | RGB                   | RGB, opaque               |
    | with alpha, a transparent colour   | over white     | composited over white | RGBA                      |
    | 16-bit, 32-bit or float grey       | stretched grey | stretched, replicated | stretched, opaque         |
    | `.npy` [h, w, c] or [c, h, w]      | also [h, w]    | as is                 | as is                     |

    Stretched: linearly from the image's own minimum and maximum to 0 and 255; a constant image becomes 0. (Targets are
    normalised in each patch, so absolute intensity does not matter.) `.npy` arrays may have any number of channels;
    those that are not uint8 are stretched, each channel by itself.

    Args:
        path: the file; `.npy` is told by its suffix, other formats by their content.
        channels: 1, 3 or 4; any number for `.npy`.

    Returns:
        uint8 [channels, h, w], usually channels-last in memory.

    Raises:
        BadImage: if the file is missing, unreadable, not an image, damaged, larger than Pillow's limit of 89 megapixels
            (`Image.MAX_IMAGE_PIXELS`), or has another number of channels.
    """
    with only_bad_image():
        if is_array(path):
            return array_to_tensor(patiently(_read_array, path, channels), channels)
        with open_image(path, channels) as image:
            return decoded(image, channels)


def is_array(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file is NumPy's, by its suffix."""
    return os.fspath(path).lower().endswith(".npy")


def open_image(path: str | os.PathLike[str], channels: int) -> Image.Image:
    """Return an image, but for `.npy`, of which the header alone was decoded; to be called in `only_bad_image`."""
    content = file_in_memory(path)
    return image_in(content, channels) if isinstance(content, bytes) else content


def file_in_memory(path: str | os.PathLike[str]) -> bytes | Image.Image:
    """Do what `read_file` does, but not for ever."""
    return patiently(read_file, path)


def image_in(content: bytes, channels: int) -> Image.Image:
    """Return the image in a file's bytes, but for `.npy`, of which the header alone was decoded."""
    if channels not in MODES:
        raise OtherChannels(f"cannot have {channels} channels; only .npy files can")
    if not content:
        raise BadImage("is empty (0 bytes)")
    return Image.open(io.BytesIO(content), formats=openable_formats())


def decoded(image: Image.Image, channels: int) -> torch.Tensor:
    """Decode an image that `open_image` opened to uint8 [channels, h, w], upright; in `only_bad_image` too."""
    image.load()
    turn = turn_of(image)
    return image_to_tensor(image if turn is None else image.transpose(turn), channels)


def image_to_tensor(image: Image.Image, channels: int = 3) -> torch.Tensor:
    """Convert a Pillow image to uint8 [channels, h, w] by the table of `read_image`; `channels` is 1, 3 or 4."""
    if image.mode[0] in "IF":  # I, I;16, I;16B, ..., F
        image = Image.fromarray(stretch(np.asarray(image)))
    if image.has_transparency_data:
        if image.mode in ("La", "RGBa"):  # premultiplied alpha; Pillow only converts these to their plain twin
            image = image.convert(image.mode.upper())
        image = image.convert("RGBA")
        if channels != 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    if image.mode != MODES[channels]:
        image = image.convert(MODES[channels])
    pixels = np.array(image).reshape(image.height, image.width, channels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def stretch(values: np.ndarray) -> np.ndarray:
    """Map numbers of any real type linearly to uint8: their minimum to 0, their maximum to 255, a constant to 0.

    Raises:
        BadImage: if a value, or the distance between two, is not finite.
    """
    # float32 holds 16-bit integers exactly; result_type picks float64 for wider ones.
    values = values.astype(np.result_type(values.dtype, np.float32))
    low = values.min()
    span = values.max() - low
    if not np.isfinite(span):
        raise BadImage("has values that are not finite (NaN, infinite or far too large)")
    if span == 0:
        return np.zeros(values.shape, np.uint8)
    values -= low
    values /= span
    values *= 255
    return np.rint(values, out=values).astype(np.uint8)


def read_file(path: str | os.PathLike[str]) -> bytes | Image.Image:
    """Return a file's content; of a large file the decoded image, which may be much less."""
    if check_file(path) > READ_AT_ONCE:
        image = Image.open(path, formats=openable_formats())
        image.load()
        return image
    with open(path, "rb", buffering=0) as file:
        return file.read()


def file_content(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return all bytes of an image file, undecoded, or raise `BadImage` if they are more than `limit`."""
    with only_bad_image():
        return patiently(_read_content, path, limit)


def _read_content(path: str | os.PathLike[str], limit: int) -> bytes:
    size = check_file(path)
    if size > limit:
        raise BadImage(f"has {size / 2**20:.0f} MiB, over the limit of {limit / 2**20:.0f}")
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _read_array(path: str | os.PathLike[str], channels: int) -> np.ndarray:
    check_file(path)
    # A header that promises more than the file holds, or too much, costs nothing while it is mapped.
    mapped = np.lib.format.open_memmap(path, mode="r")
    _laid_out(mapped, channels)
    # But a file that is cut short while it is mapped would end the process.
    values: np.ndarray = np.fromfile(path, mapped.dtype, mapped.size, offset=mapped.offset)
    return values.reshape(mapped.shape, order="C" if mapped.flags.c_contiguous else "F")


def array_in(content: bytes) -> np.ndarray:
    """Return the array in the bytes of an `.npy` file; not a copy, so that its header's promises cost nothing."""
    file = io.BytesIO(content)
    old = np.lib.format.read_magic(file) == (1, 0)
    header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = header(file)
    if min(shape, default=0) < 0:
        raise BadImage(f"is an array of shape {list(shape)}")
    array: np.ndarray = np.frombuffer(content, dtype, math.prod(shape), offset=file.tell())
    return array.reshape(shape, order="F" if by_columns else "C")


def array_to_tensor(array: np.ndarray, channels: int) -> torch.Tensor:
    """Convert an array [h, w, c] or [c, h, w] of any real numbers to uint8 [channels, h, w], or raise `BadImage`."""
    array = _laid_out(array, channels)
    if array.dtype == np.uint8:
        return torch.from_numpy(np.array(array)).permute(2, 0, 1)
    return torch.from_numpy(np.stack([stretch(array[..., channel]) for channel in range(channels)]))


def _laid_out(array: np.ndarray, channels: int) -> np.ndarray:
    """Return an array as [h, w, channels] without a look at its values, or raise `BadImage`."""
    shape = list(array.shape)
    if array.ndim == 2 and channels == 1:
        array = array[..., None]
    elif array.ndim == 3 and shape[2] != channels and shape[0] == channels:
        array = np.moveaxis(array, 0, 2)
    if array.ndim != 3 or array.shape[2] != channels:
        reason = f"is an array of shape {shape}, not [h, w, {channels}] or [{channels}, h, w]"
        if array.ndim not in (2, 3) or not array.size:
            raise BadImage(reason)
        raise OtherChannels(f"{reason} (give channels {min(shape[0], shape[2]) if array.ndim == 3 else 1}?)")
    if array.dtype.kind not in "buif":
        raise BadImage(f"is an array of {array.dtype}, not of real numbers")
    height, width, _ = array.shape
    if height * width == 0:
        raise BadImage("has no pixels")
    if Image.MAX_IMAGE_PIXELS is not None and height * width > Image.MAX_IMAGE_PIXELS:
        raise BadImage(_too_large(height * width))
    return array


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """Return how to turn the stored pixels upright, None if they are."""
    # Not ImageOps.exif_transpose: it also rewrites the metadata, copies every image, and fails on damaged EXIF.
    try:
        return ORIENTATIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # the pixels are good even where the metadata is not
        return None


def check_file(path: str | os.PathLike[str]) -> int:
    """Return a file's bytes, which are some."""
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):  # opening a named pipe would wait for ever
        raise BadImage("is not a regular file")
    if info.st_size == 0:
        raise BadImage("is empty (0 bytes)")
    return info.st_size


def _too_large(pixels: int) -> str:
    limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
    return f"is {pixels / 1e6:.0f} megapixels, over the limit of {limit:.0f} megapixels (decompression bomb?)"


def _reason(error: Exception) -> str:
    detail = printable(" ".join(str(error).split()))[:120] or type(error).__name__
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        pixels = re.search(r"\d+", detail)
        return _too_large(int(pixels[0])) if pixels else detail
    if isinstance(error, Image.UnidentifiedImageError):
        return "is not an image"
    if isinstance(error, FileNotFoundError):
        return "is missing"
    if isinstance(error, Unread):
        return detail
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    if isinstance(error, MemoryError):
        return "needs too much memory"
    if isinstance(error, EOFError) or "truncated" in detail.lower() or "mmap length" in detail:
        return f"is truncated: {detail}"
    return f"is damaged: {detail}"
