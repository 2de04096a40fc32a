"""What `--weights` accepts: our runs, the official checkpoints of MIRL and MAE, timm's and Hugging Face's models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import VisionTransformer

from mirl.data.transforms import channel_statistics
from mirl.errors import UserError, first_line
from mirl.formats.renaming import fit
from mirl.formats.shapes import Heads
from mirl.models.autoencoder import Autoencoder
from mirl.models.encoder import ARCHITECTURE, check_sizes, parse_model, timm_arguments
from mirl.models.patches import Size, pair
from mirl.models.weights import AutoencoderWeights, Weights, depth_of
from mirl.tasks.bare_tensors import Say
from mirl.tasks.plain_vit import ALLOWED, from_timm
from mirl.tasks.settings.pretraining import Resolved, autoencoder_of
from mirl.tasks.weight_files import from_file, from_folder, from_unfinished


def open_weights(weights: str | Path, *, say: Say = print, heads: Heads | None = None) -> Weights:
    """Open the encoder, or the classifier, that `--weights` names.

    Args:
        weights: see `open_checkpoint`.
        say: is told what was chosen among several, e.g. the newest checkpoint of an unfinished run.
        heads: where a bare file's shapes do not tell them.

    Raises:
        UserError: if there is nothing like that, or it holds no encoder.
    """
    opened = open_checkpoint(weights, say=say, heads=heads, encoder_only=True)
    return encoder_of(opened) if isinstance(opened, AutoencoderWeights) else opened


def open_autoencoder(
    weights: str | Path, *, say: Say = print, heads: Heads | None = None, taps: Sequence[int] | None = None
) -> AutoencoderWeights:
    """Open the encoder with its decoders that `weights` names; see `open_checkpoint`.

    Raises:
        UserError: if there is nothing like that, or it has no decoders.
    """
    opened = open_checkpoint(weights, say=say, heads=heads, taps=taps, decoders=True)
    if isinstance(opened, Weights):
        raise UserError(
            f"{weights} holds an encoder without decoders; give the run folder of mirl pretrain, its "
            "autoencoder.safetensors, or an official checkpoint with decoders"
        )
    return opened


def open_checkpoint(
    weights: str | Path,
    *,
    say: Say = print,
    heads: Heads | None = None,
    taps: Sequence[int] | None = None,
    decoders: bool = False,
    encoder_only: bool = False,
) -> Weights | AutoencoderWeights:
    """Open everything that a file or folder holds.

    Args:
        weights: a run folder or its encoder/; a .safetensors, .onnx or .pt2 that mirl wrote; an official checkpoint of
            MIRL (.pd) or MAE (.pth), with or without decoders; a folder of Hugging Face's ViTModel,
            ViTForImageClassification or ViTMAEForPreTraining; a timm name, also as timm:NAME; a file of tensors by
            timm's names.
        say: is told what was chosen.
        heads: where a bare file's shapes do not tell them; taps: where an official MIRL's segments are unequal.
        decoders: prefer a run's autoencoder to its encoder, which holds the same.
        encoder_only: do not ask for what only an official file's decoders need.

    Raises:
        UserError: if there is nothing like that.
    """
    heads = heads or Heads()
    path = Path(weights).expanduser()
    if path.is_file():
        return from_file(path, heads, taps, say, encoder_only)
    if path.is_dir():
        if decoders and (path / "autoencoder.safetensors").exists():
            return from_file(path / "autoencoder.safetensors", heads, taps, say)
        folder = path / "encoder" if (path / "encoder").is_dir() else path
        if (folder / "config.json").exists():
            return from_folder(folder)
        if (path / "config.yaml").exists():
            return from_unfinished(path, say)
        raise UserError(f"{weights} holds no encoder; give {ALLOWED}")
    name = str(weights).removeprefix("timm:")
    if timm.is_model(name.partition(".")[0]):
        return from_timm(name)
    raise UserError(f"'{weights}' is neither a file, a folder nor the name of a timm model; give {ALLOWED}")


def encoder_of(weights: AutoencoderWeights) -> Weights:
    """Take the encoder out of an autoencoder; its tensors are shared."""
    prefix, settings = "encoder.", weights.settings
    state = {name.removeprefix(prefix): value for name, value in weights.state.items() if name.startswith(prefix)}
    width, heads, full_depth = parse_model(settings["model"])
    depth, channels = depth_of(state), settings["channels"]
    arguments = timm_arguments(
        width, heads, depth, pair(settings["image_size"]), pair(settings["patch_size"]), channels
    )
    return Weights(
        ARCHITECTURE, arguments, state, *channel_statistics(channels),
        full_depth=full_depth if full_depth > depth else None,
    )  # fmt: skip


def build_autoencoder(weights: AutoencoderWeights, *, image_size: Size | None = None) -> Autoencoder:
    """Build the autoencoder with these weights, whose memory it shares, in evaluation mode.

    Args:
        image_size: if given, the encoder's positions are resampled to it; the decoders' are computed.

    Raises:
        UserError: if patches do not tile `image_size`.
    """
    settings = Resolved(**weights.settings | ({} if image_size is None else {"image_size": image_size}))
    check_sizes(pair(settings.image_size), pair(settings.patch_size))
    with torch.device("meta"):
        model = autoencoder_of(settings)
    state = dict(weights.state)
    if model.image_size != pair(weights.settings["image_size"]):
        state["encoder.pos_embed"] = encoder_of(weights).resampled(model.encoder)["pos_embed"]
    model.load_state_dict(fit(state, model.state_dict()), assign=True)
    model.place()
    return model.eval()


def load_encoder(
    weights: str | Path, *, image_size: int | tuple[int, int] | None = None, heads: int | None = None, **changes: Any
) -> VisionTransformer:
    """Return a timm model with trained weights, in evaluation mode.

    It maps images [b, c, h, w] to features [b, d], or, of a fine-tuned run, to scores [b, classes]; `num_classes=0`
    takes the features of a classifier too. Images are normalised by "mean" and "std" of its `pretrained_cfg`.

    Args:
        weights: a run folder, an official checkpoint, a timm name or what else `--weights` accepts.
        image_size: pixels, one number or (height, width); by default as trained, else positions are resampled.
        heads: of the attention, where a bare file's shapes do not tell them.
        changes: arguments of timm's ViT, e.g. `num_classes=10` for a fresh head, `depth=12` for the first 12 blocks,
            `drop_path_rate=0.1`, `patch_size=8` (resampled too), `global_pool=""` for all tokens.

    Raises:
        UserError: if `weights` holds no encoder, patches do not tile the image, or timm knows no such argument.
    """
    opened = open_weights(weights, heads=Heads(heads))
    if image_size is not None:
        changes["img_size"] = pair(image_size)
    check_sizes(pair(changes.get("img_size", opened.image_size)), pair(changes.get("patch_size", opened.patch_size)))
    try:
        model = opened.build(**changes)
    except TypeError as error:
        raise UserError(f"timm's VisionTransformer does not take this: {first_line(error)}") from error
    model.pretrained_cfg = opened.pretrained_cfg(model)
    return model


def load_autoencoder(
    weights: str | Path,
    *,
    heads: int | None = None,
    decoder_heads: int | None = None,
    taps: Sequence[int] | None = None,
) -> Autoencoder:
    """Return a pre-trained encoder with its decoders, in evaluation mode.

    It maps (patches [b, n, p], visible [b, v], masked [b, m]) to one prediction [b, m, p] per decoder.

    Args:
        weights: a run folder, its autoencoder.safetensors, an official MIRL or MAE checkpoint, or a ViTMAE's folder.
        heads, decoder_heads: of the attention, where a bare file's shapes do not tell them.
        taps: blocks after which an official MIRL's decoders read; by default segments are equal.

    Raises:
        UserError: if `weights` holds no decoders.
    """
    return build_autoencoder(open_autoencoder(weights, heads=Heads(heads, decoder_heads), taps=taps))
