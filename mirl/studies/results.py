"""Finished cells: one JSON file each, which says what was found, how, with what and in what time."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mirl.errors import UserError, plural
from mirl.reports.contents import read_run
from mirl.studies.definition import Cell, Study
from mirl.studies.stages import Command, Stage, fingerprint_of, stages_of
from mirl.tasks.accuracy import write_json
from mirl.tasks.options import available_cores
from mirl.training.runs import read_config

DIGITS = 4  # of figures of blocks


@dataclass(frozen=True)
class Result:
    """What a finished cell's file holds.

    Attributes:
        fingerprint: of the definition it was run with.
        date: when it was finished; hardware: where.
        images: numbers of labelled ones to train and to test on.
        seconds: of each stage, by its command.
        commands: as a user would type them; options: of each, with every choice made.
        results: held-out loss, accuracies, diagnosis.
    """

    study: str
    cell: Cell
    fingerprint: str
    date: str
    versions: Mapping[str, str]
    hardware: Mapping[str, Any]
    images: Mapping[str, int]
    seconds: Mapping[str, float]
    commands: Sequence[str]
    options: Mapping[str, Any]
    results: Mapping[str, Any]

    def check(self) -> None:
        """Raise KeyError, TypeError or ValueError if something that tables need is not there."""
        for name in ("top1", "margin", "tested", "device"):
            getattr(self, name)

    @property
    def top1(self) -> float:
        """The fine-tuned accuracy in %."""
        return 100 * float(self.results["finetune"]["top1"])

    @property
    def margin(self) -> float:
        """Half of its 95 % interval, by the number of test images, in %."""
        low, high = self.results["finetune"]["interval"]
        return 50 * float(high - low)

    @property
    def tested(self) -> int:
        return int(self.images["test"])

    @property
    def device(self) -> str:
        return str(self.hardware["device"])


@dataclass(frozen=True)
class Found:
    """A study's results: those of its `cells`, and the cells whose file is of another definition."""

    study: Study
    cells: Sequence[Cell]
    done: Mapping[Cell, Result]
    other: frozenset[Cell]

    @cached_property
    def missing(self) -> list[Cell]:
        """List the cells that remain to be run, in order."""
        return [cell for cell in self.cells if cell not in self.done]

    def of(self, cells: Sequence[Cell]) -> list[Result]:
        """Return those of the cells' results that are there."""
        return [self.done[cell] for cell in cells if cell in self.done]


def find_results(study: Study) -> Found:
    """Read the results of a study's cells, all of which are resolved first.

    Raises:
        UserError: if the study's options are wrong, or a file cannot be read.
    """
    cells = study.cells()
    fingerprints = {cell: fingerprint_of(stages_of(study, cell)) for cell in cells}
    read = {cell: _read(study.results / f"{cell.name}.json") for cell in cells}
    done = {cell: result for cell, result in read.items() if result and result.fingerprint == fingerprints[cell]}
    return Found(study, cells, done, frozenset(cell for cell, result in read.items() if result and cell not in done))


def _read(path: Path) -> Result | None:
    if not path.exists():
        return None
    try:
        written = json.loads(path.read_text())
        result = Result(**written | {"cell": Cell(**written["cell"])})
        result.check()
        return result
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}); remove it to run the cell again") from error


def write_result(
    study: Study, cell: Cell, stages: Sequence[Stage], seconds: Mapping[Command, float], images: Mapping[str, int]
) -> Path:
    """Write the file of a cell whose stages are finished; paths in it are those of the study's file, not of this disk.

    Args:
        stages: as they were run; seconds: that each took.
    """
    as_declared = stages_of(study, cell)
    options: dict[str, Any] = {
        stage.command: _options(stage) | {name: declared.options[name] for name in ("data", "out", "weights")
                                          if name in declared.options}
        for stage, declared in zip(stages, as_declared, strict=True)
    }  # fmt: skip
    result = Result(
        study=study.name, cell=cell, fingerprint=fingerprint_of(stages),
        date=datetime.now().astimezone().isoformat(timespec="seconds"), versions=versions(), hardware=hardware(),
        images=images, seconds={command: round(taken, 1) for command, taken in seconds.items()},
        commands=[stage.typed for stage in as_declared], options=options,
        results={name: value for stage in stages for name, value in _outcome(stage).items()},
    )  # fmt: skip
    path = study.results / f"{cell.name}.json"
    write_json(path, asdict(result))
    return path


def versions() -> dict[str, str]:
    """Return versions of what computes."""
    return {name: version(name) for name in ("mirl", "torch", "timm")} | {"python": platform.python_version()}


def hardware() -> dict[str, Any]:
    """Name the GPU, or the CPU and how many of its threads compute."""
    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "cores": available_cores()}
    return {"device": f"{_cpu()}, {plural(torch.get_num_threads(), 'thread')}",
            "cores": available_cores()}  # fmt: skip


def _cpu() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or os.uname().machine


def _options(stage: Stage) -> dict[str, Any]:
    """Return a stage's options, with every choice that the command made."""
    if stage.command in ("pretrain", "finetune"):
        return read_config(stage.out)
    return dict(_document(stage)["options"])


def _document(stage: Stage) -> dict[str, Any]:
    place = stage.out / "diagnosis.json" if stage.command == "diagnose" else stage.out
    return dict(json.loads(place.read_text()))


def _outcome(stage: Stage) -> dict[str, Any]:
    """Return what a finished stage found."""
    if stage.command == "pretrain":
        return {"held_out_loss": round(read_run(stage.out).rows["held_out"][-1]["loss"], DIGITS)}
    if stage.command == "finetune":
        found = json.loads((stage.out / "results.json").read_text())
        return {"finetune": _accuracy(found.get("average", found["weights"]))}
    document = _document(stage)
    if stage.command == "diagnose":
        (encoder,) = document["encoders"]
        blocks = {name: _rounded(encoder["measures"][name]) for name in ("rank", "similarity")}
        return {"diagnosis": {"verdict": encoder["verdict"], **blocks, "change": _rounded(encoder["change"])}}
    (by_reader,) = document["blocks"].values()
    (found,) = by_reader.values()
    return {stage.command: _accuracy(found)}


def _accuracy(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in ("top1", "interval", "images")}


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else round(value, DIGITS) for value in values]
