"""A study's results as a picture: accuracy against depth, blocks replaced or method, as the paper draws it."""

import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mirl.studies.definition import Panel
from mirl.studies.results import Found
from mirl.studies.table import at, summarise
from mirl.training.drawing import COLOURS, save_figure

WIDTH, HEIGHT = 5.2, 4.4  # inches of a panel
TITLE, CAPTION = 46, 62  # letters across it
MARKERS = "osD^vPX"
MOST_NAMED = 8  # of the missing cells, in the caption
APART = 0.012  # of the axis between two methods, so that error bars do not hide each other


def draw_figure(found: Found, path: Path) -> None:
    """Draw one plot for each panel to a PNG; what is missing is left out and named below."""
    study = found.study
    count = len(study.panels)
    figure = Figure(figsize=(WIDTH * count, HEIGHT + 0.25), dpi=130, layout="constrained")
    figure.suptitle(textwrap.fill(study.title, TITLE * count), fontsize=12, parse_math=False)
    plots = figure.subplots(1, count, squeeze=False)[0]
    for axes, panel in zip(plots, study.panels, strict=True):
        _draw(axes, found, panel)
    figure.supxlabel(textwrap.fill(_caption(found), CAPTION * count), fontsize=9, parse_math=False)
    save_figure(figure, path)


def _draw(axes: Any, found: Found, panel: Panel) -> None:
    """Draw a line for each method, or, where the methods are the axis, a point."""
    numbers = {method: number for number, method in enumerate(found.study.methods)}  # the same colour in every panel
    span = max(panel.values) - min(panel.values) or 1
    for row, method in enumerate(panel.methods):
        by_value = {v: summarise([r.top1 for r in found.of(at(found, panel, method, v))]) for v in panel.values}
        known = [(value, summary) for value, summary in by_value.items() if summary]
        if not known:
            continue
        shift = APART * span * (row - (len(panel.methods) - 1) / 2)
        places = [row if panel.axis == "method" else value + shift for value, _ in known]
        means = [summary.mean for _, summary in known]
        bars = [[s.mean - s.low for _, s in known], [s.high - s.mean for _, s in known]]
        number = numbers[method]
        axes.errorbar(
            places, means, yerr=bars, label=method.replace("_", " "), color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)], linestyle="-" if number < len(COLOURS) else "--", markersize=6,
            linewidth=1.6, capsize=3,
        )  # fmt: skip
    axes.set_title(f"{panel.title}\n({panel.mirrors})", fontsize=11, parse_math=False)
    axes.set_ylabel("fine-tuned top-1, %", fontsize=10)
    axes.tick_params(labelsize=10)
    axes.grid(alpha=0.3)
    if panel.axis == "method":
        names = [textwrap.fill(method.replace("_", " "), 10) for method in panel.methods]
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_xlabel(f"depth {panel.depths[0]}", fontsize=10)
    else:
        axes.set_xticks(panel.values)
        axes.set_xlim(min(panel.values) - 0.08 * span, max(panel.values) + 0.08 * span)
        axes.set_xlabel("depth, blocks" if panel.axis == "depth" else "last blocks replaced by fresh ones", fontsize=10)
        if axes.has_data():
            axes.legend(fontsize=9)


def _caption(found: Found) -> str:
    tests = sorted({result.tested for result in found.done.values()})
    sentences = [
        "Points: mean over seeds; bars: from the lowest to the highest seed, none with one seed "
        "(what the number of test images leaves open is not in them)."
    ]
    if tests:
        sentences.append(f"{' and '.join(map(str, tests))} test images.")
    if found.missing:
        names = [cell.name for cell in found.missing]
        shown = ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" * (len(names) > MOST_NAMED))
        sentences.append(f"Missing: {len(names)} of {len(found.cells)} cells: {shown}.")
    return " ".join(sentences)
