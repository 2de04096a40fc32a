"""Coarse and fine parts equal SciPy's filters, add up to the image, and differ in smoothness as they should."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from mirl.objectives.frequency import coarse_part, part_targets
from mirl.objectives.pixels import pixel_target


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def natural(size=64):
    """Return images [2, 3, size, size] whose amplitudes fall as 1/f, as photographs' do."""
    frequency = torch.fft.fftfreq(size)[:, None].hypot(torch.fft.fftfreq(size)).clamp(min=1 / size)
    return torch.fft.ifft2(torch.fft.fft2(noise(2, 3, size, size)) / frequency).real


def roughness(images):
    """Return how strong an image's highest frequencies are: the deviation of its pixels from their neighbours' mean."""
    around = sum(images.roll(shift, axis) for shift in (-1, 1) for axis in (-1, -2)) / 4
    return float((images - around).std())


@pytest.mark.parametrize("size", [(24, 40), (5, 9), (1, 3)], ids=str)
@pytest.mark.parametrize("sigma", [0.5, 1.3, 2.0])
def test_it_is_scipys_filter_on_images_of_any_size(size, sigma):
    images = noise(2, 3, *size)
    options = {"mode": "mirror", "radius": math.ceil(4 * sigma)}
    planes = images.flatten(0, 1).double().numpy()
    blurred = np.stack([ndimage.gaussian_filter(plane, sigma, **options) for plane in planes])
    laplacian = np.stack([ndimage.gaussian_laplace(plane, sigma, **options) for plane in planes])
    # SciPy's sampled kernel does not add up to zero, by much below a sigma of 1; ours does.
    laplacian -= ndimage.gaussian_laplace(np.ones(size), sigma, **options)[0, 0] * blurred
    for separation, expected in (("gaussian", blurred), ("log", planes + sigma**2 * laplacian)):
        coarse = coarse_part(images, sigma, separation)
        assert coarse.dtype == torch.float32
        np.testing.assert_allclose(coarse.flatten(0, 1).numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("target", ["normalised", "raw"])
def test_the_parts_add_up_to_the_images_target(target):
    patches = noise(2, 5, 48) * 3 + 1
    parts = part_targets(patches, noise(2, 5, 48), target)
    torch.testing.assert_close(parts["coarse"] + parts["fine"], pixel_target(patches, target), atol=1e-5, rtol=1e-5)


def test_the_coarse_part_has_the_mean_and_no_unit_of_its_own():
    """Half the contrast in a patch is half the target: the deviation is the whole image's."""
    patches = noise(2, 5, 48) + 3
    mean = patches.mean(dim=-1, keepdim=True)
    parts = part_targets(patches, mean + (patches - mean) / 2, "normalised")
    torch.testing.assert_close(parts["coarse"], parts["fine"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(parts["coarse"].std(dim=-1), torch.full((2, 5), 0.5), atol=1e-4, rtol=0)


def test_a_flat_image_is_all_coarse():
    flat = torch.full((1, 3, 7, 9), 0.7)
    for separation in ("gaussian", "log"):
        torch.testing.assert_close(coarse_part(flat, 0.5, separation), flat)


def test_coarse_is_smooth_unless_the_paper_is_taken_literally():
    """A Laplacian of Gaussian passes a band: without it, an image keeps its highest frequencies."""
    images = natural()
    blurred, literal = coarse_part(images, 2.0), coarse_part(images, 2.0, "log")
    assert roughness(blurred) < 0.1 * roughness(images)
    assert roughness(images - blurred) > 0.9 * roughness(images)
    assert roughness(literal) > 0.9 * roughness(images)
    # At half a pixel its band is the highest there is.
    assert roughness(coarse_part(images, 0.5, "log")) < 0.7 * roughness(images)


def test_half_precision_around_it_changes_nothing():
    images = noise(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = coarse_part(images, 2.0)
    assert torch.equal(inside, coarse_part(images, 2.0))
