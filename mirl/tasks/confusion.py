"""Which classes are taken for which others: the matrix of a classifier or a segmenter as a picture and as a table."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mirl.training.files import atomic

NAMED = 40  # most classes whose names fit beside a confusion matrix


def draw_confusion(confusion: Sequence[Sequence[int]] | np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Draw the share of each true class (row) that was said to be each class (column) to a PNG."""
    counts = np.array(confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    named = len(classes) <= NAMED
    side = 2.5 + 0.28 * len(classes) if named else 9
    figure = Figure(figsize=(side + 0.8, side), dpi=110, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.8)
    axes.set(xlabel="said", ylabel="true")
    if named:
        axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7, parse_math=False)
        axes.set_yticks(range(len(classes)), classes, fontsize=7, parse_math=False)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")


def write_confusion(confusion: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Write counts [true class, said class] as CSV, with the names of classes in its first row and column."""
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["true / said", *classes])
        table.writerows([name, *row] for name, row in zip(classes, confusion.tolist(), strict=True))
