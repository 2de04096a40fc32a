"""Plain MAE equals Hugging Face's ViTMAEForPreTraining with the same weights and noise."""

import pytest
import torch
from safetensors.torch import load_file

from mirl.formats.huggingface import decoder_names, encoder_names
from mirl.formats.renaming import join
from mirl.methods import mae
from mirl.models.autoencoder import Autoencoder
from mirl.models.decoder import DecoderShape
from mirl.models.encoder import build_encoder
from mirl.models.masking import split
from mirl.models.patches import gather, patchify
from mirl.objectives.pixels import pixel_target, reconstruction_loss

transformers = pytest.importorskip("transformers", reason="transformers, the reference, is not installed")


def opened(reference, folder):
    """Return our autoencoder with the weights that Hugging Face's saves, and its decoder's positions."""
    reference.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.replace("decoder_encoder.layer.", "decoder_layers."): value for name, value in tensors.items()}
    state = {}
    for prefix, names in (("encoder", encoder_names(3, prefix="vit.")), ("decoders.0", decoder_names(2))):
        state |= {f"{prefix}.{name}": value for name, value in join(tensors, names).items()}
    assert set(tensors) <= {"decoder.decoder_pos_embed"}
    model = Autoencoder(build_encoder(48, 4, 3, (32, 32), (8, 8), 3), mae(3), DecoderShape(32, 2, 4))
    model.load_state_dict(state)
    model.positions = reference.decoder.decoder_pos_embed[0, 1:]  # fixed too, but with other axes first
    return model


@pytest.mark.parametrize("normalised", [True, False])
def test_loss_and_gradients_equal_hugging_faces(normalised, tmp_path):
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192, image_size=32, patch_size=8,
        decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
        decoder_intermediate_size=128, norm_pix_loss=normalised, layer_norm_eps=1e-6, mask_ratio=0.75,
    )  # fmt: skip
    reference = transformers.ViTMAEForPreTraining(config)
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    model = opened(reference, tmp_path)

    images, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    expected = reference(images, noise=noise).loss
    patches, (visible, masked) = patchify(images, (8, 8)), split(noise, 0.75)
    target = pixel_target(gather(patches, masked), "normalised" if normalised else "raw")
    loss = reconstruction_loss(model(patches, visible, masked), {"image": target}, model.method.terms)[0].mean()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)

    expected.backward()
    loss.backward()
    theirs = reference.vit.embeddings.patch_embeddings.projection.weight.grad
    torch.testing.assert_close(model.encoder.patch_embed.proj.weight.grad, theirs, atol=1e-5, rtol=1e-4)
