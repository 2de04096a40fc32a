"""Charts against depth: what each block of the encoder learns, the gradients that reach it, what is read from it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mirl.reports import tables
from mirl.reports.charts import Chart, Line, lines_of, ramp
from mirl.reports.contents import Row, Run, number
from mirl.reports.curves import colour_of, over_time
from mirl.reports.series import Series, series

FIGURES = {
    "rank": ("Effective rank of tokens", "directions in use"),
    "similarity": ("Similarity of an image's tokens", "mean cosine"),
    "linear": ("Linear read-out", "% right"),
    "knn": ("k-NN read-out", "% right"),
}
MOMENTS = 40  # most evaluations drawn in one chart
LINES = 12  # most blocks drawn in one chart over time


def block_figures(runs: Sequence[Run]) -> list[Chart]:
    """Return a chart for each figure of the blocks: of one run at every evaluation, of several at their last."""
    charts = []
    for name, (title, unit) in FIGURES.items():
        rows = [[row for row in run.rows["blocks"] if _known(row.get(name))] for run in runs]
        if len(runs) > 1:
            lines = lines_of([(_against_block(run.name, found[-1], name, colour_of(i)),)
                              for i, (run, found) in enumerate(zip(runs, rows, strict=True)) if found])  # fmt: skip
            charts.append(Chart(f"blocks_{name}", title, "block", unit, lines))
        elif rows[0]:
            kept = [rows[0][i] for i in np.unique(np.linspace(0, len(rows[0]) - 1, MOMENTS).astype(int))]
            end = max(kept[-1]["epoch"], 1e-9)
            lines = tuple(
                _against_block(f"epoch {row['epoch']:.4g}", row, name, ramp(row["epoch"] / end)) for row in kept
            )
            ends = ("epoch", f"{kept[0]['epoch']:.4g}", f"{kept[-1]['epoch']:.4g}")
            charts.append(Chart(f"blocks_{name}", title, "block", unit, lines, ramp=ends))
    return [chart for chart in charts if chart.lines]


def gradients(runs: Sequence[Run]) -> list[Chart]:
    """Return the gradient norm of each block, mean over the run, and over time. Paper: Appendix C."""
    means: list[tuple[Line, ...]] = []
    times: list[tuple[Line, ...]] = []
    for index, run in enumerate(runs):
        label = run.name if len(runs) > 1 else "mean over the run"
        rows = [row for row in run.rows["gradients"] if _known(row.get("blocks"))]
        found = _by_block(rows)
        norms = np.array([values.values.mean() for values in found])
        means.append((Line(label, np.arange(1, len(norms) + 1), norms, colour_of(index), "dots"),))
        if len(runs) > 1:
            times.append(over_time(label, series(rows, "encoder"), colour_of(index), len(runs)))
        else:
            chosen = np.unique(np.linspace(0, len(found) - 1, LINES).astype(int))[: len(found)].tolist()
            times += [
                over_time(f"block {b + 1}", found[b], ramp(b / max(1, len(found) - 1)), LINES, background=False)
                for b in chosen
            ]
    ends = None if len(runs) > 1 else ("block", "1", str(len(found)))
    title = "Gradient norm of the encoder" if len(runs) > 1 else "Gradient norm of blocks over time"
    charts = [
        Chart("gradients_mean", "Gradient norm by block", "block", "mean norm over the run", lines_of(means), log=True),
        Chart("gradients_time", title, "epoch", "gradient norm", lines_of(times), log=True, ramp=ends),
    ]
    return [chart for chart in charts if chart.lines]


def read_outs(runs: Sequence[Run]) -> list[Chart]:
    """Return accuracy against the block that was read, for each read-out of every block.

    Of several runs the best of each read-out's classifiers is shown: of k-NN's numbers of neighbours, say.
    """
    lines: dict[str, list[Line]] = {}
    titles: dict[str, str] = {}
    for index, run in enumerate(runs):
        for path, document in run.documents("readouts/*.json").found.items():
            blocks = document.get("blocks", {})
            by_reader = {name: _accuracies(blocks, name) for readers in blocks.values() for name in readers}
            if len(blocks) < 2 or not by_reader:
                continue
            titles[path] = f"Every block, {document.get('command')} on {tables.data_of(document)}"
            if len(runs) > 1:
                best = max(by_reader, key=lambda name: by_reader[name][-1, 1] if len(by_reader[name]) else 0)
                by_reader = {f"{run.name}, {best}": by_reader[best]}
            for place, (label, found) in enumerate(by_reader.items()):
                colour = colour_of(index if len(runs) > 1 else place)
                notes = {"95 % from": found[:, 2], "to": found[:, 3]}
                lines.setdefault(path, []).append(Line(label, found[:, 0], found[:, 1], colour, "dots", notes))
    charts = [
        Chart(f"readout_{place}", titles[path], "block", "top-1, %", lines_of([tuple(found)]))
        for place, (path, found) in enumerate(lines.items(), start=1)
    ]
    return [chart for chart in charts if chart.lines]


def _by_block(rows: Sequence[Row]) -> list[Series]:
    """Return the gradient norm of each block over time; steps at which one is not finite are left out."""
    depth = min((len(row["blocks"]) for row in rows), default=0)
    known = [[number(value) for value in row["blocks"][:depth]] for row in rows]
    norms = np.array(known, dtype=float).reshape(len(rows), depth)  # None becomes NaN
    whole = np.isfinite(norms).all(axis=1)
    steps, epochs = (np.array([row[name] for row in rows], dtype=float)[whole] for name in ("step", "epoch"))
    return [Series(steps, epochs, values) for values in norms[whole].T if len(values)]


def _accuracies(blocks: dict[str, Any], reader: str) -> np.ndarray:
    """Return rows of (block, top-1, low, high), the last three in per cent."""
    rows = []
    for block, results in blocks.items():
        result = results.get(reader, {})
        found = map(number, (result.get("top1"), *result.get("interval", ())))
        known = [value for value in found if value is not None]
        if len(known) == 3 and block.isdecimal():
            rows.append((int(block), *(100 * value for value in known)))
    return np.array(sorted(rows), dtype=float).reshape(-1, 4)


def _against_block(label: str, row: Row, name: str, colour: str) -> Line:
    known = [(block, value) for block, value in enumerate(row[name], start=1) if number(value) is not None]
    blocks, values = np.array(known, dtype=float).reshape(-1, 2).T
    return Line(label, blocks, values, colour, "dots", notes={"epoch": np.full(len(blocks), float(row["epoch"]))})


def _known(values: object) -> bool:
    return isinstance(values, list) and any(number(value) is not None for value in values)
