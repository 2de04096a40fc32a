"""What a detection run chooses, computes and refuses before it has begun."""

import math

import pytest
from tiny_detectors import TINY, task_of

import mirl
from mirl.data.loading import collate
from mirl.errors import UserError
from mirl.tasks.settings.detection import Detection, resolve_detection
from mirl.tasks.weights import open_weights
from mirl.training import processes
from mirl.training.runs import RunFolder
from mirl.training.steps import Accumulator


def test_the_summary_says_what_was_chosen(vit):
    text = "\n".join(task_of(vit).summary())
    for part in ("24 images to train on, 10 to test, 10 classes", "ViT of 2 blocks", "heads 16 wide, 8 regions",
                 "coco_1x · 2 epochs of 3 steps", "peak rate 0.001", "layer decay 0.75", "drop path 0.2"):  # fmt: skip
        assert part in text, part


def test_untrained_takes_no_weights_and_the_same_rate_for_all_layers(vit):
    trained, fresh = task_of(vit), task_of(vit, untrained=True)
    assert (trained.settings.layer_decay, fresh.settings.layer_decay) == (0.75, 1.0)
    weights = open_weights(vit).state["blocks.1.mlp.fc1.weight"]
    assert (trained.encoder.blocks[1].mlp.fc1.weight == weights).all()
    assert not (fresh.encoder.blocks[1].mlp.fc1.weight == weights).any()
    assert "nothing of the weights" in "\n".join(fresh.summary())


def test_the_image_whose_loss_is_not_finite_is_named_alone(vit, tmp_path):
    task = task_of(vit)
    images = collate([task.training[0, i] for i in range(3)])
    poisoned = int(images.indices[1])
    original = task.loss

    def loss(model, batch):
        values = original(model, batch)
        return {"loss": values["loss"] + math.inf} if poisoned in batch.indices.tolist() else values

    task.loss = loss
    fabric = processes.launch("auto", 1, "32")
    model, optimizer = fabric.setup(task.model, task.optimizer())
    run = RunFolder(tmp_path / "run", resume=False, overwrite=False)
    accumulator = Accumulator(fabric, task, model, optimizer, None, run)
    assert not accumulator.step([images], (0,), number=1).finite
    assert accumulator.culprits([images], (0,)) == [task.train.source.name_of(poisoned)]
    run.close()


def test_rates_decay_below_the_heads(vit):
    task = task_of(vit, layer_decay=0.5)
    scales = {id(p): group.get("lr_scale", 1.0) for group in task.optimizer().param_groups for p in group["params"]}
    assert len(scales) == len(list(task.model.parameters()))
    encoder = task.encoder
    assert scales[id(encoder.blocks[1].mlp.fc1.weight)] == 0.5
    assert scales[id(encoder.blocks[0].mlp.fc1.weight)] == 0.25
    assert scales[id(encoder.patch_embed.proj.weight)] == scales[id(encoder.pos_embed)] == 0.125
    assert scales[id(task.model.roi_heads.box_predictor.cls_score.weight)] == 1.0


@pytest.mark.parametrize(
    ("protocol", "regions", "proposals"),
    [("coco_1x", 512, (2000, 1000)), ("vitdet", 512, (1000, 1000)), ("coco_1x", 8, (32, 16)), ("vitdet", 8, (16, 16))],
)
def test_proposals_are_the_protocols(vit, protocol, regions, proposals):
    """CAE's 2,000 in training, detectron2's 1,000; fewer where the heads train on fewer regions."""
    proposer = task_of(vit, protocol=protocol, regions=regions, image_size=64).model.rpn
    assert (proposer._post_nms_top_n["training"], proposer._post_nms_top_n["testing"]) == proposals


def test_rates_fall_at_nine_and_eleven_twelfths(vit):
    task = task_of(vit, epochs=12, warmup_epochs=0.5)
    peak = task.settings.peak_rate
    assert [round(task.rate(epoch) / peak, 6) for epoch in (0, 0.25, 0.5, 8.9, 9.01, 10.9, 11.01)] == [
        0, 0.5, 1, 1, 0.1, 0.1, 0.01
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("shorter_side", "patch", "protocol", "size"),
    [
        (480, 16, "coco_1x", 800),
        (480, 16, "vitdet", 1024),
        (480, 8, "coco_1x", 400),
        (250, 16, "coco_1x", 416),
        (2000, 16, "coco_1x", 800),
        (32, 12, "coco_1x", 48),
        (60, 8, "vitdet", 128),
        (5, 16, "coco_1x", 32),
    ],
)
def test_the_image_size_follows_the_images(shorter_side, patch, protocol, size):
    given = Detection(weights="x", data="photos", protocol=protocol)
    resolved = resolve_detection(given, images=100, shorter_side=shorter_side, depth=12, patch_size=patch, gpu=True,
                                 devices=1, precision="32")  # fmt: skip
    assert resolved.image_size == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": None}, "--weights is missing"),
        ({"data": "/no/where"}, "does not exist .* give a folder with COCO annotations and images, or shapes"),
        ({"patch_size": 6}, "give --patch_size 16"),
        ({"protocol": "vitdet", "image_size": 60}, "no multiple of two patches .* give --image_size 64"),
        ({"batch_size": 100}, "more than the 24 training images"),
        ({"regions": 0}, "--regions 0 is not allowed"),
    ],
)
def test_mistakes_are_said_before_anything_begins(vit, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        mirl.detect(**TINY | {"weights": vit, "out": tmp_path / "run"} | options)
    assert not (tmp_path / "run").exists()
