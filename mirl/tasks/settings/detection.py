"""Options of `mirl detect`, and the choices made for those that are not given."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mirl.errors import UserError
from mirl.tasks.options import (
    COUNT,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Precision,
    Ranges,
    ResolvedRun,
    RunOptions,
    built_in,
    check_only,
    default_folder,
    resolve_run,
)

Protocol = Literal["coco_1x", "vitdet"]

# CAE's layer decay is 0.75 at 12 blocks and 0.85 at 24, which leaves the lowest layer about this much.
LOWEST_SCALE, LEAST_LAYER_DECAY = 0.018, 0.75
SMALL_PEAK = 1e-4  # smallest default peak rate: in proportion, the batch of a single GPU would hardly learn
SMALLEST = 32  # pixels of an image's side
COCO_SIDE = 480  # pixels, shorter side of most of COCO's images
LARGEST = 1333 / 800  # longer side of an image, in its shorter one
WARMUP_SHARE = 0.1  # of the run, at most
REGIONS = 512  # of each image, on which both protocols train the heads
SMALL_WIDTH, SMALL_REGIONS = 64, 64  # of a detector for the built-in images
# Options that mean something where nothing is trained.
WITH_A_RUN = ("run", "predict", "threshold", "onnx", "batch_size", "workers", "out")


@dataclass(frozen=True)
class Schedule:
    """What a published protocol trains with.

    Attributes:
        image_size: pixels at patches of 16; batch_size: for which `base_lr` is meant; warmup: steps.
        decays: shares of the run after which the rate falls to a tenth.
        proposals: kept of each image after suppression, over all levels, in training and in tests, where the heads
            train on `REGIONS`.
    """

    image_size: int
    epochs: int
    batch_size: int
    base_lr: float
    warmup: int
    decays: tuple[float, float]
    drop_path: float
    proposals: tuple[int, int]


PROTOCOLS: dict[Protocol, Schedule] = {
    "coco_1x": Schedule(800, 12, 32, 3e-4, 500, (9 / 12, 11 / 12), 0.2, (2000, 1000)),
    "vitdet": Schedule(1024, 100, 64, 1e-4, 250, (163_889 / 184_375, 177_546 / 184_375), 0.1, (1000, 1000)),
}


@dataclass(frozen=True)
class _Detection:
    weights: str | None = None
    """run folder, official checkpoint, timm name, or what else `mirl convert` reads"""
    data: str = "shapes"
    """folder with COCO annotations of a training and a validation split (docs/detecting.md), or `shapes`"""
    val_fraction: float | None = None
    """share of the images to test on, where --data has a single annotation file"""
    overfit: int | None = None
    """train and test on so many training images alone: a first look at whether annotations and model fit together"""

    protocol: Protocol = "coco_1x"
    """coco_1x: four depths, FPN, several scales, 12 epochs (the paper's); vitdet: windows, last map, large-scale
    jitter, 100 epochs"""
    untrained: bool = False
    """fresh weights in place of the encoder's: what pre-training must beat"""
    image_size: int | None = None
    """pixels of the shorter side in tests, around which training varies; vitdet: of a square; by default 800 (vitdet
    1024), less for images smaller than COCO's or patches under 16 pixels"""
    patch_size: int | None = None
    """pixels; by default the encoder's, else its patch embedding is resampled"""
    width: int | None = None
    """channels of the pyramid and the heads; by default 256, 64 for `shapes`"""
    regions: int | None = None
    """regions of each image that the heads train on; by default 512, 64 for `shapes`"""
    window: int = 14
    """patches of the side of an attention window (vitdet)"""
    checkpointing: bool = False
    """compute blocks again in the backward pass: a third slower, for much less memory"""

    epochs: int | None = None
    """passes over the data; by default the protocol's, 12 for `shapes`"""
    base_lr: float | None = None
    """learning rate of the heads for a batch of 32 (vitdet 64), in proportion for others; by default 3e-4 (1e-4), more
    if the peak would be under 1e-4"""
    layer_decay: float | None = None
    """factor of the rate from each block to the one below; by default 0.018^(1/(blocks + 1)), 0.75 or more; 1 with
    --untrained"""
    warmup_epochs: float | None = None
    """linear warm-up; by default 500 steps (vitdet 250), at most a tenth of the run"""
    drop_path: float | None = None
    """probability of leaving out the last block's branches, lower blocks in proportion to depth; by default 0.2 (vitdet
    0.1)"""
    flip: bool = True
    """mirror half of the images"""


@dataclass(frozen=True)
class Detection(RunOptions, _Detection):
    """Options of a detector's training. What is None is chosen from the data and the machine, and printed."""

    def ranges(self) -> Ranges:
        """Return what is allowed for numbers of detection."""
        return super().ranges() | {
            "val_fraction": (lambda x: 0 < x < 1, "more than 0 and less than 1"), "overfit": COUNT, "epochs": COUNT,
            "image_size": (lambda x: x >= SMALLEST, f"{SMALLEST} pixels or more"), "patch_size": COUNT,
            "width": (lambda x: x >= 8, "8 or more"), "regions": COUNT, "window": COUNT, "base_lr": POSITIVE,
            "layer_decay": (lambda x: 0 < x <= 1, "more than 0 and at most 1"), "warmup_epochs": NOT_NEGATIVE,
            "drop_path": (lambda x: 0 <= x < 1, "0 or more and less than 1"),
        }  # fmt: skip

    @property
    def run_folder(self) -> Path:
        """Where the run goes: --out, or runs/ and the name of the data."""
        return Path(self.out) if self.out else default_folder(self.data, "coco", "_detector")


@dataclass(frozen=True)
class _UseOfADetector:
    run: str | None = None
    """run folder of mirl detect, for --predict and --onnx, e.g. `mirl detect runs/a --predict photos/`"""
    predict: str | None = None
    """images in which to find objects: a folder, a glob or a list; writes overlays/ and predictions.json, in COCO's
    format, to --out, by default predictions/ in the run folder"""
    threshold: float = 0.5
    """least score of what --predict draws and writes, of at most 100 objects in an image"""
    onnx: str | None = None
    """write the detector's backbone, images to five maps, to this ONNX file"""


@dataclass(frozen=True)
class DetectOptions(Detection, _UseOfADetector):
    """Options of `mirl detect`: those of a training, or a trained run and what to do with it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold != DetectOptions.threshold and not self.predict:
            raise UserError("--threshold has no effect without --predict; add it, or leave out --threshold")
        if self.run is None and (self.predict or self.onnx):
            raise UserError(
                "--predict and --onnx need a trained run; give it first, as in mirl detect RUN --predict DIR"
            )
        if self.run is not None:
            if not (self.predict or self.onnx):
                raise UserError(f"give --predict or --onnx with the run {self.run}, or --weights in its place to train")
            check_only(self, WITH_A_RUN)

    def ranges(self) -> Ranges:
        """Return what is allowed for numbers of detection."""
        return super().ranges() | {"threshold": FRACTION}

    @property
    def training(self) -> Detection:
        """The options of a training alone, which its run keeps."""
        return Detection(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Detection)})


@dataclass(frozen=True)
class ResolvedDetection(ResolvedRun, Detection):
    """Options of detection, of which every choice is made."""

    weights: str = ""
    image_size: int = 800
    patch_size: int = 16
    width: int = 256
    regions: int = REGIONS
    base_lr: float = 3e-4
    layer_decay: float = 1.0
    warmup_epochs: float = 0
    drop_path: float = 0.0

    @property
    def largest(self) -> int:
        """Pixels to which the longer side of an image is kept."""
        return round(self.image_size * LARGEST)

    @property
    def peak_rate(self) -> float:
        """The heads' learning rate after warm-up."""
        return self.base_lr * self.batch_size / PROTOCOLS[self.protocol].batch_size

    @property
    def proposals(self) -> tuple[int, int]:
        """How many of an image the heads choose from in training and see in tests: fewer where they train on fewer."""
        training, tests = (min(most, 2 * self.regions * most // 1000) for most in PROTOCOLS[self.protocol].proposals)
        return training, tests


def resolve_detection(
    given: Detection, *, images: int, shorter_side: float, depth: int, patch_size: int, gpu: bool, devices: int,
    precision: Precision,
) -> ResolvedDetection:  # fmt: skip
    """Choose what was not given.

    Args:
        given: the options; images: training images; shorter_side: median pixels of their shorter sides.
        depth, patch_size: the encoder's.
        gpu: whether there is one; devices: processes of the whole run; precision: the device's best.

    Raises:
        UserError: if the batch is larger than the data or cannot be shared by the devices.
    """
    protocol, small = PROTOCOLS[given.protocol], built_in(given.data)
    patch = given.patch_size or patch_size
    most = COCO_SIDE if small else protocol.image_size  # built-in images are seen as they are
    size = given.image_size or default_image_size(most, shorter_side, patch)
    if given.protocol == "vitdet" and size % (2 * patch):
        near = max(1, round(size / (2 * patch))) * 2 * patch
        raise UserError(f"--image_size {size} is no multiple of two patches of {patch}; give --image_size {near}")
    epochs = given.epochs or (12 if small else protocol.epochs)
    fits = max(1, 64 * 224 * 224 // round(size * size * LARGEST))  # as large a batch as the other commands'
    run = resolve_run(
        given, images=images, most=protocol.batch_size, epochs=epochs, gpu=gpu, devices=devices, precision=precision,
        on_cpu=fits,
    )  # fmt: skip
    # Fresh blocks have nothing to keep.
    by_depth = 1.0 if given.untrained else max(LEAST_LAYER_DECAY, round(LOWEST_SCALE ** (1 / (depth + 1)), 2))
    warmup = min(protocol.warmup * run["batch_size"] / images, WARMUP_SHARE * epochs)
    least = SMALL_PEAK * protocol.batch_size / run["batch_size"]
    choices = {
        "out": str(given.run_folder),
        "image_size": size,
        "patch_size": patch,
        "width": given.width or (SMALL_WIDTH if small else 256),
        "regions": given.regions or (SMALL_REGIONS if small else REGIONS),
        "base_lr": given.base_lr or max(protocol.base_lr, least),
        "layer_decay": by_depth if given.layer_decay is None else given.layer_decay,
        "warmup_epochs": warmup if given.warmup_epochs is None else given.warmup_epochs,
        "drop_path": protocol.drop_path if given.drop_path is None else given.drop_path,
    }
    return ResolvedDetection(**dataclasses.asdict(given) | run | choices)


def default_image_size(most: int, shorter_side: float, patch_size: int) -> int:
    """Return `most` (at patches of 16) or less: images smaller than COCO's are enlarged as much as COCO's are.

    It is a multiple of two patches, and `most` is in proportion to the patch, so that attention costs no more.
    """
    unit = 2 * patch_size
    wanted = min(most * patch_size / 16, shorter_side * most / COCO_SIDE)
    return max(math.ceil(SMALLEST / unit), round(wanted / unit)) * unit
