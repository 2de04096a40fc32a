"""Views move images, boxes and masks together, draw what they promise, and lose no instance that is still there."""

import pickle

import numpy as np
import pytest
import torch

from mirl.data.instance_views import coco_view, jitter_view, resized_size, whole_view
from mirl.data.instances import Instances
from mirl.data.loading import seeded

SIZE, LARGEST = 100, 160
VIEWS = {
    "coco": coco_view(SIZE, LARGEST, flip=True),
    "coco unflipped": coco_view(SIZE, LARGEST, flip=False),
    "whole unflipped": whole_view(SIZE, LARGEST),
    "jitter": jitter_view(SIZE, flip=True),
    "jitter unflipped": jitter_view(SIZE, flip=False),
}
DRAWS = 60


def scene(height=90, width=120, count=6, seed=0):
    """Rectangles, each of a brightness of its own, that do not overlap: a grid of 2 x 3."""
    generator = np.random.default_rng(seed)
    image, masks, boxes = torch.zeros(3, height, width, dtype=torch.uint8), [], []
    for k in range(count):
        top, left = (k // 3) * height // 2, (k % 3) * width // 3
        y0, x0 = top + generator.integers(2, 8), left + generator.integers(2, 8)
        y1, x1 = top + height // 2 - generator.integers(1, 9), left + width // 3 - generator.integers(1, 9)
        mask = torch.zeros(height, width, dtype=torch.uint8)
        mask[y0:y1, x0:x1] = 1
        image += mask * (40 + 40 * k)
        masks.append(mask)
        boxes.append([x0, y0, x1, y1])
    return image, Instances(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.arange(1, count + 1),
        masks=torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.uint8),
    )


def draws(name, *given):
    for key in range(DRAWS):
        with seeded(key):
            yield VIEWS[name](*(given or scene()))


def box_of(mask):
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=torch.float32)


@pytest.mark.parametrize("name", VIEWS)
def test_boxes_masks_and_pixels_stay_together(name):
    seen = set()
    for image, instances in draws(name):
        assert image.dtype == instances.masks.dtype == torch.uint8 and instances.masks.shape[1:] == image.shape[1:]
        assert type(instances.boxes) is torch.Tensor and instances.boxes.dtype == torch.float32
        seen |= set(instances.labels.tolist())
        for box, label, mask in zip(instances.boxes, instances.labels, instances.masks, strict=True):
            assert (box_of(mask) - box).abs().max() < 1.01
            if mask.sum() > 150:  # inside, pixels have the instance's brightness
                assert (image[0][mask == 1].float().median() - 40 * label).abs() < 3
    assert seen == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("name", VIEWS)
def test_an_instance_is_kept_where_it_is_still_seen(name):
    image, instances = scene(count=1)
    kept = []
    for view, seen in draws(name, (image > 0) * torch.tensor(255, dtype=torch.uint8), instances):
        bright = view[0] > 127
        kept.append(len(seen))
        assert len(seen) == 1 if bright.sum() > 8 else bright.sum() < 9
        if len(seen) and bright.sum() > 100:
            assert (bright & (seen.masks[0] == 1)).sum() > 0.85 * (bright | (seen.masks[0] == 1)).sum()
    assert sum(kept) > DRAWS / 2


@pytest.mark.parametrize("name", VIEWS)
def test_half_are_flipped_or_none(name):
    image = torch.arange(120, dtype=torch.uint8).expand(3, 90, 120)
    _, none = scene(count=0)
    rising = [bool(view[0, 0, 0] < view[0, 0, -1]) for view, _ in draws(name, image, none)]
    assert all(rising) if "un" in name else 0.25 < np.mean(rising) < 0.75


def test_coco_sizes():
    shorter, ratios = set(), []
    for image, _ in draws("coco"):
        height, width = image.shape[-2:]
        shorter.add(min(height, width))
        ratios.append(round(height / width, 1))
        assert max(height, width) <= LARGEST
    assert shorter <= set(range(60, 101, 4)) and len(shorter) > 8
    assert 0.25 < np.mean([ratio == 0.8 for ratio in ratios]) < 0.8  # 90 / 120, if nothing is cut out


def test_a_cut_part_is_as_large_as_promised():
    """The part's sides are 0.48 to 0.75 of the image size where the shorter side is 0.5 to 0.75 of it."""
    image = torch.arange(250, dtype=torch.uint8).expand(3, 200, 250)
    _, none = scene(200, 250, 0)
    shares = [int(view[0].max()) - int(view[0].min()) + 1 for view, _ in draws("coco", image, none)]
    parts = [share for share in shares if share < 240]
    assert 15 < len(parts) < 45
    # 48 to 75 px of an image that is 62.5 to 93.75 px wide.
    assert min(parts) >= 250 * 48 / 93.75 - 4 and max(shares) > 245


def test_the_whole_is_what_evaluation_sees():
    assert {image.shape for image, _ in draws("whole unflipped")} == {(3, SIZE, 133)}


def test_jitter_sizes():
    sizes = np.array([image.shape[-2:] for image, _ in draws("jitter")])
    assert sizes.max() == SIZE and 8 <= sizes.max(1).min() < 40
    assert (sizes == SIZE).all(1).any()  # enlarged and cut


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_a_function_of_its_key_and_travels(name):
    view = pickle.loads(pickle.dumps(VIEWS[name]))
    for key, (image, instances) in enumerate(draws(name)):
        with seeded(key):
            other, others = view(*scene())
        assert torch.equal(image, other) and torch.equal(instances.masks, others.masks)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 2), (64, 64)])
def test_no_instance_and_extreme_sizes(name, size):
    image, none = scene(*size, count=0)
    for view, instances in draws(name, image, none):
        assert min(view.shape[-2:]) >= 1 and len(instances) == 0
        assert instances.masks.shape == (0, *view.shape[-2:]) and instances.boxes.shape == (0, 4)


def test_all_instances_may_be_lost():
    image, _ = scene(90, 120, 0)
    mask = torch.zeros(1, 90, 120, dtype=torch.uint8)
    mask[0, 0, 0] = 1
    corner = Instances(boxes=torch.tensor([[0.0, 0, 1, 1]]), labels=torch.tensor([1]), masks=mask)
    counts = {len(instances) for _, instances in draws("coco", image, corner)}
    assert counts == {0, 1}


def test_the_given_image_and_instances_are_not_changed():
    image, instances = scene()
    before = image.clone(), instances.map(torch.clone)
    for name in VIEWS:
        assert len(list(draws(name, image, instances))) == DRAWS
    assert torch.equal(image, before[0]) and torch.equal(instances.masks, before[1].masks)
    assert torch.equal(instances.boxes, before[1].boxes)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 640), (800, 1067)), ((640, 480), (1067, 800)), ((300, 1200), (333, 1333)), ((800, 800), (800, 800))],
)
def test_size_at_evaluation_is_cocos(size, expected):
    assert resized_size(*size, 800, 1333) == expected
    assert resized_size(1, 5000, 800, 1333) == (1, 1333)
