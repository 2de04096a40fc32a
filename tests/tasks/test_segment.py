"""`mirl segment` from end to end on tiny segmenters: training, resuming, judging, labelling, and users' mistakes."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_classes import write_encoder
from tiny_runs import assert_one_line, rows, without_pictures

import mirl
from mirl.cli import main
from mirl.data.loading import collate
from mirl.data.semantic import SemanticBatch, SemanticClass, open_semantic, open_semantic_test
from mirl.errors import UserError
from mirl.tasks.segmentation import AUXILIARY, SegmentTask
from mirl.tasks.segmentation_scores import IoUOfHeldOut
from mirl.tasks.segmenter import load_segmenter
from mirl.tasks.settings.segmentation import Segmentation, resolve_segmentation
from mirl.tasks.weights import open_weights
from mirl.training import processes
from mirl.training.runs import RunFolder
from mirl.training.steps import Accumulator

TINY = {
    "data": "shapes:24:32", "epochs": 1, "batch_size": 8, "width": 16, "precision": "32", "workers": 0,
    "base_lr": 4e-3, "report": False,
}  # fmt: skip
SAME = "shapes:10:32"  # its test images are those that a run on TINY's data holds out
VALUES = {"ground": 3, "square": 7, "void_index": 9}


def train(**options):
    """Train without pictures, which take longer than all else."""
    with without_pictures():
        return mirl.segment(**TINY | options)


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


def write_folder(root, *, train=4, val=2, classes=VALUES):
    """Write bright squares on dark ground, 40x48 px, with labels; return the folder."""
    random = np.random.default_rng(0)
    for split, count in {"train": train, "val": val}.items():
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            pixels, labels = np.full((40, 48, 3), 30, np.uint8), np.full((40, 48), 3, np.uint8)
            y, x = random.integers(0, 16, 2)
            pixels[y : y + 24, x : x + 24], labels[y : y + 24, x : x + 24] = 220, 7
            labels[:2] = 9
            Image.fromarray(pixels).save(root / "images" / split / f"{number:02}.png")
            Image.fromarray(labels).save(root / "labels" / split / f"{number:02}.png")
    (root / "classes.json").write_text(json.dumps(classes))
    return root


def break_some(root):
    """Spoil four pairs to train on and one to judge on."""
    labels = root / "labels" / "train"
    (labels / "00.png").unlink()
    Image.fromarray(np.full((20, 20), 3, np.uint8)).save(labels / "01.png")
    Image.fromarray(np.full((40, 48), 5, np.uint8)).save(labels / "02.png")
    (root / "images" / "train" / "03.png").write_bytes(b"no image")
    (root / "images" / "val" / "01.png").write_bytes(b"")


def task_of(vit, **options):
    """Return the task that `mirl segment` would run with these options."""
    given, weights = Segmentation(**TINY | {"weights": vit} | options), open_weights(vit)
    train, val = open_semantic(given.data)
    settings = resolve_segmentation(
        given, images=len(train), shorter_side=32, depth=weights.depth, width=48, patch_size=8, gpu=False, devices=1,
        precision="32",
    )  # fmt: skip
    return SegmentTask(settings, weights, train, val)


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def refused(match, **options):
    """Check that training is a mistake that is said in one line."""
    with pytest.raises(UserError, match=match) as caught:
        train(**options)
    assert "\n" not in str(caught.value)


def test_a_run_leaves_what_it_promises(trained):
    assert {"config.yaml", "segmenter.safetensors", "results.json", "confusion.csv", "confusion.png"} <= {
        path.name for path in trained.iterdir()
    }
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


def test_the_summary_says_what_was_chosen(vit):
    text = "\n".join(task_of(vit, epochs=2, relative_positions=True).summary())
    for part in ("24 images to train on, 10 to test, 11 classes", "ViT of 2 blocks, positions absolute and relative",
                 "decoder 16 wide", "crops of 32 px", "windows of 32 px every 21", "2 epochs of 3 steps",
                 "peak rate 0.002", "layer decay 0.65", "drop path 0.1"):  # fmt: skip
        assert part in text, part


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
    going_on = {"out": run, "resume": True, "epochs": None, "batch_size": None, "data": "shapes"}
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


@pytest.mark.parametrize(("rank", "images"), [(1, 1), (2, 0)])
def test_a_process_without_a_share_judges_nothing(rank, images):
    """Of two held-out images the third process is given the first too; another found one image with four pixels."""
    fabric = SimpleNamespace(global_rank=rank, device="cpu", all_reduce=lambda values, reduce_op: values + 1)
    classes, kept = (SemanticClass(0, "a"), SemanticClass(1, "b")), []
    evaluation = IoUOfHeldOut(fabric, lambda image: image[0], classes, 2, kept.append)
    picture, size = torch.zeros(1, 1, 4, 5, dtype=torch.uint8), torch.tensor([[4, 5]])
    evaluation.add(SemanticBatch(images=picture, labels=picture[0], sizes=size, indices=torch.tensor([0])))
    evaluation.values()
    assert (kept[0].images, kept[0].pixels) == (1 + images, 4 + 20 * images)


def test_what_cannot_be_learned_or_judged_is_refused(vit, tmp_path):
    root = write_folder(tmp_path / "one", classes={"square": 7, "void_index": [3, 9]})
    refused("has a single class, 'square'; list two or more", weights=vit, data=str(root), batch_size=4,
            out=tmp_path / "run")  # fmt: skip
    root = write_folder(tmp_path / "void")
    for path in (root / "labels" / "val").iterdir():
        Image.new("L", (48, 40), 255).save(path)
    refused("no pixel of the .* held-out images has a label", weights=vit, data=str(root), batch_size=4,
            out=tmp_path / "run")  # fmt: skip
    refused("--overfit tests on the training images; leave out --val_fraction", weights=vit, data=str(root), overfit=2,
            val_fraction=0.2, out=tmp_path / "run")  # fmt: skip


def test_a_complete_run_keeps_its_results(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "results.json").write_text('{"kept": true}')
    train(out=run, resume=True, epochs=None)
    assert results_of(run) == {"kept": True}


def test_how_a_batch_is_cut_changes_no_gradient(vit, tmp_path):
    """But for drop path and dropout, which draw numbers of each micro-batch."""
    fabric, run = processes.launch("auto", 1, "32"), RunFolder(tmp_path / "run", resume=False, overwrite=False)
    steps = []
    for size in (6, 4, 1):
        task = task_of(vit)
        model, optimizer = fabric.setup(task.model.eval(), task.optimizer())
        batch = collate([task.training[0, i] for i in range(6)])
        accumulator = Accumulator(fabric, task, model, optimizer, None, run)
        steps.append(accumulator.step(batch.pieces(size), (0,), number=1, by_block=True))
    run.close()
    for step in steps[1:]:
        assert step.means == pytest.approx(steps[0].means, rel=1e-5)
        assert [step.norm, *step.blocks] == pytest.approx([steps[0].norm, *steps[0].blocks], rel=1e-4)


def test_untrained_takes_no_weights_and_the_same_rate_for_all_layers(vit):
    trained, fresh = task_of(vit), task_of(vit, untrained=True)
    assert (trained.settings.layer_decay, fresh.settings.layer_decay) == (0.65, 1.0)
    weights = open_weights(vit).state["blocks.1.mlp.fc1.weight"]
    assert (trained.encoder.blocks[1].mlp.fc1.weight == weights).all()
    assert not (fresh.encoder.blocks[1].mlp.fc1.weight == weights).any()
    assert "nothing of the encoder's weights" in "\n".join(fresh.summary())


def test_rates_decay_below_the_heads_and_fall_evenly(vit):
    task = task_of(vit, layer_decay=0.5, epochs=12, warmup_epochs=2.0)
    scales = {id(p): group.get("lr_scale", 1.0) for group in task.optimizer().param_groups for p in group["params"]}
    model = task.model
    assert len(scales) == len(list(model.parameters()))
    blocks, patches = model.encoder.blocks, model.encoder.patch_embed
    parts = [blocks[1].mlp.fc1, blocks[0].mlp.fc1, patches.proj, model.classifier[-1], model.auxiliary[0]]
    assert [scales[id(part.weight)] for part in parts] == [0.5, 0.25, 0.125, 1.0, 1.0]
    peak = task.settings.peak_rate
    assert peak == 4e-3 * 8 / 16
    assert [task.rate(epoch) / peak for epoch in (0, 1, 2, 4.5, 12)] == pytest.approx([0, 0.5, 1, 0.75, 0])


def test_the_loss_is_what_upernets_protocol_sums(vit):
    task = task_of(vit)
    task.model.eval()
    values = task.loss(task.model, task.example(3))
    assert AUXILIARY == 0.4 and values.keys() == {"loss", "decode", "auxiliary", "accuracy"}
    torch.testing.assert_close(values["loss"], values["decode"] + 0.4 * values["auxiliary"])
    assert all(value.shape == (3,) for value in values.values())


@pytest.mark.parametrize(
    ("options", "facts", "chosen"),
    [
        ({}, {"shorter_side": 360}, {"image_size": 360, "crop_size": 384, "stride": 256, "width": 384}),
        ({}, {"shorter_side": 2000}, {"image_size": 512, "crop_size": 512, "stride": 341}),
        ({}, {"shorter_side": 360, "patch_size": 8}, {"image_size": 256, "crop_size": 256}),
        ({"patch_size": 8}, {"shorter_side": 360}, {"image_size": 256, "crop_size": 256, "patch_size": 8}),
        ({"image_size": 600}, {}, {"image_size": 600, "crop_size": 512}),
        ({"crop_size": 128}, {}, {"image_size": 480, "crop_size": 128, "stride": 85}),
        ({}, {"shorter_side": 5}, {"image_size": 16, "crop_size": 32}),
        ({"data": "shapes"}, {"shorter_side": 96}, {"image_size": 96, "crop_size": 96, "width": 64, "epochs": 12}),
        ({}, {}, {"epochs": 127, "batch_size": 16, "layer_decay": 0.65, "drop_path": 0.1}),
        ({}, {"images": 20_210}, {"base_lr": pytest.approx(2e-4, rel=1e-3)}),
        ({}, {"images": 2021}, {"base_lr": pytest.approx(2e-4 * 10**0.5, rel=1e-2)}),  # a tenth of the steps
        ({"overfit": 20}, {"images": 20}, {"epochs": 500, "base_lr": 1e-3, "layer_decay": 1.0, "drop_path": 0.0}),
        ({"overfit": 20, "batch_size": 5}, {"images": 20}, {"epochs": 125}),
        ({}, {"depth": 48}, {"layer_decay": 0.89, "drop_path": 0.2}),
        ({"untrained": True}, {"depth": 48}, {"layer_decay": 1.0, "drop_path": 0.2}),
        ({"untrained": True, "layer_decay": 0.5, "drop_path": 0.0}, {}, {"layer_decay": 0.5, "drop_path": 0.0}),
        ({"batch_size": 2, "base_lr": 8e-4}, {}, {"peak_rate": 1e-4}),
        ({}, {"images": 20210}, {"warmup_epochs": pytest.approx(1.1875, abs=1e-3)}),
        ({}, {"images": 100}, {"warmup_epochs": pytest.approx(12.7)}),
        ({}, {"gpu": False}, {"micro_batch": 13}),
    ],
)  # fmt: skip
def test_what_is_not_given_is_chosen(options, facts, chosen):
    known = {"images": 1000, "shorter_side": 480, "depth": 12, "width": 384, "patch_size": 16, "gpu": True,
             "devices": 1, "precision": "32"}  # fmt: skip
    resolved = resolve_segmentation(Segmentation(**{"weights": "x", "data": "photos"} | options), **known | facts)
    assert {name: getattr(resolved, name) for name in chosen} == chosen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": None}, "--weights is missing"),
        ({"data": "/no/where"}, "does not exist.* give a folder with images/ and labels/, or shapes"),
        ({"crop_size": 50}, "--crop_size 50 is no multiple of 16, two patches' sides; .* 48"),
        ({"stride": 33}, "--stride 33 would leave gaps.*; give 1 to 32"),
        ({"patch_size": 6}, "patches of 6x6 have no square quarters for a pyramid; give --patch_size 16"),
        ({"batch_size": 100}, "more than the 24 training images"),
        ({"val_fraction": 0.5}, "leave out --val_fraction"),
        ({"image_size": 8}, "--image_size 8 is not allowed; give 16 pixels or more"),
        ({"drop_path": 1.0}, "--drop_path 1.0 is not allowed"),
    ],
)  # fmt: skip
def test_mistakes_are_said_before_anything_begins(vit, tmp_path, options, message):
    refused(message, **{"weights": vit, "out": tmp_path / "run"} | options)
    assert not (tmp_path / "run").exists()


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
