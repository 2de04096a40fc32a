"""What is found survives the way to COCO's format; a folder of images becomes pictures and an annotation file."""

import io
import json
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.mask import decode

from mirl.data.instances import Category
from mirl.data.shapes import Shapes
from mirl.data.sources import open_source
from mirl.errors import UserError
from mirl.tasks.average_precision import average_precision
from mirl.tasks.detections import coco_results, confident, predict_folder

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
CATEGORIES = (Category(3, "left"), Category(17, "right"))


def detect(images):
    """Find the bright part of each image, surely; and the whole image, hardly."""
    found = []
    for image in images:
        assert image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
        bright = image.mean(dim=0) > 0.5
        masks = torch.stack([bright, torch.ones_like(bright)])
        boxes = torch.tensor([edges(mask) for mask in masks], dtype=torch.float32)
        label = 1 if boxes[0, :2].sum() == 0 else 2
        kept = slice(0 if bright.any() else 1, 2)
        found.append({
            "boxes": boxes[kept], "labels": torch.tensor([label, 1])[kept], "masks": masks[kept],
            "scores": torch.tensor([0.9, 0.2])[kept],
        })  # fmt: skip
    return found


def edges(mask):
    rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
    if not len(rows):
        return [0, 0, 1, 1]
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def write(path, height=20, width=30, bright=(0, 10), mode="RGB"):
    """Write a dark image with bright columns."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, slice(*bright)] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def photos(tmp_path):
    """Images of several sizes and depths in nested folders, two of one stem, one damaged."""
    folder = tmp_path / "photos"
    write(folder / "a.png")
    write(folder / "a.bmp", 40, 50, (20, 50))
    write(folder / "sub" / "a.png", 25, 64, (5, 9), "L")
    write(folder / "sub" / "deeper" / "b.png", 30, 20, (0, 20))
    write(folder / "dark.png", bright=(0, 0))
    (folder / "sub" / "broken.jpg").write_bytes(b"no image")
    return folder


def run(photos, folder, **options):
    source = open_source(str(photos), channels=options.pop("channels", 3))
    return predict_folder(detect, source, CATEGORIES, folder, workers=0, **options)


def test_results_hold_boxes_masks_and_original_categories():
    mask = torch.zeros(2, 6, 8, dtype=torch.bool)
    mask[0, 1:3, 2:7] = True
    objects = {
        "boxes": torch.tensor([[2.0, 1, 7, 3], [0.1234567, 0, 8, 6]]), "labels": torch.tensor([2, 1]),
        "scores": torch.tensor([0.75, 1 / 3]), "masks": mask,
    }  # fmt: skip
    nothing = {name: values[:0] for name, values in objects.items()}
    first, second = json.loads(json.dumps(coco_results([nothing, objects], [5, 9], CATEGORIES)))
    assert first == {
        "image_id": 9, "category_id": 17, "bbox": [2, 1, 5, 2], "score": 0.75,
        "segmentation": {"size": [6, 8], "counts": first["segmentation"]["counts"]},
    }  # fmt: skip
    assert second["category_id"] == 3 and second["bbox"] == [0.123, 0, 7.877, 6]
    assert np.float32(second["score"]) == np.float32(1 / 3)
    assert np.array_equal(decode(first["segmentation"]), mask[0].numpy())
    assert not decode(second["segmentation"]).any()


def test_what_is_written_is_read_by_pycocotools(photos, tmp_path):
    """Its boxes, areas and masks are those of the images, and judged against themselves they are perfect."""
    found = run(photos, tmp_path / "out", batch_size=2)
    truth = json.loads(found.path.read_text())
    with redirect_stdout(io.StringIO()):
        coco = COCO(str(found.path))
    images = {image["file_name"]: image for image in coco.dataset["images"]}
    assert images.keys() == {"a.bmp", "a.png", "dark.png", "sub/a.png", "sub/deeper/b.png"}
    assert (images["a.bmp"]["height"], images["a.bmp"]["width"]) == (40, 50)
    assert coco.dataset["categories"] == [{"id": 3, "name": "left"}, {"id": 17, "name": "right"}]
    (row,) = coco.loadAnns(coco.getAnnIds(images["a.bmp"]["id"]))
    assert (row["bbox"], row["area"], row["category_id"], row["iscrowd"]) == ([20, 0, 30, 40], 1200, 17, 0)
    assert row["score"] == pytest.approx(0.9) and coco.annToMask(row).sum() == 1200
    assert [annotation["id"] for annotation in truth["annotations"]] == [1, 2, 3, 4]
    assert average_precision(truth, truth["annotations"]).figures["mask_ap"] == pytest.approx(1)
    assert not coco.getAnnIds(images["dark.png"]["id"])
    assert found.images == 5 and found.found == {"left": 2, "right": 2}


def test_each_image_has_a_picture(photos, tmp_path):
    run(photos, tmp_path / "out", batch_size=3)
    overlays = tmp_path / "out" / "overlays"
    names = {path.relative_to(overlays).as_posix() for path in overlays.rglob("*") if path.is_file()}
    assert names == {"a.png", "a-2.png", "dark.png", "sub/a.png", "sub/deeper/b.png"}
    for name in names:
        with Image.open(overlays / name) as picture:
            assert picture.mode == "RGB" and max(picture.size) >= 400
            assert (np.ptp(np.asarray(picture), axis=2).max() > 100) == (name != "dark.png")  # has colours


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_depths(photos, tmp_path, channels):
    assert run(photos, tmp_path / "out", channels=channels, batch_size=1).images == 5


def test_unreadable_files_are_named(photos, tmp_path, capsys):
    found = run(photos, tmp_path / "out")
    said = " ".join(capsys.readouterr().out.split())
    assert [name.endswith("sub/broken.jpg") for name, _ in found.bad] == [True]
    assert "broken.jpg: is not an image" in said
    assert "found 4 objects of score 0.5 or more in 4 of 5 images: right 2, left 2" in said
    ids = [image["id"] for image in json.loads(found.path.read_text())["images"]]
    assert len(set(ids)) == 5 and max(ids) == 6


def test_threshold_decides_what_is_kept(photos, tmp_path, capsys):
    low, none = (run(photos, tmp_path / f"{at}", threshold=at) for at in (0.1, 0.95))
    assert sum(low.found.values()) == 9 and none.found == {}
    assert json.loads(none.path.read_text())["annotations"] == []
    assert "found nothing of score 0.95 or more in 5 images" in capsys.readouterr().out
    kept = confident({"scores": torch.tensor([0.2, 0.5, 0.7]), "labels": torch.tensor([1, 2, 3])}, 0.5)
    assert kept["labels"].tolist() == [2, 3]


def test_lists_globs_and_built_in_images_have_names_too(photos, tmp_path):
    """Relative to what all images of the list have in common; no picture lies outside the folder of results."""
    (tmp_path / "lists").mkdir()
    listed = tmp_path / "lists" / "some.txt"
    listed.write_text(f"../photos/a.png\n{photos / 'sub' / 'a.png'}\n")
    for given, name in ((listed, "photos/sub/a.png"), (f"{photos}/sub/**/*.png", "deeper/b.png")):
        found = run(given, tmp_path / "out")
        assert name in {image["file_name"] for image in json.loads(found.path.read_text())["images"]}
        assert (tmp_path / "out" / "overlays" / name).is_file()
    found = predict_folder(detect, Shapes(3), CATEGORIES, tmp_path / "shapes", workers=0)
    assert [image["file_name"] for image in json.loads(found.path.read_text())["images"]] == [
        "000000", "000001", "000002"
    ]  # fmt: skip


def test_nothing_readable_and_nothing_writable_are_explained(photos, tmp_path):
    with pytest.raises(UserError, match="none of 1 image can be read, e.g. .*broken.jpg is not an image"):
        run(f"{photos}/sub/broken.jp*", tmp_path / "out")
    assert not (tmp_path / "out" / "predictions.json").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another --out"):
        run(photos, tmp_path / "file")


def test_predictions_of_others_are_kept_and_earlier_ones_replaced(photos, tmp_path):
    kept = tmp_path / "data" / "overlays" / "mine.png"
    kept.parent.mkdir(parents=True)
    kept.touch()
    with pytest.raises(UserError, match="has overlays that mirl detect --predict did not write; choose another --out"):
        run(photos / "sub" / "deeper", tmp_path / "data")
    run(photos, tmp_path / "out")
    run(photos / "sub" / "deeper", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "overlays").rglob("*")] == ["b.png"] and kept.exists()


def test_an_interrupted_run_keeps_the_earlier_files(photos, tmp_path):
    path = run(photos, tmp_path / "out").path
    before, pictures = path.read_text(), len(list(tmp_path.rglob("*.png")))

    def fail(images):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        predict_folder(fail, open_source(str(photos)), CATEGORIES, tmp_path / "out", workers=0)
    assert path.read_text() == before and len(list(tmp_path.rglob("*.png"))) == pictures
    assert {entry.name for entry in path.parent.iterdir()} == {"overlays", "predictions.json"}
