"""The pixel objective: what masked patches should be, and how far the predictions are. Paper: Eq. (4), (6), (7)."""

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from mirl.methods import Part, Target, Term

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


def total(predictions: Sequence[Tensor], term: Term) -> Tensor:
    """Add up what the term's decoders predict, in float32; no gradient passes through its detached ones."""
    members = (predictions[d - 1].detach() if d in term.detached else predictions[d - 1] for d in term.decoders)
    return reduce(torch.add, (member.float() for member in members))


def reconstruction_loss(
    predictions: Sequence[Tensor], targets: Mapping[Part, Tensor], terms: Sequence[Term]
) -> tuple[Tensor, Tensor]:
    """Compare each term's summed predictions with its target, in float32.

    Args:
        predictions: one [b, m, p] per decoder, shallow to deep, on masked patches.
        targets: [b, m, p] for each part of the image that a term asks for.

    Returns:
        The loss [b] of each image, and the unweighted losses [terms, b]. Their means over b are the batch's.

    Paper: Eq. (6) for one term (Eq. (4) if it has one decoder), Eq. (7) for their weighted sum.
    """
    losses = [
        F.mse_loss(total(predictions, term), targets[term.target].float(), reduction="none").mean(dim=(1, 2))
        for term in terms
    ]
    return weighted(losses, terms), torch.stack(losses)


def weighted(losses: Sequence[Tensor], terms: Sequence[Term]) -> Tensor:
    """Add up the losses [b] of `terms`, each times its weight. Paper: Eq. (7)."""
    # By numbers, not by a tensor of them: a GPU would have to be waited for until it has taken the copy.
    return torch.stack([term.weight * loss for term, loss in zip(terms, losses, strict=True)]).sum(0)


def to_pixels(prediction: Tensor, patches: Tensor, target: Target) -> Tensor:
    """Undo `pixel_target` on `prediction` [b, m, p], with the statistics of the true `patches` [b, m, p]."""
    if target == "raw":
        return prediction
    mean, deviation = patch_statistics(patches)
    return prediction * deviation + mean
