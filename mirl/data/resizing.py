"""Sizes that images are resized to, and how maps of whole numbers are resized with them."""

import numpy as np
import torch
from torch import Tensor

from mirl.models.patches import Size


def resized_size(height: int, width: int, shorter: float, largest: float) -> Size:
    """Return the size of an image whose shorter side becomes `shorter`, or whose longer `largest` if that is less."""
    scale = min(shorter / min(height, width), largest / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def nearest(maps: Tensor, size: Size) -> Tensor:
    """Resize masks or labels [..., h, w] by the nearest pixel.

    In NumPy, which takes a third of the time of torch's interpolation or indexing.
    """
    sides = zip(maps.shape[-2:], size, strict=True)
    rows, columns = (((np.arange(new) + 0.5) * (old / new)).astype(np.int64).clip(max=old - 1) for old, new in sides)
    return torch.from_numpy(maps.numpy().take(columns, axis=-1).take(rows, axis=-2))
