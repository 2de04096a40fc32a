"""Pre-training starts from trained weights where they fit, says what is fresh, and refuses what cannot be taken."""

import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from tiny_runs import assert_same_run, interrupted, rows, weights

import mirl
from mirl.errors import UserError
from mirl.tasks.convert import convert

pytestmark = pytest.mark.usefixtures("undrawn")

# A rate at which nothing moves: what a run ends with is what it began with, but for zeros, which become 1e-30.
STILL = {"data": "shapes:27", "epochs": 1, "base_lr": 1e-30, "weight_decay": 0.0, "block_figures": False}


@pytest.fixture
def still(tiny, tmp_path):
    """Return a function that pre-trains without learning."""

    def run(name="run", **options):
        return mirl.pretrain(**tiny | STILL | options, out=tmp_path / name)

    return run


@pytest.fixture
def mistake(tiny, tmp_path):
    def run(**options):
        with pytest.raises(UserError) as caught:
            mirl.pretrain(**tiny | STILL | options, out=tmp_path / "refused")
        assert "\n" not in str(caught.value) and not (tmp_path / "refused").exists()
        return str(caught.value)

    return run


def said(run):
    """Return what the log says of the weights."""
    lines = (run / "log.txt").read_text().splitlines()
    return [line.split("weights   ")[1] for line in lines if "weights   " in line]


def differing(left, right, *prefixes):
    """Return the names of different tensors, of those that begin with one of `prefixes`."""
    names = {name for name in left.keys() | right.keys() if name.startswith(prefixes or "")}
    return {n for n in names if left[n].shape != right[n].shape or (left[n] - right[n]).abs().max() > 1e-20}


def of_blocks(names):
    """Return the numbers of the encoder's blocks among names of tensors."""
    return {int(name.split(".")[2]) for name in names if name.startswith("encoder.blocks.")}


def test_a_run_goes_on_where_another_ended(still, finished):
    run = still(weights=str(finished), data="shapes:106")
    assert differing(weights(run), weights(finished)) == set()
    assert said(run) == ["vit_ti_4: the first 4 of 4 blocks are trained", "2 decoders trained too"]
    # The same images and masks; means over batches are summed in another order.
    assert rows(run, "held_out")[0]["loss"] == pytest.approx(rows(finished, "held_out")[-1]["loss"], abs=1e-5)
    assert rows(finished, "held_out")[0]["loss"] - rows(finished, "held_out")[-1]["loss"] > 1e-3


def test_it_learns_from_there(tiny, finished, tmp_path):
    run = mirl.pretrain(**tiny | {"epochs": 1, "seed": 5}, weights=str(finished), out=tmp_path / "run")
    first, *_, last = rows(run, "held_out")
    assert last["loss"] < first["loss"]
    assert differing(weights(run), weights(finished), "encoder.blocks.", "decoders.")


@pytest.mark.parametrize("change", [{"decoder_width": 64}, {"method": "mae"}, {"taps": [1, 4]}], ids=str)
def test_decoders_of_another_form_are_fresh(still, finished, change):
    """Of another number or width; those after other blocks have the same form, and are taken."""
    run, fresh = still(weights=str(finished), **change), still("fresh", **change)
    taken = "taps" in change
    line = "2 decoders trained too" if taken else "decoders are fresh: those of the weights have another form"
    assert said(run)[1:] == [line]
    assert differing(weights(run), weights(finished), "encoder.") == set()
    assert (differing(weights(run), weights(fresh), "decoders.") == set()) != taken


def test_an_encoder_alone_leaves_the_decoders_fresh(still, finished):
    run, fresh = still(weights=str(finished / "encoder")), still("fresh")
    assert said(run) == ["vit_ti_4: the first 4 of 4 blocks are trained"]
    assert differing(weights(run), weights(finished), "encoder.") == set()
    assert differing(weights(run), weights(fresh), "decoders.", "norms.") == set()


def test_a_deeper_model_has_fresh_blocks_on_top(still, finished):
    run, fresh = still(weights=str(finished), model="vit_ti_6"), still("fresh", model="vit_ti_6")
    assert said(run)[0] == "vit_ti_4: the first 4 of 6 blocks are trained, blocks 5 to 6 are fresh"
    trained = {name: value for name, value in weights(run).items() if name in weights(finished)}
    assert differing(trained, weights(finished), "encoder.") == set()
    assert of_blocks(differing(weights(run), weights(fresh))) == {0, 1, 2, 3}


def test_a_shallower_model_leaves_the_last_blocks_out(still, finished):
    run = still(weights=str(finished), model="vit_ti_2")
    assert said(run)[0] == "vit_ti_4: the first 2 of 2 blocks are trained; its last 2 are left out"
    theirs = {name: value for name, value in weights(finished).items() if name in weights(run)}
    assert differing(weights(run), theirs, "encoder.") == set()
    assert of_blocks(weights(run)) == {0, 1}


