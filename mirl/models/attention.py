"""Attention by the fastest kernel. Symbols: b images, h heads, q queries, k keys, d values of a head."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether PyTorch's fused attention is the fastest kernel for tensors of `dtype` on `device`.

    In bf16 on a CPU its backward pass takes longer than separate products and a softmax by three times and more
    (docs/performance.md).
    """
    return not (device.type == "cpu" and dtype == torch.bfloat16)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return, for queries [b, h, q, d], means [b, h, q, d] of `v` [b, h, k, d], weighted by likeness to `k`."""
    if fused(q.device, q.dtype):
        return F.scaled_dot_product_attention(q, k, v)
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def choose_attention(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Let the timm blocks in `model`, which know both kernels, use the one that `attend` would."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", fused(device, dtype))  # noqa: B010 (Module's own attributes are typed as tensors)
