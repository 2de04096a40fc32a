"""Tiny segmentation runs, and folders of labelled squares."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_runs import without_pictures

import mirl
from mirl.data.semantic import open_semantic
from mirl.errors import UserError
from mirl.tasks.segmentation import SegmentTask
from mirl.tasks.settings.segmentation import Segmentation, resolve_segmentation
from mirl.tasks.weights import open_weights

TINY = {
    "data": "shapes:24:32", "epochs": 1, "batch_size": 8, "width": 16, "precision": "32", "workers": 0,
    "base_lr": 4e-3, "report": False,
}  # fmt: skip
VALUES = {"ground": 3, "square": 7, "void_index": 9}


def train(**options):
    """Train without pictures, which take longer than all else."""
    with without_pictures():
        return mirl.segment(**TINY | options)


def task_of(vit, **options):
    """Return the task that `mirl segment` would run with these options."""
    given, weights = Segmentation(**TINY | {"weights": vit} | options), open_weights(vit)
    train, val = open_semantic(given.data)
    settings = resolve_segmentation(
        given, images=len(train), shorter_side=32, depth=weights.depth, width=48, patch_size=8, gpu=False, devices=1,
        precision="32",
    )  # fmt: skip
    return SegmentTask(settings, weights, train, val)


def refused(match, **options):
    """Check that training is a mistake that is said in one line."""
    with pytest.raises(UserError, match=match) as caught:
        train(**options)
    assert "\n" not in str(caught.value)


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def write_folder(root, *, train=4, val=2, classes=VALUES):
    """Write bright squares on dark ground, 40x48 px, with labels; return the folder."""
    random = np.random.default_rng(0)
    for split, count in {"train": train, "val": val}.items():
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            pixels, labels = np.full((40, 48, 3), 30, np.uint8), np.full((40, 48), 3, np.uint8)
            y, x = random.integers(0, 16, 2)
            pixels[y : y + 24, x : x + 24], labels[y : y + 24, x : x + 24] = 220, 7
            labels[:2] = 9
            Image.fromarray(pixels).save(root / "images" / split / f"{number:02}.png")
            Image.fromarray(labels).save(root / "labels" / split / f"{number:02}.png")
    (root / "classes.json").write_text(json.dumps(classes))
    return root


def break_some(root):
    """Spoil four pairs to train on and one to judge on."""
    labels = root / "labels" / "train"
    (labels / "00.png").unlink()
    Image.fromarray(np.full((20, 20), 3, np.uint8)).save(labels / "01.png")
    Image.fromarray(np.full((40, 48), 5, np.uint8)).save(labels / "02.png")
    (root / "images" / "train" / "03.png").write_bytes(b"no image")
    (root / "images" / "val" / "01.png").write_bytes(b"")
