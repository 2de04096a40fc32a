"""`mirl detect` from end to end on tiny detectors: training, resuming, judging, finding, and what users get wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_classes import write_encoder
from tiny_detectors import TINY, write_coco
from tiny_runs import assert_one_line, command, finish, rows

import mirl
from mirl.cli import main
from mirl.data.instances import open_instances
from mirl.errors import UserError
from mirl.tasks.detection_scores import judge
from mirl.tasks.detector import load_detector
from mirl.tasks.weights import open_weights


@pytest.fixture(scope="module")
def trained(vit, tmp_path_factory):
    """A trained run; made once, not to be changed."""
    return mirl.detect(
        weights=vit, **TINY | {"report": True, "checkpoint_steps": 3}, out=tmp_path_factory.mktemp("trained") / "run"
    )


def test_a_run_leaves_what_it_promises(trained):
    assert {"config.yaml", "detector.safetensors", "results.json", "detections.json", "report.html"} <= {
        path.name for path in trained.iterdir()
    }
    assert {"augmented.png", "curves.png", "step_00000000.png", "step_00000006.png"} <= {
        path.name for path in (trained / "pictures").iterdir()
    }
    assert not {"run", "predict", "threshold", "onnx"} & yaml.safe_load((trained / "config.yaml").read_text()).keys()
    results = json.loads((trained / "results.json").read_text())
    assert results["images"] == 10 and len(results["per_class"]) == 10 and 0 <= results["box_ap"] <= 1
    last = rows(trained, "held_out")[-1]
    assert {name: last[name] for name in ("box_ap", "mask_ap")} == {
        name: results[name] for name in ("box_ap", "mask_ap")
    }
    steps = rows(trained)
    parts = ("rpn_class", "rpn_box", "box_class", "box", "mask")
    assert all(row["loss"] == pytest.approx(sum(row[name] for name in parts), rel=1e-5) for row in steps)
    assert np.mean([row["loss"] for row in steps[-3:]]) < np.mean([row["loss"] for row in steps[:3]])
    report = (trained / "report.html").read_text()
    for part in ("Average precision", "mirl detect --config", "load_detector"):
        assert part in report, part


def test_a_killed_run_equals_an_uninterrupted_one(trained, tmp_path):
    """Killed after its first epoch and gone on with, by the command line."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for name in ("detector.safetensors", "results.json", "checkpoints/step_00000006.pt"):
        (run / name).unlink()
    code, output, errors = finish(command({"out": run, "report": "false"}, "--resume", task="detect"))
    assert (code, errors) == (0, "") and "resumed at step 3 of 6" in output
    one, other = (load_file(folder / "detector.safetensors") for folder in (trained, run))
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
    one, other = (json.loads((folder / "results.json").read_text()) for folder in (trained, run))
    assert one == other


def test_a_complete_run_that_lost_its_results_gets_them_again(vit, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for name in ("detector.safetensors", "results.json", "detections.json"):
        (run / name).unlink()
    mirl.detect(out=run, resume=True, report=False)
    for name in ("results.json", "detections.json"):
        assert json.loads((run / name).read_text()) == json.loads((trained / name).read_text())


def test_nothing_that_can_be_read_is_no_evaluation(trained, tmp_path):
    root = write_coco(tmp_path / "coco")
    tables = [root / "annotations" / f"instances_{split}.json" for split in ("train", "val")]
    for path in tables:  # the detector's categories
        text = path.read_text().replace(
            '{"id": 7, "name": "b"}, {"id": 3, "name": "a"}', '{"id": 1, "name": "disk"}, {"id": 2, "name": "square"}'
        )
        path.write_text(
            text.replace('"category_id": 7', '"category_id": 1').replace('"category_id": 3', '"category_id": 2')
        )
    for path in (root / "images" / "val").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="none of 4 images can be read"):
        mirl.evaluate(weights=trained, data=str(root))


def test_a_run_cannot_go_on_with_other_categories(vit, tmp_path):
    root = write_coco(tmp_path / "coco")
    options = TINY | {"weights": vit, "data": str(root), "batch_size": 2, "epochs": 1, "out": tmp_path / "run"}
    mirl.detect(**options)
    for split in ("train", "val"):
        path = root / "annotations" / f"instances_{split}.json"
        path.write_text(path.read_text().replace('"name": "a"', '"name": "c"'))
    with pytest.raises(UserError, match="categories: not what the run began with"):
        mirl.detect(**options, resume=True)


def test_a_trained_detector_opens_anywhere(trained, tmp_path):
    shutil.copy(trained / "detector.safetensors", tmp_path / "moved.safetensors")
    detector, categories = load_detector(tmp_path / "moved.safetensors")
    assert [category.name for category in categories][:2] == ["disk", "square"] and categories[0].id == 1
    own, _ = load_detector(trained)
    images = [torch.rand(3, 40, 30), torch.rand(3, 32, 64)]
    with torch.inference_mode():
        for found, expected, image in zip(detector(images), own(images), images, strict=True):
            assert found["masks"].shape[1:] == image.shape[1:]
            assert all((found[name] == expected[name]).all() for name in expected)


def test_an_unfinished_run_is_opened_from_its_checkpoint(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "detector.safetensors").unlink()
    detector, categories = load_detector(run)
    assert "is not finished: using its checkpoint of step 6" in capsys.readouterr().out
    expected, _ = load_detector(trained)
    assert all(
        (a == b).all() for a, b in zip(detector.state_dict().values(), expected.state_dict().values(), strict=True)
    )
    assert len(categories) == 10


