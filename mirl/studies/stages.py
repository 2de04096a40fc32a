"""What a cell runs: commands with all their options, and a fingerprint of what decides each one's outcome.

A cell that replaces blocks of an encoder only fine-tunes it; the others also read it out and diagnose it.
"""

import dataclasses
import hashlib
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mirl.errors import UserError, plural
from mirl.models.encoder import check_sizes
from mirl.models.masking import visible_count
from mirl.models.patches import grid_size, pair
from mirl.studies.definition import Cell, Study
from mirl.studies.reading import build
from mirl.tasks.options import FREE, OF_THIS_START, built_in
from mirl.tasks.pretrain import split_off_held_out
from mirl.tasks.settings.diagnosis import DiagnoseOptions
from mirl.tasks.settings.finetuning import Finetuning, resolve_finetuning
from mirl.tasks.settings.pretraining import Pretraining, Resolved, decoder_shape, method_of, resolve
from mirl.tasks.settings.readouts import KNNOptions, ProbeOptions

Command = Literal["pretrain", "finetune", "probe", "knn", "diagnose"]
OPTIONS: dict[Command, type] = {
    "pretrain": Pretraining, "finetune": Finetuning, "probe": ProbeOptions, "knn": KNNOptions,
    "diagnose": DiagnoseOptions,
}  # fmt: skip
# What the study sets, or what would make a cell another experiment: not for its file.
OWN = {"data", "weights", "model", "seed", "out", "decoder_depth", "depth", "reinit_last", "resume", "overwrite",
       "resume_from", "devices", "num_nodes", "strategy", "every_block", "reinit"}  # fmt: skip
# Of every training: one process, no page, and saved often enough to lose little when it is killed.
TRAINING = {"devices": 1, "report": False, "checkpoint_minutes": 2}
# Options that say where and how fast a command runs, not what comes out of it.
INDIFFERENT = (FREE | OF_THIS_START | {"data", "weights"}) - {"clip_grad", "rollback"}
MACHINE: dict[str, Any] = {"gpu": False, "devices": 1, "precision": "32"}  # any will do: none of it decides the outcome


@dataclass(frozen=True)
class Stage:
    """One command of a cell.

    Attributes:
        options: that it is given.
        fingerprint: of what decides its outcome: its options, those it chooses itself, and the pre-training before it.
        epochs: over the study's training images; 0 if it trains no encoder.
    """

    command: Command
    options: Mapping[str, Any]
    fingerprint: str
    epochs: int = 0

    @property
    def out(self) -> Path:
        """Where its results go."""
        return Path(self.options["out"])

    @property
    def typed(self) -> str:
        """The command as a user would type it."""
        words = (f"--{name} {shlex.quote(_typed(value))}" for name, value in self.options.items())
        return f"mirl {self.command} {' '.join(words)}"


def stages_of(study: Study, cell: Cell, data: str | None = None, runs: Path | None = None) -> list[Stage]:
    """Return what a cell runs, in order.

    Args:
        data: where the study's data lie on this machine, by default what its file says.
        runs: where run folders go, by default runs/studies/ and the study's name.

    Raises:
        UserError: if an option is unknown or not allowed, or if the options make no model.
    """
    try:
        return list(_stages(study, cell, data or study.data, encoder_folder(study, cell, runs)))
    except UserError as error:
        raise UserError(f"{study.path}: {cell.method} of depth {cell.depth}: {error}") from error


def runs_folder(study: Study, runs: Path | None = None) -> Path:
    """Return the folder of a study's run folders, by default runs/studies/ and its name."""
    return runs or Path("runs/studies") / study.name


def encoder_folder(study: Study, cell: Cell, runs: Path | None = None) -> Path:
    """Return the folder of a cell's encoder; cells share it that differ only in what fine-tuning replaces."""
    encoder = cell if study.truncates(cell.method) else dataclasses.replace(cell, replaced=0)
    return runs_folder(study, runs) / encoder.name


def fingerprint_of(stages: Sequence[Stage]) -> str:
    """Return what tells a cell of this definition from those of others."""
    return _digest([stage.fingerprint for stage in stages])


