"""What one image file is, beyond what training makes of it: format, colours, profile, frames, and what is odd about it.

A file is decoded by the readers that training has, so what is unusable here is unusable there. A JPEG is decoded at an
eighth of its size: its entropy is read to the end, and damage found wherever it is.
"""

import hashlib
import io
import os
import time
from enum import IntFlag, auto
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from mirl.data.decode import (
    BadImage,
    OtherChannels,
    image_to_tensor,
    is_array,
    only_bad_image,
    open_image,
    read_image,
    turn_of,
)
from mirl.data.pictures import QUARTERS
from mirl.errors import UserError
from mirl.models.patches import Size

# How a reason begins where the file may be good, but could not be read here and now.
UNREAD = ("cannot be read", "is missing", "needs too much memory", "took more than", "ended the process")
SAME_FORMAT = {"MPO": "JPEG", "DIB": "BMP"}  # files of the first kind have the second's suffix, and are none the worse
SRGB = ("srgb", "c2")  # in names of profiles that are sRGB; c2 is a very small one
SMALLER = 8  # times: how much smaller a JPEG is decoded
SPARSE = 32  # pixels along a side, which tell of most images that they are neither grey nor of one colour
DIGEST = 8  # bytes


class Trait(IntFlag):
    """What is odd about a file."""

    BROKEN = auto()  # no image comes out of its bytes
    UNREAD = auto()  # its bytes could not be had
    CHANNELS = auto()  # of another number of them than was asked for, as arrays may be
    GREY = auto()
    CONSTANT = auto()  # all pixels have one colour
    ALPHA = auto()  # some pixels are not opaque
    DEEP = auto()  # more than 8 bits a channel
    COLOURS = auto()  # stored neither as grey nor as RGB: CMYK, LAB ...
    PROFILE = auto()  # of another colour space than sRGB
    FRAMES = auto()  # more than one
    SUFFIX = auto()  # of another format than the content
    TURNED = auto()  # by its EXIF orientation


class Inspection(NamedTuple):
    """What a file is; `reason` says why it cannot be used, as in "is empty (0 bytes)".

    `size` is (height, width) as training sees it, upright; `digest` 64 bits of the BLAKE2b hash of the file's bytes;
    `seconds` the time that it took.
    """

    traits: Trait = Trait(0)
    reason: str = ""
    bytes: int = 0
    digest: int = 0
    size: Size = (0, 0)
    format: str = ""
    mode: str = ""
    profile: str = ""
    seconds: float = 0.0


def inspect(path: str, channels: int = 3) -> Inspection:
    """Look at a file; whatever is wrong with it is part of the answer."""
    began = time.perf_counter()
    try:
        with only_bad_image():
            found = _array(path, channels) if is_array(path) else _image(path, channels)
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST)).digest()
                size = file.tell()
    except OtherChannels as error:
        return Inspection(Trait.CHANNELS, error.reason)
    except BadImage as error:
        return lost(error.reason)
    except UserError as error:  # too many reads hang
        return lost(f"{UNREAD[0]}: {error}")
    seconds = time.perf_counter() - began
    return found._replace(digest=int.from_bytes(digest, "little"), bytes=size, seconds=seconds)


def lost(reason: str) -> Inspection:
    """Return what is known of a file that cannot be used."""
    return Inspection(Trait.UNREAD if reason.startswith(UNREAD) else Trait.BROKEN, reason)


def _array(path: str, channels: int) -> Inspection:
    pixels = read_image(path, channels)
    dtype = np.load(path, mmap_mode="r", allow_pickle=False).dtype
    traits = _traits_of(pixels) | (Trait(0) if dtype == np.uint8 else Trait.DEEP)
    height, width = pixels.shape[-2:]
    return Inspection(traits, size=(height, width), format="NPY", mode=str(dtype))


def _image(path: str, channels: int) -> Inspection:
    with open_image(path, channels) as image:
        format_, mode, (width, height) = image.format or "", image.mode, image.size
        deep = mode[0] in "IF" or ";16" in str(getattr(image, "tile", ""))
        if isinstance(image, JpegImageFile):
            image.draft(None, (max(1, width // SMALLER), max(1, height // SMALLER)))
        image.load()  # before the EXIF is read: a PNG's reader would load it then, and keep its error to itself
        turn, profile = turn_of(image), profile_name(image.info.get("icc_profile") or b"")
        traits = _traits_of(image_to_tensor(image, channels))
        if traits & Trait.CONSTANT and isinstance(image, JpegImageFile):  # each eighth may be, and its pixels not
            traits = _traits_of(read_image(path, channels))
        known = {
            Trait.GREY: mode in ("1", "L", "LA", "La") or mode[0] in "IF",
            Trait.ALPHA: _is_transparent(image),
            Trait.DEEP: deep,
            Trait.COLOURS: mode in ("CMYK", "YCbCr", "LAB", "HSV"),
            Trait.PROFILE: bool(profile) and not any(name in profile.lower() for name in SRGB),
            Trait.SUFFIX: not _suffix_fits(path, format_),
            Trait.TURNED: turn is not None,
            Trait.FRAMES: _has_frames(image),  # the last: where they are damaged, nothing more can be asked
        }
    for trait, there in known.items():
        traits |= trait if there else Trait(0)
    size = (width, height) if turn in QUARTERS else (height, width)
    return Inspection(traits, size=size, format=format_, mode=mode, profile=profile)


def _traits_of(pixels: Tensor) -> Trait:
    """Tell an image [c, h, w] of one colour, and one whose three channels are the same; a few pixels rule most out."""
    few = pixels[:, :: max(1, pixels.shape[1] // SPARSE), :: max(1, pixels.shape[2] // SPARSE)]
    if _has_one_colour(few) and _has_one_colour(pixels):
        return Trait.CONSTANT
    return Trait.GREY if len(pixels) in (3, 4) and _is_grey(few) and _is_grey(pixels) else Trait(0)


def _has_one_colour(pixels: Tensor) -> bool:
    return bool((pixels.amin((1, 2)) == pixels.amax((1, 2))).all())


def _is_grey(pixels: Tensor) -> bool:
    return bool((pixels[0] == pixels[1]).all() and (pixels[1] == pixels[2]).all())


def _is_transparent(image: Image.Image) -> bool:
    """Tell whether some pixels of a decoded image are not opaque."""
    if not image.has_transparency_data:
        return False
    plain = image.convert(image.mode.upper()) if image.mode in ("La", "RGBa") else image
    return any(plain.convert("RGBA").getchannel("A").histogram()[:255])


def _has_frames(image: Image.Image) -> bool:
    """Tell whether there are several frames, for which many formats read them all."""
    try:
        return getattr(image, "n_frames", 1) > 1
    except Exception:  # damage behind the first frame, which is good and all that training reads
        return False


def _suffix_fits(path: str, format_: str) -> bool:
    promised = _formats_of_suffixes().get(os.path.splitext(path)[1].lower(), "")
    return SAME_FORMAT.get(promised, promised) == SAME_FORMAT.get(format_, format_)


@cache
def _formats_of_suffixes() -> dict[str, str]:
    return Image.registered_extensions()


@lru_cache(maxsize=64)
def profile_name(profile: bytes) -> str:
    """Return what a colour profile calls itself; nothing where there is none."""
    if not profile:
        return ""
    try:
        return " ".join(ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).split())[:80]
    except (ImageCms.PyCMSError, OSError, ValueError):
        return "a profile that cannot be read"
