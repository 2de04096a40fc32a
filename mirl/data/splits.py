"""Parts of a data set: a share that is held out, or the first few images."""

from dataclasses import replace
from typing import TypeVar

import numpy as np

from mirl.data.instances import InstanceSplit
from mirl.data.semantic import SemanticSplit
from mirl.errors import UserError

Split = TypeVar("Split", InstanceSplit, SemanticSplit)


def few(split: Split, count: int) -> Split:
    """Return the first images of a split.

    Raises:
        UserError: if there are not so many.
    """
    if count > len(split):
        raise UserError(f"--overfit {count} is more than the {len(split)} training images; give at most {len(split)}")
    return replace(split, members=split.members[:count])


def divided(count: int, fraction: float, seed: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return indices of the images to train on, and of `fraction` of the `count`, at least one, to hold out.

    Raises:
        UserError: if there is a single image, which is named by `where` it is.
    """
    if count < 2:
        raise UserError(f"{where!r} has a single image; a split needs two or more")
    order = np.random.default_rng(seed).permutation(count)
    held_out = min(count - 1, max(1, round(fraction * count)))
    return np.sort(order[held_out:]), np.sort(order[:held_out])
