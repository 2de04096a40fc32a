"""A folder of images becomes label files that hold the classes' values, pictures, and a file that explains them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mirl.data.semantic import SemanticClass, open_semantic_test
from mirl.data.shapes import Shapes
from mirl.data.sources import open_source
from mirl.errors import UserError
from mirl.tasks.label_maps import predict_folder
from mirl.training.overlays import colour

CLASSES = (SemanticClass(4, "dark"), SemanticClass(0, "bright"), SemanticClass(200, "never"))


def segment(image):
    """Say of each pixel whether it is bright."""
    assert image.dtype == torch.uint8 and image.ndim == 3
    return (image[0] > 127).to(torch.uint8)


def write(path, height=20, width=30, bright=10, mode="RGB"):
    """Write a dark image whose first columns are bright."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, :bright] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def photos(tmp_path):
    """Images of several sizes and depths in nested folders, two of one stem, one damaged."""
    folder = tmp_path / "photos"
    write(folder / "a.png")
    write(folder / "a.bmp", 40, 50, 25)
    write(folder / "sub" / "a.png", 25, 64, 32, "L")
    write(folder / "sub" / "deeper" / "b.png", 30, 20, 0)
    (folder / "sub" / "broken.jpg").write_bytes(b"no image")
    return folder


def run(photos, folder, channels=3):
    return predict_folder(segment, open_source(str(photos), channels=channels), CLASSES, folder, workers=0)


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_labels_hold_values_and_colours(photos, tmp_path):
    """As large as the image, with the classes' colours as a palette; both folders keep the images' own."""
    found = run(photos, tmp_path / "out")
    labels, overlays = tmp_path / "out" / "labels", tmp_path / "out" / "overlays"
    assert found.path == tmp_path / "out"
    assert files(labels) == files(overlays) == {"a.png", "a-2.png", "sub/a.png", "sub/deeper/b.png"}
    with Image.open(labels / "sub" / "a.png") as picture:
        assert picture.mode == "P" and picture.size == (64, 25)
        assert np.array_equal(np.asarray(picture), np.where(np.arange(64) < 32, 0, 4)[None].repeat(25, 0))
        tones = np.asarray(picture.convert("RGB"))
    assert tuple(tones[0, 0]) == colour(2) and tuple(tones[0, -1]) == colour(1)
    with Image.open(overlays / "sub" / "a.png") as picture:
        assert picture.mode == "RGB" and max(picture.size) >= 400
        assert np.ptp(np.asarray(picture), axis=2).min() > 20  # every pixel is painted


def test_what_the_labels_mean_is_said(photos, tmp_path):
    run(photos, tmp_path / "out")
    known = json.loads((tmp_path / "out" / "classes.json").read_text())["classes"]
    assert [(row["index"], row["name"]) for row in known] == [(4, "dark"), (0, "bright"), (200, "never")]
    assert known[0]["color"] == list(colour(1))


def test_shares_and_unreadable_files_are_told(photos, tmp_path, capsys):
    found = run(photos, tmp_path / "out")
    said = " ".join(capsys.readouterr().out.split())
    bright = 10 * 20 + 25 * 40 + 32 * 25
    whole = 20 * 30 + 40 * 50 + 25 * 64 + 30 * 20
    assert found.images == 4 and found.shares == pytest.approx({"dark": 1 - bright / whole, "bright": bright / whole})
    assert list(found.shares) == ["dark", "bright"]
    assert [name.endswith("sub/broken.jpg") for name, _ in found.bad] == [True]
    assert "broken.jpg: is not an image" in said
    assert "segmented 4 images: dark 58.3 %, bright 41.7 %" in said


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_depths(photos, tmp_path, channels):
    assert run(photos, tmp_path / "out", channels=channels).images == 4


def test_of_many_classes_the_most_frequent_are_named(tmp_path, capsys):
    classes = [SemanticClass(k, f"c{k}") for k in range(255)]
    found = predict_folder(lambda image: image[0].clamp(max=254), Shapes(3), classes, tmp_path / "shapes", workers=0)
    assert files(tmp_path / "shapes" / "labels") == {"000000.png", "000001.png", "000002.png"}
    assert f"and {len(found.shares) - 8} more classes" in capsys.readouterr().out
    assert sum(found.shares.values()) == pytest.approx(1)
    with Image.open(tmp_path / "shapes" / "labels" / "000000.png") as picture:
        assert np.array_equal(np.asarray(picture), Shapes(3).read(0)[0].clamp(max=254).numpy())


def test_nothing_readable_and_nothing_writable_are_explained(photos, tmp_path):
    with pytest.raises(UserError, match="none of 1 image can be read, e.g. .*broken.jpg is not an image"):
        run(f"{photos}/sub/broken.jp*", tmp_path / "out")
    assert not (tmp_path / "out" / "labels").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another --out"):
        run(photos, tmp_path / "file")


def test_labels_of_others_are_kept_and_earlier_predictions_replaced(photos, tmp_path):
    """Data in the documented layout are not predicted over; a second folder does not mix with the first."""
    write(tmp_path / "data" / "labels" / "b.png", 30, 20, 0)
    kept = (tmp_path / "data" / "labels" / "b.png").read_bytes()
    with pytest.raises(UserError, match="has labels that mirl segment --predict did not write; choose another --out"):
        run(photos / "sub" / "deeper", tmp_path / "data")
    assert (tmp_path / "data" / "labels" / "b.png").read_bytes() == kept
    run(photos, tmp_path / "out")
    run(photos / "sub" / "deeper", tmp_path / "out")
    assert files(tmp_path / "out" / "labels") == files(tmp_path / "out" / "overlays") == {"b.png"}


def test_what_was_written_is_read_again_as_labels(photos, tmp_path):
    """Beside the images, in the order of values."""
    found = run(photos / "sub" / "deeper", tmp_path / "out")
    write(tmp_path / "out" / "images" / "b.png", 30, 20, 0)
    split = open_semantic_test(str(found.path))
    _, labels = split.source.read_semantic(0)
    assert split.source.classes == tuple(sorted(CLASSES, key=lambda one: one.value)) and (labels == 1).all()


def test_overlays_of_large_photographs_are_reduced(tmp_path):
    write(tmp_path / "photos" / "wide.png", 8, 4000, 2000)
    run(tmp_path / "photos", tmp_path / "out")
    for name, width in (("labels", 4000), ("overlays", 2048)):
        with Image.open(tmp_path / "out" / name / "wide.png") as picture:
            assert picture.width == width
