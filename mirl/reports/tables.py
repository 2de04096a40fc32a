"""Tables of the report: key figures, results, options, what was left out, what happened."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mirl.errors import plural
from mirl.reports.contents import Row, Run, number
from mirl.reports.series import Series, series
from mirl.training.runs import TRAINED, duration

SKIPPED_SHOWN, INCIDENTS_SHOWN, TABLES_SHOWN = 100, 200, 8  # tables of classes
READING = (
    "How often the first guess is right on test images. Where two intervals overlap widely, the difference may be "
    "chance; intervals say nothing about other seeds."
)
ARROW = " → "
FILES = ("results.json", "readouts/*.json", "evaluations/*/*.json")  # of accuracies
LONGEST = 300  # characters of a cell


@dataclass(frozen=True)
class Table:
    """A table: the titles of its columns, its rows as text, what it is; `folded` away until it is asked for."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False


def key_figures(run: Run) -> dict[str, str]:
    """Return the few figures to look at first; those that are not known are left out."""
    train, held_out = run.rows["train"], run.rows["held_out"]
    seconds = series(train, "seconds").values.sum()
    waiting = series(train, "data_wait").values.sum()
    speed, accuracy = series(train, "images_per_second"), _latest_accuracy(run)
    found = {
        "held-out loss": _change(series(held_out, "loss")),
        "accuracy": accuracy,
        "box AP": percent(_last(held_out, "box_ap")),
        "mask AP": percent(_last(held_out, "mask_ap")),
        "mean IoU": percent(_last(held_out, "miou")),
        "pixel accuracy": percent(_last(held_out, "aacc")),
        "training time": duration(seconds) if seconds else "",
        "speed": f"{np.median(speed.values):.3g} images/s" if len(speed) else "",
        "wait for data": f"{waiting / seconds:.1%}" if seconds else "",
        "images skipped": f"{len(run.skipped_images()):,}",
    }
    return {name: value for name, value in found.items() if value}


def status(run: Run) -> str:
    """Say how far a run is."""
    if run.finished:
        return f"finished after {plural(run.step, 'step', form=',')}"
    written = f" (last written {run.written:%Y-%m-%d %H:%M})" if run.written else ""
    if not run.steps:
        return f"no step recorded yet{written}"
    return f"still running or stopped at step {run.step:,} of {run.steps:,}{written}"


def side_by_side(runs: Sequence[Run]) -> Table:
    """Compare the key figures of runs."""
    figures = [{"status": status(run), **about(run), **key_figures(run)} for run in runs]
    names = dict.fromkeys(name for found in figures for name in found)
    rows = tuple((name, *(found.get(name, "–") for found in figures)) for name in names)
    return Table("Key figures of each run", ("", *(run.name for run in runs)), rows)


def about(run: Run) -> dict[str, str]:
    """Say what was trained on what."""
    names = ("method", "protocol", "model", "weights", "data", "epochs", "batch_size")
    return {name.replace("_", " "): shown(run.config[name]) for name in names if run.config.get(name) is not None}


def differences(runs: Sequence[Run]) -> Table:
    """List the options in which runs differ."""
    names = dict.fromkeys(name for run in runs for name in run.config if name != "out")
    rows = []
    for name in names:
        values = [shown(run.config.get(name)) for run in runs]
        if len(set(values)) > 1:
            rows.append((name, *values))
    return Table("Options in which the runs differ", ("option", *(run.name for run in runs)), tuple(rows))


def options(run: Run) -> Table:
    rows = tuple((str(name), shown(value)) for name, value in run.config.items())
    return Table("Every option of the run, resolved", ("option", "value"), rows)


