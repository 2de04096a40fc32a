"""What `--weights` accepts: our runs, the official checkpoints of MIRL and MAE, timm's and Hugging Face's models."""

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.layers import PatchEmbed
from timm.models import VisionTransformer
from torch import Tensor

from mirl.data.transforms import channel_statistics
from mirl.errors import UserError
from mirl.formats import graphs, huggingface, official_mae, official_mirl
from mirl.formats.paddle import read_checkpoint
from mirl.formats.renaming import fit, split
from mirl.formats.shapes import Heads, encoder_arguments
from mirl.models.autoencoder import Autoencoder, without_features
from mirl.models.encoder import ARCHITECTURE, check_sizes, parse_model, timm_arguments
from mirl.models.patches import Size, pair
from mirl.models.weights import AutoencoderWeights, State, Weights, depth_of
from mirl.tasks.settings.pretraining import Resolved, autoencoder_of
from mirl.training.checkpoints import load_newest
from mirl.training.runs import NOUNS, command_of, read_config

ALLOWED = (
    "a run folder, its encoder/, a file that mirl wrote, an official MIRL (.pd) or MAE (.pth) checkpoint, a folder of "
    "Hugging Face's ViT or ViTMAE, or the name of a timm ViT"
)
TIMM_HEADS = {192: 3} | official_mae.ENCODER_HEADS  # 384 is 6 in timm and 12 in the paper: it must be said
ENCODER_PARTS = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.", "fc_norm.", "head.")

PADDLE, PYTORCH = (".pd", ".pdparams"), (".pth", ".pt", ".bin")  # what files of tensors end in

Say = Callable[[str], None]


def open_weights(weights: str, *, say: Say = print, heads: Heads | None = None) -> Weights:
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
    weights: str, *, say: Say = print, heads: Heads | None = None, taps: Sequence[int] | None = None
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
    weights: str,
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
        return _from_file(path, heads, taps, say, encoder_only)
    if path.is_dir():
        if decoders and (path / "autoencoder.safetensors").exists():
            return _from_file(path / "autoencoder.safetensors", heads, taps, say)
        folder = path / "encoder" if (path / "encoder").is_dir() else path
        if (folder / "config.json").exists():
            return _from_folder(folder)
        if (path / "config.yaml").exists():
            return _from_unfinished(path, say)
        raise UserError(f"{weights} holds no encoder; give {ALLOWED}")
    name = weights.removeprefix("timm:")
    if timm.is_model(name.partition(".")[0]):
        return _from_timm(name)
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
    weights: str, *, image_size: int | tuple[int, int] | None = None, heads: int | None = None, **changes: Any
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
        raise UserError(f"timm's VisionTransformer does not take this: {_first_line(error)}") from error
    model.pretrained_cfg = opened.pretrained_cfg(model)
    return model


