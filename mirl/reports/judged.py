"""Tables of what detectors and segmenters were judged by: on held-out images, on other ones, and of each class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mirl.errors import plural
from mirl.reports.contents import Row, Run, number
from mirl.reports.panels import Sheet, sheet
from mirl.reports.tables import TABLES_SHOWN, Table, by_class, data_of, percent
from mirl.training.runs import Command

# Files of results, with what was judged on; detections.json, beside them, is large and not read.
EVALUATIONS = {"results.json": "held out", "evaluations/*/results.json": ""}


@dataclass(frozen=True)
class Judged:
    """How evaluations are shown: names in results.json with the titles of columns, and words.

    Attributes:
        figure: what should rise in training; title: of the table of all evaluations; reading: how to read it.
        figures: of an evaluation; kinds: what their names begin with, once for each row, and the word for it.
        classes: figures of a class; hardest: that by which they are ordered; most: so many are listed.
    """

    figure: str
    title: str
    reading: str
    figures: Mapping[str, str]
    kinds: Mapping[str, str]
    classes: Mapping[str, str]
    hardest: str
    most: int


JUDGED: dict[Command, Judged] = {
    "detect": Judged(
        "average precision",
        "Average precision",
        "Average precision (AP) as COCO computes it: how complete and how right the finds are, mean over classes and "
        "over overlaps (IoU) from 50 to 95 %; AP50 and AP75 ask for one overlap alone. Small objects cover less than "
        "32 x 32 pixels, large ones more than 96 x 96.",
        {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "small", "ap_medium": "medium", "ap_large": "large"},
        {"box_": "boxes", "mask_": "masks"},
        {"objects": "objects", "box_ap": "box AP", "mask_ap": "mask AP"},
        hardest="box_ap",
        most=100,
    ),
    "segment": Judged(
        "mean IoU",
        "Mean IoU and accuracies",
        "IoU is the overlap of what is said with what is true, by their union; mean IoU counts every class alike, "
        "however rare. Pixel accuracy is the share of right pixels, class accuracy the mean of this over classes. "
        "Pixels without a label are not counted.",
        {"miou": "mean IoU", "aacc": "pixel accuracy", "macc": "class accuracy"},
        {"": ""},
        {"share": "share of pixels", "iou": "IoU", "accuracy": "accuracy"},
        hardest="iou",
        most=150,
    ),
}


def judgements(runs: Sequence[Run], command: Command) -> list[Table]:
    """Return the figures of all detectors or segmenters in one table, then one of the classes for each evaluation."""
    shown = JUDGED[command]
    rows: list[tuple[str, ...]] = []
    classes: list[Table] = []
    for where, found in _evaluations(runs, command):
        for kind, word in shown.kinds.items():
            figures = (percent(number(found.get(f"{kind}{name}"))) or "–" for name in shown.figures)
            rows.append((*where, *filter(None, [word]), *figures))
        caption, listed = " · ".join(where), found.get("per_class", [])
        classes.append(by_class(caption, listed, shown.classes, shown.hardest, shown.most))
    head = ("data", *(["of"] if len(shown.kinds) > 1 else []), *shown.figures.values())
    table = Table(shown.title, ("run", *head) if len(runs) > 1 else head, tuple(rows))
    return [table, *[found for found in classes if found.rows][:TABLES_SHOWN]] if rows else []


def confusions(runs: Sequence[Run]) -> list[Sheet]:
    """Return the pictures of which class held-out pixels were taken for."""
    found = (
        sheet(run.folder / "confusion.png", f"{run.name}: what held-out pixels of each class are taken for", len(runs))
        for run in runs
        if run.command == "segment"
    )
    return [replace(picture, stretched=False) for picture in found if picture]


def _evaluations(runs: Sequence[Run], command: Command) -> list[tuple[tuple[str, ...], Row]]:
    """Return (what was judged on, after the run's name if there are several; results) of detectors or segmenters."""
    found: list[tuple[tuple[str, ...], Row]] = []
    for run in runs:
        for pattern, what in EVALUATIONS.items() if run.command == command else ():
            for document in run.documents(pattern).found.values():
                images = number(document.get("images"))
                count = f"{plural(images, 'image', form=',.0f')}" if images is not None else ""
                judged = ", ".join(filter(None, (data_of(document), what, count)))
                name, scales = (run.name,) if len(runs) > 1 else (), document.get("multi_scale")
                found.append(((*name, f"{judged}, several sizes" if scales is True else judged), document))
                if isinstance(scales, dict):  # judged both ways
                    found.append(((*name, f"{judged}, several sizes"), scales))
    return found
