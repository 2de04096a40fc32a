"""Values over a run, and how many of them a chart needs.

Symbols: n recorded steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mirl.reports.contents import Row, number


@dataclass(frozen=True)
class Series:
    """A value over a run: `steps`, `epochs` and `values`, all [n]; steps without a finite value are left out."""

    steps: np.ndarray
    epochs: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, kept: np.ndarray | slice) -> "Series":
        return Series(self.steps[kept], self.epochs[kept], self.values[kept])

    @property
    def first(self) -> float:
        return float(self.values[0])

    @property
    def last(self) -> float:
        return float(self.values[-1])


def series(rows: Sequence[Row], name: str, *, scale: float = 1.0, over: str | None = None) -> Series:
    """Collect `scale` times the value `name` of `rows`, divided by the value `over` if that is given."""
    values = scale * _column(rows, name)
    if over:
        whole = _column(rows, over)
        values = np.divide(values, whole, out=np.full(len(rows), np.nan), where=whole > 0)
    return Series(_column(rows, "step"), _column(rows, "epoch"), values)[np.isfinite(values)]


def _column(rows: Sequence[Row], name: str) -> np.ndarray:
    values = (number(row.get(name)) for row in rows)
    return np.array([math.nan if value is None else value for value in values])


def thin(found: Series, most: int) -> Series:
    """Keep at most `most` values, the smallest and the largest of each bin of steps, so that no spike is lost."""
    if len(found) <= most:
        return found
    bins = max(1, most // 2)
    edges = np.linspace(0, len(found), bins + 1).astype(int)
    kept = set()
    for start, stop in pairwise(edges):
        part = found.values[start:stop]
        kept |= {start + int(part.argmin()), start + int(part.argmax())}
    return found[np.array(sorted(kept))]


def smooth(found: Series, most: int) -> Series:
    """Average over a fiftieth of the run around each step; keep at most `most` of the averages, evenly spaced."""
    half = len(found) // 100
    sums = np.concatenate([[0.0], np.cumsum(found.values)])
    places = np.unique(np.linspace(0, max(0, len(found) - 1), min(most, max(1, len(found)))).astype(int))
    places = places[: len(found)]
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(found))
    means = (sums[high] - sums[low]) / np.maximum(high - low, 1)
    return Series(found.steps[places], found.epochs[places], means)
