"""Objects are drawn where they are, in their class's colour, and can be read on images of any size."""

import numpy as np
import pytest
import torch
from PIL import Image

from mirl.training.overlays import _font, _place, _shorten, colour, overlay, sheet

NAMES = ["cat", "a dog with\na very long name", "motor-cycle"]
BLUE = 2  # a label whose colour no grey image has


def objects(height, width, *boxes, labels=None, scores=None):
    """Return objects whose masks fill their boxes."""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    found = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels or [BLUE] * len(boxes), dtype=torch.int64),
        "masks": masks,
    }
    return found if scores is None else found | {"scores": torch.tensor(scores)}


def where(picture, colour):
    """Return the rows and columns [n, 2] of exactly this colour."""
    return (picture == torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1)).all(dim=0).nonzero()


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(64, 64), (17, 30), (1, 700), (480, 640)])
def test_any_image_becomes_a_readable_picture(channels, size):
    """Small ones are enlarged by a whole number; nothing of a picture without objects is changed."""
    image = torch.randint(0, 256, (channels, *size), dtype=torch.uint8)
    empty = overlay(image, objects(*size, scores=[]), NAMES)
    factor = empty.shape[1] // size[0]
    assert empty.dtype == torch.uint8 and empty.shape == (3, factor * size[0], factor * size[1])
    assert (factor == 1) == (max(size) >= 400) and max(empty.shape) >= 400
    shown = image[:3].expand(3, -1, -1).repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    assert torch.equal(empty, shown)


def test_a_mask_is_translucent_and_all_else_unchanged():
    """In a grey image of 480 px with one object that has no box, hence no name."""
    image = torch.full((3, 480, 480), 100, dtype=torch.uint8)
    found = objects(480, 480, (100, 200, 300, 400))
    picture = overlay(image, {name: found[name] for name in ("masks", "labels")}, NAMES)
    assert (picture[:, ~found["masks"][0]] == 100).all()
    inside, tint = picture[:, 300, 200].tolist(), colour(BLUE)
    assert all(min(100, t) < value < max(100, t) for value, t in zip(inside, tint, strict=True))
    edge = where(picture, tint)
    assert edge.min(dim=0).values.tolist() == [200, 100] and edge.max(dim=0).values.tolist() == [399, 299]
    assert len(edge) < 200 * 200 / 20


