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
from mirl.tasks.options import Machine, begun, required
from mirl.tasks.pretrain import typical_side
from mirl.tasks.run import train
from mirl.tasks.settings.detection import Detection, DetectOptions, resolve_detection
from mirl.tasks.weights import open_weights
from mirl.training.files import check_writable


def detect(run: str | None = None, **options: Any) -> Path:
    """Train a detector from an encoder on COCO annotations; or, given a trained run, find objects with it.

    Takes the fields of `mirl.DetectOptions`, e.g. `mirl.detect(weights="runs/a", data="coco")` and then
    `mirl.detect("runs/coco_detector", predict="photos")`. Returns the run folder, or the folder or file that was
    written.

    Raises:
        UserError: on a mistake in the options, the weights, the data or the run folder.
        KeyboardInterrupt: after SIGINT or SIGTERM, once the state is saved.
    """
    given = DetectOptions(run=run, **options)
    if given.run is None:
        return train_detector(given.training, options)
    if given.onnx:
        check_writable(Path(given.onnx), "onnx")
    detector, categories = load_detector(given.run)
    if given.predict:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        source = open_source(given.predict, channels=len(detector.transform.image_mean))
        folder = Path(given.run).expanduser()
        out = Path(given.out or (folder if folder.is_dir() else Path()) / "predictions")
        detector.roi_heads.score_thresh = min(given.threshold, detector.roi_heads.score_thresh)
        written = predict_folder(
            detector.to(device), source, categories, out, threshold=given.threshold,
            batch_size=given.batch_size or 1, workers=given.workers, device=device,
        ).path.parent  # fmt: skip
    if given.onnx:  # last, because it changes how attention is computed
        written = write_backbone(detector.cpu(), Path(given.onnx))
    return written


def train_detector(settings: Detection, named: Collection[str]) -> Path:
    """Train a detector and return the run folder; see `detect`. `named` are the options that the user named."""
    given = begun(settings, named)
    weights = open_weights(required(given.weights))
    if given.overfit is not None:
        if given.val_fraction is not None:
            raise UserError("--overfit tests on the training images; leave out --val_fraction")
        train_on = test_on = few(open_instance_training(given.data, channels=weights.channels), given.overfit)
    else:
        train_on, test_on = open_instances(
            given.data, channels=weights.channels, val_fraction=given.val_fraction, seed=given.seed
        )

    def task_for(machine: Machine) -> DetectTask:
        resolved = resolve_detection(
            given, images=len(train_on), shorter_side=typical_side(train_on.source),
            depth=weights.full_depth or weights.depth, patch_size=weights.patch_size[0], **machine,
        )  # fmt: skip
        return DetectTask(resolved, weights, train_on, test_on)

    return train(given, task_for)
