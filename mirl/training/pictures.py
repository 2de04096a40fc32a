"""Pictures during a run: reconstructions, images with captions, curves, the gradients of each block."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn import functional as F

from mirl.training.drawing import save_figure
from mirl.training.reconstructions import Panel, to_rgb

# Figures that are drawn where they are known, alone, and what they are together.
HEADLINES = {("box_ap", "mask_ap"): "average precision", ("miou", "aacc", "macc"): "IoU and accuracy"}
FIGURES = {
    "box_ap": "box AP", "mask_ap": "mask AP", "miou": "mean IoU", "aacc": "pixel accuracy", "macc": "class accuracy",
}  # fmt: skip


def draw(columns: Sequence[Panel], path: Path, title: str) -> None:
    """Draw one row per image and one column per panel to a PNG at `path`."""
    rows = len(columns[0].images)
    _, _, height, width = columns[0].images.shape
    cell, gap = 1.3, max(1, height // 16)
    tall = rows * (height + gap) / width
    figure = Figure(figsize=(cell * len(columns), cell * tall + 0.55), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=8)
    for axes, panel in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        axes.set_title(panel.title, fontsize=7)
        # One picture for each column: axes for each image would take matplotlib several times as long.
        column = F.pad(to_rgb(panel.images), (0, 0, 0, 0, 0, gap), value=255).flatten(0, 1)[:-gap]
        axes.imshow(column.numpy(), interpolation="nearest")
        axes.axis("off")
    save_figure(figure, path)


def contact_sheet(images: Tensor, captions: Sequence[str], path: Path, title: str, *, columns: int = 8) -> None:
    """Draw uint8 `images` [b, c, h, w] with a caption each to a PNG at `path`."""
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(1.3 * columns, 1.55 * rows + 0.4), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=8)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for place in axes:
        place.axis("off")
    for place, pixels, caption in zip(axes, to_rgb(images / 255), captions, strict=False):
        place.imshow(pixels.numpy(), interpolation="nearest")
        place.set_title(caption, fontsize=6, parse_math=False)
    save_figure(figure, path)


def draw_curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw loss, pairs, learning rate, gradient norm and speed over epochs from rows of metrics.jsonl to a PNG."""
    training = [row for row in rows if row["kind"] == "train"]
    held_out = [row for row in rows if row["kind"] == "held_out"]
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    (loss, parts, rate), (norm, speed, wait) = figure.subplots(2, 3)
    if training:
        names = {"loss": loss, "lr": rate, "grad_norm": norm, "images_per_second": speed}
        for name, axes in names.items():
            _curve(axes, training, name, label="training" if name == "loss" else None, color="C0", alpha=0.6)
        epochs = [row["epoch"] for row in training]
        wait.plot(epochs, [100 * row["data_wait"] / row["seconds"] for row in training], color="C0", linewidth=0.8)
    _curve(loss, held_out, "loss", label="held out", color="C1", marker="o")
    if loss.lines:
        loss.legend(fontsize=7)
    others = {name for row in held_out for name in row} - {"kind", "step", "epoch", "loss", "average_loss"}
    members, shares = _figures(others)
    for name in members:
        label = FIGURES.get(name) or name.replace("_", " ")
        _curve(parts, held_out, name, label=label, marker="o")
    if parts.lines:
        parts.legend(fontsize=7)
    titles = {
        loss: "loss", parts: f"held-out {shares}", rate: "learning rate",
        norm: "gradient norm", speed: "images a second", wait: "waiting for data, % of the time",
    }  # fmt: skip
    for axes, title in titles.items():
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("epoch", fontsize=7)
        axes.tick_params(labelsize=7, which="both")
        axes.grid(alpha=0.3)
    norm.set_yscale("log")
    save_figure(figure, path)


def _figures(others: set[str]) -> tuple[list[str], str]:
    """Choose which values of evaluations to draw beside the loss, and say what they are."""
    for names, words in HEADLINES.items():
        if found := sorted({*names} & others):
            return found, words
    members = sorted(others) or ["loss"]
    return members, "accuracy" if any("top1" in name for name in members) else "loss"


def _curve(axes: Any, rows: Sequence[dict[str, Any]], name: str, **style: Any) -> None:
    known = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
    axes.plot(*zip(*known, strict=True), linewidth=0.8, markersize=3, **style) if known else None


def draw_gradients(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the encoder's gradient norm over epochs, and each block's mean over the run, from rows of metrics.jsonl.

    Paper: Appendix C.
    """
    known = [row for row in rows if row["kind"] == "gradients"]
    figure = Figure(figsize=(9, 3.4), dpi=120, layout="constrained")
    over_time, by_block = figure.subplots(1, 2)
    over_time.plot([row["epoch"] for row in known], [row["encoder"] for row in known], linewidth=0.8)
    means = [sum(norms) / len(norms) for norms in zip(*(row["blocks"] for row in known), strict=True)]
    by_block.plot(range(1, len(means) + 1), means, marker=".", linewidth=1)
    over_time.set(title="gradient norm of the encoder", xlabel="epoch")
    by_block.set(title="gradient norm of each block, mean over the run", xlabel="block")
    by_block.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (over_time, by_block):
        axes.set_yscale("log")
        axes.title.set_size(9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    save_figure(figure, path)
