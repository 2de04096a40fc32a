"""Linear layers by the fastest kernel. Symbols: t tokens in any dimensions, i and o values in and out."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def fast_products(model: nn.Module, device: torch.device) -> AbstractContextManager[object]:
    """Return a context, for forward and backward passes of `model`, in which linear layers take the fastest kernel.

    In float32 on a CPU with MKL that is oneDNN's, which takes 15 to 30 % less time (docs/performance.md). Elsewhere,
    and under autocast, PyTorch's choice is the fastest already. Blocks that are computed again in the backward pass,
    where no such context reaches, keep PyTorch's.
    """
    mkl = device.type == "cpu" and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not mkl or any(getattr(module, "grad_checkpointing", False) for module in model.modules()):
        return nullcontext()
    return _OneDnnProducts()


class _OneDnnProducts(TorchFunctionMode):
    """Replaces `F.linear` of float32 tensors, so that models stay as they are, timm's too."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear and len(args) == 3 and _suits(*args):
            return _Linear.apply(*args)
        return func(*args, **(kwargs or {}))


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    single = bias is not None and x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    return single and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


class _Linear(torch.autograd.Function):
    """x [t, i], weight [o, i], bias [o] -> [t, o]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, inputs = gradient.flatten(0, -2), x.flatten(0, -2)
        to_x = _product(gradient, weight.t(), None) if ctx.needs_input_grad[0] else None
        to_weight = to_bias = None
        if ctx.needs_input_grad[1]:
            # For tall results, more outputs than inputs, PyTorch's own choice is the faster one.
            wide = rows.shape[1] < inputs.shape[1]
            to_weight = _product(rows.t(), inputs.t(), None) if wide else rows.t() @ inputs
        if ctx.needs_input_grad[2]:
            to_bias = rows.sum(0)
        return to_x, to_weight, to_bias


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result
