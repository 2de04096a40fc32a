"""What a detector finds, as COCO's results, and in a folder of images as pictures and one annotation file.

A detector's output for an image is torchvision's dict: `boxes` float32 [n, 4] as x0, y0, x1, y1 in pixels, `labels`
int64 [n] from 1 on, `scores` [n], `masks` bool [n, h, w]. Symbols: n objects, c channels, h and w height and width.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirl.data.instances import Category
from mirl.data.loading import Batch
from mirl.data.run_lengths import area, encode_mask
from mirl.data.sources import Source
from mirl.errors import none_readable, plural
from mirl.tasks.image_folder import readable, relative_names, replacing, save_picture, unused
from mirl.training.files import atomic
from mirl.training.overlays import overlay
from mirl.training.runs import console

Detections = Mapping[str, Tensor]
Detect = Callable[[list[Tensor]], Sequence[Detections]]
LISTED = 8  # classes that the closing line counts
FOLDER, FILE = "overlays", "predictions.json"
MAKER = "mirl detect --predict"


@dataclass(frozen=True)
class FolderPredictions:
    """What was found in a folder of images.

    Attributes:
        path: the annotation file; images: how many were read; found: objects of each class, the most frequent first.
        bad: (name, reason) of files that could not be read.
    """

    path: Path
    images: int
    found: dict[str, int]
    bad: tuple[tuple[str, str], ...]


def confident(found: Detections, threshold: float) -> dict[str, Tensor]:
    """Return the objects whose score is `threshold` or more."""
    kept = found["scores"] >= threshold
    return {name: values[kept] for name, values in found.items()}


def coco_results(
    found: Sequence[Detections], image_ids: Sequence[int], categories: Sequence[Category]
) -> list[dict[str, Any]]:
    """Return detections in COCO's format of results: plain numbers and text, ready for JSON.

    Args:
        found: one dict for each image; image_ids: their numbers in the annotation file.
        categories: label k is `categories[k - 1]`.
    """
    results = []
    for image_id, objects in zip(image_ids, found, strict=True):
        boxes, labels, scores, masks = (objects[name].cpu() for name in ("boxes", "labels", "scores", "masks"))
        corners = boxes.double()
        for box, label, score, mask in zip(
            torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist(),
            *(labels.tolist(), scores.tolist(), masks.view(torch.uint8)),
            strict=True,
        ):
            results.append({
                "image_id": int(image_id), "category_id": categories[label - 1].id,
                "bbox": [round(value, 3) for value in box],
                "score": round(score, 8),  # float32 has no more
                "segmentation": encode_mask(mask.numpy()),
            })  # fmt: skip
    return results


@torch.inference_mode()
def predict_folder(
    detect: Detect, source: Source, categories: Sequence[Category], folder: str | Path,
    *, threshold: float = 0.5, batch_size: int = 4, workers: int | None = None, device: torch.device | str = "cpu",
) -> FolderPredictions:  # fmt: skip
    """Find objects in images of any size; write `overlays/` and `predictions.json`, a COCO annotation file.

    Overlays keep the images' subfolders. Image k of the file is image k - 1 of the source; an annotation also has the
    `score`. Files that cannot be read are named and left out of both. In the end they replace what an
    earlier call wrote.

    Args:
        detect: maps float images [c, h, w] in 0..1 on `device` to dicts; masks are of the image's size.
        threshold: least score of what is drawn and written.

    Raises:
        UserError: if no image can be read, or `folder` cannot be written or holds predictions of somebody else.
    """
    folder, names = Path(folder), [category.name for category in categories]
    path, relative = folder / FILE, relative_names(source)
    bad: list[tuple[str, str]] = []
    counts: Counter[str] = Counter()
    used: set[str] = set()
    images = hits = 0
    with replacing(folder, (FOLDER, FILE), MAKER) as fresh, _growing_coco(fresh / FILE, categories) as add:
        groups = _groups(readable(source, workers, bad, "detecting"), batch_size)
        for index, image, everything in _detected(detect, groups, torch.device(device)):
            objects, name = confident(everything, threshold), relative[index]
            height, width = image.shape[-2:]
            add(
                {"id": index + 1, "file_name": name, "width": width, "height": height},
                coco_results([objects], [index + 1], categories),
            )
            save_picture(overlay(image, objects, names), fresh / FOLDER / unused(name, used))
            counts.update(names[label - 1] for label in objects["labels"].tolist())
            images, hits = images + 1, hits + bool(len(objects["labels"]))
        if not images:
            raise none_readable(len(source), bad)
    for name, reason in bad:
        console.print(f"left out {name}: {reason}", markup=False)
    console.print(_summary(counts, hits, images, threshold), markup=False)
    console.print(f"saved {path} and {folder / FOLDER}", markup=False)
    return FolderPredictions(path, images, dict(counts.most_common()), tuple(bad))


def _groups(items: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _detected(
    detect: Detect, groups: Iterable[list[Batch]], device: torch.device
) -> Iterator[tuple[int, Tensor, Detections]]:
    """Yield each image's index in the source, itself as uint8 [c, h, w], and what was found in it."""
    for group in groups:
        found = detect([batch.images[0].to(device).float() / 255 for batch in group])
        for batch, objects in zip(group, found, strict=True):
            yield int(batch.indices), batch.images[0], {name: values.cpu() for name, values in objects.items()}


@contextmanager
def _growing_coco(
    path: Path, categories: Sequence[Category]
) -> Iterator[Callable[[dict[str, Any], list[dict[str, Any]]], None]]:
    """Write a COCO file an image at a time; yields what takes the next image and its objects.

    Objects go to the disk at once: their masks would fill the memory.
    """
    images: list[dict[str, Any]] = []
    count = 0
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(f'{{"info": {{"made_by": {json.dumps(MAKER)}}},\n"annotations": [')

        def add(image: dict[str, Any], results: list[dict[str, Any]]) -> None:
            nonlocal count
            images.append(image)
            for result in results:
                row = {"id": count + 1} | result | {"area": _area(result["segmentation"]), "iscrowd": 0}
                file.write(f"{',' if count else ''}\n{json.dumps(row)}")
                count += 1

        yield add
        rest = {"images": images, "categories": [asdict(category) for category in categories]}
        file.write(f"\n],\n{json.dumps(rest)[1:]}\n")


def _area(segmentation: dict[str, Any]) -> int:
    return area(segmentation["counts"], *segmentation["size"])


def _summary(counts: Counter[str], hits: int, images: int, threshold: float) -> str:
    among = plural(images, "image")
    if not counts:
        return f"found nothing of score {threshold:g} or more in {among}; a lower --threshold shows more"
    listed = ", ".join(f"{name} {count}" for name, count in counts.most_common(LISTED))
    more = f" and {plural(len(counts) - LISTED, 'more class', 'es')}" if len(counts) > LISTED else ""
    objects = plural(counts.total(), "object")
    return f"found {objects} of score {threshold:g} or more in {hits} of {among}: {listed}{more}"
