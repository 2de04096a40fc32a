"""The second stage of Mask R-CNN: classes, boxes and masks of proposed regions, and their losses.

torchvision's sampling and suppression, with what the protocols have and torchvision lacks: RoIAlign without its old
half-pixel shift, and their box losses. Symbols: r regions of a batch, c channels of the maps, k classes with the
background, s a mask's side.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, box_area, generalized_box_iou_loss, roi_align

Losses = dict[str, Tensor]
Instances = dict[str, Tensor]  # of one image, by torchvision's names
GIOU_WEIGHT = 10.0  # CAE's


class AlignedRoIAlign(MultiScaleRoIAlign):  # type: ignore[misc]
    """RoIAlign on a pyramid of known strides, without the shift by half a pixel; samples as dense as the map's cells.

    A box is read from the map on which it spans 14 to 28 cells: 112 to 224 pixels at stride 8. Paper: Lin et al. 2017
    (FPN), Eq. (1), with 224 pixels at stride 16.

    Args:
        strides: of the maps "0", "1", ..., in pixels; size: cells of the result's side.
    """

    def __init__(self, strides: Sequence[int], size: int) -> None:
        super().__init__([str(level) for level in range(len(strides))], size, sampling_ratio=0)
        self.strides = tuple(strides)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Return [r, c, size, size] for `boxes` of each image [n, 4], in pixels of the padded images."""
        maps = [x[name] for name in self.featmap_names]
        images = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        regions = torch.cat([images, torch.cat(boxes)], dim=1)
        levels = self.levels(regions[:, 1:])
        result = maps[0].new_zeros(len(regions), maps[0].shape[1], *self.output_size)
        for level, (cells, stride) in enumerate(zip(maps, self.strides, strict=True)):
            members = torch.where(levels == level)[0]
            read = roi_align(cells, regions[members], self.output_size, 1 / stride, self.sampling_ratio, aligned=True)
            result[members] = read.to(result.dtype)
        return result

    def levels(self, boxes: Tensor) -> Tensor:
        """Return the index of the map for each of `boxes` [r, 4]."""
        level = torch.log2(box_area(boxes).sqrt() / (14 * self.strides[0]) + 1e-6).floor()
        return level.clamp(0, len(self.strides) - 1).long()


