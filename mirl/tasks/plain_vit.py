"""Plain ViTs of timm: told from timm's other models, described by what a name leaves unsaid, and fetched."""

from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models import VisionTransformer

from mirl.errors import UserError, first_line
from mirl.models.weights import Weights

ALLOWED = (  # all that --weights accepts, for every message about what it does not
    "a run folder, its encoder/, a file that mirl wrote, an official MIRL (.pd) or MAE (.pth) checkpoint, a folder of "
    "Hugging Face's ViT or ViTMAE, or the name of a timm ViT"
)


def from_timm(name: str) -> Weights:
    """Fetch the weights that timm has under this name."""
    try:
        plain_vit(name)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{first_line(error)}; give {ALLOWED}") from error
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # the hub's, the network's and timm's own errors
        raise UserError(f"timm cannot fetch the weights of {name}: {first_line(error)}") from error
    arguments = form_of(model) | {"num_classes": 0}
    cfg = model.pretrained_cfg
    return Weights(name.partition(".")[0], arguments, model.state_dict(), tuple(cfg["mean"]), tuple(cfg["std"]))


def form_of(model: VisionTransformer) -> dict[str, Any]:
    """Return the arguments of timm that a name alone leaves unsaid."""
    return {
        "embed_dim": model.embed_dim, "num_heads": model.blocks[0].attn.num_heads,
        "img_size": list(model.patch_embed.img_size), "patch_size": list(model.patch_embed.patch_size),
        "in_chans": model.patch_embed.proj.in_channels,
    }  # fmt: skip


def plain_vit(architecture: str, **arguments: Any) -> VisionTransformer:
    """Return a model of timm without memory for its weights; raise ValueError if it is no plain ViT."""
    try:
        with torch.device("meta"):
            model = timm.create_model(architecture, pretrained=False, **arguments)
    except Exception as error:  # arguments from a file that is damaged make timm raise nearly anything
        raise ValueError(f"timm cannot build {architecture} as it says: {first_line(error)}") from error
    if not (isinstance(model, VisionTransformer) and isinstance(model.patch_embed, PatchEmbed)):
        raise ValueError(f"{architecture} is a {type(model).__name__}, not a plain ViT")
    return model
