"""Masks as run lengths, the form in which COCO's tools keep and compare them.

A mask is read column by column: so many zeros, then so many ones, and so on. `counts` are these numbers, compressed to
ASCII characters of 6 bits: 5 of the number, and one that says whether more follow. From the fourth on it is the
difference to the number before the last that is written. Polygons are rasterised as COCO's tools do.
Symbols: h and w image height and width.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mirl.errors import UserError

FIRST_CHARACTER, CHARACTERS = 48, 64
MORE, SIGN, BITS = 32, 16, 5
LONGEST = 6  # characters of a number: 30 bits are more pixels than an image may have
REACH = 4  # how many image sides a polygon's corners may lie outside; rasterising takes time and memory for each pixel


class Malformed(ValueError):
    """What is wrong with a segmentation."""

    def __init__(self, reason: str = "segmentation malformed"):
        super().__init__(reason)


def compress(segmentation: Any, height: int, width: int) -> tuple[str, bool]:
    """Return the compressed counts of an annotation's segmentation, and whether it has no pixel.

    Args:
        segmentation: polygons [[x, y, x, y, ...], ...], or {"size": [h, w], "counts": numbers or a string}. Polygons
            of fewer than three points are left out where there are others.

    Raises:
        Malformed: if it is neither, or does not fit the image.
    """
    if not segmentation:
        raise Malformed("no segmentation")
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if _is_polygon(polygon, height, width)]
        if not polygons:
            raise Malformed
        mask = _library().segmToRle(polygons, width, height)
        return _text(mask), len(mask["counts"]) <= LONGEST and _library().area(mask) == 0
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        raise Malformed
    counts = segmentation.get("counts")
    runs = _expand(counts).tolist() if isinstance(counts, str) else _integers(counts)
    # Python's sum, because NumPy's wraps around.
    if not runs or min(runs) < 0 or sum(runs) != height * width:
        raise Malformed
    if not isinstance(counts, str):
        counts = _text(_library().frPyObjects({"size": [height, width], "counts": runs}, height, width))
    return counts, not any(runs[1::2])


def decode(counts: Sequence[str], height: int, width: int) -> Tensor:
    """Return masks, uint8 [n, h, w], of n compressed counts; several times as fast as COCO's tools."""
    columns = np.empty((len(counts), width * height), np.uint8)
    for mask, one in zip(columns, counts, strict=True):
        runs = _expand(one)
        mask[:] = np.repeat(np.arange(len(runs), dtype=np.uint8) & 1, runs)
    return torch.from_numpy(columns).view(len(counts), width, height).transpose(1, 2).contiguous()


def area(counts: str, height: int, width: int) -> int:
    """Return a mask's number of pixels."""
    return int(_library().area({"size": [height, width], "counts": counts}))


def encode_mask(mask: NDArray[np.uint8]) -> dict[str, Any]:
    """Return the segmentation that JSON holds of a mask [h, w] of 0 and 1."""
    return {"size": list(mask.shape), "counts": _text(_library().encode(np.asfortranarray(mask)))}


def _is_polygon(polygon: Any, height: int, width: int) -> bool:
    """Tell polygons from those of too few points.

    Raises:
        Malformed: if it is not a list of coordinates, or they lie far outside the image.
    """
    if not isinstance(polygon, list) or not set(map(type, polygon)) <= {int, float}:
        raise Malformed
    if len(polygon) < 6 or len(polygon) % 2:
        return False
    # The sum is NaN if a coordinate is, which comparisons may miss.
    limit = REACH * max(height, width)
    if not (-limit <= min(polygon) and max(polygon) <= limit and math.isfinite(sum(polygon))):
        raise Malformed
    return True


def _integers(counts: Any) -> list[int]:
    if not isinstance(counts, list) or not set(map(type, counts)) <= {int}:
        raise Malformed
    return counts


def _expand(counts: str) -> NDArray[np.int64]:
    """Return the numbers of compressed counts.

    Raises:
        Malformed: if there is none, or a character stands for nothing.
    """
    try:
        codes = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - FIRST_CHARACTER
    except UnicodeEncodeError as error:
        raise Malformed from error
    if not len(codes) or codes.min() < 0 or codes.max() >= CHARACTERS or codes[-1] & MORE:
        raise Malformed
    ends = np.flatnonzero(codes & MORE == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > LONGEST:
        raise Malformed
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & (MORE - 1)) << (BITS * place), starts)
    runs -= np.where(codes[ends] & SIGN, 1 << (BITS * lengths), 0)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def _text(mask: dict[str, Any]) -> str:
    counts = mask["counts"]
    return counts.decode("ascii") if isinstance(counts, bytes) else counts


def _library() -> Any:
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise UserError("COCO's masks need the package faster-coco-eval; run pip install 'mirl[detect]'") from error
    return mask
