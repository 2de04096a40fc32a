"""A COCO annotation file as arrays, without what is wrong in it.

A file that is not of COCO's form, or has a malformed category, is the user's mistake. A mistake in one image or
annotation is not: it is skipped, counted by its kind, and named. To have no id is one too, because evaluation tells
annotations apart by it. Numbers stay in arrays and masks in one block of bytes, because all of COCO travels to each
data worker. Symbols: n images, m annotations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mirl.data.coco_json import NO_INTEGER, Table, parse, without_collection
from mirl.data.coco_layout import endings, image_folder
from mirl.data.instances import Category
from mirl.data.packed import PackedStrings
from mirl.data.run_lengths import Malformed, area, compress
from mirl.data.sources import ImageFiles, open_source
from mirl.errors import UserError, plural, printable

EXAMPLES = 3
TRIED = 20  # images by which their folder is found
SKIPPED, UNKNOWN = -1, -2  # in place of an index

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images whose files are there.

    Attributes:
        ids: int64 [n].
        sizes: int64 [n, 2], height and width.
        files: their paths.
    """

    ids: Integers
    sizes: Integers
    files: ImageFiles


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """Annotations in the order of their images.

    Attributes:
        first: int64 [n + 1]; those of image i are `first[i]` up to `first[i + 1]`.
        ids: int64 [m].
        labels: int64 [m], from 1 on.
        boxes: float64 [m, 4], x, y, width and height as they are in the file.
        areas: float64 [m].
        crowd: bool [m].
        usable: bool [m]; neither a crowd, nor a box or a mask without a pixel.
        masks: compressed run lengths.
    """

    first: Integers
    ids: Integers
    labels: Integers
    boxes: Floats
    areas: Floats
    crowd: Bools
    usable: Bools
    masks: PackedStrings


@dataclass(frozen=True, kw_only=True)
class CocoFile:
    """What an annotation file says; `categories` in the order of labels, `notes` a line for each kind of mistake."""

    path: Path
    categories: tuple[Category, ...]
    images: Images
    annotations: Annotations
    notes: tuple[str, ...]


def read_annotations(path: Path, root: Path, channels: int) -> CocoFile:
    """Read the annotation file `path` of the data set in `root`.

    Raises:
        UserError: if it is not of COCO's form, or no image or no annotation is left to learn from.
    """
    notes = _Notes()
    with without_collection():
        content = parse(path)
        categories = _categories(Table(path, content, "categories"))
        images, rows = _images(Table(path, content, "images"), root, channels, notes)
        annotations = _annotations(Table(path, content, "annotations"), categories, images, rows, notes)
    if not annotations.usable.any():
        found = f" ({'; '.join(notes.lines)})" if notes.lines else ""
        raise UserError(f"{str(path)!r} has no usable annotation{found}; give some with a box and a segmentation")
    return CocoFile(path=path, categories=categories, images=images, annotations=annotations, notes=tuple(notes.lines))


def corners(boxes: Floats, sizes: Integers) -> NDArray[np.float32]:
    """Return boxes [k, 4] of x, y, width, height as float32 x0, y0, x1, y1, cut to images of `sizes` [k, 2]."""
    with np.errstate(over="ignore"):
        far = boxes[:, :2] + boxes[:, 2:]
    limits = sizes[:, ::-1]
    return np.concatenate([boxes[:, :2].clip(0, limits), far.clip(0, limits)], axis=1).astype(np.float32)


class _Notes:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, wrong: Integers, what: str, why: str, name: Callable[[int], str]) -> None:
        """Note that the things with the numbers `wrong` are skipped."""
        if len(wrong):
            examples = ", ".join(printable(name(index)) for index in wrong[:EXAMPLES].tolist())
            self.lines.append(f"{plural(len(wrong), what)} skipped: {why}, e.g. {examples}")


def _categories(table: Table) -> tuple[Category, ...]:
    names: dict[int, str] = {}
    rows = list(zip(table.integers("id").tolist(), table.texts("name"), strict=True))
    for why, wrong in table.faults.items():
        if wrong.any():
            raise UserError(
                f"{str(table.file)!r}: categories[{wrong.argmax()}] is malformed: {why}; give each category a whole "
                "number as its id and a text as its name"
            )
    for number, name in rows:
        if names.setdefault(number, name) != name:
            raise UserError(
                f"{str(table.file)!r}: category {number} is {names[number]!r} and {name!r}; give each an id of its own"
            )
    if not names:
        raise UserError(f"{str(table.file)!r} has nothing in 'categories'; add those that the annotations refer to")
    return tuple(Category(number, names[number]) for number in sorted(names))


