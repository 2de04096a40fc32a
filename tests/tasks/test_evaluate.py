"""A classifier is judged by what it says of each image, whichever of its classes the folders have and how they sort."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_classes import PATTERNS, pattern, write_encoder
from tiny_runs import assert_one_line

import mirl
from mirl.cli import main
from mirl.data.shapes import Shapes
from mirl.data.transforms import evaluation_view, standardise
from mirl.errors import UserError
from mirl.tasks.accuracy import Predictions, accuracy
from mirl.tasks.evaluate import CALIBRATION_BINS, judge
from mirl.tasks.weights import open_weights


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def shapes_classifier(tmp_path_factory):
    """A classifier of the shapes, in their own order, of random weights: it says several classes, mostly wrong ones."""
    return write_encoder(tmp_path_factory.mktemp("shapes") / "encoder", classes=Shapes.classes)


def mistake(**options):
    with pytest.raises(UserError) as caught:
        mirl.evaluate(**options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def random_predictions(count=400, classes=6, scale=2.0):
    random = np.random.default_rng(0)
    scores = scale * random.standard_normal((count, classes)).astype(np.float32)
    labels = np.where(random.random(count) < 0.4, scores.argmax(axis=1), random.integers(classes, size=count))
    return Predictions(scores, labels, np.arange(count), ())


def is_drawn(path):
    with Image.open(path) as picture:
        return picture.format == "PNG" and min(picture.size) > 100 and np.asarray(picture.convert("L")).std() > 5


def test_the_test_split_of_the_run_gives_the_runs_accuracy(classified, patterns, here):
    """`patterns` holds train/ and val/; the encoder's folder and the run are the same classifier."""
    result = mirl.evaluate(weights=classified, data=patterns, workers=0, batch_size=7)
    saved = json.loads((classified / "results.json").read_text())["weights"]
    assert (result.accuracy.top1, result.accuracy.per_class) == (saved["top1"], saved["per_class"])
    assert (list(result.accuracy.interval), result.accuracy.images) == (saved["interval"], 24)
    folder = classified / "evaluations" / "patterns"
    written = json.loads((folder / "results.json").read_text())
    assert written["accuracy"] == saved and written["data"] == patterns and written["weights"] == str(classified)
    assert written["confusion"] == result.confusion and is_drawn(folder / "confusion.png")
    assert mirl.evaluate(weights=str(classified / "encoder"), data=f"{patterns}/val", workers=0) == result
    assert (here / "evaluations" / "val" / "results.json").exists()
    assert {path.name for path in here.iterdir()} == {"evaluations"}


def test_data_of_the_same_name_do_not_replace_each_other(shapes_classifier, here, capsys):
    """A dot in a folder's name ends nothing; the same data again replace what was said of them."""
    for data in ("a/val", "b/val", "labelled.2023", "labelled.2024", "./a/val"):
        picture = here / data / "disk" / "0.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pattern("down", 1)).save(picture)
        mirl.evaluate(weights=shapes_classifier, data=data, workers=0)
    found = {path.parent.name: json.loads(path.read_text())["data"] for path in here.glob("evaluations/*/results.json")}
    expected = {"val": "./a/val", "val-2": "b/val", "labelled.2023": "labelled.2023", "labelled.2024": "labelled.2024"}
    assert found == expected
    assert "saved evaluations/val-2: results.json" in capsys.readouterr().out


def test_a_picture_that_cannot_be_written_is_one_line(shapes_classifier, here):
    (here / "found" / "confusion.png").mkdir(parents=True)
    message = mistake(weights=shapes_classifier, data="shapes:10:16", out="found", workers=0)
    assert message == "cannot write found/confusion.png: Is a directory; choose another --out"


def write_answers(weights, wrong, count=12):
    """Write `count` images, each to the folder of what the classifier says of it, the first `wrong` to another one's.

    Return the confusion matrix that follows.
    """
    opened = open_weights(weights)
    random = np.random.default_rng(0)
    images = random.integers(256, size=(count, 1, 1, 3), dtype=np.uint8).repeat(16, axis=1).repeat(16, axis=2)
    pixels = standardise(torch.from_numpy(images.transpose(0, 3, 1, 2)), opened.mean, opened.deviation)
    said = opened.build()(pixels).argmax(dim=1).tolist()
    assert len(set(said)) > 1
    confusion = np.zeros((len(opened.classes),) * 2, int)
    for index, number in enumerate(said):
        true = (number + (index < wrong)) % len(opened.classes)
        confusion[true, number] += 1
        folder = Path("data") / opened.classes[true]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index]).save(folder / f"{index:02}.png")
    return confusion.tolist()


