"""Views of images."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import RandAugment
from torchvision.transforms import v2

from mirl.data.loading import seeded
from mirl.data.transforms import augmented_view, evaluation_view, fixed_view, normalise, standardise, training_view


def noise(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
@pytest.mark.parametrize("shape", [(3, 40, 60), (1, 500, 20), (7, 5, 9)])
def test_views_have_the_asked_size_and_stay_uint8(size, shape):
    image = noise(*shape)
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


def test_standardise_takes_each_channels_statistics():
    images = noise(2, 3, 4, 4)
    found = standardise(images, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    for channel, (mean, deviation) in enumerate([(0.1, 0.4), (0.2, 0.5), (0.3, 0.6)]):
        torch.testing.assert_close(found[:, channel], (images[:, channel] / 255 - mean) / deviation)


@pytest.mark.parametrize("shape", [(3, 512, 512), (3, 300, 400), (1, 700, 256), (3, 100, 90)])
def test_a_large_evaluation_view_is_the_usual_crop_of_the_centre(shape):
    """As torchvision's and timm's: 256 pixels on the shorter side, then the middle 224."""
    image = noise(*shape)
    bicubic = v2.InterpolationMode.BICUBIC
    usual = v2.Compose([v2.Resize(256, interpolation=bicubic, antialias=True), v2.CenterCrop(224)])
    assert torch.equal(evaluation_view(image, (224, 224)), usual(image))


def test_a_large_evaluation_view_leaves_out_an_eighth():
    image = torch.zeros(1, 256, 256, dtype=torch.uint8)
    image[:, 16:240, 16:240] = 255
    assert evaluation_view(image, (224, 224)).min() == 255
    assert evaluation_view(image, (112, 112)).float().mean() > 254
    assert fixed_view(image, (224, 224)).min() == 0  # frozen features see all of it


@pytest.mark.parametrize(("size", "whole"), [(32, True), (95, True), (96, False)])
def test_a_small_evaluation_view_is_all_of_the_image(size, whole):
    image = noise(3, size, size)
    assert torch.equal(evaluation_view(image, (size, size)), image) == whole


def test_without_randaugment_the_view_is_the_training_view():
    image = noise(3, 40, 50)
    for key in range(4):
        with seeded(key):
            expected = training_view((32, 24), 0.3, True)(image)
        with seeded(key):
            assert torch.equal(augmented_view((32, 24), 0.3, True, "none")(image), expected)


@pytest.mark.parametrize("size", [(224, 224), (64, 48)])
def test_randaugment_is_timms(size):
    recipe = "rand-m9-mstd0.5-inc1"
    transforms = create_transform(
        size, is_training=True, auto_augment=recipe, color_jitter=None, interpolation="bicubic", re_prob=0.25
    ).transforms
    (timms,) = (transform for transform in transforms if isinstance(transform, RandAugment))
    view = augmented_view(size, 1.0, False, recipe)
    image, changed = noise(3, *size), 0
    whole = training_view(size, 1.0, False)  # all of an image that has the size already
    for key in range(30):
        with seeded(key):
            expected = np.asarray(timms(Image.fromarray(whole(image).permute(1, 2, 0).numpy()))).transpose(2, 0, 1)
        with seeded(key):
            found = view(image)
        assert found.dtype == torch.uint8 and np.array_equal(found.numpy(), expected), key
        changed += not torch.equal(found, image)
    assert changed > 15


@pytest.mark.parametrize(
    "description", ["rand-m0", "rand-m2", "rand-m9-mstd101", "rand-m10-inc1", "rand-m30-mmax30-inc1", "rand-m9-t3a"]
)
def test_no_operation_of_randaugment_fails(description):
    """At some magnitudes timm's keep no bit of colour, which Pillow refuses."""
    image = Image.fromarray(noise(16, 16, 3).numpy())
    for operation in augmented_view((16, 16), 1.0, False, description).after.transforms[1].lambd.ops:
        operation.prob = 1.0
        for key in range(20):
            with seeded(key):
                assert operation(image).size == (16, 16), operation


@pytest.mark.parametrize("description", ["nonsense", "", "augmix-m3", "rand-mfast1", "rand-m9.5"])
def test_a_description_that_timm_cannot_read_is_an_error(description):
    with pytest.raises((AssertionError, ValueError)):
        augmented_view((16, 16), 1.0, False, description)
