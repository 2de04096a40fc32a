"""A picture of a data set's sizes: shorter sides, and what will be enlarged; width by height."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mirl.checkup.records import Records
from mirl.errors import plural
from mirl.models.patches import Size
from mirl.training.files import atomic

BARS = 48
SIDES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
SHAPES = {"1:8": 1 / 8, "1:4": 1 / 4, "1:2": 1 / 2, "2:3": 2 / 3, "1:1": 1, "3:2": 3 / 2, "2:1": 2, "4:1": 4, "8:1": 8}


def draw_sizes(records: Records, image_size: Size, title: str, path: Path) -> None:
    """Draw two histograms to a PNG at `path`; `image_size` is the suggested one."""
    height, width = (records.of_usable(side).astype(np.float32) for side in ("height", "width"))
    figure = Figure(figsize=(9, 3.4), dpi=120, layout="constrained")
    figure.suptitle(f"{title}: {plural(len(height), 'image', form=',')}", fontsize=10, parse_math=False)
    left, right = figure.subplots(1, 2)
    _sides(left, np.minimum(height, width), min(image_size))
    _shapes(right, width / height)
    for axes in (left, right):
        axes.set_ylabel("images", fontsize=8)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.tick_params(labelsize=7)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.set_ylim(top=1.3 * axes.get_ylim()[1])  # room for the legend
        axes.legend(fontsize=7, loc="upper right", ncols=3, frameon=False, columnspacing=1.2, handlelength=1.5)
        axes.spines[["top", "right"]].set_visible(False)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")


def _sides(axes: Any, sides: np.ndarray, image_size: int) -> None:
    low, high = min(sides.min(), image_size) / 1.2, max(sides.max(), image_size) * 1.2
    edges = np.geomspace(low, high, BARS)
    small = sides < image_size
    axes.hist([sides[small], sides[~small]], edges, stacked=True, color=["C1", "C0"],
              label=[f"enlarged ({small.mean():.1%})", "made smaller"])  # fmt: skip
    axes.axvline(image_size, ymax=0.8, color="black", linewidth=1, linestyle="--", label=f"image size {image_size}")
    axes.set(xscale="log", xlim=(low, high))
    axes.set_title("shorter side", fontsize=9)
    axes.set_xlabel("pixels", fontsize=8)
    axes.xaxis.set_major_locator(FixedLocator([side for side in SIDES if low <= side <= high]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _shapes(axes: Any, shapes: np.ndarray) -> None:
    widest = min(10.0, max(2.0, float(np.max(np.maximum(shapes, 1 / shapes))))) * 1.1
    edges = np.geomspace(1 / widest, widest, BARS)
    axes.hist(np.clip(shapes, edges[0], edges[-1]), edges, color="C0")
    axes.axvspan(3 / 4, 4 / 3, color="C2", ymax=0.8, alpha=0.15, zorder=0, label="shapes of crops, 3:4 to 4:3")
    axes.set(xscale="log", xlim=(edges[0], edges[-1]))
    axes.set_title("width : height", fontsize=9)
    axes.set_xlabel("upright   ←   →   wide", fontsize=8)
    ticks = {name: shape for name, shape in SHAPES.items() if edges[0] <= shape <= edges[-1]}
    axes.xaxis.set_major_locator(FixedLocator(list(ticks.values())))
    axes.set_xticklabels(list(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
