"""Options of `mirl diagnose`."""

import os
from dataclasses import dataclass
from pathlib import Path

from mirl.errors import UserError
from mirl.tasks.options import COUNT, SEED, Ranges
from mirl.tasks.places import beside
from mirl.tasks.settings.features import PIXELS, ReadingOptions


@dataclass(frozen=True)
class _Diagnose:
    weights: list[str] | str = ()  # type: ignore[assignment]
    """one or several: run folder, its encoder/, official checkpoint, timm name, or what else `mirl convert` reads"""
    data: str = "shapes"
    """images: a folder, a glob, a list of paths, or `shapes`; for --labels class folders, as `mirl knn` reads them"""
    labels: bool = False
    """read every block out (linear, k-NN), and those of fresh weights, as --reinit does too"""
    val_fraction: float | None = None
    """share of each class to test on, where class folders have no train/ and val/ or test/"""
    images: int = 256
    """most images to look at"""
    labelled_images: int = 6000
    """most images for read-outs, two thirds of them to fit"""

    reinit: bool = False
    """fine-tune with fresh weights in the last blocks (the paper's Figure 2); needs class folders"""
    reinit_blocks: list[int] | None = None
    """how many last blocks get fresh weights, e.g. [1,3]; by default up to half of them in four steps; 0 is added"""
    seeds: int = 3
    """fine-tunings of each; their spread decides what counts"""
    reinit_epochs: int = 5
    """of each fine-tuning"""


@dataclass(frozen=True)
class DiagnoseOptions(ReadingOptions, _Diagnose):
    """Options of `mirl diagnose`."""

    seed: int = 0
    """of the split and, counted up, of fine-tunings"""
    out: str | None = None
    """folder; by default diagnosis/, in the run folder if that is the only --weights"""

    def __post_init__(self) -> None:
        given = [self.weights] if isinstance(self.weights, str | os.PathLike) else self.weights
        object.__setattr__(self, "weights", [os.fspath(weights) for weights in given])
        super().__post_init__()
        if not self.weights:
            raise UserError("--weights is missing; give a run folder or a timm name, or several")
        if PIXELS in self.weights:
            raise UserError("raw pixels have no blocks; give --weights of encoders")
        places = [str(path.resolve()) if (path := Path(w).expanduser()).exists() else w for w in self.weights]
        if twice := [w for w, place in zip(self.weights, places, strict=True) if places.count(place) > 1]:
            raise UserError(f"--weights {twice[-1]} was given twice; leave one out")
        if self.reinit_blocks is not None and not self.reinit:
            raise UserError("--reinit_blocks has no effect without --reinit; add it, or leave out --reinit_blocks")
        if self.val_fraction is not None and not (self.labels or self.reinit):
            raise UserError("--val_fraction has no effect without --labels; add it, or leave out --val_fraction")

    def ranges(self) -> Ranges:
        """Return what is allowed for numbers."""
        return super().ranges() | {
            "val_fraction": (lambda x: 0 < x < 1, "more than 0 and less than 1"),
            "labelled_images": (lambda x: x >= 3, "3 or more"),
            "images": COUNT, "seeds": COUNT, "reinit_epochs": COUNT, "seed": SEED,
        }  # fmt: skip

    @property
    def folder(self) -> Path:
        """Where results go."""
        if self.out:
            return Path(self.out)
        return (beside(self.weights[0]) if len(self.weights) == 1 else Path()) / "diagnosis"
