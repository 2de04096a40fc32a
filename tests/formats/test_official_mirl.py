"""Parity with the official implementation, and its checkpoints at the paper's full sizes."""

import json
import pickle
import re

import numpy as np
import pytest
import torch

from mirl.errors import UserError
from mirl.formats import official_mirl
from mirl.formats.paddle import Parameters, read_checkpoint
from mirl.formats.reference import Reference
from mirl.formats.shapes import Heads
from mirl.models.encoder import build_encoder
from mirl.models.masking import split
from mirl.models.patches import gather, patchify
from mirl.objectives.pixels import pixel_target, reconstruction_loss
from mirl.tasks.weights import build_autoencoder, open_autoencoder, open_checkpoint, open_weights


@pytest.fixture
def official(golden):
    """Return our autoencoder with the official checkpoint's weights, and the official outputs."""
    config = json.loads((golden / "config.json").read_text())
    model = build_autoencoder(open_autoencoder(str(golden / "checkpoint-official.pd"), heads=Heads(4, 4))).train()
    with np.load(golden / "io.npz") as outputs:
        return model, {name: torch.from_numpy(outputs[name]) for name in outputs.files}, config["mask_ratio"]


def test_a_checkpoint_tells_the_options_that_build_it(golden):
    config = json.loads((golden / "config.json").read_text())
    settings = open_autoencoder(str(golden / "checkpoint-official.pd"), heads=Heads(4, 4)).settings
    assert settings == {
        "model": f"vit_{config['embed_dim']}x{config['num_heads']}_{config['depth']}",
        "method": "mirl",
        "taps": [*(index + 1 for index in config["out_indices"]), config["depth"]],
        "image_size": [config["img_size"]] * 2,
        "patch_size": [config["patch_size"]] * 2,
        "channels": 3,
        "decoder_width": config["decoder_embed_dims"][0],
        "decoder_depth": config["decoder_depth"],
        "decoder_heads": config["decoder_num_heads"],
        "did_blocks": "all",
        "did_memory": "embedded",
        "weight_norm": True,
    }


def test_heads_that_no_tensor_tells_must_be_given(golden):
    path = str(golden / "checkpoint-official.pd")
    for heads, reason in (
        (None, "width of 48; give --heads"),
        (Heads(4), "width of 32; give --decoder_heads"),
        (Heads(5, 4), "--heads 5 does not divide the width of 48"),
        (Heads(4, 5), "--decoder_heads 5 does not divide the width of 32"),
    ):
        with pytest.raises(UserError, match=reason):
            open_autoencoder(path, heads=heads)


def test_masks(official):
    _, outputs, ratio = official
    visible, masked = split(outputs["noise"], ratio)
    assert torch.equal(torch.cat([visible, masked], 1).argsort(1), outputs["ids_restore"])
    assert torch.equal(outputs["mask"].gather(1, masked), torch.ones(masked.shape))


def test_predictions_loss_and_gradients(official):
    model, outputs, ratio = official
    visible, masked = split(outputs["noise"], ratio)
    patches = patchify(outputs["images"], model.patch_size)
    order = torch.cat([visible, masked], 1)
    differences = []
    for number, prediction in enumerate(model(patches, visible, masked, all_patches=True)):
        expected = gather(outputs[f"pred{number}"], order)
        torch.testing.assert_close(prediction, expected, atol=1e-5, rtol=0)
        differences.append((prediction - expected).abs().max().item())

    target = pixel_target(gather(patches, masked), "normalised")
    loss, terms = reconstruction_loss(model(patches, visible, masked), {"image": target}, model.method.terms)
    torch.testing.assert_close(terms.mean(1).double(), outputs["loss_terms"], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss.mean(), outputs["loss"], atol=1e-5, rtol=0)

    loss.mean().backward()
    ours = dict(model.named_parameters())
    compared, relative = 0, []
    for official_name, names in official_mirl.names_of(model).items():
        if (expected := outputs.get(f"gradnorm/{official_name}")) is not None:
            norm = torch.cat([ours[name].grad.flatten() for name in dict.fromkeys(names)]).norm()
            torch.testing.assert_close(norm, expected.to(norm.dtype), atol=0, rtol=1e-4, msg=official_name)
            compared += 1
            relative.append((norm / expected - 1).abs().item())
    losses = (terms.mean(1) - outputs["loss_terms"]).abs().max(), (loss.mean() - outputs["loss"]).abs()
    print(f"largest differences: predictions {max(differences):.1e}, terms {losses[0]:.1e}, loss {losses[1]:.1e}, "
          f"gradient norms {max(relative):.1e} relative")  # fmt: skip
    assert compared == sum(name.startswith("gradnorm/") for name in outputs) == 337


