"""Pictures of a detector during training: what it is shown, and what it finds beside the truth."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from mirl.data.instances import InstanceBatch, InstanceViews
from mirl.data.loading import spread
from mirl.heads.mask_rcnn import Detector
from mirl.tasks.detection_scores import find
from mirl.tasks.detections import confident
from mirl.training.overlays import Objects, overlay, sheet

PICTURED, IN_A_ROW = 6, 3
SHOWN = 0.3  # least score of what is drawn
LONGEST = 480  # pixels of a picture's longer side


def draw_training(views: InstanceViews, names: Sequence[str], path: Path) -> None:
    """Draw some training views with their instances to a PNG at `path`."""
    shown = spread(views, PICTURED)
    if not isinstance(shown, InstanceBatch):  # none of them can be read
        return
    pictures = _overlays(shown, [one.target() for one in shown.instances], names)
    across = min(IN_A_ROW, len(pictures))
    rows = [pictures[i : i + across] for i in range(0, len(pictures) // across * across, across)]
    sheet(rows, [""] * across, path, "training images")


def draw_found(model: Detector, views: InstanceViews, names: Sequence[str], path: Path, title: str) -> None:
    """Draw truth and what `model`, in evaluation mode, finds in some images to a PNG at `path`."""
    shown = spread(views, PICTURED)
    if not isinstance(shown, InstanceBatch):  # none of them can be read
        return
    device = next(model.parameters()).device
    found = [confident(find(model, image.to(device))[0], SHOWN) for image in shown.pieces(1)]
    truth = [one.target() for one in shown.instances]
    rows = zip(_overlays(shown, truth, names), _overlays(shown, found, names), strict=True)
    sheet([list(row) for row in rows], ("truth", f"found, score {SHOWN} or more"), path, title)


def _overlays(batch: InstanceBatch, objects: Sequence[Objects], names: Sequence[str]) -> list[Tensor]:
    images = batch.unpadded()
    return [overlay(image, one, names, longest=LONGEST) for image, one in zip(images, objects, strict=True)]
