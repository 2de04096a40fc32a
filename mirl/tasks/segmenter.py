"""A trained segmenter: how the options describe it, and `segmenter.safetensors` of a run, which builds it again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from mirl.data.semantic import SemanticClass
from mirl.heads.pyramid import build_plain
from mirl.heads.relative import build_relative
from mirl.heads.sliding import Inference, check, segment
from mirl.heads.upernet import Segmenter, build_segmenter
from mirl.models.weights import Weights
from mirl.tasks.settings.segmentation import ResolvedSegmentation
from mirl.tasks.trained import Facts, as_it_says, form_of, read_trained, weights_of


def segmenter_of(settings: ResolvedSegmentation, weights: Weights, classes: int, *, trained: bool = True) -> Segmenter:
    """Build the segmenter that the settings describe on an encoder of `weights`, with fresh heads.

    Args:
        trained: False leaves the encoder's weights as they were before training.

    Raises:
        UserError: if encoder and sizes do not fit.
    """
    patch, crop = settings.patch_size, settings.crop_size
    options: dict[str, Any] = {
        "patch_size": (patch, patch), "depth": weights.full_depth or weights.depth, "drop_path": settings.drop_path,
        "checkpointing": settings.checkpointing, "trained": trained, "seed": settings.seed,
    }  # fmt: skip
    if settings.relative_positions:
        encoder = build_relative(weights, image_size=(crop, crop), **options)
    else:
        encoder = build_plain(weights, **options)
    segmenter = build_segmenter(
        encoder, classes=classes, mean=weights.mean, deviation=weights.deviation, width=settings.width,
        seed=settings.seed,
    )  # fmt: skip
    check(segmenter, inference_of(settings))
    return segmenter


def inference_of(settings: ResolvedSegmentation, *, multi_scale: bool = False) -> Inference:
    """Return how a segmenter of these settings looks at an image."""
    return Inference(settings.inference, settings.image_size, settings.crop_size, settings.stride, multi_scale)


def described(weights: Weights, classes: Sequence[SemanticClass]) -> Facts:
    """Return what, beside the options, builds a segmenter: its encoder's form and its classes."""
    return {"encoder": form_of(weights), "classes": [[one.value, one.name] for one in classes]}


@dataclass(frozen=True)
class TrainedSegmenter:
    """A segmenter, in evaluation mode, with how it looks at an image: a function of images of any size.

    Attributes:
        model: UperNet on a ViT.
        classes: what labels mean: label i is `classes[i]`.
    """

    model: Segmenter
    inference: Inference
    classes: tuple[SemanticClass, ...]

    def __call__(self, image: Tensor) -> Tensor:
        """Return the class of each pixel, uint8 [h, w], of an image, uint8 [c, h, w]."""
        return segment(self.model, image, self.inference)

    @property
    def channels(self) -> int:
        """Channels of its images."""
        return len(self.model.mean)

    def to(self, device: torch.device | str) -> Self:
        """Move the model to `device`; images may be elsewhere."""
        self.model.to(device)
        return self


def load_segmenter(weights: str | Path, *, multi_scale: bool = False) -> TrainedSegmenter:
    """Return a trained segmenter: `labels = mirl.load_segmenter("runs/a")(image)`.

    Args:
        weights: run folder of mirl segment, finished or not, or its segmenter.safetensors.
        multi_scale: average six sizes of the image and their mirror images: about 17 times as slow.

    Raises:
        UserError: if there is no segmenter in it.
    """
    facts, state = read_trained(weights, "segment")
    with as_it_says(weights, "segment"):
        settings = ResolvedSegmentation(**facts["settings"])
        classes = tuple(SemanticClass(value, name) for value, name in facts["classes"])
        model = segmenter_of(settings, weights_of(facts["encoder"], state), len(classes), trained=False)
        model.load_state_dict(state)
    return TrainedSegmenter(model.eval(), inference_of(settings, multi_scale=multi_scale), classes)
