"""`mirl study`: run a grid of small experiments, cell by cell, and show it as the paper shows its own.

Whatever is finished is kept, so a study can be run in pieces, stopped at any moment and started again.
"""

import time
from pathlib import Path

from mirl.errors import UserError
from mirl.studies.cells import count_images, run_cell
from mirl.studies.definition import Study, find_study, read_study
from mirl.studies.estimate import Estimate, estimate
from mirl.studies.figure import draw_figure
from mirl.studies.results import Found, find_results
from mirl.studies.table import write_table
from mirl.training.runs import console, duration


def study(
    name: str, *, data: str | None = None, out: str | None = None, next: bool = False, minutes: float | None = None,
    table: bool = False,
) -> Path:  # fmt: skip
    """Run the missing cells of a study, or only show what is there; return the table's path.

    Args:
        name: of studies/NAME.yaml, or a YAML file
        data: where the study's data lie; by default where its file says
        out: folder of run folders; by default runs/studies/ and the study's name
        next: run only the next missing cell, or the next that fits into --minutes
        minutes: start no cell that would end later than this from now
        table: run nothing; write table and figure of what is there

    Raises:
        UserError: on a mistake in the study, its data or its results.
        KeyboardInterrupt: after SIGINT or SIGTERM, once the state is saved.
    """
    if minutes is not None and minutes <= 0:
        raise UserError(f"--minutes {minutes:g} is not allowed; give more than 0")
    if table and (next or minutes is not None):
        raise UserError("--table runs nothing; leave out --next and --minutes")
    declared, runs = read_study(find_study(name)), Path(out) if out else None
    found = find_results(declared)
    if not table:
        found = _run(declared, found, data, runs, minutes, only_next=next)
    path = publish(found)
    console.print(f"\n{path.read_text()}\nsaved {path} and {path.with_suffix('.png').name}", markup=False)
    return path


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


def _run(
    study: Study, found: Found, data: str | None, runs: Path | None, minutes: float | None, *, only_next: bool
) -> Found:
    images = count_images(study, data or study.data) if found.missing else {}
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
        f"{len(found.cells)} cells, {len(found.done)} finished, {len(missing)} missing{other}",
    ]
    if missing:
        lines += [f"about {duration(guess.seconds(*missing))} ({guess.words})", f"next: {missing[0].name}"]
    console.print("\n".join(lines), markup=False)
