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
from mirl.tasks.options import after_restart, check_only, resumed
from mirl.tasks.pretrain import typical_side
from mirl.tasks.run import carry_out
from mirl.tasks.segmentation import SegmentTask
from mirl.tasks.segmenter import load_segmenter
from mirl.tasks.settings.segmentation import Segmentation, resolve_segmentation
from mirl.tasks.weights import open_weights
from mirl.training import processes
from mirl.training.runs import RunFolder, read_config

WITH_A_RUN = ("workers", "out", "multi_scale")  # options that also mean something where nothing is trained


def segment(run: str | None = None, *, predict: str | None = None, **options: Any) -> Path:
    """Train a segmenter from an encoder on label maps; or, given a trained run, segment a folder of images with it.

    Takes the fields of `mirl.Segmentation` as keyword arguments, e.g. `mirl.segment(weights="runs/a", data="streets")`.
    Returns the run folder, or the folder that was written.

    Args:
        run: run folder of mirl segment, for --predict, e.g. `mirl segment runs/a --predict photos/`
        predict: images of any size to segment: a folder, a glob or a list; writes labels/ (palette PNGs), overlays/ and
            classes.json to --out, by default predictions/ in the run folder

    Raises:
        UserError: on a mistake in the options, the weights, the data or the run folder.
        KeyboardInterrupt: after SIGINT or SIGTERM, once the state is saved.
    """
    settings = Segmentation(**options)
    if run is None:
        if predict:
            raise UserError("--predict needs a trained run; give it first, as in mirl segment RUN --predict DIR")
        return train_segmenter(settings, options)
    if not predict:
        raise UserError(f"give --predict with the run {run}, or --weights in its place to train")
    check_only(settings, WITH_A_RUN)
    segmenter = load_segmenter(run, multi_scale=settings.multi_scale)
    source = open_source(predict, channels=segmenter.channels)
    folder = Path(run).expanduser()
    out = Path(settings.out or (folder if folder.is_dir() else Path()) / "predictions")
    segmenter.to("cuda" if torch.cuda.is_available() else "cpu")
    return predict_folder(segmenter, source, segmenter.classes, out, workers=settings.workers).path


def train_segmenter(settings: Segmentation, named: Collection[str]) -> Path:
    """Train a segmenter and return the run folder; see `segment`. `named` are the options that the user named."""
    settings = after_restart(settings)
    if settings.resume:
        settings = resumed(settings, named, read_config(settings.run_folder))
    if not settings.weights:
        raise UserError("--weights is missing; give a run folder of mirl pretrain, or a timm name")
    precision = processes.precision_of(settings.precision)
    weights = open_weights(settings.weights)
    if settings.overfit is not None:
        if settings.val_fraction is not None:
            raise UserError("--overfit tests on the training images; leave out --val_fraction")
        train = val = few(open_semantic_training(settings.data, channels=weights.channels), settings.overfit)
    else:
        train, val = open_semantic(
            settings.data, channels=weights.channels, val_fraction=settings.val_fraction, seed=settings.seed
        )
    fabric = processes.launch(settings.devices, settings.num_nodes, precision, settings.strategy)
    with processes.as_one(fabric):
        resolved = resolve_segmentation(
            settings, images=len(train), shorter_side=typical_side(train.source),
            depth=weights.full_depth or weights.depth, width=weights.arguments["embed_dim"],
            patch_size=weights.patch_size[0], gpu=fabric.device.type == "cuda", devices=fabric.world_size,
            precision=precision,
        )  # fmt: skip
        task = SegmentTask(resolved, weights, train, val)
        run = RunFolder(
            resolved.folder, resume=settings.resume, overwrite=settings.overwrite, writes=fabric.is_global_zero
        )
    carry_out(fabric, resolved, task, run)
    return run.path
