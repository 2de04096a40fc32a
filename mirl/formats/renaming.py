"""Tensors under other names: what is one tensor here may be several there, side by side along the output axis.

A table of names maps one name to the names of its equal parts; a part named twice is twice as large, e.g.
{"qkv": ("q", "kv", "kv")}.
"""

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

from mirl.errors import UserError

Names = Mapping[str, tuple[str, ...]]


def affine(modules: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return a table for weight and bias of `modules`, which maps a module's name to its other name."""
    return {f"{a}.{kind}": (f"{b}.{kind}",) for a, b in modules.items() for kind in ("weight", "bias")}


def split(tensors: MutableMapping[str, Tensor], names: Names, *, transposed: bool = False) -> dict[str, Tensor]:
    """Return `tensors` under the names of their parts; each is taken out, so that memory holds it once.

    Args:
        tensors: by the names that are the keys of `names`; emptied of them.
        names: one name to those of its parts.
        transposed: whether matrices are stored as (in, out).

    Raises:
        UserError: if a tensor is missing.
    """
    if missing := sorted(names.keys() - tensors.keys()):
        raise UserError(f"the checkpoint lacks '{missing[0]}' (and {len(missing) - 1} more)")
    result: dict[str, Tensor] = {}
    for name, parts in names.items():
        tensor = tensors.pop(name)
        if transposed and tensor.ndim == 2:
            tensor = tensor.T
        if len(parts) == 1:
            result[parts[0]] = tensor.contiguous()
            continue
        if tensor.ndim == 0 or len(tensor) % len(parts):
            raise UserError(f"the checkpoint's '{name}' has shape {list(tensor.shape)}, not {len(parts)} equal parts")
        size = len(tensor) // len(parts)
        start = 0
        for part in dict.fromkeys(parts):
            stop = start + size * parts.count(part)
            result[part] = tensor[start:stop].clone(memory_format=torch.contiguous_format)
            start = stop
    return result


def join(tensors: dict[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Put parts together again: the inverse of `split`, except for transposition."""
    wanted = {part for parts in names.values() for part in parts}
    if missing := sorted(wanted - tensors.keys()):
        raise UserError(f"the checkpoint lacks '{missing[0]}' (and {len(missing) - 1} more)")
    result: dict[str, Tensor] = {}
    for name, parts in names.items():
        values = [tensors.pop(part) for part in dict.fromkeys(parts)]
        result[name] = torch.cat(values) if len(values) > 1 else values[0]
    return result


def fit(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` in the shapes of `own`, which may have axes of length 1 more or less.

    Raises:
        UserError: if a tensor is missing, left over or of another size.
    """
    if surplus := sorted(state.keys() - own.keys()):
        raise UserError(f"the checkpoint's '{surplus[0]}' (and {len(surplus) - 1} more) has no place in this model")
    if missing := sorted(own.keys() - state.keys()):
        raise UserError(f"the checkpoint lacks '{missing[0]}' (and {len(missing) - 1} more)")
    for name, value in state.items():
        if [n for n in value.shape if n > 1] != [n for n in own[name].shape if n > 1]:
            raise UserError(
                f"the checkpoint's '{name}' has shape {list(value.shape)}, this model's {list(own[name].shape)}"
            )
        state[name] = value.reshape(own[name].shape)
    return state
