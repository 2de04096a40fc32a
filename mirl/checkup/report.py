"""What `mirl doctor` found, as lines for people and as JSON, which names every file."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mirl.checkup.findings import Finding
from mirl.checkup.quarantine import UNDO
from mirl.checkup.records import Records
from mirl.checkup.suggestion import Kept, Suggestion, advice
from mirl.data.inspection import Trait
from mirl.data.walking import REPORT
from mirl.errors import plural
from mirl.training.files import atomic

JSON, PICTURE = REPORT
NAMED = 3  # files of a kind that people are shown
SUGGESTED = ("model", "image_size", "patch_size", "batch_size", "epochs", "max_bad")
QUANTILES = {"smallest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "largest": 1.0}


@dataclass(frozen=True)
class Speed:
    """How fast files were looked at, by so many processes, and how fast a core makes views to train on."""

    processes: int
    files_per_second: float
    views_per_core: float | None


@dataclass(frozen=True)
class DataReport:
    """What was found.

    Attributes:
        data: as the user named it; folder: of doctor.json and sizes.png.
        records: of the files looked at; findings: what is wrong or odd about them.
        suggestion: None if there are too few images.
        moved: positions of files that were moved to `quarantine`.
    """

    data: str
    folder: Path
    records: Records
    findings: list[Finding]
    suggestion: Suggestion | None
    moved: np.ndarray
    quarantine: Path | None
    speed: Speed

    @property
    def sampled(self) -> bool:
        """Whether only some files were looked at."""
        return len(self.records) < len(self.records.source)

    @property
    def pictured(self) -> bool:
        """Whether there are sizes to draw."""
        return self.suggestion is not None and bool(self.records.usable.any())

    def figures(self) -> dict[str, Any]:
        """Return counts, sizes in pixels and bytes, formats and modes."""
        records, source = self.records, self.records.source
        height, width = (records.of_usable(side).astype(np.float32) for side in ("height", "width"))
        usable, size = len(height), int(records.of_usable("bytes").sum())
        return {
            "files": len(source), "inspected": len(records), "usable": usable, "other_files": source.ignored,
            "bytes": size, "bytes_per_image": size // max(1, usable),
            "shorter_side": _quantiles(np.minimum(height, width)),
            "width_by_height": _quantiles(width / np.maximum(height, 1)),
            "formats": records.counts("format"), "modes": records.counts("mode"),
            "turned_by_exif": int(records.having(Trait.TURNED).sum()),
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        """Yield what people are told."""
        yield from self._about()
        for finding in self.findings:
            yield f"{finding.severity:<9} {finding.kind}: {len(finding):,}; {finding.meaning}"
            for (name, detail), _ in zip(finding.files(self.records), range(NAMED), strict=False):
                yield f"            {name}{f' {detail}' if detail else ''}"
            if len(finding) > NAMED:
                yield f"            and {len(finding) - NAMED:,} more"
        if not self.findings:
            yield "healthy   nothing is broken or odd"
        if self.quarantine:
            undo = f"; to undo: sh {shlex.quote(str(self.quarantine / UNDO))}" if len(self.moved) else ""
            yield f"moved     {plural(len(self.moved), 'broken file', form=',')} to {self.quarantine}{undo}"
        if self.suggestion:
            yield from (f"suggested {choice:<32} {reason}" for choice, reason in self.suggestion.reasons())
            yield from (f"advice    {line}" for line in self.advice())
            yield f"command   {self.suggestion.command}"
        yield f"written   {self.folder / JSON}, which names all files" + f"; {self.folder / PICTURE}" * self.pictured

    def advice(self) -> list[str]:
        """Say what else would make training better or faster."""
        return advice(Kept(self.records, self.moved), self.suggestion) if self.suggestion else []

    def _about(self) -> Iterator[str]:
        f, source = self.figures(), self.records.source
        sample = f"{f['inspected']:,} of them looked at, so figures are estimates; " if self.sampled else ""
        others = f"{plural(f['other_files'], 'other file', form=',')} ignored"
        yield f"data      {self.data}: {plural(f['files'], 'image file', form=',')}; {sample}{others}"
        yield from (f"unread    the folder {folder} cannot be listed" for folder in source.unreadable)
        if not f["usable"]:
            return
        side, aspect = f["shorter_side"], f["width_by_height"]
        yield (
            f"sizes     shorter side {side['smallest']:g} to {side['largest']:g} px, median {side['median']:g}; "
            f"width by height {aspect['smallest']:.2g} to {aspect['largest']:.2g}, median {aspect['median']:.2g}; "
            f"{f['turned_by_exif']:,} turned by EXIF"
        )
        formats, modes = (", ".join(f"{name} {count:,}" for name, count in f[k].items()) for k in ("formats", "modes"))
        sizes = f"{f['bytes'] / 1e6:,.1f} MB, {f['bytes_per_image'] / 1e3:,.1f} kB an image"
        yield f"files     {formats}; modes {modes}; {sizes}"
        speed = self.speed
        views = f"; a core makes {speed.views_per_core:,.0f} views/s to train on" if speed.views_per_core else ""
        processes = plural(speed.processes, "process", "es")
        yield f"reading   {speed.files_per_second:,.0f} files/s looked at, with {processes}{views}"

    def write(self) -> None:
        """Write doctor.json, in which every finding names all its files, one a line."""
        suggestion = self.suggestion
        settings = {name: getattr(suggestion.settings, name) for name in SUGGESTED} if suggestion else None
        head = {
            "data": self.data, "sampled": self.sampled, "figures": self.figures(),
            "unreadable_folders": self.records.source.unreadable, "suggestion": settings,
            "command": suggestion.command if suggestion else None, "advice": self.advice(),
            "moved": [self.records.name(int(position)) for position in self.moved],
            "speed": asdict(self.speed),
        }  # fmt: skip
        with atomic(self.folder / JSON) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(head, indent=1).removesuffix("\n}") + ',\n "findings": [')
            for number, finding in enumerate(self.findings):
                about = {name: getattr(finding, name) for name in ("kind", "severity", "meaning")}
                file.write(f'{"," if number else ""}\n{json.dumps(about | {"count": len(finding)})[:-1]}, "files": [')
                for i, (name, detail) in enumerate(finding.files(self.records)):
                    file.write(f"{',' if i else ''}\n  {json.dumps({'file': name, 'detail': detail})}")
                file.write("\n]}")
            file.write("\n]}\n")


def _quantiles(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    found = np.quantile(values, list(QUANTILES.values()), method="nearest")
    return {name: round(float(value), 3) for name, value in zip(QUANTILES, found, strict=True)}
