"""COCO annotations: what is wrong with one is skipped and named, what is no COCO file is refused in a line."""

import copy
import json
import random

import numpy as np
import pytest
from coco_folders import HEIGHT, WIDTH, annotation, content, refused, single

from mirl.data.decode import BadImage
from mirl.data.instances import open_instance_test
from mirl.data.run_lengths import encode_mask
from mirl.errors import UserError

pytest.importorskip("faster_coco_eval")


@pytest.mark.parametrize(
    ("wrong", "note"),
    [
        ([{"image_id": 99}], "1 annotation skipped: image_id of no image, e.g. annotation 50"),
        ([{"category_id": 4}], "category_id of no category, e.g. annotation 50 of 1.png"),
        ([{"id": 1}], "an id that an annotation before has, e.g. annotation 1 of 1.png"),
        ([{"bbox": [0, 0, 0, 5]}, {"bbox": [3, 3, 4, -1]}, {"area": 0}, {"area": -2.5}],
         "4 annotations skipped: box or area not positive and finite, e.g. annotation 50 of 1.png, annotation 51 of "
         "1.png, annotation 52 of 1.png"),
        ([{"bbox": [float("nan"), 0, 5, 5]}, {"bbox": [0, 0, 5, float("inf")]}, {"bbox": [0, 0, 10**400, 5]}],
         "3 annotations skipped: box or area not positive"),
        ([{"bbox": [40, 3, 5, 5]}, {"bbox": [-9, 3, 9, 5]}, {"bbox": [1e308, 0, 1e308, 5]}],
         "3 annotations skipped: box outside the image"),
        ([{"bbox": [4, 5, 10, 12]}], "image, category and box of an annotation before, e.g. annotation 50 of 1.png"),
        ([{"segmentation": None}, {"segmentation": []}], "2 annotations skipped: no segmentation"),
        ([{"segmentation": [[1, 2, 3, 4]]}, {"segmentation": {"size": [3, 3], "counts": [9]}},
          {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [9]}}, {"segmentation": "x"}],
         "4 annotations skipped: segmentation malformed, e.g. annotation 50 of 1.png"),
        ([{"id": None}, {"id": "51"}, {"id": True}, {"id": 2**70}],
         "4 annotations skipped: id missing or not a whole number of 64 bits, e.g. annotations[1] of 1.png, "
         "annotations[2] of 1.png, annotations[3] of 1.png"),
        ([{"image_id": None}, {"image_id": "1"}, {"image_id": [1]}],
         "3 annotations skipped: image_id missing or not a whole number of 64 bits, e.g. annotation 50, annotation 51"),
        ([{"category_id": None}, {"category_id": 3.5}, {"category_id": float("inf")}],
         "3 annotations skipped: category_id missing or not a whole number of 64 bits, e.g. annotation 50 of 1.png"),
        ([{"bbox": None}, {"bbox": [1, 2, 3]}, {"bbox": [1, 2, 3, "4"]}, {"bbox": [1, 2, 3, None]}, {"bbox": "box!"}],
         "5 annotations skipped: bbox missing or not four numbers, e.g. annotation 50 of 1.png"),
        ([{"area": "5"}, {"area": [5]}, {"area": True}], "3 annotations skipped: area not a number, e.g."),
        ([{"iscrowd": "0"}, {"iscrowd": 2}, {"iscrowd": []}], "3 annotations skipped: iscrowd not 0 or 1, e.g."),
    ],
)  # fmt: skip
def test_wrong_annotations_are_skipped_and_named(tmp_path, wrong, note):
    others = [annotation(50 + k, **{"box": (20 + k, 9, 5, 5)} | one) for k, one in enumerate(wrong)]
    split = single(tmp_path, content(annotation(1), *others))
    assert len(split.notes) == 1 and note in split.notes[0]
    assert [one["id"] for one in split.source.truth(split.members)["annotations"]] == [1]
    assert len(split.source.read_instances(0)[1]) == 1


def test_incomplete_annotations_are_skipped_and_named(tmp_path):
    short = annotation(50)
    del short["id"], short["bbox"]
    split = single(tmp_path, content(annotations=[5, None, annotation(1), {}, short]))
    assert split.notes == (
        "2 annotations skipped: not an object, e.g. annotations[0], annotations[1]",
        "2 annotations skipped: id missing or not a whole number of 64 bits, "
        "e.g. annotations[3], annotations[4] of 1.png",
    )
    assert [one["id"] for one in split.source.truth([0])["annotations"]] == [1]


def test_unusual_values_are_read(tmp_path):
    odd = annotation(1.0, image=1.0, category=3.0, area=None, iscrowd=None)
    crowd = annotation(2, image=2, iscrowd=1.0)
    data = content(odd, crowd, annotation(3, image=2))
    data["images"][0] |= {"id": 1.0, "height": float(HEIGHT), "width": float(WIDTH)}
    data["categories"][1]["id"] = 3.0
    del data["annotations"][2]["area"], data["annotations"][2]["iscrowd"]
    split = single(tmp_path, data)
    assert split.notes == ()
    truth = split.source.truth(split.members)
    assert [one["area"] for one in truth["annotations"]] == [120, 120, 120]
    assert [one["iscrowd"] for one in truth["annotations"]] == [0, 1, 0]
    assert json.dumps(truth["images"][0]) == json.dumps(content()["images"][0])
    assert json.dumps([truth["annotations"][0][key] for key in ("id", "image_id", "category_id")]) == "[1, 1, 3]"


