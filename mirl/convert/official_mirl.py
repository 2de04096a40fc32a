"""Read checkpoints of the paper's official (PaddlePaddle) code, without Paddle.

Such a file is a pickle of {'model': {name: (tensor name, ndarray)}, 'optimizer', 'epoch', 'scaler', 'args'}. Pickles
can run code, so only the names that these files need are admitted. Linear weights are stored as (in, out).
"""

import argparse
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirl.errors import UserError
from mirl.models.autoencoder import Autoencoder

# What NumPy itself names when it pickles an array; the module moved in NumPy 2 and old files name the old place.
_reconstruct: Any = np.empty(0).__reduce__()[0]

ADMITTED: dict[tuple[str, str], Any] = {
    ("builtins", "tuple"): tuple,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("argparse", "Namespace"): argparse.Namespace,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise UserError(
                f"the checkpoint asks for '{module}.{name}', which no official checkpoint needs; not opened"
            )
        return ADMITTED[module, name]


def read_checkpoint(path: str | Path) -> dict[str, np.ndarray]:
    """Return the model's parameters by their official names.

    Raises:
        UserError: if the file names anything beyond `ADMITTED`, or is not an official checkpoint.
    """
    with open(path, "rb") as file:
        try:
            content = _Unpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError, KeyError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is not a readable Paddle checkpoint ({error}); download it again") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{path} holds no 'model'; give a checkpoint that the official trainer saved")
    return {name: value[1] if isinstance(value, tuple) else value for name, value in content["model"].items()}


def parameter_names(autoencoder: Autoencoder) -> dict[str, tuple[str, ...]]:
    """Map each official parameter's name to ours; several of ours are parts of one, along the output axis.

    Official decoders are numbered from 0; `norm_low` and `decoder_embed0_1` embed z_0 as memory for DID.
    """
    names: dict[str, tuple[str, ...]] = {
        name: (f"encoder.{name}",) for name in ("cls_token", "pos_embed", *_affine("patch_embed.proj", "norm"))
    }
    for name, _ in autoencoder.encoder.blocks.named_parameters(prefix="blocks"):
        names[name] = (f"encoder.{name}",)
    for i in range(len(autoencoder.norms)):
        names |= _renamed({f"norm{i}": f"norms.{i}"})
    if autoencoder.embed_input is not None:
        names |= _renamed({"norm_low": "embed_input.0", "decoder_embed0_1": "embed_input.1"})
    for g in range(len(autoencoder.decoders)):
        ours = f"decoders.{g}"
        names[f"mask_token{g}"] = (f"{ours}.mask_token",)
        names |= _renamed({f"decoder_embed{g}": f"{ours}.embed", f"decoder_norm{g}": f"{ours}.norm"})
        names |= {
            f"decoder_pred{g}.bias": (f"{ours}.predict.bias",),
            f"decoder_pred{g}.weight_g": (f"{ours}.predict.parametrizations.weight.original0",),
            f"decoder_pred{g}.weight_v": (f"{ours}.predict.parametrizations.weight.original1",),
        }
        for b in range(autoencoder.shape.depth):
            names |= _block_names(f"decoder_blocks{g}.{b}", f"{ours}.blocks.{b}")
    return names


def _block_names(official: str, ours: str) -> dict[str, tuple[str, ...]]:
    names = {
        f"{official}.attn.qkv.{kind}": (f"{ours}.self_attention.q.{kind}", f"{ours}.self_attention.kv.{kind}")
        for kind in ("weight", "bias")
    }
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
    return names | _renamed({f"{official}.{theirs}": f"{ours}.{part}" for theirs, part in parts.items()})


def _renamed(modules: dict[str, str]) -> dict[str, tuple[str, ...]]:
    return {f"{a}.{kind}": (f"{b}.{kind}",) for a, b in modules.items() for kind in ("weight", "bias")}


def _affine(*modules: str) -> list[str]:
    return [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]


def convert(parameters: dict[str, np.ndarray], autoencoder: Autoencoder) -> dict[str, Tensor]:
    """Return a state dict for `autoencoder` from official `parameters`.

    Raises:
        UserError: if a parameter is missing or has no place in this autoencoder.
    """
    own = autoencoder.state_dict()
    names = parameter_names(autoencoder)
    fixed = {f"decoder_pos_embed{g}" for g in range(len(autoencoder.decoders))}  # recomputed, never trained
    if surplus := sorted(parameters.keys() - names.keys() - fixed):
        raise UserError(f"the checkpoint's '{surplus[0]}' (and {len(surplus) - 1} more) has no place in this model")
    if missing := sorted(names.keys() - parameters.keys()):
        raise UserError(f"the checkpoint lacks '{missing[0]}' (and {len(missing) - 1} more)")
    state: dict[str, Tensor] = {}
    for official, ours in names.items():
        value = torch.from_numpy(np.array(parameters[official]))
        if value.ndim == 2:
            value = value.T
        parts = value.split([own[name].shape[0] for name in ours]) if len(ours) > 1 else [value]
        for name, part in zip(ours, parts, strict=True):
            state[name] = part.reshape(own[name].shape).contiguous()
    return state
