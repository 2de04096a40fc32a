"""Images as patches, patches as images, and the fixed positions of patches.

Symbols: b batch, c channels, h and w pixels, n patches = (h / ph) * (w / pw), p = ph * pw * c values of one patch.
A patch is flattened as (row, column, channel), the order of the official code and of MAE.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Size = tuple[int, int]


def pair(size: int | Sequence[int]) -> Size:
    """Read a size given as one number or as (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def grid_size(image_size: Size, patch_size: Size) -> Size:
    """Return the number of patches along (height, width)."""
    return image_size[0] // patch_size[0], image_size[1] // patch_size[1]


def patchify(images: Tensor, patch_size: Size) -> Tensor:
    """Cut `images` [b, c, h, w] into patches [b, n, p], row by row. Both sides must be multiples of the patch's."""
    b, c, h, w = images.shape
    ph, pw = patch_size
    patches = images.reshape(b, c, h // ph, ph, w // pw, pw)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // ph) * (w // pw), ph * pw * c)


def unpatchify(patches: Tensor, image_size: Size, patch_size: Size) -> Tensor:
    """Put `patches` [b, n, p] together to images [b, c, h, w]; the inverse of `patchify`."""
    (gh, gw), (ph, pw) = grid_size(image_size, patch_size), patch_size
    cells = patches.reshape(patches.shape[0], gh, gw, ph, pw, -1)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, gh * ph, gw * pw)


def gather(items: Tensor, indices: Tensor) -> Tensor:
    """Pick rows of `items` [b, n, d] by `indices` [b, k], giving [b, k, d]."""
    return items.gather(1, indices.unsqueeze(-1).expand(-1, -1, items.shape[-1]))


def sincos_positions(width: int, grid: Size) -> Tensor:
    """Return fixed 2-d sine-cosine positions [n, width]: the first half encodes the column, the second the row.

    Raises:
        ValueError: if `width` is not a multiple of 4 (sine and cosine for two axes).
    """
    if width % 4:
        raise ValueError(f"width {width} cannot hold 2-d sine-cosine positions; choose a multiple of 4")
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float64), torch.arange(grid[1], dtype=torch.float64), indexing="ij"
    )
    angles = [axis.flatten()[:, None] * frequencies for axis in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()
