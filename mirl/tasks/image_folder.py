"""A folder of images of any size, read one by one, and pictures written under their names."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from mirl.data.loading import Batch, Views
from mirl.data.sources import ImageFiles, Source
from mirl.errors import UserError
from mirl.tasks.features import batches
from mirl.training.files import writing

BEGINNING = 100  # letters of a file within which it says who made it


def readable(source: Source, workers: int | None, bad: list[tuple[str, str]], title: str) -> Iterator[Batch]:
    """Read images one by one, since their sizes differ, with a progress bar.

    Args:
        bad: takes (name, reason) of files that cannot be read; title: of the progress bar.
    """
    dataset = Views(source, np.arange(len(source)), _as_it_is)
    for batch in batches(dataset, 1, workers, title):
        bad += batch.bad
        if len(batch):
            yield batch


def relative_names(source: Source) -> list[str]:
    """Return each image's path relative to the folder that was given, or to the one that all have in common."""
    paths = [os.path.abspath(source.name_of(index)) for index in range(len(source))]
    given = [os.path.abspath(source.root)] if isinstance(source, ImageFiles) and source.root else []
    common = os.path.commonpath([*given, *{os.path.dirname(path) for path in paths}])
    return [Path(os.path.relpath(path, common)).as_posix() for path in paths]


def unused(name: str, used: set[str]) -> str:
    """Name a picture after an image; `a.jpg` and `a.webp` in one folder become a.png and a-2.png."""
    stem = os.path.splitext(name)[0]
    number, chosen = 1, stem
    while chosen in used:
        number += 1
        chosen = f"{stem}-{number}"
    used.add(chosen)
    return f"{chosen}.png"


@contextmanager
def replacing(folder: Path, names: Sequence[str], maker: str) -> Iterator[Path]:
    """Yield a folder for what a call writes; when the block ends well, that takes the place of what an earlier one did.

    Args:
        names: of what is written: folders, and last a JSON file that begins with its `maker`.

    Raises:
        UserError: if `folder` has any of these from somebody else, or cannot be written.
    """
    fresh = folder / ".unfinished"
    with writing(folder):
        if (found := [name for name in names if (folder / name).exists()]) and not _made_by(maker, folder / names[-1]):
            raise UserError(f"{folder} has {found[0]} that {maker} did not write; choose another --out")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        try:
            yield fresh
            for name in names:
                shutil.rmtree(folder / name, ignore_errors=True)  # a file is replaced
                os.replace(fresh / name, folder / name)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def save_picture(picture: Tensor, path: Path) -> None:
    """Write a picture, uint8 [3, h, w], as a PNG; its folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path, format="PNG")


def _as_it_is(image: Tensor) -> Tensor:
    return image


def _made_by(maker: str, path: Path) -> bool:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return json.dumps(maker) in file.read(BEGINNING)
    except OSError:
        return False