def test_predict_and_evaluate_from_the_command_line(trained, tmp_path, capsys):
    root = write_coco(tmp_path / "coco")
    assert main(["detect", str(trained), "--predict", str(root / "images"), "--threshold", "0.01",
                 "--out", str(tmp_path / "found")]) == 0  # fmt: skip
    table = json.loads((tmp_path / "found" / "predictions.json").read_text())
    assert len(table["images"]) == 8 and len(table["categories"]) == 10
    assert len(list((tmp_path / "found" / "overlays").rglob("*.png"))) == 8
    assert (
        main(["evaluate", "--weights", str(trained), "--data", "shapes:40:32", "--out", str(tmp_path / "judged")]) == 0
    )
    judged = json.loads((tmp_path / "judged" / "results.json").read_text())
    assert judged["images"] == 40 and "box AP" in capsys.readouterr().out
    with pytest.raises(UserError, match="does not know, e.g. 3 'a'"):
        mirl.evaluate(weights=trained, data=str(root))


def test_evaluating_what_the_run_was_judged_on_gives_its_figures(trained):
    _, val = open_instances(TINY["data"])
    detector, categories = load_detector(trained)
    judged, _, bad = judge(detector, val, categories, batch_size=3, workers=0)
    results = json.loads((trained / "results.json").read_text())
    assert judged.as_json() == {name: results[name] for name in judged.as_json()} and not bad


def test_the_backbone_as_onnx_equals_the_detectors(trained, tmp_path):
    assert_same_maps(trained, tmp_path / "backbone.onnx", strides=(2, 4, 8, 16, 32))


def assert_same_maps(run, path, strides):
    """Check that ONNX Runtime makes the same of three images as the run's detector."""
    onnxruntime = pytest.importorskip("onnxruntime")
    assert mirl.detect(str(run), onnx=str(path)) == path
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == [f"stride_{s}" for s in strides]
    images = torch.rand(3, 3, *session.get_inputs()[0].shape[2:])
    detector, _ = load_detector(run)
    with torch.inference_mode():
        expected = detector.backbone(images).values()
    for found, wanted in zip(session.run(None, {"images": images.numpy()}), expected, strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)


def test_overfit_trains_and_tests_on_the_same_images(vit, tmp_path):
    """There need be no others."""
    root = write_coco(tmp_path / "coco")
    (root / "annotations" / "instances_val.json").unlink()
    options = {"weights": vit, "data": str(root), "overfit": 3, "epochs": 1, "batch_size": 3}
    run = mirl.detect(**TINY | options, out=tmp_path / "run")
    assert json.loads((run / "results.json").read_text())["images"] == 3
    assert [row["samples"] for row in rows(run, "data")] == [3]  # of which the unusable are a share
    assert {found["image_id"] for found in json.loads((run / "detections.json").read_text())} <= {10, 20, 30}
    with pytest.raises(UserError, match="more than the 4 training images"):
        mirl.detect(**TINY | options | {"overfit": 5}, out=tmp_path / "other")


def test_windows_and_jitter_train_too(vit, tmp_path):
    options = {"protocol": "vitdet", "image_size": 64, "window": 3, "epochs": 1, "checkpointing": True}
    run = mirl.detect(weights=vit, **TINY | options, out=tmp_path / "run")
    detector, _ = load_detector(run)
    with torch.inference_mode():
        assert len(detector([torch.rand(3, 50, 30)])) == 1
    assert_same_maps(run, tmp_path / "backbone.onnx", strides=(2, 4, 8, 16, 32))


def test_grey_images_and_odd_category_numbers(tmp_path):
    vit = write_encoder(tmp_path / "grey", size=(32, 32), channels=1)
    root = write_coco(tmp_path / "coco", channels=1)
    run = mirl.detect(weights=vit, **TINY | {"data": str(root), "batch_size": 2, "epochs": 1}, out=tmp_path / "run")
    assert [row["category"] for row in json.loads((run / "results.json").read_text())["per_class"]] == [3, 7]
    found = json.loads((run / "detections.json").read_text())
    assert {result["category_id"] for result in found} <= {3, 7}
    assert {result["image_id"] for result in found} <= {10, 20, 30, 40}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--predict", "photos"], "need a trained run"),
        (["--weights", "RUN", "--threshold", "0.9"], "--threshold has no effect without --predict; add it, or leave"),
        (["RUN"], "give --predict or --onnx"),
        (["RUN", "--predict", "photos", "--epochs", "3"], "--epochs belongs to training"),
        (["RUN", "--predict", "photos", "--threshold", "2"], "--threshold 2.0 is not allowed"),
        (["RUN", "--predict", "nowhere"], "'nowhere' does not exist"),
        (["elsewhere", "--predict", "photos"], "elsewhere"),
    ],
)
def test_mistakes_with_a_trained_run(trained, arguments, message, capsys):
    assert main(["detect", *(str(trained) if word == "RUN" else word for word in arguments)]) == 2
    assert_one_line(2, capsys.readouterr().err, message)


def test_a_damaged_detector_is_one_line(trained, tmp_path):
    path = tmp_path / "detector.safetensors"
    path.write_bytes((trained / "detector.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        load_detector(path)
    with pytest.raises(UserError, match="holds no detector"):
        load_detector(Path(__file__).parent)


def test_a_detector_is_no_encoder(trained, vit):
    with pytest.raises(UserError, match=f"holds a detector; give the encoder that it was trained from, {vit}"):
        open_weights(str(trained))
