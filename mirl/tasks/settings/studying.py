"""Options of `mirl study`."""

from dataclasses import dataclass

from mirl.errors import UserError
from mirl.tasks.options import POSITIVE, Options, Ranges


@dataclass(frozen=True)
class StudyOptions(Options):
    """Options of `mirl study`."""

    name: str
    """of studies/NAME.yaml, or a YAML file"""
    data: str | None = None
    """where the study's data lie; by default where its file says"""
    out: str | None = None
    """folder of run folders; by default runs/studies/ and the study's name"""
    next: bool = False
    """run only the next missing cell, or the next that fits into --minutes"""
    minutes: float | None = None
    """start no cell that would end later than this from now"""
    table: bool = False
    """run nothing; write table and figure of what is there"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.table and (self.next or self.minutes is not None):
            raise UserError("--table runs nothing; leave out --next and --minutes")

    def ranges(self) -> Ranges:
        """Return what is allowed for numbers."""
        return {"minutes": POSITIVE}
