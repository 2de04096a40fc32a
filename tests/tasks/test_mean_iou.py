"""Mean IoU and accuracies are those of NumPy, torchmetrics and mmseg's conventions, and survive processes and files."""

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.classification import MulticlassJaccardIndex

from mirl.data.decode import BadImage
from mirl.data.semantic import IGNORE, SemanticBatch, SemanticClass, SemanticSplit, SemanticViews
from mirl.errors import UserError
from mirl.tasks import segmentation_scores
from mirl.tasks.mean_iou import Overlap, confusion_of
from mirl.tasks.segmentation_scores import (
    HEADLINE,
    IoUOfHeldOut,
    check_classes,
    evaluate_segmenter,
    judge,
    nothing_yet,
    translation,
    with_image,
    write_results,
)
from mirl.training.processes import launch

KNOWN = (SemanticClass(0, "sky"), SemanticClass(3, "road"), SemanticClass(7, "a car, red"))


def maps(classes, *, images=3, seed=0, absent=()):
    """Return predictions and truths of images of several sizes, with unlabelled pixels and without some classes."""
    random = np.random.default_rng(seed)
    present = [label for label in range(classes) if label not in absent]
    found = []
    for number in range(images):
        size = (7 + number, 11 - number)
        truth = random.choice([*present, IGNORE], size).astype(np.uint8)
        said = np.where(random.random(size) < 0.5, truth, random.choice(present, size)).astype(np.uint8)
        said[said == IGNORE] = present[0]
        found.append((torch.from_numpy(said), torch.from_numpy(truth)))
    return found


def judged(pairs, classes):
    found = nothing_yet([SemanticClass(i, f"c{i}") for i in range(classes)])
    for said, truth in pairs:
        found = with_image(found, said, truth)
    return found


@pytest.mark.parametrize("classes", [1, 2, 11, 150, 255])
def test_figures_are_those_of_numpy_and_torchmetrics(classes):
    pairs = maps(classes, absent=(1, classes - 2) if classes > 5 else ())
    found, metric = judged(pairs, classes), None
    said, truth = (torch.cat([pair[k].flatten() for pair in pairs]).numpy() for k in (0, 1))
    said, truth = said[truth != IGNORE], truth[truth != IGNORE]
    table = np.zeros((classes, classes), np.int64)
    np.add.at(table, (truth, said), 1)
    assert found.confusion.dtype == torch.int64 and np.array_equal(found.confusion.numpy(), table)
    ious, accuracies = [], []
    for k in range(classes):
        union = ((said == k) | (truth == k)).sum()
        ious.append(((said == k) & (truth == k)).sum() / union if union else math.nan)
        accuracies.append((said[truth == k] == k).mean() if (truth == k).any() else math.nan)
    assert found.iou == pytest.approx(ious, nan_ok=True) and found.accuracy == pytest.approx(accuracies, nan_ok=True)
    assert found.figures == pytest.approx(
        {"miou": np.nanmean(ious), "aacc": (said == truth).mean(), "macc": np.nanmean(accuracies)}
    )
    assert found.images == 3 and found.pixels == len(truth)
    if classes > 1:  # torchmetrics has no single class
        metric = MulticlassJaccardIndex(classes, ignore_index=IGNORE, average="macro")
        for pair in pairs:
            metric.update(pair[0].long()[None], pair[1].long()[None])
        assert float(metric.compute()) == pytest.approx(found.figures["miou"], abs=1e-6)


def test_a_class_that_is_said_and_never_true_counts_as_nothing_right():
    """It has an IoU of 0 and no accuracy; one that is neither is left out of both means."""
    said, truth = torch.tensor([[0, 0, 1, 1]], dtype=torch.uint8), torch.tensor([[0, 0, 0, IGNORE]], dtype=torch.uint8)
    found = judged([(said, truth)], 3)
    assert found.iou.tolist() == pytest.approx([2 / 3, 0, math.nan], nan_ok=True)
    assert found.accuracy.tolist() == pytest.approx([2 / 3, math.nan, math.nan], nan_ok=True)
    assert found.figures == pytest.approx({"miou": 1 / 3, "aacc": 2 / 3, "macc": 2 / 3})
    assert str(found) == "mIoU 33.3 % · pixel accuracy 66.7 % · class accuracy 66.7 %"


def test_without_labels_nothing_is_known():
    """Neither is a warning."""
    found = judged([(torch.zeros(2, 2, dtype=torch.uint8), torch.full((2, 2), IGNORE, dtype=torch.uint8))], 2)
    assert all(math.isnan(value) for value in found.figures.values()) and found.images == 1
    assert str(found) == "no labelled pixels to judge by"
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["miou"] is None


def test_json_has_every_class():
    found = judged(maps(4, absent=(2,)), 4).as_json()
    rows = found["per_class"]
    assert [row["name"] for row in rows] == ["c0", "c1", "c2", "c3"]
    assert rows[2] == {"name": "c2", "iou": None, "accuracy": None, "share": 0.0}
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert found.keys() == {"miou", "aacc", "macc", "images", "pixels", "per_class"}


def test_counts_of_images_of_any_layout():
    """Not contiguous, and a single pixel."""
    ((said, truth),) = maps(5, images=1)
    flipped = confusion_of(said.T, truth.T, 5)
    assert torch.equal(flipped, confusion_of(said, truth, 5)) and flipped.sum() == (truth != IGNORE).sum()
    assert confusion_of(said[:1, :1], torch.zeros(1, 1, dtype=torch.uint8), 5).sum() == 1


