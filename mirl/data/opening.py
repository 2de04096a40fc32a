"""What `--data` names where images have labels: the built-in shapes, or a folder and the names of its splits."""

from pathlib import Path

from mirl.data.shapes import CLASSES, Shapes
from mirl.data.sources import not_there, open_source
from mirl.errors import UserError

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}
TRAIN, TEST = SPLITS["train"], SPLITS["val"] + SPLITS["test"]  # to train on; to judge on, the first that is there


def shapes_in(data: str, channels: int, split: str = "train") -> Shapes | None:
    """Return the built-in shapes, as many in either split, or None if `data` names others.

    Raises:
        UserError: if their count, size or channels are not allowed.
    """
    if data.partition(":")[0] != "shapes":
        return None
    shapes = open_source(data, channels=channels)
    assert isinstance(shapes, Shapes)
    return shapes if split == shapes.split else Shapes(shapes.count, size=shapes.size, split=split)


def split_shapes(data: str, channels: int, val_fraction: float | None) -> tuple[Shapes, Shapes] | None:
    """Return the built-in shapes and held-out ones, a quarter as many, or None if `data` names others.

    Raises:
        UserError: as `shapes_in`; or if a `val_fraction` is given.
    """
    train = shapes_in(data, channels)
    if train is None:
        return None
    if val_fraction is not None:
        raise UserError("shapes have a held-out split already; leave out --val_fraction")
    return train, Shapes(max(len(CLASSES), train.count // 4), size=train.size, split="val")  # every class at least once


def folder_in(data: str, holds: str) -> Path:
    """Return the folder that `data` names, which should hold e.g. "images/ and labels/".

    Raises:
        UserError: if it is a file or not there.
    """
    root = Path(data).expanduser()
    if root.is_file():
        raise UserError(f"{data!r} is a file; give the folder that holds {holds}")
    if not root.is_dir():
        raise UserError(not_there(data, f"a folder with {holds}, or shapes", ("shapes",)))
    return root
