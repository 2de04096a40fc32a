"""`mirl detect`: object detection and instance segmentation with Mask R-CNN on a pre-trained ViT. Paper: Table 4."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from mirl.data.instances import open_instance_training, open_instances
from mirl.data.sources import open_source
from mirl.data.splits import few
from mirl.errors import UserError
from mirl.tasks.detection import DetectTask
from mirl.tasks.detections import predict_folder
from mirl.tasks.detector import load_detector, write_backbone
from mirl.tasks.options import after_restart, check_only, resumed
from mirl.tasks.pretrain import typical_side
from mirl.tasks.run import carry_out
from mirl.tasks.settings.detection import Detection, resolve_detection
from mirl.tasks.weights import open_weights
from mirl.training import processes
from mirl.training.files import check_writable
from mirl.training.runs import RunFolder, read_config

WITH_A_RUN = ("batch_size", "workers", "out")  # options that also mean something where nothing is trained


def detect(
    run: str | None = None, *, predict: str | None = None, threshold: float = 0.5, onnx: str | None = None,
    **options: Any,
) -> Path:  # fmt: skip
    """Train a detector from an encoder on COCO annotations; or, given a trained run, find objects with it.

    Takes the fields of `mirl.Detection` as keyword arguments, e.g. `mirl.detect(weights="runs/a", data="coco")`.
    Returns the run folder, or the folder or file that was written.

    Args:
        run: run folder of mirl detect, for --predict and --onnx, e.g. `mirl detect runs/a --predict photos/`
        predict: images in which to find objects: a folder, a glob or a list; writes overlays/ and predictions.json, in
            COCO's format, to --out, by default predictions/ in the run folder
        threshold: least score of what --predict draws and writes, of at most 100 objects in an image
        onnx: write the detector's backbone, images to five maps, to this ONNX file

    Raises:
        UserError: on a mistake in the options, the weights, the data or the run folder.
        KeyboardInterrupt: after SIGINT or SIGTERM, once the state is saved.
    """
    settings = Detection(**options)
    if run is None:
        if predict or onnx:
            raise UserError(
                "--predict and --onnx need a trained run; give it first, as in mirl detect RUN --predict DIR"
            )
        return train_detector(settings, options)
    if not (predict or onnx):
        raise UserError(f"give --predict or --onnx with the run {run}, or --weights in its place to train")
    if not 0 <= threshold <= 1:
        raise UserError(f"--threshold {threshold} is not allowed; give 0 to 1")
    check_only(settings, WITH_A_RUN)
    if onnx:
        check_writable(Path(onnx), "onnx")
    detector, categories = load_detector(run)
    if predict:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        source = open_source(predict, channels=len(detector.transform.image_mean))
        folder = Path(run).expanduser()
        out = Path(settings.out or (folder if folder.is_dir() else Path()) / "predictions")
        detector.roi_heads.score_thresh = min(threshold, detector.roi_heads.score_thresh)
        written = predict_folder(
            detector.to(device), source, categories, out, threshold=threshold, batch_size=settings.batch_size or 1,
            workers=settings.workers, device=device,
        ).path.parent  # fmt: skip
    if onnx:  # last, because it changes how attention is computed
        written = write_backbone(detector.cpu(), Path(onnx))
    return written


def train_detector(settings: Detection, named: Collection[str]) -> Path:
    """Train a detector and return the run folder; see `detect`. `named` are the options that the user named."""
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
        train = val = few(open_instance_training(settings.data, channels=weights.channels), settings.overfit)
    else:
        train, val = open_instances(
            settings.data, channels=weights.channels, val_fraction=settings.val_fraction, seed=settings.seed
        )
    fabric = processes.launch(settings.devices, settings.num_nodes, precision, settings.strategy)
    with processes.as_one(fabric):
        resolved = resolve_detection(
            settings, images=len(train), shorter_side=typical_side(train.source),
            depth=weights.full_depth or weights.depth, patch_size=weights.patch_size[0],
            gpu=fabric.device.type == "cuda", devices=fabric.world_size, precision=precision,
        )  # fmt: skip
        task = DetectTask(resolved, weights, train, val)
        run = RunFolder(
            resolved.folder, resume=settings.resume, overwrite=settings.overwrite, writes=fabric.is_global_zero
        )
    carry_out(fabric, resolved, task, run)
    return run.path
