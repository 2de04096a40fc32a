"""Views of an image. Inputs and outputs are uint8 tensors [c, h, w]: normalisation happens on the device."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

Size = tuple[int, int]

EVALUATION_CROP = 224 / 256  # share of a scaled photograph's side that is seen
SMALL = 96  # pixels below which all of an image is


def training_view(size: Size, min_crop: float, flip: bool) -> v2.Transform:
    """Random resized crop of `min_crop` to 1 of the area (bicubic), then a horizontal flip half of the time.

    Paper: Sec. 4, pre-training setup; the numbers are MAE's.
    """
    crop = v2.RandomResizedCrop(size, scale=(min_crop, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(0.5 if flip else 0.0)])


def augmented_view(size: Size, min_crop: float, flip: bool, randaugment: str) -> v2.Transform:
    """As `training_view`, then timm's RandAugment by its description; "none" is none. RGB images only."""
    view = training_view(size, min_crop, flip)
    if randaugment == "none":
        return view
    mean = tuple(min(255, round(255 * value)) for value in channel_statistics(3)[0])
    # timm's own choices for what the description leaves open.
    options = {"translate_const": int(min(size) * 0.45), "img_mean": mean, "interpolation": Image.Resampling.BICUBIC}
    augment = rand_augment_transform(randaugment, options)
    for operation in augment.ops:
        if operation.name.startswith("Posterize"):
            operation.level_fn = partial(_bits_kept, operation.level_fn)
    return v2.Compose([view, v2.ToPILImage(), v2.Lambda(augment), v2.PILToTensor()])


def _bits_kept(timms: Callable[[float, Any], tuple[int]], level: float, options: Any) -> tuple[int]:
    """Return the bits of colour that timm keeps, or one where it keeps none, which Pillow has come to refuse."""
    return (max(1, timms(level, options)[0]),)


def fixed_view(image: Tensor, size: Size, share: float = 1.0) -> Tensor:
    """Scale `image` to cover `size` / `share`, keeping its aspect, and crop the centre of `size`."""
    height, width = image.shape[-2:]
    scale = max(size[0] / height, size[1] / width) / share
    covering = [max(size[0], round(height * scale)), max(size[1], round(width * scale))]
    resized = v2.functional.resize(image, covering, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return v2.functional.center_crop(resized, list(size))


def evaluation_view(image: Tensor, size: Size) -> Tensor:
    """Return what a classifier is judged on: the centre of a photograph, as MAE's, and all of a small image."""
    return fixed_view(image, size, EVALUATION_CROP if min(size) >= SMALL else 1.0)


def channel_statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation by which images in 0..1 are normalised: ImageNet's for RGB."""
    if channels == 3:
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return (0.5,) * channels, (0.25,) * channels


def normalise(images: Tensor, channels: int) -> Tensor:
    """Map uint8 `images` [b, c, h, w] to float32 of about zero mean and unit variance."""
    return standardise(images, *channel_statistics(channels))


def standardise(images: Tensor, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Tensor:
    """Map uint8 `images` [b, c, h, w] to float32, by each channel's mean and deviation of images in 0..1."""
    means, deviations = (images.new_tensor(s, dtype=torch.float32).view(-1, 1, 1) for s in (mean, deviation))
    return (images.float() / 255 - means) / deviations
