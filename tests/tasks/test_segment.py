"""`mirl segment` from end to end on tiny segmenters: training, resuming, judging, labelling, and users' mistakes."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tiny_classes import write_encoder
from tiny_runs import assert_one_line, rows
from tiny_segmenters import TINY, VALUES, break_some, refused, results_of, train, write_folder

import mirl
from mirl.cli import main
from mirl.data.semantic import SemanticClass, open_semantic_test
from mirl.errors import UserError
from mirl.tasks.segmenter import load_segmenter

SAME = "shapes:10:32"  # its test images are those that a run on TINY's data holds out


@pytest.fixture(scope="module")
def trained(vit, tmp_path_factory):
    """A trained run with all its pictures; made once, not to be changed."""
    options = {"epochs": 2, "evaluate_epochs": 2, "report": True, "checkpoint_steps": 3}
    return mirl.segment(weights=vit, **TINY | options, out=tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="module")
def flawed(vit, tmp_path_factory):
    """A run on a folder with five faults, whose classes have the values 3 and 7; made once, not to be changed."""
    root = write_folder(tmp_path_factory.mktemp("flawed") / "streets", train=12, val=3)
    break_some(root)
    options = {"weights": vit, "data": str(root), "batch_size": 4, "max_bad": 0.4}
    return train(**options, out=root.parent / "run")


def test_a_run_leaves_what_it_promises(trained):
    assert {"config.yaml", "segmenter.safetensors", "results.json", "confusion.csv", "confusion.png"} <= {
        path.name for path in trained.iterdir()
    }
    assert not {"run", "predict"} & yaml.safe_load((trained / "config.yaml").read_text()).keys()
    for name in ("augmented", "curves", "step_00000000", "step_00000006"):
        with Image.open(trained / "pictures" / f"{name}.png") as picture:
            assert np.asarray(picture).std() > 5, name
    results, last = results_of(trained), rows(trained, "held_out")[-1]
    assert {name: results[name] for name in ("miou", "aacc", "macc")} == {
        name: last[name] for name in ("miou", "aacc", "macc")
    }
    assert (results["images"], results["pixels"], len(results["per_class"])) == (10, 10 * 32 * 32, 11)
    header, *table = (trained / "confusion.csv").read_text().splitlines()
    assert header.startswith("true / said,background,disk") and len(table) == 11
    assert sum(int(count) for line in table for count in line.split(",")[1:]) == results["pixels"]
    report = (trained / "report.html").read_text()
    for part in ("mean IoU", "mirl segment --config", "load_segmenter"):
        assert part in report, part


def test_every_step_has_its_parts(trained):
    steps = rows(trained)
    assert [row["step"] for row in steps] == list(range(1, 7))
    for row in steps:
        assert row["loss"] == pytest.approx(row["decode"] + 0.4 * row["auxiliary"], rel=1e-5)
        assert 0 <= row["accuracy"] <= 1 and row["grad_norm"] > 0
    assert [row["samples"] for row in rows(trained, "data")] == [34]  # 24 to train on, 10 held out
    first, last = rows(trained, "held_out")
    assert (first["step"], last["step"]) == (0, 6) and last["aacc"] > first["aacc"]


def test_a_killed_run_equals_an_uninterrupted_one(trained, tmp_path, capsys):
    """Killed after its first epoch."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for name in ("segmenter.safetensors", "results.json", "checkpoints/step_00000006.pt"):
        (run / name).unlink()
    train(out=run, resume=True, epochs=None)
    assert "resumed at step 3 of 6" in capsys.readouterr().out
    one, other = (load_file(folder / "segmenter.safetensors") for folder in (trained, run))
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
    assert results_of(run) == results_of(trained)
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(trained)]


def test_a_complete_run_that_lost_its_results_gets_them_again(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for name in ("segmenter.safetensors", "results.json", "confusion.csv"):
        (run / name).unlink()
    train(out=run, resume=True, epochs=None)
    for name in ("results.json", "confusion.csv"):
        assert (run / name).read_text() == (trained / name).read_text()


def test_a_run_cannot_go_on_as_another(vit, flawed, tmp_path):
    """Neither with another crop nor with other classes."""
    run, root = tmp_path / "run", tmp_path / "streets"
    shutil.copytree(flawed, run)
    shutil.copytree(flawed.parent / "streets", root)
    going_on = {"out": run, "resume": True, "epochs": None, "batch_size": None, "data": None}
    refused("started with --crop_size 48, and going on cannot change it to 32", **going_on, crop_size=32)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(flawed.parent / "streets"), str(root)))
    (root / "classes.json").write_text(json.dumps(VALUES | {"other": 8}))
    refused("classes: not what the run began with", **going_on)


