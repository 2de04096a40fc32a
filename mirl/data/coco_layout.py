"""Where a folder keeps COCO annotations and the images they are about.

| layout         | annotations                              | images                               |
| -------------- | ---------------------------------------- | ------------------------------------ |
| COCO           | `annotations/instances_train2017.json`   | `train2017/` or `images/train2017/`  |
| plain          | `annotations/train.json`                 | `images/train/`, `train/`, `images/` |
| Roboflow       | `train/_annotations.coco.json`           | `train/`                             |
| one file       | `annotations/NAME.json` or `NAME.json`   | `images/` or the folder itself       |

A split is told by the word train, training, val, valid, validation or test in the file's name, else in its folder's.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mirl.data.opening import TEST, TRAIN
from mirl.errors import UserError

WHOLE = "whole"  # the split of a file whose name tells none
OTHER_ANNOTATIONS = ("captions_", "person_keypoints_", "panoptic_", "stuff_", "image_info_")
SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(TRAIN + TEST)})(?![a-z])\d*", re.IGNORECASE)
LOOKED_FOR = "annotations/*train*.json, train/_annotations.coco.json and *.json"


def annotation_files(root: Path) -> dict[str, Path]:
    """Return the annotation file of each split that `root` has: train, val, valid, validation, test or whole.

    Raises:
        UserError: if there is none, or a split has several.
    """
    places = [_json_files(root / "annotations")]
    places.append([file for split in TRAIN + TEST for file in _json_files(root / split)])
    places.append(_json_files(root))
    files = next((found for found in places if found), [])
    if not files:
        raise UserError(f"{str(root)!r} has no COCO annotations; looked for {LOOKED_FOR}")
    splits: dict[str, Path] = {}
    for file in files:
        split = _split_of(file, root)
        if split in splits:
            what = "no split's name" if split == WHOLE else f"{split!r}"
            raise UserError(
                f"{str(splits[split])!r} and {str(file)!r} both have {what} in their names; keep one annotation file "
                "for each of train and val, or a single one"
            )
        splits[split] = file
    return splits


def held_out_file(splits: dict[str, Path]) -> Path | None:
    """Return the annotation file to judge on: the validation split's, else the test split's."""
    return next((splits[split] for split in TEST if split in splits), None)


def image_folder(file: Path, root: Path, names: Sequence[str]) -> Path:
    """Return the folder that holds the images of an annotation file.

    Args:
        names: file names of some images.

    Raises:
        UserError: if none of them is anywhere.
    """
    folders = list(dict.fromkeys(folder for folder in _image_folders(file, root) if folder.is_dir()))
    found = [sum(_is_file(folder, name) for name in names) for folder in folders]
    if max(found) == 0:
        looked = ", ".join(f"{folder.relative_to(root).as_posix()}/" for folder in folders)
        raise UserError(
            f"the images of {str(file)!r}, such as {names[0]!r}, are not in {str(root)!r}; looked in {looked}; "
            "put them into a folder that is called as the split, beside annotations/"
        )
    return folders[found.index(max(found))]


def endings(name: str) -> Iterator[str]:
    """Yield a relative path and what is left of it without its first folders: annotations may start anywhere."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    for first in range(len(parts)):
        yield "/".join(parts[first:])


def _json_files(folder: Path) -> list[Path]:
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    except OSError:
        return []
    return [
        folder / name
        for name in names
        if name.lower().endswith(".json") and not name.startswith((".", *OTHER_ANNOTATIONS))
    ]


def _split_of(file: Path, root: Path) -> str:
    inside = file.relative_to(root)
    words = SPLIT_WORD.findall(inside.stem) or SPLIT_WORD.findall(inside.parent.name)
    word = words[0].lower() if words else WHOLE
    return "train" if word in TRAIN else word


def _image_folders(file: Path, root: Path) -> Iterator[Path]:
    split = _split_of(file, root)
    if file.parent not in (root, root / "annotations"):
        yield from (file.parent, file.parent / "images")
    word = SPLIT_WORD.search(file.stem)
    exact = [word[0]] if word else []  # with the year
    synonyms = next((names for names in (TRAIN, TEST) if split in names), ())
    for name in (*exact, *([split] if synonyms else []), *synonyms):
        yield from (root / name, root / "images" / name)
    yield from (root / "images", root)


def _is_file(folder: Path, name: str) -> bool:
    try:
        return any((folder / ending).is_file() for ending in endings(name))
    except (OSError, ValueError):  # a name that no file can have
        return False
