"""Fine-tuning learns, goes on after a kill, ends in a timm model, and says in a line what it cannot do."""

import json
import math
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_classes import PATTERNS, task_of, write_encoder
from tiny_runs import assert_one_line, command, finish, flags, mistake, rows, wait_for_rows

import mirl
from mirl.cli import main
from mirl.data.labels import open_split
from mirl.data.shapes import Shapes
from mirl.tasks.export import export_classifier
from mirl.tasks.settings.finetuning import Finetuning, resolve_finetuning
from mirl.tasks.weights import Weights, open_weights
from mirl.training.checkpoints import checkpoint_path, saved_steps
from mirl.training.runs import RunFolder

EVERYTHING = {
    "drop_path": 0.3, "erasing": 0.5, "min_crop": 0.4, "ema": 0.9, "epochs": 2, "batch_size": 16, "micro_batch": 5,
    "precision": "32", "workers": 1, "checkpoint_steps": 1, "evaluate_epochs": 2,
}  # fmt: skip


@pytest.fixture
def options(encoder, patterns, tmp_path):
    """Options of a run of 12 steps that draws on every source of chance and saves after each step."""
    return EVERYTHING | {"weights": encoder, "data": patterns, "out": str(tmp_path / "run")}


@pytest.fixture(scope="module")
def everything(encoder, patterns, tmp_path_factory):
    """The run of `options`, uninterrupted; made once, not to be changed."""
    return mirl.finetune(**EVERYTHING, weights=encoder, data=patterns, out=tmp_path_factory.mktemp("all") / "run")


def results(run):
    return json.loads((run / "results.json").read_text())


def checkpoints(run):
    """Return the states of a run's last checkpoints, the newest first."""
    folder = Path(run) / "checkpoints"
    return [torch.load(checkpoint_path(folder, step), weights_only=True) for step in saved_steps(folder)]


# What a run leaves


def test_a_run_leaves_every_file(classified):
    names = {"config.yaml", "log.txt", "metrics.jsonl", "tensorboard", "checkpoints", "encoder", "pictures", ".lock"}
    # Tests that judge this run leave evaluations in it.
    assert {path.name for path in classified.iterdir()} - {"evaluations"} == names | {"results.json"}
    assert {path.stem for path in (classified / "pictures").iterdir()} == {
        "augmented", "curves", "gradients", "step_00000000", "step_00000036"
    }  # fmt: skip
    for path in (classified / "pictures").iterdir():
        with Image.open(path) as picture:
            assert np.asarray(picture).std() > 1, path
    log = (classified / "log.txt").read_text()
    for part in ("96 images to train on, 24 to test, 4 classes",
                 "a fresh head on the mean over patches (1.8 M parameters)",
                 "6 epochs of 6 steps · batch 16 · peak rate 0.002", "weights: top-1"):  # fmt: skip
        assert part in log


def test_it_learns(classified):
    training, (_, last) = rows(classified), rows(classified, "held_out")
    assert [row["step"] for row in training] == list(range(1, 37))
    assert training[0]["loss"] == pytest.approx(math.log(4), abs=1e-3)
    assert training[-1]["loss"] < 0.7
    assert last["top1"] == pytest.approx(results(classified)["weights"]["top1"]) and last["top1"] > 0.7


def test_timm_opens_the_classifier_with_the_accuracy_of_the_results(classified, patterns):
    classifier = timm.create_model(f"local-dir:{classified / 'encoder'}", pretrained=True).eval()
    cfg = classifier.pretrained_cfg
    assert cfg["label_names"] == sorted(PATTERNS) and cfg["num_classes"] == 4
    assert cfg["input_size"] == (3, 32, 32)
    right = {}
    for name in cfg["label_names"]:
        files = sorted((Path(patterns) / "val" / name).iterdir())
        images = np.stack([np.asarray(Image.open(file)) for file in files]).transpose(0, 3, 1, 2) / 255
        mean, deviation = (np.array(cfg[key]).reshape(3, 1, 1) for key in ("mean", "std"))
        with torch.no_grad():
            said = classifier(torch.from_numpy((images - mean) / deviation).float()).argmax(dim=1)
        right[name] = [cfg["label_names"][i] == name for i in said]
    result = results(classified)["weights"]
    assert result["per_class"] == {name: np.mean(hits) for name, hits in right.items()}
    assert result["top1"] == np.mean([hit for hits in right.values() for hit in hits])
    assert (result["images"], result["top5"]) == (24, None)


