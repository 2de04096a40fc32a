"""Mask R-CNN on a plain ViT, put together from torchvision's parts. Paper: Table 4.

Two protocols: "coco_1x" (CAE's: four depths, FPN, GIoU) and "vitdet" (Li et al. 2022: the last map, squares, norms
in both heads). Images are lists of float [c, h, w] in 0..1; boxes are (x0, y0, x1, y1) in pixels of the image given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import FeaturePyramidNetwork

from mirl.heads.pyramid import SimplePyramid, ViTPyramid
from mirl.heads.regions import AlignedRoIAlign, Instances, Losses, RegionHeads
from mirl.models.patches import Size

ANCHOR_CELLS, RATIOS = 8, (0.5, 1.0, 2.0)  # an anchor's side in strides, and its height by its width
RPN_LOSSES = {"loss_objectness": "rpn_class", "loss_rpn_box_reg": "rpn_box"}  # torchvision's names and ours


@dataclass(frozen=True)
class DetectorShape:
    """What a detector has above its encoder.

    Attributes:
        classes: without background.
        width: channels of the pyramid and the heads' convolutions; fc_width: of the box head's linear layer.
        regions: sampled from each image in training.
        before_suppression: proposals of each level in training and in evaluation; after_suppression: of each image.
        protocol: which of the two published detectors.
    """

    classes: int
    width: int = 256
    fc_width: int = 1024
    regions: int = 512
    before_suppression: tuple[int, int] = (2000, 1000)
    after_suppression: tuple[int, int] = (2000, 1000)
    protocol: Literal["coco_1x", "vitdet"] = "coco_1x"


class Detector(GeneralizedRCNN):  # type: ignore[misc]
    """torchvision's two-stage detector: `images` and `targets` to losses in training, else to what is found.

    Losses: `rpn_class`, `rpn_box`, `box_class`, `box`, `mask`. Found in each image, best first: `boxes` [n, 4],
    `labels` [n] from 1, `scores` [n], and `masks`, bool [n, h, w].
    """

    def forward(self, images: list[Tensor], targets: list[Instances] | None = None) -> Losses | list[Instances]:
        result = super().forward(images, targets)
        return {RPN_LOSSES.get(name, name): loss for name, loss in result.items()} if self.training else result


def build_detector(
    encoder: nn.Module,
    shape: DetectorShape,
    *,
    image_size: int,
    largest: int,
    mean: Sequence[float],
    deviation: Sequence[float],
    seed: int = 0,
) -> Detector:
    """Build a detector on `encoder`, of `build_plain` or `build_windowed`; its own weights are drawn from `seed`.

    Training takes images as they are. In evaluation they are scaled.

    Args:
        image_size: pixels of the shorter side in evaluation; in vitdet of the longer, and of the padded square.
        largest: pixels that the longer side is kept to; vitdet does not read it.
        mean, deviation: by which images are normalised, one number per channel.

    Raises:
        UserError: if the encoder's patches have no quarter.
    """
    vitdet = shape.protocol == "vitdet"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pyramid = SimplePyramid(encoder, shape.width) if vitdet else ViTPyramid(encoder)
        backbone = Backbone(pyramid, None if vitdet else FeaturePyramidNetwork(pyramid.channels, shape.width))
        fit = FitImages(
            image_size, image_size if vitdet else largest, list(mean), list(deviation),
            size_divisible=2 * pyramid.patch_size, fixed_size=(image_size, image_size) if vitdet else None,
        )  # fmt: skip
        return Detector(backbone, _proposals(shape, backbone.strides), _regions(shape, pyramid.strides), fit)


class Backbone(nn.Module):
    """Images [b, c, h, w] to maps "0" to "3", finest first, and "pool", every second position of the last.

    All have `width` channels [b, width, h / stride, w / stride]. `fpn`, if given, mixes the pyramid's maps.
    """

    def __init__(self, pyramid: ViTPyramid | SimplePyramid, fpn: FeaturePyramidNetwork | None) -> None:
        super().__init__()
        self.pyramid, self.fpn = pyramid, fpn
        self.strides = (*pyramid.strides, 2 * pyramid.strides[-1])

    @property
    def encoder(self) -> nn.Module:
        """The timm model."""
        return self.pyramid.encoder

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = {str(level): map_ for level, map_ in enumerate(self.pyramid(images))}
        if self.fpn is not None:
            maps = self.fpn(maps)
        return {**maps, "pool": F.max_pool2d(maps["3"], kernel_size=1, stride=2)}


class Anchors(AnchorGenerator):  # type: ignore[misc]
    """One size of anchor for each map, in float32, at known strides.

    torchvision's own would take the maps' precision (bfloat16 knows multiples of 4 only from 512 pixels on), and would
    guess strides from sizes, wrongly where the last map has an odd side.
    """

    def __init__(self, strides: Sequence[int]) -> None:
        super().__init__(tuple((ANCHOR_CELLS * stride,) for stride in strides), (RATIOS,) * len(strides))
        self.strides = tuple(strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the same anchors [n, 4] for each image."""
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        strides = [[stride] * 2 for stride in self.strides]  # numbers serve as well as the tensors of torchvision
        anchors = torch.cat(self.grid_anchors([maps.shape[-2:] for maps in feature_maps], strides))
        return [anchors] * len(image_list.image_sizes)


