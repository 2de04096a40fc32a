"""Where a folder keeps images and label files, and its splits.

| layout  | images                                | labels                        | classes             |
| ------- | ------------------------------------- | ----------------------------- | ------------------- |
| ADE20K  | `images/training/` and `validation/`  | `annotations/training/` ...   | `objectInfo150.txt` |
| pairs   | `images/train/`, `val/` and `test/`   | `labels/train/` ...           | `classes.json`      |
| splits  | `train/images/` ...                   | `train/labels/` ...           | `classes.json`      |
| whole   | `images/`                             | `labels/`                     | `classes.json`      |

`labels` may be called `masks`, `semantic` or `annotations` too, and splits as in `mirl.data.opening`.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from mirl.data.opening import SPLITS
from mirl.data.semantic import SemanticSplit
from mirl.data.semantic_classes import Vocabulary, read_vocabulary
from mirl.data.semantic_files import SUFFIX, Pairs, SemanticFiles, open_pairs
from mirl.data.splits import divided
from mirl.errors import UserError

HELD_OUT = ("val", "test")
WHOLE = "whole"  # the split of a folder that has none
LABELS = ("labels", "masks", "semantic", "annotations")
ADE20K = "ADEChallengeData2016"
LOOKED_FOR = "images/train with labels/train, train/images with train/labels, and images with labels, which are PNGs"

Folders = tuple[Path, Path]  # of images, of labels


def open_splits(
    root: Path, *, channels: int, val_fraction: float | None, seed: int
) -> tuple[SemanticSplit, SemanticSplit]:
    """Open the training split and the held-out split of a folder, whose classes are the same object.

    Raises:
        UserError: if one of them is missing.
    """
    root, splits = _find(root)
    held_out = next((split for split in HELD_OUT if split in splits), None)
    found = ", ".join(repr(str(images.relative_to(root))) for images, _ in splits.values())
    if "train" in splits and held_out:
        if val_fraction is not None:
            raise UserError(f"{str(root)!r} is split already, into {found}; leave out --val_fraction")
        train, test = (open_pairs(*splits[split], channels) for split in ("train", held_out))
        vocabulary = _vocabulary(root, train)
        return _all(train, vocabulary), _all(test, vocabulary)
    if val_fraction is None:
        raise UserError(
            f"{str(root)!r} has labels for {found}, which is no training and held-out split; add the other, or split "
            "it with --val_fraction 0.2"
        )
    if len(splits) > 1:
        raise UserError(f"--val_fraction splits a single folder, but {str(root)!r} has labels for {found}; keep one")
    pairs = open_pairs(*next(iter(splits.values())), channels)
    whole = _all(pairs, _vocabulary(root, pairs))
    kept, tested = divided(len(pairs), val_fraction, seed, str(root))
    return replace(whole, members=kept), replace(whole, members=tested)


def open_training(root: Path, *, channels: int) -> SemanticSplit:
    """Open the training split of a folder, or the only one, whether or not there is another to judge on.

    Raises:
        UserError: if there are several and none is for training.
    """
    root, splits = _find(root)
    if "train" not in splits and len(splits) > 1:
        found = ", ".join(repr(str(images.relative_to(root))) for images, _ in splits.values())
        raise UserError(f"{str(root)!r} has labels for {found}, none of which is for training; add a training split")
    return _open(root, splits, ("train",), channels)


def open_test(root: Path, *, channels: int) -> SemanticSplit:
    """Open the split of a folder to judge on: validation, else test, else what there is."""
    root, splits = _find(root)
    split = _open(root, splits, HELD_OUT, channels)
    if set(HELD_OUT) & set(splits):
        return split
    note = f"no held-out split: all {len(split)} images are judged, and those trained on make figures too good"
    return replace(split, notes=(*split.notes, note))


def _open(root: Path, splits: dict[str, Folders], wanted: tuple[str, ...], channels: int) -> SemanticSplit:
    split = next((split for split in wanted if split in splits), next(iter(splits)))
    pairs = open_pairs(*splits[split], channels)
    return _all(pairs, _vocabulary(root, pairs))


def _vocabulary(root: Path, pairs: Pairs) -> Vocabulary:
    return read_vocabulary(root, pairs.folder, map(pairs.label_of, pairs.present))


def _all(pairs: Pairs, vocabulary: Vocabulary) -> SemanticSplit:
    notes = (*vocabulary.notes, *pairs.notes)
    return SemanticSplit(SemanticFiles(pairs, vocabulary), np.arange(len(pairs)), notes)


def _find(root: Path) -> tuple[Path, dict[str, Folders]]:
    """Return the folder that has the layout, `root` or ADE20K's in it, and the folders of each of its splits."""
    for folder in (root, root / ADE20K):
        splits = {split: folders for split in SPLITS if (folders := _first(_candidates(folder, split)))}
        if not splits and (whole := _first((folder / "images", folder / name) for name in LABELS)):
            splits = {WHOLE: whole}
        if splits:
            return folder, splits
    raise UserError(f"{str(root)!r} has no images with labels; looked for {LOOKED_FOR}")


def _candidates(root: Path, split: str) -> Iterator[Folders]:
    for labels in LABELS:
        for name in SPLITS[split]:
            yield root / name / "images", root / name / labels
            yield from ((root / "images" / name, root / labels / synonym) for synonym in SPLITS[split])


def _first(candidates: Iterator[Folders]) -> Folders | None:
    return next(((images, labels) for images, labels in candidates if images.is_dir() and _has_labels(labels)), None)


def _has_labels(folder: Path) -> bool:
    return any(name.lower().endswith(SUFFIX) for _, _, names in os.walk(folder) for name in names)