def test_the_reference_equals_the_official_outputs(golden, official):
    """What `mirl convert` checks against is itself the official model."""
    model, outputs, ratio = official
    reference = Reference(read_checkpoint(golden / "checkpoint-official.pd"), 4, transposed=True)
    visible, _ = split(outputs["noise"], ratio)
    predictions = reference.mirl(outputs["images"], visible, 4, model.method.taps)
    assert len(predictions) == 6
    for number, prediction in enumerate(predictions):
        torch.testing.assert_close(prediction, outputs[f"pred{number}"], atol=1e-5, rtol=0)


def test_fixed_positions_equal_the_checkpoints(golden, official):
    parameters = read_checkpoint(golden / "checkpoint-official.pd")
    encoder = build_encoder(48, 4, 1, (32, 32), (4, 4), 3)
    np.testing.assert_array_equal(encoder.pos_embed.numpy(), parameters["pos_embed"])
    model, *_ = official
    for number in range(6):  # these are computed anew, not converted
        np.testing.assert_array_equal(model.positions.numpy(), parameters[f"decoder_pos_embed{number}"][0, 1:])


def pickled(arrays, path):
    """Write parameters as the official trainer does."""
    path.write_bytes(pickle.dumps({"model": {name: ("eager_tmp_0", value) for name, value in arrays.items()}}, 4))
    return str(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"norm3.bias": None}, "lacks 'norm3.bias' (and 0 more)"),
        ({"blocks.99": np.zeros(1, np.float32)}, "'blocks.99' (and 0 more) has no place"),
        ({"blocks.3.norm1.weight": np.zeros(47, np.float32)}, "'encoder.blocks.3.norm1.weight' has shape [47]"),
        ({"blocks.3.norm1.weight": np.array(1.0, np.float32)}, "'encoder.blocks.3.norm1.weight' has shape []"),
        ({"decoder_blocks2.0.attn.qkv.weight": np.array(1.0, np.float32)}, "not 3 equal parts"),
        ({"blocks.99999999999999.norm1.weight": np.zeros(48, np.float32)}, "has no place"),
        ({"cls_token": np.array(1.0, np.float32)}, "no ViT that is known here"),
        ({"pos_embed": None}, "no ViT that is known here"),
        ({"pos_embed": np.zeros((1, 64, 48), np.float32)}, "positions are of 63 patches, which are no square"),
        ({"pos_embed": np.zeros((1, 1, 48), np.float32)}, "positions are of 0 patches"),
        ({"norm_low.weight": None}, "none of the official MIRL's"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(change, reason, golden, tmp_path):
    parameters = dict(read_checkpoint(golden / "checkpoint-official.pd")) | change
    arrays = {name: np.asarray(value) for name, value in parameters.items() if value is not None}
    path = pickled(arrays, tmp_path / "a.pd")
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        open_autoencoder(path, heads=Heads(4, 4))
    assert "\n" not in str(caught.value)


def encoder_layout(width, depth, patch=16, side=14):
    """Return the official names and shapes of an encoder; matrices are (in, out)."""
    return {
        "cls_token": (1, 1, width), "pos_embed": (1, side * side + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,),
        **{k: v for b in range(depth) for k, v in block_layout(f"blocks.{b}", width, norms=2).items()},
    }  # fmt: skip


def affine(name, inputs, outputs):
    return {f"{name}.weight": (inputs, outputs), f"{name}.bias": (outputs,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def block_layout(name, width, norms):
    shapes = {k: v for i in range(norms) for k, v in norm(f"{name}.norm{i + 1}", width).items()}
    shapes |= affine(f"{name}.attn.qkv", width, 3 * width) | affine(f"{name}.attn.proj", width, width)
    if norms == 4:
        shapes |= affine(f"{name}.cross_attn.q", width, width) | affine(f"{name}.cross_attn.kv", width, 2 * width)
        shapes |= affine(f"{name}.cross_attn.proj", width, width)
    return shapes | affine(f"{name}.mlp.fc1", width, 4 * width) | affine(f"{name}.mlp.fc2", 4 * width, width)


def full_layout(width, depth, decoder_width, decoder_depth):
    shapes = encoder_layout(width, depth) | norm("norm", width) | norm("norm_low", width)
    shapes |= affine("decoder_embed0_1", width, decoder_width)
    for g in range(6):
        shapes |= norm(f"norm{g}", width) if g < 5 else {}
        shapes |= {f"mask_token{g}": (1, 1, decoder_width), f"decoder_pos_embed{g}": (1, 197, decoder_width)}
        shapes |= affine(f"decoder_embed{g}", width, decoder_width) | norm(f"decoder_norm{g}", decoder_width)
        for b in range(decoder_depth):
            shapes |= block_layout(f"decoder_blocks{g}.{b}", decoder_width, norms=4)
        shapes[f"decoder_pred{g}.weight_g"] = (decoder_width,)
        shapes[f"decoder_pred{g}.weight_v"] = (decoder_width, 768)
        shapes[f"decoder_pred{g}.bias"] = (768,)
    return shapes


def random_arrays(shapes):
    """Return small random arrays, near one where they scale; each begins elsewhere in the same random numbers."""
    drawn = 0.02 * np.random.default_rng(0).standard_normal(2**22, dtype=np.float32)
    scales = re.compile(r"norm\w*\.weight|weight_g")
    return {
        name: np.resize(drawn[101 * number :], shape) + bool(scales.search(name)) * np.float32(1)
        for number, (name, shape) in enumerate(shapes.items())
    }


def as_official(state, name):
    """Return the official tensor of that name from our state, by rules of its own."""
    for pattern, ours in (
        (r"(cls_token|pos_embed|patch_embed\..*|blocks\..*|norm\.\w+)", r"encoder.\1"),
        (r"norm(\d)\.(\w+)", r"norms.\1.\2"),
        (r"norm_low\.(\w+)", r"embed_input.0.\1"),
        (r"decoder_embed0_1\.(\w+)", r"embed_input.1.\1"),
        (r"mask_token(\d)", r"decoders.\1.mask_token"),
        (r"decoder_(embed|norm)(\d)\.(\w+)", r"decoders.\2.\1.\3"),
        (r"decoder_pred(\d)\.bias", r"decoders.\1.predict.bias"),
        (r"decoder_pred(\d)\.weight_g", r"decoders.\1.predict.parametrizations.weight.original0"),
        (r"decoder_pred(\d)\.weight_v", r"decoders.\1.predict.parametrizations.weight.original1"),
        (r"decoder_blocks(\d)\.(\d+)\.norm1\.(\w+)", r"decoders.\1.blocks.\2.norm_self.\3"),
        (r"decoder_blocks(\d)\.(\d+)\.norm2\.(\w+)", r"decoders.\1.blocks.\2.norm_did.\3"),
        (r"decoder_blocks(\d)\.(\d+)\.norm3\.(\w+)", r"decoders.\1.blocks.\2.norm_memory.\3"),
        (r"decoder_blocks(\d)\.(\d+)\.norm4\.(\w+)", r"decoders.\1.blocks.\2.norm_mlp.\3"),
        (r"decoder_blocks(\d)\.(\d+)\.attn\.(.*)", r"decoders.\1.blocks.\2.self_attention.\3"),
        (r"decoder_blocks(\d)\.(\d+)\.cross_attn\.(.*)", r"decoders.\1.blocks.\2.did.\3"),
        (r"decoder_blocks(\d)\.(\d+)\.(mlp\..*)", r"decoders.\1.blocks.\2.\3"),
    ):
        if match := re.fullmatch(pattern, name):
            found = match.expand(ours)
            break
    if ".qkv." in found and found not in state:
        tensor = torch.cat([state[found.replace(".qkv.", f".{part}.")] for part in ("q", "kv")])
    else:
        tensor = state[found]
    return tensor.T if tensor.ndim == 2 and "weight_g" not in name else tensor.flatten() if "_g" in name else tensor


@pytest.mark.parametrize(
    ("model", "sizes", "heads"), [("vit_s_54", (384, 54, 384, 1), (12, 12)), ("vit_b_48", (768, 48, 512, 2), (12, 16))]
)
def test_the_papers_checkpoints_open_without_being_told_their_heads(model, sizes, heads, tmp_path):
    arrays = random_arrays(full_layout(*sizes))
    path = tmp_path / "checkpoint.pd"
    with path.open("wb") as file:
        pickle.dump({"model": {name: ("eager_tmp_0", value) for name, value in arrays.items()}}, file, protocol=4)
    weights = open_autoencoder(str(path))
    path.unlink()
    depth = sizes[1]
    assert weights.settings == {
        "model": model, "method": "mirl", "taps": [depth * g // 6 for g in range(1, 7)], "image_size": [224, 224],
        "patch_size": [16, 16], "channels": 3, "decoder_width": sizes[2], "decoder_depth": sizes[3],
        "decoder_heads": heads[1], "did_blocks": "all", "did_memory": "embedded", "weight_norm": True,
    }  # fmt: skip
    converted = [name for name in arrays if not name.startswith("decoder_pos_embed")]
    for name in converted:
        assert np.array_equal(as_official(weights.state, name).numpy(), arrays[name]), name
    assert sum(v.numel() for v in weights.state.values()) == sum(arrays[name].size for name in converted)

    built = build_autoencoder(weights)
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    for g in range(6):
        tensors[f"decoder_pos_embed{g}"] = torch.cat([torch.zeros_like(built.positions[:1]), built.positions])[None]
    image, noise = torch.randn(1, 3, 224, 224), torch.rand(1, 196)
    visible, masked = split(noise, 0.75)
    with torch.no_grad():
        expected = Reference(tensors, heads[0], transposed=True).mirl(image, visible, heads[1], built.method.taps)
        predictions = built(patchify(image, (16, 16)), visible, masked, all_patches=True)
    for prediction, reference in zip(predictions, expected, strict=True):
        reference = gather(reference, torch.cat([visible, masked], 1))
        assert reference.std() > 0.01
        torch.testing.assert_close(prediction, reference, rtol=0, atol=1e-4 * float(reference.abs().max()))


@pytest.mark.parametrize("head", ["fc_norm", "norm"])
def test_a_fine_tuned_classifier_gives_the_official_scores(head, tmp_path):
    shapes = encoder_layout(48, 3, patch=8, side=4) | norm(head, 48) | affine("head", 48, 7)
    arrays = random_arrays(shapes)
    weights = open_weights(pickled(arrays, tmp_path / "classifier.pd"), heads=Heads(4))
    assert (weights.name, weights.classes) == ("vit_48x4_3", tuple("0123456"))
    assert np.array_equal(weights.state["blocks.1.mlp.fc1.weight"].numpy(), arrays["blocks.1.mlp.fc1.weight"].T)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = Reference(Parameters(arrays), 4, transposed=True).classify(images)
        for model in (weights.share(), weights.build()):
            torch.testing.assert_close(model(images), expected, atol=1e-6, rtol=1e-5)


def test_an_encoder_alone_gives_the_official_features(tmp_path):
    arrays = random_arrays(encoder_layout(48, 3, patch=8, side=4) | norm("norm", 48))
    path = pickled(arrays, tmp_path / "encoder.pdparams")
    weights = open_checkpoint(path, heads=Heads(4))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = Reference(Parameters(arrays), 4, transposed=True).classify(images)
        torch.testing.assert_close(weights.share()(images), expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="without decoders"):
        open_autoencoder(path, heads=Heads(4))
