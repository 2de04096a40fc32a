"""Random views of an image and its label map for training segmenters. They are judged on images as they are.

A view is mmseg's chain for ADE20K: resize, crop, flip, photometric noise, padding. The part that the crop shows is cut
out first and alone resized, images antialiased, labels by the nearest pixel. Symbols: c channels, h and w image height
and width; all sizes in pixels.
"""

from functools import partial

import torch
import torch.nn.functional
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from mirl.data.resizing import nearest, resized_size
from mirl.data.semantic import IGNORE, View

CROPS = 10  # that are drawn to find one in which no class covers too much
BRIGHTNESS = 32.0  # most that is added, of 255
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 0.1  # of a turn: mmseg's 18 are steps of which OpenCV's circle has 180


def crop_view(
    crop_size: int,
    image_size: int,
    *,
    longest: float = 4.0,
    scales: tuple[float, float] = (0.5, 2.0),
    largest_share: float = 0.75,
    flip: bool,
    photometric: bool,
) -> View:
    """Scale at random, cut out a square of `crop_size`, flip half of the time, and change brightness and colours.

    What is smaller than the square is padded at the right and the bottom, images with 0, label maps with IGNORE.

    Args:
        image_size: shorter side at evaluation; in training `scales` times that.
        longest: most that the longer side may have, in units of the shorter one's.
        largest_share: most of a square's labelled pixels that may be of one class, if one of ten crops allows it.
        photometric: change brightness, contrast, saturation and hue.
    """
    return partial(
        _crop_view,
        crop_size=crop_size,
        image_size=image_size,
        longest=longest,
        scales=scales,
        largest_share=largest_share,
        flip=flip,
        photometric=photometric,
    )


def _crop_view(
    image: Tensor,
    labels: Tensor,
    *,
    crop_size: int,
    image_size: int,
    longest: float,
    scales: tuple[float, float],
    largest_share: float,
    flip: bool,
    photometric: bool,
) -> tuple[Tensor, Tensor]:
    shorter = _uniform(*scales) * image_size
    image, labels = _random_crop(image, labels, shorter, shorter * longest, crop_size, largest_share)
    if flip and _half_of_the_time():
        image, labels = F.horizontal_flip(image), F.horizontal_flip(labels)
    if photometric:
        image = distorted(image)
    return _padded(image, crop_size, 0), _padded(labels, crop_size, IGNORE)


def _random_crop(
    image: Tensor, labels: Tensor, shorter: float, largest: float, crop_size: int, largest_share: float
) -> tuple[Tensor, Tensor]:
    """Return a crop of at most `crop_size` of the image and label map resized to `shorter`, in whole source pixels."""
    height, width = labels.shape
    sides = list(zip((height, width), resized_size(height, width, shorter, largest), strict=True))
    rows, columns = (min(new, crop_size) for _, new in sides)
    # The part of the source that the crop shows.
    high, wide = (min(old, max(1, round(crop_size * old / new))) for old, new in sides)
    for _ in range(CROPS):
        top, left = int(torch.randint(height - high + 1, ())), int(torch.randint(width - wide + 1, ()))
        cropped = nearest(labels[top : top + high, left : left + wide], (rows, columns))
        if (high, wide) == (height, width) or _share_of_largest(cropped) <= largest_share:
            break
    return F.resize(F.crop(image, top, left, high, wide), [rows, columns], antialias=True), cropped


def _share_of_largest(labels: Tensor) -> float:
    """Return the share of the labelled pixels that the most frequent class has, 1 if there are none."""
    counts = labels.flatten().bincount(minlength=IGNORE + 1)[:IGNORE]
    return float(counts.max() / counts.sum().clamp(min=1)) if counts.any() else 1.0


def distorted(image: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue of a uint8 image [c, h, w], each half of the time.

    Contrast comes before or after the colours, which only images of 3 channels have.
    """
    contrast_first = _half_of_the_time()
    if _half_of_the_time():
        image = _linear(image, 1.0, _uniform(-BRIGHTNESS, BRIGHTNESS))
    if contrast_first:
        image = _contrasted(image)
    if len(image) == 3:
        if _half_of_the_time():
            image = F.adjust_saturation(image, _uniform(*SATURATION))
        if _half_of_the_time():
            image = F.adjust_hue(image, _uniform(-HUE, HUE))
    return image if contrast_first else _contrasted(image)


def _contrasted(image: Tensor) -> Tensor:
    """Multiply values half of the time: mmseg's contrast, which torchvision calls brightness."""
    return _linear(image, _uniform(*CONTRAST), 0.0) if _half_of_the_time() else image


def _linear(image: Tensor, factor: float, shift: float) -> Tensor:
    return (image * factor + shift).clamp_(0, 255).round_().to(torch.uint8)


def _padded(tensor: Tensor, size: int, value: int) -> Tensor:
    height, width = tensor.shape[-2:]
    return torch.nn.functional.pad(tensor, (0, size - width, 0, size - height), value=value)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _half_of_the_time() -> bool:
    return bool(torch.rand(()) < 0.5)
