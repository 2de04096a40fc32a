"""Images with a class for every pixel: folders of images and label files, or the built-in shapes.

A label map is uint8 [h, w]: indices into `classes`, or IGNORE where nothing is said. Symbols: b images, c channels,
h and w image height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from mirl.data.loading import Views
from mirl.data.opening import folder_in, shapes_in, split_shapes
from mirl.data.padding import PaddedBatch
from mirl.data.shapes import CLASSES, Shapes
from mirl.data.sources import Source

IGNORE = 255  # neither trained nor judged on
HOLDS = "images/ and labels/"


@dataclass(frozen=True)
class SemanticClass:
    """A class of pixels by the number that label files have for it, and its name."""

    value: int
    name: str


class SemanticSource(Source, Protocol):
    """Images with label maps, by index."""

    classes: tuple[SemanticClass, ...]

    def read_semantic(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the image, uint8 [c, h, w], and its label map, uint8 [h, w], or raise `BadImage`."""
        ...


@dataclass(frozen=True)
class SemanticSplit:
    """Images to train on, or to judge on.

    Attributes:
        members: indices into `source` of the images that belong to this split.
        notes: what was left out of it or taken for granted, a line each.
    """

    source: SemanticSource
    members: np.ndarray
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.members)


class ShapesSemantic:
    """The built-in shapes as a source of label maps: the background and a class for each shape."""

    classes = tuple(SemanticClass(value, name) for value, name in enumerate(("background", *CLASSES)))

    def __init__(self, shapes: Shapes):
        self.shapes = shapes

    def __len__(self) -> int:
        return len(self.shapes)

    def name_of(self, index: int) -> str:
        """Return a name such as `shapes/train/000123`."""
        return self.shapes.name_of(index)

    def read(self, index: int) -> Tensor:
        """Return the image alone, uint8 [3, h, w]."""
        return self.shapes.read(index)

    def read_semantic(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the image, uint8 [3, h, w], and its label map, uint8 [h, w]."""
        sample = self.shapes.sample(index)
        return torch.from_numpy(sample.image).permute(2, 0, 1), torch.from_numpy(sample.semantic)


def open_semantic(
    data: str, *, channels: int = 3, val_fraction: float | None = None, seed: int = 0
) -> tuple[SemanticSplit, SemanticSplit]:
    """Open what `--data` names as a training split and a held-out split of the same classes.

    Args:
        data: a folder in one of the layouts of `mirl.data.semantic_folders`, or `shapes[:COUNT[:PIXELS]]`, whose
            held-out split is a quarter as large.
        channels: channels of every image.
        val_fraction: share of the images, at least one, that is held out where the folder is not split; drawn with
            `seed`.

    Raises:
        UserError: if there is nothing like that, or its classes are not known.
    """
    if shapes := split_shapes(data, channels, val_fraction):
        return _whole(shapes[0]), _whole(shapes[1])
    from mirl.data.semantic_folders import open_splits

    return open_splits(folder_in(data, HOLDS), channels=channels, val_fraction=val_fraction, seed=seed)


def open_semantic_training(data: str, *, channels: int = 3) -> SemanticSplit:
    """Open the images to train on, whether or not there are others to judge on.

    Raises:
        UserError: as `open_semantic`.
    """
    if shapes := shapes_in(data, channels):
        return _whole(shapes)
    from mirl.data.semantic_folders import open_training

    return open_training(folder_in(data, HOLDS), channels=channels)


def open_semantic_test(data: str, *, channels: int = 3) -> SemanticSplit:
    """Open the images to judge a segmenter on: the validation split, else the test split, else all there is.

    Raises:
        UserError: as `open_semantic`.
    """
    if shapes := shapes_in(data, channels, "val"):
        return _whole(shapes)
    from mirl.data.semantic_folders import open_test

    return open_test(folder_in(data, HOLDS), channels=channels)


def _whole(shapes: Shapes) -> SemanticSplit:
    return SemanticSplit(ShapesSemantic(shapes), np.arange(len(shapes)))


@dataclass(frozen=True, kw_only=True)
class SemanticBatch(PaddedBatch):
    """Images and their label maps, uint8 `labels` [b, h, w], padded with IGNORE."""

    PADDING: ClassVar[dict[str, int]] = {"images": 0, "labels": IGNORE}

    labels: Tensor


View = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class SemanticViews(Views):
    """Views with their label maps; without a `view`, the images as they are. The others are those of `Views`."""

    source: SemanticSource

    def __init__(self, source: SemanticSource, members: np.ndarray, view: View | None = None, **options: Any) -> None:
        super().__init__(source, members, view or _unchanged, **options)

    def _open(self, member: int) -> tuple[Tensor, Tensor]:
        image, labels = self.source.read_semantic(member)
        return self._checked(image), labels

    def _batch(self, sample: tuple[Tensor, Tensor], member: int) -> SemanticBatch:
        image, labels = self.view(*sample)
        return SemanticBatch(
            images=image[None],
            sizes=torch.tensor([image.shape[-2:]]),
            indices=torch.tensor([member]),
            labels=labels[None],
        )


def _unchanged(image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return image, labels
