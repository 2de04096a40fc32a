"""Average precision of a detector on a split: during training over all processes, or of a trained one."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mirl.data.instances import Category, InstanceBatch, InstanceSplit, InstanceViews, open_instance_test
from mirl.errors import UserError, none_readable, plural
from mirl.tasks.accuracy import write_json
from mirl.tasks.average_precision import AveragePrecision, average_precision
from mirl.tasks.detections import Detections, coco_results
from mirl.tasks.detector import load_detector
from mirl.tasks.features import batches
from mirl.training.evaluation import Evaluation
from mirl.training.files import atomic, writing
from mirl.training.processes import Fabric, from_all
from mirl.training.runs import console

Results = list[dict[str, Any]]  # COCO's
DETECTIONS = "detections.json"
HEADLINE = ("box_ap", "mask_ap", "box_ap50", "mask_ap50")


def find(model: nn.Module, batch: InstanceBatch) -> list[Detections]:
    """Return what a detector in evaluation mode finds in each image of a batch on its device."""
    return list(model([image.float() / 255 for image in batch.unpadded()]))


class Scores:
    """What was found in images of a split so far; images that could not be read are not judged.

    Args:
        categories: the detector's, by which its labels are meant.
    """

    def __init__(self, split: InstanceSplit, categories: Sequence[Category]) -> None:
        self.split, self.categories = split, categories
        self.by_image: dict[int, Results] = {}  # by index in the source

    def add(self, batch: InstanceBatch, found: Sequence[Detections]) -> None:
        """Take in what was found in a batch."""
        source = self.split.source
        for index, objects in zip(batch.indices.tolist(), found, strict=True):
            self.by_image[index] = coco_results([objects], [source.image_id(index)], self.categories)

    def judged(self) -> tuple[AveragePrecision, Results]:
        """Return the average precision, and what it is of."""
        seen = sorted(self.by_image)
        results = [result for index in seen for result in self.by_image[index]]
        return average_precision(self.split.source.truth(seen), results), results


class PrecisionOfHeldOut(Evaluation[InstanceBatch]):
    """An evaluation during training; in the end it tells `keep` what was found, in the first process.

    Values: as `AveragePrecision.figures`.
    """

    headline = HEADLINE

    def __init__(
        self, fabric: Fabric, model: nn.Module, split: InstanceSplit, keep: Callable[[AveragePrecision, Results], None]
    ) -> None:
        self.fabric, self.model, self.scores, self.keep = fabric, model, Scores(split, split.source.categories), keep

    def add(self, batch: InstanceBatch) -> None:
        """Find objects in a batch, one image at a time: of a large photograph a hundred masks are a gigabyte."""
        for image in batch.pieces(1):
            self.scores.add(image, find(self.model, image))

    def values(self) -> dict[str, float]:
        """Judge what all processes found."""
        for found in from_all(self.fabric, self.scores.by_image):
            self.scores.by_image |= found
        figures: dict[str, float] = {}
        if self.fabric.is_global_zero:  # seconds and gigabytes, which need not be spent in each process
            judged, results = self.scores.judged()
            self.keep(judged, results)
            figures = judged.figures
        return self.fabric.broadcast(figures)


def evaluate_detector(
    weights: str, data: str, folder: Path, *, batch_size: int, workers: int | None
) -> AveragePrecision:
    """Judge a trained detector on COCO annotations; write `results.json` and `detections.json` to `folder`.

    Raises:
        UserError: on a mistake in weights or data, or if the data have categories that the detector does not know.
    """
    detector, categories = load_detector(weights)
    split = open_instance_test(data, channels=len(detector.transform.image_mean))
    if unknown := [category for category in split.source.categories if category not in categories]:
        raise UserError(
            f"{data!r} has categories that the detector does not know, e.g. {unknown[0].id} {unknown[0].name!r}; give "
            f"annotations with its ids and names, e.g. {categories[0].id} {categories[0].name!r}"
        )
    detector = detector.to("cuda" if torch.cuda.is_available() else "cpu")
    judged, results, bad = judge(detector, split, categories, batch_size=batch_size, workers=workers)
    if not judged.images:
        raise none_readable(len(split), bad)
    write_json(folder / "results.json", {"weights": weights, "data": data, **judged.as_json()})
    with writing(folder):
        write_detections(results, folder)
    for note in (*split.notes, *(f"left out {name}: {reason}" for name, reason in bad)):
        console.print(note, markup=False)
    console.print(f"{data}: {plural(judged.images, 'image')} with {plural(judged.objects, 'object')}", markup=False)
    console.print(f"{judged}", markup=False)
    console.print(f"saved {folder}: results.json, {DETECTIONS}", markup=False)
    return judged


def write_detections(results: Results, folder: Path) -> None:
    """Write what was found in COCO's format of results."""
    with atomic(folder / DETECTIONS) as temporary:
        temporary.write_text(json.dumps(results))


@torch.inference_mode()
def judge(
    model: nn.Module, split: InstanceSplit, categories: Sequence[Category], *, batch_size: int, workers: int | None
) -> tuple[AveragePrecision, Results, tuple[tuple[str, str], ...]]:
    """Judge a detector on a split, with a progress bar; also return (name, reason) of images that cannot be read."""
    device = next(model.parameters()).device
    scores = Scores(split, categories)
    bad: list[tuple[str, str]] = []
    for batch in batches(InstanceViews(split.source, split.members), batch_size, workers, "finding objects"):
        bad += batch.bad
        if isinstance(batch, InstanceBatch):
            on_device = batch.to(device)
            scores.add(on_device, find(model, on_device))
    return *scores.judged(), tuple(bad)
