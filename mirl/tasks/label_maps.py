"""What a segmenter says of a folder of images: label maps as palette PNGs, and pictures of them over the images.

Symbols: c channels, h and w height and width.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mirl.data.semantic import SemanticClass
from mirl.data.sources import Source
from mirl.errors import none_readable, plural
from mirl.tasks.image_folder import readable, relative_names, replacing, save_picture, unused
from mirl.training.overlays import colour
from mirl.training.painting import fitted, painted
from mirl.training.runs import console

LISTED = 8  # classes that the closing line names
VALUES = 256  # that a label file can have
FOLDERS, FILE = ("labels", "overlays"), "classes.json"
MAKER = "mirl segment --predict"
LONGEST = 2048  # pixels of an overlay's longer side


@dataclass(frozen=True)
class FolderLabels:
    """What was said of a folder of images.

    Attributes:
        path: the folder that was written; images: how many were read.
        shares: share in 0..1 of all pixels that each class has, the most frequent first; classes without any left out.
        bad: (name, reason) of files that could not be read.
    """

    path: Path
    images: int
    shares: dict[str, float]
    bad: tuple[tuple[str, str], ...]


@torch.inference_mode()
def predict_folder(
    segment: Callable[[Tensor], Tensor], source: Source, classes: Sequence[SemanticClass], folder: str | Path,
    *, workers: int | None = None,
) -> FolderLabels:  # fmt: skip
    """Segment images of any size; write `labels/`, `overlays/` and `classes.json`, which says what the labels mean.

    Labels are as large as their images and hold the classes' values, not their indices; overlays are reduced to what
    can be looked at. Both keep the images' subfolders. Files that cannot be read are named and left out. In the end
    they replace what an earlier call wrote.

    Args:
        segment: maps an image, uint8 [c, h, w], to the indices of its pixels' classes, uint8 [h, w].

    Raises:
        UserError: if no image can be read, or `folder` cannot be written or holds labels of somebody else.
    """
    folder, relative = Path(folder), relative_names(source)
    values, colours = _values(classes), palette_of(classes)
    counts = np.zeros(len(classes), np.int64)
    bad: list[tuple[str, str]] = []
    used: set[str] = set()
    with replacing(folder, (*FOLDERS, FILE), MAKER) as fresh:
        (fresh / FILE).write_text(json.dumps(_as_file(classes), indent=1, ensure_ascii=False), encoding="utf-8")
        for batch in readable(source, workers, bad, "segmenting"):
            image, said = batch.images[0], segment(batch.images[0]).cpu()
            counts += np.bincount(said.numpy().ravel(), minlength=len(classes))
            name = unused(relative[int(batch.indices)], used)
            save_labels(values[said.numpy()], colours, fresh / "labels" / name)
            save_picture(painted(*fitted(image, said, longest=LONGEST)), fresh / "overlays" / name)
        if not used:
            raise none_readable(len(source), bad)
    shares = {classes[i].name: float(counts[i] / counts.sum()) for i in np.argsort(-counts, kind="stable") if counts[i]}
    for name, reason in bad:
        console.print(f"left out {name}: {reason}", markup=False)
    console.print(_summary(shares, len(used)), markup=False)
    console.print(f"saved {folder}: labels/, overlays/, classes.json", markup=False)
    return FolderLabels(folder, len(used), shares, tuple(bad))


def palette_of(classes: Sequence[SemanticClass]) -> np.ndarray:
    """Return the colours uint8 [256, 3] of values in a label file; those of no class are black."""
    colours = np.zeros((VALUES, 3), np.uint8)
    for index, one in enumerate(classes):
        colours[one.value] = colour(index + 1)
    return colours


def save_labels(values: np.ndarray, colours: np.ndarray, path: Path) -> None:
    """Write values, uint8 [h, w], as a palette PNG; its folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values)
    picture.putpalette(colours.tobytes())
    picture.save(path, format="PNG", optimize=True)


def _as_file(classes: Sequence[SemanticClass]) -> dict[str, object]:
    """Return what classes.json says of classes."""
    return {
        "made_by": MAKER,
        "classes": [
            {"index": one.value, "name": one.name, "color": list(colour(index + 1))}
            for index, one in enumerate(classes)
        ],
    }


def _values(classes: Sequence[SemanticClass]) -> np.ndarray:
    return np.array([one.value for one in classes], dtype=np.uint8)


def _summary(shares: dict[str, float], images: int) -> str:
    listed = ", ".join(f"{name} {100 * share:.1f} %" for name, share in list(shares.items())[:LISTED])
    more = f" and {plural(len(shares) - LISTED, 'more class', 'es')}" if len(shares) > LISTED else ""
    return f"segmented {plural(images, 'image')}: {listed}{more}"