def test_mistakes_are_counted_where_they_belong(shapes_classifier, here, capsys):
    confusion = write_answers(shapes_classifier, wrong=4)
    broken = next(Path("data").iterdir()) / "99.png"
    broken.write_bytes(b"not an image")
    assert main(["evaluate", f"--weights={shapes_classifier}", "--data=data", "--out=found", "--workers=0"]) == 0
    written = json.loads(Path("found/results.json").read_text())
    assert written["confusion"] == confusion
    assert written["accuracy"]["per_class"] == {
        name: row[number] / sum(row) for number, (name, row) in enumerate(zip(Shapes.classes, confusion, strict=True))
        if sum(row)
    }  # fmt: skip
    assert written["accuracy"]["top1"] == pytest.approx(8 / 12)
    assert is_drawn("found/confusion.png") and is_drawn("found/worst.png")
    output = capsys.readouterr().out
    assert f"data: 12 images of {len(list(Path('data').iterdir()))} classes" in output
    assert f"left out {broken}: is not an image" in output
    assert "top-1 66.67%" in output and "saved found: results.json, confusion.png, worst.png" in output


def test_without_a_mistake_there_is_no_picture_of_one(shapes_classifier, here, capsys):
    """Not of an earlier evaluation either."""
    write_answers(shapes_classifier, wrong=0)
    (here / "found").mkdir()
    (here / "found" / "worst.png").write_bytes(b"old")
    assert mirl.evaluate(weights=shapes_classifier, data="data", out="found", workers=0).accuracy.top1 == 1
    assert {path.name for path in (here / "found").iterdir()} == {"results.json", "confusion.png"}
    assert "saved found: results.json, confusion.png\n" in capsys.readouterr().out


def test_some_classes_in_another_order_are_the_same_classes(shapes_classifier, here):
    """Folders sort as cross, star, triangle; the classifier numbers them 4, 3, 2 of ten."""
    shapes = Shapes(60, size=(16, 16), split="val")
    chosen = {"triangle", "star", "cross"}
    for index in range(len(shapes)):
        sample = shapes.sample(index)
        folder = here / "data" / Shapes.classes[sample.label]
        if folder.name in chosen:
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(sample.image).save(folder / f"{index:03}.png")
    whole = mirl.evaluate(weights=shapes_classifier, data="shapes:60:16", workers=0)
    some = mirl.evaluate(weights=shapes_classifier, data="data", workers=0)
    assert len({np.argmax(row) for row in whole.confusion}) > 1  # it does not say one class of all
    for name, row, expected in zip(Shapes.classes, some.confusion, whole.confusion, strict=True):
        assert row == (expected if name in chosen else [0] * 10), name
    assert some.accuracy.per_class == {name: whole.accuracy.per_class[name] for name in whole.accuracy.per_class
                                       if name in chosen}  # fmt: skip
    assert sum(whole.confusion[0]) == 6 and some.accuracy.images == 18
    assert {path.name for path in (here / "evaluations").iterdir()} == {"shapes-60-16", "data"}
    assert is_drawn("evaluations/data/worst.png")


def test_large_images_are_judged_on_their_centre(here):
    """As while fine-tuning: seven eighths of the shorter side."""
    weights = write_encoder(here / "large", classes=Shapes.classes, size=(96, 96), patch=(16, 16))
    opened, source = open_weights(weights), Shapes(10, size=(128, 128), split="val")
    images = torch.stack([evaluation_view(source.read(index), (96, 96)) for index in range(10)])
    with torch.no_grad():
        scores = opened.build()(standardise(images, opened.mean, opened.deviation))
    found = mirl.evaluate(weights=weights, data="shapes:10:128", workers=0)
    assert found.confidence == pytest.approx(scores.softmax(dim=1).amax(dim=1).mean().item(), rel=1e-4)


def test_confusion_rows_sum_to_the_classes():
    found = random_predictions()
    result = judge(found, tuple("abcdef"))
    assert np.array_equal(np.sum(result.confusion, axis=1), np.bincount(found.labels))
    assert np.array_equal(np.sum(result.confusion, axis=0), np.bincount(found.scores.argmax(axis=1), minlength=6))
    assert np.trace(result.confusion) == round(result.accuracy.top1 * 400)


