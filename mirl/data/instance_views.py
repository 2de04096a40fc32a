"""Random views of an image and its instances for training detectors, and the size an image has when they are judged.

A view cuts a part out, resizes it once (images antialiased, masks by the nearest pixel) and drops the instances of
which nothing is left. An image may be left with none. Symbols: h and w image height and width; all sizes in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from mirl.data.instances import Instances, View
from mirl.data.resizing import nearest, resized_size
from mirl.models.patches import Size

# DETR's and mmdet's numbers for COCO in units of its image size, 800: 480, 512 ... 800; 400, 500 or 600; 384 to 600.
SIDE_STEPS = 25
SHORTER_SIDES = (15, 26)
SIDES_OF_CROPPED = (0.5, 0.625, 0.75)
CROP = (0.48, 0.75)
JITTER = (0.1, 2.0)
SMALLEST_BOX = 1.0


def coco_view(image_size: int, largest: int, *, flip: bool) -> View:
    """Flip half of the time, cut a part out half of the time, and resize to one of several sizes.

    The part is 0.48 to 0.75 of `image_size` high and wide in an image whose shorter side is 0.5 to 0.75 of it. DETR
    resizes the image, cuts, and resizes again; this is done at once here.

    Args:
        image_size: shorter side at evaluation; in training 0.6 to 1 times that.
        largest: most that the longer side may have.
    """
    sides = [max(1, image_size * step // SIDE_STEPS) for step in range(*SHORTER_SIDES)]
    return partial(_coco_view, image_size=image_size, sides=sides, largest=largest, flip=flip)


def jitter_view(image_size: int, *, flip: bool) -> View:
    """Flip half of the time, resize the longer side to 0.1 to 2 times `image_size`, and cut out that square at most.

    Large-scale jitter. What is smaller than the square is not padded: the model does this, as it does at evaluation.
    """
    return partial(_jitter_view, image_size=image_size, flip=flip)


def whole_view(image_size: int, largest: int) -> View:
    """Resize as at evaluation, and nothing else."""
    return partial(_whole_view, image_size=image_size, largest=largest)


def _coco_view(
    image: Tensor, instances: Instances, *, image_size: int, sides: Sequence[int], largest: int, flip: bool
) -> tuple[Tensor, Instances]:
    scene = _Scene.of(image, instances)
    if flip and _integer(0, 1):
        scene = scene.flipped()
    if _integer(0, 1):
        scale = SIDES_OF_CROPPED[_integer(0, len(SIDES_OF_CROPPED) - 1)] * image_size / min(scene.size)
        scene = scene.part([_crop_side(side * scale, image_size) / scale for side in scene.size])
    return scene.resized(resized_size(*scene.size, sides[_integer(0, len(sides) - 1)], largest))


def _jitter_view(image: Tensor, instances: Instances, *, image_size: int, flip: bool) -> tuple[Tensor, Instances]:
    scene = _Scene.of(image, instances)
    if flip and _integer(0, 1):
        scene = scene.flipped()
    scale = image_size / max(scene.size) * float(torch.empty(()).uniform_(*JITTER))
    scene = scene.part([image_size / scale] * 2)
    height, width = (min(image_size, max(1, round(side * scale))) for side in scene.size)
    return scene.resized((height, width))


def _whole_view(image: Tensor, instances: Instances, *, image_size: int, largest: int) -> tuple[Tensor, Instances]:
    scene = _Scene.of(image, instances)
    return scene.resized(resized_size(*scene.size, image_size, largest))


def _crop_side(side: float, image_size: int) -> float:
    """Draw the length of a part of an image's `side`."""
    low, high = (min(side, share * image_size) for share in CROP)
    return low + (high - low) * float(torch.rand(()))


@dataclass(frozen=True)
class _Scene:
    """An image with the instances in it, which change together.

    Attributes:
        image: uint8 [c, h, w].
        boxes: [n, 4].
        masks: uint8 [n, h, w].
        labels: int64 [n].
    """

    image: Tensor
    boxes: Tensor
    masks: Tensor
    labels: Tensor

    @classmethod
    def of(cls, image: Tensor, instances: Instances) -> Self:
        boxes = tv_tensors.BoundingBoxes(instances.boxes, format="XYXY", canvas_size=image.shape[-2:])
        return cls(image, boxes, instances.masks, instances.labels)

    @property
    def size(self) -> Size:
        height, width = self.image.shape[-2:]
        return height, width

    def flipped(self) -> Self:
        return self._changed(F.horizontal_flip)

    def part(self, size: Sequence[float]) -> Self:
        """Cut a part of `size`, in whole pixels and at most all, out of a random place."""
        height, width = (min(whole, max(1, round(side))) for whole, side in zip(self.size, size, strict=True))
        top, left = _integer(0, self.size[0] - height), _integer(0, self.size[1] - width)
        # Masks that were cut away need no resizing.
        return self._changed(F.crop, top, left, height, width)._with_boxes_from(1e-3)

    def resized(self, size: Size) -> tuple[Tensor, Instances]:
        """Return the image and the instances of which something is left at this size."""
        image, boxes = (F.resize(part, list(size), antialias=True) for part in (self.image, self.boxes))
        scene = type(self)(image, boxes, nearest(self.masks, size), self.labels)._with_boxes_from(SMALLEST_BOX)
        left = scene.masks.flatten(1).any(1).bool()  # of uint8 it is uint8
        instances = Instances(boxes=scene.boxes.as_subclass(Tensor), labels=scene.labels, masks=scene.masks)
        return image, instances if left.all() else instances.map(lambda tensor: tensor[left])

    def _changed(self, change: Any, *how: int) -> Self:
        image, boxes, masks = (change(part, *how) for part in (self.image, self.boxes, self.masks))
        return replace(self, image=image, boxes=boxes, masks=masks)

    def _with_boxes_from(self, side: float) -> Self:
        left = (self.boxes[:, 2:] - self.boxes[:, :2] >= side).all(1)
        if left.all():
            return self
        boxes = tv_tensors.wrap(self.boxes[left], like=self.boxes)
        return replace(self, boxes=boxes, masks=self.masks[left], labels=self.labels[left])


def _integer(low: int, high: int) -> int:
    """Draw a whole number from `low` to `high`, both included."""
    return int(torch.randint(low, high + 1, ()))
