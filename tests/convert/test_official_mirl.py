"""Parity with the official implementation, and an unpickler that admits nothing else."""

import json
import os
import pickle

import numpy as np
import pytest
import torch

from mirl.convert import official_mirl
from mirl.errors import UserError
from mirl.methods import mirl
from mirl.models.autoencoder import Autoencoder
from mirl.models.decoder import DecoderShape
from mirl.models.encoder import build_encoder
from mirl.models.masking import split
from mirl.models.patches import gather, patchify
from mirl.objectives.pixels import pixel_target, reconstruction_loss


@pytest.fixture
def official(golden):
    """Return our autoencoder with the official checkpoint's weights, and the official outputs."""
    config = json.loads((golden / "config.json").read_text())
    method = mirl(config["depth"], taps=[*(index + 1 for index in config["out_indices"]), config["depth"]])
    image_size, patch_size = (config["img_size"],) * 2, (config["patch_size"],) * 2
    encoder = build_encoder(config["embed_dim"], config["num_heads"], config["depth"], image_size, patch_size, 3)
    shape = DecoderShape(
        config["decoder_embed_dims"][0], config["decoder_depth"], config["decoder_num_heads"],
        did_blocks="all", did_memory="embedded", weight_norm=True,
    )  # fmt: skip
    model = Autoencoder(encoder, method, shape)
    parameters = official_mirl.read_checkpoint(golden / "checkpoint-official.pd")
    model.load_state_dict(official_mirl.convert(parameters, model))
    with np.load(golden / "io.npz") as outputs:
        return model, {name: torch.from_numpy(outputs[name]) for name in outputs.files}, config["mask_ratio"]


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
    loss, terms = reconstruction_loss(model(patches, visible, masked), target, model.method.terms)
    torch.testing.assert_close(terms.mean(1).double(), outputs["loss_terms"], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss.mean(), outputs["loss"], atol=1e-5, rtol=0)

    loss.mean().backward()
    ours = dict(model.named_parameters())
    compared, relative = 0, []
    for official_name, names in official_mirl.parameter_names(model).items():
        if (expected := outputs.get(f"gradnorm/{official_name}")) is not None:
            norm = torch.cat([ours[name].grad.flatten() for name in names]).norm()
            torch.testing.assert_close(norm, expected.to(norm.dtype), atol=0, rtol=1e-4, msg=official_name)
            compared += 1
            relative.append((norm / expected - 1).abs().item())
    losses = (terms.mean(1) - outputs["loss_terms"]).abs().max(), (loss.mean() - outputs["loss"]).abs()
    print(f"largest differences: predictions {max(differences):.1e}, terms {losses[0]:.1e}, loss {losses[1]:.1e}, "
          f"gradient norms {max(relative):.1e} relative")  # fmt: skip
    assert compared == sum(name.startswith("gradnorm/") for name in outputs) == 337


def test_fixed_positions_equal_the_checkpoints(golden):
    parameters = official_mirl.read_checkpoint(golden / "checkpoint-official.pd")
    encoder = build_encoder(48, 4, 1, (32, 32), (4, 4), 3)
    np.testing.assert_array_equal(encoder.pos_embed.numpy(), parameters["pos_embed"])


def test_a_checkpoint_of_another_shape_is_refused(official, golden):
    model, *_ = official
    parameters = official_mirl.read_checkpoint(golden / "checkpoint-official.pd")
    missing = {name: value for name, value in parameters.items() if name != "norm3.bias"}
    with pytest.raises(UserError, match="lacks 'norm3.bias'"):
        official_mirl.convert(missing, model)
    with pytest.raises(UserError, match="'blocks.99' .* has no place"):
        official_mirl.convert(parameters | {"blocks.99": np.zeros(1)}, model)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.parametrize("payload", [Malicious(), {"model": {"a": Malicious()}}])
def test_a_pickle_that_runs_code_is_refused_by_name(payload, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pd").write_bytes(pickle.dumps(payload))
    with pytest.raises(UserError, match="asks for 'posix.system'"):
        official_mirl.read_checkpoint(tmp_path / "bad.pd")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps({"weights": 1}), pickle.dumps([1])[:-3]])
def test_what_is_no_checkpoint_is_refused(content, tmp_path):
    (tmp_path / "bad.pd").write_bytes(content)
    with pytest.raises(UserError, match="checkpoint|holds no 'model'"):
        official_mirl.read_checkpoint(tmp_path / "bad.pd")
