"""How often a classifier is right, with the uncertainty that the number of test images leaves."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mirl.data.loading import LabelledBatch, Views
from mirl.data.transforms import standardise
from mirl.errors import none_readable
from mirl.tasks.features import batches
from mirl.training.files import atomic, writing


@dataclass(frozen=True)
class Accuracy:
    """Shares in 0..1 of `images` test images.

    Attributes:
        top1, top5: how often the class is the first, or among the first five; top5 is None for five classes or fewer.
        interval: 95 % confidence interval of top1 (Wilson's).
        per_class: top1 of each class that has test images.
    """

    top1: float
    top5: float | None
    interval: tuple[float, float]
    per_class: dict[str, float]
    images: int

    def __str__(self) -> str:
        low, high = self.interval
        top5 = f", top-5 {self.top5:.2%}" if self.top5 is not None else ""
        return f"top-1 {self.top1:.2%} (95 % interval {low:.2%} to {high:.2%}){top5}"


def accuracy(scores: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Accuracy:
    """Judge `scores` [n, k], higher is better, against `labels` [n]."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    hits = order == labels[:, None]
    first = hits[:, 0]
    return Accuracy(
        top1=float(first.mean()),
        top5=float(hits.any(axis=1).mean()) if len(classes) > 5 else None,
        interval=wilson(int(first.sum()), len(labels)),
        per_class={name: float(first[labels == i].mean()) for i, name in enumerate(classes) if (labels == i).any()},
        images=len(labels),
    )


def wilson(right: int, images: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share of which `right` of `images` were seen."""
    from scipy.stats import binomtest  # slow to import, and pre-training does without

    interval = binomtest(right, images).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Predictions:
    """A classifier's `scores` (logits) [n, k] for images with `labels` [n], at `indices` [n] of their source.

    `bad` lists (name, reason) of files that could not be read; the others are in order.
    """

    scores: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    bad: tuple[tuple[str, str], ...]


@torch.inference_mode()
def predict(
    classifier: nn.Module, dataset: Views, mean: tuple[float, ...], deviation: tuple[float, ...],
    batch_size: int, workers: int | None,
) -> Predictions:  # fmt: skip
    """Classify every image of a data set.

    Raises:
        UserError: if none of them can be read.
    """
    device = next(classifier.parameters()).device
    classifier.eval()
    parts: list[tuple[np.ndarray, ...]] = []
    bad: list[tuple[str, str]] = []
    for batch in batches(dataset, batch_size, workers, "classifying"):
        bad += batch.bad
        if len(batch):
            assert isinstance(batch, LabelledBatch)
            outputs = classifier(standardise(batch.images.to(device), mean, deviation)).float().cpu()
            parts.append((outputs.numpy(), batch.labels.numpy(), batch.indices.numpy()))
    if not parts:
        raise none_readable(len(dataset), bad)
    scores, labels, indices = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Predictions(scores, labels, indices, tuple(bad))


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write `result`, in which accuracies may stand, to a JSON file."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(result, indent=2, default=asdict) + "\n")
