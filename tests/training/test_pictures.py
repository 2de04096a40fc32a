"""Pictures of a run are readable, whatever there is to draw."""

import numpy as np
import pytest
import torch
from PIL import Image

from mirl.training.pictures import contact_sheet, draw, draw_curves, draw_gradients
from mirl.training.reconstructions import Panel


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


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_picture_is_a_readable_png(channels, tmp_path):
    columns = [Panel(title, torch.rand(2, channels, 16, 24)) for title in ("original", "masked", "sum")]
    draw(columns, tmp_path / "picture.png", "a title")
    height, width, _ = pixels(tmp_path / "picture.png").shape
    assert min(height, width) > 100 and width > height
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_gradients_are_drawn(tmp_path):
    rows = [{"kind": "gradients", "epoch": k, "encoder": 2.0 / (k + 1), "blocks": [0.1, 0.2 * k + 0.1, 0.3]}
            for k in range(4)]  # fmt: skip
    others = [{"kind": "train", "epoch": 0, "loss": 1.0}]
    draw_gradients([*others, *rows], tmp_path / "gradients.png")
    assert pixels(tmp_path / "gradients.png").std() > 5
