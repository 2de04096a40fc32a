"""COCO folders: found in their layouts, equal to pycocotools, and read in the frame of their annotations."""

import json
import os
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_folders import HEIGHT, WIDTH, annotation, content, refused, single, write
from PIL import Image

from mirl.data.decode import BadImage
from mirl.data.instances import Category, open_instance_test, open_instances
from mirl.errors import UserError

pytest.importorskip("faster_coco_eval")
SHARED = Path(os.environ.get("MIRL_SHARED", Path(__file__).resolve().parents[3] / "shared"))


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
        [("annotations/training.json", "images/training"), ("annotations/validation.json", "images/validation")],
        [("training/labels.json", "training"), ("test/labels.json", "test")],
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
    assert not np.array_equal(open_instances(str(tmp_path), val_fraction=0.25)[1].members, held_out.members)
    assert held_out.members.tolist() == [3, 8, 12, 16, 18]  # for good: older runs trained on the others
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


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    assert "pip install 'mirl[detect]'" in refused(tmp_path, content())


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
