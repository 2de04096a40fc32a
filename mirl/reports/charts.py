"""Charts: what a chart shows, as data, and its drawing with Bokeh, which is imported here alone.

Colours of axes and text are set in the browser (page.js), because they follow its light or dark scheme.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal

import numpy as np

# Each differs from white and from the dark page by a contrast of 3 or more.
COLOURS = ("#2f7bd9", "#d2691e", "#2a9060", "#c24f9a", "#8064d6", "#16889e", "#d1495b", "#8f7443")
RAMP = ((122, 92, 214), (204, 80, 140), (208, 120, 30))  # early to late, shallow to deep
FONT = "system-ui, sans-serif"
FORMATS = {"step": "%d", "block": "%d"}
FAINT = 0.4  # opacity
SUMMED_UP = 8  # lines of a chart that its summary in words names
MANY = 4  # lines from which hovering shows the nearest one alone


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: in the legend; lines of the same label are shown and hidden together.
        x, y: [n], finite; notes: further values [n] to show on hovering, by name.
        style: dots marks each value; faint is the background of another line and sets no range.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    colour: str
    style: Literal["plain", "dots", "faint"] = "plain"
    notes: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Chart:
    """A chart with its words.

    Attributes:
        name: unique in the page; x, y: titles of the axes, with units.
        ramp: what the lines' colours mean and its ends, where they are a scale and the legend needs no names.
    """

    name: str
    title: str
    x: str
    y: str
    lines: tuple[Line, ...]
    log: bool = False
    ramp: tuple[str, str, str] | None = None

    @property
    def legend(self) -> dict[str, str]:
        """Colours by label, in the order of the lines."""
        return {line.label: line.colour for line in self.lines}

    @property
    def summary(self) -> str:
        """The chart in words, for those who do not see it."""
        told = [line for line in self.lines if line.style != "faint" and len(line.y)]
        ends = told if len(told) <= SUMMED_UP else [told[0], told[-1]]
        words = [
            f"{line.label}: {line.y[0]:.4g} at {line.x[0]:.4g}, {line.y[-1]:.4g} at {line.x[-1]:.4g}, "
            f"from {line.y.min():.4g} to {line.y.max():.4g}"
            for line in ends
        ]
        return f"{self.title}, {self.y} against {self.x}. {'; '.join(words)}."


def ramp(share: float) -> str:
    """Return the colour at `share` in 0..1 of the scale from early to late."""
    place = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    mixed = (a + (place - low) * (b - a) for a, b in zip(RAMP[low], RAMP[low + 1], strict=True))
    return "#" + "".join(f"{round(value):02x}" for value in mixed)


def library() -> str:
    """Return Bokeh's script."""
    from bokeh.resources import Resources

    return "\n".join(Resources(mode="inline", components=["bokeh"], log_level="warn").js_raw)


def draw(chart: Chart) -> str:
    """Return a chart as the JSON that Bokeh's script embeds."""
    from bokeh.core.json_encoder import serialize_json
    from bokeh.embed import json_item
    from bokeh.models import BoxZoomTool, DataRange1d, PanTool, PrintfTickFormatter, Range1d, ResetTool, WheelZoomTool
    from bokeh.plotting import figure

    # The wheel scrolls the page until its tool is chosen; a finger always does (page.js).
    box = BoxZoomTool()
    plot = figure(
        sizing_mode="stretch_both", y_axis_type="log" if chart.log else "linear", toolbar_location="above",
        tools=[box, PanTool(), WheelZoomTool(), ResetTool()], active_drag=box, active_scroll=None,
        x_axis_label=chart.x, y_axis_label=chart.y, background_fill_alpha=0, border_fill_alpha=0, outline_line_alpha=0,
        min_border_right=12,
    )  # fmt: skip
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    renderers = [renderer for line in chart.lines for renderer in _add(plot, line, chart)]
    followed = [renderer for renderer in renderers if "faint" not in renderer.tags]
    plot.y_range = DataRange1d(renderers=followed or "auto", range_padding=0.08)
    if not any(line.y.any() for line in chart.lines):
        plot.y_range = Range1d(-0.08, 1)  # all is zero, as a precision at first: nothing is below
    plot.x_range = DataRange1d(renderers=renderers, range_padding=0.02)
    for axis in (*plot.xaxis, *plot.yaxis):
        axis.update(
            axis_label_text_font=FONT, axis_label_text_font_style="normal", axis_label_text_font_size="12px",
            major_label_text_font=FONT, major_label_text_font_size="11px", minor_tick_line_color=None,
            axis_line_alpha=0, major_tick_line_alpha=0,
        )  # fmt: skip
    if not chart.log:
        plot.yaxis.formatter = PrintfTickFormatter(format="%.4g")
    if chart.x == "block":
        plot.xaxis.ticker.min_interval = 1
    plot.xgrid.grid_line_color = None
    return serialize_json(json_item(plot))


def _add(plot: Any, line: Line, chart: Chart) -> list[Any]:
    """Draw a line, and what answers to the mouse."""
    from bokeh.models import ColumnDataSource, HoverTool

    kept = line.y > 0 if chart.log else slice(None)
    columns = {"x": line.x, "y": line.y} | {f"note{i}": values for i, values in enumerate(line.notes.values())}
    source = ColumnDataSource({name: values[kept].astype(np.float32) for name, values in columns.items()})
    faint = line.style == "faint"
    look = {"source": source, "color": line.colour, "name": line.label}
    drawn = [plot.line("x", "y", line_width=1 if faint else 1.8, alpha=FAINT if faint else 1, **look)]
    if line.style == "dots":
        drawn.append(plot.scatter("x", "y", size=6, **look))
    if faint:
        drawn[0].tags = ["faint"]
        return drawn
    titles = [chart.x, line.label, *line.notes]
    mode = "mouse" if len(chart.lines) > MANY else "vline"
    answers = drawn[-1:] if mode == "mouse" else drawn[:1]  # a mark where the mouse is, a line wherever it is above
    rows = "".join(_row(title, name) for title, name in zip(titles, columns, strict=True))
    formatters = {f"@{name}": "printf" for name in columns}
    plot.add_tools(
        HoverTool(
            renderers=answers, line_policy="nearest", mode=mode, tooltips=rows, formatters=formatters, visible=False
        )
    )
    return drawn


def _row(title: str, column: str) -> str:
    """Return a row of a tooltip, which is HTML in which @ and $ have a meaning."""
    named = escape(title).replace("@", "&#64;").replace("$", "&#36;").replace("{", "&#123;")
    return f"<div>{named} <b>@{column}{{{FORMATS.get(title, '%.4g')}}}</b></div>"


def lines_of(groups: Sequence[tuple[Line, ...]]) -> tuple[Line, ...]:
    """Join groups of lines, and leave out lines without a value."""
    return tuple(line for group in groups for line in group if len(line.y))
