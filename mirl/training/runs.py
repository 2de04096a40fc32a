"""The run folder: who may write it, what it holds, how a run is found again.

config.yaml  log.txt  metrics.jsonl  tensorboard/  checkpoints/  encoder/  autoencoder.safetensors
detector.safetensors or segmenter.safetensors  pictures/  results.json  report.html  unusable.txt  .lock
"""

import json
import logging
import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TextIO

import yaml
from rich.console import Console

from mirl.errors import UserError
from mirl.training.files import atomic
from mirl.training.locking import LOCK, take_lock

ENTRIES = (
    *("config.yaml", "log.txt", "metrics.jsonl", "tensorboard", "checkpoints", "encoder", "autoencoder.safetensors"),
    *("encoder.tmp", "pictures", "results.json", "readouts", "evaluations", "detector.safetensors", "detections.json"),
    *("segmenter.safetensors", "confusion.csv", "confusion.png", "predictions"),
    *("report.html", "reconstructions", "diagnosis", "unusable.txt"),
)
Command = Literal["pretrain", "finetune", "detect", "segment"]
# An option that only the command has, and the file of a model with heads that it leaves.
TOLD_BY: dict[Command, str] = {"pretrain": "method", "detect": "protocol", "segment": "crop_size"}
TRAINED: dict[Command, str] = {"detect": "detector.safetensors", "segment": "segmenter.safetensors"}
NOUNS: dict[Command, str] = {"detect": "detector", "segment": "segmenter"}
Incident = Literal["resumed", "stopped", "skipped step", "unusable file", "memory", "failed", "loss spike", "rollback",
                   "worker killed"]  # fmt: skip
console = Console(highlight=False, soft_wrap=True, emoji=False)  # "shapes:100" is not an emoji


