"""A run writes what it promises, learns, repeats itself, and leaves an encoder that timm opens."""

import math
import shutil

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from tiny_runs import assert_same_run, losses, rows, weights
from torch._subclasses.fake_tensor import FakeTensorMode

import mirl
import mirl.methods
from mirl.cli import main
from mirl.data.loading import collate
from mirl.data.sources import open_source
from mirl.data.transforms import normalise
from mirl.errors import UserError
from mirl.models.patches import gather, patchify
from mirl.objectives.pixels import pixel_target, reconstruction_loss
from mirl.tasks.pretrain import PretrainTask, split_off_held_out
from mirl.tasks.settings.pretraining import Pretraining, Resolved, autoencoder_of, resolve
from mirl.training.reconstructions import compose, panels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shared") / "run"


@pytest.fixture
def run(tiny, folder):
    """A finished run; made once, not to be changed."""
    return folder if folder.exists() else mirl.pretrain(**tiny, out=str(folder))


def autoencoder(run):
    """Build the run's autoencoder from its files alone."""
    model = autoencoder_of(Resolved(**yaml.safe_load((run / "config.yaml").read_text())))
    model.load_state_dict(weights(run))
    return model.eval()


def test_a_run_leaves_every_file(run):
    names = {path.name for path in run.iterdir()}
    assert names == {"config.yaml", "log.txt", "metrics.jsonl", "tensorboard", "checkpoints", "encoder",
                     "autoencoder.safetensors", "pictures", ".lock"}  # fmt: skip
    assert {path.name for path in (run / "encoder").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {"step_00000011.pt", "step_00000012.pt", "undecayed.pt"}  # the rate decays after 90 % of 12 steps
    assert next((run / "tensorboard").iterdir()).stat().st_size > 0
    log = (run / "log.txt").read_text()
    for part in ("98 images to train on, 8 held out", "2 epochs of 6 steps", "batch 16", "data      shapes:106:"):
        assert part in log


def test_pictures_show_the_held_out_images_as_often_as_they_are_evaluated(run):
    names = {"blocks", "curves", "gradients", "panels", *(f"step_{k:08d}" for k in (0, 6, 12))}
    assert {path.stem for path in (run / "pictures").iterdir()} == names
    for path in (run / "pictures").glob("*.png"):
        with Image.open(path) as picture:
            assert np.asarray(picture).std() > 1 and min(picture.size) > 100
    recorded = rows(run, "pictures")
    assert [row["file"] for row in recorded] == [f"pictures/panels/step_{k:08d}.webp" for k in (0, 6, 12)]
    for row in recorded:
        with Image.open(run / row["file"]) as atlas:
            assert atlas.size == (len(row["panels"]) * row["width"], row["images"] * row["height"])


def test_a_run_leaves_its_report_however_it_ends(tiny, tmp_path, capsys):
    whole = mirl.pretrain(**tiny | {"epochs": 1, "report": True}, out=tmp_path / "whole")
    assert f"open {whole / 'report.html'} to see the run" in capsys.readouterr().out
    assert "finished after 6 steps" in (whole / "report.html").read_text()
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(40):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{index:02}.png")
        if index % 3 == 0:
            (photos / f"{index:02}.png").write_bytes(b"")
    options = tiny | {"data": str(photos), "batch_size": 8, "epochs": 1, "max_bad": 0.1, "report": True}
    with pytest.raises(UserError, match="cannot be used, more than --max_bad"):
        mirl.pretrain(**options, out=tmp_path / "failed")
    (failed,) = (row for row in rows(tmp_path / "failed", "incident") if row["what"] == "failed")
    assert f"mend the files listed in {tmp_path}/failed/unusable.txt" in failed["text"]
    assert "more than --max_bad" in (tmp_path / "failed" / "report.html").read_text()


def test_every_step_is_recorded_with_finite_numbers(run):
    assert [row["step"] for row in rows(run)] == list(range(1, 13))
    assert [row["step"] for row in rows(run, "held_out")] == [0, 6, 12]
    for row in rows(run):
        assert {"loss", "lr", "grad_norm", "seconds", "data_wait", "epoch"} <= row.keys()
        assert all(math.isfinite(value) for name, value in row.items() if name != "kind")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("method", ["mirl", "mae"])
def test_one_batch_is_overfitted(tiny, tmp_path, method):
    options = tiny | {"data": "shapes:24", "epochs": 60, "base_lr": 3e-2, "min_crop": 1.0, "flip": False,
                      "warmup_epochs": 5, "evaluate_epochs": 60, "method": method, "block_figures": False}  # fmt: skip
    row = rows(mirl.pretrain(**options, out=str(tmp_path / "run")))
    assert len(row) == 60
    assert row[-1]["loss"] < 0.6 * row[0]["loss"]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"method": "mae"},
        {"segments": 1},
        {"segments": 4},
        {"taps": [1, 4]},
        {"image_size": (32, 48), "patch_size": (8, 4)},
        {"channels": 1, "data": "npy", "image_size": (24, 16)},
        {"channels": 5, "data": "npy"},
        {"context": "none", "target": "raw", "did_blocks": "all", "weight_norm": True, "schedule": "cosine"},
        {"did_memory": "embedded", "mask_ratio": 0.5, "clip_grad": 1.0, "micro_batch": 5},
    ],
    ids=str,
)
def test_timm_opens_the_encoder_with_the_features_of_the_autoencoder(tiny, tmp_path, case):
    options = tiny | {"epochs": 1, "block_figures": False} | case
    if case.get("data") == "npy":
        options["data"] = str(tmp_path / "arrays")
        (tmp_path / "arrays").mkdir()
        for index in range(34):
            array = np.random.default_rng(index).integers(0, 256, (20, 30, case["channels"]), dtype=np.uint8)
            np.save(tmp_path / "arrays" / f"{index}.npy", array)
    run = mirl.pretrain(**options, out=str(tmp_path / "run"))
    model = autoencoder(run)
    encoder = timm.create_model(f"local-dir:{run / 'encoder'}", pretrained=True).eval()
    size = (model.encoder.in_chans, *model.image_size)
    assert encoder.pretrained_cfg["input_size"] == size
    images = torch.randn(2, *size)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), model.encoder(images), atol=1e-6, rtol=0)
        assert encoder(images).shape == (2, 192)
    untrained = timm.create_model(f"local-dir:{run / 'encoder'}", pretrained=False)
    assert not torch.equal(untrained.blocks[0].attn.qkv.weight, encoder.blocks[0].attn.qkv.weight)


