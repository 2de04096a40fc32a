"""A study's results as Markdown: a table for each panel, as in the paper, of differences, and of all encoders."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from mirl.studies.definition import Cell, Panel
from mirl.studies.results import Found, Result
from mirl.tasks.accuracy import wilson
from mirl.training.runs import duration

DIFFERENCES = """\
Points of top-1 by which an encoder is above another, mean over the seeds that both have, with 95 % intervals for the
number of test images (Newcombe's for two shares, the seeds' answers on an image taken for one). Both saw the same
images, but results do not keep the answer on each, so that the comparison is unpaired: a paired one would leave less
open where both err on the same images. Each interval stands for itself, and differences between seeds are not in it.
"""


@dataclass(frozen=True)
class Summary:
    """A figure over seeds: its mean and the `low`est and `high`est, of `count` seeds."""

    mean: float
    low: float
    high: float
    count: int

    def text(self, seeds: int, digits: int = 1) -> str:
        """Write mean ± half the range, and the number of seeds where it is not all `seeds`."""
        spread = f" ± {(self.high - self.low) / 2:.{digits}f}" if self.count > 1 else ""
        return f"{self.mean:.{digits}f}{spread}" + (f" ({self.count} of {seeds} seeds)" if self.count < seeds else "")


def summarise(values: Sequence[float]) -> Summary | None:
    """Summarise a figure over seeds; None if there is none."""
    return Summary(mean(values), min(values), max(values), len(values)) if values else None


def at(found: Found, panel: Panel, method: str, value: int) -> list[Cell]:
    """Return the cells of all seeds at `value` of a panel's axis.

    Those of a truncated MAE that lacks no block are MAE's, if the panel has it.
    """
    if found.study.truncates(method) and not panel.cell(method, value, 0).replaced:
        options = found.study.methods
        method = next((other for other in panel.methods if options[other].get("method") == "mae"), method)
    cells = [panel.cell(method, value, seed) for seed in found.study.seeds]
    return [cell for cell in cells if cell in found.cells]


def write_table(found: Found) -> str:
    """Return the tables of a study, with what is missing named in them."""
    study, done = found.study, len(found.done)
    lines = [
        f"# {study.title}",
        "",
        f"`mirl study {study.name}`: {done} of {len(found.cells)} cells are finished"
        + (f", {len(found.other)} have a result of another definition" if found.other else "")
        + f". Top-1 in %, mean over {len(study.seeds)} seeds ± half their range" * (len(study.seeds) > 1)
        + f".{_about(list(found.done.values()))}",
    ]
    for panel in study.panels:
        lines += ["", f"## {panel.title} ({panel.mirrors})", "", *_panel(found, panel)]
    if differences := _differences(found):
        lines += ["", "## Differences", "", *DIFFERENCES.splitlines(), "", *differences]
    if encoders := _encoders(found):
        lines += ["", "## All encoders", "", *encoders]
    return "\n".join(lines) + "\n"


def _about(results: Sequence[Result]) -> str:
    if not results:
        return ""
    margin, tested = max(result.margin for result in results), results[0].tested
    devices = ", ".join(sorted({result.device for result in results}))
    return f" {tested} test images leave up to ± {margin:.1f} open beside that (95 %). Run on {devices}."


def _panel(found: Found, panel: Panel) -> list[str]:
    study = found.study
    columns = {"depth": "depth {}", "replaced": "{} replaced", "method": "depth {}"}[panel.axis]
    heading = "fine-tuned" + (f", depth {panel.depths[0]}" if panel.axis == "replaced" else "")
    rows = [[heading, *(columns.format(value) for value in panel.values)]]
    for method in panel.methods:
        row = [method]
        for value in panel.values:
            cells = at(found, panel, method, value)
            summary = summarise([result.top1 for result in found.of(cells)])
            other = " (of another definition)" if found.other.intersection(cells) else ""
            row.append((summary.text(len(study.seeds)) if summary else "missing" if cells else "-") + other)
        rows.append(row)
    return _markdown(rows)


def _differences(found: Found) -> list[str]:
    """Return a row for each cell of a panel against that of the first method, and against the first of the axis."""
    pairs: list[tuple[Cell, Cell]] = []
    for panel in found.study.panels:
        cells = {(m, v): at(found, panel, m, v)[:1] for v in panel.values for m in panel.methods}
        for axis in ("method", "value"):
            for (method, value), first in cells.items():
                other = cells[(panel.methods[0], value) if axis == "method" else (method, panel.values[0])]
                pairs += [(one, another) for one in first for another in other if one != another]
    rows = [["encoder", "against", "fine-tuned", "linear probe", "k-NN"]]
    for pair in dict.fromkeys(pairs):
        seeds = [[replace(cell, seed=seed) for cell in pair] for seed in found.study.seeds]
        both = [found.of(cells) for cells in seeds if all(cell in found.done for cell in cells)]
        if both:
            of_seeds = f" ({len(both)} of {len(seeds)} seeds)" if len(both) < len(seeds) else ""
            differences = [_difference(both, name) for name in ("finetune", "probe", "knn")]
            rows.append([_name(pair[0]), _name(pair[1]) + of_seeds, *differences])
    return _markdown(rows) if rows[1:] else []


def _name(cell: Cell) -> str:
    return f"{cell.method}, depth {cell.depth}" + (f", {cell.replaced} replaced" if cell.replaced else "")


def _difference(both: Sequence[Sequence[Result]], name: str) -> str:
    """Write by how much the first of `both` is above the second, over seeds, with its 95 % interval; "-" if unknown.

    The interval is that of Newcombe (1998, method 10), which is made of Wilson's of both and needs no large numbers.
    """
    if not all(name in result.results for pair in both for result in pair):
        return "-"
    shares, intervals = [], []
    for results in zip(*both, strict=True):
        shares.append(mean(float(result.results[name]["top1"]) for result in results))
        images = int(results[0].results[name]["images"])
        intervals.append(wilson(round(shares[-1] * images), images))
    (first, second), ((low, high), (other_low, other_high)) = shares, intervals
    below, above = math.hypot(first - low, other_high - second), math.hypot(high - first, second - other_low)
    apart = first - second
    return f"{100 * apart:+.1f} ({100 * (apart - below):+.1f} to {100 * (apart + above):+.1f})"


def _encoders(found: Found) -> list[str]:
    """Return a row for each pre-trained encoder: what was measured besides fine-tuning, and the time."""
    seeds = len(found.study.seeds)
    grouped: dict[tuple[str, int, int], list[Result]] = {}
    for cell, result in found.done.items():
        if "probe" in result.results:
            grouped.setdefault((cell.method, cell.depth, cell.replaced), []).append(result)
    rows = [["encoder", "depth", "held-out loss", "linear probe", "k-NN", "time of a cell"]]
    for (method, depth, cut), results in grouped.items():
        losses = summarise([float(result.results["held_out_loss"]) for result in results])
        reads = [summarise([100 * float(r.results[name]["top1"]) for r in results]) for name in ("probe", "knn")]
        assert losses
        time = duration(mean(sum(result.seconds.values()) for result in results))
        name = f"{method}, without the last {cut}" if cut else method
        rows.append([name, str(depth), losses.text(seeds, 3), *(s.text(seeds) for s in reads if s), time])
    return _markdown(rows) if grouped else []


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    def line(values: Iterable[str]) -> str:
        return f"| {' | '.join(values)} |"

    return [line(rows[0]), line("---" for _ in rows[0]), *map(line, rows[1:])]
