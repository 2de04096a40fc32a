"""The feature objective: a teacher's tokens of the masked patches. Paper: Sec. 3.1 and Table 2a.

The paper leaves its definition to an appendix that is not published; this one follows BootMAE, whose settings the
official code carries: the teacher sees the whole image, and its target is what its last block gives, before the final
norm. Three things differ: a second layer of each pixel decoder predicts the tokens, not a decoder of their own; the
weight grows over the warm-up (40 of 300 epochs), not over 25 % of the epochs; the average's decay begins at
(1 + t)/(10 + t).
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from mirl.methods import Term
from mirl.objectives.pixels import total, weighted

NORM_EPS = 1e-6


def standardise_tokens(tokens: Tensor) -> Tensor:
    """Give each token of `tokens` [..., d] mean 0 and variance 1 over its channels, in float32."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:], eps=NORM_EPS)


def feature_loss(predictions: Sequence[Tensor], tokens: Tensor, terms: Sequence[Term]) -> Tensor:
    """Compare each term's summed prediction of features with the teacher's tokens, both standardised.

    Every term predicts the whole token, also one whose pixels are a part of the image: tokens have no coarse part.

    The mean square of the difference of two standardised vectors is 2 (1 - their correlation), so that a loss by
    cosines would be the same one.

    Args:
        predictions: one [b, m, d] per decoder, shallow to deep, on masked patches.
        tokens: [b, m, d], the teacher's of these patches, before its final norm.

    Returns:
        The weighted loss [b] of each image, in float32.
    """
    target = standardise_tokens(tokens)
    losses = [(target - standardise_tokens(total(predictions, term))).square().mean(dim=(1, 2)) for term in terms]
    return weighted(losses, terms)