def test_the_saved_autoencoder_has_the_recorded_loss(run):
    """Rebuild the model and the last held-out evaluation from what is on disk."""
    settings = Resolved(**yaml.safe_load((run / "config.yaml").read_text()))
    source = open_source(settings.data)
    task = PretrainTask(settings, source, *split_off_held_out(len(source)))
    batch = collate([task.held_out[0, i] for i in range(len(task.held_out))])
    with torch.no_grad():
        loss = task.loss(autoencoder(run), batch)["loss"].mean().item()
    assert loss == pytest.approx(rows(run, "held_out")[-1]["loss"], rel=1e-5)


@pytest.mark.usefixtures("undrawn")
def test_config_yaml_runs_again_to_the_same_weights(run, tmp_path):
    again = tmp_path / "again"
    assert main(["pretrain", "--config", str(run / "config.yaml"), "--out", str(again)]) == 0
    assert_same_run(run, again)


@pytest.mark.usefixtures("undrawn")
def test_workers_and_where_it_runs_do_not_change_a_run(run, tiny, tmp_path):
    assert_same_run(run, mirl.pretrain(**tiny | {"workers": 1, "block_figures": False}, out=str(tmp_path / "another")))


@pytest.mark.usefixtures("undrawn")
def test_another_seed_is_another_run(run, tiny, tmp_path):
    assert losses(run) != losses(mirl.pretrain(**tiny, seed=1, block_figures=False, out=str(tmp_path / "another")))


