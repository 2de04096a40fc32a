"""Coarse and fine parts of an image, as fixed targets in place of learnt ones. Paper: Sec. 4.2, Table 2e.

The paper separates them with a Laplacian of Gaussian. Its scale-normalised response -s^2 LoG_s, taken literally as the
fine part, passes a band of frequencies: what is left as "coarse" keeps the highest. By default, therefore, the coarse
part is the image blurred by a Gaussian, and the fine part what that lost: the responses of all finer scales together.
"""

import math

import torch
from torch import Tensor

from mirl.methods import Part, Separation, Target
from mirl.objectives.pixels import patch_statistics

TRUNCATE = 4  # sigmas at which a kernel ends


def coarse_part(images: Tensor, sigma: float, separation: Separation = "gaussian") -> Tensor:
    """Return the coarse part of `images` [b, c, h, w], in float32; the rest is the fine part.

    Args:
        sigma: of the Gaussian, in pixels.
        separation: `gaussian`, G_s * x; or `log`, x + s^2 LoG_s * x, the paper's words taken literally.

    Beyond its borders an image is mirrored, as often as it takes.
    """
    with torch.autocast(images.device.type, enabled=False):  # which would multiply matrices in half precision
        images = images.float()
        blur_rows, blur_columns = (_filter(size, sigma, 0, images.device) for size in images.shape[-2:])
        if separation == "gaussian":
            return blur_rows @ images @ blur_columns.T
        bend_rows, bend_columns = (_filter(size, sigma, 2, images.device) for size in images.shape[-2:])
        laplacian = bend_rows @ images @ blur_columns.T + blur_rows @ images @ bend_columns.T
        return images + sigma**2 * laplacian


def part_targets(patches: Tensor, coarse: Tensor, target: Target) -> dict[Part, Tensor]:
    """Return what predictions of the coarse and of the fine part are compared with: together, the image's target.

    Args:
        patches, coarse: [b, m, p] of the image and of its coarse part. Both parts are normalised by the statistics of
            the image's patch; the mean goes to the coarse one.
    """
    if target == "raw":
        return {"coarse": coarse, "fine": patches - coarse}
    mean, deviation = patch_statistics(patches)
    return {"coarse": (coarse - mean) / deviation, "fine": (patches - coarse) / deviation}


def _filter(size: int, sigma: float, order: int, device: torch.device) -> Tensor:
    """Return the matrix [size, size] that filters a line of pixels with a Gaussian's derivative of `order` 0 or 2.

    A matrix serves lines of any length, also those shorter than the kernel.
    """
    radius = math.ceil(TRUNCATE * sigma)
    offsets = torch.arange(-radius, radius + 1, device=device)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    weights /= weights.sum()
    if order == 2:  # with the variance of the sampled Gaussian, so that a flat image has no fine part
        weights *= (offsets**2 - (weights * offsets**2).sum()) / sigma**4
    period = max(1, 2 * (size - 1))  # a mirrored line repeats itself; its border pixel is not doubled
    read = (torch.arange(size, device=device)[:, None] + offsets).remainder(period)
    read = torch.minimum(read, period - read)
    matrix = torch.zeros(size, size, dtype=weights.dtype, device=device)
    return matrix.scatter_add_(1, read, weights.expand(size, -1)).float()
