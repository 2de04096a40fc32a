"""A truncated encoder: only its first blocks are built and trained; fine-tuning adds the others, fresh."""

import json

import pytest
import torch
from tiny_classes import differing, task_of
from tiny_runs import weights

import mirl
from mirl.tasks.weights import open_weights


@pytest.fixture
def truncated(tiny, module_run):
    """A run that trained 3 of 4 blocks; made once, not to be changed."""
    if not module_run.exists():
        mirl.pretrain(**tiny | {"epochs": 1, "method": "truncated_mae", "taps": [3]}, out=module_run)
    return module_run


def test_only_the_first_blocks_are_built_and_trained(truncated):
    blocks = {name.split(".")[2] for name in weights(truncated) if name.startswith("encoder.blocks.")}
    assert blocks == {"0", "1", "2"}
    assert "truncated_mae, its first 3 blocks; fine-tuning adds the others" in (truncated / "log.txt").read_text()
    assert (open_weights(str(truncated)).depth, open_weights(str(truncated)).full_depth) == (3, 4)
    assert json.loads((truncated / "encoder" / "config.json").read_text())["full_depth"] == 4


@pytest.mark.parametrize("part", ["", "encoder", "autoencoder.safetensors"])
def test_fine_tuning_completes_the_encoder(truncated, part):
    task = task_of(str(truncated / part))
    state = open_weights(str(truncated / part)).state
    assert len(task.model.blocks) == 4
    assert differing(task.model, state) == set()
    assert "note      the encoder has 3 blocks: 1 fresh block on top" in task.summary()
    assert len(task_of(str(truncated), depth=3).model.blocks) == 3


def test_its_blocks_are_those_of_a_plain_mae_of_that_depth(tiny, truncated, tmp_path):
    shallow = mirl.pretrain(**tiny | {"epochs": 1, "method": "mae", "model": "vit_ti_3"}, out=tmp_path / "mae")
    expected, found = weights(shallow), weights(truncated)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_it_survives_conversion(truncated, tmp_path):
    mirl.convert(str(truncated), str(tmp_path / "timm"), to="timm")
    mirl.convert(str(truncated), str(tmp_path / "one.safetensors"), to="safetensors")
    assert [open_weights(str(tmp_path / name)).full_depth for name in ("timm", "one.safetensors")] == [4, 4]
