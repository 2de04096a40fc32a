"""Files and folders of weights: told apart, read, and found to be the model that they say they are."""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from mirl.data.transforms import channel_statistics
from mirl.errors import UserError, first_line
from mirl.formats import graphs, huggingface
from mirl.formats.renaming import fit
from mirl.formats.shapes import Heads
from mirl.models.autoencoder import without_features
from mirl.models.encoder import parse_model
from mirl.models.weights import AutoencoderWeights, State, Weights, depth_of
from mirl.tasks.bare_tensors import Say, from_bare, from_paddle
from mirl.tasks.plain_vit import ALLOWED, form_of, plain_vit
from mirl.tasks.settings.pretraining import Resolved, autoencoder_of
from mirl.training.checkpoints import load_newest
from mirl.training.runs import NOUNS, command_of, read_config

PADDLE, PYTORCH = (".pd", ".pdparams"), (".pth", ".pt", ".bin")  # what files of tensors end in


def from_file(
    path: Path, heads: Heads, taps: Sequence[int] | None, say: Say, encoder_only: bool = False
) -> Weights | AutoencoderWeights:
    """Open a file of any form, told by its ending and by what it says of itself."""
    if path.name == "model.safetensors" and (path.parent / "config.json").exists():
        return from_folder(path.parent)
    if path.suffix == ".onnx":
        return _described(path, *graphs.read_onnx(path))
    if path.suffix == ".pt2":
        return _described(path, *graphs.read_exported(path))
    if path.suffix in PADDLE:
        return from_paddle(path, heads, taps, encoder_only)
    try:
        if path.suffix in PYTORCH:
            return from_bare(path, load_pytorch(path), heads, say, encoder_only)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        state = _load_safetensors(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); give {ALLOWED}") from error
    if "mirl" not in metadata:
        return from_bare(path, state, heads, say, encoder_only)
    try:
        return _described(path, json.loads(metadata["mirl"]), state)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} cannot be read: what it says of its model is cut short") from error


class _Config(dict[str, Any]):
    """What a config.json says; what it does not say is the user's error."""

    def __missing__(self, name: str) -> NoReturn:
        raise UserError(f"its config.json lacks {name}; give {ALLOWED}")


def from_folder(folder: Path) -> Weights | AutoencoderWeights:
    """Open a folder of timm's or Hugging Face's form."""
    try:
        config = json.loads((folder / "config.json").read_text(), object_hook=_Config)
        state = _load_safetensors(folder / "model.safetensors")
        if not isinstance(config, dict):
            raise ValueError("config.json is no table of settings")
        if config.get("model_type") in ("vit", "vit_mae"):
            return _from_hugging_face(folder, config, state)
        cfg = config["pretrained_cfg"]
        arguments = {"num_classes": config.get("num_classes", 0)} | config.get("model_args", {})
        if arguments.get("depth", 0) > (depth := depth_of(state)):  # which would be built, for minutes
            raise ValueError(f"it says {arguments['depth']} blocks and has {depth}")
        model = plain_vit(config["architecture"], **arguments)
        arguments = form_of(model) | arguments
        for name, expected in model.state_dict().items():
            if name not in state or state[name].shape != expected.shape:
                raise ValueError(f"{name} is missing or has another shape")
        return Weights(
            config["architecture"], arguments, state, tuple(cfg["mean"]), tuple(cfg["std"]),
            tuple(cfg.get("label_names") or map(str, range(arguments["num_classes"]))), config.get("full_depth"),
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be read as an encoder ({first_line(error)}); give {ALLOWED}") from error


def _from_hugging_face(folder: Path, config: dict[str, Any], state: State) -> Weights | AutoencoderWeights:
    if config["model_type"] == "vit_mae" and "decoder.mask_token" in state:
        autoencoder = huggingface.from_vit_mae(config, state)
        with torch.device("meta"):
            fit(autoencoder.state, autoencoder_of(Resolved(**autoencoder.settings)).state_dict())
        return autoencoder
    seen = folder / "preprocessor_config.json"
    normalised = json.loads(seen.read_text()) if seen.exists() else {}
    mean, deviation = channel_statistics(config.get("num_channels", 3))
    weights = huggingface.from_vit(
        config, state, tuple(normalised.get("image_mean", mean)), tuple(normalised.get("image_std", deviation))
    )
    parse_model(weights.name)  # says what is wrong with width and heads
    fit(weights.state, plain_vit(weights.architecture, **weights.arguments).state_dict())
    return weights


def from_unfinished(run: Path, say: Say) -> AutoencoderWeights:
    """Open the newest checkpoint of a run that has not written its encoder yet."""
    state = load_newest(run / "checkpoints", say)
    settings = read_config(run)
    if command_of(settings) in NOUNS:
        raise _holds_heads(run, settings)
    if state is None or "method" not in settings:
        remedy = f"finish it with mirl pretrain --out {run} --resume" if "method" in settings else "finish it first"
        raise UserError(f"{run} holds no encoder yet; {remedy}")
    say(f"{run} is not finished: using its checkpoint of step {state['step']}")
    return AutoencoderWeights(settings, without_features(state["model"]))


def _holds_heads(path: Path, settings: dict[str, Any]) -> UserError:
    noun = NOUNS[command_of(settings)]
    return UserError(f"{path} holds a {noun}; give the encoder that it was trained from, {settings['weights']}")


def _described(path: Path, about: dict[str, Any], state: State) -> Weights | AutoencoderWeights:
    """Return what a file says its tensors are, once they are found to be that."""
    parts = set(about) if isinstance(about, dict) else set()
    if {"settings", "encoder"} <= parts:
        raise _holds_heads(path, about["settings"])
    if "backbone" in parts:
        raise UserError(
            f"{path} holds a detector's backbone, which cannot be read back; give the encoder that the detector was "
            "trained from"
        )
    try:
        with torch.device("meta"):
            if "architecture" not in about:
                return AutoencoderWeights(about, fit(state, autoencoder_of(Resolved(**about)).state_dict()))
            own = plain_vit(about["architecture"], **about["arguments"]).state_dict()
        mean, deviation, classes = (tuple(about[name]) for name in ("mean", "deviation", "classes"))
        return Weights(
            about["architecture"], about["arguments"], fit(state, own), mean, deviation, classes,
            about.get("full_depth"),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:  # UserError is a ValueError
        raise UserError(f"{path} is not the model that it says ({first_line(error)}); write it again") from error


def about(weights: Weights | AutoencoderWeights) -> dict[str, Any]:
    """Return what a file of tensors says about them, so that `open_checkpoint` knows what to build."""
    if isinstance(weights, AutoencoderWeights):
        return weights.settings
    return {
        "architecture": weights.architecture, "arguments": weights.arguments, "mean": weights.mean,
        "deviation": weights.deviation, "classes": weights.classes, "full_depth": weights.full_depth,
    }  # fmt: skip


def _load_safetensors(path: Path) -> State:
    return {name: value.float() for name, value in load_file(path).items()}  # halves are for storage


def load_pytorch(path: Path) -> State:
    """Read the tensors of a .pth file, which may hold them as `model` or `state_dict` beside other things."""
    import argparse

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # MAE's trainer saves its options too
            zipped = zipfile.is_zipfile(path)  # as all since PyTorch 1.6; older files cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged file may end in any way
        raise UserError(f"{path} is no PyTorch file of plain tensors ({first_line(error)}); give {ALLOWED}") from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and value.nbytes <= value.untyped_storage().nbytes()
        for name, value in content.items()
    ):
        raise UserError(f"{path} holds no model of named tensors; give {ALLOWED}")
    return {name: value.float() for name, value in content.items()}
