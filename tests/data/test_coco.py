"""COCO folders: found in their layouts, equal to pycocotools, and forgiving to annotations but not to broken files."""

import copy
import json
import os
import pickle
import random
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mirl.data.decode import BadImage
from mirl.data.instances import Category, open_instance_test, open_instances
from mirl.data.run_lengths import encode_mask
from mirl.errors import UserError

pytest.importorskip("faster_coco_eval")
SHARED = Path(os.environ.get("MIRL_SHARED", Path(__file__).resolve().parents[3] / "shared"))
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


@pytest.fixture(scope="module")
def coco_mini(tmp_path_factory):
    """100 + 100 of COCO's photos with annotations."""
    archive = SHARED / "data" / "coco_mini" / "coco_mini.tar"
    if not archive.is_file():
        pytest.skip(f"photos with annotations are not at {archive}; set MIRL_SHARED")
    folder = tmp_path_factory.mktemp("coco_mini")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return folder


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of pycocotools
def test_real_photos_are_read_as_pycocotools_does(coco_mini, capsys):
    oracle = pytest.importorskip("pycocotools.coco")
    train, held_out = open_instances(str(coco_mini))
    assert (len(train), len(held_out), len(train.source.categories)) == (98, 100, 80)
    assert train.notes == ("2 images without instances not trained on",) and held_out.notes == ()
    assert train.source.categories[0] == Category(1, "person")
    expected = oracle.COCO(coco_mini / "annotations" / "instances_val.json")
    given = oracle.COCO()
    given.dataset = json.loads(json.dumps(held_out.source.truth(held_out.members)))
    given.createIndex()
    assert given.getAnnIds() == expected.getAnnIds() and given.getImgIds() == expected.getImgIds()
    crowds = 0
    for number in expected.getAnnIds():
        one, other = given.anns[number], expected.anns[number]
        crowds += one["iscrowd"]
        for key in ("image_id", "category_id", "bbox", "area", "iscrowd"):
            assert one[key] == other[key]
        assert np.array_equal(given.annToMask(one), expected.annToMask(other))
    assert crowds == 5
    for index in range(0, 100, 9):
        image, instances = held_out.source.read_instances(index)
        others = [a for a in expected.imgToAnns[held_out.source.image_id(index)] if not a["iscrowd"]]
        assert len(instances) == len(others) and image.shape[1:] == instances.masks.shape[1:]
        for box, label, mask, other in zip(*instances.target().values(), others, strict=True):
            x, y, width, height = other["bbox"]
            assert box.tolist() == pytest.approx([x, y, x + width, y + height])
            assert held_out.source.categories[label - 1].id == other["category_id"]
            assert np.array_equal(mask.numpy(), expected.annToMask(other))
    capsys.readouterr()


@pytest.mark.parametrize(
    "places",
    [
        [("annotations/instances_train2017.json", "train2017"), ("annotations/instances_val2017.json", "val2017")],
        [("annotations/instances_train2017.json", "images/train2017"), ("annotations/val.json", "images/val")],
        [("annotations/instances_train.json", "images/train"), ("annotations/instances_val.json", "images/val")],
        [("annotations/my_train_set.json", "images"), ("annotations/my_test_set.json", "images")],
        [("train/_annotations.coco.json", "train"), ("valid/_annotations.coco.json", "valid")],
        [("train/labels.json", "train/images"), ("test/labels.json", "test/images")],
        [("train.json", "train"), ("validation.json", "val")],
    ],
)
def test_layouts(tmp_path, places):
    (train_file, train_folder), (held_out_file, held_out_folder) = places
    write(tmp_path, train_file, content(), train_folder)
    write(tmp_path, held_out_file, content(images=1), held_out_folder, 1)
    for other in ("captions_train2017", "person_keypoints_val2017", "panoptic_train2017", "stuff_val2017",
                  "image_info_test2017"):  # fmt: skip
        write(tmp_path, f"annotations/{other}.json", "{}") if (tmp_path / "annotations").is_dir() else None
    train, held_out = open_instances(str(tmp_path))
    assert (len(train), len(held_out)) == (2, 1) and train.notes == held_out.notes == ()
    assert Path(train.source.name_of(0)) == tmp_path / train_folder / "1.png"
    assert Path(held_out.source.name_of(0)) == tmp_path / held_out_folder / "1.png"
    assert len(open_instance_test(str(tmp_path))) == 1
    with pytest.raises(UserError, match="leave out --val_fraction"):
        open_instances(str(tmp_path), val_fraction=0.5)


