"""Images with classes: class folders, split in two, or the built-in shapes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mirl.data.opening import TEST, TRAIN, shapes_in, split_shapes
from mirl.data.shapes import Shapes
from mirl.data.sources import ImageFiles, Source, open_source
from mirl.errors import UserError


@dataclass(frozen=True)
class LabelledSource:
    """Images and the classes they belong to.

    Attributes:
        labels: int64 [n], indices into `classes`, one for each image of `source`.
        classes: names, in order.
        members: indices into `source` of the images that belong to this split.
    """

    source: Source
    labels: np.ndarray
    classes: tuple[str, ...]
    members: np.ndarray

    def __len__(self) -> int:
        return len(self.members)


def open_split(
    data: str, *, channels: int = 3, val_fraction: float | None = None, seed: int = 0
) -> tuple[LabelledSource, LabelledSource]:
    """Open what `--data` names as a training split and a test split of the same classes.

    Args:
        data: a folder with `train/` or `training/` and one of `val/`, `valid/`, `validation/`, `test/`, each of class
            folders; a folder of class folders, with `val_fraction`; or `shapes[:COUNT[:PIXELS]]`, whose test split is
            a quarter as large.
        channels: channels of every image.
        val_fraction: share of each class's images, at least one, that is kept for testing; drawn with `seed`.

    Raises:
        UserError: if there is nothing like that, the splits' classes differ, or there is a single class.
    """
    if shapes := split_shapes(data, channels, val_fraction):
        return _shapes(shapes[0]), _shapes(shapes[1])
    root = Path(data).expanduser()
    if not root.is_dir():
        open_source(data, channels=channels)  # says what is missing, and what there is instead
        raise UserError(f"{data!r} has no classes; give a folder of class folders, or shapes")
    first, second = _subfolder(root, TRAIN), _subfolder(root, TEST)
    if first and second:
        if val_fraction is not None:
            raise UserError(f"{data!r} has {first.name}/ and {second.name}/ already; leave out --val_fraction")
        train_split, test_split = (open_labelled(str(folder), channels=channels) for folder in (first, second))
        _check_same_classes(train_split, test_split, first, second)
    elif val_fraction is not None:
        train_split, test_split = divide(open_labelled(data, channels=channels), val_fraction, seed)
    else:
        raise UserError(
            f"{data!r} has no train/ with val/ or test/; make them, or split its class folders with --val_fraction 0.2"
        )
    if len(train_split.classes) == 1:  # such as `train` where there is no val/
        raise UserError(
            f"{data!r} has a single class, {train_split.classes[0]!r}; give a folder of two class folders or more"
        )
    return train_split, test_split


def open_labelled(data: str, *, channels: int = 3) -> LabelledSource:
    """Open one split: a folder of class folders, or `shapes`.

    Raises:
        UserError: if images lie outside class folders, or a class folder has none.
    """
    source = open_source(data, channels=channels)
    if isinstance(source, Shapes):
        return _shapes(source)
    if not (isinstance(source, ImageFiles) and Path(data).expanduser().is_dir()):
        raise UserError(f"{data!r} has no classes; give a folder of class folders, or shapes")
    names = [source.paths[index].partition("/") for index in range(len(source))]
    loose = next((name for name, slash, _ in names if not slash), None)
    if loose is not None:
        raise UserError(f"{data!r} has images outside class folders, e.g. {loose}; put each into its class's folder")
    classes = sorted({name for name, _, _ in names})
    folders = {entry.name for entry in os.scandir(source.root) if entry.is_dir() and not entry.name.startswith(".")}
    if empty := sorted(folders - set(classes) - {"__MACOSX"}):
        raise UserError(f"class folder {empty[0]!r} in {data!r} has no images; remove it or fill it")
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[name] for name, _, _ in names], dtype=np.int64)
    return LabelledSource(source, labels, tuple(classes), np.arange(len(source)))


def open_test(data: str, *, channels: int = 3) -> LabelledSource:
    """Open the images to judge a classifier on: `val/`, `test/` ... of a folder that has one, else its class folders.

    Raises:
        UserError: as `open_labelled`.
    """
    if shapes := shapes_in(data, channels, "val"):
        return _shapes(shapes)
    folder = _subfolder(Path(data).expanduser(), TEST)
    return open_labelled(str(folder or data), channels=channels)


def divide(whole: LabelledSource, fraction: float, seed: int) -> tuple[LabelledSource, LabelledSource]:
    """Split off `fraction` of each class's images, at least one, for testing.

    Raises:
        UserError: if a class has a single image.
    """
    generator = np.random.default_rng(seed)
    kept, tested = [], []
    for label, name in enumerate(whole.classes):
        members = generator.permutation(whole.members[whole.labels[whole.members] == label])
        if len(members) < 2:
            raise UserError(f"class {name!r} has {len(members)} image; a split needs two or more")
        count = min(len(members) - 1, max(1, round(fraction * len(members))))
        tested.append(members[:count])
        kept.append(members[count:])
    return tuple(  # type: ignore[return-value]
        LabelledSource(whole.source, whole.labels, whole.classes, np.sort(np.concatenate(part)))
        for part in (kept, tested)
    )


def is_one_folder(data: str) -> bool:
    """Tell whether `data` is a folder that is not split in two."""
    root = Path(data).expanduser()
    return root.is_dir() and not (_subfolder(root, TRAIN) and _subfolder(root, TEST))


def check_known(data: str, classes: Sequence[str], known: Sequence[str]) -> None:
    """Raise UserError if a class is not among those that a model knows."""
    if unknown := sorted(set(classes) - set(known)):
        raise UserError(
            f"{data!r} has classes that the model does not know, e.g. {unknown[0]!r}; it knows {len(known)}: "
            f"{', '.join(known[:5])}{' ...' if len(known) > 5 else ''}"
        )


def _shapes(source: Shapes) -> LabelledSource:
    members = np.arange(len(source))
    labels = np.array([source.label_of(int(index)) for index in members], dtype=np.int64)
    return LabelledSource(source, labels, source.classes, members)


def _subfolder(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _check_same_classes(one: LabelledSource, other: LabelledSource, first: Path, second: Path) -> None:
    for here, there, place in ((one, other, second), (other, one, first)):
        if missing := sorted(set(here.classes) - set(there.classes)):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(
                f"class {missing[0]!r}{more} has no folder in {place}; both splits need the same class folders"
            )
