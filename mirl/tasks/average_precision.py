"""Average precision of boxes and masks as COCO computes it, over all classes and for each.

AP is the mean over IoU thresholds 0.50, 0.55 ... 0.95, AP50 and AP75 are at one threshold; small, medium and large are
objects of under 32², under 96² and more pixels. The matching is faster-coco-eval's. Symbols: t IoU thresholds, r recall
levels, k classes, a ranges of area, m limits of detections per image and class.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mirl.errors import UserError

Kind = Literal["box", "mask"]
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
IOU_TYPES: dict[Kind, str] = {"box": "bbox", "mask": "segm"}


@dataclass(frozen=True)
class ClassPrecision:
    """AP of one class.

    Attributes:
        category: its number in the annotation file; name: its name, which need not be unique.
        objects: how many there are, without crowds.
        ap: of "box" and "mask", in 0..1; NaN for a class without objects.
    """

    category: int
    name: str
    objects: int
    ap: dict[Kind, float]


@dataclass(frozen=True)
class AveragePrecision:
    """How well objects are found.

    Attributes:
        figures: box_ap, box_ap50, box_ap75, box_ap_small, box_ap_medium, box_ap_large and the same of mask_, in 0..1;
            NaN where there is no such object (COCO writes -1).
        per_class: in the order of the categories' numbers.
        images: how many were judged; objects: how many these have, without crowds.
    """

    figures: dict[str, float]
    per_class: tuple[ClassPrecision, ...]
    images: int
    objects: int

    def __str__(self) -> str:
        if not self.objects:
            return "no objects to judge by"
        kinds = [kind for kind in IOU_TYPES if f"{kind}_ap" in self.figures]
        return ", ".join(
            "{} AP {:.1%} (AP50 {:.1%}, AP75 {:.1%})".format(kind, *(self.figures[f"{kind}_{f}"] for f in FIGURES[:3]))
            for kind in kinds
        )

    def as_json(self) -> dict[str, Any]:
        """Return what a JSON file holds of it: null in place of NaN."""
        rows = [
            {"category": row.category, "name": row.name, "objects": row.objects}
            | {f"{kind}_ap": or_none(value) for kind, value in row.ap.items()}
            for row in self.per_class
        ]
        figures = {name: or_none(value) for name, value in self.figures.items()}
        return figures | {"images": self.images, "objects": self.objects, "per_class": rows}


def average_precision(
    truth: dict[str, Any], results: Sequence[dict[str, Any]], kinds: Sequence[Kind] = ("box", "mask")
) -> AveragePrecision:
    """Judge detections against COCO ground truth; neither is changed.

    Equal to pycocotools to the last digit. The size of a detection is its box's area for boxes and its mask's for
    masks, as in detectron2 and mmdet.

    Args:
        truth: `images`, `annotations` (with `area` and `iscrowd`) and `categories`, as in a COCO file.
        results: `image_id`, `category_id`, `bbox` [x, y, width, height], `score` and `segmentation`, as in COCO's
            format of results. Images without any count as found empty.

    Raises:
        UserError: if faster-coco-eval is missing, or a result belongs to an image that the truth does not have.
    """
    known = {image["id"] for image in truth["images"]}
    if strange := {result["image_id"] for result in results} - known:
        raise UserError(
            f"results name image {min(strange)}, which is not among the truth's {len(known)}; "
            "give the annotations of the same images"
        )
    categories = sorted(truth["categories"], key=lambda category: category["id"])
    precisions = {kind: _precisions(truth, results, kind) for kind in kinds}  # [t, r, k, a]
    counts = Counter(row["category_id"] for row in truth["annotations"] if not row.get("iscrowd", 0))
    per_class = tuple(
        ClassPrecision(
            category["id"],
            category["name"],
            counts[category["id"]],
            {kind: mean_of_known(values[:, :, k, 0]) for kind, values in precisions.items()},
        )
        for k, category in enumerate(categories)
    )
    figures = {f"{kind}_{name}": value for kind in kinds for name, value in _figures(precisions[kind]).items()}
    return AveragePrecision(figures, per_class, len(known), sum(row.objects for row in per_class))


def _precisions(truth: dict[str, Any], results: Sequence[dict[str, Any]], kind: Kind) -> np.ndarray:
    """Return precision [t, r, k, a] at 100 detections; NaN where a class has no object in a range of area."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster, mask
    except ImportError as error:
        raise UserError("average precision needs faster-coco-eval; run pip install 'mirl[detect]'") from error

    def area(result: dict[str, Any]) -> float:
        return float(mask.area(result["segmentation"])) if kind == "mask" else result["bbox"][2] * result["bbox"][3]

    # Copies, because the library writes into rows; new ids, because to it an object of id 0 is none.
    objects = [row | {"id": k} for k, row in enumerate(truth["annotations"], 1)]
    found = [row | {"id": k, "area": area(row), "iscrowd": 0} for k, row in enumerate(results, 1)]
    expected, given = (COCO(truth | {"annotations": rows}, print_function=_silent) for rows in (objects, found))
    evaluation = COCOeval_faster(expected, given, iouType=IOU_TYPES[kind], print_function=_silent)
    if not (evaluation.params.imgIds and evaluation.params.catIds):
        return np.full((len(evaluation.params.iouThrs), 1, len(evaluation.params.catIds), 4), math.nan)
    evaluation.evaluate()
    evaluation.accumulate()
    precision = np.asarray(evaluation.eval["precision"])[..., -1]
    return np.where(precision < 0, math.nan, precision)  # COCO's way is -1


def _silent(_: str) -> None:
    pass


def _figures(precision: np.ndarray) -> dict[str, float]:
    """Summarise precision [t, r, k, a]: thresholds 0 and 5 are IoU 0.50 and 0.75, range 0 is every size."""
    chosen = (precision[..., 0], precision[0, ..., 0], precision[5, ..., 0], *(precision[..., a] for a in (1, 2, 3)))
    return {name: mean_of_known(values) for name, values in zip(FIGURES, chosen, strict=True)}


def mean_of_known(values: np.ndarray) -> float:
    """Average what is not NaN; NaN if nothing is left."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def or_none(value: float) -> float | None:
    """Return what JSON can hold of a figure: null in place of NaN."""
    return None if math.isnan(value) else float(value)
