"""Hugging Face's ViT and ViTMAE, as transformers itself saves them, are the same models here; and back."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from mirl.errors import UserError
from mirl.formats import huggingface
from mirl.models.masking import split
from mirl.models.patches import gather, patchify
from mirl.models.weights import AutoencoderWeights
from mirl.tasks.weights import build_autoencoder, open_autoencoder, open_weights

transformers = pytest.importorskip("transformers", reason="transformers, the reference, is not installed")

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 192}
DECODER = {
    "decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 8,
    "decoder_intermediate_size": 128,
}  # fmt: skip
SHAPES = [(32, 8, 3), ((16, 32), (8, 8), 1), ((16, 24), (8, 4), 3)]


def config_of(kind, image=32, patch=8, channels=3, **others):
    # transformers' own epsilon is 1e-12, and that of the models that were trained 1e-6 or 1e-12.
    given = {"image_size": image, "patch_size": patch, "num_channels": channels, "layer_norm_eps": 1e-6}
    return kind(**(SIZES | given | others))


def randomised(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position" not in name and "pos_embed" not in name:
                parameter.normal_(std=0.1)
    return model.eval()


def images_of(config):
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(2, config.num_channels, height, width, generator=torch.Generator().manual_seed(1))


def saved(model, folder):
    model.save_pretrained(folder)
    return str(folder)


def altered(folder, **changes):
    """Change what a config.json says; `...` takes an entry away."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_vit_has_the_same_features(shape, tmp_path):
    config = config_of(transformers.ViTConfig, *shape)
    theirs = randomised(transformers.ViTModel(config, add_pooling_layer=False))
    weights = open_weights(saved(theirs, tmp_path))
    assert weights.classes == () and weights.name == "vit_48x4_3"
    images = images_of(config)
    with torch.no_grad():
        expected = theirs(images).last_hidden_state
        for model in (weights.share(), weights.build(global_pool="")):
            tokens = model.forward_features(images)
            torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(weights.share()(images), expected[:, 1:].mean(1), atol=1e-5, rtol=1e-5)


