"""Small images to write into files, and what reading them gives."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mirl.data.decode import BadImage, read_image

H, W = 13, 17


def noise(*shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)


def photo(mode="RGB"):
    """A smooth image, so that lossy formats stay close to it."""
    y, x = np.mgrid[0:H, 0:W] * 12
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8)).convert(mode)


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def reason(path, channels=3):
    with pytest.raises(BadImage) as caught:
        read_image(path, channels)
    assert "\n" not in caught.value.reason
    return caught.value.reason


def hwc(tensor):
    assert tensor.dtype == torch.uint8
    return tensor.permute(1, 2, 0).numpy()