class RunFolder:
    """A run's files. `say` prints a line and keeps it in log.txt; `record` appends one row of metrics.

    Args:
        path: the folder; made if missing.
        resume, overwrite: what to do with a run that is there already; neither is an error that says so.
        writes: False in all processes but the first.

    Raises:
        UserError: if the folder holds a run and neither is given, holds something else, is written by another process,
            or cannot be written; or if `resume` finds no run.
    """

    def __init__(self, path: str | Path, *, resume: bool, overwrite: bool, writes: bool = True) -> None:
        self.path, self.writes = Path(path), writes
        self.checkpoints, self.pictures = self.path / "checkpoints", self.path / "pictures"
        self.encoder, self.autoencoder = self.path / "encoder", self.path / "autoencoder.safetensors"
        self.unusable = self.path / "unusable.txt"
        self.tensorboard, self._config, self._metrics = (
            self.path / name for name in ("tensorboard", "config.yaml", "metrics.jsonl")
        )
        self._log = logging.getLogger(f"mirl.run.{id(self)}")
        self._lock: TextIO | None = None
        self._named: set[str] = set()  # what could not be written, said once
        if writes:
            try:
                self._claim(resume, overwrite)
            except BaseException:
                self.close()
                raise

    def _claim(self, resume: bool, overwrite: bool) -> None:
        if resume and overwrite:
            raise UserError("--resume and --overwrite were both given; choose one")
        try:
            self._holds_run(resume)  # before anything is written in a folder of something else
            self.pictures.mkdir(parents=True, exist_ok=True)
            self._lock = take_lock(self.path)
            is_run = self._holds_run(resume)
            if is_run and not (resume or overwrite):
                raise UserError(
                    f"{self.path} holds a run; add --resume to go on, --overwrite to start again, or another --out"
                )
            if overwrite and is_run:
                for name in reversed(ENTRIES):  # what makes it a run last: a kill in here leaves one
                    entry = self.path / name
                    folder = entry.is_dir() and not entry.is_symlink()
                    shutil.rmtree(entry) if folder else entry.unlink(missing_ok=True)
                self.pictures.mkdir()
            handler = _LogFile(self.path / "log.txt", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"cannot write the run folder {self.path}: {error.strerror}; choose another --out"
            ) from error
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self._log.addHandler(handler)
        self._log.setLevel(logging.INFO)
        self._log.propagate = False
        if self._lock is None:
            self.say(f"warning: the file system of {self.path} has no locks; start no second run in it")

    def _holds_run(self, resume: bool) -> bool:
        content = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
        if {"config.yaml", "log.txt"} <= content:  # many folders have a config.yaml; they are not ours
            return True
        # A run that stopped before its first step left no more than this; it may simply be started again.
        if content - {"log.txt", "pictures", LOCK} or any(self.pictures.glob("*")):
            raise UserError(f"{self.path} is not empty and not a run folder; choose another --out")
        if resume:
            raise UserError(f"{self.path} holds no run to resume; leave out --resume to start one")
        return False

    def close(self) -> None:
        """Close the log and let others write the folder."""
        for handler in self._log.handlers[:]:
            with suppress(OSError):  # what a full disk left in its buffer
                handler.close()
            self._log.removeHandler(handler)
        if self._lock:
            self._lock.close()

    def say(self, line: str) -> None:
        """Print `line` and keep it, with the time, in log.txt."""
        if self.writes:
            console.print(line, markup=False)
            self._log.info(line)

    def incident(self, step: int, what: Incident, line: str, *, quiet: bool = False) -> None:
        """Say `line`, or only note it, and record it: what the report lists as having happened at `step`."""
        (self.note if quiet else self.say)(line)
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        self.record({"kind": "incident", "step": step, "time": now, "what": what, "text": line})

    def note(self, line: str) -> None:
        """Keep `line` in log.txt without printing it."""
        if self.writes:
            self._log.info(line)

    @contextmanager
    def optional(self, what: str) -> Iterator[None]:
        """Go on without `what`, which a run can do without, if it cannot be made or written; say so once."""
        try:
            yield
        except Exception as error:  # nothing that can go wrong with a picture must stop days of training
            if what not in self._named:
                self._named.add(what)
                reason = " ".join(str(error).split())[:160] or type(error).__name__
                self.say(f"{what} cannot be written ({reason}); the training goes on without")

    def write_config(self, settings: dict[str, Any]) -> None:
        if self.writes:
            with atomic(self._config) as temporary:
                temporary.write_text(yaml.safe_dump(settings, sort_keys=False))

    def write_unusable(self, files: Mapping[str, str]) -> None:
        """List files that cannot be used, given as reasons by name: a line each, a tab between name and reason."""
        if self.writes:
            with atomic(self.unusable) as temporary:
                temporary.write_text("".join(f"{name}\t{reason}\n" for name, reason in sorted(files.items())))

    def record(self, row: dict[str, Any]) -> None:
        """Append one row to metrics.jsonl; a number that is not finite becomes null, as JSON wants."""
        if self.writes:
            row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            with open(self._metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl; see `read_rows`."""
        return read_rows(self.path)

    def last_step(self) -> int:
        """Return the last step that anything is recorded of."""
        return max((row["step"] for row in self.rows()), default=0)

    def forget_after(self, step: int) -> None:
        """Drop rows of later steps, which are done again, and a last line that a kill cut short; -1 drops all."""
        if not (self.writes and self._metrics.exists()):
            return
        rows = self.rows()
        with atomic(self._metrics) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))


class _LogFile(logging.FileHandler):
    """A log that says once that it cannot be written, where the library prints a traceback for each line."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not self.failed:
            self.failed = True
            console.print(f"{self.baseFilename} cannot be written ({sys.exc_info()[1]}); lines are shown here only")


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl of the run in folder `path`.

    Lines that are none of a run's are left out, as a last one that a kill cut short.
    """
    metrics = Path(path) / "metrics.jsonl"
    text = metrics.read_text(encoding="utf-8", errors="replace") if metrics.exists() else ""
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("kind"), str) and type(row.get("step")) is int:
            rows.append(row)
    return rows


def read_config(path: str | Path) -> dict[str, Any]:
    """Return the settings of the run in folder `path`."""
    try:
        return dict(yaml.safe_load((Path(path) / "config.yaml").read_text()))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{path} holds no run (no config.yaml); give a folder that `mirl pretrain --out` wrote"
        ) from error
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(f"{path}/config.yaml cannot be read: {str(error).splitlines()[0]}") from error


def command_of(config: dict[str, Any]) -> Command:
    """Return the command whose run has these settings."""
    return next((command for command, option in TOLD_BY.items() if option in config), "finetune")


def duration(seconds: float) -> str:
    """Write seconds as people do: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
