"""What a run folder says of its run, read for the report: options, rows of metrics, results, what went wrong.

A run may still be going, may have been killed, or may be of an earlier release: whatever is missing is empty here.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from mirl.errors import UserError
from mirl.training.runs import TRAINED, Command, RunFolder, command_of, read_config

Row = dict[str, Any]
KINDS = ("train", "held_out", "blocks", "gradients", "pictures", "incident")
SKIPPED = re.compile(r"^[\d-]{10} [\d:]{8} skipped (?!\d+ unusable files? so far)(.*)$", re.MULTILINE)
# The forms of results, by the first part of their path: a type, a choice of several, a list of one form, or the forms
# of names that may be there (`...`: of all others).
ACCURACY = {"interval": list, "per_class": dict}
CLASSES = {"per_class": [dict]}
JUDGED = {"options": dict, **CLASSES, "multi_scale": (bool, CLASSES)}
FORMS: dict[str, Any] = {
    "results.json": {"weights": ACCURACY, "average": ACCURACY, **JUDGED},
    "evaluations": {"accuracy": ACCURACY, **JUDGED},
    "readouts": {"options": dict, "blocks": {...: {...: ACCURACY}}},
    "diagnosis": {"encoders": [{"verdict": list}]},
}


@dataclass(frozen=True)
class Documents:
    """JSON files of one kind: `found` by path in the run folder, and the paths of those that are `unreadable`."""

    found: dict[str, Row]
    unreadable: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """A run, as its folder tells it.

    Attributes:
        name: the folder's, or more of its path where several runs share it.
        config: the options, resolved; rows: of metrics.jsonl, by kind, in the order in which they were written.
        log: the text of log.txt; written: when metrics.jsonl was last written, if it was.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    rows: dict[str, list[Row]]
    log: str
    written: datetime | None

    @property
    def command(self) -> Command:
        """The command whose run it was."""
        return command_of(self.config)

    @property
    def pretraining(self) -> bool:
        return self.command == "pretrain"

    @property
    def step(self) -> int:
        """The last recorded step."""
        return int(self.rows["train"][-1]["step"]) if self.rows["train"] else 0

    @property
    def steps(self) -> int | None:
        """Steps of the whole run; None before the first one, or where the options do not tell."""
        epochs, last = number(self.config.get("epochs")), self.rows["train"][-1:]
        epoch = number(last[0].get("epoch")) if last else None
        return round(epochs * self.step / epoch) if epochs and epoch else None

    @property
    def finished(self) -> bool:
        left = TRAINED.get(self.command, "encoder")
        return self.steps is not None and self.step >= self.steps and (self.folder / left).exists()

    def skipped_images(self) -> dict[str, str]:
        """Return the names of files that could not be used, with the reasons."""
        found = (line.partition(": ") for line in SKIPPED.findall(self.log))
        return {name: reason for name, _, reason in found}

    def documents(self, pattern: str) -> Documents:
        """Read the JSON files that match `pattern`; those of another form than theirs are unreadable."""
        found, unreadable = {}, []
        for path in sorted(self.folder.glob(pattern)):
            name = path.relative_to(self.folder).as_posix()
            try:
                document = json.loads(path.read_text())
            except (OSError, ValueError, RecursionError):
                document = None
            if _fits(document, FORMS[pattern.partition("/")[0]]):
                found[name] = document
            else:
                unreadable.append(name)
        return Documents(found, tuple(unreadable))


def read_run(path: str | Path) -> Run:
    """Read the run in folder `path`.

    Raises:
        UserError: if it holds no run, or its files cannot be read.
    """
    folder = Path(path).expanduser()
    metrics, log = folder / "metrics.jsonl", folder / "log.txt"
    try:
        config = read_config(folder)
        return Run(
            folder=folder,
            name=folder.resolve().name,
            config=config,
            rows=_by_kind(RunFolder(folder, resume=False, overwrite=False, writes=False).rows()),
            log=log.read_text(errors="replace") if log.is_file() else "",
            written=datetime.fromtimestamp(metrics.stat().st_mtime) if metrics.exists() else None,
        )
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}; give the folder of a run") from error


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Read several runs, and give each a name of its own: the last parts of its path that tell them apart.

    Raises:
        UserError: if there is none, one is given twice, or one cannot be read.
    """
    if not paths:
        raise UserError("no run was given; give the folder of one, or of several to compare them")
    runs = [read_run(path) for path in paths]
    places = [run.folder.resolve() for run in runs]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise UserError(f"{runs[index].folder} was given twice; give runs that differ")
    return [
        replace(run, name=name) for run, name in zip(runs, names_of([place.parts for place in places]), strict=True)
    ]


def names_of(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """Name paths that differ, given by their parts, by as few of the last as tell them apart; never by the root."""
    depth = 1
    while len({parts[-depth:] for parts in paths}) < len(paths):
        depth += 1
    return ["/".join(part for part in parts[-depth:] if part != "/") for parts in paths]


def number(value: object) -> float | None:
    """Return `value` if it is a finite number, else None."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None  # type: ignore[arg-type]


def _by_kind(rows: list[Any]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {kind: [] for kind in KINDS}
    for row in rows:
        placed = ("step",) if isinstance(row, dict) and row.get("kind") == "incident" else ("step", "epoch")
        if isinstance(row, dict) and all(number(row.get(name)) is not None for name in placed):
            found.setdefault(str(row.get("kind")), []).append(row)
    return found


def _fits(value: object, form: Any) -> bool:
    """Tell whether a JSON value is of a form, as FORMS has them."""
    if isinstance(form, dict):
        return isinstance(value, dict) and all(
            _fits(each, form.get(name, form.get(..., object))) for name, each in value.items()
        )
    if isinstance(form, list):
        return isinstance(value, list) and all(_fits(each, form[0]) for each in value)
    return any(_fits(value, each) for each in form) if isinstance(form, tuple) else isinstance(value, form)
