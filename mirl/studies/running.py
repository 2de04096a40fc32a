"""Run the missing cells of a study, say what is planned and left, and publish table and figure after each."""

import time
from pathlib import Path

from mirl.errors import UserError, plural
from mirl.studies.cells import count_images, run_cell
from mirl.studies.definition import Study
from mirl.studies.estimate import Estimate, estimate
from mirl.studies.figure import draw_figure
from mirl.studies.results import Found, find_results
from mirl.studies.stages import runs_folder
from mirl.studies.table import write_table
from mirl.training.locking import locked
from mirl.training.runs import console, duration


def publish(found: Found) -> Path:
    """Write a study's table and figure beside its results; return the table's path.

    Raises:
        UserError: if they cannot be written.
    """
    path = found.study.results.with_suffix(".md")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(write_table(found))
        draw_figure(found, path.with_suffix(".png"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make room, or let the folder be written") from error
    return path


def run_missing(
    study: Study, found: Found, data: str | None, runs: Path | None, minutes: float | None, *, only_next: bool
) -> Found:
    """Run missing cells and publish after each; return what is finished then. Arguments are as `mirl study` has them.

    Raises:
        UserError: on a mistake in the study's options or its data; if another process runs it in the same folder.
        KeyboardInterrupt: after SIGINT or SIGTERM, once the state is saved.
    """
    images = count_images(study, data or study.data) if found.missing else {}
    with locked(runs_folder(study, runs)):  # only now: a mistake leaves no folder
        return _run(study, found, images, data, runs, minutes, only_next=only_next)


def _run(
    study: Study, found: Found, images: dict[str, int], data: str | None, runs: Path | None, minutes: float | None, *,
    only_next: bool,
) -> Found:  # fmt: skip
    guess, started = estimate(found, data, runs), time.monotonic()
    _say_plan(found, guess)
    while found.missing:
        left = None if minutes is None else 60 * minutes - (time.monotonic() - started)
        cell = next((cell for cell in found.missing if left is None or guess.seconds(cell) <= left), None)
        if cell is None:
            assert left is not None
            console.print(
                f"no missing cell fits: {duration(max(0.0, left))} are left, and the shortest takes about "
                f"{duration(min(map(guess.seconds, found.missing)))} ({guess.words}); give more --minutes",
                markup=False,
            )
            break
        console.print(f"\n{cell.name}: about {duration(guess.seconds(cell))}", markup=False)
        try:
            path = run_cell(study, cell, images, data, runs)
        except KeyboardInterrupt:
            console.print(f"{cell.name} is not finished; the same command goes on with it", markup=False)
            raise
        found = find_results(study)
        publish(found)
        guess = estimate(found, data, runs)
        console.print(
            f"saved {path}; {len(found.done)} of {len(found.cells)} cells are finished, about "
            f"{duration(guess.seconds(*found.missing))} left",
            markup=False,
        )
        if only_next:
            break
    return found


def _say_plan(found: Found, guess: Estimate) -> None:
    missing = found.missing
    other = f", {len(found.other)} of them with a result of another definition" if found.other else ""
    lines = [
        f"{found.study.path}: {found.study.title}",
        f"{plural(len(found.cells), 'cell')}, {len(found.done)} finished, {len(missing)} missing{other}",
    ]
    if missing:
        lines += [f"about {duration(guess.seconds(*missing))} ({guess.words})", f"next: {missing[0].name}"]
    console.print("\n".join(lines), markup=False)