def test_faults_of_a_folder_are_named_and_counted(flawed):
    log = (flawed / "log.txt").read_text()
    for part in ("train/00.png: has no label", "train/01.png: is 40x48 px, but its label", "01.png' is 20x20 px",
                 "train/02.png: has a label that cannot be used", "holds 5, which is neither void",
                 "train/03.png: is not an image", "val/01.png: is empty"):  # fmt: skip
        assert part in log, part
    assert len([row for row in rows(flawed, "incident") if row["what"] == "unusable file"]) == 5
    assert [row["samples"] for row in rows(flawed, "data")] == [15]
    results = results_of(flawed)
    assert (results["images"], results["pixels"]) == (2, 2 * 38 * 48)  # two rows of each are void
    assert [row["name"] for row in results["per_class"]] == ["ground", "square"]


def test_too_many_faults_stop_the_run(vit, flawed, tmp_path):
    data = str(flawed.parent / "streets")
    refused(r"of 15 files cannot be used, more than --max_bad 0\.1; mend the files listed in \S*unusable.txt",
            weights=vit, data=data, batch_size=4, out=tmp_path / "run")  # fmt: skip


def test_predict_writes_values_that_open_again_as_labels(flawed, tmp_path, capsys):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    random = np.random.default_rng(0)
    sizes = {"a": (33, 47, 3), "grey": (20, 30), "tiny": (5, 3, 3), "long": (12, 150, 3)}
    for name, size in sizes.items():
        Image.fromarray(random.integers(0, 256, size, dtype=np.uint8)).save(photos / f"{name}.png")
    assert main(["segment", str(flawed), "--predict", str(photos), "--out", str(out), "--workers", "0"]) == 0
    assert "segmented 4 images" in capsys.readouterr().out
    shutil.copytree(photos, out / "images")
    split, segmenter = open_semantic_test(str(out)), load_segmenter(flawed)
    assert split.source.classes == segmenter.classes == (SemanticClass(3, "ground"), SemanticClass(7, "square"))
    for index in range(len(split)):
        image, labels = split.source.read_semantic(index)
        assert torch.equal(labels, segmenter(image))
        name = split.source.name_of(index).rsplit("/")[-1]
        with Image.open(out / "labels" / name) as picture:
            assert np.array_equal(np.asarray(picture), np.array([3, 7])[labels])
    assert len(split) == 4 and {path.name for path in (out / "overlays").iterdir()} == {f"{n}.png" for n in sizes}


def test_a_trained_segmenter_opens_anywhere(trained, tmp_path, capsys):
    """From its file, under any name, and from a run that is not finished."""
    image = torch.randint(256, (3, 40, 70), dtype=torch.uint8)
    expected = mirl.load_segmenter(trained)
    shutil.copy(trained / "segmenter.safetensors", tmp_path / "moved.safetensors")
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "segmenter.safetensors").unlink()
    for segmenter in (load_segmenter(tmp_path / "moved.safetensors"), load_segmenter(run)):
        assert segmenter.classes == expected.classes and segmenter.inference == expected.inference
        own, other = segmenter.model.state_dict(), expected.model.state_dict()
        assert own.keys() == other.keys() and all((own[name] == other[name]).all() for name in own)
        assert torch.equal(segmenter(image), expected(image)) and not segmenter.model.training
    assert "is not finished: using its checkpoint of step 6" in capsys.readouterr().out
    assert [one.name for one in expected.classes][:2] == ["background", "disk"]