def test_other_sizes_are_resampled_and_said_so(still, finished):
    run, state = still(weights=str(finished), image_size=[32, 48], patch_size=16), weights(finished)
    assert said(run)[1:3] == [
        "patch embedding resampled from (8, 8) to (16, 16)", "positions resampled to another number of patches"
    ]  # fmt: skip
    positions = resample_abs_pos_embed(state["encoder.pos_embed"], [2, 3], [4, 4], num_prefix_tokens=1)
    kernel = resample_patch_embed(state["encoder.patch_embed.proj.weight"], [16, 16])
    torch.testing.assert_close(weights(run)["encoder.pos_embed"], positions, atol=0, rtol=0)
    torch.testing.assert_close(weights(run)["encoder.patch_embed.proj.weight"], kernel, atol=1e-6, rtol=0)
    resampled = {"encoder.pos_embed", "encoder.patch_embed.proj.weight"}
    assert differing(weights(run), state, "encoder.") == resampled


def test_a_classifier_gives_its_blocks(still, classified):
    """Its head is left out; it has a norm after pooling in place of the encoder's."""
    run = still(weights=str(classified))
    state = {f"encoder.{k}": v for k, v in load_file(classified / "encoder" / "model.safetensors").items()}
    assert "fresh, because the weights lack them: norm.weight, norm.bias" in said(run)
    assert differing(weights(run), state, "encoder.blocks.", "encoder.patch_embed.", "encoder.cls_token") == set()
    assert (weights(run)["encoder.norm.weight"] == 1).all()


def test_the_model_is_that_of_the_weights(still, finished):
    run = still(weights=str(finished), model=None)
    assert yaml.safe_load((run / "config.yaml").read_text())["model"] == "vit_ti_4"
    other = still("other", weights=str(still("deep", model="vit_64x2_2") / "encoder"), model=None)
    assert yaml.safe_load((other / "config.yaml").read_text())["model"] == "vit_64x2_2"


def test_a_converted_run_is_the_run(still, finished, tmp_path):
    convert(str(finished), str(tmp_path / "vit"), "huggingface")
    run = still(weights=str(tmp_path / "vit"))
    assert differing(weights(run), weights(finished), "encoder.") == set()


# timm


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Let timm find weights of one of its models on the disk instead of the hub; return them."""

    def publish(name):
        architecture = name.removeprefix("timm:").partition(".")[0]
        state = timm.create_model(architecture).state_dict()
        save_file(state, tmp_path / "timm.safetensors")
        tag = timm.models.get_pretrained_cfg(architecture).tag
        registered = timm.models._registry._model_pretrained_cfgs[f"{architecture}.{tag}"]
        monkeypatch.setattr(registered, "file", str(tmp_path / "timm.safetensors"))
        return state

    return publish


TINY = "deit_tiny_patch16_224"


@pytest.mark.parametrize("name", [f"timm:{TINY}", f"{TINY}.fb_in1k"])
def test_a_timm_name_is_timms_model(still, hub, name):
    state = {f"encoder.{k}": v for k, v in hub(name).items() if not k.startswith("head.")}
    run = still(weights=name, model=None, patch_size=16)
    assert said(run) == [
        "vit_ti_12: the first 12 of 12 blocks are trained", "positions resampled to another number of patches",
    ]  # fmt: skip
    assert differing(weights(run), state, "encoder.") == {"encoder.pos_embed"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_vit2", "--weights have 'blocks.0.ls1.gamma', which a plain ViT has not; give others"),
        ("timm:test_vit", "--weights have a 'blocks.0.mlp.fc1.bias' of shape [192], and a plain ViT of [256]"),
    ],
)
def test_layers_that_a_plain_vit_has_not_are_named(mistake, hub, name, message):
    hub(name)
    assert mistake(weights=name, model=None, patch_size=16).startswith(message)


# Refusals and resume


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "vit_64x2_4"}, "are of width 192 with 3 heads, --model of 64 with 2; give --model vit_192x3_DEPTH"),
        ({"model": "vit_192x6_4"}, "are of width 192 with 3 heads, --model of 192 with 6; give --model vit_192x3_DEP"),
        ({"model": "vit_s_4"}, "are of width 192 with 3 heads, --model of 384 with 12; give --model"),
    ],
    ids=str,
)
def test_another_form_is_one_line(mistake, finished, options, message):
    assert message in mistake(weights=str(finished), **options)


def test_other_channels_are_one_line(mistake, finished, patterns):
    """Of files: generated shapes are RGB."""
    message = mistake(weights=str(finished), channels=1, data=f"{patterns}/train")
    assert message == "--weights are of 3 channels; give --channels 3, or others"


def test_weights_that_are_not_there_are_one_line(mistake):
    assert "'nowhere' is neither a file, a folder nor the name of a timm model" in mistake(weights="nowhere")


def test_a_run_is_resumed_when_its_weights_are_gone(tiny, finished, tmp_path):
    """And ends as if it had never stopped."""
    source = shutil.copytree(finished, tmp_path / "source")
    options = tiny | {"weights": str(source), "checkpoint_steps": 1, "block_figures": False}
    whole = mirl.pretrain(**options, out=tmp_path / "whole")
    interrupted(options | {"out": str(tmp_path / "run")}, after=3)
    shutil.rmtree(source)
    assert_same_run(mirl.pretrain(out=tmp_path / "run", resume=True), whole)
    assert not Path(source).exists()
