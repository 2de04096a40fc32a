"""`mirl doctor`: what is in a folder of images, what is wrong with it, and what to train on it with."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from mirl.checkup.findings import findings
from mirl.checkup.quarantine import check_quarantine, move_broken
from mirl.checkup.records import Records
from mirl.checkup.report import JSON, PICTURE, DataReport, Speed
from mirl.checkup.sizes_picture import draw_sizes
from mirl.checkup.suggestion import Kept, suggest, views_per_second
from mirl.data.inspection import Inspection, inspect, lost
from mirl.data.scanning import Lost, scan
from mirl.data.sources import ImageFiles, open_source
from mirl.errors import UserError, plural, printable
from mirl.tasks.options import available_cores, default_folder
from mirl.tasks.settings.checkup import DoctorOptions
from mirl.training.files import check_writable
from mirl.training.runs import console

NO_SIZES = (0, 0), (0, 0)  # nothing is too small where nothing is suggested


def doctor(data: str, **options: Any) -> DataReport:
    """Look at every image file of a folder: name what is broken or odd, and suggest how to pre-train on the rest.

    Takes the fields of `mirl.DoctorOptions`, e.g. `mirl.doctor("photos", move_bad="bad")`.

    Raises:
        UserError: on a mistake in the options, if there are no image files, or if a folder cannot be written.
    """
    given = DoctorOptions(data=data, **options)
    folder = Path(given.out or default_folder(given.data, "data", "_doctor")).expanduser()
    quarantine = Path(given.move_bad).expanduser() if given.move_bad else None
    source = _open(given.data, given.channels, folder, quarantine)
    began, processes = time.perf_counter(), given.workers or available_cores()
    records = inspect_files(source, given.sample, given.timeout, processes)
    pace = len(records) / (time.perf_counter() - began)
    moved, problems = move_broken(records, quarantine) if quarantine else (np.empty(0, np.int64), [])
    try:
        suggestion, reason = suggest(Kept(records, moved), given.data, given.gpus), []
    except UserError as error:
        suggestion, reason = None, [f"no suggestion: {error}"]
    sizes = (suggestion.settings.image_size, suggestion.settings.patch_size) if suggestion else NO_SIZES
    views = views_per_second(records, suggestion.settings) if suggestion else None
    report = DataReport(
        given.data, folder, records, findings(records, *sizes), suggestion, moved, quarantine,
        Speed(processes, pace, views),
    )  # fmt: skip
    try:
        report.write()
        if report.pictured:
            draw_sizes(records, sizes[0], given.data, folder / PICTURE)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --out") from error
    for line in (*report.lines(), *problems, *reason):
        print(printable(line))
    return report


def _open(data: str, channels: int, folder: Path, quarantine: Path | None) -> ImageFiles:
    """Find the image files, and make sure that what will be written has a place that is not theirs."""
    source = open_source(data, channels=channels)
    if not isinstance(source, ImageFiles):
        raise UserError(f"{data} is not a folder of image files; give a folder, a glob or a list file")
    if (folder / PICTURE).exists() and not (folder / JSON).exists():
        raise UserError(f"--out {folder} holds another {PICTURE}, which would be lost; give another folder")
    if quarantine:
        check_quarantine(quarantine, Path(data).expanduser())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --out") from error
    check_writable(folder / JSON)
    return source


def inspect_files(source: ImageFiles, sample: int | None, timeout: float, processes: int) -> Records:
    """Inspect all files of a source, or a random sample of them, in several processes."""
    members = np.arange(len(source))
    if sample is not None and sample < len(source):
        members = np.sort(np.random.default_rng(0).choice(len(source), sample, replace=False))
    records = Records(source, members)
    found = scan(partial(_inspect, source), members, processes=processes, timeout=timeout)
    title = f"looking at {plural(len(members), 'file', form=',')}"
    for member, result in track(
        found, title, total=len(members), console=console, transient=True, disable=not console.is_terminal
    ):
        records.put(member, lost(result) if isinstance(result, Lost) else result)
    return records


def _inspect(source: ImageFiles, member: int) -> Inspection:
    return inspect(source.path_of(member), source.channels)
