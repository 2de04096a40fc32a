"""Objects drawn into images: translucent masks with outlines, boxes, names and scores, one colour for each class.

Objects are torchvision's dicts, each entry optional but `labels`: `labels` int64 [n] from 1 on, `boxes` [n, 4] as x0,
y0, x1, y1 in pixels, `masks` [n, h, w], `scores` [n]. Symbols: n objects, c channels, h and w height and width.
"""

import colorsys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from mirl.training.files import atomic
from mirl.training.reconstructions import to_rgb

Objects = Mapping[str, Tensor]
Colour = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]  # x0, y0, x1, y1

# Okabe and Ito's colours, which the colour-blind tell apart; without black, and with a blue that is seen in the dark.
FIRST_COLOURS: tuple[Colour, ...] = (
    *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66)),
    *((40, 110, 220), (213, 94, 0), (204, 121, 167)),
)
GOLDEN_RATIO = 0.618034
SHADES = (0.9, 0.9), (0.4, 1.0), (0.75, 1.0), (0.9, 0.65)  # saturation and value of further colours
READABLE = 400  # pixels of the longer side under which names could not be read
OPACITY = 0.45
CELL, WIDEST = 4.4, 13.2  # inches, of 110 pixels, of a sheet's picture and of all pictures in a row
LEGEND_CELL, LEGEND_LETTERS = 1.9, 22  # inches and letters of a name in a legend


def colour(label: int) -> Colour:
    """Return the colour of class `label`, from 1 on: the same in every picture, of 80 classes no two alike."""
    if label <= len(FIRST_COLOURS):
        return FIRST_COLOURS[label - 1]
    further = label - len(FIRST_COLOURS)
    red, green, blue = colorsys.hsv_to_rgb(further * GOLDEN_RATIO % 1, *SHADES[further % len(SHADES)])
    return round(255 * red), round(255 * green), round(255 * blue)


