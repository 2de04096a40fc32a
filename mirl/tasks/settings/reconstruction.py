"""Options of the commands that show what decoders predict: `mirl reconstruct` and `mirl app`."""

import os
from dataclasses import dataclass

from mirl.errors import UserError
from mirl.tasks.options import Options, Ranges


@dataclass(frozen=True)
class DecodersOptions(Options):
    """Whose decoders are shown."""

    run: str
    """run folder of `mirl pretrain`, finished or not, its autoencoder.safetensors, or an official checkpoint with
    decoders"""
    image_size: int | tuple[int, int] | None = None
    """pixels, one number or [height,width]; by default as trained, else positions are resampled"""


@dataclass(frozen=True)
class ReconstructOptions(DecodersOptions):
    """Options of `mirl reconstruct`."""

    images: list[str] | None = None
    """image files and folders, at most 16 images; by default some that the run held out"""
    mask_ratio: float | None = None
    """share of patches that is masked; by default as in training"""
    seed: int = 0
    """of the random masks, one for each image"""
    block: list[float] | None = None
    """mask a rectangle in place of random patches: top, left, bottom, right, in 0..1"""
    mask: str | None = None
    """mask what is white in this picture in place of random patches"""
    out: str | None = None
    """.png or .pdf; by default reconstructions/ in the run folder, or here"""

    def __post_init__(self) -> None:
        if isinstance(self.images, list | tuple):
            object.__setattr__(self, "images", [os.fspath(image) for image in self.images])
        super().__post_init__()
        if (self.block is not None) + (self.mask is not None) + (self.mask_ratio is not None) > 1:
            raise UserError("--mask_ratio, --block and --mask exclude each other; give one")


@dataclass(frozen=True)
class AppOptions(DecodersOptions):
    """Options of `mirl app`."""

    port: int | None = None
    """where the page is, at 127.0.0.1; by default the first that is free from 7860 on"""
    open_browser: bool = True
    """open the page"""

    def ranges(self) -> Ranges:
        """Return what is allowed for numbers."""
        return {"port": (lambda x: 1 <= x <= 65_535, "1 to 65535")}