class ProposalHead(RPNHead):  # type: ignore[misc]
    """torchvision's head with results in float32, because boxes are computed in their precision."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return objectness [b, a, h, w] and offsets [b, 4a, h, w] of the a anchors on each map."""
        logits, offsets = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in offsets]


class FitImages(GeneralizedRCNNTransform):  # type: ignore[misc]
    """Normalise images and pad them to a common size; in evaluation scale them before, and what is found back.

    With `fixed_size` (height, width) all batches have that size.
    """

    def resize(self, image: Tensor, target: Instances | None = None) -> tuple[Tensor, Instances | None]:
        """Scale the shorter side to `min_size`, but the longer to `max_size` at most, without aliasing."""
        if self.training:  # scaled with their targets by the data workers
            return image, target
        height, width = image.shape[-2:]
        scale = min(self.min_size[-1] / min(height, width), self.max_size / max(height, width))
        size = [max(1, round(scale * side)) for side in (height, width)]
        return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0], target

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """Pad with zeros, the mean, at the right and below, and stack: [b, c, h, w]."""
        height, width = self.fixed_size or [
            -(-max(image.shape[side] for image in images) // size_divisible) * size_divisible for side in (1, 2)
        ]
        assert all(image.shape[1] <= height and image.shape[2] <= width for image in images), (height, width)
        return torch.stack([F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images])

    def postprocess(
        self, result: list[Instances], image_shapes: list[Size], original_image_sizes: list[Size]
    ) -> list[Instances]:
        """Scale what was found to the images that were given; masks become bool [n, h, w]."""
        for found, shape, original in zip(result, image_shapes, original_image_sizes, strict=False):  # none in training
            found["boxes"] = resize_boxes(found["boxes"], shape, original)
            found["masks"] = paste_masks(found["masks"], found["boxes"], original)
        return result


def paste_masks(masks: Tensor, boxes: Tensor, size: Size) -> Tensor:
    """Return where masks [n, 1, s, s] over `boxes` [n, 4] are at least half, for each pixel's centre: bool [n, h, w].

    Outside its box a mask is zero, towards which the outermost half cell fades. One mask is interpolated at a time,
    within its box, so that the memory beside the result's is that of one image.
    """
    result = torch.zeros(len(masks), *size, dtype=torch.bool, device=masks.device)
    for mask, (x0, y0, x1, y1), pasted in zip(masks, boxes.tolist(), result, strict=True):
        rows, columns = _pixels(y0, y1, size[0]), _pixels(x0, x1, size[1])
        if not (len(rows) and len(columns)):
            continue
        y = torch.arange(rows.start, rows.stop, device=masks.device) + 0.5
        x = torch.arange(columns.start, columns.stop, device=masks.device) + 0.5
        y, x = 2 * (y - y0) / (y1 - y0) - 1, 2 * (x - x0) / (x1 - x0) - 1
        grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
        share = F.grid_sample(mask[None], grid[None], align_corners=False)[0, 0]
        pasted[rows.start : rows.stop, columns.start : columns.stop] = share >= 0.5
    return result


def _pixels(first: float, last: float, count: int) -> range:
    """Return the pixels of `count` that have a part between two coordinates."""
    return range(max(0, math.floor(first)), min(count, math.ceil(last)))


def _proposals(shape: DetectorShape, strides: Sequence[int]) -> RegionProposalNetwork:
    """Build the first stage, with the thresholds that both protocols share."""
    depth = 2 if shape.protocol == "vitdet" else 1
    numbers = ("training", "testing")
    return RegionProposalNetwork(
        Anchors(strides), ProposalHead(shape.width, len(RATIOS), depth), fg_iou_thresh=0.7, bg_iou_thresh=0.3,
        batch_size_per_image=256, positive_fraction=0.5, nms_thresh=0.7,
        pre_nms_top_n=dict(zip(numbers, shape.before_suppression, strict=True)),
        post_nms_top_n=dict(zip(numbers, shape.after_suppression, strict=True)),
    )  # fmt: skip


def _regions(shape: DetectorShape, strides: Sequence[int]) -> RegionHeads:
    """Build the second stage: four convolutions each for boxes and masks, both predicted for every class."""
    vitdet, convolutions, classes = shape.protocol == "vitdet", [shape.width] * 4, shape.classes + 1
    predictor = FastRCNNPredictor(shape.fc_width, classes)
    for layer, deviation in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):  # all published detectors'
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)
    return RegionHeads(
        giou=not vitdet,
        box_roi_pool=AlignedRoIAlign(strides, 7),
        box_head=FastRCNNConvFCHead((shape.width, 7, 7), convolutions, [shape.fc_width], norm_layer=LayerNorm2d),
        box_predictor=predictor,
        mask_roi_pool=AlignedRoIAlign(strides, 14),
        mask_head=MaskRCNNHeads(shape.width, convolutions, 1, norm_layer=LayerNorm2d if vitdet else None),
        mask_predictor=MaskRCNNPredictor(shape.width, shape.width, classes),
        fg_iou_thresh=0.5, bg_iou_thresh=0.5, batch_size_per_image=shape.regions, positive_fraction=0.25,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0), score_thresh=0.05, nms_thresh=0.5, detections_per_img=100,
    )  # fmt: skip
