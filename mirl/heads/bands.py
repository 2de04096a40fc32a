"""Maps of scores that are computed a few rows at a time, because all of them would be gigabytes.

Symbols: n classes, h and w pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from mirl.models.patches import Size


@dataclass(frozen=True)
class Bands:
    """A map of scores [n, h, w] by its bands of rows.

    Attributes:
        size: (h, w).
        rows: (start, stop) to the rows [n, stop - start, w], which are not to be written into.
    """

    size: Size
    rows: Callable[[int, int], Tensor]

    @classmethod
    def of(cls, scores: Tensor) -> Self:
        """Return the bands of a tensor [n, h, w]."""
        height, width = scores.shape[-2:]
        return cls((height, width), lambda start, stop: scores[:, start:stop])

    def cropped(self, size: Size) -> Self:
        """Return the part of `size` at the left and the top."""
        return type(self)(size, lambda start, stop: self.rows(start, stop)[..., : size[1]])

    def mirrored(self) -> Self:
        """Return the map with left and right exchanged."""
        return type(self)(self.size, lambda start, stop: self.rows(start, stop).flip(-1))

    def resized(self, size: Size) -> Self:
        """Interpolate to `size` bilinearly, as F.interpolate does it with align_corners=False."""
        height = self.size[0]

        def rows(start: int, stop: int) -> Tensor:
            places = ((torch.arange(start, stop) + 0.5) * (height / size[0]) - 0.5).clamp(0, height - 1)
            above = places.long()
            below = (above + 1).clamp(max=height - 1)
            first = int(above[0])
            needed = self.rows(first, int(below[-1]) + 1)
            upper, lower = (needed[:, (which - first).to(needed.device)] for which in (above, below))
            mixed = torch.lerp(upper, lower, (places - above)[:, None].to(needed))
            return F.interpolate(mixed[None], (stop - start, size[1]), mode="bilinear", align_corners=False)[0]

        return type(self)(size, rows)


def stitched(scores: Tensor, places: Sequence[Size], window: Size, size: Size) -> Bands:
    """Return the means of windows, which overlap and together cover a map of `size`.

    Args:
        scores: [windows, n, ., .], of any resolution.
        places: (top, left) of each window in the map; window: height and width of each there.
    """
    windows = [Bands.of(each).resized(window) for each in scores]

    def rows(start: int, stop: int) -> Tensor:
        total = scores.new_zeros(scores.shape[1], stop - start, size[1])
        count = scores.new_zeros(stop - start, size[1])
        for each, (top, left) in zip(windows, places, strict=True):
            first, last = max(start, top), min(stop, top + window[0])
            if first < last:
                where = slice(first - start, last - start), slice(left, left + window[1])
                total[:, *where] += each.rows(first - top, last - top)
                count[where] += 1
        return total.div_(count)

    return windows[0] if len(windows) == 1 else Bands(size, rows)
