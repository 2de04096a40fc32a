"""Mean intersection over union of a segmenter on a split: during training over all processes, or of a trained one.

What segments maps an image, uint8 [c, h, w], to the indices of its pixels' classes, uint8 [h, w]. Symbols: c channels,
h and w height and width, n classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirl.data.semantic import (
    IGNORE,
    SemanticBatch,
    SemanticClass,
    SemanticSplit,
    SemanticViews,
    open_semantic_test,
)
from mirl.errors import UserError, none_readable, plural
from mirl.tasks.accuracy import write_json
from mirl.tasks.confusion import draw_confusion, write_confusion
from mirl.tasks.features import batches
from mirl.tasks.mean_iou import LABELS, Overlap, confusion_of
from mirl.tasks.segmenter import load_segmenter
from mirl.training.evaluation import Evaluation
from mirl.training.files import writing
from mirl.training.processes import Fabric, over_processes
from mirl.training.runs import console

Segment = Callable[[Tensor], Tensor]
HEADLINE = ("miou", "aacc", "macc")
FILES = ("results.json", "confusion.csv", "confusion.png")


class IoUOfHeldOut(Evaluation[SemanticBatch]):
    """An evaluation during training; in the end it tells `keep` what was found.

    Values: as `Overlap.figures`.

    Args:
        images: how many are held out, over all processes.
    """

    headline = HEADLINE

    def __init__(
        self, fabric: Fabric, segment: Segment, classes: Sequence[SemanticClass], images: int,
        keep: Callable[[Overlap], None],
    ) -> None:  # fmt: skip
        self.fabric, self.segment, self.images, self.keep = fabric, segment, images, keep
        self.found = nothing_yet(classes)

    def add(self, batch: SemanticBatch) -> None:
        """Take in what is said of each image of a batch."""
        if self.fabric.global_rank >= self.images:  # without a share, it is given an image that another process has
            return
        for image, truth in zip(batch.unpadded(), batch.unpadded("labels"), strict=True):
            self.found = with_image(self.found, self.segment(image), truth)

    def values(self) -> dict[str, float]:
        """Judge what all processes found."""
        counts = torch.cat([self.found.confusion.flatten(), torch.tensor([self.found.images])])
        *confusion, images = over_processes(self.fabric, counts, "sum").cpu().split([counts.numel() - 1, 1])
        table = confusion[0].view_as(self.found.confusion)
        self.found = replace(self.found, confusion=table, images=int(images))
        if not self.found.pixels:
            raise UserError(
                f"no pixel of the {self.images} held-out images has a label to judge by; check their label files and "
                "the values in classes.json"
            )
        self.keep(self.found)
        return self.found.figures


def nothing_yet(classes: Sequence[SemanticClass]) -> Overlap:
    """Return what is found in no image."""
    table = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    return Overlap(table, tuple(one.name for one in classes), images=0)


def with_image(found: Overlap, said: Tensor, truth: Tensor) -> Overlap:
    """Add an image, uint8 [h, w] both."""
    added = confusion_of(said, truth, len(found.classes)).cpu()
    return replace(found, confusion=found.confusion + added, images=found.images + 1)


@torch.inference_mode()
def judge(
    segment: Segment, split: SemanticSplit, classes: Sequence[SemanticClass], workers: int | None
) -> tuple[Overlap, tuple[tuple[str, str], ...]]:
    """Judge what segments on a split, with a progress bar; also return (name, reason) of images that cannot be read.

    Args:
        classes: those of `segment`; the split may have some of them, in any order.
    """
    translated = translation(split.source.classes, classes)
    found = nothing_yet(classes)
    bad: list[tuple[str, str]] = []
    for batch in batches(SemanticViews(split.source, split.members), 1, workers, "segmenting"):
        bad += batch.bad
        if isinstance(batch, SemanticBatch):
            truth = torch.from_numpy(translated[batch.labels[0].numpy()])
            found = with_image(found, segment(batch.images[0]).cpu(), truth)
    return found, tuple(bad)


def translation(given: Sequence[SemanticClass], known: Sequence[SemanticClass]) -> np.ndarray:
    """Return, uint8 [256], what index in `known` each index in `given` has; whatever is no class is IGNORE.

    Raises:
        ValueError: if a class is not known by its value and name.
    """
    table = np.full(LABELS, IGNORE, dtype=np.uint8)
    table[: len(given)] = [known.index(one) for one in given]
    return table


def evaluate_segmenter(
    weights: str, data: str, folder: Path, *, multi_scale: bool = False, workers: int | None = None
) -> Overlap:
    """Judge a trained segmenter on label maps; write `results.json`, `confusion.csv` and `confusion.png` to `folder`.

    Args:
        multi_scale: mean over six sizes of each image and its mirror image: about 17 times as slow.

    Raises:
        UserError: on a mistake in weights or data, or if the data have classes that the segmenter does not know.
    """
    segmenter = load_segmenter(weights, multi_scale=multi_scale)
    split = open_semantic_test(data, channels=segmenter.channels)
    check_classes(data, split.source.classes, segmenter.classes)
    segmenter.to("cuda" if torch.cuda.is_available() else "cpu")
    found, bad = judge(segmenter, split, segmenter.classes, workers)
    if not found.images:
        raise none_readable(len(split), bad)
    write_results(found, folder, weights=weights, data=data, multi_scale=multi_scale)
    for note in (*split.notes, *(f"left out {name}: {reason}" for name, reason in bad)):
        console.print(note, markup=False)
    pixels = plural(found.pixels, "labelled pixel", form=",")
    console.print(f"{data}: {plural(found.images, 'image')} with {pixels}", markup=False)
    console.print(f"{found}", markup=False)
    console.print(f"saved {folder}: {', '.join(FILES)}", markup=False)
    return found


def check_classes(data: str, given: Sequence[SemanticClass], known: Sequence[SemanticClass]) -> None:
    """Raise UserError if a class is not known by its value and name."""
    if unknown := [one for one in given if one not in known]:
        raise UserError(
            f"{data!r} has classes that the segmenter does not know, e.g. {unknown[0].value} {unknown[0].name!r}; give "
            f"labels with its values and names, e.g. {known[0].value} {known[0].name!r}"
        )


def write_results(found: Overlap, folder: Path, **more: Any) -> None:
    """Write the figures, with `more` before them, and the confusion, as a table and as a picture."""
    results, table, picture = (folder / name for name in FILES)
    write_json(results, more | found.as_json())
    with writing(folder):
        write_confusion(found.confusion.numpy(), found.classes, table)
        draw_confusion(found.confusion.numpy(), found.classes, picture)
