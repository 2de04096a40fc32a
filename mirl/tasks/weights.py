"""What `--weights` accepts: a run folder, its `encoder/`, a safetensors file that a run wrote, or a timm name."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.layers import PatchEmbed, resample_abs_pos_embed, resample_patch_embed
from timm.models import VisionTransformer
from torch import Tensor

from mirl.data.transforms import channel_statistics
from mirl.errors import UserError
from mirl.models.encoder import ARCHITECTURE, initialise_encoder, model_name, parse_model, timm_arguments
from mirl.models.patches import Size
from mirl.tasks.options import pair
from mirl.training.checkpoints import load_newest
from mirl.training.runs import read_config

ALLOWED = "a run folder, its encoder/, a .safetensors file that a run wrote, or the name of a timm ViT"

State = dict[str, Tensor]


@dataclass(frozen=True)
class Weights:
    """Trained weights of a ViT and what builds the model they belong to.

    Attributes:
        architecture, arguments: timm's name and arguments.
        state: tensors by timm's names.
        mean, deviation: by which images in 0..1 are normalised, one number per channel.
        classes: names of the classes of its head; empty if it has none.
    """

    architecture: str
    arguments: dict[str, Any]
    state: State
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    classes: tuple[str, ...] = ()

    @property
    def image_size(self) -> Size:
        """Height and width of the images it was trained on, in pixels."""
        return pair(self.arguments["img_size"])

    @property
    def patch_size(self) -> Size:
        """Height and width of a patch, in pixels."""
        return pair(self.arguments["patch_size"])

    @property
    def channels(self) -> int:
        """Channels of its images."""
        return int(self.arguments["in_chans"])

    @property
    def depth(self) -> int:
        """Number of trained blocks."""
        return _depth(self.state)

    @property
    def name(self) -> str:
        """The model's name, such as vit_s_54."""
        return model_name(self.arguments["embed_dim"], self.arguments["num_heads"], self.depth)

    def build(self, *, trained: bool = True, seed: int = 0, **changes: Any) -> VisionTransformer:
        """Build the model with these weights; positions and patch embedding are resampled to other sizes.

        Layers that the weights do not have (a head, a norm after pooling, deeper blocks) keep their first values, and
        weights of layers that the model does not have are left out.

        Args:
            trained: False leaves every weight as it was before training, drawn from `seed`.
            changes: arguments of timm that differ, e.g. `num_classes`, `depth`, `img_size`.
        """
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model: VisionTransformer = timm.create_model(
                self.architecture, pretrained=False, **(self.arguments | {"depth": self.depth} | changes)
            )
            if self.architecture == ARCHITECTURE:  # our own; others keep timm's
                initialise_encoder(model)
        if trained:
            state = self._resampled(model)
            if changes.get("num_classes", self.arguments["num_classes"]) != self.arguments["num_classes"]:
                state = {name: value for name, value in state.items() if not name.startswith("head.")}
            model.load_state_dict(state, strict=False)
        return model.eval()

    def _resampled(self, model: VisionTransformer) -> State:
        """Return the weights with patch embedding and positions as the sizes of `model` need them."""
        # Not timm's own filter: it takes for a square whatever grid the positions lie on.
        state = dict(self.state)
        name = "patch_embed.proj.weight"
        state[name] = resample_patch_embed(state[name], list(model.patch_embed.patch_size))
        if "pos_embed" in state:
            state["pos_embed"] = resample_abs_pos_embed(
                state["pos_embed"],
                new_size=list(model.patch_embed.grid_size),
                old_size=[i // p for i, p in zip(self.image_size, self.patch_size, strict=True)],
                num_prefix_tokens=0 if model.no_embed_class else model.num_prefix_tokens,
            )
        return state


def open_weights(weights: str, *, say: Callable[[str], None] = print) -> Weights:
    """Open what `--weights` names.

    Args:
        weights: see the module.
        say: is told what was chosen among several, e.g. the newest checkpoint of an unfinished run.

    Raises:
        UserError: if there is nothing like that, or it holds no encoder.
    """
    path = Path(weights).expanduser()
    if path.is_file():
        return _from_file(path)
    if path.is_dir():
        folder = path / "encoder" if (path / "encoder").is_dir() else path
        if (folder / "config.json").exists():
            return _from_encoder_folder(folder)
        if (path / "config.yaml").exists():
            return _from_checkpoint(path, say)
        raise UserError(f"{weights} holds no encoder; give {ALLOWED}")
    if timm.is_model(weights.partition(".")[0]):
        return _from_timm(weights)
    raise UserError(f"'{weights}' is neither a file, a folder nor the name of a timm model; give {ALLOWED}")


def _from_encoder_folder(folder: Path) -> Weights:
    try:
        config = json.loads((folder / "config.json").read_text())
        cfg = config["pretrained_cfg"]
        state = load_file(folder / "model.safetensors")
        for name, expected in _plain_vit(config["architecture"], **config["model_args"]).state_dict().items():
            if name not in state or state[name].shape != expected.shape:
                raise ValueError(f"{name} is missing or has another shape")
        return Weights(
            config["architecture"], config["model_args"], state, tuple(cfg["mean"]), tuple(cfg["std"]),
            tuple(cfg.get("label_names", ())),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be read as an encoder ({_first_line(error)}); give {ALLOWED}") from error


def _from_file(path: Path) -> Weights:
    if path.name == "model.safetensors" and (path.parent / "config.json").exists():
        return _from_encoder_folder(path.parent)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        if "mirl" in metadata:
            return _from_autoencoder(json.loads(metadata["mirl"]), load_file(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({_first_line(error)}); give {ALLOWED}") from error
    raise UserError(f"{path} does not say which model it is of; give {ALLOWED}")


def _from_checkpoint(run: Path, say: Callable[[str], None]) -> Weights:
    state = load_newest(run / "checkpoints", say)
    settings = read_config(run)
    if state is None or "method" not in settings:
        remedy = f"finish it with mirl pretrain --out {run} --resume" if "method" in settings else "finish it first"
        raise UserError(f"{run} holds no encoder yet; {remedy}")
    say(f"{run} is not finished: using its checkpoint of step {state['step']}")
    return _from_autoencoder(settings, state["model"])


def _from_autoencoder(settings: dict[str, Any], state: State) -> Weights:
    """Take the encoder out of an autoencoder's weights and the settings of its run."""
    prefix = "encoder."
    encoder = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    width, heads, _ = parse_model(settings["model"])
    arguments = timm_arguments(
        width, heads, _depth(encoder), pair(settings["image_size"]), pair(settings["patch_size"]), settings["channels"]
    )
    return Weights(ARCHITECTURE, arguments, encoder, *channel_statistics(settings["channels"]))


def _from_timm(name: str) -> Weights:
    try:
        _plain_vit(name)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{_first_line(error)}; give {ALLOWED}") from error
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # the hub's, the network's and timm's own errors
        raise UserError(f"timm cannot fetch the weights of {name}: {_first_line(error)}") from error
    arguments = {
        "embed_dim": model.embed_dim, "num_heads": model.blocks[0].attn.num_heads, "num_classes": 0,
        "img_size": list(model.patch_embed.img_size), "patch_size": list(model.patch_embed.patch_size),
        "in_chans": model.patch_embed.proj.in_channels,
    }  # fmt: skip
    cfg = model.pretrained_cfg
    return Weights(name.partition(".")[0], arguments, model.state_dict(), tuple(cfg["mean"]), tuple(cfg["std"]))


def _plain_vit(architecture: str, **arguments: Any) -> VisionTransformer:
    """Return a model of timm without memory for its weights; raise ValueError if it is no plain ViT."""
    with torch.device("meta"):
        model = timm.create_model(architecture, pretrained=False, **arguments)
    if not (isinstance(model, VisionTransformer) and isinstance(model.patch_embed, PatchEmbed)):
        raise ValueError(f"{architecture} is a {type(model).__name__}, not a plain ViT")
    return model


def _depth(state: State) -> int:
    return 1 + max(int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name)))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
