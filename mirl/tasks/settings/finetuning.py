"""Options of `mirl finetune`, and the choices made for those that are not given."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    default_folder,
    resolve_run,
)

# MAE's fine-tuning of ViT-B; its layer decay is 0.65 at 12 blocks, which leaves the lowest layer 0.65^13 = 0.0037.
FINETUNING_BATCH, FINETUNING_EPOCHS, FINETUNING_WARMUP, FINETUNING_LR = 1024, 100, 5, 5e-4
LOWEST_SCALE, LEAST_LAYER_DECAY, SMALL_FINETUNING_PEAK = 0.0037, 0.65, 1e-3


@dataclass(frozen=True)
class _Finetuning:
    weights: str | None = None
    """run folder, official checkpoint, timm name, or what else `mirl convert` reads"""
    data: str = "shapes"
    """class folders: train/ with val/ or test/, or one folder with --val_fraction; or `shapes`"""
    val_fraction: float | None = None
    """share of each class to test on, where --data has no train/ and val/ or test/"""

    pool: Literal["mean", "cls"] = "mean"
    """what the head reads: the mean over patches (MAE, MIRL), or the class token (which Hugging Face's ViT does)"""
    untrained: bool = False
    """fresh weights in place of the trained ones: what pre-training must beat"""
    depth: int | None = None
    """blocks; by default the encoder's, and all of a truncated one. More adds fresh ones after its last, fewer leaves
    its last ones out"""
    reinit_last: int = 0
    """fresh weights for so many of the last blocks (the paper's Sec. 2.2)"""
    image_size: int | tuple[int, int] | None = None
    """pixels, one number or [height,width]; by default the encoder's, else positions are resampled"""
    patch_size: int | tuple[int, int] | None = None
    """pixels, one number or [height,width]; by default the encoder's, else its patch embedding is resampled"""

    epochs: int | None = None
    """passes over the data; by default 100, 20 for `shapes`"""
    base_lr: float | None = None
    """learning rate of the head per 256 images of batch; by default 5e-4, more if the peak would be under 1e-3"""
    min_lr: float = 1e-6
    """learning rate of the head at the end of the cosine"""
    layer_decay: float | None = None
    """factor of the rate from each block to the one below; by default 0.0037^(1/(blocks + 1)), 0.65 or more"""
    warmup_epochs: float | None = None
    """linear warm-up; by default 5 of 100 epochs, in proportion"""
    drop_path: float = 0.1
    """probability of leaving out the last block's branches; lower blocks in proportion to depth"""
    ema: float | None = None
    """decay of an average of the weights, e.g. 0.9998; judged beside the weights and then the one exported"""

    min_crop: float | None = None
    """smallest share of an image's area that a random crop keeps; by default 0.08, or 0.4 for images under 96 px"""
    flip: bool = True
    """mirror half of the images"""
    randaugment: str = "rand-m9-mstd0.5-inc1"
    """timm's description of RandAugment, or none; for images of 3 channels"""
    erasing: float = 0.25
    """share of the images of which a rectangle becomes noise"""
    mixup: float = 0.8
    """alpha of mixup; 0 is none"""
    cutmix: float = 1.0
    """alpha of cutmix, taken for half of the batches where both are on; 0 is none"""
    smoothing: float = 0.1
    """label smoothing"""


@dataclass(frozen=True)
class Finetuning(RunOptions, _Finetuning):
    """Options of `mirl finetune`. What is None is chosen from the data and the machine, and printed."""

    def ranges(self) -> Ranges:
        """Return what is allowed for numbers of fine-tuning."""
        share = (lambda x: 0 <= x < 1, "0 or more and less than 1")
        return super().ranges() | {
            "val_fraction": (lambda x: 0 < x < 1, "more than 0 and less than 1"), "depth": COUNT,
            "reinit_last": NOT_NEGATIVE, "epochs": COUNT, "base_lr": POSITIVE, "min_lr": NOT_NEGATIVE,
            "layer_decay": (lambda x: 0 < x <= 1, "more than 0 and at most 1"), "warmup_epochs": NOT_NEGATIVE,
            "drop_path": share, "ema": (lambda x: 0 < x < 1, "more than 0 and less than 1"),
            "min_crop": (lambda x: 0 < x <= 1, "more than 0 and at most 1"), "erasing": FRACTION, "mixup": NOT_NEGATIVE,
            "cutmix": NOT_NEGATIVE, "smoothing": share,
        }  # fmt: skip

    @property
    def run_folder(self) -> Path:
        """Where the run goes: --out, or runs/ and the name of the data."""
        return Path(self.out) if self.out else default_folder(self.data, "classes", "_finetuned")


@dataclass(frozen=True)
class ResolvedFinetuning(ResolvedRun, Finetuning):
    """Options of fine-tuning, of which every choice is made."""

    weights: str = ""
    depth: int = 1
    image_size: tuple[int, int] = (0, 0)
    patch_size: tuple[int, int] = (0, 0)
    base_lr: float = FINETUNING_LR
    layer_decay: float = 1.0
    warmup_epochs: float = 0
    min_crop: float = 0.08

    @property
    def peak_rate(self) -> float:
        """The head's learning rate after warm-up: `base_lr` for 256 images, in proportion to the batch."""
        return self.base_lr * self.batch_size / 256


def resolve_finetuning(
    given: Finetuning, *, images: int, depth: int, image_size: tuple[int, int], patch_size: tuple[int, int], gpu: bool,
    devices: int, precision: Precision,
) -> ResolvedFinetuning:  # fmt: skip
    """Choose what was not given.

    Args:
        given: the options; images: training images; depth, image_size, patch_size: the encoder's.
        gpu: whether there is one; devices: processes of the whole run; precision: the device's best.

    Raises:
        UserError: if the batch is larger than the data or cannot be shared by the devices.
    """
    from mirl.models.patches import pair  # it imports PyTorch, which options do without

    epochs = given.epochs or (20 if built_in(given.data) else FINETUNING_EPOCHS)
    run = resolve_run(
        given, images=images, most=FINETUNING_BATCH, epochs=epochs, gpu=gpu, devices=devices, precision=precision
    )
    depth = given.depth or depth
    size = image_size if given.image_size is None else pair(given.image_size)
    by_depth = max(LEAST_LAYER_DECAY, round(LOWEST_SCALE ** (1 / (depth + 1)), 3))
    warmup = epochs * FINETUNING_WARMUP / FINETUNING_EPOCHS
    choices = {
        "out": str(given.run_folder),
        "depth": depth,
        "image_size": size,
        "patch_size": patch_size if given.patch_size is None else pair(given.patch_size),
        "base_lr": given.base_lr or max(FINETUNING_LR, SMALL_FINETUNING_PEAK * 256 / run["batch_size"]),
        "layer_decay": by_depth if given.layer_decay is None else given.layer_decay,
        "warmup_epochs": warmup if given.warmup_epochs is None else given.warmup_epochs,
        "min_crop": given.min_crop or (0.4 if min(size) < 96 else 0.08),
    }
    return ResolvedFinetuning(**dataclasses.asdict(given) | run | choices)
