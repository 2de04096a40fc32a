"""The pixel objective: what masked patches should be, and how far the predictions are. Paper: Eq. (4), (6), (7)."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mirl.methods import Term

Target = Literal["normalised", "raw"]
VARIANCE_EPS = 1e-6


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [b, n, 1] of each patch's values (unbiased variance, as MAE's)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + VARIANCE_EPS).sqrt()


def pixel_target(patches: Tensor, target: Target) -> Tensor:
    """Return what predictions [b, m, p] are compared with: patches `normalised` by their own statistics, or `raw`.

    The paper writes raw patches in Eq. (4) and (6); the official code always normalises, and so do we by default.
    """
    if target == "raw":
        return patches
    mean, deviation = patch_statistics(patches)
    return (patches - mean) / deviation


def reconstruction_loss(predictions: Sequence[Tensor], target: Tensor, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """Compare each term's summed predictions with the target, in float32.

    Args:
        predictions: one [b, m, p] per decoder, shallow to deep; target: [b, m, p]; all on masked patches.

    Returns:
        The loss [b] of each image, and the unweighted losses [terms, b]. Their means over b are the batch's.

    Paper: Eq. (6) for one term (Eq. (4) if it has one decoder), Eq. (7) for their weighted sum.
    """
    target = target.float()
    losses = []
    for term in terms:
        reconstruction = sum(predictions[decoder - 1].float() for decoder in term.decoders)
        losses.append((reconstruction - target).square().mean(dim=(1, 2)))
    stacked = torch.stack(losses)
    weights = stacked.new_tensor([term.weight for term in terms])
    return (weights[:, None] * stacked).sum(0), stacked


def to_pixels(prediction: Tensor, patches: Tensor, target: Target) -> Tensor:
    """Undo `pixel_target` on `prediction` [b, m, p], with the statistics of the true `patches` [b, m, p]."""
    if target == "raw":
        return prediction
    mean, deviation = patch_statistics(patches)
    return prediction * deviation + mean