@pytest.mark.parametrize("name", ["all.json", "annotations/instances_default.json", "train.json"])
def test_a_single_file_is_split(tmp_path, name):
    write(tmp_path, name, content(images=20), "images", 20)
    train, held_out = open_instances(str(tmp_path), val_fraction=0.25, seed=3)
    assert (len(train), len(held_out)) == (15, 5) and train.source is held_out.source
    assert sorted([*train.members, *held_out.members]) == list(range(20))
    assert np.array_equal(open_instances(str(tmp_path), val_fraction=0.25, seed=3)[1].members, held_out.members)
    assert not np.array_equal(open_instances(str(tmp_path), val_fraction=0.25)[1].members, held_out.members)
    assert len(open_instance_test(str(tmp_path))) == 20
    with pytest.raises(UserError, match="--val_fraction 0.2"):
        open_instances(str(tmp_path))


def test_validation_comes_before_test(tmp_path):
    for split, images in (("train", 2), ("valid", 1), ("test", 2)):
        write(tmp_path, f"{split}/_annotations.coco.json", content(images=images), split, images)
    assert len(open_instances(str(tmp_path))[1]) == len(open_instance_test(str(tmp_path))) == 1


def test_file_names_may_start_anywhere(tmp_path):
    data = content()
    data["images"][0]["file_name"] = "data/train/1.png"
    data["images"][1]["file_name"] = "C:\\photos\\2.png"
    write(tmp_path, "annotations/train.json", data, "images/train")
    source = open_instance_test(str(tmp_path)).source
    assert [Path(source.name_of(k)) for k in (0, 1)] == [tmp_path / f"images/train/{k}.png" for k in (1, 2)]


def test_what_is_not_found_is_said(tmp_path):
    def error():
        with pytest.raises(UserError) as caught:
            open_instance_test(str(tmp_path))
        return str(caught.value)

    assert "has no COCO annotations; looked for annotations/*train*.json, train/_annotations.coco.json" in error()
    write(tmp_path, "annotations/instances_train2017.json", content())
    assert "such as '1.png', are not in" in error() and "looked in ./" in error()
    write(tmp_path, "annotations/instances_train2014.json", content(), "train")
    assert "instances_train2014.json" in error() and "instances_train2017.json" in error() and "keep one" in error()
    with pytest.raises(UserError, match="is a file; give the folder"):
        open_instances(str(tmp_path / "annotations" / "instances_train2014.json"))


def test_splits_of_other_categories_are_refused(tmp_path):
    write(tmp_path, "train.json", content(), "train")
    other = [{"id": 3, "name": "cat"}, {"id": 7, "name": "wolf"}]
    write(tmp_path, "val.json", content(categories=other), "val")
    with pytest.raises(UserError, match=r"category 7 'dog' of .*train.json' is not in .*val.json'; both need the same"):
        open_instances(str(tmp_path))


