"""Fine-tuning starts from the weights, the blocks and the rates that the recipe says."""

import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from tiny_classes import differing, task_of, write_encoder
from tiny_runs import assert_one_line
from transformers import ViTForImageClassification

from mirl.cli import main
from mirl.data.shapes import Shapes
from mirl.tasks.convert import convert
from mirl.tasks.export import export_classifier
from mirl.tasks.weights import open_weights
from mirl.training.runs import RunFolder

# What a model starts from


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """An encoder of 4 blocks."""
    return write_encoder(tmp_path_factory.mktemp("deep") / "encoder", depth=4)


@pytest.fixture
def state(encoder):
    return load_file(Path(encoder) / "model.safetensors")


def test_weights_are_kept_and_norm_and_head_are_fresh(encoder, state):
    model = task_of(encoder, drop_path=0.2).model
    own = model.state_dict()
    assert differing(model, state) == set()
    assert own.keys() - state.keys() == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert state.keys() - own.keys() == {"norm.weight", "norm.bias"}
    assert all(parameter.requires_grad for parameter in model.parameters())  # positions too
    assert (own["fc_norm.weight"] == 1).all() and (own["fc_norm.bias"] == 0).all() and (own["head.bias"] == 0).all()
    assert own["head.weight"].shape == (10, 48) and 1.5e-5 < own["head.weight"].std() < 2.5e-5
    assert model.training and model.fc_norm.eps == 1e-6


def test_a_classifier_is_fine_tuned_from_a_fresh_head_and_norm(tmp_path):
    """Even where it has the same number of classes."""
    weights = write_encoder(tmp_path / "classifier", classes=[str(number) for number in range(10)])
    model, state = task_of(weights).model, load_file(tmp_path / "classifier" / "model.safetensors")
    assert differing(model, state) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert (model.fc_norm.weight == 1).all() and model.head.weight.abs().max() < 1e-3


def test_what_the_model_computes_is_the_recipes(encoder):
    """Mean over patches, the fresh norm, the head: no class token, no norm of the encoder."""
    model = task_of(encoder).model.eval()
    images = torch.randn(2, 3, 16, 16)
    tokens = model.blocks(model._pos_embed(model.patch_embed(images)))
    pooled = torch.nn.functional.layer_norm(tokens[:, 1:].mean(dim=1), (48,), eps=1e-6)
    torch.testing.assert_close(model(images), pooled @ model.head.weight.T)


# From the class token


def test_the_head_may_read_the_class_token(encoder, state):
    """After the encoder's own norm, which is kept: nothing but the head is fresh."""
    model = task_of(encoder, pool="cls").model.eval()
    assert differing(model, state) == set()
    assert model.state_dict().keys() - state.keys() == {"head.weight", "head.bias"}
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        tokens = model.norm(model.blocks(model._pos_embed(model.patch_embed(images))))
        torch.testing.assert_close(model(images), tokens[:, 0] @ model.head.weight.T)
        assert not torch.allclose(tokens[:, 0], tokens[:, 1:].mean(dim=1), atol=0.1)


@pytest.mark.parametrize(("pool", "words"), [("mean", "mean over patches"), ("cls", "class token")])
def test_the_summary_says_what_the_head_reads(encoder, pool, words):
    (line,) = [line for line in task_of(encoder, pool=pool).summary() if line.startswith("model ")]
    assert f"ViT of 2 blocks with a fresh head on the {words} (" in line


def test_a_head_on_the_class_token_is_hugging_faces(encoder, tmp_path):
    task, run = task_of(encoder, pool="cls"), RunFolder(tmp_path / "run", resume=False, overwrite=False)
    torch.nn.init.normal_(task.model.head.weight)
    export_classifier(task.model, task.weights, task.classes, task.settings.image_size, run)
    run.close()
    convert(str(run.path), str(tmp_path / "vit"), "huggingface")
    again, images = open_weights(str(tmp_path / "vit")), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = task.model.eval()(images)
        opened = timm.create_model(f"local-dir:{run.encoder}", pretrained=True).eval()
        theirs = ViTForImageClassification.from_pretrained(tmp_path / "vit").eval()
        assert expected.std() > 0.1
        for found in (opened(images), again.build()(images), theirs(images).logits):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert again.classes == Shapes.classes == tuple(theirs.config.id2label[i] for i in range(10))


def test_another_pooling_is_one_line(capsys):
    assert main(["finetune", "--weights=encoder", "--pool=max"]) == 2
    assert_one_line(2, capsys.readouterr().err, "--pool max is not allowed; give mean or cls")


# How it learns


