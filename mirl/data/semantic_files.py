"""Image files and the label files of the same names as a source of label maps. Symbols: h and w height and width."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mirl.data.decode import BadImage
from mirl.data.label_files import in_words, read_values
from mirl.data.oriented import read_as_annotated
from mirl.data.packed import PackedStrings
from mirl.data.semantic_classes import Vocabulary
from mirl.data.sources import ImageFiles, open_source
from mirl.errors import UserError, plural

SUFFIX = ".png"


@dataclass(frozen=True)
class Pairs:
    """Images and their label files.

    Attributes:
        folder: where paths of label files start.
        labels: one for each image, whether or not there is such a file.
        present: indices of the first images whose label is there.
    """

    images: ImageFiles
    folder: Path
    labels: PackedStrings
    present: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def label_of(self, index: int) -> str:
        """Return the label file's path."""
        return os.path.join(self.folder, self.labels[index])


def open_pairs(images: Path, folder: Path, channels: int, *, examples: int = 10) -> Pairs:
    """Find the images of a folder and, by their paths in it without suffixes, the label files of another.

    Nothing is opened. An image without a label stays, so that training names and counts it.

    Raises:
        UserError: if no image has a label.
    """
    files, others = (open_source(path, channels=count) for path, count in ((images, channels), (folder, 1)))
    assert isinstance(files, ImageFiles) and isinstance(others, ImageFiles)
    paths = (others.paths[index] for index in range(len(others)))
    found = {os.path.splitext(path)[0]: path for path in paths if path.lower().endswith(SUFFIX)}
    stems = [os.path.splitext(files.paths[index])[0] for index in range(len(files))]
    present = [index for index, stem in enumerate(stems) if stem in found]
    if not present:
        there = next(iter(found.values()), others.paths[0])
        raise UserError(
            f"no image in {str(images)!r} has a label in {str(folder)!r}: {files.paths[0]!r} needs "
            f"{stems[0] + SUFFIX!r}, but there is {there!r}; give labels the names of their images"
        )
    left_over = sorted(found.keys() - set(stems))
    many = f"{plural(len(left_over), 'label')} without an image"
    notes = (f"{many}, such as {found[left_over[0]]!r}",) if left_over else ()
    labels = PackedStrings(found.get(stem, stem + SUFFIX) for stem in stems)
    return Pairs(files, folder, labels, tuple(present[:examples]), notes)


class SemanticFiles:
    """Image files with label files.

    Args:
        vocabulary: what the values in label files mean.
    """

    def __init__(self, pairs: Pairs, vocabulary: Vocabulary):
        self.pairs, self.classes = pairs, vocabulary.classes
        self._indices, self._known = vocabulary.indices()

    def __len__(self) -> int:
        return len(self.pairs)

    def name_of(self, index: int) -> str:
        """Return the image file's path."""
        return self.pairs.images.name_of(index)

    def read(self, index: int) -> Tensor:
        """Return the image alone, uint8 [c, h, w], turned as it was labelled, or raise `BadImage`."""
        return self.read_semantic(index)[0]

    def read_semantic(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the image, uint8 [c, h, w], and its label map, uint8 [h, w], or raise `BadImage`."""
        labels = self._labels(index)
        height, width = labels.shape
        image = read_as_annotated(self.pairs.images, index, (height, width))
        if image.shape[-2:] != labels.shape:
            given = "{}x{}".format(*image.shape[-2:])
            raise BadImage(f"is {given} px, but its label {self.pairs.label_of(index)!r} is {height}x{width} px")
        return image, labels

    def _labels(self, index: int) -> Tensor:
        path = self.pairs.label_of(index)
        try:
            values = read_values(path)
        except BadImage as error:
            missing = isinstance(error.__cause__, FileNotFoundError)
            fault = "has no label" if missing else "has a label that cannot be used"
            raise BadImage(f"{fault}: {path!r} {error.reason}") from error
        known = self._known[values]
        if not known.all():
            unknown = in_words(np.unique(values[~known]).tolist())
            allowed = in_words(one.value for one in self.classes)
            raise BadImage(
                f"has a label that cannot be used: {path!r} holds {unknown}, which is neither void nor one of the "
                f"{len(self.classes)} classes, {allowed}"
            )
        return torch.from_numpy(self._indices[values])