def test_a_pooler_is_left_out(tmp_path):
    theirs = randomised(transformers.ViTModel(config_of(transformers.ViTConfig)))
    weights = open_weights(saved(theirs, tmp_path))
    assert not any("pooler" in name for name in weights.state)
    assert sum(v.numel() for v in weights.state.values()) == sum(
        p.numel() for name, p in theirs.named_parameters() if "pooler" not in name
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_classifier_has_the_same_scores_and_classes(shape, tmp_path):
    names = {0: "crack", 1: "nodule", 2: "ünnamed"}
    config = config_of(transformers.ViTConfig, *shape, id2label=names, label2id={v: k for k, v in names.items()})
    theirs = randomised(transformers.ViTForImageClassification(config))
    weights = open_weights(saved(theirs, tmp_path))
    assert weights.classes == tuple(names.values())
    images = images_of(config)
    with torch.no_grad():
        torch.testing.assert_close(weights.share()(images), theirs(images).logits, atol=1e-5, rtol=1e-5)


def test_the_normalisation_that_its_processor_states_is_kept(tmp_path):
    folder = saved(randomised(transformers.ViTModel(config_of(transformers.ViTConfig))), tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    weights = open_weights(folder)
    assert (weights.mean, weights.deviation) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def vit_mae(shape=(32, 8, 3), **others):
    """Return a ViTMAE whose decoder has MAE's own positions, as the hub's checkpoints have."""
    config = config_of(transformers.ViTMAEConfig, *shape, **(DECODER | others))
    model = randomised(transformers.ViTMAEForPreTraining(config))
    size, patch = (huggingface.pair(n) for n in (config.image_size, config.patch_size))
    model.decoder.decoder_pos_embed.data = huggingface._decoder_positions(32, size, patch)
    return model


@pytest.mark.parametrize("normalised", [True, False])
def test_a_vit_mae_has_the_same_predictions(normalised, tmp_path):
    theirs = vit_mae(norm_pix_loss=normalised, mask_ratio=0.5)
    weights = open_autoencoder(saved(theirs, tmp_path))
    assert weights.settings == {
        "model": "vit_48x4_3", "method": "mae", "image_size": [32, 32], "patch_size": [8, 8], "channels": 3,
        "decoder_width": 32, "decoder_depth": 2, "decoder_heads": 8, "mask_ratio": 0.5,
        "target": "normalised" if normalised else "raw",
    }  # fmt: skip
    model, images, noise = build_autoencoder(weights), images_of(theirs.config), torch.rand(2, 16)
    visible, masked = split(noise, 0.5)
    with torch.no_grad():
        expected = gather(theirs(images, noise=noise).logits, torch.cat([visible, masked], 1))
        (ours,) = model(patchify(images, model.patch_size), visible, masked, all_patches=True)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_a_vit_mae_without_decoder_is_its_encoder(tmp_path):
    theirs = randomised(transformers.ViTMAEModel(config_of(transformers.ViTMAEConfig, mask_ratio=0.0)))
    weights = open_weights(saved(theirs, tmp_path))
    images = images_of(theirs.config)
    with torch.no_grad():
        expected = theirs(images, noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
        torch.testing.assert_close(weights.share().forward_features(images), expected, atol=1e-5, rtol=1e-5)


def test_transformers_own_decoder_positions_are_refused_with_the_reason(tmp_path):
    config = config_of(transformers.ViTMAEConfig, **DECODER)
    folder = saved(randomised(transformers.ViTMAEForPreTraining(config)), tmp_path)
    with pytest.raises(UserError, match="rows and columns the other way round") as caught:
        open_autoencoder(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("classes", [0, 3])
def test_a_vit_written_and_read_is_the_same(shape, classes, tmp_path):
    config = config_of(transformers.ViTConfig, *shape, num_labels=classes)
    theirs = transformers.ViTForImageClassification(config) if classes else transformers.ViTModel(config)
    weights = open_weights(saved(randomised(theirs), tmp_path))
    written, tensors = huggingface.to_vit(weights)
    again = huggingface.from_vit(written, tensors, weights.mean, weights.deviation)
    assert again.state.keys() == weights.state.keys()
    assert all(torch.equal(again.state[name], value) for name, value in weights.state.items())
    assert (again.architecture, again.arguments, again.classes) == (
        weights.architecture, weights.arguments, weights.classes,
    )  # fmt: skip


def test_a_vit_mae_written_and_read_is_the_same(tmp_path):
    weights = open_autoencoder(saved(vit_mae(), tmp_path))
    model = build_autoencoder(weights)
    config, tensors = huggingface.to_vit_mae(model, weights.state, weights.settings)
    again = huggingface.from_vit_mae(config, tensors)
    assert again.settings == weights.settings
    assert again.state.keys() == weights.state.keys()
    assert all(torch.equal(again.state[name], value) for name, value in weights.state.items())


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification", "ViTMAEForPreTraining"])
def test_what_is_written_opens_in_transformers_with_nothing_missing_or_left_over(kind, tmp_path):
    mae = kind == "ViTMAEForPreTraining"
    theirs = vit_mae() if mae else randomised(getattr(transformers, kind)(config_of(transformers.ViTConfig)))
    folder = saved(theirs, tmp_path / "theirs")
    if mae:
        weights = open_autoencoder(folder)
        config, tensors = huggingface.to_vit_mae(build_autoencoder(weights), weights.state, weights.settings)
    else:
        config, tensors = huggingface.to_vit(open_weights(folder))
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    options = {"add_pooling_layer": False} if kind == "ViTModel" else {}
    opened, report = getattr(transformers, kind).from_pretrained(
        tmp_path / "ours", output_loading_info=True, **options
    )  # fmt: skip
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    expected = theirs.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in opened.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"qkv_bias": False}, "its qkv_bias is False"),
        ({"hidden_act": "relu"}, "its hidden_act is relu"),
        ({"intermediate_size": 96}, "its intermediate_size is 96; here it is 192"),
        ({"layer_norm_eps": 1e-2}, "its layer_norm_eps is 0.01; here it is 1e-06"),
    ],
)
def test_another_form_is_refused_by_name(changes, reason, tmp_path):
    config = config_of(transformers.ViTConfig, **changes)
    folder = saved(transformers.ViTModel(config), tmp_path)
    with pytest.raises(UserError, match=reason):
        open_weights(folder)


