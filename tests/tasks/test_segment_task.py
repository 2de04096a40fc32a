"""What a segmentation run chooses, computes and refuses before it has begun."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny_segmenters import refused, task_of, write_folder

from mirl.data.loading import collate
from mirl.data.semantic import SemanticBatch, SemanticClass
from mirl.tasks import segmentation_scores
from mirl.tasks.segmentation import AUXILIARY
from mirl.tasks.segmentation_scores import IoUOfHeldOut
from mirl.tasks.settings.segmentation import Segmentation, resolve_segmentation
from mirl.tasks.weights import open_weights
from mirl.training import processes
from mirl.training.runs import RunFolder
from mirl.training.steps import Accumulator


def test_the_summary_says_what_was_chosen(vit):
    text = "\n".join(task_of(vit, epochs=2, relative_positions=True).summary())
    for part in ("24 images to train on, 10 to test, 11 classes", "ViT of 2 blocks, positions absolute and relative",
                 "decoder 16 wide", "crops of 32 px", "windows of 32 px every 21", "2 epochs of 3 steps",
                 "peak rate 0.002", "layer decay 0.65", "drop path 0.1"):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(("rank", "images"), [(1, 1), (2, 0)])
def test_a_process_without_a_share_judges_nothing(rank, images, monkeypatch):
    """Of two held-out images the third process is given the first too; another found one image with four pixels."""
    monkeypatch.setattr(segmentation_scores, "over_processes", lambda fabric, values, operation: values + 1)
    fabric = SimpleNamespace(global_rank=rank)
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
    assert "nothing of the weights" in "\n".join(fresh.summary())


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
