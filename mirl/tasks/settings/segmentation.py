"""Options of `mirl segment`, and the choices made for those that are not given."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mirl.errors import UserError
from mirl.tasks.options import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    Precision,
    Ranges,
    ResolvedRun,
    RunOptions,
    built_in,
    check_only,
    default_batch,
    default_folder,
    resolve_run,
)

SIDE = 512  # pixels at patches of 16: of crops, of windows, and of an image's shorter side
BATCH_SIZE, EPOCHS = 16, 127  # BEiT's 160,000 steps over ADE20K's 20,210 images
WARMUP_STEPS, WARMUP_SHARE = 1500, 0.1  # the latter of the run, at most
BASE_LR, BASE_STEPS, LARGEST_LR = 2e-4, 160_000, 1e-3  # a shorter run has a higher rate, by the root of its steps
OVERFIT_STEPS = 500
# BEiT's layer decay is 0.65 at 12 blocks, ours 0.88 at 48: both leave the lowest layer about this much.
LOWEST_SCALE, LEAST_LAYER_DECAY = 0.003, 0.65
DEEP, DROP_PATH, DROP_PATH_OF_DEEP = 12, 0.1, 0.2
SMALL_WIDTH, SMALL_EPOCHS = 64, 12  # for the built-in images
SMALLEST = 16  # pixels of an image's side
WITH_A_RUN = ("run", "predict", "workers", "out", "multi_scale")  # options that mean something where nothing is trained


@dataclass(frozen=True)
class _Segmentation:
    weights: str | None = None
    """run folder, official checkpoint, timm name, or what else `mirl convert` reads"""
    data: str = "shapes"
    """folder with images/, labels/ and classes.json, ADE20K as published (docs/segmenting.md), or `shapes`"""
    val_fraction: float | None = None
    """share of the images to test on, where --data is not split"""
    overfit: int | None = None
    """train and test on so many training images alone: a first look at whether labels and model fit together"""

    untrained: bool = False
    """fresh weights in place of the encoder's: what pre-training must beat"""
    relative_positions: bool = False
    """learn biases of attention by relative position, zero at first, as BEiT; windows are then of one size"""
    image_size: int | None = None
    """pixels of the shorter side in tests, around which training varies; by default the images' own, at most 512, or
    less in proportion for patches under 16 pixels"""
    crop_size: int | None = None
    """pixels of the squares that training cuts out and of the windows of tests; by default just over --image_size"""
    patch_size: int | None = None
    """pixels; by default the encoder's, else its patch embedding is resampled"""
    width: int | None = None
    """channels of the decoder; by default the encoder's, 64 for `shapes`"""
    inference: Literal["slide", "whole"] = "slide"
    """slide: windows of --crop_size that overlap; whole: the image at once"""
    stride: int | None = None
    """pixels from one window to the next; by default two thirds of --crop_size"""
    multi_scale: bool = False
    """in the final test also average six sizes and their mirror images"""
    checkpointing: bool = False
    """compute blocks again in the backward pass: a third slower, for much less memory"""

    epochs: int | None = None
    """passes over the data; by default 127 (the protocol's 160,000 steps on ADE20K), 12 for `shapes`; 500 steps with
    --overfit"""
    base_lr: float | None = None
    """learning rate of the heads for a batch of 16, in proportion for others; by default 2e-4 for 160,000 steps of 16,
    in a shorter run more, at most 1e-3"""
    layer_decay: float | None = None
    """factor of the rate from each block to the one below; by default 0.003^(1/(blocks + 1)), 0.65 or more; 1 with
    --untrained or --overfit"""
    warmup_epochs: float | None = None
    """linear warm-up; by default 1,500 steps of 16, at most a tenth of the run"""
    drop_path: float | None = None
    """probability of leaving out the last block's branches, lower blocks in proportion to depth; by default 0.1, of
    more than 12 blocks 0.2, with --overfit 0"""
    flip: bool = True
    """mirror half of the crops"""
    photometric: bool = True
    """change brightness, contrast, saturation and hue of the crops"""


@dataclass(frozen=True)
class Segmentation(RunOptions, _Segmentation):
    """Options of a segmenter's training. What is None is chosen from the data and the machine, and printed."""

    def ranges(self) -> Ranges:
        """Return what is allowed for numbers of segmentation."""
        side = (lambda x: x >= SMALLEST, f"{SMALLEST} pixels or more")
        return super().ranges() | {
            "val_fraction": (lambda x: 0 < x < 1, "more than 0 and less than 1"), "overfit": COUNT, "epochs": COUNT,
            "image_size": side, "crop_size": side, "patch_size": COUNT, "stride": COUNT,
            "width": (lambda x: x >= 8, "8 or more"), "base_lr": POSITIVE,
            "layer_decay": (lambda x: 0 < x <= 1, "more than 0 and at most 1"), "warmup_epochs": NOT_NEGATIVE,
            "drop_path": (lambda x: 0 <= x < 1, "0 or more and less than 1"),
        }  # fmt: skip

    @property
    def run_folder(self) -> Path:
        """Where the run goes: --out, or runs/ and the name of the data."""
        return Path(self.out) if self.out else default_folder(self.data, "images", "_segmenter")