@pytest.mark.parametrize("scale", [0.1, 2.0, 30.0])  # 30: many probabilities are 1 in single precision
def test_calibration_is_the_gap_between_confidence_and_accuracy(scale):
    found = random_predictions(scale=scale)
    exponentials = np.exp(found.scores.astype(float))
    sure = (exponentials / exponentials.sum(axis=1, keepdims=True)).max(axis=1)
    right = found.scores.argmax(axis=1) == found.labels
    expected = 0.0
    for k in range(CALIBRATION_BINS):
        inside = (sure > k / CALIBRATION_BINS) & (sure <= (k + 1) / CALIBRATION_BINS)
        if inside.any():
            expected += inside.mean() * abs(sure[inside].mean() - right[inside].mean())
    result = judge(found, tuple("abcdef"))
    assert result.calibration_error == pytest.approx(expected, abs=1e-5)
    assert result.confidence == pytest.approx(sure.mean(), abs=1e-5)


def test_accuracy_is_what_was_counted():
    found = random_predictions(count=50)
    result = accuracy(found.scores, found.labels, "abcdef")
    ranks = [sorted(range(6), key=lambda k: -row[k]).index(label)
             for row, label in zip(found.scores.tolist(), found.labels, strict=True)]  # fmt: skip
    n, p, z = 50, np.mean([rank == 0 for rank in ranks]), 1.959964
    assert result.top1 == pytest.approx(p) and result.top5 == pytest.approx(np.mean([rank < 5 for rank in ranks]))
    middle, half = (p + z * z / (2 * n)), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert result.interval == pytest.approx(((middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)))
    for k, name in enumerate("abcdef"):
        of_class = [rank == 0 for rank, label in zip(ranks, found.labels, strict=True) if label == k]
        assert result.per_class[name] == pytest.approx(np.mean(of_class))
    assert accuracy(found.scores[:, :5], np.zeros(50, int), "abcde").top5 is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": None}, "--weights is missing; give a run folder of mirl finetune"),
        ({"weights": "nowhere"}, "'nowhere' is neither a file, a folder nor the name of a timm model"),
        ({"data": "nowhere"}, "'nowhere' does not exist"),
        ({"batch_size": 0}, "--batch_size 0 is not allowed; give 1 or more"),
        ({"workers": -1}, "--workers -1 is not allowed; give 0 or more"),
        ({"out": "a file/evaluation"}, "cannot write a file/evaluation/results.json: Not a directory"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(shapes_classifier, here, change, message):
    (here / "a file").touch()
    assert message in mistake(**{"weights": shapes_classifier, "data": "shapes:10:16", "workers": 0} | change)


def test_an_unknown_class_is_named(shapes_classifier, patterns, here):
    shutil.copytree(f"{patterns}/val", "data")
    Path("data/checks").rename("data/disk")
    message = "'data' has classes that the model does not know, e.g. 'across'; it knows 10: disk, square, triangle, "
    assert message in mistake(weights=shapes_classifier, data="data")


def test_weights_without_a_classifier_say_how_to_get_one(encoder, patterns, capsys):
    assert main(["evaluate", f"--weights={encoder}", f"--data={patterns}"]) == 2
    remedy = f"{encoder} has no classifier; make one with mirl finetune --weights {encoder}"
    assert_one_line(2, capsys.readouterr().err, remedy)


def test_images_of_which_none_can_be_read_are_one_line(shapes_classifier, here):
    (here / "data" / "disk").mkdir(parents=True)
    (here / "data" / "disk" / "0.png").write_bytes(b"not an image")
    message = mistake(weights=shapes_classifier, data="data", workers=0)
    assert message == "none of 1 image can be read, e.g. data/disk/0.png is not an image; check the data"


def test_names_are_drawn_as_they_are(here):
    """Names in which others would read formulas or markup."""
    names = ("$x_{$", "[bold]", "a$b$", *sorted(PATTERNS))
    weights = write_encoder(here / "odd", classes=names)
    for name in names:
        (here / "data" / name).mkdir(parents=True)
        Image.fromarray(pattern("down", 1)).save(here / "data" / name / "0.png")
    mirl.evaluate(weights=weights, data="data", out="found", workers=0)
    assert is_drawn("found/confusion.png") and is_drawn("found/worst.png")
