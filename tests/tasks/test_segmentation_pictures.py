"""Label maps are painted where they are, errors are marked, and a sheet shows images, truth, prediction and errors."""

import numpy as np
import pytest
import torch
from PIL import Image

from mirl.data.decode import BadImage
from mirl.data.semantic import IGNORE, SemanticClass, SemanticViews, ShapesSemantic
from mirl.data.shapes import Shapes
from mirl.tasks import segmentation_pictures
from mirl.tasks.segmentation_pictures import COLUMNS, draw_predictions, draw_training
from mirl.training.overlays import colour, sheet
from mirl.training.painting import HATCH, NAMED, WRONG, errors, fitted, legend, painted, palette

CLASSES = ShapesSemantic.classes


def labels_of(*columns, height=8, width=4):
    """Return a label map of vertical stripes."""
    return torch.tensor(columns, dtype=torch.uint8).repeat_interleave(width)[None].repeat(height, 1)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(("size", "longest"), [((8, 12), 480), ((300, 500), 480), ((500, 900), 450), ((1, 700), 90)])
def test_image_and_maps_become_equally_large(channels, size, longest):
    """Enlarged by a whole number, as they are, or reduced; labels stay labels and keep their places."""
    labels = torch.full(size, 7, dtype=torch.uint8)
    labels[:, size[1] // 2 :] = IGNORE
    image = torch.randint(256, (channels, *size), dtype=torch.uint8)
    shown, one, other = fitted(image, labels, labels, longest=longest)
    assert shown.dtype == torch.uint8 and shown.shape == (3, *one.shape) and torch.equal(one, other)
    assert max(one.shape) <= max(longest, 400 + max(size)) and max(one.shape) >= min(longest, 400)
    assert set(one.unique().tolist()) == {7, IGNORE}
    assert (one == 7).float().mean().item() == pytest.approx(0.5, abs=0.01)
    if max(size) <= 500 and longest == 480 and max(size) >= 400:
        assert one.shape == (288, 480)


def test_each_class_has_the_colour_of_the_legend_and_no_label_is_hatched():
    """On a grey image nearer to its own colour than to any other class's."""
    labels = labels_of(*range(11), IGNORE, height=30, width=30)
    picture = painted(torch.full((3, *labels.shape), 128, dtype=torch.uint8), labels).permute(1, 2, 0)
    tones = torch.tensor([colour(k + 1) for k in range(11)])
    for k in range(11):
        inside = picture[10, 30 * k + 15].int()
        assert int((tones - inside).abs().sum(dim=1).argmin()) == k
        assert picture[10, 30 * k].float().mean() < inside.float().mean() or k == 0  # where classes meet it is darker
    hatched = {tuple(pixel) for pixel in picture[:, 331:].reshape(-1, 3).tolist()}
    assert hatched == set(HATCH)


def test_the_image_is_seen_through_the_colours():
    image = torch.tensor([0, 255], dtype=torch.uint8).repeat(4)[None, None].repeat(3, 8, 1)
    picture = painted(image, torch.zeros(8, 8, dtype=torch.uint8)).float().mean(dim=0)
    assert (picture[:, 1::2] - picture[:, ::2]).min() > 20


def test_wrong_pixels_are_red_and_unlabelled_ones_black():
    truth, said = labels_of(0, 1, IGNORE, 2), labels_of(0, 2, 0, 2)
    image = torch.randint(256, (3, *truth.shape), dtype=torch.uint8)
    picture = errors(image, said, truth)
    right, wrong, none = (picture[:, :, 4 * i : 4 * i + 4].float() for i in (0, 1, 2))
    assert (right[0] == right[1]).all() and right.min() > 150 and (picture[0, :, 12:] == picture[2, :, 12:]).all()
    assert (wrong[0] > 4 * wrong[1]).all() and (wrong[0] <= WRONG[0]).all() and not none.any()


def test_the_legend_names_what_is_there_the_largest_first():
    names = [f"c{i}" for i in range(255)]
    maps = [labels_of(3, 3, 0), labels_of(9, 0, 3)]
    assert legend(maps, names) == [("c3", colour(4)), ("c0", colour(1)), ("c9", colour(10))]
    assert legend([labels_of(IGNORE, 2)], names) == [("c2", colour(3)), ("no label", HATCH[0])]
    assert legend([labels_of(IGNORE)], names) == [("no label", HATCH[0])]
    assert len(legend([labels_of(*range(150))], names)) == NAMED
    assert palette().shape == (256, 3) and tuple(palette()[4]) == colour(5)


def test_names_of_a_legend_are_written_whatever_they_are(tmp_path):
    """Long ones are cut, and nothing in them has a meaning."""

    def ink(name):
        picture = torch.full((3, 400, 400), 255, dtype=torch.uint8)
        sheet([[picture] * 3], [""] * 3, tmp_path / "a.png", "", legend=[(name, (255, 255, 255))])
        return (read(tmp_path / "a.png").max(axis=2) < 120).sum()

    nothing = ink("")
    for name in ("_hidden", "a" * 60, "$x_1^2$", "two\nlines"):
        assert ink(name) > nothing + 20
    assert ink("a" * 60) < 1.2 * ink("a" * 22)


class Boxes:
    """Grey images of two sizes with a bright square of class 1 on class 0; one image in three cannot be read."""

    classes = (SemanticClass(0, "ground"), SemanticClass(4, "a $square$ with_a very very long name"))

    def __len__(self):
        return 9

    def name_of(self, index):
        return str(index)

    def read_semantic(self, index):
        if index % 3 == 1:
            raise BadImage("is broken")
        labels = torch.zeros(40 + index, 60, dtype=torch.uint8)
        labels[10:30, 10:30] = 1
        labels[:, -5:] = IGNORE
        return (60 + 120 * labels.clamp(max=1)).repeat(3, 1, 1), labels


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def share_near(pixels, tone, reach=40):
    return (np.abs(pixels - np.array(tone)).sum(axis=2) < reach).mean()


def test_a_sheet_of_predictions(tmp_path, monkeypatch):
    """The better the prediction, the less red; its columns are as many as their titles."""
    drawn = []
    monkeypatch.setattr(segmentation_pictures, "sheet", lambda *a, **k: drawn.append((a, k)) or sheet(*a, **k))
    views = SemanticViews(Boxes(), np.arange(9))
    truth = {int(image.shape[1]): labels for image, labels in map(Boxes().read_semantic, (0, 2, 3, 5, 6, 8))}

    def right(image):
        return truth[image.shape[1]].clamp(max=1)

    for name, segment in (("good", right), ("bad", lambda image: 1 - right(image))):
        draw_predictions(segment, views, Boxes.classes, tmp_path / name, "epoch 3")
    good, bad = (share_near(read(tmp_path / name), WRONG, 120) for name in ("good", "bad"))
    assert good < 0.01 and bad > 0.1
    (rows, columns, *_), words = drawn[0]
    assert columns == COLUMNS and {len(row) for row in rows} == {4} and len(rows) == len(words["captions"])
    assert set(words["captions"]) == {"100.0 % of pixels right"} and set(drawn[1][1]["captions"]) == {
        "0.0 % of pixels right"
    }
    assert [name for name, _ in words["legend"]] == ["ground", Boxes.classes[1].name, "no label"]


def test_training_images_with_their_labels(tmp_path):
    """Also of the built-in shapes; the background is painted too."""
    shapes = ShapesSemantic(Shapes(12, size=32))
    draw_training(SemanticViews(shapes, np.arange(12)), CLASSES, tmp_path / "shapes.png")
    pixels = read(tmp_path / "shapes.png")
    assert pixels.shape[1] > 1000 and share_near(pixels, colour(1), 150) > 0.3
    draw_training(SemanticViews(Boxes(), np.array([4])), Boxes.classes, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    draw_predictions(lambda image: image[0], SemanticViews(Boxes(), np.array([1])), CLASSES, tmp_path / "none.png", "")
    assert not (tmp_path / "none.png").exists()


def test_an_image_without_labels_has_no_share(tmp_path, monkeypatch):
    class Unlabelled(Boxes):
        def read_semantic(self, index):
            image, labels = super().read_semantic(0)
            return image, torch.full_like(labels, IGNORE)

    drawn = []
    monkeypatch.setattr(segmentation_pictures, "sheet", lambda *a, **k: drawn.append(k))
    draw_predictions(
        lambda image: image[0] * 0, SemanticViews(Unlabelled(), np.arange(1)), Boxes.classes, tmp_path / "a.png", ""
    )
    assert drawn[0]["captions"] == ["no pixel has a label"]
