"""The built-in images: reproducible, balanced, consistently annotated, quick to draw, and labelled by outline alone."""

import pickle
import time

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from mirl.data.shapes import CLASSES, Shapes


def test_read_gives_what_the_training_pipeline_expects():
    image = Shapes(4).read(3)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 64, 64)
    assert image.is_contiguous()


def test_images_do_not_depend_on_order_count_or_process():
    few, many = Shapes(30, seed=3), pickle.loads(pickle.dumps(Shapes(1000, seed=3)))
    forwards = [few.read(index) for index in range(30)]
    for index in reversed(range(30)):
        assert torch.equal(many.read(index), forwards[index])
        assert many.label_of(index) == few.label_of(index)


def test_seeds_splits_and_indices_are_different_images():
    sets = [Shapes(20, seed=seed, split=split) for seed in (0, 1) for split in ("train", "val")]
    images = {data.read(index).numpy().tobytes() for data in sets for index in range(20)}
    assert len(images) == 80


def test_an_index_is_the_same_scene_at_any_size():
    small, large = Shapes(20, size=64), Shapes(20, size=128)
    for index in range(20):
        shrunk = torch.nn.functional.avg_pool2d(large.read(index).float(), 2)
        assert (shrunk - small.read(index)).abs().mean() < 3


@pytest.mark.parametrize("size", [16, 224, (48, 80), (80, 48)])
def test_other_sizes(size):
    height, width = (size, size) if isinstance(size, int) else size
    data = Shapes(20, size=size)
    for index in range(20):
        sample = data.sample(index)
        assert data.read(index).shape == (3, height, width)
        assert data.read(index).is_contiguous()
        assert sample.image.shape == (height, width, 3)
        assert sample.masks.shape == (1, height, width)
        assert sample.masks.any()


def test_every_block_of_ten_holds_every_class():
    labels = np.array([Shapes(200).label_of(index) for index in range(200)]).reshape(-1, 10)
    assert (np.sort(labels, axis=1) == np.arange(10)).all()
    assert len(np.unique(labels, axis=0)) > 1


def test_annotations_agree_and_every_shape_is_visible():
    data = Shapes(300, split="val")
    for index in range(300):
        sample = data.sample(index)
        assert np.array_equal(sample.image, data.read(index).permute(1, 2, 0).numpy())
        assert sample.label == data.label_of(index)
        (mask,) = sample.masks
        assert mask.sum() > 60
        assert np.array_equal(sample.semantic, np.where(mask, 1 + sample.label, 0))
        x0, y0, x1, y1 = sample.boxes[0].astype(int)
        assert mask[y0:y1, x0:x1].sum() == mask.sum()
        edges = mask[y0, x0:x1], mask[y1 - 1, x0:x1], mask[y0:y1, x0], mask[y0:y1, x1 - 1]
        assert all(edge.any() for edge in edges)


def test_most_of_a_shape_stays_visible(monkeypatch):
    occluded = [Shapes(300).sample(index).masks.sum() for index in range(300)]
    monkeypatch.setattr("mirl.data.shapes.OCCLUDED_IMAGES", 0.0)
    whole = [Shapes(300).sample(index).masks.sum() for index in range(300)]
    visible = np.divide(occluded, whole)
    assert visible.min() > 0.6
    assert 0.2 < (visible < 1).mean() < 0.45


def test_shape_and_surroundings_contrast():
    luma = np.array([0.299, 0.587, 0.114])
    colours = []
    for index in range(300):
        sample = Shapes(300).sample(index)
        inside, outside = (sample.image[region].mean(axis=0) for region in (sample.masks[0], sample.semantic == 0))
        colours.append(np.abs(inside - outside))
    assert np.min(np.max(colours, axis=1)) > 15
    assert np.median(np.array(colours) @ luma) > 40


def test_names():
    assert Shapes(200).name_of(123) == "shapes/train/000123"
    assert Shapes(200, split="val").name_of(0) == "shapes/val/000000"
    assert Shapes(1).classes == CLASSES
    assert len(Shapes(7)) == 7


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_out_of_range_is_an_error(index):
    data = Shapes(10)
    for method in (data.read, data.sample, data.label_of, data.name_of):
        with pytest.raises(IndexError, match=f"index {index} is out of range"):
            method(index)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "'test' is not known; choose one of train, val"),
        ({"count": 0}, "count 0"),
        ({"size": (64, 8)}, "size 64x8"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Shapes(**arguments)


def test_drawing_is_quick():
    data = Shapes(200)
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        for index in range(len(data)):
            data.read(index)
        rates.append(len(data) / (time.perf_counter() - start))
    print(f"{max(rates):.0f} images a second")
    assert max(rates) > 600


def test_labels_are_in_the_outline_and_not_in_the_raw_pixels():
    train, val = Shapes(2000), Shapes(500, split="val")

    def pixels(sample):
        return sample.image.reshape(-1)

    assert _knn_accuracy(train, val, pixels) < 0.35
    assert _knn_accuracy(train, val, _radial_profile) > 0.55


def _knn_accuracy(train, val, describe):
    features, labels = zip(*((describe(sample), sample.label) for sample in _samples(train)), strict=True)
    classifier = KNeighborsClassifier(10).fit(np.stack(features), labels)
    features, labels = zip(*((describe(sample), sample.label) for sample in _samples(val)), strict=True)
    return classifier.score(np.stack(features), labels)


def _samples(data):
    return (data.sample(index) for index in range(len(data)))


def _radial_profile(sample):
    """Describe the visible mask by what no turn, shift or scale changes: how far its pixels are from its centre."""
    points = np.argwhere(sample.masks[0])
    distances = np.linalg.norm(points - points.mean(axis=0), axis=1) / np.sqrt(len(points))
    return np.histogram(distances, bins=16, range=(0, 1.2), density=True)[0]
