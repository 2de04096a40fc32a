"""What `mirl pretrain` would choose for a data set that was looked at, and how fast it would read it.

The choices are pre-training's own, `resolve`, so that the two cannot disagree.
"""

import math
import shlex
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from mirl.checkup.records import Records
from mirl.data.decode import BadImage
from mirl.data.loading import Views
from mirl.data.transforms import training_view
from mirl.errors import plural
from mirl.models.patches import Size
from mirl.tasks.pretrain import split_off_held_out, typical_side
from mirl.tasks.settings.pretraining import Pretraining, Resolved, resolve
from mirl.training.processes import best_precision

TIMED = 64  # images read as pre-training reads them
TIMED_SECONDS = 5.0
LEAST_BUDGET = 0.01  # of unusable files: a disk that begins to fail stops the run
SMALL_FILES, MANY_FILES = 2**20, 100_000  # bytes of a file, files: from here on shards help
LARGER = 4  # times as large as pre-training needs, from where on smaller copies help


class Kept:
    """The images of a source that are left where they are, whose sizes are known: `members` are indices into it."""

    def __init__(self, records: Records, moved: np.ndarray) -> None:
        self.records, self.source, self.moved = records, records.source, moved
        self.members = np.delete(np.arange(len(self.source)), records.members[moved])

    def __len__(self) -> int:
        return len(self.members)

    def name_of(self, index: int) -> str:
        """Return the file's path."""
        return self.source.name_of(int(self.members[index]))

    def read(self, index: int) -> torch.Tensor:
        """Return an image of the right size and no content, or raise `BadImage`; read it if it was not looked at."""
        member = int(self.members[index])
        position = self.records.position(member)
        if position is None:
            return self.source.read(member)
        if not self.records.usable[position]:
            raise BadImage(self.records.text("reason", position))
        return torch.empty((), dtype=torch.uint8).expand(self.source.channels, *self.records.size(position))

    def skipped(self, smallest: Size) -> float:
        """Return the share of those looked at that are unusable, or smaller than (height, width)."""
        rows = self.records.rows
        wrong = ~self.records.usable | (rows["height"] < smallest[0]) | (rows["width"] < smallest[1])
        return float(np.delete(wrong, self.moved).mean()) if len(wrong) > len(self.moved) else 0.0


@dataclass(frozen=True)
class Suggestion:
    """What pre-training would choose.

    Attributes:
        settings: its options.
        training: images to train on; side: median pixels of their shorter sides.
        gpus: that will train; 0 is a CPU.
    """

    settings: Resolved
    training: int
    side: float
    gpus: int

    @property
    def command(self) -> str:
        """The command line that says all of it."""
        s = self.settings
        options = {
            "data": s.data, "channels": None if s.channels == 3 else s.channels, "out": s.out, "model": s.model,
            "image_size": s.image_size[0], "patch_size": s.patch_size[0], "batch_size": s.batch_size,
            "epochs": s.epochs, "max_bad": f"{s.max_bad:g}",
        }  # fmt: skip
        return " ".join(["mirl pretrain", *(f"--{k} {shlex.quote(str(v))}" for k, v in options.items() if v)])

    def reasons(self) -> list[tuple[str, str]]:
        """Return each choice, in words, and what it rests on."""
        s, images = self.settings, f"{plural(self.training, 'image', form=',')} to train on"
        devices = f"{plural(self.gpus, 'GPU')}" if self.gpus else "no GPU"
        return [
            (f"image size {s.image_size[0]}, patch size {s.patch_size[0]}", f"shorter sides of about {self.side:g} px"),
            (f"model {s.model}", f"{images}, {devices}"),
            (f"batch {s.batch_size}", f"steps in an epoch: {self.training // s.batch_size:,}"),
            (f"epochs {s.epochs}", images),
            (f"max_bad {s.max_bad:g}", "twice the share of files that cannot be used, at least 1 %"),
        ]


def suggest(source: Kept, data: str, gpus: int | None) -> Suggestion:
    """Ask pre-training for its choices, and allow for as many unusable files as there are.

    Args:
        data: as the user named it; gpus: that will train, by default this machine's.

    Raises:
        UserError: if there are too few images, or none that can be read.
    """
    gpus = torch.cuda.device_count() if gpus is None else gpus
    training, _ = split_off_held_out(len(source))
    side = typical_side(source)
    settings = resolve(
        Pretraining(data=data, channels=source.source.channels), images=len(training), shorter_side=side,
        gpu=gpus > 0, devices=max(1, gpus), precision=best_precision(),
    )  # fmt: skip
    allowed = budget(source.skipped(settings.patch_size))
    return Suggestion(replace(settings, max_bad=allowed), len(training), side, gpus)


def budget(unusable: float) -> float:
    """Return twice the share of unusable files, in whole percent, at least one."""
    return min(1.0, max(LEAST_BUDGET, math.ceil(200 * unusable) / 100))


def views_per_second(records: Records, settings: Resolved) -> float | None:
    """Measure how many images a core reads, crops and resizes as pre-training does; None if none of them can be."""
    view = training_view(settings.image_size, settings.min_crop, settings.flip)
    views = Views(records.source, records.members[records.usable], view, smallest=settings.patch_size, key=(0,))
    threads, times = torch.get_num_threads(), []
    torch.set_num_threads(1)  # as in a data worker
    try:
        end = time.perf_counter() + TIMED_SECONDS
        for index in np.unique(np.linspace(0, len(views) - 1, TIMED).astype(int)) if len(views) else ():
            began = time.perf_counter()
            if len(views[0, int(index)]):
                times.append(time.perf_counter() - began)
            if time.perf_counter() > end:
                break
    finally:
        torch.set_num_threads(threads)
    return len(times) / sum(times) if times else None


def advice(source: Kept, suggestion: Suggestion) -> list[str]:
    """Say what else would make training better or faster."""
    records, settings = source.records, suggestion.settings
    sizes = records.of_usable("bytes")
    mean = float(sizes.mean()) if len(sizes) else 0.0
    lines = []
    if len(source) >= MANY_FILES and mean <= SMALL_FILES:
        lines.append("many small files: `mirl shard` packs them, and network disks read a few large files faster")
    if suggestion.side >= LARGER * max(settings.image_size) and mean > SMALL_FILES / 4:
        times = suggestion.side / max(settings.image_size)
        lines.append(
            f"images are {times:.0f} times as large as is needed: `mirl shard` with --resize makes them smaller"
        )
    if settings.channels != 1 and set(records.counts("mode")) == {"L"}:
        lines.append("all images are grey: --channels 1 computes a third of the pixels")
    return lines
