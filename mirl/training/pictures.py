"""Pictures of reconstructions: original, masked, then main component, residual and their sum for each pair.

Paper: Figure 7. And curves of the run so far.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from mirl.data.transforms import channel_statistics
from mirl.methods import Term
from mirl.models.patches import Size, gather, unpatchify
from mirl.objectives.pixels import Target, to_pixels
from mirl.training.checkpoints import atomic

GREY = 0.5


@dataclass(frozen=True)
class Panel:
    """A column of a picture: its title and images [b, c, h, w] in 0..1 (values outside are clipped when drawn)."""

    title: str
    images: Tensor


def panels(
    patches: Tensor, visible: Tensor, masked: Tensor, predictions: Sequence[Tensor], terms: Sequence[Term],
    *, target: Target, image_size: Size, patch_size: Size, channels: int,
) -> list[Panel]:  # fmt: skip
    """Turn predictions of masked patches into pictures.

    Normalised predictions get each patch's true mean and deviation back; a residual has no mean and is drawn around
    grey. Visible patches show the image in reconstructions, and no residual.

    Args:
        patches: [b, n, p] normalised as the model saw them; visible [b, v]; masked [b, m].
        predictions: one [b, m, p] per decoder.
    """
    mean, deviation = (patches.new_tensor(s).view(-1, 1, 1) for s in channel_statistics(channels))
    truth = gather(patches, masked)

    def image(masked_patches: Tensor, visible_patches: Tensor) -> Tensor:
        whole = torch.empty_like(patches)
        for indices, values in ((masked, masked_patches), (visible, visible_patches)):
            whole.scatter_(1, indices.unsqueeze(-1).expand_as(values), values)
        return unpatchify(whole, image_size, patch_size) * deviation

    seen, nothing = gather(patches, visible), torch.zeros_like(gather(patches, visible))
    grey = unpatchify(torch.zeros_like(patches), image_size, patch_size) + GREY
    hidden = image(torch.ones_like(truth), nothing) != 0
    original = image(truth, seen) + mean
    result = [Panel("original", original), Panel("masked", torch.where(hidden, grey, original))]
    for number, term in enumerate(terms, start=1):
        parts = [predictions[decoder - 1].float() for decoder in term.decoders]
        total = to_pixels(torch.stack(parts).sum(0), truth, target)
        label = f"pair {number}: " if len(terms) > 1 else ""
        if len(parts) == 2:
            main = to_pixels(parts[0], truth, target)
            result.append(Panel(f"{label}main", image(main, seen) + mean))
            result.append(Panel("residual", image(total - main, nothing) + GREY))
        result.append(Panel("sum" if len(parts) > 1 else f"{label}reconstruction", image(total, seen) + mean))
    return result


def draw(columns: Sequence[Panel], path: Path, title: str) -> None:
    """Draw one row per image and one column per panel to a PNG at `path`."""
    rows = len(columns[0].images)
    _, _, height, width = columns[0].images.shape
    cell = 1.3
    figure = Figure(figsize=(cell * len(columns), cell * rows * height / width + 0.55), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=8)
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for j, panel in enumerate(columns):
        axes[0, j].set_title(panel.title, fontsize=7)
        for i, image in enumerate(panel.images.clamp(0, 1)):
            pixels = image[:3].permute(1, 2, 0) if len(image) >= 3 else image[0]
            axes[i, j].imshow(pixels.cpu().numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes[i, j].axis("off")
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")


def contact_sheet(images: Tensor, captions: Sequence[str], path: Path, title: str, *, columns: int = 8) -> None:
    """Draw uint8 `images` [b, c, h, w] with a caption each to a PNG at `path`."""
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(1.3 * columns, 1.55 * rows + 0.4), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=8)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for place in axes:
        place.axis("off")
    for place, image, caption in zip(axes, images, captions, strict=False):
        pixels = image[:3].permute(1, 2, 0) if len(image) >= 3 else image[0]
        place.imshow(pixels.cpu().numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        place.set_title(caption, fontsize=6, parse_math=False)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")


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
    loss.legend(fontsize=7)
    others = {name for row in held_out for name in row} - {"kind", "step", "epoch", "loss", "average_loss"}
    members = sorted(others) or ["loss"]
    for name in members:
        _curve(parts, held_out, name, label=name.replace("_", " "), marker="o")
    parts.legend(fontsize=7)
    accuracies = any("top1" in name for name in members)
    titles = {
        loss: "loss", parts: "held-out accuracy" if accuracies else "held-out loss", rate: "learning rate",
        norm: "gradient norm", speed: "images a second", wait: "waiting for data, % of the time",
    }  # fmt: skip
    for axes, title in titles.items():
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("epoch", fontsize=7)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    norm.set_yscale("log")
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")


def _curve(axes: Any, rows: Sequence[dict[str, Any]], name: str, **style: Any) -> None:
    known = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
    axes.plot(*zip(*known, strict=True), linewidth=0.8, markersize=3, **style) if known else None
