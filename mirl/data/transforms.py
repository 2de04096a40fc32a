"""Views of an image. Inputs and outputs are uint8 tensors [c, h, w]: normalisation happens on the device.

Random views also take pictures that are not decoded yet, and fixed views, on which figures depend, all pixels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import resize_image

from mirl.data.pictures import Box, DecodedPicture, Picture
from mirl.models.patches import Size

EVALUATION_CROP = 224 / 256  # share of a scaled photograph's side that is seen
SMALL = 96  # pixels below which all of an image is


class RandomCrop:
    """Random resized crop (bicubic) of an image or a picture, then a horizontal flip half of the time, then `after`.

    The box is torchvision's; of a picture no more is decoded than the box needs. Draws from torch's generator alone,
    unless `after` does otherwise.
    """

    def __init__(
        self, size: Size, min_crop: float, flip: bool, after: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.size, self.share_flipped, self.after = size, 0.5 if flip else 0.0, after
        self._boxes = v2.RandomResizedCrop(size, scale=(min_crop, 1.0))

    def __call__(self, image: Tensor | Picture) -> Tensor:
        """Return uint8 [c, *size], or raise `BadImage`."""
        picture = DecodedPicture(image) if isinstance(image, Tensor) else image
        box = self.box(picture.size)
        flipped = torch.rand(1).item() < self.share_flipped
        pixels = picture.region(box, self.size)
        view = resize(pixels, self.size)
        view = view.flip(-1) if flipped else view
        return self.after(view) if self.after else view

    def box(self, size: Size) -> Box:
        """Draw what of an image of `size` is seen."""
        drawn = self._boxes.make_params([torch.empty((1, *size), device="meta")])
        return drawn["top"], drawn["left"], drawn["height"], drawn["width"]


def training_view(size: Size, min_crop: float, flip: bool) -> RandomCrop:
    """Random resized crop of `min_crop` to 1 of the area (bicubic), then a horizontal flip half of the time.

    Paper: Sec. 4, pre-training setup; the numbers are MAE's.
    """
    return RandomCrop(size, min_crop, flip)


def augmented_view(size: Size, min_crop: float, flip: bool, randaugment: str) -> RandomCrop:
    """As `training_view`, then timm's RandAugment by its description; "none" is none. RGB images only."""
    if randaugment == "none":
        return training_view(size, min_crop, flip)
    mean = tuple(min(255, round(255 * value)) for value in channel_statistics(3)[0])
    # timm's own choices for what the description leaves open.
    options = {"translate_const": int(min(size) * 0.45), "img_mean": mean, "interpolation": Image.Resampling.BICUBIC}
    augment = rand_augment_transform(randaugment, options)
    for operation in augment.ops:
        if operation.name.startswith("Posterize"):
            operation.level_fn = partial(_bits_kept, operation.level_fn)
    return RandomCrop(size, min_crop, flip, v2.Compose([v2.ToPILImage(), v2.Lambda(augment), v2.PILToTensor()]))


def resize(image: Tensor, size: Size) -> Tensor:
    """Resize uint8 [c, h, w] to [c, *size], bicubic and without aliasing."""
    # The kernel behind v2.functional.resize, whose dispatch takes a sixth of the time.
    return resize_image(image, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)


def _bits_kept(timms: Callable[[float, Any], tuple[int]], level: float, options: Any) -> tuple[int]:
    """Return the bits of colour that timm keeps, or one where it keeps none, which Pillow has come to refuse."""
    return (max(1, timms(level, options)[0]),)


def fixed_view(image: Tensor, size: Size, share: float = 1.0) -> Tensor:
    """Scale `image` to cover `size` / `share`, keeping its aspect, and crop the centre of `size`."""
    height, width = image.shape[-2:]
    scale = max(size[0] / height, size[1] / width) / share
    covering = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    return v2.functional.center_crop(resize(image, covering), list(size))


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
    # In one new tensor: on a CPU the time is that of memory. By numbers: a GPU would be waited for to copy tensors.
    pixels = images.to(torch.float32, copy=True).div_(255)
    for channel, centre, scale in zip(pixels.unbind(-3), mean, deviation, strict=True):
        channel.sub_(centre).div_(scale)
    return pixels
