"""Small folders of images with label maps, as they should be or not."""

import json

import numpy as np
import pytest
from PIL import Image

from mirl.data.decode import BadImage
from mirl.data.semantic import (
    open_semantic,
    open_semantic_test,
)
from mirl.errors import UserError

HEIGHT, WIDTH = 3, 5
NAMES = ["road", "tree", "car"]


def save(path, values, size=None, **options):
    """Write an image of any mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (values if isinstance(values, Image.Image) else Image.fromarray(np.asarray(values))).save(path, **options)
    return path


def label(value=0):
    values = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 3
    values[0, 0] = value
    return values


def pair(root, name="a", images="images", labels="labels", values=None, photo=None):
    save(root / images / f"{name}.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8) if photo is None else photo)
    save(root / labels / f"{name}.png", label() if values is None else values)


def write(root, classes):
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.json").write_text(classes if isinstance(classes, str) else json.dumps(classes))


def refused(data, **options):
    with pytest.raises(UserError) as caught:
        open_semantic(str(data), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def bad(split, index=0):
    with pytest.raises(BadImage) as caught:
        split.source.read_semantic(index)
    assert "\n" not in caught.value.reason
    return caught.value.reason


def single(tmp_path, values, classes=NAMES, **options):
    """Open a folder of one pair."""
    pair(tmp_path, values=values, **options)
    write(tmp_path, classes)
    return open_semantic_test(str(tmp_path))
