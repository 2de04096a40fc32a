"""What tasks share that train heads on a pre-trained encoder: its rates fall with depth, and what is said of it."""

from typing import cast

import torch
from timm.models import VisionTransformer

from mirl.data.instances import InstanceSplit
from mirl.data.labels import LabelledSource
from mirl.data.loading import B
from mirl.data.semantic import SemanticSplit
from mirl.errors import plural
from mirl.models.patches import pair
from mirl.models.weights import Weights
from mirl.tasks.run import RunnableTask
from mirl.tasks.settings.detection import ResolvedDetection
from mirl.tasks.settings.finetuning import ResolvedFinetuning
from mirl.tasks.settings.segmentation import ResolvedSegmentation
from mirl.training.optimizers import adamw

Dense = ResolvedDetection | ResolvedSegmentation
Noted = InstanceSplit | SemanticSplit
Split = Noted | LabelledSource
BETAS = (0.9, 0.999)


class HeadTask(RunnableTask[B]):
    """Heads and the encoder under them.

    Args:
        settings: resolved; weights: of the encoder; train, val: splits of the same classes.
    """

    settings: Dense | ResolvedFinetuning
    train: Split
    val: Split

    def __init__(self, settings: Dense | ResolvedFinetuning, weights: Weights, train: Split, val: Split) -> None:
        self.settings, self.weights, self.train, self.val = settings, weights, train, val
        self.samples = len(train) + (0 if val is train else len(val))  # the same images with --overfit

    def optimizer(self) -> torch.optim.Optimizer:
        """Build AdamW with a rate that decays from the heads down to the patch embedding."""
        s, encoder = self.settings, self.encoder
        return adamw(
            self.model, lr=s.peak_rate, weight_decay=s.weight_decay, betas=BETAS, fused=s.precision != "16",
            layer_decay=s.layer_decay, encoder=None if encoder is self.model else encoder,
        )  # fmt: skip

    def names(self, batch: B) -> list[str]:
        return [self.train.source.name_of(int(index)) for index in batch.indices]

    def notes(self) -> list[str]:
        """Return what was done to the encoder, for the lines before the first step."""
        s, w, encoder = self.settings, self.weights, cast(VisionTransformer, self.encoder)
        depth, patch_size = len(encoder.blocks), pair(s.patch_size)
        found = []
        if s.untrained:
            found.append("nothing of the weights is used but their form (--untrained)")
        if depth != w.depth:
            more = plural(depth - w.depth, "fresh block")
            kind = f"{more} on top" if depth > w.depth else f"its first {plural(depth, 'block')}"
            found.append(f"the encoder has {plural(w.depth, 'block')}: {kind}")
        if patch_size != w.patch_size:
            found.append(f"patch embedding resampled from {w.patch_size} to {patch_size}")
        return found


def notes_on_data(settings: Dense, train: Noted, val: Noted) -> list[str]:
    """Return what was found in the data, for the lines before the first step."""
    if settings.overfit is None:
        return [*(f"training: {note}" for note in train.notes), *(f"held out: {note}" for note in val.notes)]
    images = plural(settings.overfit, "image")
    return [f"trained and tested on the same {images}, unchanged (--overfit)", *train.notes]
