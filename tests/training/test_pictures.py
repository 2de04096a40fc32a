"""Pictures show pixels: predictions get their patches' statistics back, visible patches are the image's own."""

import numpy as np
import pytest
import torch
from PIL import Image

from mirl.data.transforms import channel_statistics, normalise
from mirl.methods import Term
from mirl.models.masking import split
from mirl.models.patches import gather, patchify
from mirl.objectives.pixels import pixel_target
from mirl.training.pictures import contact_sheet, draw, draw_curves, panels

SIZES = {"image_size": (16, 24), "patch_size": (4, 8)}


def scene(channels: int, target: str):
    torch.manual_seed(0)
    images = torch.randint(256, (2, channels, 16, 24), dtype=torch.uint8)
    patches = patchify(normalise(images, channels), SIZES["patch_size"])
    visible, masked = split(torch.rand(2, patches.shape[1]), 0.75)
    truth = pixel_target(gather(patches, masked), target)
    return images / 255, (patches, visible, masked), truth, {"target": target, "channels": channels, **SIZES}


@pytest.mark.parametrize("target", ["normalised", "raw"])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_perfect_pair_sums_to_the_original(channels, target):
    images, masks, truth, options = scene(channels, target)
    main = truth * 0.5
    columns = panels(*masks, [main, truth - main], [Term((1, 2), 1.0)], **options)
    shown = {panel.title: panel.images for panel in columns}
    assert list(shown) == ["original", "masked", "main", "residual", "sum"]
    torch.testing.assert_close(shown["original"], images, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(shown["sum"], images, atol=1e-4, rtol=1e-3)
    # what the main component lacks is what the residual, centred on grey, adds
    torch.testing.assert_close(shown["main"] + shown["residual"] - 0.5, images, atol=1e-4, rtol=1e-3)


def test_masked_patches_are_grey_and_visible_ones_are_shown():
    images, (patches, visible, masked), truth, options = scene(3, "normalised")
    shown = panels(patches, visible, masked, [truth], [Term((1,), 1.0)], **options)[1].images
    cut = patchify(shown, SIZES["patch_size"])
    assert torch.all(gather(cut, masked) == 0.5)
    torch.testing.assert_close(gather(cut, visible), gather(patchify(images, SIZES["patch_size"]), visible))


def test_a_residual_of_nothing_is_grey():
    _, masks, truth, options = scene(3, "normalised")
    residual = panels(*masks, [truth, torch.zeros_like(truth)], [Term((1, 2), 1.0)], **options)[3]
    torch.testing.assert_close(residual.images, torch.full_like(residual.images, 0.5))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_picture_is_a_readable_png(channels, tmp_path):
    _, masks, truth, options = scene(channels, "normalised")
    draw(panels(*masks, [truth], [Term((1,), 1.0)], **options), tmp_path / "picture.png", "a title")
    with Image.open(tmp_path / "picture.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 100
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_contact_sheet_shows_every_image(channels, tmp_path):
    """Images of one colour each: each colour covers as much of the sheet as any other, 8 to a row."""
    values = torch.arange(11, dtype=torch.uint8) * 20 + 7
    images = values.view(-1, 1, 1, 1).expand(-1, channels, 12, 12)
    contact_sheet(images, [str(int(value)) for value in values], tmp_path / "sheet.png", "a title")
    sheet = pixels(tmp_path / "sheet.png")
    areas = [int((sheet == int(value)).all(axis=2).sum()) for value in values]
    assert min(areas) > 1000 and max(areas) < 1.05 * min(areas)
    first, ninth = (np.argwhere((sheet == int(values[i])).all(axis=2)).min(axis=0) for i in (0, 8))
    assert ninth[0] > first[0] and abs(ninth[1] - first[1]) <= 1  # below the first


def test_captions_are_drawn_as_they_are(tmp_path):
    """Dollars are no formulas, and a caption of two lines fits."""
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    contact_sheet(images, ["$x_{$", "a$b$c", "cat\nis dog"], tmp_path / "sheet.png", "100 % of them")
    contact_sheet(images, ["", "", ""], tmp_path / "bare.png", "100 % of them")
    assert (pixels(tmp_path / "sheet.png") < 128).sum() > (pixels(tmp_path / "bare.png") < 128).sum()


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_curves_are_drawn_of_whatever_there_is(rows, tmp_path):
    """Before the first step, after losses that were not finite (null), and with accuracies of two models."""
    numbers = {"lr": 1e-3, "grad_norm": 1.0, "seconds": 0.1, "data_wait": 0.05, "images_per_second": 10.0}
    training = [{"kind": "train", "epoch": k, "loss": None if k == 1 else 2.0 - k / 5} | numbers for k in range(rows)]
    held_out = [{"kind": "held_out", "step": k, "epoch": k, "loss": 2.0, "top1": 0.1 * k, "average_loss": 2.0,
                 "average_top1": 0.05 * k} for k in range(max(1, rows))]  # fmt: skip
    draw_curves([*training, *held_out], tmp_path / "curves.png")
    assert pixels(tmp_path / "curves.png").std() > 5


def test_rgb_statistics_are_imagenets():
    assert channel_statistics(3)[0] == (0.485, 0.456, 0.406)
