"""COCO's own evaluation, and results with whatever makes matching hard."""

import copy
import io
import json
import math
import os
import tarfile
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as run_lengths

from mirl.tasks.average_precision import FIGURES, average_precision

SHARED = Path(os.environ.get("MIRL_SHARED", Path(__file__).resolve().parents[3] / "shared"))


def real_truth(split="val"):
    """Return annotations of 100 photos: of val 712 objects of 80 classes, among them 5 crowds."""
    archive = SHARED / "data" / "coco_mini" / "coco_mini.tar"
    if not archive.is_file():
        pytest.skip(f"photos with annotations are not at {archive}; set MIRL_SHARED")
    with tarfile.open(archive) as files:
        return json.load(files.extractfile(f"annotations/instances_{split}.json"))


def reference(truth, results, kind):
    """Return pycocotools' AP figures of a kind, and AP for each category that has objects."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, results = copy.deepcopy(truth), copy.deepcopy(list(results))
    if kind == "mask":  # else areas are those of boxes
        for result in results:
            del result["bbox"]
    with redirect_stdout(io.StringIO()):
        expected = COCO()
        expected.dataset = truth
        expected.createIndex()
        evaluation = COCOeval(expected, expected.loadRes(results), {"box": "bbox", "mask": "segm"}[kind])
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    per_class = {
        category: float(precision[:, :, k].mean())
        for k, category in enumerate(evaluation.params.catIds)
        if (precision[:, :, k] > -1).all()
    }
    return dict(zip(FIGURES, map(float, evaluation.stats[:6]), strict=True)), per_class


def assert_equal_to_pycocotools(truth, results, *, tolerance=1e-9):
    """Compare all twelve figures and every class's AP; return ours. Results must not be empty for pycocotools."""
    results = json.loads(json.dumps(results))
    found = average_precision(truth, results)
    for kind in ("box", "mask"):
        figures, per_class = reference(truth, results, kind)
        for name, value in figures.items():
            ours = found.figures[f"{kind}_{name}"]
            assert (math.isnan(ours) and value == -1) or ours == pytest.approx(value, abs=tolerance), (kind, name)
        ours = {row.category: row.ap[kind] for row in found.per_class if not math.isnan(row.ap[kind])}
        assert ours == pytest.approx(per_class, abs=tolerance)
    return found


def encoded(box, height, width):
    """Return the run lengths of a mask that fills a box, x, y, width and height."""
    x, y, w, h = box
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[int(y) : int(np.ceil(y + h)), int(x) : int(np.ceil(x + w))] = 1
    return _as_text(run_lengths.encode(mask))


def compressed(segmentation):
    """Return run lengths, a list of numbers, as results have them."""
    return _as_text(run_lengths.frPyObjects(segmentation, *segmentation["size"]))


def _as_text(segmentation):
    return segmentation | {"counts": segmentation["counts"].decode()}


def perturbed(truth, seed=0):
    """Turn annotations into results: shifted, resized, missed, duplicated, of a wrong class, invented, in random order.

    Crowds are answered by several small detections each; scores have ties.
    """
    random = np.random.default_rng(seed)
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    categories = [category["id"] for category in truth["categories"]]
    results = []

    def add(image, category, box, score):
        height, width = sizes[image]
        x0, y0 = np.clip(box[:2], 0, (width - 2, height - 2))
        w, h = np.clip(box[2:], 1, (width - x0, height - y0))
        results.append({
            "image_id": image, "category_id": category, "bbox": [float(v) for v in (x0, y0, w, h)],
            "score": float(score), "segmentation": encoded((x0, y0, w, h), height, width),
        })  # fmt: skip

    for row in truth["annotations"]:
        box, score = np.array(row["bbox"], float), round(random.random(), 2)
        if row["iscrowd"]:
            for _ in range(4):
                x, y = random.random(2) * box[2:] * 0.7
                add(row["image_id"], row["category_id"], [box[0] + x, box[1] + y, *box[2:] * 0.3], score)
            continue
        for _ in range(random.choice([0, 1, 1, 1, 2, 3])):
            noise = random.normal(0, random.choice([0.01, 0.05, 0.2]), 4) * np.tile(box[2:], 2)
            category = random.choice(categories) if random.random() < 0.15 else row["category_id"]
            add(row["image_id"], int(category), box + noise, score)
    for image, (height, width) in sizes.items():
        for _ in range(random.integers(0, 4)):
            x, y, w, h = random.random(4) * (width, height, width / 2, height / 2)
            add(image, int(random.choice(categories)), np.array([x, y, w, h]), random.random())
    return [results[i] for i in random.permutation(len(results))]
