"""MAE's own checkpoints: with and without decoder, fine-tuned, as PyTorch files that may hold anything."""

import os
from argparse import Namespace

import pytest
import torch
from torch import nn

from mirl.errors import UserError
from mirl.formats.reference import Reference
from mirl.formats.shapes import Heads
from mirl.models.masking import split
from mirl.models.patches import gather, patchify, sincos_positions
from mirl.tasks.weights import build_autoencoder, open_autoencoder, open_checkpoint, open_weights

WIDTH, DEPTH, HEADS, DECODER_WIDTH, DECODER_DEPTH, DECODER_HEADS = 48, 3, 4, 32, 2, 8
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
GIVEN = Heads(HEADS, DECODER_HEADS)


def encoder_modules():
    return {
        "patch_embed.proj": nn.Conv2d(3, WIDTH, 8, 8),
        "norm": nn.LayerNorm(WIDTH),
        **blocks("blocks", DEPTH, WIDTH),
    }


def blocks(prefix, depth, width):
    return {
        f"{prefix}.{b}.{name}": module
        for b in range(depth)
        for name, module in {
            "norm1": nn.LayerNorm(width), "attn.qkv": nn.Linear(width, 3 * width), "attn.proj": nn.Linear(width, width),
            "norm2": nn.LayerNorm(width), "mlp.fc1": nn.Linear(width, 4 * width),
            "mlp.fc2": nn.Linear(4 * width, width),
        }.items()
    }  # fmt: skip


def decoder_modules():
    return {
        "decoder_embed": nn.Linear(WIDTH, DECODER_WIDTH), "decoder_norm": nn.LayerNorm(DECODER_WIDTH),
        "decoder_pred": nn.Linear(DECODER_WIDTH, 8 * 8 * 3), **blocks("decoder_blocks", DECODER_DEPTH, DECODER_WIDTH),
    }  # fmt: skip


def tensors_of(modules, *parameters):
    """Return random tensors of `modules` by MAE's names, and those of single parameters."""
    torch.manual_seed(0)
    state = {f"{name}.{kind}": value for name, module in modules.items() for kind, value in module.state_dict().items()}
    state |= {name: torch.empty(shape) for name, shape in (("cls_token", (1, 1, WIDTH)), *parameters)}
    return {name: torch.randn(value.shape) * 0.1 + ("norm" in name) for name, value in state.items()}


def encoder():
    return tensors_of(encoder_modules(), ("pos_embed", (1, 17, WIDTH)))


def pretrained():
    state = tensors_of(
        encoder_modules() | decoder_modules(), ("pos_embed", (1, 17, WIDTH)), ("mask_token", (1, 1, DECODER_WIDTH)),
        ("decoder_pos_embed", (1, 17, DECODER_WIDTH)),
    )  # fmt: skip
    positions = sincos_positions(DECODER_WIDTH, (4, 4))  # fixed, and computed anew when the file is opened
    state["decoder_pos_embed"] = torch.cat([torch.zeros(1, DECODER_WIDTH), positions])[None]
    return state


def saved(path, state, *, wrapped=False, **options):
    torch.save({"model": state, "args": Namespace(lr=0.1), "epoch": 3} if wrapped else state, path, **options)
    return str(path)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_predictions_equal_those_of_the_files_own_tensors(wrapped, zipped, tmp_path):
    state = pretrained()
    path = saved(tmp_path / "mae.pth", state, wrapped=wrapped, _use_new_zipfile_serialization=zipped)
    weights = open_autoencoder(path, heads=GIVEN)
    assert weights.settings == {
        "model": "vit_48x4_3", "method": "mae", "image_size": [32, 32], "patch_size": [8, 8], "channels": 3,
        "decoder_width": 32, "decoder_depth": 2, "decoder_heads": 8,
    }  # fmt: skip
    visible, masked = split(torch.rand(2, 16), 0.75)
    with torch.no_grad():
        (expected,) = Reference(state, HEADS, transposed=False).mae(IMAGES, visible, DECODER_HEADS)
        (ours,) = build_autoencoder(weights)(patchify(IMAGES, (8, 8)), visible, masked, all_patches=True)
    expected = gather(expected, torch.cat([visible, masked], 1))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_every_tensor_of_the_file_arrives(tmp_path):
    state = pretrained()
    ours = open_autoencoder(saved(tmp_path / "mae.pth", state), heads=GIVEN).state
    assert sum(v.numel() for v in ours.values()) == sum(v.numel() for v in state.values()) - 17 * DECODER_WIDTH
    qkv = [ours[f"decoders.0.blocks.1.self_attention.{part}.weight"] for part in ("q", "kv")]
    assert torch.equal(torch.cat(qkv), state["decoder_blocks.1.attn.qkv.weight"])
    assert torch.equal(ours["encoder.blocks.2.attn.qkv.bias"], state["blocks.2.attn.qkv.bias"])


