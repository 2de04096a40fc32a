"""Small COCO folders, as they should be or not."""

import json

import pytest
from PIL import Image

from mirl.data.instances import open_instance_test
from mirl.errors import UserError

HEIGHT, WIDTH = 30, 40


def annotation(number, image=1, category=3, box=(4, 5, 10, 12), **others):
    x, y, width, height = box
    polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(box), "area": width * height,
            "iscrowd": 0, "segmentation": [polygon]} | others  # fmt: skip


def content(*annotations, images=2, **others):
    return {
        "images": [{"id": k, "file_name": f"{k}.png", "height": HEIGHT, "width": WIDTH} for k in range(1, images + 1)],
        "annotations": list(annotations) or [annotation(10 + k, image=k) for k in range(1, images + 1)],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat", "supercategory": "animal"}],
    } | others


def write(root, name, data, folder=None, images=2):
    """Write an annotation file and, into `folder`, the images."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    if folder is not None:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for k in range(1, images + 1):
            Image.new("RGB", (WIDTH, HEIGHT), (k, 0, 0)).save(root / folder / f"{k}.png")


def single(tmp_path, data, images=2):
    """Open a folder with one annotation file."""
    write(tmp_path, "all.json", data, "", images)
    return open_instance_test(str(tmp_path))


def refused(tmp_path, data, **options):
    with pytest.raises(UserError) as caught:
        single(tmp_path, data, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