def test_labels_boxes_crowds_and_truth(tmp_path):
    crowd = {"size": [HEIGHT, WIDTH], "counts": [0, 300, 900]}
    data = content(
        annotation(1, category=7, box=(-5, 3, 20, 50)),
        annotation(2, box=(1, 1, 30, 20), iscrowd=1, segmentation=crowd),
        annotation(3, box=(6, 6, 2, 2), segmentation=[[6, 6, 6.1, 6, 6, 6.1]]),  # no pixel
        annotation(4, image=2, box=(0.5, 0.25, 3, 4), iscrowd=True),
        images=3,
    )
    del data["annotations"][0]["area"]
    split = single(tmp_path, data, images=3)
    assert split.source.categories == (Category(3, "cat"), Category(7, "dog"))
    assert len(split) == 3 and split.notes == ()
    image, instances = split.source.read_instances(0)
    assert image.shape == (3, HEIGHT, WIDTH) and image[0].unique().tolist() == [1]
    assert instances.boxes.tolist() == [[0, 3, 15, 30]] and instances.labels.tolist() == [2]
    assert instances.masks.shape == (1, HEIGHT, WIDTH) and instances.masks.dtype == torch.uint8
    for index in (1, 2):
        _, none = split.source.read_instances(index)
        assert len(none) == 0 and none.masks.shape == (0, HEIGHT, WIDTH) and none.boxes.shape == (0, 4)
    truth = split.source.truth(split.members)
    assert [one["id"] for one in truth["annotations"]] == [1, 2, 3, 4]
    assert [one["iscrowd"] for one in truth["annotations"]] == [0, 1, 0, 1]
    assert truth["annotations"][0]["bbox"] == [-5, 3, 20, 50] and truth["annotations"][0]["category_id"] == 7
    assert truth["annotations"][0]["area"] == instances.masks.sum()
    assert truth["annotations"][1]["area"] == 600
    assert truth["categories"] == [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    assert truth["images"][1] == {"id": 2, "file_name": "2.png", "height": HEIGHT, "width": WIDTH}
    assert [one["id"] for one in split.source.truth([1])["annotations"]] == [4]
    json.dumps(truth)


def test_images_without_instances_are_judged_on_but_not_trained_on(tmp_path):
    empty = annotation(3, image=3, segmentation=[[6, 6, 6.1, 6, 6, 6.1]])
    data = content(annotation(1), annotation(2, image=2, iscrowd=1), empty, images=4)
    write(tmp_path, "train.json", data, "train", 4)
    write(tmp_path, "val.json", data, "val", 4)
    train, held_out = open_instances(str(tmp_path))
    assert train.members.tolist() == [0] and train.notes == ("3 images without instances not trained on",)
    assert len(held_out) == 4 and held_out.notes == ()


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


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    assert "pip install 'mirl[detect]'" in refused(tmp_path, content())


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


@pytest.mark.parametrize("orientation", [1, 3, 6, 8, 5])
@pytest.mark.parametrize("frame", ["upright", "stored"])
def test_images_are_read_in_the_frame_of_their_annotations(tmp_path, orientation, frame):
    turned = orientation in (5, 6, 8) and frame == "upright"
    data = content(annotation(1, box=(2, 3, 10, 9)), images=1)
    if turned:
        data["images"][0] |= {"height": WIDTH, "width": HEIGHT}
    write(tmp_path, "all.json", data)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.new("RGB", (WIDTH, HEIGHT))
    picture.putpixel((0, 0), (255, 0, 0))
    picture.save(tmp_path / "1.png", exif=exif)
    image, instances = open_instance_test(str(tmp_path)).source.read_instances(0)
    assert image.shape[1:] == instances.masks.shape[1:] == ((WIDTH, HEIGHT) if turned else (HEIGHT, WIDTH))
    corner = {1: (0, 0), 3: (-1, -1), 6: (0, -1), 8: (-1, 0), 5: (0, 0)}[orientation]  # of the upright image
    if frame == "stored" and orientation in (5, 6, 8):
        corner = (0, 0)
    assert image[0][corner] == 255


def test_images_of_another_size_are_bad_images(tmp_path):
    split = single(tmp_path, content())
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(tmp_path / "1.png")
    with pytest.raises(BadImage, match="is 31x40 px, but its annotations are of 30x40 px"):
        split.source.read_instances(0)
    (tmp_path / "2.png").write_bytes(b"")
    with pytest.raises(BadImage, match="empty"):
        split.source.read_instances(1)


def test_a_source_is_small_to_send(tmp_path):
    annotations = [annotation(k, box=(k % 30, k // 30 % 20, 5 + k % 3, 5)) for k in range(2000)]
    split = single(tmp_path, content(*annotations))
    sent = pickle.dumps(split.source)
    assert len(sent) < 2000 * (8 + 8 + 32 + 8 + 1 + 1 + 8 + 25) + 5000
    image, instances = split.source.read_instances(0)
    other, others = pickle.loads(sent).read_instances(0)
    assert torch.equal(image, other) and torch.equal(instances.masks, others.masks)
