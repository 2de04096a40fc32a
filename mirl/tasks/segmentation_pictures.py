"""Pictures of a segmenter during training: what it is shown, and what it says beside the truth, with its errors."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from mirl.data.loading import spread
from mirl.data.semantic import IGNORE, SemanticBatch, SemanticClass, SemanticViews
from mirl.training.overlays import sheet
from mirl.training.painting import errors, fitted, legend, painted

TRAINING, IN_A_ROW, HELD_OUT = 6, 2, 5
LONGEST = 480  # pixels of a picture's longer side
COLUMNS = ("image", "truth", "prediction", "wrong pixels")


def draw_training(views: SemanticViews, classes: Sequence[SemanticClass], path: Path) -> None:
    """Draw some training views with their labels to a PNG at `path`; what has no label is hatched."""
    shown = spread(views, TRAINING)
    if not isinstance(shown, SemanticBatch):  # none of them can be read
        return
    pairs = [fitted(*pair, longest=LONGEST) for pair in zip(shown.unpadded(), shown.unpadded("labels"), strict=True)]
    across = min(IN_A_ROW, len(pairs))
    pairs = pairs[: len(pairs) // across * across]
    pictures = [picture for image, labels in pairs for picture in (image, painted(image, labels))]
    rows = [pictures[i : i + 2 * across] for i in range(0, len(pictures), 2 * across)]
    columns = ["image", "labels"] * across
    sheet(rows, columns, path, "training images", legend=legend([labels for _, labels in pairs], _names(classes)))


def draw_predictions(
    segment: Callable[[Tensor], Tensor], views: SemanticViews, classes: Sequence[SemanticClass], path: Path, title: str
) -> None:
    """Draw truth, prediction and errors of some images to a PNG at `path`.

    Args:
        segment: maps an image, uint8 [c, h, w], to the classes of its pixels, uint8 [h, w].
    """
    shown = spread(views, HELD_OUT)
    if not isinstance(shown, SemanticBatch):  # none of them can be read
        return
    rows, captions, maps = [], [], []
    for image, truth in zip(shown.unpadded(), shown.unpadded("labels"), strict=True):
        said = segment(image).cpu()
        captions.append(_share_right(said, truth))
        picture, truth, said = fitted(image, truth, said, longest=LONGEST)
        rows.append([picture, painted(picture, truth), painted(picture, said), errors(picture, said, truth)])
        maps += [truth, said]
    sheet(rows, COLUMNS, path, title, captions=captions, legend=legend(maps, _names(classes)))


def _share_right(said: Tensor, truth: Tensor) -> str:
    labelled = truth != IGNORE
    if not labelled.any():
        return "no pixel has a label"
    right = (said == truth)[labelled].float().mean()
    return f"{100 * float(right):.1f} % of pixels right"


def _names(classes: Sequence[SemanticClass]) -> list[str]:
    return [one.name for one in classes]
