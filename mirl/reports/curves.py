"""Charts over the epochs of a run, or of several: losses, rates, gradients, speed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from mirl.methods import is_term
from mirl.reports.charts import COLOURS, Chart, Line, lines_of
from mirl.reports.contents import Run
from mirl.reports.judged import JUDGED
from mirl.reports.series import Series, series, smooth, thin
from mirl.training.runs import NOUNS, Command

OBJECTIVES = ("pixel", "feature", "vgg")
# Values of detectors and segmenters, with their words: parts of the training loss, figures of held-out images.
PARTS: dict[Command, dict[str, str]] = {
    "detect": {
        "rpn_class": "proposal", "rpn_box": "proposal's box", "box_class": "class", "box": "box", "mask": "mask",
    },
    "segment": {"decode": "decoder", "auxiliary": "auxiliary head"},
}  # fmt: skip
PRECISIONS = {"box_ap": "boxes", "mask_ap": "masks"}
SIZES = {"mask_ap_small": "small", "mask_ap_medium": "medium", "mask_ap_large": "large"}
OVERLAPS = JUDGED["segment"].figures
POINTS = 1500  # most of a raw curve
SMOOTHED = 400  # of a smoothed one; fewer where many runs share a page
ALL_RUNS = 4000
# Value of a training row: title, unit, factor, what it is divided by, whether its axis is logarithmic.
MEASURES = {
    "grad_norm": ("Gradient norm", "norm before clipping", 1.0, None, True),
    "accuracy": ("Right pixels of training images", "% of labelled pixels", 100.0, None, False),
    "images_per_second": ("Speed", "images a second", 1.0, None, False),
    "data_wait": ("Waiting for data", "% of a step's time", 100.0, "seconds", False),
}


def curves(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts of training; those for which nothing was recorded are left out."""
    names = list(dict.fromkeys(name for run in runs for row in run.rows["held_out"] for name in row))
    terms, objectives = [name for name in names if is_term(name)], [name for name in names if name in OBJECTIVES]
    accuracies = [name for name in names if name.endswith(("top1", "top5"))]
    precisions, sizes, overlaps = ([n for n in names if n in group] for group in (PRECISIONS, SIZES, OVERLAPS))
    rates = lines_of([_rate(label, run, colour_of(index)) for index, (label, run) in enumerate(_labelled(runs))])
    measured = [
        Chart(name, title, "epoch", unit, _each(runs, name, scale, over), log=log)
        for name, (title, unit, scale, over, log) in MEASURES.items()
    ]
    charts = [
        Chart("loss", "Loss", "epoch", "loss", _losses(runs)),
        *_parts(runs, objectives, "Objectives", "loss", 1.0),
        *_parts(runs, terms, "Loss of pairs and decoders", "loss", 1.0),
        *_parts(runs, accuracies, "Held-out accuracy", "%", 100.0),
        *_parts(runs, precisions, "Average precision", "%", 100.0),
        *_parts(runs, sizes, "Average precision of masks, by size", "%", 100.0),
        *_parts(runs, overlaps, "Held-out pixels", "%", 100.0),
        *_losses_of_heads(runs),
        Chart("lr", "Learning rate", "epoch", "learning rate", rates),
        *measured,
    ]
    return [chart for chart in charts if chart.lines]


