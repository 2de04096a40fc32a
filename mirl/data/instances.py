"""Images with instances, their boxes, classes and masks: COCO folders, or the built-in shapes.

Boxes are x0, y0, x1, y1 in pixels, x1 and y1 exclusive. Label k stands for `categories[k - 1]`; 0 is background, as in
torchvision. Symbols: n instances, c channels, h and w image height and width.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from mirl.data.loading import Views
from mirl.data.opening import folder_in, shapes_in, split_shapes
from mirl.data.padding import PaddedBatch
from mirl.data.run_lengths import encode_mask
from mirl.data.shapes import CLASSES, Shapes
from mirl.data.sources import Source

HOLDS = "COCO annotations and images"


@dataclass(frozen=True)
class Category:
    """A class of objects by the number and the name that its annotation file gives it."""

    id: int
    name: str


@dataclass(frozen=True, kw_only=True)
class Instances:
    """The objects of an image.

    Attributes:
        boxes: float32 [n, 4].
        labels: int64 [n], from 1 on.
        masks: uint8 [n, h, w], 0 or 1.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.boxes)

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Apply `change` to every tensor."""
        return replace(self, **{field.name: change(getattr(self, field.name)) for field in fields(self)})

    def target(self) -> dict[str, Tensor]:
        """Return what torchvision's detectors take."""
        return {"boxes": self.boxes, "labels": self.labels, "masks": self.masks}


class InstanceSource(Source, Protocol):
    """Images with instances, by index."""

    categories: tuple[Category, ...]

    def read_instances(self, index: int) -> tuple[Tensor, Instances]:
        """Return the image, uint8 [c, h, w], and its instances, crowds left out, or raise `BadImage`."""
        ...

    def image_id(self, index: int) -> int:
        """Return the image's number in the annotation file."""
        ...

    def truth(self, members: Iterable[int]) -> dict[str, Any]:
        """Return the annotations of these images, crowds included, as COCO's JSON: what an evaluation compares with."""
        ...


@dataclass(frozen=True)
class InstanceSplit:
    """Images to train on, or to judge on.

    Attributes:
        members: indices into `source` of the images that belong to this split.
        notes: what was left out of it, a line each.
    """

    source: InstanceSource
    members: np.ndarray
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.members)


class ShapeInstances:
    """The built-in shapes as a source of instances: one in each image."""

    categories = tuple(Category(number, name) for number, name in enumerate(CLASSES, start=1))

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

    def read_instances(self, index: int) -> tuple[Tensor, Instances]:
        """Return the image, uint8 [3, h, w], and its instance."""
        sample = self.shapes.sample(index)
        boxes, masks = torch.from_numpy(sample.boxes), torch.from_numpy(sample.masks.astype(np.uint8))
        instances = Instances(boxes=boxes, labels=torch.tensor([1 + sample.label]), masks=masks)
        return torch.from_numpy(sample.image).permute(2, 0, 1), instances

    def image_id(self, index: int) -> int:
        """Return the index."""
        return index

    def truth(self, members: Iterable[int]) -> dict[str, Any]:
        """Return these images' instances as COCO's JSON."""
        height, width = self.shapes.size
        images, annotations = [], []
        for index in map(int, members):
            images.append({"id": index, "file_name": self.name_of(index), "height": height, "width": width})
            _, instances = self.read_instances(index)
            x0, y0, x1, y1 = instances.boxes[0].tolist()
            annotations.append({
                "id": index + 1, "image_id": index, "category_id": int(instances.labels[0]), "iscrowd": 0,
                "bbox": [x0, y0, x1 - x0, y1 - y0], "area": float(instances.masks.sum()),
                "segmentation": encode_mask(instances.masks[0].numpy()),
            })  # fmt: skip
        categories = [{"id": category.id, "name": category.name} for category in self.categories]
        return {"images": images, "annotations": annotations, "categories": categories}


def open_instances(
    data: str, *, channels: int = 3, val_fraction: float | None = None, seed: int = 0
) -> tuple[InstanceSplit, InstanceSplit]:
    """Open what `--data` names as a training split and a held-out split of the same categories.

    Images without an instance to learn from are left out of the training split.

    Args:
        data: a folder in one of the layouts of COCO's annotations (see `mirl.data.coco_layout`), or
            `shapes[:COUNT[:PIXELS]]`, whose held-out split is a quarter as large.
        channels: channels of every image.
        val_fraction: share of the images, at least one, that is held out where there is a single annotation file;
            drawn with `seed`.

    Raises:
        UserError: if there is nothing like that, or nothing to learn from in it.
    """
    if shapes := split_shapes(data, channels, val_fraction):
        return _whole(shapes[0]), _whole(shapes[1])
    from mirl.data.coco import open_coco_splits

    return open_coco_splits(folder_in(data, HOLDS), channels=channels, val_fraction=val_fraction, seed=seed)


def open_instance_training(data: str, *, channels: int = 3) -> InstanceSplit:
    """Open the images to train on, whether or not there are others to judge on.

    Raises:
        UserError: as `open_instances`.
    """
    if shapes := shapes_in(data, channels):
        return _whole(shapes)
    from mirl.data.coco import open_coco_training

    return open_coco_training(folder_in(data, HOLDS), channels=channels)


def open_instance_test(data: str, *, channels: int = 3) -> InstanceSplit:
    """Open the images to judge a detector on: the validation split, else the test split, else all there is.

    Raises:
        UserError: as `open_instances`.
    """
    if shapes := shapes_in(data, channels, "val"):
        return _whole(shapes)
    from mirl.data.coco import open_coco_test

    return open_coco_test(folder_in(data, HOLDS), channels=channels)


def _whole(shapes: Shapes) -> InstanceSplit:
    return InstanceSplit(ShapeInstances(shapes), np.arange(len(shapes)))


@dataclass(frozen=True, kw_only=True)
class InstanceBatch(PaddedBatch):
    """Images and their instances, not padded, of each image."""

    instances: tuple[Instances, ...]

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Apply `change` to every tensor, those of the instances too."""
        return replace(self._changed(change), instances=tuple(one.map(change) for one in self.instances))

    def part(self, images: slice) -> Self:
        """Return the batch of these images, padded as before."""
        return replace(super().part(images), instances=self.instances[images])

    @classmethod
    def joined(cls, batches: Sequence[Self]) -> Self:
        """Return one batch of all images of `batches`; `bad` is the first's."""
        return replace(super().joined(batches), instances=tuple(one for batch in batches for one in batch.instances))


View = Callable[[Tensor, Instances], tuple[Tensor, Instances]]


class InstanceViews(Views):
    """Views with their instances; without a `view`, the images as they are. The others are those of `Views`."""

    source: InstanceSource

    def __init__(self, source: InstanceSource, members: np.ndarray, view: View | None = None, **options: Any) -> None:
        super().__init__(source, members, view or _unchanged, **options)

    def _open(self, member: int) -> tuple[Tensor, Instances]:
        image, instances = self.source.read_instances(member)
        return self._checked(image), instances

    def _batch(self, sample: tuple[Tensor, Instances], member: int) -> InstanceBatch:
        image, instances = self.view(*sample)
        return InstanceBatch(
            images=image[None],
            sizes=torch.tensor([image.shape[-2:]]),
            indices=torch.tensor([member]),
            instances=(instances,),
        )


def _unchanged(image: Tensor, instances: Instances) -> tuple[Tensor, Instances]:
    return image, instances
