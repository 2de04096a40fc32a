"""What goes into a shard: an image's bytes as they are, or smaller, under a name that says where it was.

Every image is decoded once, so that no broken one gets into a shard; a JPEG at an eighth of its size, which reads its
entropy to the end all the same.
"""

import io
import os
from pathlib import PurePosixPath

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from mirl.data.decode import BadImage, file_content, image_in, image_suffixes, is_array, only_bad_image, turn_of
from mirl.data.encoded import EncodedImages
from mirl.data.pictures import picture_in
from mirl.data.shards.tar_index import MEMBER_LIMIT
from mirl.data.sources import ImageFiles, Source

QUALITY = 90  # of JPEGs that are made smaller
CHECKED_AT = 16  # pixels of the image for one of the view that is asked for; the reduction is by 8 at most


def shard_image(source: Source, index: int, resize: int | None, channels: int) -> tuple[str, bytes]:
    """Return the name and the bytes of an image in a shard.

    Args:
        resize: shorter side, in pixels, of images that have more. JPEGs stay JPEGs (quality 90), other images become
            PNGs, which lose nothing more; 16-bit and float images and arrays stay as they are.

    Raises:
        BadImage: if the image cannot be used.
    """
    content, name = _content(source, index)
    picture = picture_in(content, name, channels)
    height, width = picture.size
    if resize and min(height, width) > resize and not is_array(name):
        content, suffix = _smaller(content, resize, channels) or (content, "")
        name = os.path.splitext(name)[0] + suffix if suffix and suffix != _plain(name) else name
    else:
        picture.region((0, 0, height, width), (max(1, height // CHECKED_AT), max(1, width // CHECKED_AT)))
    if _plain(name) not in image_suffixes(channels):
        name += _suffix_of(content)
    return _within(name), content


def _content(source: Source, index: int) -> tuple[bytes, str]:
    """Return an image's bytes and its name, relative where it can be."""
    if isinstance(source, ImageFiles):
        return file_content(source.path_of(index), MEMBER_LIMIT), source.paths[index]
    if isinstance(source, EncodedImages):
        return source.content(index)
    file = io.BytesIO()
    pixels = source.read(index).permute(1, 2, 0).numpy()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return file.getvalue(), f"{index:09d}.png"


def _suffix_of(content: bytes) -> str:
    """Return the suffix of an image's format."""
    with only_bad_image(), image_in(content, 3) as image:
        suffixes = [suffix for suffix, name in Image.registered_extensions().items() if name == image.format]
        if not suffixes:
            raise BadImage(f"is of a format without a suffix, {image.format}")
        return ".jpg" if ".jpg" in suffixes else suffixes[0]


def _plain(name: str) -> str:
    """Return a name's suffix in lower case, one for all spellings of JPEG."""
    suffix = os.path.splitext(name)[1].lower()
    return ".jpg" if suffix in (".jpeg", ".jfif", ".jpe") else suffix


def _smaller(content: bytes, side: int, channels: int) -> tuple[bytes, str] | None:
    """Return an image with that shorter side, upright, and its suffix; None if it has more than 8 bits a channel."""
    with only_bad_image(), image_in(content, channels) as image:
        if image.mode[0] in "IF":
            return None
        # Cameras' MPO, several pictures in one file, is a JPEG too.
        photograph, profile = isinstance(image, JpegImageFile), image.info.get("icc_profile")
        turn, shorter = turn_of(image), min(image.size)
        width, height = (max(1, round(edge * side / shorter)) for edge in image.size)
        image.draft(None, (2 * width, 2 * height))  # a JPEG's transform can be inverted smaller
        image.load()
        mode = "RGBA" if image.has_transparency_data else "L" if image.mode in ("1", "L") else "RGB"
        profile = profile if image.mode == mode else None  # of other colours it says nothing
        resized = image.convert(mode).resize((width, height), Image.Resampling.LANCZOS)
        upright = resized if turn is None else resized.transpose(turn)
        file = io.BytesIO()
        if photograph:
            upright.save(file, "JPEG", quality=QUALITY, icc_profile=profile)
        else:
            upright.save(file, "PNG", icc_profile=profile)
        return file.getvalue(), ".jpg" if photograph else ".png"


def _within(name: str) -> str:
    """Return a path that stays inside a folder, wherever it is unpacked, and that is not hidden there."""
    left_out = ("/", "..", ".", "__MACOSX")
    *folders, last = (part for part in PurePosixPath(name.replace(os.sep, "/")).parts if part not in left_out)
    return "/".join([*folders, f"_{last}" if last.startswith(".") else last])
