"""Predictions as images: main component, residual and sum of each pair. Paper: Eq. (6) and Figure 7.

Symbols: b images, c channels, h and w pixels, n patches, v visible and m masked ones, p values of a patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mirl.data.transforms import channel_statistics
from mirl.methods import Target, Term
from mirl.models.patches import Size, unpatchify
from mirl.objectives.pixels import to_pixels
from mirl.training.files import atomic

GREY = 0.5  # what a residual of nothing, and a masked patch, look like
CELL = 160  # most pixels of a cell of an atlas: the report shows no more, and a WebP has at most 16,383 a side
EXACT = 64  # pixels up to which a cell is kept exactly; WebP otherwise halves the resolution of colours


@dataclass(frozen=True)
class Components:
    """What the decoders of one term predict together, as images [b, c, h, w] in about 0..1.

    Attributes:
        decoders: their numbers, that of the main component or of the coarse part first.
        parts: what these two are called.
        main, residual: the first one's image, and the other's around grey; None where a single decoder predicts.
        total: the sum, of all patches. Visible ones are no part of the loss, so their prediction may be poor.
        pasted: the sum with the visible patches of the image itself.
    """

    decoders: tuple[int, ...]
    main: Tensor | None
    residual: Tensor | None
    total: Tensor
    pasted: Tensor
    parts: tuple[str, str] = ("main component", "residual")

    @property
    def label(self) -> str:
        """What these decoders are called together."""
        return label(self.decoders)


def label(decoders: Sequence[int]) -> str:
    """Name decoders that predict together by the shallow one, which numbers their pair."""
    return f"{'pair' if len(decoders) > 1 else 'decoder'} {min(decoders)}"


def parts_of(term: Term) -> tuple[str, str]:
    """Name what the two decoders of a term predict."""
    return ("coarse part", "fine part") if term.target == "coarse" else ("main component", "residual")


@dataclass(frozen=True)
class Reconstruction:
    """Images [b, c, h, w] in 0..1, what the encoder saw of them, and what each term of the loss makes of that.

    Attributes:
        masked: the image, its masked patches grey; hidden: bool [b, 1, h, w], True where masked.
        terms: shallow to deep, as in the method.
    """

    original: Tensor
    masked: Tensor
    hidden: Tensor
    terms: tuple[Components, ...]


@dataclass(frozen=True)
class Panel:
    """A column of a picture: its title and images [b, c, h, w] in 0..1 (values outside are clipped when drawn)."""

    title: str
    images: Tensor


def compose(
    patches: Tensor, visible: Tensor, masked: Tensor, predictions: Sequence[Tensor], terms: Sequence[Term],
    *, target: Target, image_size: Size, patch_size: Size, channels: int,
) -> Reconstruction:  # fmt: skip
    """Turn predictions into images.

    Normalised predictions get each patch's true mean and deviation back; a residual has no mean and lies around grey.

    Args:
        patches: [b, n, p], normalised as the model saw them; visible: [b, v]; masked: [b, m].
        predictions: one [b, n, p] per decoder, in the order of `visible`, then `masked` (the model's `all_patches`).
        terms: the method's `reconstructions`.
    """
    mean, deviation = (patches.new_tensor(s).view(-1, 1, 1) for s in channel_statistics(channels))
    order = torch.cat([visible, masked], dim=1).argsort(dim=1)

    def image(values: Tensor) -> Tensor:
        return unpatchify(values, image_size, patch_size) * deviation

    def predicted(decoders: Sequence[int]) -> Tensor:
        whole = torch.stack([predictions[decoder - 1].float() for decoder in decoders]).sum(0)
        whole = whole.gather(1, order[..., None].expand_as(whole))
        return image(to_pixels(whole, patches, target)) + mean

    original = image(patches) + mean
    flags = torch.zeros_like(patches[..., 0], dtype=torch.bool).scatter_(1, masked, True)
    hidden = unpatchify(flags[..., None].expand_as(patches), image_size, patch_size)[:, :1]
    found = []
    for term in terms:
        total = predicted(term.decoders)
        main = predicted(term.decoders[:1]) if len(term.decoders) == 2 else None
        residual = total - main + GREY if main is not None else None
        pasted = torch.where(hidden, total, original)
        found.append(Components(term.decoders, main, residual, total, pasted, parts_of(term)))
    return Reconstruction(original, original.where(~hidden, GREY), hidden, tuple(found))


def panels(shown: Reconstruction) -> list[Panel]:
    """List the columns of a picture: of what the loss asks for, the masked patches; elsewhere the image itself."""
    result = [Panel("original", shown.original), Panel("masked", shown.masked)]
    for term in shown.terms:
        prefix = f"{term.label}: " if len(shown.terms) > 1 else ""
        if term.main is not None and term.residual is not None:
            main, residual = (part.partition(" ")[0] for part in term.parts)
            result.append(Panel(f"{prefix}{main}", torch.where(shown.hidden, term.main, shown.original)))
            result.append(Panel(f"{prefix}{residual}", term.residual.where(shown.hidden, GREY)))
        result.append(Panel(f"{prefix}{'sum' if term.main is not None else 'reconstruction'}", term.pasted))
    return result


def to_rgb(images: Tensor) -> Tensor:
    """Return what can be shown of images [..., c, h, w] in 0..1: uint8 [..., h, w, 3], their first channels or grey."""
    colours = images[..., :3, :, :] if images.shape[-3] >= 3 else images[..., :1, :, :]
    shown = (colours.clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1)
    return shown.expand(*shown.shape[:-1], 3).cpu()


def write_atlas(columns: Sequence[Panel], path: Path) -> Size:
    """Write all panels as one WebP without margins: a row of cells for each image, a column for each panel.

    Returns:
        Height and width of a cell: those of the images, or less where they are large.
    """
    images = torch.stack([panel.images.float() for panel in columns], dim=1).clamp(0, 1)  # [b, panels, c, h, w]
    height, width = images.shape[-2:]
    if (longest := max(height, width)) > CELL:
        height, width = (max(1, round(side * CELL / longest)) for side in (height, width))
        small = F.interpolate(images.flatten(0, 1), size=(height, width), mode="bilinear", antialias=True)
        images = small.unflatten(0, images.shape[:2])
    pixels = to_rgb(images).permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)
    path.parent.mkdir(exist_ok=True)
    with atomic(path) as temporary:
        exact = max(height, width) <= EXACT
        Image.fromarray(pixels.numpy()).save(temporary, format="WEBP", quality=90, lossless=exact)
    return height, width