def pretraining_of(study: Study, cell: Cell) -> tuple[dict[str, Any], Resolved]:
    """Return the options of a cell's pre-training, and the same with every choice made."""
    given = {**_allowed(study.pretrain, "pretrain"), **_allowed(study.methods[cell.method], "methods")}
    if "image_size" not in given:
        raise UserError("pretrain has no image_size; add it")
    if cell.replaced > cell.depth:
        raise UserError(f"{plural(cell.replaced, 'block')} cannot be replaced; give at most {cell.depth}")
    if study.truncates(cell.method):
        given["taps"] = [cell.depth - cell.replaced]
    options = {"model": f"{study.model}_{cell.depth}", **_training(given, cell), "block_figures": False}
    settings = resolve(
        build(Pretraining, options, "pretrain"), images=len(split_off_held_out(study.images)[0]),
        shorter_side=min(pair(options["image_size"])), **MACHINE,
    )  # fmt: skip
    method = method_of(settings)
    blocks, rest = divmod(study.decoder_blocks, len(method.taps))
    if rest or not blocks:
        decoders = plural(len(method.taps), "decoder")
        raise UserError(f"decoder_blocks {study.decoder_blocks} cannot be shared by {decoders}")
    settings = dataclasses.replace(settings, decoder_depth=blocks)
    decoder_shape(settings, method)
    check_sizes(settings.image_size, settings.patch_size)
    visible_count(math.prod(grid_size(settings.image_size, settings.patch_size)), settings.mask_ratio)
    return options | {"decoder_depth": blocks}, settings


def _stages(study: Study, cell: Cell, data: str, folder: Path) -> Iterator[Stage]:
    training, test = (data, data) if built_in(data) else (f"{data}/train", f"{data}/test")
    options, settings = pretraining_of(study, cell)
    before = [study.data, study.images, _outcome("pretrain", options, settings)]
    weights = str(folder / "pretrain")
    yield Stage("pretrain", {"data": training, **options, "out": weights}, _digest(before), settings.epochs)

    given = _training(_allowed(study.finetune, "finetune"), cell)
    if study.truncates(cell.method):
        given["depth"] = cell.depth
    elif cell.replaced:
        given["reinit_last"] = cell.replaced
    finetuning = resolve_finetuning(
        build(Finetuning, given, "finetune"), images=study.images, depth=cell.depth, image_size=settings.image_size,
        patch_size=settings.patch_size, **MACHINE,
    )  # fmt: skip
    out = folder / (f"finetune_replaced{cell.replaced}" if cell.replaced else "finetune")
    options = {"weights": weights, "data": data, **given, "out": str(out)}
    yield Stage("finetune", options, _digest([*before, _outcome("finetune", given, finetuning)]), finetuning.epochs)
    if cell.replaced and not study.truncates(cell.method):
        return

    readers: dict[Command, tuple[Mapping[str, Any], str, str]] = {
        "probe": (study.probe, data, "probe.json"),
        "knn": ({"k": 20, **study.knn}, data, "knn.json"),
        "diagnose": (study.diagnose, data if study.diagnose.get("labels") else test, "diagnosis"),
    }
    for command, (wanted, place, file) in readers.items():
        given = {"weights": weights, **_allowed(wanted, command), "seed": cell.seed}
        outcome = _outcome(command, given, build(OPTIONS[command], given, command))
        if command == "knn" and type(given["k"]) is not int:
            raise UserError(f"knn: k {given['k']} is not allowed; give one number")
        yield Stage(command, given | {"data": place, "out": str(folder / file)}, _digest([*before, outcome]))


def _allowed(given: Mapping[str, Any], what: str) -> dict[str, Any]:
    if own := sorted(OWN & set(given)):
        raise UserError(f"{what}: {own[0]} is set by the study itself; leave it out")
    return dict(given)


def _training(given: Mapping[str, Any], cell: Cell) -> dict[str, Any]:
    """Add what every training of a cell is given; it is evaluated at its end alone, unless the file says otherwise."""
    options = {**TRAINING, **given, "seed": cell.seed}
    if given.get("epochs"):
        options.setdefault("evaluate_epochs", given["epochs"])
    return options


def _outcome(command: Command, given: Mapping[str, Any], resolved: Any) -> dict[str, Any]:
    """Return options that decide what a command computes, without those left at their defaults.

    So a new option of the command leaves the fingerprint as it was, and a new way to choose one changes it. A default
    that changes goes unnoticed; results keep all options.
    """
    values, fields = dataclasses.asdict(resolved), dataclasses.fields(OPTIONS[command])
    chosen = {f.name: values[f.name] for f in fields if f.name not in INDIFFERENT and values[f.name] != f.default}
    return chosen | {"precision": given.get("precision")}  # as given: what `auto` is depends on the machine


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _typed(value: Any) -> str:
    """Write an option's value for the command line."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_typed, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
