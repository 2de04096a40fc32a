"""Files that are damaged, hostile or no images become a `BadImage` with a clear reason; nothing else comes out."""

import contextlib
import io
import os
import pickle
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from image_files import H, W, encoded, noise, photo, reason
from PIL import Image, TiffImagePlugin

from mirl.data.decode import BadImage, image_suffixes, openable_formats, read_image


def test_bad_npy(tmp_path):
    path = tmp_path / "x.npy"
    for array, expected in [
        (noise(H, W, 5), "shape [13, 17, 5], not [h, w, 3]"),
        (noise(H, W), "shape [13, 17], not"),
        (np.full((H, W, 3), np.nan), "not finite"),
        (np.array([[[-1e308, 1e308, 0.0]]] * 2) * np.array([[[1, 1, 1]], [[-1, -1, 1]]]), "not finite"),
        (noise(H, W, 3).astype(complex), "complex128"),
        (np.empty((0, W, 3), np.uint8), "has no pixels"),
    ]:
        np.save(path, array)
        assert expected in reason(path)
    np.save(path, np.array([{}, {}]), allow_pickle=True)
    assert "damaged" in reason(path)
    path.write_bytes(pickle.dumps([1]))
    assert "damaged" in reason(path)
    np.save(path, noise(H, W, 3))
    path.write_bytes(path.read_bytes()[:-1])
    assert "truncated" in reason(path)


def test_npy_size_is_checked_before_reading(tmp_path):
    path = tmp_path / "x.npy"
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(9500, 9500, 3)).flush()  # a sparse file
    assert reason(path) == "is 90 megapixels, over the limit of 89 megapixels (decompression bomb?)"


def png_header(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side, megapixels", [(9500, 90), (60_000, 3600)])
def test_bombs_are_refused_by_their_header(tmp_path, side, megapixels):
    path = tmp_path / "x.png"
    path.write_bytes(png_header(side, side))
    assert reason(path) == f"is {megapixels} megapixels, over the limit of 89 megapixels (decompression bomb?)"


def test_files_that_are_no_images(tmp_path):
    empty, text, folder, pipe = (tmp_path / name for name in ("empty.jpg", "text.jpg", "folder.jpg", "pipe.jpg"))
    empty.touch()
    text.write_text("not a picture\n")
    folder.mkdir()
    assert reason(empty) == "is empty (0 bytes)"
    assert reason(text) == "is not an image"
    assert reason(folder) == "is not a regular file"
    assert reason(tmp_path / "deleted.jpg") == "is missing"
    assert "5 channels" in reason(text, 5)
    assert "damaged" in reason("nul\0.jpg")
    if hasattr(os, "mkfifo"):
        os.mkfifo(pipe)
        assert reason(pipe) == "is not a regular file"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_permission_denied(tmp_path):
    path = tmp_path / "x.png"
    photo().save(path)
    path.chmod(0)
    assert reason(path) == "cannot be read: Permission denied"


def test_formats_that_start_programs_or_cannot_be_decoded_are_not_opened(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(encoded(photo(), "EPS"))
    assert reason(path) == "is not an image"
    assert openable_formats()[:2] == ("JPEG", "PNG")
    assert image_suffixes() >= {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".npy"}
    assert not image_suffixes() & {".eps", ".pdf", ".h5", ".mpg", ".txt"}
    assert image_suffixes(5) == {".npy"}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("part", [0.02, 0.2, 0.5, 0.8])
def test_truncated_files(tmp_path, format, part):
    path = tmp_path / "x"
    content = encoded(Image.fromarray(noise(64, 64, 3)), format)
    path.write_bytes(content[: int(len(content) * part)])
    reason(path)
    if format in ("JPEG", "PNG") and part >= 0.5:
        assert reason(path).startswith("is truncated: ")


def samples():
    rgb, deep = photo(), Image.fromarray(noise(H, W, dtype=np.uint16))
    yield from (
        (format, encoded(rgb, format)) for format in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA")
    )
    yield from ((format, encoded(rgb, format)) for format in ("JPEG2000", "PCX", "SGI", "DDS", "QOI", "ICNS"))
    yield "ICO", encoded(rgb, "ICO", sizes=[(W, H)])  # the usual sizes are larger than this image
    yield "deep PNG", encoded(deep, "PNG")
    yield "LZW TIFF", encoded(rgb, "TIFF", compression="tiff_lzw")
    yield "JPEG TIFF", encoded(rgb, "TIFF", compression="jpeg")
    yield "palette PNG", encoded(rgb.quantize(8), "PNG", transparency=0)
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010E: "text", 0x011A: TiffImagePlugin.IFDRational(72, 1)})
    yield "EXIF JPEG", encoded(rgb, "JPEG", exif=exif)
    yield "EXIF PNG", encoded(rgb, "PNG", exif=exif)
    buffer = io.BytesIO()
    np.save(buffer, noise(H, W, 3, dtype=np.float32))
    yield "npy", buffer.getvalue()


@pytest.mark.parametrize("name, content", [pytest.param(*sample, id=sample[0]) for sample in samples()])
def test_mutated_files_give_a_tensor_or_bad_image(tmp_path, capsys, name, content):
    path = tmp_path / ("x.npy" if name == "npy" else "x")
    path.write_bytes(content)
    read_image(path)
    generator = random.Random(name)
    for _ in range(60):
        mutated = bytearray(content)
        # Headers are short and decide most, so half of the changes go there.
        for _ in range(generator.randint(1, 8)):
            end = generator.choice((len(content), min(len(content), 100)))
            mutated[generator.randrange(end)] ^= 1 << generator.randrange(8)
        if generator.random() < 0.3:
            del mutated[generator.randrange(len(mutated)) :]
        path.write_bytes(mutated)
        for channels in (1, 3, 4):
            try:
                image = read_image(path, channels)
            except BadImage as error:
                assert error.reason and "\n" not in error.reason
            else:
                assert image.dtype == torch.uint8 and image.shape[0] == channels and image.numel() > 0
    assert capsys.readouterr() == ("", "")


def test_warnings_stay_inside_and_filters_are_restored(tmp_path):
    path = tmp_path / "x.tif"
    content = encoded(photo(), "TIFF", description="x" * 50)
    path.write_bytes(content.replace(b"x" * 50, b"x" * 10))
    before = warnings.filters[:]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.suppress(BadImage):
            read_image(path)
    assert caught == [] and warnings.filters == before


def test_bad_image_travels_between_processes():
    assert pickle.loads(pickle.dumps(BadImage("is missing"))).reason == "is missing"