def batch_of(pairs):
    """Return a batch whose images hold their predictions."""
    batches = [
        SemanticBatch(
            images=said[None, None], labels=truth[None], sizes=torch.tensor([said.shape]), indices=torch.tensor([0])
        )
        for said, truth in pairs
    ]
    return SemanticBatch.joined(batches)


def test_an_evaluation_in_training_knows_what_all_images_together_give():
    """Padding is not judged, and the same is kept."""
    pairs, kept = maps(3, images=4), []
    evaluation = IoUOfHeldOut(launch(1, 1, "32"), lambda image: image[0], KNOWN, 4, kept.append)
    for start in (0, 2):
        evaluation.add(batch_of(pairs[start : start + 2]))
    values = evaluation.values()
    assert values == pytest.approx(judged(pairs, 3).figures) and tuple(values) == HEADLINE
    (found,) = kept
    assert found.images == 4 and torch.equal(found.confusion, judged(pairs, 3).confusion)
    assert found.classes == ("sky", "road", "a car, red")


@pytest.mark.parametrize(("rank", "counted"), [(0, 3), (2, 3)])
def test_counts_of_processes_are_added(monkeypatch, rank, counted):
    """One that has no share of three images is given one that another process has, and does not count it."""
    monkeypatch.setattr(segmentation_scores, "over_processes", lambda fabric, values, operation: 2 * values)
    kept = []
    evaluation = IoUOfHeldOut(SimpleNamespace(global_rank=rank), lambda image: image[0], KNOWN, 3, kept.append)
    evaluation.add(batch_of(maps(3)))
    evaluation.values()
    assert kept[0].images == 2 * counted
    assert torch.equal(kept[0].confusion, 2 * judged(maps(3)[:counted], 3).confusion)


class Noise:
    """A source of label maps in its own order of classes; the image is the map by the indices of `KNOWN`."""

    classes = (KNOWN[2], KNOWN[0])

    def __len__(self):
        return 4

    def name_of(self, index):
        return f"image {index}"

    def read_semantic(self, index):
        if index == 1:
            raise BadImage("is not an image")
        labels = torch.tensor([[0, 1, IGNORE], [1, 1, 0]], dtype=torch.uint8)
        return torch.tensor([2, 0], dtype=torch.uint8)[labels.clamp(max=1).long()][None], labels


def test_data_with_some_classes_in_another_order_are_judged_by_value_and_name():
    found, bad = judge(lambda image: image[0], SemanticSplit(Noise(), np.array([0, 1, 3])), KNOWN, workers=0)
    assert found.confusion.tolist() == [[6, 0, 0], [0, 0, 0], [0, 0, 4]]
    assert found.images == 2 and bad == (("image 1", "is not an image"),)
    assert SemanticViews(Noise(), np.arange(4))[0, 0].labels[0, 0, 2] == IGNORE
    assert set(translation(Noise.classes, KNOWN)[2:]) == {IGNORE}


@pytest.mark.parametrize("given", [(SemanticClass(3, "sky"),), (SemanticClass(0, "Sky"),)])
def test_unknown_classes_are_explained(given):
    check_classes("data", KNOWN[1:], KNOWN)
    with pytest.raises(
        UserError, match=f"'data' has classes .* e.g. {given[0].value} '{given[0].name}'; give .* 0 'sky"
    ):
        check_classes("data", given, KNOWN)


def test_results_are_written(tmp_path):
    """As JSON, as a table whose names may have commas, and as a picture."""
    found = Overlap(judged(maps(3), 3).confusion, tuple(one.name for one in KNOWN), 3)
    write_results(found, tmp_path / "out", data="streets", multi_scale=False)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["data"] == "streets" and results["miou"] == found.figures["miou"]
    with open(tmp_path / "out" / "confusion.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head[1:] == ["sky", "road", "a car, red"] == [row[0] for row in rows]
    assert [[int(count) for count in row[1:]] for row in rows] == found.confusion.tolist()
    with Image.open(tmp_path / "out" / "confusion.png") as picture:
        assert picture.format == "PNG" and np.asarray(picture.convert("L")).std() > 5
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another --out"):
        write_results(found, tmp_path / "file")


class Known(torch.nn.Module):
    """A segmenter that is always right about `Noise`."""

    channels, classes = 1, KNOWN

    def forward(self, image):
        return image[0]


def test_a_trained_segmenter_is_judged(tmp_path, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(
        segmentation_scores, "load_segmenter", lambda weights, multi_scale: opened.append(multi_scale) or Known()
    )
    split = SimpleNamespace(source=Noise(), members=np.arange(4), notes=("1 label has no image",))
    monkeypatch.setattr(segmentation_scores, "open_semantic_test", lambda data, channels: SemanticSplit(**vars(split)))
    found = evaluate_segmenter("runs/a", "streets", tmp_path / "out", multi_scale=True, workers=0)
    said = " ".join(capsys.readouterr().out.split())
    assert found.figures == {"miou": 1.0, "aacc": 1.0, "macc": 1.0} and opened == [True]
    assert "1 label has no image left out image 1: is not an image streets: 3 images with 15 labelled pixels" in said
    assert "mIoU 100.0 %" in said and "results.json, confusion.csv, confusion.png" in said
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["weights"], results["data"], results["multi_scale"]) == ("runs/a", "streets", True)
    split.members = np.array([1])
    with pytest.raises(UserError, match="none of 1 image can be read, e.g. image 1 is not an image"):
        evaluate_segmenter("runs/a", "streets", tmp_path / "none", workers=0)
