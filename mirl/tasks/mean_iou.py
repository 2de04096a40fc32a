"""How well label maps agree with the truth: mean intersection over union and accuracies, from counts of pixels.

Sums over all images come before any division, and what is unknown is left out of means, as in ADE20K's and mmseg's
evaluation. Symbols: n classes, h and w height and width.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirl.data.semantic import IGNORE
from mirl.tasks.average_precision import mean_of_known, or_none

LABELS = IGNORE + 1  # that a label map can have


@dataclass(frozen=True)
class Overlap:
    """How label maps of images agree with the truth.

    Attributes:
        confusion: int64 [n, n], pixels of the true class (row) that were said to be of each class (column).
        classes: names of the n classes; images: how many were judged.
    """

    confusion: Tensor
    classes: tuple[str, ...]
    images: int

    @property
    def pixels(self) -> int:
        """Labelled pixels."""
        return int(self.confusion.sum())

    @property
    def iou(self) -> np.ndarray:
        """Intersection over union [n] in 0..1 of each class: 0 if it is said and never true, NaN if it is neither."""
        right, true, said = self._counts()
        return _ratio(right, true + said - right)

    @property
    def accuracy(self) -> np.ndarray:
        """Share [n] of each class's pixels that is right; NaN if it has none."""
        right, true, _ = self._counts()
        return _ratio(right, true)

    @property
    def figures(self) -> dict[str, float]:
        """Mean of IoU, `miou`, and of accuracy, `macc`, over classes, and share of right pixels, `aacc`, in 0..1."""
        right, true, _ = self._counts()
        right_of_all = float(right.sum() / true.sum()) if true.any() else math.nan
        return {"miou": mean_of_known(self.iou), "aacc": right_of_all, "macc": mean_of_known(self.accuracy)}

    def __str__(self) -> str:
        if not self.pixels:
            return "no labelled pixels to judge by"
        words = {"miou": "mIoU", "aacc": "pixel accuracy", "macc": "class accuracy"}
        return " · ".join(f"{words[name]} {100 * value:.1f} %" for name, value in self.figures.items())

    def as_json(self) -> dict[str, Any]:
        """Return what a JSON file holds of it, without the confusion: null in place of NaN."""
        shares = self._counts()[1] / max(1, self.pixels)
        columns = zip(self.classes, self.iou, self.accuracy, shares, strict=True)
        rows = [
            {"name": name, "iou": or_none(iou), "accuracy": or_none(accuracy), "share": float(share)}
            for name, iou, accuracy, share in columns
        ]
        figures = {name: or_none(value) for name, value in self.figures.items()}
        return figures | {"images": self.images, "pixels": self.pixels, "per_class": rows}

    def _counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return each class's pixels that are right, that are true and that are said, [n] each."""
        confusion = self.confusion.cpu().numpy()
        return confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)


def confusion_of(said: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Count the pixels of each true class (row) that were said to be of each class (column), int64 [n, n].

    Counting all 256 labels and dropping rows takes a twentieth of the time of torchmetrics, which masks first.

    Args:
        said: uint8 [h, w], 0 to n - 1; truth: uint8 [h, w], or IGNORE.
        classes: n.
    """
    places = truth.int() * classes + said.to(truth.device)
    return torch.bincount(places.flatten(), minlength=LABELS * classes).view(LABELS, classes)[:classes]


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(part), math.nan), where=whole > 0)