def over_time(label: str, found: Series, colour: str, runs: int, *, background: bool = True) -> tuple[Line, ...]:
    """Draw a value at every step: its average over some steps and, behind it, the value itself."""
    average = smooth(found, min(SMOOTHED, max(20, ALL_RUNS // runs)))
    lines = [Line(label, average.epochs, average.values, colour, notes={"step": average.steps})]
    if background and runs == 1:
        raw = thin(found, POINTS)
        lines.insert(0, Line(label, raw.epochs, raw.values, colour, "faint"))
    return tuple(lines)


def at_evaluations(label: str, found: Series, colour: str) -> tuple[Line, ...]:
    """Draw a value that evaluations found."""
    kept = thin(found, SMOOTHED)
    return (Line(label, kept.epochs, kept.values, colour, "dots", notes={"step": kept.steps}),)


def colour_of(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _losses(runs: Sequence[Run]) -> tuple[Line, ...]:
    groups: list[tuple[Line, ...]] = []
    for index, run in enumerate(runs):
        training, held_out, average = (
            series(run.rows[kind], name)
            for kind, name in (("train", "loss"), ("held_out", "loss"), ("held_out", "average_loss"))
        )
        if len(runs) == 1:
            groups.append(over_time("training", training, COLOURS[0], 1))
            groups.append(at_evaluations("held out", held_out, COLOURS[1]))
            groups.append(at_evaluations("held out, averaged weights", average, COLOURS[2]))
        else:  # in the colour of the run, the training behind unless it is all there is
            style: Literal["plain", "faint"] = "faint" if len(held_out) else "plain"
            lines = over_time(run.name, training, colour_of(index), len(runs))
            groups.append(tuple(replace(line, style=style) for line in lines))
            groups.append(at_evaluations(run.name, held_out, colour_of(index)))
    return lines_of(groups)


def _losses_of_heads(runs: Sequence[Run]) -> list[Chart]:
    """Draw the parts of the training loss of detectors and segmenters: of one run together, of several a chart each."""
    several = len(runs) > 1
    groups: dict[str, list[tuple[Line, ...]]] = {}
    titles: dict[str, str] = {}
    for index, run in enumerate(runs):
        for place, (name, words) in enumerate(PARTS.get(run.command, {}).items()):
            label, colour = (run.name, colour_of(index)) if several else (words, colour_of(place))
            lines = over_time(label, series(run.rows["train"], name), colour, len(runs), background=False)
            chart = name if several else f"{NOUNS[run.command]}_losses"
            groups.setdefault(chart, []).append(lines)
            titles[chart] = f"Loss: {words}" if several else "Parts of the loss"
    return [Chart(name, titles[name], "epoch", "loss", lines_of(lines), log=True) for name, lines in groups.items()]


def _parts(runs: Sequence[Run], names: Sequence[str], title: str, unit: str, scale: float) -> list[Chart]:
    """Draw values of evaluations: of one run all together, of several runs a chart for each."""
    if len(runs) > 1:
        return [
            Chart(
                name, f"{title}: {_words(name)}", "epoch", unit,
                lines_of([at_evaluations(run.name, series(run.rows["held_out"], name, scale=scale), colour_of(index))
                          for index, run in enumerate(runs)]),
            )
            for name in names
        ]  # fmt: skip
    run = runs[0]
    groups: list[tuple[Line, ...]] = []
    for index, name in enumerate(names):
        label, colour = _words(name), colour_of(index)
        (average,) = over_time(label, series(run.rows["train"], name, scale=scale), colour, 1, background=False)
        groups.append((Line(label, average.x, average.y, colour, "faint"),))
        groups.append(at_evaluations(label, series(run.rows["held_out"], name, scale=scale), colour))
    return [Chart(f"{names[0]}_all", title, "epoch", unit, lines_of(groups))] if names else []


def _words(name: str) -> str:
    return {**PRECISIONS, **SIZES, **OVERLAPS}.get(name) or name.replace("_", " ")


def _rate(label: str, run: Run, colour: str) -> tuple[Line, ...]:
    """Draw the learning rate as it was: an average would blur its steps."""
    found = thin(series(run.rows["train"], "lr"), SMOOTHED)
    return (Line(label, found.epochs, found.values, colour, notes={"step": found.steps}),)


def _each(runs: Sequence[Run], name: str, scale: float, over: str | None) -> tuple[Line, ...]:
    groups = []
    for index, (label, run) in enumerate(_labelled(runs)):
        found = series(run.rows["train"], name, scale=scale, over=over)
        groups.append(over_time(label, found, colour_of(index), len(runs)))
    return lines_of(groups)


def _labelled(runs: Sequence[Run]) -> list[tuple[str, Run]]:
    return [(run.name if len(runs) > 1 else "training", run) for run in runs]
