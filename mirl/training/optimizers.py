"""Optimizers. Weight decay spares norms and biases, rates decay with depth: timm's grouping, which equals MAE's."""

from typing import Any

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn


def adamw(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    fused: bool,
    layer_decay: float | None = None,
    encoder: nn.Module | None = None,
) -> torch.optim.AdamW:
    """Build AdamW for the trainable parameters; one-dimensional ones are not decayed.

    With `layer_decay` each group of a timm ViT has `lr_scale`: layer_decay to the power of the blocks above it, a head
    being the topmost. The ViT is `model` itself, or its part `encoder`, above which everything else is the head.

    `fused` is faster, but cannot have its gradients unscaled by an fp16 loss scaler before clipping.
    """
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay)
    else:
        vit = encoder or model
        spared = vit.no_weight_decay()  # type: ignore[operator]  # timm's positions and class token
        groups = param_groups_layer_decay(vit, weight_decay, spared, layer_decay=layer_decay)
        if encoder is not None:
            groups = _below_a_head(groups, layer_decay) + _others(model, encoder, weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)


def _below_a_head(groups: list[dict[str, Any]], layer_decay: float) -> list[dict[str, Any]]:
    """Lower the rates by one layer: timm takes the top block of a ViT that has no head for the head."""
    return [group | {"lr_scale": group["lr_scale"] * layer_decay} for group in groups]


def _others(model: nn.Module, part: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Group the parameters of `model` that are not in its `part`."""
    inside = {id(parameter) for parameter in part.parameters()}
    groups = param_groups_weight_decay(model, weight_decay)
    return [group | {"params": [p for p in group["params"] if id(p) not in inside]} for group in groups]
