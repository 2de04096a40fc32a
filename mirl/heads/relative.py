"""A plain ViT's weights with a bias for relative positions in each block, as UperNet's protocols take them.

BEiT's backbone with MAE's absolute positions: the tables are zero at first, so that training starts from the plain
ViT's own output. It is timm's Beit and takes images of one size. Symbols: d the encoder's width.
"""

from functools import partial
from typing import Any

import torch
from timm.models import VisionTransformer
from timm.models.beit import Beit
from torch import nn

from mirl.heads.pyramid import PlainOnly, build_plain
from mirl.models.patches import Size
from mirl.models.weights import State, Weights

RENAMED = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}  # parts of the ViT's names and the Beit's


def build_relative(
    weights: Weights,
    *,
    image_size: Size,
    drop_path: float = 0.0,
    checkpointing: bool = False,
    **changes: Any,
) -> Beit:
    """Build an encoder with attention among all patches and relative positions, for images of `image_size` alone.

    Args:
        image_size: (height, width); absolute positions are resampled to it.
        changes: others of `build_plain`. The others are those of `build_plain`.

    Raises:
        UserError: as `build_plain`; or if the weights are not of a plain ViT.
    """
    plain = build_plain(weights, image_size=image_size, **changes)
    plain_only = PlainOnly("relative positions need", "leave --relative_positions out")
    plain_only.check_blocks(plain)
    block = plain.blocks[0]
    encoder = Beit(
        img_size=image_size, patch_size=plain.patch_embed.patch_size, in_chans=weights.channels, num_classes=0,
        global_pool="", embed_dim=plain.embed_dim, depth=len(plain.blocks), num_heads=block.attn.num_heads,
        qkv_bias=block.attn.qkv.bias is not None, mlp_ratio=block.mlp.fc1.out_features / plain.embed_dim,
        drop_path_rate=drop_path, norm_layer=partial(nn.LayerNorm, eps=block.norm1.eps),
        init_values=1.0 if hasattr(block.ls1, "gamma") else None, use_abs_pos_emb=True, use_rel_pos_bias=True,
    )  # fmt: skip
    encoder.norm = nn.Identity()  # no pyramid reads it
    for own in encoder.blocks:  # timm's Beit has no argument for it
        own.mlp.act = type(block.mlp.act)()
    plain_only.load(_renamed(plain), encoder, fresh="relative_position_bias_table")
    encoder.set_grad_checkpointing(checkpointing)
    return encoder.eval()


def _renamed(plain: VisionTransformer) -> State:
    """Return the weights by Beit's names: biases of queries [d] and values [d] are tensors of their own.

    The keys' bias adds the same number to all of a query's scores, which the softmax does not see.
    """
    state: State = {}
    for name, value in plain.state_dict().items():
        if name.endswith("attn.qkv.bias"):
            queries, _, values = torch.chunk(value, 3)
            part = name.removesuffix("qkv.bias")
            state |= {f"{part}q_bias": queries, f"{part}v_bias": values}
        else:
            for old, new in RENAMED.items():
                name = name.replace(old, new)
            state[name] = value
    return state
