"""Optimizers. Weight decay spares norms and biases, rates decay with depth: timm's grouping, which equals MAE's."""

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
) -> torch.optim.AdamW:
    """Build AdamW for the trainable parameters; one-dimensional ones are not decayed.

    With `layer_decay` each group of a timm ViT has `lr_scale`: layer_decay to the power of the blocks above it.

    `fused` is faster, but cannot have its gradients unscaled by an fp16 loss scaler before clipping.
    """
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay)
    else:
        spared = model.no_weight_decay()  # type: ignore[operator]  # timm's positions and class token
        groups = param_groups_layer_decay(model, weight_decay, spared, layer_decay=layer_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)
