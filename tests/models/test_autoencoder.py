"""The autoencoder does what the methods say, and computes no more than the loss needs."""

import pytest
import torch

from mirl.errors import UserError
from mirl.methods import Method, mae, mirl
from mirl.models.autoencoder import Autoencoder, build_autoencoder
from mirl.models.decoder import DecoderShape
from mirl.models.encoder import parse_model
from mirl.models.masking import split
from mirl.models.patches import gather, patchify
from mirl.objectives.pixels import pixel_target, reconstruction_loss

PAPER = DecoderShape(32, 2, 4)
OFFICIAL = DecoderShape(32, 2, 4, did_blocks="all", did_memory="embedded", weight_norm=True)
METHODS = [mae(6), mirl(6, 1), mirl(6, 2), mirl(6, 6), mirl(6, 2, context="none"), mirl(6, taps=(1, 6))]


def autoencoder(method: Method, shape: DecoderShape = PAPER, **options) -> Autoencoder:
    torch.manual_seed(0)
    sizes = {"image_size": (32, 32), "patch_size": (8, 8), "channels": 3} | options
    return build_autoencoder("vit_ti_6", method, shape, **sizes)


def example(model: Autoencoder, images: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    patches = torch.randn(images, len(model.positions), model.patch_values)
    return patches, *split(torch.rand(images, len(model.positions)), 0.75)


def label(value: object) -> str | None:
    return f"{value.name}{len(value.taps)}-{value.context}" if isinstance(value, Method) else None


@pytest.mark.parametrize("shape", [PAPER, OFFICIAL], ids=["paper", "official"])
@pytest.mark.parametrize("method", METHODS, ids=label)
def test_every_parameter_gets_a_gradient(method, shape):
    model = autoencoder(method, shape)
    patches, visible, masked = example(model)
    target = pixel_target(gather(patches, masked), "normalised")
    loss, _ = reconstruction_loss(model(patches, visible, masked), {"image": target}, method.terms)
    loss.mean().backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    assert without == []


@pytest.mark.parametrize("shape", [PAPER, OFFICIAL, DecoderShape(32, 1, 4)], ids=["paper", "official", "one block"])
@pytest.mark.parametrize("method", METHODS, ids=label)
def test_masked_predictions_equal_the_full_computation(method, shape):
    model = autoencoder(method, shape)
    patches, visible, masked = example(model)
    full = model(patches, visible, masked, all_patches=True)
    for short, whole in zip(model(patches, visible, masked), full, strict=True):
        assert whole.shape[1] == patches.shape[1]
        torch.testing.assert_close(short, whole[:, visible.shape[1] :], rtol=1e-5, atol=1e-5)


def test_a_prediction_does_not_depend_on_deeper_segments():
    model = autoencoder(mirl(6, 6))
    batch = example(model)
    before = model(*batch)
    with torch.no_grad():
        for parameter in model.encoder.blocks[3].parameters():
            parameter.add_(0.1)
    same = [torch.equal(a, b) for a, b in zip(before, model(*batch), strict=True)]
    assert same == [True, True, True, False, False, False]


def test_did_lets_a_decoder_read_earlier_segments():
    for context, reached in (("dense", True), ("none", False)):
        model = autoencoder(mirl(6, 2, context=context))
        patches, visible, masked = example(model)
        for parameter in model.encoder.parameters():
            parameter.requires_grad_(False)
        with torch.no_grad():  # cut the residual stream: only DID can carry z_1 past the last segment
            for block in model.encoder.blocks[3:]:
                block.register_forward_hook(lambda *arguments: torch.zeros_like(arguments[2]))
        deep = [model(patches, visible, masked)[1]]
        with torch.no_grad():
            model.encoder.blocks[0].mlp.fc1.weight.add_(0.5)
        deep.append(model(patches, visible, masked)[1])
        assert torch.equal(*deep) is not reached


def test_only_visible_patches_matter_for_predictions():
    model = autoencoder(mirl(6, 2))
    patches, visible, masked = example(model)
    changed = patches.scatter(1, masked[..., None].expand(-1, -1, patches.shape[-1]), 9.0)
    for a, b in zip(model(patches, visible, masked), model(changed, visible, masked), strict=True):
        assert torch.equal(a, b)


def test_visible_embedding_equals_timms_own():
    model = autoencoder(mae(6), image_size=(32, 48), patch_size=(8, 4), channels=5)
    images = torch.randn(2, 5, 32, 48)
    everything = torch.arange(len(model.positions)).expand(2, -1)
    from mirl.models.encoder import embed_visible, run_segments

    tokens = embed_visible(model.encoder, patchify(images, (8, 4)), everything)
    ours = model.encoder.norm(run_segments(model.encoder, tokens, (6,))[-1])
    torch.testing.assert_close(ours, model.encoder.forward_features(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [
    {"image_size": (24, 40), "patch_size": (8, 4), "channels": 1}, {"image_size": (4, 4), "patch_size": (1, 1)},
    {"image_size": (32, 32), "patch_size": (16, 8), "channels": 7},
])  # fmt: skip
def test_any_size_patch_and_channels(options):
    model = autoencoder(mirl(6, 2), **options)
    predictions = model(*example(model))
    assert [p.shape for p in predictions] == [(2, predictions[0].shape[1], model.patch_values)] * 2


def test_weight_norm_gives_each_input_feature_unit_length():
    model = autoencoder(mirl(6, 2), OFFICIAL)
    torch.testing.assert_close(model.decoders[0].predict.weight.norm(dim=0), torch.ones(32))


def test_bfloat16_is_close_to_float32():
    model = autoencoder(mirl(6, 2))
    batch = example(model)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(*batch)
    for a, b in zip(low, model(*batch), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    ("name", "parsed"), [("vit_s_54", (384, 12, 54)), ("vit_ti_3", (192, 3, 3)), ("vit_l_24", (1024, 16, 24))]
)
def test_model_names(name, parsed):
    assert parse_model(name) == parsed


@pytest.mark.parametrize("name", ["vit_x_12", "vit_s_0", "vit_s", "resnet50", ""])
def test_unknown_models_are_refused_with_the_pattern(name):
    with pytest.raises(UserError, match=r"use vit_\{ti,s,b,l\}_DEPTH"):
        parse_model(name)


def test_patches_that_do_not_tile_are_refused_with_a_near_size():
    with pytest.raises(UserError, match=r"choose --image_size \[32,32\]"):
        autoencoder(mae(6), image_size=(30, 33))
