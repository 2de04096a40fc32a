"""Images with COCO's annotations as a source of instances, and the splits of a folder that holds them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirl.data.coco_annotations import CocoFile, corners, read_annotations
from mirl.data.coco_layout import annotation_files, held_out_file
from mirl.data.decode import BadImage
from mirl.data.instances import Category, Instances, InstanceSplit
from mirl.data.oriented import read_as_annotated
from mirl.data.run_lengths import decode
from mirl.data.splits import divided
from mirl.errors import UserError, plural


class CocoInstances:
    """The images of an annotation file."""

    def __init__(self, file: CocoFile):
        self.file, self.categories = file, file.categories

    def __len__(self) -> int:
        return len(self.file.images.ids)

    def name_of(self, index: int) -> str:
        """Return the image file's path."""
        return self.file.images.files.name_of(index)

    def image_id(self, index: int) -> int:
        """Return the image's number in the annotation file."""
        return int(self.file.images.ids[index])

    def read(self, index: int) -> Tensor:
        """Return uint8 [c, h, w], turned as it was annotated, or raise `BadImage`."""
        size = tuple(self.file.images.sizes[index].tolist())
        image = read_as_annotated(self.file.images.files, index, size)
        if image.shape[-2:] != size:
            height, width = image.shape[-2:]
            raise BadImage(f"is {height}x{width} px, but its annotations are of {size[0]}x{size[1]} px")
        return image

    def read_instances(self, index: int) -> tuple[Tensor, Instances]:
        """Return the image and its instances, crowds and empty masks left out, or raise `BadImage`."""
        image, annotations = self.read(index), self.file.annotations
        first, end = annotations.first[index : index + 2]
        chosen = first + np.flatnonzero(annotations.usable[first:end])
        size = self.file.images.sizes[index]
        return image, Instances(
            boxes=torch.from_numpy(corners(annotations.boxes[chosen], np.tile(size, (len(chosen), 1)))),
            labels=torch.from_numpy(annotations.labels[chosen]),
            masks=decode([annotations.masks[place] for place in chosen], *size.tolist()),
        )

    def with_instances(self, members: np.ndarray) -> np.ndarray:
        """Return those of `members` that have an instance to learn from."""
        annotations = self.file.annotations
        before = np.concatenate([[0], annotations.usable.cumsum()])[annotations.first]
        return members[np.diff(before)[members] > 0]

    def truth(self, members: Iterable[int]) -> dict[str, Any]:
        """Return the annotations of these images, crowds and empty masks included, as COCO's JSON."""
        chosen = [int(index) for index in members]
        categories = [{"id": category.id, "name": category.name} for category in self.categories]
        annotations = [annotation for index in chosen for annotation in self._annotations(index)]
        return {"images": [self._image(i) for i in chosen], "annotations": annotations, "categories": categories}

    def _image(self, index: int) -> dict[str, Any]:
        height, width = self.file.images.sizes[index].tolist()
        name = self.file.images.files.paths[index]
        return {"id": self.image_id(index), "file_name": name, "height": height, "width": width}

    def _annotations(self, index: int) -> list[dict[str, Any]]:
        annotations, size = self.file.annotations, self.file.images.sizes[index].tolist()
        return [
            {
                "id": int(annotations.ids[place]),
                "image_id": self.image_id(index),
                "category_id": self.categories[annotations.labels[place] - 1].id,
                "bbox": annotations.boxes[place].tolist(),
                "area": float(annotations.areas[place]),
                "iscrowd": int(annotations.crowd[place]),
                "segmentation": {"size": size, "counts": annotations.masks[place]},
            }
            for place in range(annotations.first[index], annotations.first[index + 1])
        ]


def open_coco_splits(
    root: Path, *, channels: int, val_fraction: float | None, seed: int
) -> tuple[InstanceSplit, InstanceSplit]:
    """Open the training split, images without instances left out, and the held-out split of a folder.

    Raises:
        UserError: if one of them is missing, or they differ in their categories.
    """
    files = annotation_files(root)
    held_out = held_out_file(files)
    if "train" in files and held_out:
        if val_fraction is not None:
            raise UserError(
                f"{str(root)!r} has {files['train'].name!r} and {str(held_out.relative_to(root))!r} already; leave out "
                "--val_fraction"
            )
        train, test = (CocoInstances(read_annotations(path, root, channels)) for path in (files["train"], held_out))
        _check_same_categories(train, test)
        members = np.arange(len(train)), np.arange(len(test))
    elif val_fraction is None:
        found = ", ".join(repr(str(path.relative_to(root))) for path in files.values())
        raise UserError(
            f"{str(root)!r} has annotations in {found}, which are not a training and a held-out split; add the other, "
            "or split them with --val_fraction 0.2"
        )
    elif len(files) > 1:
        found = ", ".join(repr(str(path.relative_to(root))) for path in files.values())
        raise UserError(f"--val_fraction splits a single annotation file, but {str(root)!r} has {found}; keep one")
    else:
        train = test = CocoInstances(read_annotations(next(iter(files.values())), root, channels))
        members = divided(len(train), val_fraction, seed, str(train.file.path))
    return _training(train, members[0]), InstanceSplit(test, members[1], test.file.notes)


def open_coco_training(root: Path, *, channels: int) -> InstanceSplit:
    """Open the training split of a folder, or the only one, whether or not there is another to judge on.

    Raises:
        UserError: as `annotation_files` and `read_annotations`; or if there are several and none is for training.
    """
    files = annotation_files(root)
    if "train" not in files and len(files) > 1:
        found = ", ".join(repr(str(path.relative_to(root))) for path in files.values())
        raise UserError(
            f"{str(root)!r} has annotations in {found}, none of which is for training; add a training split"
        )
    source = CocoInstances(read_annotations(files.get("train") or next(iter(files.values())), root, channels))
    return _training(source, np.arange(len(source)))


def open_coco_test(root: Path, *, channels: int) -> InstanceSplit:
    """Open the split of a folder to judge on: validation, else test, else the only one.

    Raises:
        UserError: as `annotation_files` and `read_annotations`.
    """
    files = annotation_files(root)
    path = held_out_file(files) or next(iter(files.values()))
    source = CocoInstances(read_annotations(path, root, channels))
    return InstanceSplit(source, np.arange(len(source)), source.file.notes)


def _training(source: CocoInstances, members: np.ndarray) -> InstanceSplit:
    kept, notes = source.with_instances(members), source.file.notes
    if not len(kept):
        raise UserError(f"no image for training has a usable annotation in {str(source.file.path)!r}; annotate more")
    if left_out := len(members) - len(kept):
        notes = (*notes, f"{plural(left_out, 'image')} without instances not trained on")
    return InstanceSplit(source, kept, notes)


def _check_same_categories(train: CocoInstances, test: CocoInstances) -> None:
    for one, other in ((train, test), (test, train)):
        theirs: set[Category] = set(other.categories)
        if missing := [category for category in one.categories if category not in theirs]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(
                f"category {missing[0].id} {missing[0].name!r}{more} of {str(one.file.path)!r} is not in "
                f"{str(other.file.path)!r}; both need the same categories"
            )