class RegionHeads(RoIHeads):  # type: ignore[misc]
    """torchvision's second stage with own losses.

    Args:
        giou: compare boxes by ten times 1 - GIoU (CAE); else their encoded offsets by absolute errors (ViTDet).
        parts: torchvision's arguments.
    """

    def __init__(self, *, giou: bool, **parts: Any) -> None:
        super().__init__(**parts)
        self.giou = giou

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], Losses]:
        """Return what is found in each image, or in training the losses `box_class`, `box` and `mask`.

        Masks found are probabilities [n, 1, s, s] within their boxes.
        """
        if self.training:
            assert targets is not None
            return [], self.losses(features, proposals, image_shapes, targets)
        return self.detections(features, proposals, image_shapes), {}

    def losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        shapes: list[tuple[int, int]],
        targets: list[Instances],
    ) -> Losses:
        """Sample regions, with the targets' own boxes among them, and compare; in float32 under autocast too."""
        proposals, matches, labels, _ = self.select_training_samples(proposals, targets)
        logits, offsets = self.boxes(features, proposals, shapes)
        objects = [torch.where(of_image > 0)[0] for of_image in labels]
        matches = [match[which] for match, which in zip(matches, objects, strict=True)]
        classes = torch.cat(labels)
        positive = torch.where(classes > 0)[0]
        regions = [boxes[which] for boxes, which in zip(proposals, objects, strict=True)]
        true = torch.cat([t["boxes"][match] for t, match in zip(targets, matches, strict=True)])
        offsets = offsets.unflatten(1, (-1, 4))[positive, classes[positive]]
        count = max(1, len(classes))
        return {
            "box_class": F.cross_entropy(logits, classes, reduction="sum") / count,
            "box": self.box_loss(offsets, torch.cat(regions), true) / count,
            "mask": mask_loss(self.masks(features, regions, shapes), classes[positive], regions, targets, matches),
        }

    def box_loss(self, offsets: Tensor, regions: Tensor, true: Tensor) -> Tensor:
        """Return the summed error of `offsets` [n, 4], which should make boxes `true` [n, 4] of `regions` [n, 4]."""
        if self.giou:
            boxes = self.box_coder.decode_single(offsets, regions)
            return GIOU_WEIGHT * generalized_box_iou_loss(boxes, true, reduction="sum")
        return F.l1_loss(offsets, self.box_coder.encode_single(true, regions), reduction="sum")

    def detections(
        self, features: dict[str, Tensor], proposals: list[Tensor], shapes: list[tuple[int, int]]
    ) -> list[Instances]:
        """Return boxes after suppression, best first, with their classes, scores and masks."""
        logits, offsets = self.boxes(features, proposals, shapes)
        boxes, scores, labels = self.postprocess_detections(logits, offsets, proposals, shapes)
        masks = self.masks(features, boxes, shapes)
        classes = torch.cat(labels)
        masks = of_own_class(masks, classes)[:, None].sigmoid()
        found = zip(boxes, labels, scores, masks.split([len(b) for b in boxes]), strict=True)
        return [{"boxes": b, "labels": n, "scores": s, "masks": m} for b, n, s, m in found]

    def boxes(
        self, features: dict[str, Tensor], regions: list[Tensor], shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Return class logits [r, k] and offsets of each class's box [r, 4k]."""
        read = self.box_roi_pool(features, regions, shapes)
        logits, offsets = self.box_predictor(self.box_head(read))
        return logits.float(), offsets.float()

    def masks(self, features: dict[str, Tensor], regions: list[Tensor], shapes: list[tuple[int, int]]) -> Tensor:
        """Return mask logits [r, k, s, s], under autocast of its precision; see `of_own_class`."""
        read = self.mask_roi_pool(features, regions, shapes)
        logits: Tensor = self.mask_predictor(self.mask_head(read))
        return logits


def of_own_class(logits: Tensor, classes: Tensor) -> Tensor:
    """Pick from [r, k, s, s] the masks of `classes` [r]: float32 [r, s, s]."""
    picked = logits[torch.arange(len(classes), device=classes.device), classes]
    return picked.float()  # not before, for memory: there may be 80 others


def mask_loss(
    logits: Tensor, classes: Tensor, regions: list[Tensor], targets: list[Instances], matches: list[Tensor]
) -> Tensor:
    """Return the cross-entropy of each region's mask of its own class, the mean over pixels and regions.

    Args:
        logits: [n, k, s, s] of all images' regions; classes: [n]; matches: index of each image's regions' objects.
    """
    size = logits.shape[-1]
    true = torch.cat([
        crop_masks(target["masks"], boxes, match, size)
        for target, boxes, match in zip(targets, regions, matches, strict=True)
    ])  # fmt: skip
    own = of_own_class(logits, classes)
    return F.binary_cross_entropy_with_logits(own, true, reduction="sum") / max(1, true.numel())


def crop_masks(masks: Tensor, boxes: Tensor, objects: Tensor, size: int) -> Tensor:
    """Return what of the masks [m, h, w] of `objects` [n] lies in `boxes` [n, 4]: 0 or 1, float32 [n, size, size]."""
    if not len(boxes):
        return boxes.new_zeros(0, size, size)
    used, objects = objects.unique(return_inverse=True)
    regions = torch.cat([objects[:, None].to(boxes), boxes], dim=1)
    read = roi_align(masks[used, None].to(boxes), regions, (size, size), 1.0, sampling_ratio=0, aligned=True)
    return (read[:, 0] >= 0.5).to(boxes)