def test_the_optimizer_has_the_recipes_numbers(deep):
    task = task_of(deep, batch_size=16, base_lr=8e-3, layer_decay=0.8)
    optimizer = task.optimizer()
    assert [optimizer.defaults[name] for name in ("lr", "betas", "eps")] == [pytest.approx(5e-4), (0.9, 0.999), 1e-8]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    scales = sorted({group["lr_scale"] for group in optimizer.param_groups})
    assert scales == pytest.approx([0.8**5, 0.8**4, 0.8**3, 0.8**2, 0.8, 1])


@pytest.mark.parametrize(("depth", "rate"), [(1, 0.1), (2, 0.1), (5, 0.4), (3, 0.0)])
def test_drop_path_grows_linearly_with_depth(encoder, depth, rate):
    blocks = task_of(encoder, depth=depth, drop_path=rate).model.blocks
    found = [[getattr(path, "drop_prob", 0.0) for path in (block.drop_path1, block.drop_path2)] for block in blocks]
    expected = np.linspace(0, rate, depth)
    np.testing.assert_allclose(found, np.stack([expected, expected], axis=1), atol=1e-6)


@pytest.mark.parametrize("last", [0, 1, 3, 4])
def test_exactly_the_last_blocks_are_reinitialised(deep, last):
    task, state = task_of(deep, reinit_last=last), load_file(Path(deep) / "model.safetensors")
    fresh = {name for name in state if name.startswith("blocks.") and int(name.split(".")[1]) >= 4 - last}
    assert differing(task.model, state) == fresh
    assert (f"note      fresh weights for the last {last} block{'s' * (last > 1)}" in task.summary()) == (last > 0)


@pytest.mark.parametrize(
    ("depth", "note"), [(6, "2 fresh blocks on top"), (2, "its first 2 blocks"), (4, None), (None, None)]
)
def test_depth_adds_fresh_blocks_or_leaves_the_last_out(deep, depth, note):
    task, state = task_of(deep, depth=depth), load_file(Path(deep) / "model.safetensors")
    assert len(task.model.blocks) == (depth or 4)
    assert differing(task.model, state) == set()
    for block in task.model.blocks[4:]:
        assert (block.norm1.weight == 1).all() and (block.mlp.fc1.bias == 0).all()
        assert block.mlp.fc1.weight.abs().max() <= math.sqrt(6 / (48 + 192))  # Xavier's bound, as in pre-training
    notes = [line for line in task.summary() if line.startswith("note")]
    assert notes == ([f"note      the encoder has 4 blocks: {note}"] if note else [])


def test_fresh_blocks_on_top_and_below_can_both_be_had(deep):
    task, state = task_of(deep, depth=5, reinit_last=2), load_file(Path(deep) / "model.safetensors")
    assert differing(task.model, state) == {name for name in state if name.startswith("blocks.3.")}


def test_untrained_uses_nothing_but_the_form(encoder, state):
    task = task_of(encoder, untrained=True)
    assert differing(task.model, state) == state.keys() - {"norm.weight", "norm.bias"}
    assert "note      nothing of the weights is used but their form (--untrained)" in task.summary()
    again, other = (task_of(encoder, untrained=True, seed=seed).model.state_dict() for seed in (0, 1))
    assert differing(task.model, again) == set()
    assert {"blocks.0.attn.qkv.weight", "head.weight", "cls_token"} < differing(task.model, other)


@pytest.mark.parametrize(
    ("sizes", "notes"),
    [
        ({}, []),
        ({"image_size": 24}, ["positions resampled to another number of patches"]),
        ({"image_size": (16, 32)}, ["positions resampled to another number of patches"]),
        ({"patch_size": 4}, ["patch embedding resampled from (8, 8) to (4, 4)",
                             "positions resampled to another number of patches"]),
        ({"image_size": 32, "patch_size": 16}, ["patch embedding resampled from (8, 8) to (16, 16)"]),
    ],
    ids=str,
)  # fmt: skip
def test_other_sizes_are_resampled_and_said_so(encoder, state, sizes, notes):
    task = task_of(encoder, **sizes)
    resampled = {"positions": "pos_embed", "patch": "patch_embed.proj.weight"}
    assert differing(task.model, state) == {resampled[note.split()[0]] for note in notes}
    said = [line.removeprefix("note      ") for line in task.summary() if line.startswith("note")]
    assert said == notes
    height, width = task.settings.image_size
    assert any(f"input     {height}x{width} px, patches of" in line for line in task.summary())
    assert task.training[0, 0].images.shape[-2:] == task.held_out[0, 0].images.shape[-2:] == (height, width)
    assert task.model(torch.zeros(1, 3, height, width)).shape == (1, 10)