@pytest.mark.usefixtures("undrawn")
def test_overwrite_starts_again(run, tiny, tmp_path):
    run, before = shutil.copytree(run, tmp_path / "copy"), losses(run)
    (run / "pictures" / "step_00000099.png").write_bytes(b"of the old run")
    mirl.pretrain(**tiny, out=str(run), overwrite=True)
    assert losses(run) == before
    assert not (run / "pictures" / "step_00000099.png").exists()


def test_pathlib_paths_are_welcome(tiny, tmp_path):
    for index in range(24):
        Image.new("RGB", (32, 32), (index, 0, 0)).save(tmp_path / f"{index}.png")
    run = mirl.pretrain(**tiny | {"data": tmp_path, "epochs": 1}, out=tmp_path / "run")
    again = mirl.pretrain(**tiny | {"data": tmp_path, "epochs": 1}, out=tmp_path / "again")  # pictures are not data
    assert_same_run(run, again)


def test_a_non_finite_loss_names_the_file(tiny, tmp_path):
    for index in range(20):
        Image.new("RGB", (32, 32), (index, 0, 0)).save(tmp_path / f"{index:02}.png")
    settings = Resolved(
        data=str(tmp_path), model="vit_ti_2", image_size=(32, 32), patch_size=(8, 8), decoder_width=32, decoder_depth=1
    )
    source = open_source(settings.data)
    training, held_out = split_off_held_out(len(source))
    task = PretrainTask(settings, source, training, held_out)
    members = task.masked_images(training, lambda image: image, 0)
    for position in (0, 7, len(training) - 1):
        batch = members[0, position]
        assert task.names(batch) == [source.name_of(int(training[position]))]
        assert batch.images[0, 0, 0, 0] == training[position]  # the red of the file's own number


@pytest.mark.parametrize(("batch", "base_lr"), [(16, 8e-3), (256, 5e-4), (1024, 1.5e-4), (4096, 1.5e-4)])
def test_small_batches_get_a_rate_that_learns(batch, base_lr):
    chosen = resolve(Pretraining(batch_size=batch), images=5000, shorter_side=64, gpu=False, devices=1, precision="32")
    assert chosen.base_lr == pytest.approx(base_lr)


@pytest.mark.parametrize(
    ("images", "side", "gpu", "choice"),
    [
        (1_281_167, 375, True, ("vit_s_54", (224, 224), (16, 16), 4096, 300, 40)),
        (50_000, 32, False, ("vit_ti_12", (32, 32), (4, 4), 512, 800, 800 * 40 / 300)),
        (1_000, 90, False, ("vit_ti_12", (64, 64), (8, 8), 16, 800, 800 * 40 / 300)),
        (9, 130, False, ("vit_ti_12", (128, 128), (16, 16), 9, 800, 800 * 40 / 300)),
    ],
)
def test_choices_follow_from_the_data(images, side, gpu, choice):
    s = resolve(Pretraining(data="photos"), images=images, shorter_side=side, gpu=gpu, devices=1, precision="32")
    assert (s.model, s.image_size, s.patch_size, s.batch_size, s.epochs, s.warmup_epochs) == choice


def test_the_loss_and_pictures_stay_on_the_device():
    with FakeTensorMode(allow_non_fake_inputs=True):  # tensors without data that claim to be on a GPU
        images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8, device="cuda")
        patches = patchify(normalise(images, 3), (4, 4))
        visible, masked = torch.arange(16, device="cuda").expand(2, -1).split([4, 12], dim=1)
        predictions = [torch.zeros(2, 12, 48, device="cuda")] * 2
        terms = mirl.methods.mirl(2, 2).terms
        target = pixel_target(gather(patches, masked), "normalised")
        loss, _ = reconstruction_loss(predictions, {"image": target}, terms)
        everywhere = [torch.zeros(2, 16, 48, device="cuda")] * 2
        columns = panels(compose(
            patches, visible, masked, everywhere, terms, target="normalised", image_size=(16, 16), patch_size=(4, 4),
            channels=3,
        ))  # fmt: skip
    assert {tensor.device.type for tensor in (loss, *(panel.images for panel in columns))} == {"cuda"}
