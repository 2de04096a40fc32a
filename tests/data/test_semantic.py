"""Label maps: folders found in their layouts, images paired with their labels, batches padded."""

import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from label_folders import HEIGHT, NAMES, WIDTH, bad, label, pair, refused, save, write
from PIL import Image

from mirl.data.decode import BadImage
from mirl.data.loading import StepSampler, collate
from mirl.data.semantic import (
    IGNORE,
    SemanticBatch,
    SemanticClass,
    SemanticViews,
    open_semantic,
    open_semantic_test,
    open_semantic_training,
)
from mirl.data.shapes import CLASSES
from mirl.data.workers import Batches
from mirl.errors import UserError

SHARED = Path(os.environ.get("MIRL_SHARED", Path(__file__).resolve().parents[3] / "shared"))


def folder(root, classes=NAMES, splits=("train", "val"), **options):
    """Write three pairs in each split, and the classes."""
    for split in splits:
        for name in ("a", "b/c", "d"):
            pair(root, name, f"images/{split}", f"labels/{split}", **options)
    write(root, classes)
    return str(root)


def unpacked(name, files, tmp_path_factory):
    source = SHARED / "data" / name
    if not (source / f"{name}.tar").is_file():
        pytest.skip(f"photos with labels are not at {source}; set MIRL_SHARED")
    target = tmp_path_factory.mktemp(name)
    with tarfile.open(source / f"{name}.tar") as archive:
        archive.extractall(target, [one for one in archive if one.name.startswith(files)], filter="data")
    (target / "classes.json").write_bytes((source / "classes.json").read_bytes())
    return target


def test_camvid_is_read_as_pillow_does(tmp_path_factory):
    root = unpacked("camvid", ("images/train", "images/val", "labels/train", "labels/val"), tmp_path_factory)
    train, held_out = open_semantic(str(root))
    assert (len(train), len(held_out), len(train.source.classes)) == (367, 101, 11)
    assert train.source.classes is held_out.source.classes and train.notes == held_out.notes == ()
    assert train.source.classes[::10] == (SemanticClass(0, "Sky"), SemanticClass(10, "Bicyclist"))
    for split, name, index in ((train, "train", 7), (held_out, "val", 100)):
        image, labels = split.source.read_semantic(index)
        path = sorted((root / "labels" / name).iterdir())[index]
        assert Path(split.source.name_of(index)).stem == path.stem
        expected = np.asarray(Image.open(path))
        assert 11 in expected  # void
        assert np.array_equal(labels, np.where(expected == 11, IGNORE, expected))
        assert image.shape == (3, *labels.shape) and image.dtype == labels.dtype == torch.uint8


def test_labels_of_coco_open_beside_its_annotations(tmp_path_factory):
    root = unpacked("coco_mini", ("images/val", "semantic/val", "annotations"), tmp_path_factory)
    split = open_semantic_test(str(root))
    assert len(split) == 100 and len(split.source.classes) == 133
    assert split.source.classes[-1] == SemanticClass(132, "rug-merged")
    labels = [split.source.read_semantic(index)[1] for index in range(5)]
    assert any((one == IGNORE).any() for one in labels) and all((one < 133).any() for one in labels)


def test_shapes_have_a_background():
    train, _ = open_semantic("shapes:40:32")
    assert train.source.classes == tuple(map(SemanticClass, range(11), ("background", *CLASSES)))
    image, labels = train.source.read_semantic(3)
    assert image.shape == (3, 32, 32) and torch.equal(image, train.source.read(3))
    assert labels.unique().tolist() == [0, 1 + train.source.shapes.label_of(3)]


ADE_NAMES = ["wall", "building, edifice", "sky", *(f"thing {k}, synonym" for k in range(4, 151))]


def ade(root, table=True):
    for split in ("training", "validation"):
        values = np.array([[0, 1, 150], [2, 3, 0]], np.uint8)
        save(root / "images" / split / "ADE_1.jpg", np.zeros((2, 3, 3), np.uint8))
        save(root / "annotations" / split / "ADE_1.png", values)
    if table:
        rows = [f"{k}\t0.1\t{k}\t{k}\t1\t{name}" for k, name in enumerate(ADE_NAMES, start=1)]
        (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows, ""]))
    return root


@pytest.mark.parametrize("data", [".", "ADEChallengeData2016"])
def test_ade20k_opens_as_published(tmp_path, data):
    ade(tmp_path / "ADEChallengeData2016")
    train, held_out = open_semantic(str(tmp_path / data))
    classes = train.source.classes
    assert (len(train), len(held_out), len(classes)) == (1, 1, 150) and train.notes == ()
    assert classes[:2] == (SemanticClass(1, "wall"), SemanticClass(2, "building"))
    assert classes[149] == SemanticClass(150, "thing 150")
    assert train.source.read_semantic(0)[1].tolist() == [[IGNORE, 0, 149], [1, 2, IGNORE]]