def test_a_model_of_timms_own_is_exported_too(tmp_path):
    """With its register tokens and the scales of its branches."""
    state = timm.create_model("test_vit2", num_classes=0).state_dict()
    form = {"embed_dim": 64, "num_heads": 2, "img_size": (160, 160), "patch_size": (16, 16), "in_chans": 3}
    weights = Weights("test_vit2", form | {"num_classes": 0}, state, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    task, run = task_of(weights, image_size=(96, 80)), RunFolder(tmp_path / "run", resume=False, overwrite=False)
    torch.nn.init.normal_(task.model.head.weight)
    export_classifier(task.model, weights, task.classes, task.settings.image_size, run)
    run.close()
    images = torch.randn(2, 3, 96, 80)
    expected = task.model.eval()(images)
    opened, again = timm.create_model(f"local-dir:{run.encoder}", pretrained=True).eval(), open_weights(run.encoder)
    torch.testing.assert_close(opened(images), expected)
    torch.testing.assert_close(again.build()(images), expected)
    assert (again.classes, again.mean, again.deviation) == (Shapes.classes, weights.mean, weights.deviation)
    assert (again.image_size, again.depth) == ((96, 80), 8)


def test_rates_follow_maes_schedule_and_decay_with_depth(classified):
    steps, warmup, peak, least = 36, 0.05 * 36, 3.2e-2 * 16 / 256, 1e-6
    for step, row in enumerate(rows(classified)):
        cosine = least + (peak - least) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        assert row["lr"] == pytest.approx(peak * step / warmup if step < warmup else cosine), step
    groups = checkpoints(classified)[0]["optimizer"]["param_groups"]
    assert len({group["lr_scale"] for group in groups}) == 6  # 4 blocks, what is below and what is above
    last = rows(classified)[-1]["lr"]
    assert all(group["lr"] == pytest.approx(last * group["lr_scale"], rel=1e-9) for group in groups)


# Resume and averages


def test_killed_and_resumed_equals_uninterrupted(options, everything):
    process = command(options, task="finetune", pictures=False)
    wait_for_rows(options["out"], 4, lambda: process.poll() is None)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    run = mirl.finetune(out=options["out"], resume=True)
    (resumed,) = [line for line in (run / "log.txt").read_text().splitlines() if "resumed at step" in line]
    assert 3 <= int(resumed.split("step ")[1].split()[0]) < 12
    times = ("seconds", "data_wait", "images_per_second")
    for kind in ("train", "held_out"):
        left, right = ([{k: v for k, v in row.items() if k not in times} for row in rows(r, kind)]
                       for r in (run, everything))  # fmt: skip
        assert left == right
    (left, *_), (right, *_) = checkpoints(run), checkpoints(everything)
    for part in ("model", "average"):
        assert left[part].keys() == right[part].keys()
        assert all(torch.equal(value, right[part][name]) for name, value in left[part].items()), part
    assert results(run) == results(everything)


def test_micro_batches_make_a_step(everything):
    assert [row["step"] for row in rows(everything)] == list(range(1, 13))  # each of 5 + 5 + 5 + 1 images
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows(everything))
    assert rows(everything)[0]["loss"] == pytest.approx(math.log(4), abs=1e-3)


def test_the_average_moves_as_its_decay_says(everything):
    last, before = checkpoints(everything)
    decay = (1 + 9) / (10 + 9)  # the twelfth update; the first two copy the weights
    for name, average in last["average"].items():
        expected = decay * before["average"][name] + (1 - decay) * last["model"][name]
        torch.testing.assert_close(average, expected, atol=1e-7, rtol=1e-5)
    assert not torch.equal(last["average"]["head.weight"], last["model"]["head.weight"])


def test_the_average_is_judged_beside_the_weights_and_exported(everything):
    assert {"weights", "average"} < results(everything).keys()
    last = rows(everything, "held_out")[-1]
    assert {"loss", "top1", "average_loss", "average_top1"} < last.keys()
    for name in ("", "average_"):
        assert last[f"{name}top1"] == pytest.approx(results(everything)[name.strip("_") or "weights"]["top1"])
    exported, average = load_file(everything / "encoder" / "model.safetensors"), checkpoints(everything)[0]["average"]
    assert exported.keys() == average.keys() and all(torch.equal(exported[name], average[name]) for name in average)


@pytest.mark.parametrize("decay", [0.9, 0.9998])
def test_the_averages_decay_rises_to_its_limit(encoder, decay):
    average = task_of(encoder, ema=decay).average
    assert [average.get_decay(step) for step in (0, 1)] == [0, 0]
    for step in (2, 3, 10, 88, 89, 90, 1000, 44000, 100000):
        t = step - 2
        assert average.get_decay(step) == pytest.approx(min(decay, (1 + t) / (10 + t)), rel=1e-9)
    assert task_of(encoder).average is None


# Choices and mistakes


