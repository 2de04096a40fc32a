"""What is known of one encoder when it is judged: its figures, read-outs and trials. Symbols: m blocks, t images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mirl.analysis.reinitialisation import Trial
from mirl.analysis.representations import Measures
from mirl.tasks.accuracy import wilson

READ_OUTS = {"linear": "linear read-out", "knn": "k-NN read-out"}


@dataclass(frozen=True)
class ReadOut:
    """Which test images are told right after the embedding and each block, `right` [1 + m, t].

    `truth` [t] are their classes; `fitted_on` is the number of images that the read-out was fitted on.
    """

    right: Tensor
    truth: Tensor
    fitted_on: int

    @property
    def top1(self) -> list[float]:
        return self.right.double().mean(dim=1).tolist()

    @property
    def intervals(self) -> list[tuple[float, float]]:
        """95 % of each block, by the number of test images (Wilson's)."""
        return [wilson(int(row.sum()), len(row)) for row in self.right]

    def figures(self) -> dict[str, Any]:
        return {"top1": self.top1, "interval": self.intervals, "fitted_on": self.fitted_on, "images": len(self.truth)}


@dataclass(frozen=True)
class Diagnosis:
    """Everything found about one encoder.

    Attributes:
        name, weights: what it is called here, what was given.
        images: how many were looked at; patches: of how many of their patches rank and CKA were computed.
        measures, fresh: of the trained encoder, and of the same one with fresh weights.
        change: 1 - CKA between tokens of the two after the embedding and each block [1 + m].
        chance: the largest of the same between that fresh encoder and others, with weights of other seeds.
        distance: of each block's weights from where they began, over the norm of these [m]; None if that is not known,
            `distance_unknown` says why.
        read_outs, fresh_read_outs: by name, with labels; of the trained encoder and of fresh weights.
        without: CKA of the last tokens' content with what it is without the idle blocks, if there are any; NaN where
            images do not differ.
        trials: fine-tunings with fresh weights in the last blocks; `epochs` of each.
    """

    name: str
    weights: str
    images: int
    patches: int
    measures: Measures
    fresh: Measures
    change: list[float]
    chance: list[float]
    distance: list[float] | None
    distance_unknown: str
    read_outs: dict[str, ReadOut]
    fresh_read_outs: dict[str, ReadOut]
    without: float | None
    trials: list[Trial]
    epochs: int

    @property
    def depth(self) -> int:
        return self.measures.depth


@dataclass(frozen=True)
class Compared:
    """Two read-outs of the same images: the `share` by which the first is better, its 95 % interval, `p` if equal."""

    share: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return f"{points(self.share)} (95 %: {100 * self.low:.1f} to {100 * self.high:.1f})"


def compare(one: Tensor, other: Tensor) -> Compared:
    """Compare which images [t] two read-outs tell right: McNemar's exact test, and the interval of the difference.

    Only images that one alone tells right speak; that both were tested on the same images makes the test sharper than
    two intervals side by side. What other images to fit on would change is not in it. The interval is that of Agresti
    & Min (2005), half an image added to each of the four counts: it has a width also where no image differs.
    """
    from scipy.stats import binomtest  # slow to import, and whoever only reads figures does without

    first, second, t = int((one & ~other).sum()), int((other & ~one).sum()), len(one)
    n = t + 2
    centre, margin = (first - second) / n, 1.96 * math.sqrt(first + second + 1 - (first - second) ** 2 / n) / n
    p = float(binomtest(first, first + second).pvalue) if first + second else 1.0
    return Compared((first - second) / t, max(-1.0, centre - margin), min(1.0, centre + margin), p)


def spans(blocks: Sequence[int], word: str = "block") -> str:
    """Name blocks by their runs: (7, 9, 10, 11) are "blocks 7, 9-11"."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    names = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"{word}{'s' * (len(blocks) > 1)} {names}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 or not share else f"{100 * share:.1g} %"


def points(share: float) -> str:
    return f"{100 * share:.1f} points"
