"""Options of the commands that read classes out of frozen features: `mirl probe` and `mirl knn`."""

from dataclasses import dataclass

from mirl.errors import UserError
from mirl.tasks.options import SEED, Ranges
from mirl.tasks.settings.features import FeatureOptions


@dataclass(frozen=True)
class ReadOutOptions(FeatureOptions):
    """Options of every read-out."""

    data: str = "shapes"
    """class folders: train/ with val/ or test/, or one folder with --val_fraction; or `shapes`"""
    out: str | None = None
    """JSON file; by default in readouts/ of the run folder, or here"""
    every_block: bool = False
    """read after every block, and draw accuracy against depth"""
    val_fraction: float | None = None
    """share of each class to test on, where --data has no train/ and val/ or test/"""
    seed: int = 0
    """of the split and of whatever is fitted"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block and self.every_block:
            raise UserError("--block and --every_block were both given; choose one")

    def ranges(self) -> Ranges:
        """Return what is allowed for numbers."""
        return super().ranges() | {
            "val_fraction": (lambda x: 0 < x < 1, "more than 0 and less than 1"),
            "seed": SEED,
        }


@dataclass(frozen=True)
class ProbeOptions(ReadOutOptions):
    """Options of `mirl probe`."""

    epochs: int = 50
    """passes over the cached features"""
    probe_batch: int = 256
    """features in one step of the classifiers"""

    def ranges(self) -> Ranges:
        """Return what is allowed for numbers."""
        return super().ranges() | {
            "epochs": (lambda x: x >= 1, "1 or more"),
            "probe_batch": (lambda x: x >= 2, "2 or more"),  # batch norm needs two
        }


@dataclass(frozen=True)
class KNNOptions(ReadOutOptions):
    """Options of `mirl knn`."""

    k: list[int] | int = (10, 20, 100, 200)  # type: ignore[assignment]
    """numbers of neighbours, e.g. [10,20]; each is reported"""
    temperature: float = 0.07
    """a neighbour at cosine similarity s votes with weight exp(s / temperature)"""

    def ranges(self) -> Ranges:
        """Return what is allowed for numbers."""
        return super().ranges() | {"temperature": (lambda x: x > 0, "more than 0")}