def test_heads_that_no_tensor_tells_must_be_given(tmp_path):
    path = saved(tmp_path / "mae.pth", pretrained())
    with pytest.raises(UserError, match="width of 48; give --heads"):
        open_autoencoder(path)
    with pytest.raises(UserError, match="width of 32; give --decoder_heads"):
        open_autoencoder(path, heads=Heads(4))


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_encoder_gives_the_files_features(wrapped, tmp_path):
    state = encoder()
    weights = open_checkpoint(saved(tmp_path / "vit.pth", state, wrapped=wrapped), heads=GIVEN)
    with torch.no_grad():
        expected = Reference(state, HEADS, transposed=False).classify(IMAGES)
        torch.testing.assert_close(weights.share()(IMAGES), expected, atol=1e-6, rtol=1e-5)


def test_the_encoder_of_a_pre_trained_file_is_that_encoder(tmp_path):
    state = pretrained()
    weights = open_weights(saved(tmp_path / "mae.pth", state), heads=GIVEN)
    with torch.no_grad():
        expected = Reference(state, HEADS, transposed=False).classify(IMAGES)
        torch.testing.assert_close(weights.share()(IMAGES), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("pooled", ["fc_norm", "norm"])
def test_a_fine_tuned_classifier_gives_the_files_scores(pooled, tmp_path):
    modules = encoder_modules()
    modules[pooled] = modules.pop("norm")
    state = tensors_of(modules | {"head": nn.Linear(WIDTH, 5)}, ("pos_embed", (1, 17, WIDTH)))
    weights = open_weights(saved(tmp_path / "finetuned.pth", state, wrapped=True), heads=GIVEN)
    assert weights.classes == tuple("01234")
    with torch.no_grad():
        expected = Reference(state, HEADS, transposed=False).classify(IMAGES)
        torch.testing.assert_close(weights.share()(IMAGES), expected, atol=1e-6, rtol=1e-5)


def test_half_precision_is_read_as_single(tmp_path):
    state = {name: value.bfloat16() for name, value in encoder().items()}
    weights = open_weights(saved(tmp_path / "vit.pth", state), heads=GIVEN)
    assert all(weights.state[name].dtype == torch.float32 for name in state)
    assert all(torch.equal(weights.state[name], value.float()) for name, value in state.items())


class Malicious:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": encoder(), "args": x}, lambda x: {"cls_token": x}])
def test_a_file_that_runs_code_is_refused(wrap, zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(wrap(Malicious()), "bad.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="no PyTorch file of plain tensors") as caught:
        open_weights("bad.pth", heads=GIVEN)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"model": 3}, {0: torch.zeros(1)}, nn.Linear(1, 1).weight, {}])
def test_what_holds_no_named_tensors_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="no model of named tensors|no ViT that is known"):
        open_weights(str(tmp_path / "bad.pth"), heads=GIVEN)


def test_a_tensor_larger_than_its_bytes_is_refused(tmp_path):
    huge = torch.zeros(1).as_strided((10**6, 10**6), (0, 0))  # 4 bytes that say that they are terabytes
    path = saved(tmp_path / "bomb.pth", encoder() | {"blocks.0.mlp.fc1.weight": huge})
    with pytest.raises(UserError, match="holds no model of named tensors"):
        open_weights(path, heads=GIVEN)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_truncated_file_is_refused_in_a_line(zipped, tmp_path):
    saved(tmp_path / "whole.pth", {"cls_token": torch.zeros(1, 1, WIDTH)}, _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "whole.pth").read_bytes()
    for end in range(0, len(content), 37):
        (tmp_path / "part.pth").write_bytes(content[:end])
        with pytest.raises(UserError) as caught:
            open_weights(str(tmp_path / "part.pth"), heads=GIVEN)
        assert "\n" not in str(caught.value), end