@pytest.mark.parametrize("size", [(50, 60), (480, 640), (1500, 2500)])
def test_a_box_is_drawn_where_it_is(size):
    """Its last pixels are those before x1 and y1."""
    height, width = size
    image = torch.zeros(3, *size, dtype=torch.uint8)
    box = torch.tensor([width // 5, height // 2, width // 2, height - height // 10])
    found = objects(*size, tuple(box.tolist()))
    picture = overlay(image, {name: found[name] for name in ("boxes", "labels")}, NAMES)
    factor = picture.shape[1] // height
    x0, y0, x1, y1 = (box * factor).tolist()
    drawn = where(picture, colour(BLUE))
    below = drawn[drawn[:, 0] > y0]  # the name ends at the box's upper edge
    assert below.min(dim=0).values.tolist() == [y0 + 1, x0] and below.max(dim=0).values.tolist() == [y1 - 1, x1 - 1]
    middle = picture[:, (y0 + y1) // 2, (x0 + x1) // 2]
    assert middle.tolist() == [0, 0, 0]


def test_names_stay_in_the_picture_and_beside_each_other():
    """Every corner and edge, in a picture that is wider or narrower than the name."""
    for size in ((100, 80), (300, 500)):
        taken = []
        for x, y in [(0, 0), (size[0] - 1, 0), (0, size[1] - 1), (size[0] - 1, size[1] - 1), (40, 40)]:
            place = _place((x, y, x, y), (30, 14), size, taken)
            assert 0 <= place[0] <= place[2] <= size[0] and 0 <= place[1] <= place[3] <= size[1]
            assert not any(place[0] < o[2] and o[0] < place[2] and place[1] < o[3] and o[1] < place[3] for o in taken)
            taken.append(place)
    font = _font(12)
    assert _shorten("short", font, 100) == "short"
    cut = _shorten("a name that is long", font, 60)
    assert cut.endswith("…") and font.getlength(cut) <= 60 and len(cut) > 3


def test_names_are_seen():
    """Two beside each other, and the surest over all others where there is no place for all."""
    image = torch.zeros(3, 400, 400, dtype=torch.uint8)
    box = (200, 200, 204, 204)

    def drawn(labels, scores, label=3):
        picture = overlay(image, objects(400, 400, *[box] * len(labels), labels=labels, scores=scores), NAMES)
        return len(where(picture, colour(label)))

    alone = drawn([3], [0.9])
    assert alone > drawn([3], None) > 500
    assert drawn([3, 1], [0.9, 0.1]) > 0.95 * alone
    assert drawn([3, 1], [0.9, 0.1], label=1) > 0.95 * drawn([1], [0.1], label=1)
    assert drawn([1] * 19 + [3], [0.1] * 19 + [0.9]) > 0.95 * alone


@pytest.mark.parametrize("size", [(30, 50), (450, 750), (1200, 2000)])
def test_masks_are_as_large_as_the_picture(size):
    """Enlarged, as they are, or reduced."""
    height, width = size
    found = objects(*size, (width // 10, height // 3, width // 2, height // 3 * 2))
    image = torch.zeros(3, *size, dtype=torch.uint8)
    picture = overlay(image, {name: found[name] for name in ("masks", "labels")}, NAMES, longest=800)
    scale = picture.shape[1] / height
    edge = where(picture, colour(BLUE))
    expected = [height // 3 * scale, width // 10 * scale, height // 3 * 2 * scale - 1, width // 2 * scale - 1]
    assert [*edge.min(dim=0).values.tolist(), *edge.max(dim=0).values.tolist()] == pytest.approx(expected, abs=1)


def test_small_objects_lie_over_large_ones():
    image = torch.zeros(3, 400, 400, dtype=torch.uint8)
    boxes = [(190, 190, 210, 210), (50, 50, 350, 350)]
    for order in ([0, 1], [1, 0]):
        found = objects(400, 400, *(boxes[i] for i in order), labels=[[1, 2][i] for i in order])
        picture = overlay(image, {name: found[name] for name in ("masks", "labels")}, NAMES)
        assert picture[:, 190, 200].tolist() == list(colour(1))


def test_boxes_outside_the_image_and_empty_masks_are_no_trouble():
    found = {
        "boxes": torch.tensor([[-5.0, -5, 2000, 2000], [900, 900, 950, 950], [10, 10, 10, 10]]),
        "labels": torch.tensor([1, 2, 3]), "masks": torch.zeros(3, 30, 40, dtype=torch.uint8),
        "scores": torch.tensor([0.5, 0.4, 0.3]),
    }  # fmt: skip
    assert overlay(torch.zeros(1, 30, 40, dtype=torch.uint8), found, NAMES).shape == (3, 300, 400)


def test_a_large_image_is_reduced_with_its_objects():
    image = torch.zeros(3, 900, 1800, dtype=torch.uint8)
    picture = overlay(image, objects(900, 1800, (600, 300, 1200, 600)), NAMES, longest=600)
    assert picture.shape == (3, 300, 600)
    drawn = where(picture, colour(BLUE))
    assert drawn.max(dim=0).values.tolist() == [199, 399]
    assert overlay(image, objects(900, 1800), NAMES, longest=600).shape == (3, 300, 600)


def test_colours_are_stable_and_differ():
    colours = [colour(label) for label in range(1, 81)]
    assert colours == [colour(label) for label in range(1, 81)] and colours[0] == (230, 159, 0)
    assert len(set(colours)) == 80 and all(0 <= value <= 255 for c in colours for value in c)
    distances = np.abs(np.array(colours)[:, None] - np.array(colours)).sum(axis=2) + 1000 * np.eye(80)
    assert distances.min() > 15 and distances[:10, :10].min() > 60


def test_a_sheet_has_a_row_for_each_image_and_a_column_for_each_title(tmp_path):
    values = [[40, 80], [120, 160], [200, 240]]
    shapes = [(300, 400), (400, 300), (400, 400)]
    rows = [
        [torch.full((3, *shape), value, dtype=torch.uint8) for value in row]
        for shape, row in zip(shapes, values, strict=True)
    ]
    sheet(rows, ("truth", "prediction"), tmp_path / "sheet.png", "3 images, $50")
    with Image.open(tmp_path / "sheet.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    tops, lefts = np.zeros((3, 2)), np.zeros((3, 2))
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            here = (pixels == value).all(axis=2)  # letters have all greys, but few of each
            down, across = np.flatnonzero(here.sum(axis=1) > 50), np.flatnonzero(here.sum(axis=0) > 50)
            tops[i, j], lefts[i, j], height, width = down[0], across[0], len(down), len(across)
            assert max(height, width) > 400
            assert height / width == pytest.approx(shapes[i][0] / shapes[i][1], rel=0.02)
    assert (np.diff(tops, axis=0) > 0).all() and (np.diff(lefts, axis=1) > 0).all()
    assert np.abs(np.diff(tops, axis=1)).max() <= 1
    sheet([[rows[0][0]]], ["truth"], tmp_path / "one.png", "")
