"""Views keep images and label maps together, have the size they promise, and avoid crops of a single class."""

import pickle

import numpy as np
import pytest
import torch

from mirl.data.loading import seeded
from mirl.data.resizing import nearest
from mirl.data.semantic import IGNORE
from mirl.data.semantic_views import crop_view, distorted

CROP, SIZE = 64, 60
DRAWS = 40
COLOURS = torch.tensor([[20, 200, 90], [90, 20, 200], [200, 90, 20], [120, 120, 120], [250, 250, 30]])
NO_COLOUR = torch.tensor([[0, 0, 0]])  # of the padding


def scene(height=90, width=120, seed=0):
    """Blocks of 30 px, each of a class and its colour."""
    blocks = np.random.default_rng(seed).integers(0, len(COLOURS), (height // 30, width // 30), dtype=np.uint8)
    labels = torch.from_numpy(blocks.repeat(30, 0).repeat(30, 1))
    return COLOURS[labels.long()].permute(2, 0, 1).to(torch.uint8), labels


def view(crop=CROP, size=SIZE, flip=True, photometric=False, **options):
    return crop_view(crop, size, flip=flip, photometric=photometric, **options)


def draws(given, *scene, count=DRAWS):
    for key in range(count):
        with seeded(key):
            yield given(*scene)


@pytest.mark.parametrize("flip", [True, False])
def test_pixels_have_the_colour_of_their_label(flip):
    colours = torch.cat([COLOURS, NO_COLOUR]).float()
    for image, labels in draws(view(flip=flip, largest_share=1.0), *scene()):
        classes = torch.where(labels == IGNORE, len(COLOURS), labels.long())
        distance = (image.permute(1, 2, 0)[:, :, None] - colours).square().sum(-1)
        assert (distance.argmin(-1) == classes).float().mean() > 0.93  # edges are a pixel wide
        assert len(classes.unique()) > 1


def test_half_of_the_views_are_mirrored():
    labels = torch.arange(60, dtype=torch.uint8).repeat(60, 1)
    whole = view(60, 60, scales=(1.0, 1.0))
    mirrored = [torch.equal(said, labels.flip(1)) for _, said in draws(whole, scene(60, 60)[0], labels)]
    assert 0.25 < np.mean(mirrored) < 0.75
    assert all(
        torch.equal(said, labels) for _, said in draws(view(60, 60, False, scales=(1, 1)), *[scene(60, 60)[0], labels])
    )


@pytest.mark.parametrize("size", [(90, 120), (30, 300), (300, 30), (60, 60), (600, 450)])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_views_have_exactly_the_size_of_the_crop(size, channels):
    image, labels = scene(*size)
    image = image[[0, 1, 2, 0, 1][:channels]]
    for crop, said in draws(view(photometric=True), image, labels, count=8):
        assert crop.shape == (channels, CROP, CROP) and said.shape == (CROP, CROP)
        assert crop.dtype == said.dtype == torch.uint8 and crop.is_contiguous() and said.is_contiguous()
        assert (crop[:, said == IGNORE] == 0).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (7, 5)])
def test_images_of_any_shape_have_views(size):
    labels = torch.zeros(size, dtype=torch.uint8)
    for crop, said in draws(view(photometric=True), torch.ones(3, *size, dtype=torch.uint8), labels, count=5):
        assert crop.shape == (3, CROP, CROP) and said.shape == (CROP, CROP) and (said == 0).any()


def test_scales_reach_from_the_least_to_the_largest():
    labels = torch.arange(240, dtype=torch.uint8).repeat(240, 1)
    image = torch.zeros(3, 240, 240, dtype=torch.uint8)
    views = draws(view(30, 60, largest_share=1.0), image, labels, count=99)
    shares = [(int(said.max()) - int(said.min())) / 240 for _, said in views]
    assert 0.22 < min(shares) < 0.3 and 0.9 < max(shares) <= 1  # 30 px of 120 to 30


def test_what_is_shorter_than_the_crop_is_padded():
    image, labels = scene(60, 120)
    image, said = next(draws(view(flip=False, scales=(0.5, 0.5)), image, labels))
    inside = said != IGNORE
    assert inside[:30, :60].all() and inside.sum() == 30 * 60
    image, said = next(draws(view(flip=False, scales=(1.0, 1.0), longest=1.0), *scene(30, 120)))
    assert (said != IGNORE).sum() == 15 * 60  # the longer side decides