def test_malformed_images_are_skipped_and_named(tmp_path):
    good = content()["images"][0]
    wrong = [5, good | {"file_name": None}, good | {"id": None}, good | {"id": 6, "width": 2.5}, {"file_name": "x.png"}]
    data = content(annotation(1), annotation(2, image=6), annotation(3, image=0))
    split = single(tmp_path, data | {"images": [*wrong, good]})
    assert len(split) == 1 and [one["id"] for one in split.source.truth([0])["annotations"]] == [1]
    assert split.notes == (
        "1 image skipped: not an object, e.g. images[0]",
        "1 image skipped: file_name missing or not a text, e.g. images[1]",
        "2 images skipped: id missing or not a whole number of 64 bits, e.g. 1.png, x.png",
        "1 image skipped: width missing or not a whole number of 64 bits, e.g. 1.png",
        "1 annotation skipped: image_id of no image, e.g. annotation 3",
    )


def test_wrong_images_are_skipped_with_their_annotations(tmp_path):
    size = {"height": HEIGHT, "width": WIDTH}
    wrong = [
        {"id": 1, "file_name": "2.png", **size}, {"id": 5, "file_name": "gone\n.png", **size},
        {"id": 6, "file_name": "1.png", "height": 0, "width": WIDTH}, {"id": 7, "file_name": "\ud800\0", **size},
        {"id": 8, "file_name": "1.png", "height": 2**62, "width": 2**62},
    ]  # fmt: skip
    data = content(annotation(1), *[annotation(k, image=k) for k in (2, 5, 6, 7, 8)])
    data["images"] += wrong
    split = single(tmp_path, data)
    assert len(split) == 2 and [one["id"] for one in split.source.truth([0, 1])["annotations"]] == [1, 2]
    assert split.notes == (
        "1 image skipped: an id that an image before has, e.g. 2.png",
        "2 images skipped: no image is that high and wide, e.g. 1.png, 1.png",
        f"2 images skipped: no such image in {str(tmp_path)!r}, e.g. gone\\n.png, \\ud800\\x00",
    )


def test_nothing_usable_is_an_error(tmp_path):
    message = refused(tmp_path, content(annotation(1, category=99), annotation(2, iscrowd=1)))
    assert "has no usable annotation (1 annotation skipped: category_id of no category" in message
    assert "has no usable annotation;" in refused(tmp_path, content() | {"annotations": []})
    message = refused(tmp_path, content(images=1) | {"images": [{"file_name": "1.png"}]})
    assert "has no usable annotation (1 image skipped: id missing" in message and "image_id of no image" in message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("[1, 2]", "holds a list; COCO annotations are an object"),
        ('{"images": [', "is not valid JSON (Expecting value"),
        ("", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ({"images": [], "categories": []}, "has no"),
        (content(images=0), "names no file in 'images'"),
        (content(categories=[]), "has nothing in 'categories'"),
        (content(categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]), "category 1 is 'a' and 'b'"),
        (content(annotations={"a": 1}), "'annotations' is not a list of objects"),
        (content(annotations=None), "'annotations' is not a list of objects"),
        (content(categories=[{"id": 1, "name": "a"}, 5]), "categories[1] is malformed: not an object; give each"),
        (content(categories=[{"id": 1}]), "categories[0] is malformed: name missing or not a text"),
        (content(categories=[{"id": "1", "name": "a"}]), "categories[0] is malformed: id missing or not a"),
    ],
)  # fmt: skip
def test_files_of_another_form_are_refused(tmp_path, data, message):
    found = refused(tmp_path, data)
    assert message in found and "all.json" in found and len(found) < 300


ODD = [None, True, -1, 0, 3.5, 2**65, 1e308, "x", "", [], {}, [[]], [1, 2], {"size": [HEIGHT, WIDTH]}, "\ud800"]


def corrupted(data, rng):
    """Replace, delete or repeat something somewhere."""
    here, key = None, None
    while isinstance(data, dict | list) and data and (here is None or rng.random() < 0.97):
        here, key = data, rng.choice(list(data) if isinstance(data, dict) else range(len(data)))
        data = here[key]
    what = rng.random()
    if what < 0.2:
        del here[key]
    elif what < 0.3 and isinstance(here, list):
        here.append(here[key])
    else:
        here[key] = rng.choice(ODD)


def test_corrupted_files_are_refused_or_noted(tmp_path):
    good = content(
        annotation(1), annotation(2, image=2, segmentation={"size": [HEIGHT, WIDTH], "counts": [50, 100, 1050]}),
        annotation(3, box=(1, 2, 3, 4), iscrowd=1, segmentation=encode_mask(np.eye(HEIGHT, WIDTH, dtype=np.uint8))),
    )  # fmt: skip
    assert single(tmp_path, good).notes == ()
    rng, outcomes = random.Random(0), {"refused": 0, "noted": 0, "read": 0}
    for _ in range(250):
        data = copy.deepcopy(good)
        for _ in range(rng.randint(1, 2)):
            corrupted(data, rng)
        (tmp_path / "all.json").write_text(json.dumps(data))
        try:
            split = open_instance_test(str(tmp_path))
        except UserError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
            continue
        outcomes["noted" if split.notes else "read"] += 1
        for index in split.members:
            try:
                image, instances = split.source.read_instances(int(index))
            except BadImage:  # another height or width
                continue
            assert instances.masks.shape == (len(instances), *image.shape[1:])
        json.dumps(split.source.truth(split.members))
    assert min(outcomes.values()) > 5, outcomes


def test_truncated_files_are_refused(tmp_path):
    text = json.dumps(content())
    for length in range(0, len(text), 7):
        assert "is not valid JSON" in refused(tmp_path, text[:length])
