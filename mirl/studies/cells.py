"""Run one cell: its stages in order, each to its end, going on where an earlier start was stopped."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mirl.analysis.degradation import diagnose
from mirl.data.labels import open_split
from mirl.data.sources import open_source
from mirl.errors import UserError
from mirl.studies.definition import Cell, Study
from mirl.studies.results import write_result
from mirl.studies.stages import Command, Stage, encoder_folder, stages_of
from mirl.tasks.accuracy import write_json
from mirl.tasks.finetune import finetune
from mirl.tasks.knn import knn
from mirl.tasks.options import built_in
from mirl.tasks.pretrain import pretrain
from mirl.tasks.probe import probe
from mirl.training.runs import console

FUNCTIONS: dict[Command, Callable[..., Any]] = {
    "pretrain": pretrain, "finetune": finetune, "probe": probe, "knn": knn, "diagnose": diagnose,
}  # fmt: skip
LEDGER = "stages.json"  # in an encoder's folder: what was begun, how long it took, whether it is finished


def count_images(study: Study, data: str) -> dict[str, int]:
    """Count the study's labelled images.

    Raises:
        UserError: if there are no such data, or not as many to train on as the study says.
    """
    train, test = map(len, open_split(data))
    if train != study.images:
        raise UserError(
            f"{study.path} is of {study.images} training images, and {data} has {train}; give --data with as many, or "
            "write another study"
        )
    if not built_in(data):
        open_source(f"{data}/test")  # says what is missing: val/ would do for reading classes, and for nothing else
    return {"train": train, "test": test}


def run_cell(study: Study, cell: Cell, images: dict[str, int], data: str | None, runs: Path | None) -> Path:
    """Run what is left of a cell and write its result, whose path is returned.

    Args:
        images: their numbers; data, runs: as `stages_of` takes them.

    Raises:
        UserError: what the commands raise, and if stages were begun with another definition.
        KeyboardInterrupt: after SIGINT or SIGTERM; what was begun goes on at the next start.
    """
    stages, folder = stages_of(study, cell, data, runs), encoder_folder(study, cell, runs)
    seconds = {stage.command: _finish(stage, folder) for stage in stages}
    return write_result(study, cell, stages, seconds, images)


def unfinished(stages: Sequence[Stage], folder: Path) -> list[Stage]:
    """Return the stages that are not finished."""
    ledger = _read(folder)
    return [stage for stage in stages if not ledger.get(stage.out.name, {}).get("finished")]


def _finish(stage: Stage, folder: Path) -> float:
    """Bring a stage to its end; return the seconds that it took, over all starts."""
    ledger = _read(folder)
    entry = ledger.setdefault(stage.out.name, {"fingerprint": stage.fingerprint, "seconds": 0.0, "finished": False})
    if entry["fingerprint"] != stage.fingerprint:
        raise UserError(f"{stage.out} is of another definition of the study; remove {folder}, or choose another --out")
    if not entry["finished"]:
        console.print(f"\n{stage.typed}", markup=False)
        write_json(folder / LEDGER, ledger)
        started = time.monotonic()
        again = {"resume": (stage.out / "config.yaml").exists()} if stage.epochs else {}
        try:
            FUNCTIONS[stage.command](**stage.options, **again)
            entry["finished"] = True
        finally:
            entry["seconds"] += time.monotonic() - started
            write_json(folder / LEDGER, ledger)
    # Two of a training, three times the model each. After the ledger: until it says finished, a start needs them.
    shutil.rmtree(stage.out / "checkpoints", ignore_errors=True)
    return float(entry["seconds"])


def _read(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / LEDGER).read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / LEDGER} cannot be read ({type(error).__name__}); remove {folder}") from error