@pytest.mark.parametrize(
    ("images", "depth", "size", "choice"),
    [
        (1_281_167, 12, 224, (1024, 100, 5, 5e-4, 0.65, 0.08)),
        (1_281_167, 24, 224, (1024, 100, 5, 5e-4, 0.799, 0.08)),
        (1_281_167, 54, 224, (1024, 100, 5, 5e-4, 0.903, 0.08)),
        (1_000, 4, 64, (16, 100, 5, 1.6e-2, 0.65, 0.4)),
    ],
)
def test_choices_follow_from_the_data_and_the_depth(images, depth, size, choice):
    s = resolve_finetuning(
        Finetuning(weights="encoder", data="labelled"), images=images, depth=depth, image_size=(size, size),
        patch_size=(16, 16), gpu=False, devices=1, precision="32",
    )  # fmt: skip
    chosen = (s.batch_size, s.epochs, s.warmup_epochs, s.base_lr, s.layer_decay, s.min_crop)
    assert chosen == pytest.approx(choice)
    assert (s.weight_decay, s.drop_path, s.min_lr, s.ema, s.clip_grad) == (0.05, 0.1, 1e-6, None, None)
    assert (s.randaugment, s.erasing, s.mixup, s.cutmix, s.smoothing) == ("rand-m9-mstd0.5-inc1", 0.25, 0.8, 1.0, 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": None}, "--weights is missing; give a run folder of mirl pretrain, or a timm name"),
        ({"weights": "nowhere"}, "'nowhere' is neither a file, a folder nor the name of a timm model"),
        ({"data": "nowhere"}, "'nowhere' does not exist"),
        ({"randaugment": "nonsense"}, "--randaugment nonsense is not allowed; give timm's description, such as rand"),
        ({"randaugment": "rand-mfast1"}, "--randaugment rand-mfast1 is not allowed; .* or none"),
        ({"reinit_last": 3}, "--reinit_last 3 is more than the 2 blocks"),
        ({"reinit_last": 2, "depth": 1}, "--reinit_last 2 is more than the 1 block"),
        ({"patch_size": 5}, r"patches of 5x5 do not tile an image of 16x16; choose --image_size \[15,15\]"),
        ({"image_size": 20}, r"patches of 8x8 do not tile an image of 20x20; choose --image_size \[16,16\]"),
        ({"batch_size": 97}, "--batch_size 97 is more than the 96 training images; give at most 96"),
        ({"mixup": -0.1}, "--mixup -0.1 is not allowed; give 0 or more"),
        ({"smoothing": 1.0}, "--smoothing 1.0 is not allowed"),
        ({"drop_path": 1.0}, "--drop_path 1.0 is not allowed"),
        ({"ema": 1.0}, "--ema 1.0 is not allowed"),
        ({"layer_decay": 0.0}, "--layer_decay 0.0 is not allowed"),
        ({"depth": 0}, "--depth 0 is not allowed; give 1 or more"),
        ({"val_fraction": 0.2}, "has train/ and val/ already; leave out --val_fraction"),
    ],
    ids=str,
)  # fmt: skip
def test_a_mistake_is_one_line(options, change, message):
    assert re.search(message, mistake(mirl.finetune, **options | change))
    assert not Path(options["out"]).exists()


def test_class_folders_that_do_not_fit_are_one_line(options, patterns, tmp_path):
    data = shutil.copytree(patterns, tmp_path / "data")
    options |= {"data": str(data)}
    (data / "val" / "stars").mkdir()
    assert "class folder 'stars' in" in mistake(mirl.finetune, **options)
    shutil.copy(data / "val" / "plain" / "00.png", data / "val" / "stars")
    assert f"class 'stars' has no folder in {data}/train; both splits need" in mistake(mirl.finetune, **options)


def test_channels_that_files_cannot_have_are_one_line(options, tmp_path):
    weights = write_encoder(tmp_path / "five", channels=5)
    assert "patterns/train' has no images" in mistake(mirl.finetune, **options | {"weights": weights})
    assert "shapes are RGB" in mistake(mirl.finetune, **options | {"weights": weights, "data": "shapes:20"})


def test_a_run_is_neither_overwritten_nor_changed_by_mistake(options, everything, tmp_path, capsys):
    options |= {"out": str(everything)}
    assert main(["finetune", *flags(options)]) == 2
    assert_one_line(2, capsys.readouterr().err, "holds a run; add --resume to go on, --overwrite to start again")
    for change in ({"drop_path": 0.2}, {"ema": 0.99}, {"randaugment": "none"}, {"image_size": 32}, {"seed": 1}):
        (name,) = change
        message = mistake(mirl.finetune, **options | change | {"resume": True})
        assert f"the run was started with --{name} " in message and "cannot change it to" in message
    assert main(["finetune", f"--out={everything}", "--resume"]) == 0
    output = capsys.readouterr().out
    assert "the run is complete (12 steps)" in output and "--resume_from" not in output  # that is for pre-training


def test_one_folder_is_divided(encoder, patterns):
    task = task_of(encoder, data=f"{patterns}/train", val_fraction=0.25)
    assert (len(task.training), len(task.held_out)) == (72, 24)
    assert {int(task.held_out[0, i].labels) for i in range(24)} == {0, 1, 2, 3}
    assert open_split(f"{patterns}/train", val_fraction=0.25)[0].classes == task.classes
