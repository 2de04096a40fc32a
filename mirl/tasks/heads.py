"""What tasks share that train heads on a pre-trained encoder: its rates fall with depth, and what is said of it."""

from typing import Any

import torch

from mirl.data.instances import InstanceSplit
from mirl.data.loading import B
from mirl.data.semantic import SemanticSplit
from mirl.errors import plural
from mirl.models.weights import Weights
from mirl.tasks.run import RunnableTask
from mirl.tasks.settings.detection import ResolvedDetection
from mirl.tasks.settings.segmentation import ResolvedSegmentation
from mirl.training.optimizers import adamw

Settings = ResolvedDetection | ResolvedSegmentation
Split = InstanceSplit | SemanticSplit
BETAS = (0.9, 0.999)
TRAINING, HELD_OUT = 0, 1  # streams of random numbers


class HeadTask(RunnableTask[B]):
    """Heads and the encoder under them.

    Args:
        settings: resolved; weights: of the encoder; train, val: splits of the same classes.
    """

    held_out_batch = 1  # images of any size: padded to each other they could be gigabytes

    def __init__(self, settings: Settings, weights: Weights, train: Split, val: Split) -> None:
        self.settings, self.weights, self.train, self.val = settings, weights, train, val
        self.samples = len(train) + (0 if val is train else len(val))  # the same images with --overfit

    def optimizer(self) -> torch.optim.Optimizer:
        """Build AdamW with a rate that decays from the heads down to the patch embedding."""
        s = self.settings
        encoder: Any = self.encoder
        return adamw(
            self.model, lr=s.peak_rate, weight_decay=s.weight_decay, betas=BETAS, fused=s.precision != "16",
            layer_decay=s.layer_decay, encoder=encoder,
        )  # fmt: skip

    def names(self, batch: B) -> list[str]:
        return [self.train.source.name_of(int(index)) for index in batch.indices]

    def notes(self) -> list[str]:
        """Return what was found in the data and done to the encoder, for the lines before the first step."""
        s, w = self.settings, self.weights
        if s.overfit is None:
            splits = {"training": self.train, "held out": self.val}
            found = [f"{name}: {note}" for name, split in splits.items() for note in split.notes]
        else:
            images = plural(s.overfit, "image")
            found = [f"trained and tested on the same {images}, unchanged (--overfit)", *self.train.notes]
        if w.full_depth and w.full_depth > w.depth:
            fresh = plural(w.full_depth - w.depth, "fresh block")
            found.append(f"the encoder has {plural(w.depth, 'block')}: {fresh} on top")
        if s.untrained:
            found.append("nothing of the encoder's weights is used but their form (--untrained)")
        if s.patch_size != w.patch_size[0]:
            found.append(f"patch embedding resampled from {w.patch_size} to {s.patch_size}")
        return found
