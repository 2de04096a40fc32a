"""Optimizers. Weight decay spares norms and biases, by timm's grouping, which equals MAE's."""

import torch
from timm.optim import param_groups_weight_decay
from torch import nn


def adamw(
    model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float], fused: bool
) -> torch.optim.AdamW:
    """Build AdamW for the trainable parameters; one-dimensional ones are not decayed.

    `fused` is faster, but cannot have its gradients unscaled by an fp16 loss scaler before clipping.
    """
    groups = param_groups_weight_decay(model, weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)