def test_the_epsilon_of_transformers_makes_no_difference(tmp_path):
    config = config_of(transformers.ViTConfig, layer_norm_eps=1e-12)
    theirs = randomised(transformers.ViTModel(config, add_pooling_layer=False))
    model, images = open_weights(saved(theirs, tmp_path)).share(), images_of(config)
    with torch.no_grad():
        expected = theirs(images).last_hidden_state
        torch.testing.assert_close(model.forward_features(images), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("extra", ["blocks.1.ls1.gamma", "reg_token", "blocks.0.attn.q_norm.weight"])
def test_layers_that_a_plain_vit_lacks_are_refused_by_name(extra, tmp_path):
    weights = open_weights(saved(transformers.ViTModel(config_of(transformers.ViTConfig)), tmp_path))
    weights.state[extra] = torch.ones(48)
    with pytest.raises(UserError, match=f"has '{re.escape(extra)}', unlike a plain ViT"):
        huggingface.to_vit(weights)


def test_layers_that_are_missing_are_refused_by_name(tmp_path):
    weights = open_weights(saved(transformers.ViTModel(config_of(transformers.ViTConfig)), tmp_path))
    del weights.state["blocks.1.attn.qkv.bias"]
    with pytest.raises(UserError, match=r"lacks 'blocks\.1\.attn\.qkv\.bias', unlike a plain ViT"):
        huggingface.to_vit(weights)


def test_a_file_that_lacks_a_tensor_is_refused_by_name(tmp_path):
    folder = saved(transformers.ViTModel(config_of(transformers.ViTConfig)), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks 'encoder\.layer\.1\.output\.dense\.bias'"):
        open_weights(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 2}, "'encoder.layer.2.attention.attention.key.bias' (and 15 more) has no place"),
        ({"num_attention_heads": 5}, "give a width that 4 and the heads divide"),
        ({"image_size": 64}, "'pos_embed' has shape [1, 17, 48]"),
        ({"image_size": 30}, "'pos_embed' has shape [1, 17, 48]"),
        ({"num_channels": 1}, "'patch_embed.proj.weight' has shape"),
        ({"hidden_size": 96, "intermediate_size": 384}, "has shape"),
        ({"num_hidden_layers": None}, "cannot be read as an encoder"),
        ({"num_hidden_layers": ...}, "its config.json lacks num_hidden_layers; give a run folder"),
    ],
)
def test_a_config_that_its_tensors_belie_is_refused_in_a_line(changes, reason, tmp_path):
    folder = saved(transformers.ViTModel(config_of(transformers.ViTConfig)), tmp_path)
    altered(tmp_path, **changes)
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        open_weights(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"decoder_num_hidden_layers": 1}, "has no place in this model"),
        ({"num_hidden_layers": 4}, "lacks 'vit.encoder.layer.3."),
        ({"num_channels": 1}, "has shape"),
        ({"decoder_num_attention_heads": 5}, "heads"),
        ({"decoder_hidden_size": ...}, "its config.json lacks decoder_hidden_size; give a run folder"),
    ],
)
def test_a_vit_mae_that_its_tensors_belie_is_refused_in_a_line(changes, reason, tmp_path):
    folder = saved(vit_mae(), tmp_path)
    altered(tmp_path, **changes)
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        open_autoencoder(folder)
    assert "\n" not in str(caught.value)


def test_other_methods_are_no_vit_mae(tmp_path):
    weights = open_autoencoder(saved(vit_mae(), tmp_path))
    normed = AutoencoderWeights(weights.settings | {"weight_norm": True}, weights.state)
    model = build_autoencoder(weights)
    model.shape = type(model.shape)(32, 2, 8, weight_norm=True)
    with pytest.raises(UserError, match="these weights are of mae with weight-normalised predictions"):
        huggingface.to_vit_mae(model, normed.state, normed.settings)
