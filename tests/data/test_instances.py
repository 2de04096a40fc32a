"""Instances travel in batches: padded, cut, joined, replaced where they cannot be read."""

import pickle

import numpy as np
import pytest
import torch

from mirl.data.decode import BadImage
from mirl.data.instances import (
    Category,
    InstanceBatch,
    Instances,
    InstanceViews,
    open_instances,
)
from mirl.data.loading import StepSampler, collate
from mirl.data.shapes import CLASSES
from mirl.data.workers import Batches
from mirl.errors import UserError

COUNT = 9


class Scenes:
    """Images of different sizes with index % 3 instances; those in `bad` cannot be read."""

    categories = (Category(7, "box"),)

    def __init__(self, bad=()):
        self.bad = set(bad)

    def __len__(self):
        return COUNT

    def name_of(self, index):
        return f"scene[{index}]"

    def read_instances(self, index):
        if index in self.bad:
            raise BadImage("is empty (0 bytes)")
        height, width, count = 10 + index, 20 - index, index % 3
        image = torch.full((3, height, width), 20 + 20 * index, dtype=torch.uint8)
        masks = torch.ones(count, height, width, dtype=torch.uint8)
        boxes = torch.tensor([[0.0, 0.0, width, height]]).repeat(count, 1)
        return image, Instances(boxes=boxes, labels=torch.ones(count, dtype=torch.int64), masks=masks)


def views(source=None, view=None, **options):
    return InstanceViews(source or Scenes(), np.arange(COUNT), view, **options)


def jitter(image, instances):
    return (image * torch.rand(())).to(torch.uint8), instances


def assert_same(one, other):
    assert one.bad == other.bad and len(one.instances) == len(other.instances) == len(one) > 0
    for name in ("images", "sizes", "indices"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for left, right in zip(one.instances, other.instances, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left.target().values(), right.target().values(), strict=True))


def test_images_are_padded_to_the_largest_and_unpadded_again():
    batch = collate([views()[0, index] for index in (1, 5, 3)])
    assert batch.images.shape == (3, 3, 15, 19) and batch.images.dtype == torch.uint8
    assert batch.sizes.tolist() == [[11, 19], [15, 15], [13, 17]] and batch.sizes.dtype == torch.int64
    assert [len(one) for one in batch.instances] == [1, 2, 0] and batch.indices.tolist() == [1, 5, 3]
    for index, image, padded in zip((1, 5, 3), batch.unpadded(), batch.images, strict=True):
        assert torch.equal(image, Scenes().read_instances(index)[0])
        assert padded.sum() == image.sum()  # zeros beside it
    for image, one in zip(batch.unpadded(), batch.instances, strict=True):
        assert one.masks.shape[1:] == image.shape[1:]


def test_pieces_are_the_batch_in_order():
    batch = collate([views()[0, index] for index in range(7)])
    assert [len(piece) for piece in batch.pieces(3)] == [3, 3, 1]
    assert_same(collate(batch.pieces(3)), batch)
    assert len(batch.pieces(3)[1].instances) == 3


def test_a_change_reaches_every_tensor():
    seen = []

    def change(tensor):
        seen.append(tensor.shape)
        return tensor + 1

    batch = collate([views()[0, index] for index in (1, 2)])
    changed = batch.map(change)
    assert len(seen) == 3 + 2 * 3
    assert torch.equal(changed.instances[1].boxes, batch.instances[1].boxes + 1)
    assert batch.to(torch.device("meta")).instances[1].masks.device.type == "meta"
    assert_same(pickle.loads(pickle.dumps(batch)), batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_a_function_of_epoch_and_index(workers):
    def read(workers):
        sampler = StepSampler(COUNT, 4, 2, seed=0, start=0, stop=4, rank=0, world_size=1)
        return list(Batches(views(view=jitter, key=(3,)), sampler, workers=workers, pin=False))

    torch.manual_seed(workers)
    for one, other in zip(read(workers), read(0), strict=True):
        assert_same(one, other)
    assert not torch.equal(views(view=jitter)[0, 1].images, views(view=jitter)[1, 1].images)


def test_unreadable_images_are_replaced_or_left_out_and_named():
    replaced = views(Scenes(bad=[4]), substitute=True)[0, 4]
    assert replaced.bad == (("scene[4]", "is empty (0 bytes)"),) and replaced.indices.tolist() == [5]
    batch = collate([views(Scenes(bad=[4]))[0, index] for index in (3, 4, 5)])
    assert isinstance(batch, InstanceBatch) and batch.indices.tolist() == [3, 5] and len(batch.instances) == 2
    assert batch.bad == replaced.bad
    assert len(collate([views(Scenes(bad=[4]))[0, 4]])) == 0
    small = views(smallest=(12, 1))[0, 0]
    assert len(small) == 0 and "smaller than a patch" in small.bad[0][1]


def test_shapes():
    train, held_out = open_instances("shapes:80:48")
    assert [category.name for category in train.source.categories] == list(CLASSES)
    image, instances = train.source.read_instances(3)
    assert image.shape == (3, 48, 48) and torch.equal(image, train.source.read(3))
    target = instances.target()
    assert {name: (value.dtype, tuple(value.shape)) for name, value in target.items()} == {
        "boxes": (torch.float32, (1, 4)), "labels": (torch.int64, (1,)), "masks": (torch.uint8, (1, 48, 48)),
    }  # fmt: skip
    assert target["labels"].item() == 1 + train.source.shapes.label_of(3)
    x0, y0, x1, y1 = target["boxes"][0].int().tolist()
    assert target["masks"][0, y0:y1, x0:x1].sum() == target["masks"].sum() > 0
    assert train.source.name_of(3) != held_out.source.name_of(3)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of pycocotools
def test_truth_of_shapes_is_what_is_read():
    decode = pytest.importorskip("pycocotools.mask").decode
    _, held_out = open_instances("shapes:80:48")
    truth = held_out.source.truth(held_out.members[2:5])
    assert [image["id"] for image in truth["images"]] == [held_out.source.image_id(i) for i in (2, 3, 4)]
    annotation = truth["annotations"][1]
    _, instances = held_out.source.read_instances(3)
    assert annotation["image_id"] == 3 and annotation["category_id"] == instances.labels.item()
    assert np.array_equal(decode(annotation["segmentation"]), instances.masks[0].numpy())
    assert annotation["area"] == instances.masks.sum().item()
    x, y, width, height = annotation["bbox"]
    assert [x, y, x + width, y + height] == instances.boxes[0].tolist()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("cifar10", "'cifar10' does not exist; give a folder with COCO annotations and images, or shapes"),
        ("nowhere", "'nowhere' does not exist"),
    ],
)
def test_what_has_no_instances_is_refused(data, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        open_instances(data)
    assert "\n" not in str(caught.value)
