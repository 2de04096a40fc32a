"""What is decoded for a view alone is what decoding everything gives, as nearly as is promised."""

import numpy as np
import pytest
import torch
from PIL import Image

from mirl.data.decode import BadImage, read_image
from mirl.data.loading import LabelledImages, MaskedImages, seeded
from mirl.data.pictures import DecodedPicture, JpegPicture, open_picture, reduction
from mirl.data.sources import open_source, opened
from mirl.data.transforms import resize, training_view

H, W = 208, 304


def photo(height=H, width=W, seed=0):
    """Smooth noise with edges, in colours."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    image.paste((250, 20, 40), (width // 4, height // 4, width // 2, height // 2))
    return image


def psnr(one, other):
    """Return the peak signal-to-noise ratio of two uint8 images, in dB."""
    return 10 * np.log10(255**2 / max(1e-9, (one.double() - other.double()).square().mean().item()))


def save(path, image=None, **options):
    (image or photo()).save(path, quality=90, **options)
    return path


@pytest.mark.parametrize("smaller", [2, 4, 8])
def test_a_view_of_a_smaller_decoding_is_that_of_all_pixels_within_36_db(tmp_path, smaller):
    path, size = save(tmp_path / "x.jpg"), (96 // smaller, 128 // smaller)
    box = (8, 16, 192, 256)
    picture = open_picture(path)
    pixels = picture.region(box, size)
    assert pixels.shape == (3, 192 // smaller, 256 // smaller)
    top, left, height, width = box
    exact = resize(read_image(path)[:, top : top + height, left : left + width], size)
    assert psnr(resize(pixels, size), exact) > 36
    shifted = resize(read_image(path)[:, : top + height - 8, : left + width - 16], size)
    assert psnr(shifted, exact) < 30  # so that the bound above would see a box in another place


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_box_that_is_not_decoded_smaller_is_exact(tmp_path, mode, channels):
    path = save(tmp_path / "x.jpg", photo().convert(mode))
    found = open_picture(path, channels).region((5, 7, 100, 90), (64, 64))
    assert torch.equal(found, read_image(path, channels)[:, 5:105, 7:97])


def by_pillow(path, box, size, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(JpegPicture, "_quickly", lambda *_: None)
        return open_picture(path).region(box, size)


@pytest.mark.parametrize("smaller", [1, 2, 4, 8])
@pytest.mark.parametrize("options", [{"subsampling": n, "progressive": n == 1} for n in (0, 1, 2)])
def test_the_quick_decoder_gives_pillows_pixels(tmp_path, options, smaller, monkeypatch):
    path = save(tmp_path / "x.jpg", photo().crop((0, 0, 301, 207)), **options)  # sides that no block fits
    box, size = (3, 5, 203, 290), (200 // 2 // smaller, 280 // 2 // smaller)
    assert reduction(box, size) == smaller
    picture = open_picture(path)
    assert picture._quickly(smaller) is not None
    assert torch.equal(picture.region(box, size), by_pillow(path, box, size, monkeypatch))


def test_pillow_judges_what_the_quick_decoder_finds_damaged(tmp_path, monkeypatch):
    content = save(tmp_path / "x.jpg").read_bytes()
    middle = len(content) // 2
    (tmp_path / "y.jpg").write_bytes(content[:middle] + b"\xff\x00" * 8 + content[middle + 16 :])
    picture, box = open_picture(tmp_path / "y.jpg"), (0, 0, H, W)
    assert picture._quickly(1) is None
    pixels = open_picture(tmp_path / "y.jpg").region(box, (H, W))
    assert torch.equal(pixels, by_pillow(tmp_path / "y.jpg", box, (H, W), monkeypatch))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_of_the_upright_image(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "x.jpg", exif=exif)
    picture, upright = open_picture(path), read_image(path)
    assert isinstance(picture, JpegPicture) and picture.size == tuple(upright.shape[-2:])
    assert torch.equal(picture.region((5, 7, 100, 90), (64, 64)), upright[:, 5:105, 7:97])
    half = picture.region((0, 0, *picture.size), (40, 40))  # and once more: the file is opened again
    assert half.shape[-2:] == (picture.size[0] // 2, picture.size[1] // 2)
    assert psnr(resize(half, (40, 40)), resize(upright, (40, 40))) > 36


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "npy", "bmp"])
def test_other_formats_are_decoded_at_once(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    if suffix == "npy":
        np.save(path, np.asarray(photo(), dtype=np.uint16) * 9)
    else:
        photo().save(path)
    picture = open_picture(path)
    assert isinstance(picture, DecodedPicture)
    assert torch.equal(picture.region((0, 0, H, W), (8, 8)), read_image(path))


def test_the_last_column_of_a_box_stays_inside(tmp_path):
    path = save(tmp_path / "x.jpg", photo(203, 299))
    for box in ((3, 3, 200, 296), (99, 95, 104, 204)):
        pixels = open_picture(path).region(box, (12, 12))
        smaller = reduction(box, (12, 12))
        assert smaller in (4, 8) and pixels.shape[-2:] == (round(box[2] / smaller), round(box[3] / smaller))
        assert not (pixels == 0).all(0).any()  # Pillow fills with black outside of an image


def test_decoding_keeps_two_pixels_for_each_of_the_view():
    assert [reduction((0, 0, side, 2000), (100, 100)) for side in (100, 399, 400, 799, 800, 1600)] == [1, 1, 2, 2, 4, 8]
    assert reduction((0, 0, 2000, 100), (100, 100)) == 1


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
def test_a_truncated_jpeg_is_replaced_wherever_it_ends_and_the_view_is_that_of_the_index(tmp_path, part):
    for name in "abc":
        save(tmp_path / f"{name}.jpg", photo(seed=ord(name)))
    content = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(content[: int(len(content) * part)])
    source, view = open_source(tmp_path), training_view((16, 16), 0.2, True)
    options = {"patches": 16, "mask_ratio": 0.5, "smallest": (4, 4), "substitute": True, "key": (0,)}
    found = MaskedImages(source, np.arange(3), view, **options)[0, 1]
    expected = MaskedImages(source, np.array([0, 2, 2]), view, **options)[0, 1]
    (name, reason), *others = found.bad
    assert name.endswith("b.jpg") and reason.startswith("is truncated: ") and not others
    assert torch.equal(found.images, expected.images) and torch.equal(found.masked, expected.masked)
    labelled = LabelledImages(source, np.arange(3), view, labels=np.arange(3), substitute=False)
    assert len(labelled[0, 1]) == 0 and len(labelled[0, 1].bad) == 1
    with pytest.raises(BadImage):
        opened(source, 1).region((0, 0, 32, 32), (16, 16))


def test_a_small_jpeg_is_bad_by_its_header(tmp_path):
    save(tmp_path / "x.jpg", photo(16, 40))
    images = LabelledImages(
        open_source(tmp_path), np.arange(1), training_view((8, 8), 0.2, True), labels=np.zeros(1), smallest=(20, 20)
    )
    assert images[0, 0].bad[0][1] == "is 16x40 px, smaller than a patch (20x20)"


def test_the_same_key_gives_the_same_bytes(tmp_path):
    save(tmp_path / "x.jpg")
    view = training_view((16, 16), 0.2, True)
    images = MaskedImages(open_source(tmp_path), np.arange(1), view, patches=4, mask_ratio=0.5, key=(3,))
    first, again, other = images[2, 0], images[2, 0], images[3, 0]
    assert torch.equal(first.images, again.images) and torch.equal(first.masked, again.masked)
    assert not torch.equal(first.images, other.images)
    with seeded(3, 2, 0):  # seeding NumPy and Python too changes nothing
        assert torch.equal(view(opened(images.source, 0)), first.images[0])


def test_boxes_and_flips_are_torchvisions():
    from torchvision.transforms import v2

    bicubic = v2.InterpolationMode.BICUBIC
    theirs = v2.Compose([v2.RandomResizedCrop((24, 24), (0.2, 1.0), interpolation=bicubic), v2.RandomHorizontalFlip()])
    image = torch.from_numpy(np.array(photo())).permute(2, 0, 1)
    for key in range(12):
        with seeded(key):
            expected = theirs(image)
        with seeded(key):
            assert torch.equal(training_view((24, 24), 0.2, True)(image), expected), key
