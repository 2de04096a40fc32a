"""Views of images."""

import pytest
import torch

from mirl.data.transforms import fixed_view, normalise, training_view


@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
@pytest.mark.parametrize("shape", [(3, 40, 60), (1, 500, 20), (7, 5, 9)])
def test_views_have_the_asked_size_and_stay_uint8(size, shape):
    image = torch.randint(256, shape, dtype=torch.uint8)
    for view in (training_view(size, 0.2, True)(image), fixed_view(image, size)):
        assert view.shape == (shape[0], *size)
        assert view.dtype == torch.uint8


def test_the_fixed_view_keeps_the_aspect_and_the_centre():
    image = torch.zeros(1, 40, 80, dtype=torch.uint8)
    image[:, :, 20:60] = 255  # the middle square
    assert fixed_view(image, (40, 40)).min() == 255


def test_an_image_of_the_right_size_is_not_touched():
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    assert torch.equal(fixed_view(image, (32, 32)), image)


def test_flips_can_be_switched_off():
    image = torch.arange(64, dtype=torch.uint8).expand(1, 64, 64)
    whole = training_view((64, 64), 1.0, False)
    assert all(torch.equal(whole(image), image) for _ in range(8))


def test_normalise_undone_gives_the_image():
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, deviation = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    undone = normalise(images, 3) * deviation.view(3, 1, 1) + mean.view(3, 1, 1)
    torch.testing.assert_close(undone * 255, images.float(), atol=1e-3, rtol=0)
