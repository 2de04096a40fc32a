"""A trained detector on disk: `detector.safetensors` of a run, with everything that builds it again."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirl.data.instances import Category
from mirl.formats.graphs import save_onnx
from mirl.heads.mask_rcnn import Detector, DetectorShape, build_detector
from mirl.heads.pyramid import build_plain, build_windowed, unfuse
from mirl.models.weights import Weights
from mirl.tasks.settings.detection import ResolvedDetection
from mirl.tasks.trained import Facts, as_it_says, form_of, read_trained, weights_of
from mirl.training.runs import console


def detector_of(settings: ResolvedDetection, weights: Weights, classes: int, *, trained: bool = True) -> Detector:
    """Build the detector that the settings describe on an encoder of `weights`, with fresh heads.

    Args:
        classes: without background.
        trained: False leaves the encoder's weights as they were before training.

    Raises:
        UserError: if the encoder does not suit the protocol or the sizes.
    """
    size, patch = settings.image_size, settings.patch_size
    options: dict[str, Any] = {
        "patch_size": (patch, patch), "depth": weights.full_depth or weights.depth, "drop_path": settings.drop_path,
        "checkpointing": settings.checkpointing, "trained": trained, "seed": settings.seed,
    }  # fmt: skip
    if settings.protocol == "vitdet":
        encoder = build_windowed(weights, image_size=(size, size), window=settings.window, **options)
    else:
        encoder = build_plain(weights, **options)
    shape = DetectorShape(
        classes, settings.width, regions=settings.regions, after_suppression=settings.proposals,
        protocol=settings.protocol,
    )  # fmt: skip
    return build_detector(
        encoder, shape, image_size=size, largest=settings.largest, mean=weights.mean, deviation=weights.deviation,
        seed=settings.seed,
    )  # fmt: skip


def described(weights: Weights, categories: Sequence[Category]) -> Facts:
    """Return what, beside the options, builds a detector: its encoder's form and its categories."""
    return {
        "encoder": form_of(weights),
        "categories": [[category.id, category.name] for category in categories],
    }


def load_detector(weights: str | Path) -> tuple[Detector, tuple[Category, ...]]:
    """Return a trained detector, in evaluation mode, and its categories: label k is the category k - 1.

    The detector maps a list of images, float [c, h, w] in 0..1 and of any sizes, to torchvision's dicts: `boxes` [n, 4]
    in pixels, `labels` [n], `scores` [n], and `masks`, bool [n, h, w], best first.

    Args:
        weights: run folder of mirl detect, finished or not, or its detector.safetensors.

    Raises:
        UserError: if there is no detector in it.
    """
    facts, state = read_trained(weights, "detect")
    with as_it_says(weights, "detect"):
        settings = ResolvedDetection(**facts["settings"])
        categories = tuple(Category(number, name) for number, name in facts["categories"])
        model = detector_of(settings, weights_of(facts["encoder"], state), len(categories), trained=False)
        model.load_state_dict(state)
    return model.eval(), categories


def write_backbone(detector: Detector, path: Path) -> Path:
    """Write what a detector makes of images, before its heads, to ONNX: [b, c, h, w], normalised, to five maps.

    Height and width are those of the largest image in evaluation, the number of images is free.
    """
    fit = detector.transform
    height, width = fit.fixed_size or (fit.min_size[-1], fit.max_size)
    height, width = (math.ceil(side / fit.size_divisible) * fit.size_divisible for side in (height, width))
    example = torch.zeros(2, len(fit.image_mean), height, width)
    maps = [f"stride_{stride}" for stride in detector.backbone.strides]
    about = {"backbone": detector.backbone.encoder.embed_dim, "mean": fit.image_mean, "deviation": fit.image_std}
    unfuse(detector.backbone)
    opset = save_onnx(_Maps(detector.backbone).eval(), path, example, maps, about)
    statistics = " and ".join(f"[{', '.join(f'{v:g}' for v in values)}]" for values in (fit.image_mean, fit.image_std))
    console.print(
        f"saved {path} ({opset}): images [b, {example.shape[1]}, {height}, {width}], of 0..1 normalised by mean and "
        f"deviation {statistics}, to {', '.join(maps)}",
        markup=False,
    )
    return path


class _Maps(torch.nn.Module):
    """A detector's backbone with its maps as a tuple, which a graph can return."""

    def __init__(self, backbone: torch.nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(images).values())
