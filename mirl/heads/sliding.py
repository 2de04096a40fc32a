"""Label maps of images of any size by a segmenter: in sliding windows or whole, and at several scales.

An image is resized, its scores are computed at a quarter of a patch's resolution, and label maps are found at the
image's own, a band of rows at a time. Symbols: n classes, c channels, h and w pixels.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from mirl.data.resizing import resized_size
from mirl.errors import UserError
from mirl.heads.bands import Bands, stitched
from mirl.heads.upernet import Segmenter

LONGEST = 4  # the longer side at most, in shorter ones; mmseg's 2048 by 512
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of multi-scale tests, each also mirrored
BAND = 2**24  # scores at the image's resolution that exist at a time


@dataclass(frozen=True)
class Inference:
    """How a segmenter looks at an image.

    Attributes:
        mode: "slide" windows over it and average their scores, or take it "whole".
        image_size: pixels that the shorter side is resized to; the longer has four times as many at most.
        crop_size: pixels of a window's side; stride: from one window to the next, at most as many.
        multi_scale: average the probabilities of six sizes and their mirror images.
        batch: windows that are computed at once.
    """

    mode: Literal["slide", "whole"] = "slide"
    image_size: int = 512
    crop_size: int = 512
    stride: int = 341
    multi_scale: bool = False
    batch: int = 4


def check(segmenter: Segmenter, inference: Inference) -> None:
    """Raise UserError if the segmenter cannot look at images in this way."""
    multiple, crop, fixed = segmenter.multiple, inference.crop_size, segmenter.fixed_size
    if crop < multiple or crop % multiple:
        near = max(1, round(crop / multiple)) * multiple
        raise UserError(f"--crop_size {crop} is no multiple of {multiple}, two patches' sides; give --crop_size {near}")
    if not 1 <= inference.stride <= crop:
        raise UserError(
            f"--stride {inference.stride} would leave gaps between windows; give 1 to {crop}, the --crop_size"
        )
    if inference.image_size < 1:
        raise UserError(f"--image_size {inference.image_size} is not allowed; give 1 or more")
    if fixed and inference.mode == "whole":
        raise UserError(
            f"relative positions are those of {fixed[0]}x{fixed[1]} px, not of whole images; leave --inference "
            "whole out: windows take smaller images whole"
        )
    if fixed and fixed != (crop, crop):
        raise UserError(f"relative positions are those of {fixed[0]}x{fixed[1]} px; give --crop_size {fixed[0]}")


@torch.no_grad()
def segment(segmenter: Segmenter, image: Tensor, inference: Inference) -> Tensor:
    """Return the most likely class of each pixel.

    Args:
        segmenter: in evaluation mode. image: uint8 [c, h, w]. inference: one that `check` lets pass.

    Returns:
        uint8 [h, w], on the image's device.
    """
    height, width = image.shape[-2:]
    labels = torch.empty(height, width, dtype=torch.uint8, device=image.device)
    for start, scores in scores_in_bands(segmenter, image, inference):
        labels[start : start + scores.shape[1]] = scores.max(0).indices.to(torch.uint8)  # faster than argmax
    return labels


@torch.no_grad()
def scores_in_bands(segmenter: Segmenter, image: Tensor, inference: Inference) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, scores [n, rows, w]) of `image` [c, h, w] from top to bottom, on the segmenter's device.

    Scores are logits; with `multi_scale` the sums of the probabilities of all looks.
    """
    assert not segmenter.training
    height, width = size = image.shape[-2], image.shape[-1]
    if inference.multi_scale:
        scales = [ratio * inference.image_size for ratio in SCALES]
        looks = [_look(segmenter, image, side, inference) for side in scales]
        looks += [_look(segmenter, image.flip(-1), side, inference).mirrored() for side in scales]
    else:
        looks = [_look(segmenter, image, inference.image_size, inference)]
    looks = [look.resized(size) for look in looks]
    step = max(1, BAND // (segmenter.classes * width))
    for start in range(0, height, step):
        stop = min(start + step, height)
        yield start, _summed_probabilities(looks, start, stop) if inference.multi_scale else looks[0].rows(start, stop)


def _look(segmenter: Segmenter, image: Tensor, shorter: float, inference: Inference) -> Bands:
    """Return the scores of `image` [c, h, w] after its shorter side is resized to so many pixels, at that size.

    Sides shorter than a window, or of a whole image, are padded with black at the right and the bottom, as training's
    crops are.
    """
    height, width = resized_size(image.shape[-2], image.shape[-1], shorter, LONGEST * shorter)
    size = height, max(2, width)  # torch 2.15 fails to resize to a width of one pixel, or does it wrongly
    if image.shape[-2:] != size:
        image = transforms.resize(image, list(size), antialias=True)
    least = segmenter.fixed_size or (1, 1)
    bottom, right = (_padded(side, low, segmenter, inference) for side, low in zip(size, least, strict=True))
    padded = bottom, right
    image = F.pad(image.to(segmenter.mean.device), (0, right - size[1], 0, bottom - size[0]))
    crop = max(padded) if inference.mode == "whole" else inference.crop_size
    height, width = window = min(crop, padded[0]), min(crop, padded[1])
    tops, lefts = _starts(padded[0], height, inference.stride), _starts(padded[1], width, inference.stride)
    places = [(top, left) for top in tops for left in lefts]
    parts = torch.stack([image[:, top : top + height, left : left + width] for top, left in places])
    scores = torch.cat([segmenter(some.float() / 255).float() for some in parts.split(inference.batch)])
    return stitched(scores, places, window, padded).cropped(size)


def _padded(side: int, least: int, segmenter: Segmenter, inference: Inference) -> int:
    """Return the length to which a side is padded: none where windows of `crop_size`, a multiple, cover it."""
    if inference.mode == "slide" and side >= inference.crop_size:
        return side
    return max(least, math.ceil(side / segmenter.multiple) * segmenter.multiple)


def _starts(side: int, window: int, stride: int) -> list[int]:
    """Return where windows begin along a side; the last ends with it."""
    return [*range(0, side - window, stride), side - window]


def _summed_probabilities(looks: Sequence[Bands], start: int, stop: int) -> Tensor:
    total = looks[0].rows(start, stop).softmax(0)
    for look in looks[1:]:
        total += look.rows(start, stop).softmax(0)
    return total
