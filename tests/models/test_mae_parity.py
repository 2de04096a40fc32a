"""Plain MAE equals Hugging Face's ViTMAEForPreTraining with the same weights and noise."""

import pytest
import torch

from mirl.methods import mae
from mirl.models.autoencoder import Autoencoder
from mirl.models.decoder import DecoderShape
from mirl.models.encoder import build_encoder
from mirl.models.masking import split
from mirl.models.patches import gather, patchify
from mirl.objectives.pixels import pixel_target, reconstruction_loss

transformers = pytest.importorskip("transformers", reason="transformers, the reference, is not installed")


def renamed(theirs: dict[str, torch.Tensor], depth: int, decoder_depth: int) -> dict[str, torch.Tensor]:
    """Return our autoencoder's state dict from Hugging Face's."""
    parts = {
        "vit.embeddings.cls_token": "encoder.cls_token",
        "vit.embeddings.position_embeddings": "encoder.pos_embed",
        "decoder.mask_token": "decoders.0.mask_token",
    }
    modules = {
        "vit.embeddings.patch_embeddings.projection": "encoder.patch_embed.proj",
        "vit.layernorm": "encoder.norm",
        "decoder.decoder_embed": "decoders.0.embed",
        "decoder.decoder_norm": "decoders.0.norm",
        "decoder.decoder_pred": "decoders.0.predict",
    }
    ours = {}
    for side, count, block, names in (
        ("vit.layers", depth, "encoder.blocks", ("norm1", "norm2", "attn.proj")),
        (
            "decoder.decoder_layers",
            decoder_depth,
            "decoders.0.blocks",
            ("norm_self", "norm_mlp", "self_attention.proj"),
        ),
    ):
        for i in range(count):
            own = ("layernorm_before", "layernorm_after", "attention.o_proj")
            modules |= {f"{side}.{i}.{a}": f"{block}.{i}.{b}" for a, b in zip(own, names, strict=True)}
            modules |= {f"{side}.{i}.mlp.fc{k}": f"{block}.{i}.mlp.fc{k}" for k in (1, 2)}
            for kind in ("weight", "bias"):
                q, k, v = (theirs[f"{side}.{i}.attention.{x}_proj.{kind}"] for x in "qkv")
                if side == "vit.layers":
                    ours[f"{block}.{i}.attn.qkv.{kind}"] = torch.cat([q, k, v])
                else:
                    ours[f"{block}.{i}.self_attention.q.{kind}"] = q
                    ours[f"{block}.{i}.self_attention.kv.{kind}"] = torch.cat([k, v])
    parts |= {f"{a}.{kind}": f"{b}.{kind}" for a, b in modules.items() for kind in ("weight", "bias")}
    return ours | {b: theirs[a] for a, b in parts.items()}


@pytest.mark.parametrize("normalised", [True, False])
def test_loss_and_gradients_equal_hugging_faces(normalised):
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
    model = Autoencoder(build_encoder(48, 4, 3, (32, 32), (8, 8), 3), mae(3), DecoderShape(32, 2, 4))
    model.load_state_dict(renamed(reference.state_dict(), 3, 2))
    model.positions = reference.decoder.decoder_pos_embed[0, 1:]  # fixed too, but with other axes first

    images, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    expected = reference(images, noise=noise).loss
    patches, (visible, masked) = patchify(images, (8, 8)), split(noise, 0.75)
    target = pixel_target(gather(patches, masked), "normalised" if normalised else "raw")
    loss = reconstruction_loss(model(patches, visible, masked), target, model.method.terms)[0].mean()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)

    expected.backward()
    loss.backward()
    theirs = reference.vit.embeddings.patch_embeddings.projection.weight.grad
    torch.testing.assert_close(model.encoder.patch_embed.proj.weight.grad, theirs, atol=1e-5, rtol=1e-4)
