"""Options of `mirl report`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ReportOptions:
    """Options of `mirl report`."""

    runs: list[str] | str
    """one or several run folders, finished or not"""
    out: str | None = None
    """the HTML file; by default report.html in the run folder, or comparison.html here for several runs"""
