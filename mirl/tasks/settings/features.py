"""Options of commands that run a frozen encoder over images; those of `mirl embed`."""

from dataclasses import dataclass
from typing import Literal

from mirl.errors import UserError
from mirl.tasks.options import COUNT, NOT_NEGATIVE, Options, Ranges

Pool = Literal["mean", "cls", "patch"]
PIXELS = "pixels"  # the name of raw pixels among `--weights`


@dataclass(frozen=True)
class ReadingOptions(Options):
    """How a frozen encoder is run over images."""

    image_size: int | tuple[int, int] | None = None
    """pixels, one number or [height,width]; by default what the encoder was trained on"""
    batch_size: int = 64
    """images computed at once"""
    workers: int | None = None
    """data workers; by default one per core of a GPU, at most 16; on a CPU few or none"""
    precision: Literal["32", "bf16"] = "32"
    """of the encoder; bf16 is faster on a GPU"""

    def ranges(self) -> Ranges:
        """Return what is allowed for numbers."""
        return {"batch_size": COUNT, "workers": NOT_NEGATIVE}


@dataclass(frozen=True)
class _Features:
    weights: str | None = None
    """run folder, its encoder/, a .safetensors file that a run wrote, a timm name, or `pixels` for raw pixels"""
    data: str = "shapes"
    """images"""
    untrained: bool = False
    """fresh weights in place of the trained ones: what training must beat"""
    pool: Literal["mean", "cls"] = "mean"
    """mean over patch tokens, or the class token"""
    block: int | None = None
    """after which block, from 1; by default the last"""


# A dataclass lists its last base's fields first, and help should begin with what is read.
@dataclass(frozen=True)
class FeatureOptions(ReadingOptions, _Features):
    """Options of every command that reads features."""

    out: str | None = None
    """where results go"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weights:
            raise UserError("--weights is missing; give a run folder, a timm name, or `pixels`")
        if self.weights == PIXELS and (self.block or self.untrained):
            raise UserError("raw pixels have no blocks and no weights; leave out --block and --untrained")

    def ranges(self) -> Ranges:
        """Return what is allowed for numbers."""
        return super().ranges() | {"block": COUNT}


@dataclass(frozen=True)
class EmbedOptions(FeatureOptions):
    """Options of `mirl embed`."""

    data: str = "shapes"
    """images: a folder (nested or flat, no labels), a glob, a text file of paths, or `shapes`"""
    pool: Pool = "mean"  # type: ignore[assignment]
    """mean over patch tokens, the class token, or every patch token"""
    out: str | None = None
    """beginning of the files' names; by default features, in the run folder if --weights is one"""
    table: Literal["csv", "parquet"] = "csv"
    """kind of the table of images; parquet needs pyarrow"""
