"""Which patches the encoder sees. `visible` and `masked` are index tensors that partition the n patches."""

import math

from torch import Tensor

from mirl.errors import UserError


def visible_count(patches: int, mask_ratio: float) -> int:
    """Return how many of `patches` stay visible.

    Raises:
        UserError: if no patch, or every patch, would be visible, or there is only one.
    """
    visible = int(patches * (1 - mask_ratio) + 1e-9)  # 10 * (1 - 0.9) is 0.99999...
    if patches < 2:
        raise UserError("an image of one patch leaves nothing to mask; choose a smaller --patch_size")
    if not 0 < visible < patches:
        digits = len(str(patches)) + 1
        low = math.ceil(10**digits / patches) / 10**digits  # of decimals rounded inwards: both ends are allowed
        raise UserError(
            f"mask ratio {mask_ratio} leaves {visible} of {patches} patches visible; "
            f"choose {low:.{digits}f} to {1 - low:.{digits}f}"
        )
    return visible


def split(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """Order patches by `noise` [..., n]; the lowest stay visible. Returns (visible [..., v], masked [..., n - v])."""
    order = noise.argsort(dim=-1)
    visible = visible_count(noise.shape[-1], mask_ratio)
    return order[..., :visible], order[..., visible:]