def test_ade20k_without_its_table_has_numbers_for_names(tmp_path):
    train, _ = open_semantic(str(ade(tmp_path, table=False)))
    assert train.source.classes[::149] == (SemanticClass(1, "class 1"), SemanticClass(150, "class 150"))
    assert "objectInfo150.txt" in train.notes[0]
    (tmp_path / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n2\tsky\n")
    assert "has 2 classes, not ADE20K's 150" in refused(tmp_path)


@pytest.mark.parametrize(
    "places, members",
    [
        ([("images/train", "labels/train"), ("images/val", "labels/val"), ("images/test", "labels/test")], "val"),
        ([("images/training", "masks/train"), ("images/validation", "masks/valid")], "validation"),
        ([("train/images", "train/labels"), ("valid/images", "valid/labels")], "valid"),
        ([("images/train", "semantic/train"), ("images/test", "semantic/test")], "test"),
    ],
)
def test_splits_are_found(tmp_path, places, members):
    for images, labels in places:
        pair(tmp_path, "b/c", images, labels)
        pair(tmp_path, "a", images, labels)
    write(tmp_path, NAMES)
    train, held_out = open_semantic(str(tmp_path))
    assert train.source.name_of(0) == str(tmp_path / places[0][0] / "a.png")
    assert members in held_out.source.name_of(1) and held_out.source.name_of(1).endswith("b/c.png")
    assert len(train) == len(held_out) == 2
    assert open_semantic_test(str(tmp_path)).source.name_of(0) == held_out.source.name_of(0)
    assert open_semantic_training(str(tmp_path)).source.name_of(0) == train.source.name_of(0)
    assert "split already, into" in refused(tmp_path, val_fraction=0.5)


def test_a_whole_folder_is_divided(tmp_path):
    for name in map(str, range(10)):
        pair(tmp_path, name)
    write(tmp_path, NAMES)
    train, held_out = open_semantic(str(tmp_path), val_fraction=0.3, seed=1)
    assert len(held_out) == 3 and sorted([*train.members, *held_out.members]) == list(range(10))
    assert train.source is held_out.source
    again, other = (open_semantic(str(tmp_path), val_fraction=0.3, seed=seed)[1].members.tolist() for seed in (1, 2))
    assert held_out.members.tolist() == again == [4, 7, 8] != other  # for good: older runs trained on the others
    assert len(open_semantic_test(str(tmp_path))) == len(open_semantic_training(str(tmp_path))) == 10
    assert "--val_fraction 0.2" in refused(tmp_path)


def test_folders_that_cannot_be_split_are_named(tmp_path):
    folder(tmp_path, splits=("val", "test"))
    assert "'images/val', 'images/test', which is no training" in refused(tmp_path)
    assert "keep one" in refused(tmp_path, val_fraction=0.2)
    with pytest.raises(UserError, match="none of which is for training"):
        open_semantic_training(str(tmp_path))
    pair(tmp_path / "one")
    write(tmp_path / "one", NAMES)
    assert "single image" in refused(tmp_path / "one", val_fraction=0.5)
    (tmp_path / "empty" / "images").mkdir(parents=True)
    assert "looked for images/train with labels/train" in refused(tmp_path / "empty")
    assert "is a file" in refused(tmp_path / "classes.json")
    assert "did you mean" in refused(tmp_path / "emty")


def test_images_and_labels_are_paired_by_path(tmp_path):
    pair(tmp_path, "a/x", values=label(0))
    pair(tmp_path, "b/x", values=label(2))
    save(tmp_path / "images" / "c.jpg", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    for stray in ("x", "y"):
        save(tmp_path / "labels" / f"{stray}.png", label())
    (tmp_path / "labels" / "c.txt").write_text("no label")
    write(tmp_path, NAMES)
    split = open_semantic_test(str(tmp_path))
    assert [split.source.read_semantic(k)[1][0, 0].item() for k in (0, 1)] == [0, 2]
    assert split.notes[0] == "2 labels without an image, such as 'x.png'"
    assert split.notes[1].startswith("no held-out split: all 3 images are judged") and len(split.notes) == 2
    path = str(tmp_path / "labels" / "c.png")
    assert len(split) == 3 and bad(split, 2) == f"has no label: {path!r} is missing"


def test_no_pair_at_all_is_an_error(tmp_path):
    save(tmp_path / "images" / "a.jpg", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    save(tmp_path / "labels" / "a_mask.png", label())
    write(tmp_path, NAMES)
    assert "'a.jpg' needs 'a.png', but there is 'a_mask.png'" in refused(tmp_path, val_fraction=0.2)


class Scenes:
    """Images of different sizes, each of one class; the second cannot be read."""

    classes = (SemanticClass(0, "all"),)

    def __len__(self):
        return 6

    def name_of(self, index):
        return f"scene[{index}]"

    def read_semantic(self, index):
        if index == 1:
            raise BadImage("has no label")
        size = 10 + index, 20 - index
        return torch.full((3, *size), 7, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)


def test_batches_are_padded_with_what_is_ignored():
    views = SemanticViews(Scenes(), np.arange(6))
    batch = collate([views[0, index] for index in range(4)])
    assert isinstance(batch, SemanticBatch) and batch.bad == (("scene[1]", "has no label"),)
    assert batch.images.shape == (3, 3, 13, 20) and batch.labels.shape == (3, 13, 20)
    assert batch.labels.dtype == torch.uint8 and batch.indices.tolist() == [0, 2, 3]
    assert ((batch.labels == IGNORE) == (batch.images[:, 0] == 0)).all() and (batch.labels == IGNORE).any()
    assert [tuple(one.shape) for one in batch.unpadded("labels")] == [(10, 20), (12, 18), (13, 17)]
    assert all((one == 0).all() for one in batch.unpadded("labels"))
    assert batch.part(slice(1, 3)).labels.shape == (2, 13, 20)


def test_views_travel_to_workers(tmp_path):
    train, _ = open_semantic(folder(tmp_path))
    views = SemanticViews(train.source, train.members, substitute=True)
    keys = list(StepSampler(3, 3, 3, seed=0, start=0, stop=1, rank=0, world_size=1))
    (batch,) = Batches(views, keys, workers=0, pin=False)
    assert sorted(batch.indices.tolist()) == [0, 1, 2]
    assert torch.equal(batch.labels[0], torch.from_numpy(label()))
    assert pickle.loads(pickle.dumps(views))[0, 1].labels.shape == (1, HEIGHT, WIDTH)
