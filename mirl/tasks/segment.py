"""`mirl segment`: semantic segmentation with UperNet on a pre-trained ViT. Paper: Table 5."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from mirl.data.semantic import open_semantic, open_semantic_training
from mirl.data.sources import open_source
from mirl.data.splits import few
from mirl.errors import UserError
from mirl.tasks.label_maps import predict_folder
from mirl.tasks.options import Machine, begun, required
from mirl.tasks.pretrain import typical_side
from mirl.tasks.run import train
from mirl.tasks.segmentation import SegmentTask
from mirl.tasks.segmenter import load_segmenter
from mirl.tasks.settings.segmentation import Segmentation, SegmentOptions, resolve_segmentation
from mirl.tasks.weights import open_weights


def segment(run: str | None = None, **options: Any) -> Path:
    """Train a segmenter from an encoder on label maps; or, given a trained run, segment a folder of images with it.

    Takes the fields of `mirl.SegmentOptions`, e.g. `mirl.segment(weights="runs/a", data="streets")` and then
    `mirl.segment("runs/streets_segmenter", predict="photos")`. Returns the run folder, or the folder that was written.

    Raises:
        UserError: on a mistake in the options, the weights, the data or the run folder.
        KeyboardInterrupt: after SIGINT or SIGTERM, once the state is saved.
    """
    given = SegmentOptions(run=run, **options)
    if given.run is None:
        return train_segmenter(given.training, options)
    assert given.predict is not None
    segmenter = load_segmenter(given.run, multi_scale=given.multi_scale)
    source = open_source(given.predict, channels=segmenter.channels)
    folder = Path(given.run).expanduser()
    out = Path(given.out or (folder if folder.is_dir() else Path()) / "predictions")
    segmenter.to("cuda" if torch.cuda.is_available() else "cpu")
    return predict_folder(segmenter, source, segmenter.classes, out, workers=given.workers).path


def train_segmenter(settings: Segmentation, named: Collection[str]) -> Path:
    """Train a segmenter and return the run folder; see `segment`. `named` are the options that the user named."""
    given = begun(settings, named)
    weights = open_weights(required(given.weights))
    if given.overfit is not None:
        if given.val_fraction is not None:
            raise UserError("--overfit tests on the training images; leave out --val_fraction")
        train_on = test_on = few(open_semantic_training(given.data, channels=weights.channels), given.overfit)
    else:
        train_on, test_on = open_semantic(
            given.data, channels=weights.channels, val_fraction=given.val_fraction, seed=given.seed
        )

    def task_for(machine: Machine) -> SegmentTask:
        resolved = resolve_segmentation(
            given, images=len(train_on), shorter_side=typical_side(train_on.source),
            depth=weights.full_depth or weights.depth, width=weights.arguments["embed_dim"],
            patch_size=weights.patch_size[0], **machine,
        )  # fmt: skip
        return SegmentTask(resolved, weights, train_on, test_on)

    return train(given, task_for)
