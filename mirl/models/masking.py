"""Which patches the encoder sees. `visible` and `masked` are index tensors that partition the n patches."""

from torch import Tensor

from mirl.errors import UserError


def visible_count(patches: int, mask_ratio: float) -> int:
    """Return how many of `patches` stay visible.

    Raises:
        UserError: if no patch, or every patch, would be visible.
    """
    visible = int(patches * (1 - mask_ratio) + 1e-9)  # 10 * (1 - 0.9) is 0.99999...
    if not 0 < visible < patches:
        low, high = 1 / patches, 1 - 1 / patches
        raise UserError(
            f"mask ratio {mask_ratio} leaves {visible} of {patches} patches visible; choose {low:.3f} to {high:.3f}"
        )
    return visible


def split(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """Order patches by `noise` [..., n]; the lowest stay visible. Returns (visible [..., v], masked [..., n - v])."""
    order = noise.argsort(dim=-1)
    visible = visible_count(noise.shape[-1], mask_ratio)
    return order[..., :visible], order[..., visible:]
