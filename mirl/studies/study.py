"""`mirl study`: run a grid of small experiments, cell by cell, and show it as the paper shows its own.

Whatever is finished is kept, so a study can be run in pieces, stopped at any moment and started again.
"""

from pathlib import Path

from mirl.errors import UserError
from mirl.studies.definition import find_study, read_study
from mirl.training.runs import console


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
        UserError: on a mistake in the study, its data or its results; if another process runs it in the same folder.
        KeyboardInterrupt: after SIGINT or SIGTERM, once the state is saved.
    """
    if minutes is not None and minutes <= 0:
        raise UserError(f"--minutes {minutes:g} is not allowed; give more than 0")
    if table and (next or minutes is not None):
        raise UserError("--table runs nothing; leave out --next and --minutes")
    declared, runs = read_study(find_study(name)), Path(out) if out else None
    # They import every command and so PyTorch; a mistake in the file is said before.
    from mirl.studies.results import find_results
    from mirl.studies.running import publish, run_missing

    found = find_results(declared)
    if not table:
        found = run_missing(declared, found, data, runs, minutes, only_next=next)
    path = publish(found)
    console.print(f"\n{path.read_text()}\nsaved {path} and {path.with_suffix('.png').name}", markup=False)
    return path
