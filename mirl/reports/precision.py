"""Tables of average precision: what detectors find, on held-out images, on other annotations, and of each class."""

from collections.abc import Sequence

from mirl.reports.contents import Row, Run, number
from mirl.reports.tables import Table, cut, evaluations, percent

# COCO's figures, as results.json names them and as a column is titled.
FIGURES = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "small", "ap_medium": "medium", "ap_large": "large"}
READING = (
    "Average precision (AP) as COCO computes it: how complete and how right the finds are, mean over classes and over "
    "overlaps (IoU) from 50 to 95 %; AP50 and AP75 ask for one overlap alone. Small objects cover less than 32 x 32 "
    "pixels, large ones more than 96 x 96."
)
KINDS = {"box": "boxes", "mask": "masks"}
CLASSES_SHOWN, TABLES_SHOWN = 100, 8


def precisions(runs: Sequence[Run]) -> list[Table]:
    """Return the figures of all detectors in one table, then one of the classes for each evaluation."""
    rows: list[tuple[str, ...]] = []
    classes: list[Table] = []
    for where, found in evaluations(runs, "detect"):
        rows += [(*where, words, *_figures(found, kind)) for kind, words in KINDS.items()]
        classes.append(_by_class(" · ".join(where), found.get("per_class")))
    head = ("data", "of", *FIGURES.values())
    table = Table("Average precision", ("run", *head) if len(runs) > 1 else head, tuple(rows))
    return [table, *[found for found in classes if found.rows][:TABLES_SHOWN]] if rows else []


def _figures(found: Row, kind: str) -> tuple[str, ...]:
    return tuple(percent(number(found.get(f"{kind}_{name}"))) or "–" for name in FIGURES)


def _by_class(caption: str, per_class: object) -> Table:
    """List classes by their box AP; those without an object to find have none and are left out."""
    entries = per_class if isinstance(per_class, list) else []
    known = [row for row in entries if isinstance(row, dict) and number(row.get("box_ap")) is not None]
    rows = tuple(
        (cut(str(row.get("name"))), f"{number(row.get('objects')) or 0:,.0f}",
         *(percent(number(row.get(name))) or "–" for name in ("box_ap", "mask_ap")))
        for row in sorted(known, key=lambda row: float(row["box_ap"]))[:CLASSES_SHOWN]
    )  # fmt: skip
    which = f"{CLASSES_SHOWN} of {len(known):,} classes" if len(known) > CLASSES_SHOWN else "Each class"
    head = ("class", "objects", "box AP", "mask AP")
    return Table(f"{which}, the hardest first: {caption}", head, rows, folded=True)
