"""Views of an image. Inputs and outputs are uint8 tensors [c, h, w]: normalisation happens on the device."""

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

Size = tuple[int, int]


def training_view(size: Size, min_crop: float, flip: bool) -> v2.Transform:
    """Random resized crop of `min_crop` to 1 of the area (bicubic), then a horizontal flip half of the time.

    Paper: Sec. 4, pre-training setup; the numbers are MAE's.
    """
    crop = v2.RandomResizedCrop(size, scale=(min_crop, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(0.5 if flip else 0.0)])


def fixed_view(image: Tensor, size: Size) -> Tensor:
    """Scale `image` to cover `size`, keeping its aspect, and crop the centre."""
    height, width = image.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    covering = [max(size[0], round(height * scale)), max(size[1], round(width * scale))]
    resized = v2.functional.resize(image, covering, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return v2.functional.center_crop(resized, list(size))


def channel_statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation by which images in 0..1 are normalised: ImageNet's for RGB."""
    if channels == 3:
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return (0.5,) * channels, (0.25,) * channels


def normalise(images: Tensor, channels: int) -> Tensor:
    """Map uint8 `images` [b, c, h, w] to float32 of about zero mean and unit variance."""
    mean, deviation = (images.new_tensor(s, dtype=torch.float32).view(-1, 1, 1) for s in channel_statistics(channels))
    return (images.float() / 255 - mean) / deviation