def results(runs: Sequence[Run]) -> list[Table]:
    """Return what is known of accuracies: of the fine-tuning itself, of other images, of read-outs, of each class."""
    rows: list[tuple[str, ...]] = []
    classes: list[Table] = []
    for run in runs:
        for what, data, result, extra in _accuracies(run):
            where = (run.name, what, data) if len(runs) > 1 else (what, data)
            rows.append((*where, *_figures(result), extra))
            listed = [{"name": name, "top1": share} for name, share in result.get("per_class", {}).items()]
            classes.append(by_class(" · ".join(where), listed, {"top1": "top-1"}, "top1"))
    head: tuple[str, ...] = ("what", "data", "top-1", "95 % interval", "top-5", "images", "also")
    if not any(row[-1] for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    caption = "Accuracies, with the interval that the number of test images leaves open"
    table = Table(caption, ("run", *head) if len(runs) > 1 else head, tuple(rows))
    return [table, *[found for found in classes if found.rows][:TABLES_SHOWN]] if rows else []


def by_class(caption: str, classes: Sequence[Row], figures: Mapping[str, str], hardest: str, most: int = 100) -> Table:
    """List classes, those with the least of the figure `hardest` first; those without it were not judged.

    Args:
        classes: names and figures, all of them shares but the number of objects.
        figures: their names and the titles of columns; most: so many classes are listed.
    """
    known = [row for row in classes if number(row.get(hardest)) is not None]
    rows = tuple(
        (cut(str(row.get("name"))), *(_of_class(name, number(row.get(name))) for name in figures))
        for row in sorted(known, key=lambda row: float(row[hardest]))[:most]
    )
    which = f"{most} of {len(known):,} classes" if len(known) > most else "Each class"
    return Table(f"{which}, the hardest first: {caption}", ("class", *figures.values()), rows, folded=True)


def skipped(run: Run) -> Table | None:
    """List the first images that could not be used, with the reasons."""
    found = run.skipped_images()
    rows = tuple((cut(name), cut(reason)) for name, reason in list(found.items())[:SKIPPED_SHOWN])
    more = f": the first {SKIPPED_SHOWN} of {len(found):,}, log.txt has all" if len(found) > SKIPPED_SHOWN else ""
    return Table(f"Images that were left out{more}", ("image", "reason"), rows) if rows else None


def incidents(runs: Sequence[Run]) -> Table | None:
    """List what happened to the runs besides training: the last so many of each; images have a table of their own."""
    rows: list[tuple[str, ...]] = []
    for run in runs:
        happened = [row for row in run.rows["incident"] if row.get("what") != "unusable file"]
        where = (run.name,) if len(runs) > 1 else ()
        for row in happened[-INCIDENTS_SHOWN:]:
            when = str(row.get("time", "")).replace("T", " ")
            rows.append((*where, f"{row['step']:,}", when, str(row.get("what", "")), cut(str(row.get("text", "")))))
    head = ("step", "time", "what", "text")
    return Table("What happened", ("run", *head) if len(runs) > 1 else head, tuple(rows)) if rows else None


def shown(value: Any) -> str:
    """Write an option's value as its flag takes it."""
    if value is None:
        return "–"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(shown, value))}]"
    return cut(str(value).lower() if isinstance(value, bool) else str(value))


def percent(value: float | None) -> str:
    """Write a share, "" if it is not known."""
    return "" if value is None else f"{100 * value:.1f} %"


def quoted(path: object) -> str:
    """Write a path as a shell takes it."""
    return shlex.quote(str(path))


def _accuracies(run: Run) -> list[tuple[str, str, Row, str]]:
    """Return (what, data, accuracy, more) of everything in the folder that was judged, if it is a classifier."""
    if run.command in TRAINED:
        return []
    found: list[tuple[str, str, Row, str]] = []
    for document in run.documents("results.json").found.values():
        named = {"weights": "fine-tuned", "average": "fine-tuned, averaged weights"}
        found += [(what, data_of(document), document[name], "") for name, what in named.items() if name in document]
    for document in run.documents("evaluations/*/*.json").found.values():
        error, sure = number(document.get("calibration_error")), number(document.get("confidence"))
        known = error is not None and sure is not None
        extra = f"calibration error {error:.1%}, mean confidence {sure:.1%}" if known else ""
        found.append(("evaluate", data_of(document), document.get("accuracy", {}), extra))
    for document in run.documents("readouts/*.json").found.values():
        # Of a read-out of every block the last one; a chart has them all.
        for block, readers in list(document.get("blocks", {}).items())[-1:]:
            untrained = ", untrained" if document.get("options", {}).get("untrained") else ""
            place = f"block {block}" if block != "0" else "pixels"
            for reader, result in readers.items():
                what = f"{document.get('command', 'read-out')}, {reader}, {place}{untrained}"
                found.append((what, data_of(document), result, ""))
    return [entry for entry in found if number(entry[2].get("top1")) is not None]


def _figures(result: Row) -> tuple[str, ...]:
    interval = [number(end) for end in result.get("interval", ())]
    low_to_high = " to ".join(f"{100 * end:.1f}" for end in interval if end is not None)
    top5, images = number(result.get("top5")), number(result.get("images"))
    return (
        f"{100 * result['top1']:.1f} %",
        f"{low_to_high} %" if low_to_high else "–",
        f"{100 * top5:.1f} %" if top5 is not None else "–",
        f"{images:,.0f}" if images is not None else "–",
    )


def _of_class(name: str, value: float | None) -> str:
    return f"{value or 0:,.0f}" if name == "objects" else percent(value) or "–"


def _latest_accuracy(run: Run) -> str:
    judged = [entry for entry in _accuracies(run) if entry[0].startswith("fine-tuned")]
    if judged:
        share, interval, *_ = _figures(judged[-1][2])
        return f"{share} ({interval.removesuffix(' %')})"
    top1 = series(run.rows["held_out"], "top1", scale=100)
    return f"{top1.last:.1f} %" if len(top1) else ""


def _last(rows: Sequence[Row], name: str) -> float | None:
    found = series(rows, name)
    return found.last if len(found) else None


def _change(found: Series) -> str:
    if not len(found):
        return ""
    return f"{found.first:.4g}{ARROW}{found.last:.4g}" if len(found) > 1 else f"{found.first:.4g}"


def data_of(document: Row) -> str:
    return cut(str(document.get("data") or document.get("options", {}).get("data") or "–"))


def cut(text: str) -> str:
    """Shorten a text to what a cell may hold."""
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
