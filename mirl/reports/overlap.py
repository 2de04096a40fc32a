"""Tables of mean IoU: how well segmenters label pixels, of held-out images, of other label maps, and of each class."""

from collections.abc import Sequence
from dataclasses import replace

from mirl.reports.contents import Run, number
from mirl.reports.panels import Sheet, sheet
from mirl.reports.tables import Table, cut, evaluations, percent

# Figures as results.json names them and as a column is titled.
FIGURES = {"miou": "mean IoU", "aacc": "pixel accuracy", "macc": "class accuracy"}
READING = (
    "IoU is the overlap of what is said with what is true, by their union; mean IoU counts every class alike, however "
    "rare. Pixel accuracy is the share of right pixels, class accuracy the mean of this over classes. Pixels without "
    "a label are not counted."
)
CLASSES_SHOWN, TABLES_SHOWN = 150, 8


def overlaps(runs: Sequence[Run]) -> list[Table]:
    """Return the figures of all segmenters in one table, then one of the classes for each evaluation."""
    rows: list[tuple[str, ...]] = []
    classes: list[Table] = []
    for where, found in evaluations(runs, "segment"):
        rows.append((*where, *(percent(number(found.get(name))) or "–" for name in FIGURES)))
        classes.append(_by_class(" · ".join(where), found.get("per_class")))
    head = ("data", *FIGURES.values())
    table = Table("Mean IoU and accuracies", ("run", *head) if len(runs) > 1 else head, tuple(rows))
    return [table, *[found for found in classes if found.rows][:TABLES_SHOWN]] if rows else []


def confusions(runs: Sequence[Run]) -> list[Sheet]:
    """Return the pictures of which class held-out pixels were taken for."""
    found = (
        sheet(run.folder / "confusion.png", f"{run.name}: what held-out pixels of each class are taken for", len(runs))
        for run in runs
        if run.command == "segment"
    )
    return [replace(picture, stretched=False) for picture in found if picture]


def _by_class(caption: str, per_class: object) -> Table:
    """List classes by their IoU; those that are neither true nor said have none and are left out."""
    entries = per_class if isinstance(per_class, list) else []
    known = [row for row in entries if isinstance(row, dict) and number(row.get("iou")) is not None]
    rows = tuple(
        (cut(str(row.get("name"))), *(percent(number(row.get(name))) or "–" for name in ("share", "iou", "accuracy")))
        for row in sorted(known, key=lambda row: float(row["iou"]))[:CLASSES_SHOWN]
    )
    which = f"{CLASSES_SHOWN} of {len(known):,} classes" if len(known) > CLASSES_SHOWN else "Each class"
    head = ("class", "share of pixels", "IoU", "accuracy")
    return Table(f"{which}, the hardest first: {caption}", head, rows, folded=True)
