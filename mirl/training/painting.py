"""Label maps as pictures: every class in its colour over the grey image, and where a prediction is wrong.

A label map is uint8 [h, w]: class i, drawn in `colour(i + 1)`, or 255 for pixels without a label. Symbols: c channels,
h and w height and width.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mirl.data.semantic import IGNORE
from mirl.training.overlays import READABLE, Colour, colour

OPACITY = 0.68  # of a class's colour over the grey image
DARKEST, BRIGHTEST = 50, 215  # of that image: colours stay like those of the legend
EDGE = 0.45  # brightness that is left where classes meet
HATCH: tuple[Colour, Colour] = ((28, 28, 28), (64, 64, 64))
STRIPE = 8  # pixels of hatching from stripe to stripe
NAMED = 48  # most classes of a legend
WRONG: Colour = (225, 30, 30)
FAINT = 0.35  # contrast that is left of an image under its errors


def palette() -> np.ndarray:
    """Return the colours uint8 [256, 3] of labels; that of pixels without a label is dark."""
    return np.array([colour(label + 1) for label in range(IGNORE)] + [HATCH[0]], dtype=np.uint8)


def fitted(image: Tensor, *maps: Tensor, longest: int | None = None) -> tuple[Tensor, ...]:
    """Enlarge a small image by a whole number, or reduce one with a side above `longest`, and its label maps with it.

    Args:
        image: uint8 [c, h, w]; other than three channels are shown as in other pictures, the first three or grey.
        maps: uint8 [h, w] each.

    Returns:
        The image as uint8 [3, h', w'], and the maps, uint8 [h', w'].
    """
    shown = image.cpu()[:3] if len(image) >= 3 else image.cpu()[:1].expand(3, -1, -1)
    kept = [one.cpu() for one in maps]
    height, width = shown.shape[-2:]
    side = max(height, width)
    if longest is not None and side > longest:
        size = [max(1, round(length * longest / side)) for length in (height, width)]
        pixels = F.interpolate(shown[None], size, mode="bilinear", antialias=True)[0]
        kept = [F.interpolate(one[None, None], size, mode="nearest-exact")[0, 0] for one in kept]
        return pixels, *kept
    factor = max(1, -(-READABLE // side))
    return tuple(one.repeat_interleave(factor, -2).repeat_interleave(factor, -1) for one in (shown, *kept))


def painted(image: Tensor, labels: Tensor) -> Tensor:
    """Paint each class in its colour over an image of the same size, uint8 [3, h, w]; unlabelled pixels are hatched."""
    colours = torch.from_numpy(palette()[labels.numpy()]).permute(2, 0, 1).float()
    behind = DARKEST + (BRIGHTEST - DARKEST) / 255 * _grey(image)
    picture = OPACITY * colours + (1 - OPACITY) * behind
    picture = torch.where(_edges(labels), EDGE * picture, picture)
    return torch.where(labels == IGNORE, _hatching(labels), picture).round().byte()


def errors(image: Tensor, said: Tensor, truth: Tensor) -> Tensor:
    """Draw wrong pixels red, right ones as a faint grey image, and unlabelled ones black; uint8 [3, h, w]."""
    grey = 255 * (1 - FAINT) + FAINT * _grey(image)
    red = torch.tensor(WRONG, dtype=torch.float32).view(3, 1, 1) * (0.8 + 0.2 * _grey(image) / 255)
    picture = torch.where(said != truth, red, grey)
    return torch.where(truth == IGNORE, 0.0, picture).round().byte()


def legend(maps: Sequence[Tensor], names: Sequence[str]) -> list[tuple[str, Colour]]:
    """Return names and colours of what is in some label maps: classes, the largest first, then pixels without a label.

    Args:
        names: of the classes.
    """
    counts = torch.stack([torch.bincount(one.flatten(), minlength=IGNORE + 1) for one in maps]).sum(dim=0)
    order = counts[:IGNORE].argsort(descending=True, stable=True).tolist()
    found = [(names[label], colour(label + 1)) for label in order if counts[label]][:NAMED]
    return [*found, ("no label", HATCH[0])] if counts[IGNORE] else found


def _grey(image: Tensor) -> Tensor:
    """Return how bright an image is, float [1, h, w] in 0..255."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return (image * weights).sum(dim=0, keepdim=True)


def _edges(labels: Tensor) -> Tensor:
    """Tell, bool [h, w], which pixels differ from the one above or to the left."""
    found = torch.zeros(labels.shape, dtype=torch.bool)
    found[1:] |= labels[1:] != labels[:-1]
    found[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    return found


def _hatching(labels: Tensor) -> Tensor:
    """Return a picture of diagonal stripes as large as a label map, float [3, h, w]."""
    height, width = labels.shape
    diagonal = torch.arange(height)[:, None] + torch.arange(width)
    dark, light = (torch.tensor(tone, dtype=torch.float32).view(3, 1, 1) for tone in HATCH)
    return torch.where(diagonal % STRIPE < STRIPE // 4, light, dark)
