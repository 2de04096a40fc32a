"""Average precision is COCO's to the last digit."""

import copy
import json
import math
import sys
from pathlib import Path

import pytest
from coco_reference import assert_equal_to_pycocotools, compressed, encoded, perturbed, real_truth

from mirl.errors import UserError
from mirl.tasks.average_precision import average_precision


@pytest.fixture(scope="module")
def truth():
    return real_truth()


@pytest.fixture
def small():
    """Two images with three objects of two of three classes; one is a polygon, one is annotation 0, of image 0."""
    rows = [(0, 0, 7, [10, 10, 20, 20]), (5, 0, 9, [0, 0, 64, 40]), (6, 3, 7, [30, 5, 10, 30])]
    annotations = [
        {"id": id, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0,
         "segmentation": encoded(box, 48, 64)}
        for id, image, category, box in rows
    ]  # fmt: skip
    annotations[2]["segmentation"] = [[30, 5, 40, 5, 40, 35, 30, 35]]
    categories = [{"id": 9, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}]
    images = [{"id": id, "height": 48, "width": 64} for id in (0, 3)]
    return {"images": images, "annotations": annotations, "categories": categories}


def answers(truth):
    """Return results that are the truth."""
    return [
        {"image_id": row["image_id"], "category_id": row["category_id"], "bbox": row["bbox"], "score": 0.5,
         "segmentation": encoded(row["bbox"], 48, 64)}
        for row in truth["annotations"]
    ]  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
def test_figures_and_classes_equal_pycocotools(truth, seed):
    """With crowds, duplicates, ties, wrong classes and images where nothing was found."""
    results = perturbed(truth, seed)
    found = assert_equal_to_pycocotools(truth, results)
    assert 0.01 < found.figures["mask_ap"] < found.figures["box_ap"] < 0.9
    assert sum(row["iscrowd"] for row in truth["annotations"]) > 0
    assert found.images == 100 and found.objects == 707
    assert {row.objects for row in found.per_class if math.isnan(row.ap["box"])} == {0}


def test_masks_of_any_shape_equal_pycocotools(truth):
    """The masks are those of the truth, moved to boxes of another object now and then."""
    rows = [row for row in truth["annotations"] if not row["iscrowd"]]
    results = [
        {"image_id": row["image_id"], "category_id": row["category_id"], "score": (k * 37 % 101) / 101,
         "bbox": (row if k % 5 else rows[k - 1])["bbox"], "segmentation": compressed(row["segmentation"])}
        for k, row in enumerate(rows) if k % 7
    ]  # fmt: skip
    found = assert_equal_to_pycocotools(truth, results)
    assert found.figures["mask_ap"] > 0.5 > found.figures["mask_ap"] - found.figures["box_ap"] > 0


def test_more_than_a_hundred_answers_in_an_image(small):
    """The hundred surest count."""
    right, wrong = (
        answers(small)[:2],
        answers(small)[0] | {"bbox": [40, 30, 5, 5], "segmentation": encoded([40, 30, 5, 5], 48, 64)},
    )
    many = [wrong | {"score": 0.6 + k / 1000} for k in range(120)]
    found = assert_equal_to_pycocotools(small, right + many)
    assert found.figures["box_ap"] == pytest.approx(0.5)  # of the cat alone


def test_the_truth_itself_is_perfect(small):
    """Also for an object with the number 0; nothing that was given is changed."""
    results, before = answers(small), copy.deepcopy(small)
    found = average_precision(small, results)
    assert (small, results) == (before, answers(small))
    values = found.figures
    assert all(
        values[f"{kind}_{name}"] == pytest.approx(1) for kind in ("box", "mask") for name in ("ap", "ap50", "ap75")
    )
    assert values["box_ap_small"] == values["box_ap_medium"] == pytest.approx(1) and math.isnan(values["box_ap_large"])
    assert [(row.category, row.objects) for row in found.per_class] == [(2, 0), (7, 2), (9, 1)]
    assert str(found) == "box AP 100.0% (AP50 100.0%, AP75 100.0%), mask AP 100.0% (AP50 100.0%, AP75 100.0%)"
    json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert found.as_json()["per_class"][0] == {
        "category": 2,
        "name": "cat",
        "objects": 0,
        "box_ap": None,
        "mask_ap": None,
    }


def test_boxes_alone_need_no_masks(small):
    results = [{name: value for name, value in row.items() if name != "segmentation"} for row in answers(small)]
    assert average_precision(small, results, ["box"]).figures.keys() == {
        f"box_{name}" for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    }


def test_nothing_found_is_zero_and_nothing_to_find_is_no_number(small):
    assert average_precision(small, []).figures["mask_ap"] == 0
    for nothing in (small | {"annotations": []}, small | {"annotations": [], "images": []}):
        found = average_precision(nothing, answers(small) if nothing["images"] else [])
        assert all(map(math.isnan, found.figures.values())) and str(found) == "no objects to judge by"
        assert len(found.per_class) == 3
    empty = average_precision({"images": [], "annotations": [], "categories": []}, [])
    assert empty.per_class == () and math.isnan(empty.figures["box_ap"])


def test_one_class(small):
    one = small | {"categories": small["categories"][1:2], "annotations": [small["annotations"][0]]}
    assert average_precision(one, answers(one)).figures["box_ap"] == pytest.approx(1)


def test_nothing_is_printed(small, capfd, caplog):
    caplog.set_level(0)
    average_precision(small, answers(small))
    assert capfd.readouterr() == ("", "") and not [r for r in caplog.records if r.levelname != "DEBUG"]


def test_results_of_other_images_are_refused(small):
    with pytest.raises(UserError, match=r"image 4, which is not among the truth's 2"):
        average_precision(small, [answers(small)[0] | {"image_id": 4}])


def test_the_missing_library_is_named(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(UserError, match=r"pip install 'mirl\[detect\]'"):
        average_precision(small, answers(small))


def test_a_detectors_own_results_on_photographs():
    """What a detector found in training photographs, the surest of each; docs/results.md says how it was trained."""
    results = json.loads(Path(__file__).with_name("coco_detections.json").read_text())
    seen = {result["image_id"] for result in results}
    whole = real_truth("train")
    truth = whole | {
        "images": [image for image in whole["images"] if image["id"] in seen],
        "annotations": [row for row in whole["annotations"] if row["image_id"] in seen],
    }
    found = assert_equal_to_pycocotools(truth, results)
    assert found.images == len(seen) == 12 and found.figures["mask_ap"] > 0.2
