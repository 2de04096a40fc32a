"""How long a cell will take: what finished cells took on this hardware, in proportion to what they computed."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from mirl.errors import plural
from mirl.models.encoder import parse_model
from mirl.models.masking import visible_count
from mirl.models.patches import grid_size
from mirl.studies.cells import unfinished
from mirl.studies.definition import Cell, Study
from mirl.studies.results import Found, hardware
from mirl.studies.stages import Command, Stage, encoder_folder, pretraining_of, stages_of

BACKWARD = 3  # a training step is a forward pass and a backward pass, which is twice as long
READ = 1.3  # passes over the training images that a read-out or a diagnosis takes, roughly


@dataclass(frozen=True)
class Estimate:
    """Seconds of cells.

    Attributes:
        words: where the figures come from.
        rates: seconds for a unit of cost, of each command; `rate` is of those that were never timed.
    """

    study: Study
    words: str
    rates: dict[Command, float]
    rate: float
    data: str | None
    runs: Path | None

    def seconds(self, *cells: Cell) -> float:
        """Return what the rest of some cells will take; stages that they share are counted once."""
        waiting: dict[Path, float] = {}
        for cell in cells:
            stages = stages_of(self.study, cell, self.data, self.runs)
            for stage in unfinished(stages, encoder_folder(self.study, cell, self.runs)):
                rate = self.rates.get(stage.command, self.rate)
                waiting[stage.out] = rate * cost(self.study, cell, stage)
        return sum(waiting.values())


def estimate(found: Found, data: str | None = None, runs: Path | None = None) -> Estimate:
    """Take the times of cells that were finished on this hardware, or, while there are none, what the file expects."""
    study, here = found.study, hardware()["device"]
    spent: dict[Command, list[tuple[float, float]]] = {}
    timed = [result for result in found.done.values() if result.device == here]
    for result in timed:
        for stage in stages_of(study, result.cell):
            both = result.seconds[stage.command], cost(study, result.cell, stage)
            spent.setdefault(stage.command, []).append(both)
    if timed:
        rates = {command: _rate(both) for command, both in spent.items()}
        words = f"from {plural(len(timed), 'cell')} timed on {here}"
        return Estimate(study, words, rates, _rate(both for pairs in spent.values() for both in pairs), data, runs)
    expected = study.expected
    typical = replace(found.cells[0], depth=expected.depth)
    whole = sum(cost(study, typical, stage) for stage in stages_of(study, typical))
    words = (
        f"no cell was timed on this machine yet; the file expects {expected.minutes:g} min for a cell of depth "
        f"{expected.depth} on {expected.machine}"
    )
    return Estimate(study, words, {}, 60 * expected.minutes / whole, data, runs)


def _rate(spent: Iterable[tuple[float, float]]) -> float:
    """Return seconds for a unit of cost from pairs of both."""
    seconds, units = map(sum, zip(*spent, strict=True))
    return seconds / units


def cost(study: Study, cell: Cell, stage: Stage) -> float:
    """Return what a stage computes, in tokens that pass a block of the encoder: a forward pass of one token each."""
    _, settings = pretraining_of(study, cell)
    width = parse_model(settings.model)[0]
    patches = math.prod(grid_size(settings.image_size, settings.patch_size))
    whole = float(cell.depth * (1 + patches))
    if stage.command == "pretrain":
        blocks = settings.taps[-1] if settings.taps else cell.depth
        narrower = (settings.decoder_width or width) / width
        whole = blocks * (1 + visible_count(patches, settings.mask_ratio))
        whole += study.decoder_blocks * (1 + patches) * narrower
    return study.images * whole * (BACKWARD * stage.epochs or READ)