def _images(table: Table, root: Path, channels: int, notes: _Notes) -> tuple[Images, dict[int, int]]:
    """Return the images that can be used, and the index of each id, SKIPPED for those of the others."""
    names, ids = table.texts("file_name"), table.integers("id")
    sizes = np.stack([table.integers("height"), table.integers("width")], axis=1)
    if not any(names):
        raise UserError(f"{str(table.file)!r} names no file in 'images'; add those that the annotations refer to")
    folder = image_folder(table.file, root, [name for name in names if name][:TRIED])
    there = open_source(folder, channels=channels)
    assert isinstance(there, ImageFiles)
    available = {there.paths[index] for index in range(len(there))}
    paths = [next((path for path in endings(name) if path in available), "") for name in names]

    def without(wrong: Bools, why: str) -> Integers:
        notes.add(left[wrong], "image", why, lambda index: names[index] or f"images[{index}]")
        return left[~wrong]

    left = np.arange(len(ids))
    for why, wrong in table.faults.items():
        left = without(wrong[left], why)
    left = without(_repeated(ids[left]), "an id that an image before has")
    left = without(~_possible(sizes[left]), "no image is that high and wide")
    left = without(np.array([not paths[index] for index in left], dtype=bool), f"no such image in {str(folder)!r}")
    files = ImageFiles(str(folder), PackedStrings(paths[index] for index in left), channels)
    index_of = dict.fromkeys(ids.tolist(), SKIPPED) | dict(zip(ids[left].tolist(), range(len(left)), strict=True))
    return Images(ids=ids[left], sizes=sizes[left], files=files), index_of


def _annotations(
    table: Table, categories: tuple[Category, ...], images: Images, image_of: dict[int, int], notes: _Notes
) -> Annotations:
    ids, boxes, areas = table.integers("id"), table.boxes("bbox"), table.numbers("area")
    crowd = table.flags("iscrowd")
    label_of = {category.id: label for label, category in enumerate(categories, 1)}
    labels = _indices(label_of, table.integers("category_id"))
    image = _indices(image_of, table.integers("image_id"))

    def name(index: int) -> str:
        which = f"annotations[{index}]" if ids[index] == NO_INTEGER else f"annotation {ids[index]}"
        return which + (f" of {images.files.paths[image[index]]}" if image[index] >= 0 else "")

    def without(wrong: Bools, why: str) -> Integers:
        notes.add(left[wrong], "annotation", why, name)
        return left[~wrong]

    left = np.arange(len(ids))
    for why, wrong in table.faults.items():
        left = without(wrong[left], why)
    left = without(image[left] == UNKNOWN, "image_id of no image")
    left = left[image[left] != SKIPPED]  # noted with their images
    left = without(labels[left] == UNKNOWN, "category_id of no category")
    left = without(_repeated(ids[left]), "an id that an annotation before has")
    left = without(~_positive(boxes[left], areas[left]), "box or area not positive and finite")
    left = without(_outside(boxes[left], images.sizes[image[left]]), "box outside the image")
    same = _repeated(image[left], labels[left], crowd[left], *boxes[left].T)
    left = without(same, "image, category and box of an annotation before")

    left = left[np.argsort(image[left], kind="stable")]
    segmentations = table.anything("segmentation")
    masks, empty, faults = _compressed([segmentations[index] for index in left], images.sizes[image[left]])
    for fault in np.unique(faults[faults != ""]):
        without(faults == fault, fault)
    left = left[faults == ""]
    for place in np.flatnonzero(np.isnan(areas[left])).tolist():
        areas[left[place]] = area(masks[place], *images.sizes[image[left[place]]].tolist())
    return Annotations(
        first=np.searchsorted(image[left], np.arange(len(images.ids) + 1)),
        ids=ids[left],
        labels=labels[left],
        boxes=boxes[left],
        areas=areas[left],
        crowd=crowd[left],
        usable=~crowd[left] & ~empty,
        masks=masks,
    )


def _indices(index_of: dict[int, int], ids: Integers) -> Integers:
    """Return the indices of `ids`, UNKNOWN for those that are not there."""
    return np.array([index_of.get(number, UNKNOWN) for number in ids.tolist()], dtype=np.int64)


def _compressed(segmentations: list[Any], sizes: Integers) -> tuple[PackedStrings, Bools, NDArray[np.str_]]:
    """Return the good masks, which of them have no pixel, and for every segmentation what is wrong or ""."""
    masks, empty, faults = PackedStrings(), [], []
    for segmentation, (height, width) in zip(segmentations, sizes.tolist(), strict=True):
        try:
            counts, without_pixel = compress(segmentation, height, width)
        except Malformed as fault:
            faults.append(str(fault))
            continue
        masks.append(counts)
        empty.append(without_pixel)
        faults.append("")
    return masks, np.array(empty, dtype=bool), np.array(faults, dtype=np.str_)


def _positive(boxes: Floats, areas: Floats) -> Bools:
    """Tell where boxes [k, 4] and areas [k], NaN where the file has none, are sizes."""
    return np.isfinite(boxes).all(1) & (boxes[:, 2:] > 0).all(1) & ~(areas <= 0) & ~np.isinf(areas)


def _outside(boxes: Floats, sizes: Integers) -> Bools:
    inside = corners(boxes, sizes)
    return np.any(inside[:, :2] >= inside[:, 2:], axis=1)


def _repeated(*columns: NDArray[Any]) -> Bools:
    """Tell which rows have, in all columns [k], the values of a row before them."""
    order = np.lexsort(columns)
    same = np.logical_and.reduce([column[order[1:]] == column[order[:-1]] for column in columns])
    repeated = np.zeros(len(order), dtype=bool)
    repeated[order[1:][same]] = True
    return repeated


def _possible(sizes: Integers) -> Bools:
    """Tell heights and widths [k, 2] of images that can be read."""
    most = Image.MAX_IMAGE_PIXELS or 2**27
    return (sizes >= 1).all(1) & (sizes.clip(1, most).prod(1) <= most)  # clipped, so that products fit 64 bits
