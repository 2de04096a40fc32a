"""`mirl study`: run a grid of small experiments, cell by cell, and show it as the paper shows its own.

Whatever is finished is kept, so a study can be run in pieces, stopped at any moment and started again.
"""

from pathlib import Path
from typing import Any

from mirl.studies.definition import find_study, read_study
from mirl.tasks.settings.studying import StudyOptions
from mirl.training.runs import console


def study(name: str, **options: Any) -> Path:
    """Run the missing cells of a study, or only show what is there; return the table's path.

    Takes the fields of `mirl.StudyOptions`, e.g. `mirl.study("smoke", minutes=30)`.

    Raises:
        UserError: on a mistake in the study, its data or its results; if another process runs it in the same folder.
        KeyboardInterrupt: after SIGINT or SIGTERM, once the state is saved.
    """
    given = StudyOptions(name=name, **options)
    declared, runs = read_study(find_study(given.name)), Path(given.out) if given.out else None
    # They import every command and so PyTorch; a mistake in the file is said before.
    from mirl.studies.results import find_results
    from mirl.studies.running import publish, run_missing

    found = find_results(declared)
    if not given.table:
        found = run_missing(declared, found, given.data, runs, given.minutes, only_next=given.next)
    path = publish(found)
    console.print(f"\n{path.read_text()}\nsaved {path} and {path.with_suffix('.png').name}", markup=False)
    return path
