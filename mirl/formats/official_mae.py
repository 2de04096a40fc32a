"""Checkpoints of MAE's official (PyTorch) code: what model they hold, and their names in ours."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mirl.formats.official_mirl import qkv_names
from mirl.formats.renaming import affine
from mirl.formats.shapes import Heads, block_count, encoder_arguments
from mirl.models.autoencoder import Autoencoder
from mirl.models.encoder import model_name

# Of the released models, by width: ViT-B, -L and -H; every released decoder is 512 wide.
ENCODER_HEADS = {768: 12, 1024: 16, 1280: 16}
DECODER_HEADS = {512: 16}


def settings_of(tensors: Mapping[str, Tensor], heads: Heads) -> dict[str, Any]:
    """Return the options of `mirl pretrain` that build the autoencoder whose tensors these are.

    Raises:
        UserError: if heads must be given, or the tensors are of no such model.
    """
    arguments = encoder_arguments(tensors, heads, ENCODER_HEADS)
    width = tensors["mask_token"].numel()
    return {
        "model": model_name(arguments["embed_dim"], arguments["num_heads"], arguments["depth"]),
        "method": "mae",
        "image_size": arguments["img_size"],
        "patch_size": arguments["patch_size"],
        "channels": arguments["in_chans"],
        "decoder_width": width,
        "decoder_depth": block_count(tensors, "decoder_blocks"),
        "decoder_heads": heads.of_decoder(width, DECODER_HEADS),
    }


def names_of(model: Autoencoder) -> dict[str, tuple[str, ...]]:
    """Map MAE's names to those of `model`; the decoder's fixed positions are computed anew, not converted."""
    names: dict[str, tuple[str, ...]] = {name: (f"encoder.{name}",) for name, _ in model.encoder.named_parameters()}
    names["mask_token"] = ("decoders.0.mask_token",)
    modules = {"decoder_embed": "embed", "decoder_norm": "norm", "decoder_pred": "predict"}
    for b in range(model.shape.depth):
        names |= qkv_names(f"decoder_blocks.{b}.attn.qkv", f"decoders.0.blocks.{b}.self_attention")
        parts = {
            "norm1": "norm_self",
            "attn.proj": "self_attention.proj",
            "norm2": "norm_mlp",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        }
        modules |= {f"decoder_blocks.{b}.{theirs}": f"blocks.{b}.{part}" for theirs, part in parts.items()}
    return names | affine({theirs: f"decoders.0.{ours}" for theirs, ours in modules.items()})
