"""Trained weights and what builds the models they belong to, whatever format they came from."""

import re
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import VisionTransformer
from torch import Tensor

from mirl.models.encoder import ARCHITECTURE, initialise_encoder, model_name
from mirl.models.patches import Size, pair

State = dict[str, Tensor]


@dataclass(frozen=True)
class Weights:
    """Trained weights of a ViT and what builds the model they belong to.

    Attributes:
        architecture, arguments: timm's name and arguments.
        state: tensors by timm's names.
        mean, deviation: by which images in 0..1 are normalised, one number per channel.
        classes: names of the classes of its head; empty if it has none.
        full_depth: blocks of the encoder that these are the first of, where pre-training left out the last ones.
    """

    architecture: str
    arguments: dict[str, Any]
    state: State
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    classes: tuple[str, ...] = ()
    full_depth: int | None = None

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
        return depth_of(self.state)

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
            state = self.resampled(model)
            if changes.get("num_classes", self.arguments["num_classes"]) != self.arguments["num_classes"]:
                state = {name: value for name, value in state.items() if not name.startswith("head.")}
            model.load_state_dict(state, strict=False)
        return model.eval()

    def share(self) -> VisionTransformer:
        """Build the model exactly as it was trained, of the tensors of `state` themselves."""
        with torch.device("meta"):
            arguments = self.arguments | {"depth": self.depth}
            model: VisionTransformer = timm.create_model(self.architecture, pretrained=False, **arguments)
        model.load_state_dict(self.state, assign=True)
        return model.eval()

    def pretrained_cfg(self, model: VisionTransformer) -> dict[str, Any]:
        """Return what timm keeps beside `model`, built from these weights: its input, and the names of its classes."""
        return {
            "architecture": self.architecture, "input_size": (self.channels, *model.patch_embed.img_size),
            "fixed_input_size": True, "interpolation": "bicubic", "crop_pct": 1.0, "num_classes": model.num_classes,
            "first_conv": "patch_embed.proj", "classifier": "head", "mean": self.mean, "std": self.deviation,
            **({"label_names": list(self.classes)} if len(self.classes) == model.num_classes > 0 else {}),
        }  # fmt: skip

    def resampled(self, model: VisionTransformer) -> State:
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


@dataclass(frozen=True)
class AutoencoderWeights:
    """Trained weights of an encoder with its decoders.

    Attributes:
        settings: options of pre-training that build it, e.g. `model`, `method`, `taps`, `image_size`, `decoder_width`;
            those of a run are all there.
        state: tensors by the names of `mirl.models.autoencoder.Autoencoder`.
    """

    settings: dict[str, Any]
    state: State


def depth_of(state: State) -> int:
    """Return the number of blocks that timm's names in `state` speak of."""
    return 1 + max(int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name)))