def load_autoencoder(
    weights: str, *, heads: int | None = None, decoder_heads: int | None = None, taps: Sequence[int] | None = None
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


def _from_folder(folder: Path) -> Weights | AutoencoderWeights:
    try:
        config = json.loads((folder / "config.json").read_text())
        state = _load_safetensors(folder / "model.safetensors")
        if not isinstance(config, dict):
            raise ValueError("config.json is no table of settings")
        if config.get("model_type") in ("vit", "vit_mae"):
            return _from_hugging_face(folder, config, state)
        cfg = config["pretrained_cfg"]
        arguments = {"num_classes": config.get("num_classes", 0)} | config.get("model_args", {})
        if arguments.get("depth", 0) > (depth := depth_of(state)):  # which would be built, for minutes
            raise ValueError(f"it says {arguments['depth']} blocks and has {depth}")
        model = _plain_vit(config["architecture"], **arguments)
        arguments = _form(model) | arguments
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
        raise UserError(f"{folder} cannot be read as an encoder ({_first_line(error)}); give {ALLOWED}") from error


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
    fit(weights.state, _plain_vit(weights.architecture, **weights.arguments).state_dict())
    return weights


def _from_file(
    path: Path, heads: Heads, taps: Sequence[int] | None, say: Say, encoder_only: bool = False
) -> Weights | AutoencoderWeights:
    if path.name == "model.safetensors" and (path.parent / "config.json").exists():
        return _from_folder(path.parent)
    if path.suffix == ".onnx":
        return _described(path, *graphs.read_onnx(path))
    if path.suffix == ".pt2":
        return _described(path, *graphs.read_exported(path))
    if path.suffix in PADDLE:
        return _from_paddle(path, heads, taps, encoder_only)
    try:
        if path.suffix in PYTORCH:
            return _from_bare(path, load_pytorch(path), heads, say, encoder_only)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        state = _load_safetensors(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({_first_line(error)}); give {ALLOWED}") from error
    if "mirl" not in metadata:
        return _from_bare(path, state, heads, say, encoder_only)
    try:
        return _described(path, json.loads(metadata["mirl"]), state)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} cannot be read: what it says of its model is cut short") from error


def about(weights: Weights | AutoencoderWeights) -> dict[str, Any]:
    """Return what a file of tensors says about them, so that `open_checkpoint` knows what to build."""
    if isinstance(weights, AutoencoderWeights):
        return weights.settings
    return {
        "architecture": weights.architecture, "arguments": weights.arguments, "mean": weights.mean,
        "deviation": weights.deviation, "classes": weights.classes, "full_depth": weights.full_depth,
    }  # fmt: skip


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
            own = _plain_vit(about["architecture"], **about["arguments"]).state_dict()
        mean, deviation, classes = (tuple(about[name]) for name in ("mean", "deviation", "classes"))
        return Weights(
            about["architecture"], about["arguments"], fit(state, own), mean, deviation, classes,
            about.get("full_depth"),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:  # UserError is a ValueError
        raise UserError(f"{path} is not the model that it says ({_first_line(error)}); write it again") from error


def _from_unfinished(run: Path, say: Say) -> AutoencoderWeights:
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


def _from_paddle(
    path: Path, heads: Heads, taps: Sequence[int] | None, encoder_only: bool
) -> Weights | AutoencoderWeights:
    tensors = read_checkpoint(path)
    with _naming(path):
        if encoder_only:
            _drop_decoders(tensors, "mask_token0")
        if "mask_token0" in tensors:
            settings = official_mirl.settings_of(tensors, heads, taps)
            return _renamed(settings, tensors, official_mirl.names_of, "decoder_pos_embed", transposed=True)
        return _bare(tensors, heads, official_mirl.ENCODER_HEADS, transposed=True)


def _drop_decoders(tensors: MutableMapping[str, Tensor], mark: str) -> None:
    """Leave an official pre-training file's encoder alone; `mark` is a name that tells such a file."""
    if mark in tensors:
        for name in [name for name in tensors if not name.startswith(ENCODER_PARTS)]:
            del tensors[name]


def _from_bare(path: Path, tensors: State, heads: Heads, say: Say, encoder_only: bool) -> Weights | AutoencoderWeights:
    """Tell MAE's checkpoints, with or without decoder, from other tensors by timm's names."""
    with _naming(path):
        if encoder_only:
            _drop_decoders(tensors, "mask_token")
        if "mask_token" in tensors and "decoder_embed.weight" in tensors:
            settings = official_mae.settings_of(tensors, heads)
            return _renamed(settings, tensors, official_mae.names_of, "decoder_pos_embed", transposed=False)
        weights = _bare(tensors, heads, TIMM_HEADS, transposed=False)
    if heads.encoder is None:
        say(f"{path} does not tell its attention heads: taken for {weights.arguments['num_heads']}")
    return weights


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file before what is wrong with its tensors."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _renamed(
    settings: dict[str, Any],
    tensors: MutableMapping[str, Tensor],
    names_of: Callable[[Autoencoder], Mapping[str, tuple[str, ...]]],
    computed: str,
    *,
    transposed: bool,
) -> AutoencoderWeights:
    with torch.device("meta"):
        model = autoencoder_of(Resolved(**settings))
    for name in [name for name in tensors if name.startswith(computed)]:
        del tensors[name]
    names = names_of(model)
    state = split(tensors, names, transposed=transposed)
    if tensors:
        raise UserError(f"the checkpoint's '{min(tensors)}' (and {len(tensors) - 1} more) has no place in this model")
    return AutoencoderWeights(settings, fit(state, model.state_dict()))


def _bare(tensors: MutableMapping[str, Tensor], heads: Heads, known: Mapping[int, int], *, transposed: bool) -> Weights:
    """Return an encoder or classifier whose tensors have timm's names, without word of what model it is."""
    arguments = encoder_arguments(tensors, heads, known)
    state = split(tensors, {name: (name,) for name in tensors}, transposed=transposed)
    try:
        own = _plain_vit(ARCHITECTURE, **arguments).state_dict()
    except ValueError as error:
        raise UserError(f"{_first_line(error)}; give {ALLOWED}") from error
    classes = tuple(str(i) for i in range(arguments["num_classes"]))
    return Weights(ARCHITECTURE, arguments, fit(state, own), *channel_statistics(arguments["in_chans"]), classes)


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
        raise UserError(f"{path} is no PyTorch file of plain tensors ({_first_line(error)}); give {ALLOWED}") from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and value.nbytes <= value.untyped_storage().nbytes()
        for name, value in content.items()
    ):
        raise UserError(f"{path} holds no model of named tensors; give {ALLOWED}")
    return {name: value.float() for name, value in content.items()}


def _from_timm(name: str) -> Weights:
    try:
        _plain_vit(name)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{_first_line(error)}; give {ALLOWED}") from error
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # the hub's, the network's and timm's own errors
        raise UserError(f"timm cannot fetch the weights of {name}: {_first_line(error)}") from error
    arguments = _form(model) | {"num_classes": 0}
    cfg = model.pretrained_cfg
    return Weights(name.partition(".")[0], arguments, model.state_dict(), tuple(cfg["mean"]), tuple(cfg["std"]))


def _form(model: VisionTransformer) -> dict[str, Any]:
    """Return the arguments of timm that a name alone leaves unsaid."""
    return {
        "embed_dim": model.embed_dim, "num_heads": model.blocks[0].attn.num_heads,
        "img_size": list(model.patch_embed.img_size), "patch_size": list(model.patch_embed.patch_size),
        "in_chans": model.patch_embed.proj.in_channels,
    }  # fmt: skip


def _plain_vit(architecture: str, **arguments: Any) -> VisionTransformer:
    """Return a model of timm without memory for its weights; raise ValueError if it is no plain ViT."""
    try:
        with torch.device("meta"):
            model = timm.create_model(architecture, pretrained=False, **arguments)
    except Exception as error:  # arguments from a file that is damaged make timm raise nearly anything
        raise ValueError(f"timm cannot build {architecture} as it says: {_first_line(error)}") from error
    if not (isinstance(model, VisionTransformer) and isinstance(model.patch_embed, PatchEmbed)):
        raise ValueError(f"{architecture} is a {type(model).__name__}, not a plain ViT")
    return model


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