def test_a_class_covers_at_most_its_share():
    labels = torch.zeros(100, 1000, dtype=torch.uint8)
    labels[:, 900:] = 1
    image = torch.zeros(3, 100, 1000, dtype=torch.uint8)

    def shares(limit):
        views = draws(view(100, 100, scales=(1.0, 1.0), longest=10.0, largest_share=limit), image, labels, count=60)
        return np.array([max((said == k).float().mean().item() for k in (0, 1)) for _, said in views])

    # A crop has up to 75 % of one class for 50 of 901 places: ten draws find one of them for 4 of 10 images.
    assert (shares(1.0) <= 0.75).mean() < 0.2 < (shares(0.75) <= 0.75).mean() < 0.7
    # Three quarters of these crops have too much of one class, and ten draws in a row a twentieth.
    labels[:, ::2] = 2
    labels[:, :600] = 0
    assert (shares(1.0) > 0.75).mean() > 0.4 and (shares(0.75) > 0.75).mean() < 0.05


def test_ignored_pixels_do_not_count():
    labels = torch.full((100, 200), IGNORE, dtype=torch.uint8)
    labels[:, 0::10], labels[:, 5::10] = 0, 1  # of four fifths nothing is said; the rest is even
    image = torch.arange(200, dtype=torch.uint8).expand(3, 100, 200)
    limited, unlimited = (
        [crop for crop, _ in draws(view(40, 100, scales=(1.0, 1.0), largest_share=limit), image, labels)]
        for limit in (0.75, 1.0)
    )
    assert all(torch.equal(*crops) for crops in zip(limited, unlimited, strict=True))  # the first draw is good


def test_a_crop_without_labels_is_drawn_again():
    labels = torch.full((100, 200), IGNORE, dtype=torch.uint8)
    labels[:, 100:105], labels[:, 105:110] = 0, 1

    def labelled(limit):
        given = view(40, 100, scales=(1.0, 1.0), largest_share=limit)
        image = torch.zeros(3, 100, 200, dtype=torch.uint8)
        return np.mean([bool((said != IGNORE).any()) for _, said in draws(given, image, labels)])

    assert labelled(1.0) < 0.5 and labelled(0.75) > 0.9
    labels[:] = IGNORE
    assert labelled(0.75) == 0


def test_the_part_that_is_cut_out_is_what_resizing_all_would_show():
    image = torch.linspace(0, 255, 200).repeat(3, 200, 1).to(torch.uint8)
    labels = torch.arange(200, dtype=torch.uint8).repeat(200, 1)
    for crop, said in draws(view(50, 100, False, scales=(0.8, 1.6), largest_share=1.0), image, labels):
        expected = said.float() * (255 / 199)
        assert (crop[0].float() - expected).abs().max() < 4  # a pixel of the source is 1.3


def test_noise_changes_brightness_contrast_and_colours():
    image = scene()[0]
    changed = list(draws(distorted, image, count=200))
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    levels = {int(one[0, 0, 0]) for one in draws(distorted, grey, count=200)}
    assert 100 in levels and min(levels) < 60 and max(levels) > 150
    assert all((one[0] == one[2]).all() for one in draws(distorted, grey, count=20))  # grey has no colour to change
    same = np.mean([torch.equal(one, image) for one in changed])
    assert 0.01 < same < 0.2  # one in sixteen
    red = torch.zeros(3, 2, 2, dtype=torch.uint8)
    red[0] = 200
    assert {(bool(one[1].any()), bool(one[2].any())) for one in draws(distorted, red, count=60)} >= {
        (False, False), (True, False), (False, True)
    }  # fmt: skip


@pytest.mark.parametrize("channels", [1, 5])
def test_only_colours_have_hue_and_saturation(channels):
    image = torch.arange(channels, dtype=torch.uint8).mul(10).add(100)[:, None, None].expand(-1, 4, 4)
    for one in draws(distorted, image, count=30):
        steps = one[:, 0, 0].float().diff()
        assert one.shape == image.shape and (channels == 1 or steps.max() - steps.min() < 2 or one.max() == 255)


def test_a_view_is_a_function_of_the_seed():
    given = pickle.loads(pickle.dumps(view(photometric=True)))
    first, again = (list(draws(given, *scene(), count=6)) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert len({one[0].numpy().tobytes() for one in first}) == 6


def test_a_view_leaves_its_source_as_it_was():
    image, labels = scene()
    before = image.clone(), labels.clone()
    for _ in draws(view(photometric=True), image, labels, count=20):
        assert torch.equal(image, before[0]) and torch.equal(labels, before[1])


def test_nearest_takes_maps_with_and_without_a_first_axis():
    labels = scene()[1]
    assert torch.equal(nearest(labels, (33, 47)), nearest(labels[None], (33, 47))[0])
    assert torch.equal(nearest(labels, (180, 240))[::2, ::2], labels)
