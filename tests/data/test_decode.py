"""Every kind of file becomes the promised tensor."""

import numpy as np
import pytest
import torch
from image_files import H, W, encoded, hwc, noise, photo, reason
from PIL import Image, ImageOps

from mirl.data.decode import image_to_tensor, read_image, stretch


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif", "gif", "ppm", "tga", "qoi"])
def test_rgb_equals_pillow(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    photo().save(path)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    image = read_image(path)
    assert image.shape == (3, H, W)
    np.testing.assert_array_equal(hwc(image), expected)


def test_content_decides_not_the_suffix(tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(encoded(photo(), "PNG"))
    np.testing.assert_array_equal(hwc(read_image(str(path))), np.asarray(photo()))


def test_grey_is_replicated_and_opaque(tmp_path):
    path = tmp_path / "x.png"
    grey = noise(H, W)
    Image.fromarray(grey).save(path)
    np.testing.assert_array_equal(hwc(read_image(path, 3)), np.repeat(grey[..., None], 3, -1))
    np.testing.assert_array_equal(hwc(read_image(path, 1))[..., 0], grey)
    assert (read_image(path, 4)[3] == 255).all()


def test_one_channel_is_luminance(tmp_path):
    path = tmp_path / "x.png"
    photo().save(path)
    np.testing.assert_array_equal(read_image(path, 1)[0].numpy(), np.asarray(photo("L")))


def test_bilevel(tmp_path):
    path = tmp_path / "x.png"
    bits = noise(H, W) > 127
    Image.fromarray(bits).save(path)
    for channels in (1, 3):
        np.testing.assert_array_equal(read_image(path, channels)[0].numpy(), bits * np.uint8(255))


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_alpha_is_composited_over_white(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    rgba = noise(H, W, 4)
    rgba[0, :, 3], rgba[1, :, 3] = 0, 255
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    Image.fromarray(rgba).save(path, **options)
    alpha = rgba[..., 3:] / 255
    image = hwc(read_image(path, 3))
    np.testing.assert_allclose(image, rgba[..., :3] * alpha + 255 * (1 - alpha), atol=1)
    assert (image[0] == 255).all()
    np.testing.assert_array_equal(image[1], rgba[1, :, :3])
    np.testing.assert_array_equal(hwc(read_image(path, 4)), rgba)
    assert (read_image(path, 1)[0, 0] == 255).all()


def test_grey_with_alpha(tmp_path):
    path = tmp_path / "x.png"
    grey = noise(H, W, 2)
    grey[0, :, 1], grey[1, :, 1] = 0, 255
    Image.fromarray(grey, "LA").save(path)
    for channels in (1, 3):
        image = hwc(read_image(path, channels))
        assert (image[0] == 255).all()
        assert (image[1] == grey[1, :, :1]).all()
    np.testing.assert_array_equal(hwc(read_image(path, 4))[..., 3], grey[..., 1])


def test_palette_is_expanded(tmp_path):
    path = tmp_path / "x.png"
    palette = photo().quantize(16)
    palette.save(path)
    np.testing.assert_array_equal(hwc(read_image(path)), np.asarray(palette.convert("RGB")))


def test_transparent_colours_become_white(tmp_path):
    path = tmp_path / "x.png"
    palette = photo().quantize(16)
    palette.save(path, transparency=int(np.asarray(palette)[0, 0]))
    assert hwc(read_image(path))[0, 0].tolist() == [255, 255, 255]
    assert read_image(path, 4)[3].min() == 0
    photo().save(path, transparency=photo().getpixel((0, 0)))
    assert hwc(read_image(path))[0, 0].tolist() == [255, 255, 255]


def test_cmyk_jpeg(tmp_path):
    path = tmp_path / "x.jpg"
    photo("CMYK").save(path, quality=100, subsampling=0)
    for channels in (1, 3, 4):
        expected = np.asarray(photo(("L", "RGB", "RGBA")[(1, 3, 4).index(channels)])).reshape(H, W, channels)
        np.testing.assert_allclose(hwc(read_image(path, channels)).astype(int), expected, atol=12)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", Image.MODES)
def test_every_pillow_mode(mode, channels):
    image = image_to_tensor(Image.new(mode, (W, H)), channels)
    assert image.shape == (channels, H, W) and image.dtype == torch.uint8


@pytest.mark.parametrize("mode", ["LAB", "YCbCr", "HSV"])
def test_other_colour_spaces(mode):
    source = Image.new("RGB", (W, H), (200, 80, 40))
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.applyTransform(source, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    else:
        image = source.convert(mode)
    np.testing.assert_allclose(hwc(image_to_tensor(image)).astype(int), np.asarray(source).astype(int), atol=5)


@pytest.mark.parametrize("suffix, dtype", [("png", "uint16"), ("tif", "uint16"), ("tif", ">u2"), ("tif", "int32")])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_deep_grey_is_stretched(tmp_path, suffix, dtype, channels):
    path = tmp_path / f"x.{suffix}"
    values = np.linspace(1000, 1510, H * W).reshape(H, W).astype(dtype)
    Image.fromarray(values).save(path)
    image = read_image(path, channels)
    expected = np.rint((values.astype(float) - 1000) / 510 * 255)
    for plane in image[:3]:
        np.testing.assert_array_equal(plane.numpy(), expected)
    if channels == 4:
        assert (image[3] == 255).all()


def test_float_tiff_is_stretched_and_must_be_finite(tmp_path):
    path = tmp_path / "x.tif"
    values = np.linspace(-3, 7, H * W, dtype=np.float32).reshape(H, W)
    Image.fromarray(values).save(path)
    np.testing.assert_array_equal(read_image(path)[1].numpy(), np.rint((values + 3) / 10 * 255))
    values[0, 0] = np.nan
    Image.fromarray(values).save(path)
    assert "not finite" in reason(path)


def test_stretch():
    assert stretch(np.array([-1, 0, 1], np.int8)).tolist() == [0, 128, 255]
    assert stretch(np.array([-(2**31), 2**31 - 1], np.int32)).tolist() == [0, 255]
    assert stretch(np.array([False, True])).tolist() == [0, 255]
    assert stretch(np.full((2, 2), 7.5)).tolist() == [[0, 0], [0, 0]]
    assert stretch(np.array([0, 1e-45], np.float32)).tolist() == [0, 255]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, suffix, orientation):
    upright = Image.new("RGB", (24, 16), "red")
    upright.paste("blue", (0, 0, 12, 8))
    turns = [None, 0, 3, 1, 5, 2, 6, 4]  # the inverses, which store the upright image as the tag says
    turn = turns[orientation - 1]
    stored = upright if turn is None else upright.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{suffix}"
    stored.save(path, exif=exif)
    image = hwc(read_image(path)).astype(int)
    assert image.shape == (16, 24, 3)
    np.testing.assert_allclose(image[[2, 2, 13, 13], [3, 20, 3, 20], 2], [255, 0, 0, 0], atol=12)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(image, np.asarray(ImageOps.exif_transpose(opened)))


def test_damaged_exif_leaves_the_image_usable(tmp_path):
    path = tmp_path / "x.jpg"
    for exif in (b"Exif\0\0II*\0" + b"\xff" * 30, b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"):
        photo().save(path, exif=exif)
        np.testing.assert_array_equal(read_image(path).shape, (3, H, W))


def test_first_frame(tmp_path):
    frames = [Image.new("RGB", (W, H), colour) for colour in ("red", "blue")]
    for suffix in ("gif", "tif", "webp", "png"):
        path = tmp_path / f"x.{suffix}"
        options = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        assert hwc(read_image(path))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("shape, channels", [((H, W, 5), 5), ((5, H, W), 5), ((H, W, 3), 3), ((4, H, W), 4)])
def test_npy_uint8_is_kept(tmp_path, shape, channels):
    path = tmp_path / "x.NPY"
    array = noise(*shape)
    with open(path, "wb") as file:
        np.save(file, array)
    expected = array if shape[2] == channels else array.transpose(1, 2, 0)
    np.testing.assert_array_equal(hwc(read_image(path, channels)), expected)


@pytest.mark.parametrize("dtype", ["uint16", ">i4", "float16", "float64", "int64", "bool"])
def test_npy_is_stretched_by_channel(tmp_path, dtype):
    path = tmp_path / "x.npy"
    array = noise(H, W, 2).astype(dtype)
    array[0, :, 0], array[..., 1] = 0, 1
    np.save(path, array)
    image = read_image(path, 2)
    assert (image[0].min(), image[0].max()) == (0, 255)
    assert (image[1] == 0).all()
    np.save(path, array[..., 0])
    assert read_image(path, 1).shape == (1, H, W)
