"""Pictures small enough to travel in the page: reconstructions at some moments, each panel a WebP of its own.

A run keeps the panels of a moment in one picture, a row for each image and a column for each panel; here they are cut
apart, so that the page can show any image, pair and moment.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mirl.reports.contents import Row, Run

FIXED = 2  # the first panels, original and masked, are the same at every moment
SMALL = 64  # pixels up to which images are shown enlarged
SHEET_BYTES = 900_000  # of all runs' sheets of a kind
SHEET_EFFORTS = ((1100, 80), (1100, 60), (1100, 40), (800, 40), (500, 30), (250, 20))  # pixels across, quality


@dataclass(frozen=True)
class Effort:
    """How much to show: most moments and images, the longer side of a panel in pixels, WebP's quality.

    `exact` keeps panels that are shown enlarged without loss: their pixels are seen one by one.
    """

    moments: int
    images: int
    side: int
    quality: int
    exact: bool = False


# From the best to what always fits.
EFFORTS = (
    Effort(12, 8, 160, 85, exact=True), Effort(12, 8, 160, 85), Effort(12, 8, 160, 70), Effort(12, 8, 144, 55),
    Effort(10, 6, 128, 45), Effort(7, 6, 112, 40), Effort(5, 6, 96, 35), Effort(3, 4, 80, 30), Effort(2, 2, 64, 25),
    Effort(1, 1, 48, 20),
)  # fmt: skip


@dataclass(frozen=True)
class Gallery:
    """Reconstructions of one run.

    Attributes:
        moments: (step, epoch) of each; pairs: for each pair its name and the titles of its panels.
        fixed: data URIs [image][original, masked]; cells: data URIs [moment][image][panel], pair after pair.
        height, width: of a panel in pixels, as it is kept here; images are `enlarged` where they are small.
        unreadable: files that could not be shown.
    """

    run: str
    moments: list[tuple[int, float]] = field(default_factory=list)
    pairs: list[tuple[str, list[str]]] = field(default_factory=list)
    fixed: list[list[str]] = field(default_factory=list)
    cells: list[list[list[str]]] = field(default_factory=list)
    height: int = 0
    width: int = 0
    unreadable: tuple[str, ...] = ()

    @property
    def enlarged(self) -> bool:
        return max(self.height, self.width) <= SMALL


@dataclass(frozen=True)
class Sheet:
    """A whole picture: a data URI with its size in pixels, what it shows in words, whether it may be enlarged."""

    source: str
    alternative: str
    width: int
    height: int
    stretched: bool = True


def galleries(runs: Sequence[Run], budget: int) -> list[Gallery]:
    """Return the reconstructions of each run in at most `budget` bytes: of one run over time, of several the last."""
    for effort in EFFORTS:
        found, left = [], budget
        for run in runs:
            gallery, used = _gallery(run, effort, left, last_only=len(runs) > 1)
            found.append(gallery)
            left -= used
        if left >= 0:
            return found
    return [Gallery(run.name) for run in runs]


def sheet(path: Path, alternative: str, sharing: int = 1) -> Sheet | None:
    """Return a picture with room for as many as are `sharing` the page, or None if it cannot be read."""
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    for side, quality in SHEET_EFFORTS:
        picture.thumbnail((side, 4 * side))
        source = _encode(picture, quality=quality)
        if len(source) <= SHEET_BYTES // max(1, sharing):
            return Sheet(source, alternative, *picture.size)
    return None


def _gallery(run: Run, effort: Effort, budget: int, *, last_only: bool) -> tuple[Gallery, int]:
    """Return a run's gallery and its bytes; once it will be over the budget, a part and its likely bytes."""
    rows = run.rows["pictures"]
    count = min(len(rows), 1 if last_only else effort.moments)
    places = np.unique(np.linspace(0 if count > 1 else len(rows) - 1, len(rows) - 1, count).astype(int))
    gallery, fixed, changing, unreadable = Gallery(run.name), 0, 0, []
    for row in (rows[place] for place in places):
        cells = _cut(run, row)
        titles = [str(title) for title in row.get("panels") or ()]
        if cells is None or (gallery.cells and gallery.pairs != _pairs(titles)):
            unreadable.append(str(row.get("file")))
            continue
        encoded = [[_encode_panel(panel, effort) for panel in image] for image in cells[: effort.images]]
        if not gallery.cells:
            same = [image[:FIXED] for image in encoded]
            gallery = Gallery(run.name, [], _pairs(titles), same, [], *_shrunk(cells.shape[2:4], effort.side))
            fixed = _bytes(same)
        gallery.moments.append((int(row["step"]), float(row["epoch"])))
        gallery.cells.append([image[FIXED:] for image in encoded])
        changing += _bytes(gallery.cells[-1])
        likely = fixed + changing * count // len(gallery.cells)
        if likely > budget:
            return gallery, likely
    return replace(gallery, unreadable=tuple(unreadable)), fixed + changing


def _bytes(sources: list[list[str]]) -> int:
    return sum(len(source) for image in sources for source in image)


def _pairs(titles: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Group the titles of panels, "pair 1: main" and so on, by their pair; a single pair has no name."""
    pairs: dict[str, list[str]] = {}
    for title in titles[FIXED:]:
        pair, _, name = title.rpartition(": ")
        pairs.setdefault(pair, []).append(name)
    return list(pairs.items())


def _cut(run: Run, row: Row) -> np.ndarray | None:
    """Return the panels of a moment, uint8 [images, panels, h, w, 3], or None if they cannot be read."""
    try:
        height, width, images, panels = int(row["height"]), int(row["width"]), int(row["images"]), len(row["panels"])
        with Image.open(run.folder / row["file"]) as image:
            pixels = np.asarray(image.convert("RGB"))
        return pixels.reshape(images, height, panels, width, 3).swapaxes(1, 2)
    except (OSError, ValueError, TypeError, KeyError, Image.DecompressionBombError):
        return None


def _shrunk(size: Sequence[int], side: int) -> tuple[int, int]:
    """Return height and width, the longer one at most `side`."""
    factor = min(1.0, side / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _encode_panel(pixels: np.ndarray, effort: Effort) -> str:
    height, width = _shrunk(pixels.shape[:2], effort.side)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return _encode(image, quality=effort.quality, lossless=effort.exact and max(height, width) <= SMALL)


def _encode(image: Image.Image, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", **options)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