@dataclass(frozen=True)
class _UseOfASegmenter:
    run: str | None = None
    """run folder of mirl segment, for --predict, e.g. `mirl segment runs/a --predict photos/`"""
    predict: str | None = None
    """images of any size to segment: a folder, a glob or a list; writes labels/ (palette PNGs), overlays/ and
    classes.json to --out, by default predictions/ in the run folder"""


@dataclass(frozen=True)
class SegmentOptions(Segmentation, _UseOfASegmenter):
    """Options of `mirl segment`: those of a training, or a trained run and what to do with it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.run is None and self.predict:
            raise UserError("--predict needs a trained run; give it first, as in mirl segment RUN --predict DIR")
        if self.run is not None:
            if not self.predict:
                raise UserError(f"give --predict with the run {self.run}, or --weights in its place to train")
            check_only(self, WITH_A_RUN)

    @property
    def training(self) -> Segmentation:
        """The options of a training alone, which its run keeps."""
        return Segmentation(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Segmentation)})


@dataclass(frozen=True)
class ResolvedSegmentation(ResolvedRun, Segmentation):
    """Options of segmentation, of which every choice is made."""

    weights: str = ""
    image_size: int = SIDE
    crop_size: int = SIDE
    stride: int = SIDE * 2 // 3
    patch_size: int = 16
    width: int = 768
    base_lr: float = BASE_LR
    layer_decay: float = 1.0
    warmup_epochs: float = 0
    drop_path: float = 0.0

    @property
    def peak_rate(self) -> float:
        """The heads' learning rate after warm-up."""
        return self.base_lr * self.batch_size / BATCH_SIZE


def resolve_segmentation(
    given: Segmentation, *, images: int, shorter_side: float, depth: int, width: int, patch_size: int, gpu: bool,
    devices: int, precision: Precision,
) -> ResolvedSegmentation:  # fmt: skip
    """Choose what was not given.

    Args:
        given: the options; images: training images; shorter_side: median pixels of their shorter sides.
        depth, width, patch_size: the encoder's.
        gpu: whether there is one; devices: processes of the whole run; precision: the device's best.

    Raises:
        UserError: if the batch is larger than the data or cannot be shared by the devices.
    """
    patch, small = given.patch_size or patch_size, built_in(given.data)
    unit = 2 * patch  # pixels of a position of the coarsest map
    most = max(unit, SIDE * patch // 16)
    size = given.image_size or max(SMALLEST, round(min(shorter_side, most)))
    crop = given.crop_size or math.ceil(min(size, most) / unit) * unit
    overfit = given.overfit is not None  # nothing has to generalise
    steps = images // min(images, given.batch_size or default_batch(images, devices, BATCH_SIZE))
    epochs = given.epochs or (math.ceil(OVERFIT_STEPS / steps) if overfit else SMALL_EPOCHS if small else EPOCHS)
    run = resolve_run(
        given, images=images, most=BATCH_SIZE, epochs=epochs, gpu=gpu, devices=devices, precision=precision,
        on_cpu=max(1, 64 * 224 * 224 // crop**2),
    )  # fmt: skip
    keeps = not (given.untrained or overfit)
    by_depth = max(LEAST_LAYER_DECAY, round(LOWEST_SCALE ** (1 / (depth + 1)), 2)) if keeps else 1.0
    drop_path = 0.0 if overfit else DROP_PATH if depth <= DEEP else DROP_PATH_OF_DEEP
    shortness = max(1.0, BASE_STEPS * BATCH_SIZE / (images * epochs))
    warmup = min(WARMUP_STEPS * BATCH_SIZE / images, WARMUP_SHARE * epochs)
    choices = {
        "out": str(given.run_folder),
        "image_size": size,
        "crop_size": crop,
        "stride": given.stride or max(1, crop * 2 // 3),
        "patch_size": patch,
        "width": given.width or (SMALL_WIDTH if small else width),
        "base_lr": given.base_lr or round(min(LARGEST_LR, BASE_LR * math.sqrt(shortness)), 6),
        "layer_decay": by_depth if given.layer_decay is None else given.layer_decay,
        "warmup_epochs": warmup if given.warmup_epochs is None else given.warmup_epochs,
        "drop_path": drop_path if given.drop_path is None else given.drop_path,
    }
    return ResolvedSegmentation(**dataclasses.asdict(given) | run | choices)
