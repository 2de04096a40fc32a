"""Options of the commands that say what pre-training costs: `mirl info` and `mirl plan`."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from mirl.errors import UserError
from mirl.methods import Context, MethodName
from mirl.tasks.options import COUNT, NOT_NEGATIVE, POSITIVE, Options, Precision, Ranges
from mirl.tasks.settings.pretraining import PAPER_BATCH, PAPER_EPOCHS, Resolved, default_patch

HERE = "here"  # the name under which this machine is measured


@dataclass(frozen=True)
class FormOptions(Options):
    """Form of an autoencoder, but its encoder's."""

    method: MethodName = "mirl"
    """as for mirl pretrain"""
    segments: int | None = None
    """segments of the encoder; by default the paper's number"""
    taps: list[int] | None = None
    """block counts after which decoders read; for truncated_mae the blocks that are built"""
    context: Context = "dense"
    """what decoders of segments may cross-attend"""
    decoder_width: int | None = None
    """by default the encoder's, at most 512"""
    decoder_depth: int | None = None
    """blocks of each decoder; by default 2, or 4 for a single decoder"""
    image_size: int | tuple[int, int] = 224
    """pixels, one number or [height,width]"""
    patch_size: int | tuple[int, int] | None = None
    """pixels, one number or [height,width]; by default 4, 8 or 16 by image size"""
    channels: int = 3
    """of the images"""
    mask_ratio: float = 0.75
    """share of patches masked in pre-training"""

    def of_run(self, **others: Any) -> Resolved:
        """Return the settings of a run with this form, as mirl pretrain has them, and `others` of its options."""
        from mirl.models.patches import pair

        form = {field.name: getattr(self, field.name) for field in dataclasses.fields(FormOptions)}
        patch_size = self.patch_size or default_patch(self.image_size)
        return Resolved(**form | {"image_size": pair(self.image_size), "patch_size": pair(patch_size)} | others)


@dataclass(frozen=True)
class _Info:
    model: str
    """vit_{ti,s,b,l}_DEPTH, e.g. vit_s_54"""


# A dataclass lists its last base's fields first, and help should begin with the model.
@dataclass(frozen=True)
class InfoOptions(FormOptions, _Info):
    """Options of `mirl info`."""

    classes: int = 1000
    """of the classification head that is counted with the encoder"""

    def ranges(self) -> Ranges:
        """Return what is allowed for numbers."""
        return {"classes": NOT_NEGATIVE}


@dataclass(frozen=True)
class _Plan:
    model: str = "vit_s_54"
    """vit_{ti,s,b,l}_DEPTH or vit_WIDTHxHEADS_DEPTH, e.g. vit_b_48"""
    images: int = 1_281_167
    """of the data set; by default ImageNet-1K's"""
    epochs: int = PAPER_EPOCHS
    """passes over the data"""
    gpus: int = 1
    """devices that train together"""
    gpu: str = HERE
    """here: measure this machine, its GPU or else its CPU, in seconds; or, by the vendor's figures, h200, a100 ..."""
    batch_size: int = PAPER_BATCH
    """images in one optimizer step over all devices"""
    precision: Literal["auto", "32", "bf16", "16"] = "auto"
    """auto: bf16 where the device has it"""
    price: float | None = None
    """of an hour of one device, in any currency"""
    efficiency: float | None = None
    """share of the vendor's FLOP/s that a step reaches, where you measured it; by default assumed from the width"""


@dataclass(frozen=True)
class PlanOptions(FormOptions, _Plan):
    """Options of `mirl plan`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.gpus:
            raise UserError(
                f"--batch_size {self.batch_size} cannot be shared by {self.gpus} GPUs; give a multiple of {self.gpus}"
            )
        if self.batch_size > self.images:
            raise UserError(
                f"--batch_size {self.batch_size} is more than the {self.images} images; give at most {self.images}"
            )
        if self.efficiency is not None and self.gpu == HERE:
            raise UserError("--efficiency has no effect with --gpu here, which measures it; leave one out")

    @property
    def share(self) -> int:
        """Images that each device computes for a step."""
        return self.batch_size // self.gpus

    def ranges(self) -> Ranges:
        """Return what is allowed for numbers."""
        return {
            "images": COUNT, "epochs": COUNT, "gpus": COUNT, "batch_size": COUNT, "price": POSITIVE,
            "efficiency": (lambda x: 0 < x <= 1, "more than 0 and at most 1"),
        }  # fmt: skip

    def settings(self, precision: Precision) -> Resolved:
        """Return the settings of the run as mirl pretrain has them."""
        return self.of_run(
            model=self.model, batch_size=self.batch_size, precision=precision, data="shapes:100", block_figures=False
        )