def test_a_damaged_segmenter_is_one_line(trained, tmp_path):
    path = tmp_path / "segmenter.safetensors"
    path.write_bytes((trained / "segmenter.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="segmenter.safetensors cannot be read"):
        load_segmenter(path)


def test_a_segmenter_is_no_encoder(trained, vit, tmp_path):
    message = f"holds a segmenter; give the encoder that it was trained from, {vit}"
    for weights in (trained, trained / "segmenter.safetensors"):
        with pytest.raises(UserError, match=message):
            mirl.finetune(weights=weights, data="shapes:20:32", out=tmp_path / "run")
        with pytest.raises(UserError, match=message):
            mirl.pretrain(weights=weights, data="shapes:20:32", out=tmp_path / "run")
        refused(message, weights=weights, out=tmp_path / "run")


def test_evaluating_what_the_run_was_judged_on_gives_its_figures(trained, tmp_path, capsys):
    arguments = ["--weights", str(trained), "--data", SAME, "--out", str(tmp_path / "judged"), "--workers", "0"]
    assert main(["evaluate", *arguments]) == 0
    expected, judged = results_of(trained), results_of(tmp_path / "judged")
    assert {name: judged[name] for name in expected if name != "data"} == {
        name: value for name, value in expected.items() if name != "data"
    }
    assert (tmp_path / "judged" / "confusion.csv").read_text() == (trained / "confusion.csv").read_text()
    assert f"{SAME}: 10 images with 10,240 labelled pixels" in capsys.readouterr().out


def test_only_segmenters_are_judged_at_several_scales(tmp_path):
    classifier = write_encoder(tmp_path / "classifier", classes=("a", "b"))
    with pytest.raises(UserError, match="--multi_scale is for segmenters, and .* is none; leave it out"):
        mirl.evaluate(weights=classifier, data="shapes:10:16", multi_scale=True)


def test_a_segmenter_is_judged_on_what_it_knows(trained, flawed, tmp_path):
    root = write_folder(tmp_path / "streets")
    with pytest.raises(UserError, match="does not know, e.g. 3 'ground'; .* e.g. 0 'background'"):
        mirl.evaluate(weights=trained, data=str(root))
    for path in (root / "images" / "val").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="none of 2 images can be read, e.g. .*00.png is not an image"):
        mirl.evaluate(weights=flawed, data=str(root), workers=0)


def test_some_of_its_classes_are_the_same_classes(flawed, tmp_path):
    """Squares alone have a label: the first class of the data is the second of the segmenter."""
    root = write_folder(tmp_path / "streets", classes={"square": 7, "void_index": [3, 9]})
    found = mirl.evaluate(weights=flawed, data=str(root), workers=0, out=tmp_path / "judged")
    assert found.classes == ("ground", "square")
    assert found.confusion.sum(1).tolist() == [0, found.pixels] and found.pixels > 2 * 24 * 20


def test_whole_images_and_several_scales(vit, tmp_path):
    run = train(weights=vit, inference="whole", multi_scale=True, out=tmp_path / "run")
    results = results_of(run)
    judged = mirl.evaluate(weights=run, data=SAME, multi_scale=True, workers=0, out=tmp_path / "judged")
    assert judged.as_json() == results["multi_scale"]
    single = mirl.evaluate(weights=run, data=SAME, workers=0, out=tmp_path / "single").as_json()
    assert single == {name: results[name] for name in single} != judged.as_json()
    assert load_segmenter(run).inference.mode == "whole"


def test_overfit_trains_and_tests_on_the_same_images(vit, tmp_path):
    """There need be no others."""
    root = write_folder(tmp_path / "streets", train=4, val=0)
    options = {"weights": vit, "data": str(root), "batch_size": 3, "overfit": 3, "multi_scale": True}
    run = train(**options, epochs=2, evaluate_epochs=1, out=tmp_path / "run")
    assert results_of(run)["images"] == results_of(run)["multi_scale"]["images"] == 3
    assert [row["samples"] for row in rows(run, "data")] == [3]  # of which the unusable are a share
    assert [row["step"] for row in rows(run)] == [1, 2]
    refused("more than the 4 training images", **options | {"overfit": 5}, out=tmp_path / "other")


def test_relative_positions_train_and_open_again(vit, tmp_path):
    run = train(weights=vit, relative_positions=True, out=tmp_path / "run")
    found = mirl.evaluate(weights=run, data=SAME, workers=0, out=tmp_path / "judged").as_json()
    assert found == {name: results_of(run)[name] for name in found}
    segmenter = load_segmenter(run)
    tables = [v for name, v in segmenter.model.named_parameters() if name.endswith("relative_position_bias_table")]
    assert len(tables) == 2 and all(table.any() for table in tables)  # zero before training
    assert segmenter(torch.zeros(3, 90, 50, dtype=torch.uint8)).shape == (90, 50)
    refused("not of whole images; leave --inference whole out", weights=vit, relative_positions=True, inference="whole",
            out=tmp_path / "other")  # fmt: skip


def test_a_complete_run_keeps_its_results(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "results.json").write_text('{"kept": true}')
    train(out=run, resume=True, epochs=None)
    assert results_of(run) == {"kept": True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--predict", "photos"], "need.* a trained run; give it first"),
        (["RUN"], "give --predict with the run .*, or --weights"),
        (["RUN", "--predict", "photos", "--epochs", "3"], "--epochs belongs to training"),
        (["RUN", "--predict", "photos", "--crop_size", "64"], "--crop_size belongs to training"),
        (["RUN", "--predict", "nowhere"], "'nowhere' does not exist"),
        (["elsewhere", "--predict", "photos"], "elsewhere holds no segmenter; give a run folder of mirl segment"),
    ],
)  # fmt: skip
def test_mistakes_with_a_trained_run(trained, arguments, message, capsys):
    assert main(["segment", *(str(trained) if word == "RUN" else word for word in arguments)]) == 2
    assert_one_line(2, capsys.readouterr().err, message)
