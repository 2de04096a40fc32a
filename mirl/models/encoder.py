"""The encoder: timm's own VisionTransformer at any depth, run on visible patches only.

Because the module *is* timm's, its weights open in timm unchanged; nothing here subclasses or patches it.
Names are `vit_{ti,s,b,l}_{depth}`, or `vit_{width}x{heads}_{depth}` for other forms.
"""

import re
from collections.abc import Iterable
from typing import Any

import timm
import torch
from timm.models import VisionTransformer, checkpoint_seq
from torch import Tensor, nn
from torch.nn import functional as F

from mirl.errors import UserError
from mirl.models.patches import Size, gather, sincos_positions

ARCHITECTURE = "vit_base_patch16_224"  # of timm's; every size of it is an argument
INSIDE_A_BLOCK = 17  # tensors like its input that a block keeps for its backward pass, about
# name: (width, heads). s has 12 heads, as in the paper's Table 1 (timm's vit_small has 6).
WIDTHS = {"ti": (192, 3), "s": (384, 12), "b": (768, 12), "l": (1024, 16)}


def parse_model(name: str) -> tuple[int, int, int]:
    """Read (width, heads, depth) from a model's name, e.g. `vit_s_54` -> (384, 12, 54). Paper: Table 1.

    Other forms are named by their numbers: `vit_512x8_24` is 512 wide with 8 heads.
    """
    match = re.fullmatch(rf"vit_({'|'.join(WIDTHS)}|([1-9]\d*)x([1-9]\d*))_([1-9]\d*)", name)
    if not match:
        raise UserError(
            f"unknown model '{name}'; use vit_{{{','.join(WIDTHS)}}}_DEPTH or vit_WIDTHxHEADS_DEPTH, e.g. vit_s_54 or "
            "vit_512x8_24"
        )
    width, heads = WIDTHS.get(match[1]) or (int(match[2]), int(match[3]))
    if width % heads or width % 4:  # heads share the width, and positions take it in quarters
        raise UserError(f"model '{name}': give a width that 4 and the heads divide, e.g. vit_512x8_24")
    return width, heads, int(match[4])


def model_name(width: int, heads: int, depth: int) -> str:
    """Return the name of a model, the inverse of `parse_model`."""
    size = next((name for name, form in WIDTHS.items() if form == (width, heads)), f"{width}x{heads}")
    return f"vit_{size}_{depth}"


def check_sizes(image_size: Size, patch_size: Size) -> None:
    """Raise UserError if patches do not tile the image; the remedy names the nearest size that they do tile."""
    if min(*image_size, *patch_size) < 1:
        raise UserError(f"image size {image_size} and patch size {patch_size} must be positive")
    if any(i % p for i, p in zip(image_size, patch_size, strict=True)):
        near = [max(1, round(i / p)) * p for i, p in zip(image_size, patch_size, strict=True)]
        raise UserError(
            f"patches of {patch_size[0]}x{patch_size[1]} do not tile an image of {image_size[0]}x{image_size[1]}; "
            f"choose --image_size [{near[0]},{near[1]}] or another --patch_size"
        )


def timm_arguments(
    width: int, heads: int, depth: int, image_size: Size, patch_size: Size, channels: int
) -> dict[str, Any]:
    """Return the arguments with which timm builds this encoder; `config.json` of an exported encoder repeats them.

    Pooling is the mean over patch tokens after the final norm: what masked pre-training makes meaningful.
    """
    return {
        "embed_dim": width,
        "num_heads": heads,
        "depth": depth,
        "img_size": list(image_size),
        "patch_size": list(patch_size),
        "in_chans": channels,
        "num_classes": 0,
        "global_pool": "avg",
        "fc_norm": False,
    }


def build_encoder(
    width: int, heads: int, depth: int, image_size: Size, patch_size: Size, channels: int
) -> VisionTransformer:
    """Build a timm ViT with fixed 2-d sine-cosine positions and MAE's initialisation.

    Raises:
        UserError: if patches do not tile the image.
    """
    check_sizes(image_size, patch_size)
    arguments = timm_arguments(width, heads, depth, image_size, patch_size, channels)
    encoder: VisionTransformer = timm.create_model(ARCHITECTURE, pretrained=False, **arguments)
    initialise_encoder(encoder)
    encoder.pos_embed.requires_grad_(False)
    return encoder


def initialise_encoder(encoder: VisionTransformer) -> None:
    """Give a timm ViT MAE's initialisation and sine-cosine positions."""
    initialise(encoder)
    nn.init.xavier_uniform_(encoder.patch_embed.proj.weight.view(encoder.embed_dim, -1))
    nn.init.normal_(encoder.cls_token, std=0.02)
    positions = sincos_positions(encoder.embed_dim, encoder.patch_embed.grid_size)
    with torch.no_grad():
        encoder.pos_embed.copy_(F.pad(positions, (0, 0, 1, 0)))  # the class token has position zero


def initialise(module: nn.Module) -> None:
    """Give every linear layer in `module` Xavier-uniform weights and zero bias, as MAE and the official code do."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def embed_visible(encoder: VisionTransformer, patches: Tensor, visible: Tensor) -> Tensor:
    """Embed the visible patches and add positions: z_0 with the class token first.

    The patch embedding is a convolution whose stride is its size, hence a matrix product on flattened patches:
    masked patches need not be embedded to be thrown away.

    Args:
        patches: [b, n, p]; visible: [b, v]. Returns [b, 1 + v, d].
    """
    kernel = encoder.patch_embed.proj
    weight = kernel.weight.permute(0, 2, 3, 1).flatten(1)  # (d, c, ph, pw) -> (d, row, column, channel)
    positions = encoder.pos_embed[0]
    tokens = F.linear(gather(patches, visible), weight, kernel.bias) + positions[1:][visible]
    class_token = (encoder.cls_token + positions[:1]).expand(len(tokens), -1, -1)
    return torch.cat([class_token.to(tokens.dtype), tokens], dim=1)


def recomputed_together(depth: int) -> int:
    """Return of how many consecutive blocks checkpointing keeps only the first one's input.

    It grows with the square root of the depth, and so does what is kept and what is computed again at once.
    """
    return max(1, round((depth / INSIDE_A_BLOCK) ** 0.5))


def run_segments(encoder: VisionTransformer, tokens: Tensor, taps: Iterable[int]) -> list[Tensor]:
    """Run the blocks and return [z_0, z_1, ..., z_G], z_g after `taps[g - 1]` blocks. Paper: Eq. (5).

    With `encoder.set_grad_checkpointing()` blocks are computed again in the backward pass, so many at once as
    `recomputed_together` says.
    """
    kept, every = encoder.grad_checkpointing and torch.is_grad_enabled(), recomputed_together(len(encoder.blocks))
    segments, start = [tokens], 0
    for stop in taps:
        blocks = encoder.blocks[start:stop]
        segments.append(checkpoint_seq(blocks, segments[-1], every=every) if kept else blocks(segments[-1]))
        start = stop
    return segments
