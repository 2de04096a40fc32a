"""`mirl reconstruct`: what each pair of decoders makes of masked images. Paper: Figure 7.

Symbols: b images, c channels, h and w pixels, gh and gw rows and columns of patches, n = gh * gw, p values of a patch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from mirl.analysis.reconstructor import Reconstructor
from mirl.data.decode import BadImage, read_image
from mirl.data.order import ends_of
from mirl.data.packed import PackedStrings
from mirl.data.sources import LIST_SUFFIXES, ImageFiles, Source, open_source
from mirl.data.transforms import fixed_view
from mirl.errors import UserError
from mirl.methods import Term
from mirl.tasks.pretrain import split_off_held_out
from mirl.tasks.settings.reconstruction import ReconstructOptions
from mirl.training.drawing import save_figure
from mirl.training.files import check_writable
from mirl.training.reconstructions import Components, Reconstruction, parts_of, to_rgb
from mirl.training.runs import RunFolder, console, read_config

MOST = 16  # images in one picture
HELD_OUT = 6  # of the run's own images, where none are given
FORMATS = ("png", "pdf")
NAME = 26  # letters of a file's name that an image's width has room for
DOTS = 30_000  # most that a picture may be across or down; what draws it stops at twice as many


def reconstruct(run: str, images: list[str] | None = ReconstructOptions.images, **options: Any) -> Reconstruction:
    """Draw original, masked image, main component, residual and sum of each pair, and return them as tensors.

    Takes the fields of `mirl.ReconstructOptions`, e.g. `mirl.reconstruct("runs/a", ["me.jpg"], mask_ratio=0.5)`.

    Raises:
        UserError: if `run` holds no decoders, no image can be read, or the mask hides nothing or everything.

    Paper: Figure 7.
    """
    given = ReconstructOptions(run=run, images=images, **options)
    path = _out(given.run, given.out)
    check_writable(path)
    model = Reconstructor(given.run, image_size=given.image_size)
    if given.block is not None:
        hidden = [model.block_mask(given.block)] * MOST
    elif given.mask is not None:
        hidden = [model.drawn_mask(_read_mask(given.mask))] * MOST
    else:
        hidden = [model.random_mask(given.mask_ratio, given.seed + index) for index in range(MOST)]
    pixels, names = read_images(given.run, given.images, model)
    hidden = hidden[: len(names)]
    shown = model(torch.stack(pixels), torch.stack(hidden))
    share = float(hidden[0].float().mean())
    draw(shown, names, path, f"{model.name} · {model.method.name} · {share:.0%} of {hidden[0].numel()} patches masked")
    console.print(f"saved {path}", markup=False)
    return shown


def draw(shown: Reconstruction, names: Sequence[str], path: Path, title: str) -> None:
    """Draw one row for each image and pair, to a PNG or PDF by the suffix of `path`."""
    columns = titles_of(shown.terms[0])
    count, terms, (height, width) = len(names), len(shown.terms), shown.original.shape[-2:]
    side = 1.6
    across = side * (2 + len(columns)) + (0.4 if terms > 1 else 0.1)
    down = (max(side * height / width + 0.06, 0.16) * terms + 0.16) * count + 0.6  # a line of text is 0.16 high
    dots = min(max(100, min(250, round(width / side))), DOTS / max(across, down))
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03, wspace=0, hspace=0)
    figure = Figure(figsize=(across, down), dpi=dots, layout=layout)
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(count * terms, 2 + len(columns), squeeze=False)
    for place in axes.flat:
        place.set_xticks([])
        place.set_yticks([])
        place.set_frame_on(False)
    for place, column in zip(axes[0], ["original", "masked", *columns], strict=True):
        place.set_title(column, fontsize=8)
    for i, name in enumerate(names):
        for g, term in enumerate(shown.terms):
            row = axes[i * terms + g]
            given = [shown.original, shown.masked] if g == 0 else [None, None]
            for place, image in zip(row, [*given, *columns_of(term).values()], strict=True):
                if image is not None:
                    place.imshow(to_rgb(image[i]).numpy(), interpolation="nearest" if width < 100 else "antialiased")
            if terms > 1:
                row[2].set_ylabel(term.label, fontsize=7, rotation="horizontal", ha="right", va="center")
        # Below the image: beside it a name would need more room than a wide image has.
        axes[i * terms, 0].set_xlabel(_shortened(name), fontsize=6.5, loc="left", labelpad=2, parse_math=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --out") from error


def titles_of(term: Term | Components) -> list[str]:
    """Return the titles of what is shown of a term."""
    parts = term.parts if isinstance(term, Components) else parts_of(term)
    return [*([*parts, "sum"] if len(term.decoders) == 2 else ["reconstruction"]), "with the visible patches"]


def columns_of(term: Components) -> dict[str, Tensor]:
    """Return the images [b, c, h, w] that are shown of a term by their titles."""
    images = (term.main, term.residual, term.total, term.pasted)
    return dict(zip(titles_of(term), (image for image in images if image is not None), strict=True))


def _shortened(name: str) -> str:
    return name if len(name) <= NAME else f"{name[: NAME // 2 - 1]}…{name[-NAME // 2 :]}"


def read_images(run: str, images: Sequence[str] | None, model: Reconstructor) -> tuple[list[Tensor], list[str]]:
    """Return uint8 images [c, h, w] of the model's size, and their names; those that cannot be read are said.

    Args:
        images: files and folders; None for some that the run held out.

    Raises:
        UserError: if there are none, or none can be read.
    """
    chosen = _held_out(run, model.channels) if images is None else _chosen(images, model.channels)
    shown = [chosen[i] for i in np.unique(np.linspace(0, len(chosen) - 1, MOST).astype(int))]
    if len(shown) < len(chosen):
        console.print(f"showing {len(shown)} of {len(chosen)} images: a picture has at most {MOST}")
    pixels, names, bad = [], [], []
    for source, index in shown:
        name = source.name_of(index)
        try:
            pixels.append(fixed_view(source.read(index), model.image_size))
            names.append(Path(name).name)
        except BadImage as error:
            bad.append(f"{name} {error.reason}")
            console.print(f"left out {name}: {error.reason}", markup=False)
    if not names:
        raise UserError(f"none of the images can be read, e.g. {bad[0]}; give others by --images")
    return pixels, names


def _chosen(images: Sequence[str], channels: int) -> list[tuple[Source, int]]:
    found: list[tuple[Source, int]] = []
    if not images:
        raise UserError("--images names none; give image files or folders")
    for given in images:
        path = Path(given).expanduser()
        one = path.is_file() and path.suffix.lower() not in LIST_SUFFIXES
        source = ImageFiles("", PackedStrings([str(path)]), channels) if one else open_source(given, channels=channels)
        found += [(source, index) for index in range(len(source))]
    return found


def _held_out(run: str, channels: int) -> list[tuple[Source, int]]:
    """Choose among the images that the run held out."""
    folder = Path(run).expanduser()
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{run} is no run folder with images of its own; give --images, files or folders")
    try:
        source = open_source(read_config(folder)["data"], channels=channels)
        _, held_out = split_off_held_out(len(source), ends_of(source))
    except UserError as error:
        reason = str(error).partition("; ")[0]  # the remedy there is another --data
        raise UserError(f"the images of {run} are not to be had: {reason}; give others by --images") from error
    rows = RunFolder(folder, resume=False, overwrite=False, writes=False).rows()
    began = next((row["samples"] for row in rows if row["kind"] == "data"), len(source))
    if began != len(source):
        console.print(
            f"warning: the run began with {began} images and there are {len(source)} now: some of those shown may have "
            "been trained on"
        )
    return [(source, int(held_out[i])) for i in np.unique(np.linspace(0, len(held_out) - 1, HELD_OUT).astype(int))]


def _read_mask(path: str) -> Tensor:
    """Return bool [h, w], True where the picture is white."""
    try:
        return read_image(Path(path).expanduser(), channels=1)[0] > 127
    except BadImage as error:
        raise UserError(f"--mask {path} {error.reason}; give a picture in which white is masked") from error


def _out(run: str, out: str | None) -> Path:
    """Return --out, or a file in the run folder, or one here.

    Raises:
        UserError: if it is to be neither PNG nor PDF.
    """
    folder = Path(run).expanduser()
    name = folder.resolve().name if folder.is_dir() else folder.stem  # of ".", too
    default = (folder if (folder / "config.yaml").is_file() else Path()) / "reconstructions" / f"{name}.png"
    path = Path(out) if out else default
    if path.suffix[1:].lower() not in FORMATS:
        raise UserError(f"--out {path} is neither .png nor .pdf; give one of them")
    return path