def overlay(image: Tensor, objects: Objects, names: Sequence[str], *, longest: int | None = None) -> Tensor:
    """Draw objects into an image.

    Lines and letters grow with the image. One that is too small for letters is enlarged by a whole number first.

    Args:
        image: uint8 [c, h, w]; other than three channels are shown as in other pictures, the first three or grey.
        names: of label k it is `names[k - 1]`.
        longest: pixels to which the longer side of a larger image is reduced.

    Returns:
        uint8 [3, h', w'].
    """
    shown, objects = _fit(to_rgb(image.cpu() / 255), {key: value.cpu() for key, value in objects.items()}, longest)
    height, width = shown.shape[:2]
    font_size = max(12, round((height * width) ** 0.5 / 40))
    line = max(1, round(font_size / 7))
    order = _large_first(objects)
    colours = [colour(int(label)) for label in objects["labels"]]
    if "masks" in objects:
        shown = _paint(shown, objects["masks"].bool(), colours, order, line)
    picture = Image.fromarray(shown.numpy())
    if "boxes" in objects:
        pen = ImageDraw.Draw(picture)
        boxes = objects["boxes"].double().clamp(min=0).tolist()
        edges = [(x0, y0, max(x0, min(x1, width) - 1), max(y0, min(y1, height) - 1)) for x0, y0, x1, y1 in boxes]
        for i in order:
            pen.rectangle(edges[i], outline=colours[i], width=line)
        texts = list(_texts(objects, names))
        _write(pen, (width, height), [(edges[i], texts[i], colours[i]) for i in _sure_first(objects)], font_size)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def sheet(
    rows: Sequence[Sequence[Tensor]], columns: Sequence[str], path: Path, title: str,
    *, captions: Sequence[str] = (), legend: Sequence[tuple[str, Colour]] = (),
) -> None:  # fmt: skip
    """Draw pictures, uint8 [3, h, w] each, such as overlays of truth and prediction, to a PNG with titled columns.

    Args:
        captions: what to write under the last picture of each row.
        legend: names of colours, written at the bottom.
    """
    cell = min(CELL, WIDEST / len(columns))
    heights = [max(picture.shape[1] / picture.shape[2] for picture in row) for row in rows]
    across = max(1, round(cell * len(columns) / LEGEND_CELL))
    lines = -(-len(legend) // across)
    extra = 0.7 + 0.2 * len(captions) + 0.19 * lines
    figure = Figure(figsize=(cell * len(columns), cell * sum(heights) + extra), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)  # type: ignore[union-attr, call-arg]
    axes = figure.subplots(len(rows), len(columns), squeeze=False, height_ratios=heights)
    for places, row in zip(axes, rows, strict=True):
        for place, picture in zip(places, row, strict=True):
            place.imshow(picture.permute(1, 2, 0).numpy())
            place.axis("off")
    for place, name in zip(axes[0], columns, strict=True):
        place.set_title(name, fontsize=10)
    for place, caption in zip(axes[:, -1], captions, strict=False):
        place.text(0.5, -0.02, caption, fontsize=9, ha="center", va="top", transform=place.transAxes, parse_math=False)
    if legend:
        _add_legend(figure, legend, across)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")


def _add_legend(figure: Figure, legend: Sequence[tuple[str, Colour]], across: int) -> None:
    marks = [
        Patch(facecolor=(tone[0] / 255, tone[1] / 255, tone[2] / 255), edgecolor="0.4", linewidth=0.5)
        for _, tone in legend
    ]
    lines = -(-len(legend) // across)
    shown = figure.legend(
        marks, [""] * len(marks), loc="outside lower center", ncols=-(-len(legend) // lines), fontsize=9, frameon=False,
        handlelength=1.2, handleheight=1.0, columnspacing=1.6,
    )  # fmt: skip
    for text, (name, _) in zip(shown.get_texts(), legend, strict=True):  # now, for a legend leaves out "_name"
        words = " ".join(name.split())
        text.set(text=words if len(words) <= LEGEND_LETTERS else f"{words[: LEGEND_LETTERS - 1]}…", parse_math=False)


def _fit(image: Tensor, objects: Objects, longest: int | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Enlarge a small image [h, w, 3] and its objects, reduce a large one."""
    height, width, _ = image.shape
    side, fitted = max(height, width), dict(objects)
    if longest is not None and side > longest:
        size = tuple(max(1, round(length * longest / side)) for length in (height, width))
        pixels = image.permute(2, 0, 1)[None].float()
        image = F.interpolate(pixels, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).round().byte()
        if "masks" in fitted and len(fitted["masks"]):
            fitted["masks"] = F.interpolate(fitted["masks"][None].byte(), size, mode="nearest-exact")[0]
    elif (factor := -(-READABLE // side)) > 1:
        image = image.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
        if "masks" in fitted:
            fitted["masks"] = fitted["masks"].repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    if "boxes" in fitted:
        scale = torch.tensor([image.shape[1] / width, image.shape[0] / height]).repeat(2)
        fitted["boxes"] = fitted["boxes"] * scale
    return image, fitted


def _large_first(objects: Objects) -> list[int]:
    """Return the order in which nothing is covered by something larger."""
    if "boxes" in objects:
        sides = objects["boxes"][:, 2:] - objects["boxes"][:, :2]
        areas = sides.prod(dim=1)
    else:
        areas = objects["masks"].flatten(1).sum(dim=1)
    return areas.argsort(descending=True, stable=True).tolist()


def _sure_first(objects: Objects) -> list[int]:
    scores = objects.get("scores")
    return list(range(len(objects["labels"]))) if scores is None else scores.argsort(descending=True).tolist()


def _paint(image: Tensor, masks: Tensor, colours: Sequence[Colour], order: Sequence[int], line: int) -> Tensor:
    """Blend masks, bool [n, h, w], into an image [h, w, 3], with outlines `line` pixels wide."""
    painted, reach = image.float(), 2 * line + 1
    for i in order:
        rows, columns = (masks[i].any(dim=d).nonzero().flatten().tolist() for d in (1, 0))
        if not rows:
            continue
        # All else is as it was: large images stay fast.
        window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        mask, tint = masks[i][window], torch.tensor(colours[i], dtype=torch.float32)
        outside = F.pad(1 - mask.float(), (line,) * 4, value=1.0)[None, None]
        near_edge = F.max_pool2d(F.max_pool2d(outside, (reach, 1), stride=1), (1, reach), stride=1)[0, 0].bool()
        strength = (OPACITY * mask + (1 - OPACITY) * (mask & near_edge))[..., None]
        painted[window] += strength * (tint - painted[window])
    return painted.round().byte()


def _texts(objects: Objects, names: Sequence[str]) -> Iterator[str]:
    scores = objects.get("scores")
    for i, label in enumerate(objects["labels"].tolist()):
        name = " ".join(names[label - 1].split())
        yield name if scores is None else f"{name} {float(scores[i]):.2f}"


def _write(
    pen: ImageDraw.ImageDraw, size: tuple[int, int], marked: Sequence[tuple[Rectangle, str, Colour]], font_size: int
) -> None:
    """Write texts at their boxes, within the picture, `size` (width, height), beside or under earlier ones."""
    font, margin = _font(font_size), font_size // 6
    texts = [_shorten(text, font, size[0] - 2 * margin) for _, text, _ in marked]
    places: list[Rectangle] = []
    for (box, _, _), text in zip(marked, texts, strict=True):
        width, height = round(font.getlength(text)) + 2 * margin, round(1.2 * font_size) + margin
        places.append(_place(box, (width, height), size, places))
    for place, text, (_, _, background) in reversed(list(zip(places, texts, marked, strict=True))):
        x0, y0, x1, y1 = place
        pen.rectangle((x0, y0, x1 - 1, y1 - 1), fill=background)
        pen.text((x0 + margin, (y0 + y1) / 2), text, _ink(background), font, anchor="lm")


def _place(box: Rectangle, text: tuple[int, int], size: tuple[int, int], taken: Sequence[Rectangle]) -> Rectangle:
    """Choose where a text, (width, height), stands: over the box, in its corners, or under it."""
    (x0, y0, x1, y1), (width, height), places = box, text, []
    for x, y in ((x0, y0 - height), (x0, y0), (x1 - width, y0 - height), (x1 - width, y0), (x0, y1), (x0, y1 - height)):
        left, top = max(0, min(round(x), size[0] - width)), max(0, min(round(y), size[1] - height))
        places.append((left, top, left + width, top + height))
    free = (place for place in places if not any(_overlap(place, other) for other in taken))
    return next(free, places[0])


def _overlap(one: Rectangle, other: Rectangle) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Cut a text to `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _ink(background: Colour) -> str:
    """Return what can be read on a colour."""
    red, green, blue = background
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else "white"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)
