"""One page of plots for a diagnosis: the verdicts, then each figure against the block's index, then CKA maps."""

import math
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from mirl.analysis.diagnosis import READ_OUTS, Diagnosis, ReadOut
from mirl.errors import plural
from mirl.training.drawing import COLOURS, save_figure

COLUMNS, WIDTH, PANEL = 4, 15.0, 2.75  # panels in a row; inches of the page's width and of a row's height
LINE, LETTERS = 0.185, 205  # inches of a line of text, letters in it
LEAST = 1e-3  # of a logarithmic axis: a block that does nothing must not press the others together

Panel = Callable[[Any], None]


def draw_page(
    diagnoses: Sequence[Diagnosis], verdicts: dict[str, list[str]], compared: Sequence[str], data: str, path: Path
) -> None:
    """Draw everything found about several encoders to a PNG."""
    lines = _text(verdicts, compared)
    panels = _panels(diagnoses)
    rows = math.ceil(len(panels) / COLUMNS)
    heights = [LINE * (len(lines) + 3), PANEL * rows]
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=110)
    text, plots = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
    images = " and ".join(sorted({str(d.images) for d in diagnoses}))
    top, step = 1 - 0.6 * LINE / heights[0], LINE / heights[0]
    style: dict[str, Any] = {"ha": "left", "va": "top", "fontsize": 9, "parse_math": False}
    text.text(0.012, top, "Which blocks learned?", **style | {"fontsize": 13, "weight": "bold"})
    text.text(0.17, top - 0.25 * step, f"{images} images of {data}, whole; dotted: fresh weights", **style)
    for number, (line, index, first) in enumerate(lines):
        colour = COLOURS[index % len(COLOURS)] if index is not None else "black"
        weight = "bold" if first else "normal"
        text.text(
            0.012,
            top - (1.8 + number) * step,
            line,
            **style | {"color": colour if first else "black", "weight": weight},
        )
    grid = plots.add_gridspec(
        rows, COLUMNS, left=0.035, right=0.99, bottom=0.5 / heights[1], top=1 - 0.3 / heights[1], wspace=0.2,
        hspace=0.42,
    )  # fmt: skip
    for number, panel in enumerate(panels):
        panel(plots.add_subplot(grid[number // COLUMNS, number % COLUMNS]))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)


def _text(verdicts: dict[str, list[str]], compared: Sequence[str]) -> list[tuple[str, int | None, bool]]:
    """Return lines that fit the page: what is said, of which encoder, whether it begins a verdict."""
    lines: list[tuple[str, int | None, bool]] = []

    def add(sentence: str, index: int | None, first: bool) -> None:
        wrapped = textwrap.wrap(sentence, LETTERS - 25 * first, subsequent_indent="" if first else "    ")
        lines.extend((line, index, first) for line in wrapped)

    for index, (name, (summary, *rest)) in enumerate(verdicts.items()):
        add(f"{name}: {summary}", index, True)
        for sentence in rest:
            add(f" ·  {sentence}", index, False)
    if compared:
        add("side by side", None, True)
    for sentence in compared:
        add(f" ·  {sentence}", None, False)
    return lines


def _panels(diagnoses: Sequence[Diagnosis]) -> list[Panel]:
    panels: list[Panel] = [
        partial(_lines, diagnoses, "effective rank of tokens", lambda d: d.measures.rank, lambda d: d.fresh.rank),
        partial(
            _lines, diagnoses, "similarity of an image's tokens", lambda d: d.measures.similarity,
            lambda d: d.fresh.similarity,
        ),
        partial(_lines, diagnoses, "norm of a token", lambda d: d.measures.norm, lambda d: d.fresh.norm, log=True),
        partial(
            _lines, diagnoses, "update: change of a token / its norm", lambda d: d.measures.update,
            lambda d: d.fresh.update, log=True,
        ),
        partial(
            _lines, diagnoses, "block influence: 1 - cosine, before and after",
            lambda d: [1 - value for value in d.measures.cosine], lambda d: [1 - value for value in d.fresh.cosine],
            log=True,
        ),
        partial(
            _lines, diagnoses, "attention entropy / uniform attention's", lambda d: d.measures.entropy,
            lambda d: d.fresh.entropy,
        ),
        partial(_lines, diagnoses, "1 - CKA with fresh weights", lambda d: d.change, lambda d: d.chance),
        partial(
            _lines, diagnoses, "distance of weights from the first ones", lambda d: d.distance, None,
            missing=lambda d: d.distance_unknown,
        ),
    ]  # fmt: skip
    panels += [partial(_read_out, diagnoses, name) for name in diagnoses[0].read_outs]
    if any(d.trials for d in diagnoses):
        panels.append(partial(_trials, diagnoses))
    return panels + [partial(_cka, d, index, len(diagnoses)) for index, d in enumerate(diagnoses)]


def _style(axes: Any, title: str, xlabel: str = "block") -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(xlabel, fontsize=8, labelpad=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)


def _blocks(values: Sequence[float], depth: int) -> range:
    """Return the numbers of the blocks that figures are of, from the embedding's 0 where there is one for it."""
    return range(depth + 1 - len(values), depth + 1)


def _lines(
    diagnoses: Sequence[Diagnosis], title: str, of: Callable[[Diagnosis], list[float] | None],
    fresh: Callable[[Diagnosis], list[float] | None] | None, axes: Any, *, log: bool = False,
    missing: Callable[[Diagnosis], str] = lambda _: "its attention is not timm's own",
) -> None:  # fmt: skip
    """Draw a line for each encoder, and dotted what fresh weights have."""
    unknown: dict[str, list[str]] = {}
    for d, colour in zip(diagnoses, _colours(diagnoses), strict=True):
        style: dict[str, Any] = {"color": colour, "linewidth": 1.3}
        if (values := of(d)) is None:
            unknown.setdefault(missing(d), []).append(_short(d.name))
        else:
            axes.plot(_blocks(values, d.depth), values, marker="o", markersize=2.5, **style)
        if fresh and (values := fresh(d)) is not None:
            axes.plot(_blocks(values, d.depth), values, linestyle=":", alpha=0.8, **style)
    _style(axes, title)
    if log:
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(bottom=max(LEAST, 0.8 * min(min(line.get_ydata()) for line in axes.lines)))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if unknown:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.8 * (high - low))  # room for words
        notes = (textwrap.fill(f"not known of {', '.join(names)}: {why}", 48) for why, names in unknown.items())
        place = {"ha": "center", "va": "top", "transform": axes.transAxes, "fontsize": 8, "parse_math": False}
        axes.text(0.5, 0.96, "\n".join(notes), color="dimgrey", **place)


def _read_out(diagnoses: Sequence[Diagnosis], name: str, axes: Any) -> None:
    def of(read: ReadOut) -> list[float]:
        return [100 * value for value in read.top1]

    title = f"{READ_OUTS[name]}, %, 95 % interval"
    _lines(diagnoses, title, lambda d: of(d.read_outs[name]), lambda d: of(d.fresh_read_outs[name]), axes)
    for d, colour in zip(diagnoses, _colours(diagnoses), strict=True):
        low, high = ([100 * value for value in ends] for ends in zip(*d.read_outs[name].intervals, strict=True))
        axes.fill_between(range(d.depth + 1), low, high, color=colour, alpha=0.15, linewidth=0)


def _trials(diagnoses: Sequence[Diagnosis], axes: Any) -> None:
    """Draw Figure 2 of the paper: accuracy after fine-tuning against the number of fresh last blocks."""
    for d, colour in zip(diagnoses, _colours(diagnoses), strict=True):
        counts = sorted({trial.count for trial in d.trials})
        found = [[100 * trial.top1 for trial in d.trials if trial.count == count] for count in counts]
        axes.plot(counts, [sum(values) / len(values) for values in found], color=colour, linewidth=1.3)
        axes.plot([t.count for t in d.trials], [100 * t.top1 for t in d.trials], ".", color=colour, markersize=5)
    epochs = plural(diagnoses[0].epochs, "epoch")
    _style(axes, f"fine-tuned {epochs}, top-1, %, each seed", "last blocks with fresh weights")


def _cka(d: Diagnosis, index: int, count: int, axes: Any) -> None:
    image = axes.imshow(d.measures.cka, origin="lower", cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, pad=0.02).ax.tick_params(labelsize=7)
    _style(axes, "CKA between blocks" + (f": {_short(d.name)}" if count > 1 else ""))
    axes.title.set_color(COLOURS[index % len(COLOURS)] if count > 1 else "black")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=False)


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"…{name[-23:]}"


def _colours(diagnoses: Sequence[Diagnosis]) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(len(diagnoses))]
