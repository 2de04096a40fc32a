"""Checkpoints of the paper's official (PaddlePaddle) code: what model they hold, and their names in ours.

Linear weights are stored as (in, out). Positions are fixed: those of the decoders are computed anew, not converted.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mirl.errors import UserError
from mirl.formats.renaming import affine
from mirl.formats.shapes import Heads, block_count, encoder_arguments
from mirl.methods import mirl
from mirl.models.autoencoder import Autoencoder
from mirl.models.encoder import model_name

# Of the released models, by width. Paper: Table 1.
ENCODER_HEADS = {384: 12, 768: 12}
DECODER_HEADS = {384: 12, 512: 16}


def settings_of(tensors: Mapping[str, Tensor], heads: Heads, taps: Sequence[int] | None = None) -> dict[str, Any]:
    """Return the options of `mirl pretrain` that build the autoencoder whose tensors these are.

    Args:
        tensors: by official names.
        heads: the user's; those of the released models are known.
        taps: blocks after which decoders read, which no tensor tells; by default segments are equal.

    Raises:
        UserError: if heads or taps must be given, or the tensors are of no such model.
    """
    arguments = encoder_arguments(tensors, heads, ENCODER_HEADS)
    depth, width = arguments["depth"], tensors["mask_token0"].numel()
    decoders = sum(bool(re.fullmatch(r"mask_token\d+", name)) for name in tensors)
    if "norm_low.weight" not in tensors:
        raise UserError("the checkpoint embeds no z_0 for cross-attention, so it is none of the official MIRL's")
    return {
        "model": model_name(arguments["embed_dim"], arguments["num_heads"], depth),
        "method": "mirl",
        "taps": list(mirl(depth, decoders, taps=taps).taps),
        "image_size": arguments["img_size"],
        "patch_size": arguments["patch_size"],
        "channels": arguments["in_chans"],
        "decoder_width": width,
        "decoder_depth": block_count(tensors, "decoder_blocks0"),
        "decoder_heads": heads.of_decoder(width, DECODER_HEADS),
        "did_blocks": "all",
        "did_memory": "embedded",
        "weight_norm": "decoder_pred0.weight_v" in tensors,
    }


def names_of(model: Autoencoder) -> dict[str, tuple[str, ...]]:
    """Map official names to those of `model`.

    Official decoders are numbered from 0; `norm_low` and `decoder_embed0_1` embed z_0 as memory for DID.
    """
    names: dict[str, tuple[str, ...]] = {name: (f"encoder.{name}",) for name in ("cls_token", "pos_embed")}
    for name, _ in model.encoder.blocks.named_parameters(prefix="blocks"):
        names[name] = (f"encoder.{name}",)
    modules = {"patch_embed.proj": "encoder.patch_embed.proj", "norm": "encoder.norm"}
    modules |= {f"norm{i}": f"norms.{i}" for i in range(len(model.norms))}
    if model.embed_input is not None:
        modules |= {"norm_low": "embed_input.0", "decoder_embed0_1": "embed_input.1"}
    for g in range(len(model.decoders)):
        ours = f"decoders.{g}"
        names[f"mask_token{g}"] = (f"{ours}.mask_token",)
        modules |= {f"decoder_embed{g}": f"{ours}.embed", f"decoder_norm{g}": f"{ours}.norm"}
        if model.shape.weight_norm:
            names |= {
                f"decoder_pred{g}.bias": (f"{ours}.predict.bias",),
                f"decoder_pred{g}.weight_g": (f"{ours}.predict.parametrizations.weight.original0",),
                f"decoder_pred{g}.weight_v": (f"{ours}.predict.parametrizations.weight.original1",),
            }
        else:
            modules |= {f"decoder_pred{g}": f"{ours}.predict"}
        for b in range(model.shape.depth):
            official, block = f"decoder_blocks{g}.{b}", f"{ours}.blocks.{b}"
            names |= qkv_names(f"{official}.attn.qkv", f"{block}.self_attention")
            parts = {
                "norm1": "norm_self",
                "attn.proj": "self_attention.proj",
                "norm2": "norm_did",
                "norm3": "norm_memory",
                "cross_attn.q": "did.q",
                "cross_attn.kv": "did.kv",
                "cross_attn.proj": "did.proj",
                "norm4": "norm_mlp",
                "mlp.fc1": "mlp.fc1",
                "mlp.fc2": "mlp.fc2",
            }
            modules |= {f"{official}.{theirs}": f"{block}.{part}" for theirs, part in parts.items()}
    return names | affine(modules)


def qkv_names(qkv: str, attention: str) -> dict[str, tuple[str, ...]]:
    """Map a layer that makes queries, keys and values to our two, of which `kv` is twice as large."""
    q, kv = f"{attention}.q", f"{attention}.kv"
    return {f"{qkv}.{kind}": (f"{q}.{kind}", f"{kv}.{kind}", f"{kv}.{kind}") for kind in ("weight", "bias")}
