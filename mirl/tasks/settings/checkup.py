"""Options of `mirl doctor`."""

from dataclasses import dataclass

from mirl.tasks.options import COUNT, NOT_NEGATIVE, POSITIVE, Options, Ranges


@dataclass(frozen=True)
class DoctorOptions(Options):
    """Options of `mirl doctor`."""

    data: str
    """a folder, a glob or a text file of paths, as for mirl pretrain"""
    out: str | None = None
    """folder for doctor.json and sizes.png; by default runs/, the name of the data and _doctor"""
    move_bad: str | None = None
    """move broken files to this folder, where they keep their paths; moved.txt there moves them back"""
    sample: int | None = None
    """look at so many files, chosen at random; by default at all"""
    channels: int = 3
    """as for mirl pretrain"""
    gpus: int | None = None
    """to suggest for; by default this machine's"""
    timeout: float = 120.0
    """seconds that a file may take"""
    workers: int | None = None
    """processes that read; by default one for each core"""

    def ranges(self) -> Ranges:
        """Return what is allowed for numbers."""
        return {"sample": COUNT, "channels": COUNT, "gpus": NOT_NEGATIVE, "timeout": POSITIVE, "workers": COUNT}
