"""Tiny detection runs, and folders of COCO's form with a square in each image."""

import json

import numpy as np
from PIL import Image

from mirl.data.instances import open_instances
from mirl.tasks.detection import DetectTask
from mirl.tasks.settings.detection import Detection, resolve_detection
from mirl.tasks.weights import open_weights

TINY = {
    "data": "shapes:24:32", "epochs": 2, "batch_size": 8, "width": 16, "regions": 8, "precision": "32", "workers": 0,
    "base_lr": 4e-3, "report": False,
}  # fmt: skip


def settings_of(vit, *, images=24, **options):
    weights = open_weights(vit)
    given = Detection(**TINY | {"weights": vit} | options)
    return weights, resolve_detection(
        given, images=images, shorter_side=32, depth=weights.depth, patch_size=8, gpu=False, devices=1, precision="32"
    )


def task_of(vit, **options):
    """Return the task that `mirl detect` would run with these options."""
    train, val = open_instances(options.get("data", TINY["data"]))
    weights, settings = settings_of(vit, images=len(train), **options)
    return DetectTask(settings, weights, train, val)


def write_coco(root, *, images=4, channels=3):
    """Write a COCO folder of plain squares on a plain ground, with categories 7 and 3; return it."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        table = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "b"}, {"id": 3, "name": "a"}]}
        for number in range(1, images + 1):
            pixels = np.full((40, 48, 3), 30, np.uint8)
            x, y, side = (int(value) for value in (random.integers(0, 20), random.integers(0, 16), 20))
            kind = number % 2
            pixels[y : y + side, x : x + side] = (200, 60, 60) if kind else (60, 60, 220)
            picture = Image.fromarray(pixels)
            (picture if channels == 3 else picture.convert("L")).save(root / "images" / split / f"{number}.png")
            table["images"].append({"id": 10 * number, "file_name": f"{number}.png", "height": 40, "width": 48})
            corners = [x, y, x + side, y, x + side, y + side, x, y + side]
            table["annotations"].append({
                "id": number, "image_id": 10 * number, "category_id": 7 if kind else 3, "iscrowd": 0,
                "bbox": [x, y, side, side], "area": side * side, "segmentation": [corners],
            })  # fmt: skip
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(table))
    return root
