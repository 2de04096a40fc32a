"""Tensors that come without word of their model: official checkpoints of MIRL and MAE, others by timm's names."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirl.data.transforms import channel_statistics
from mirl.errors import UserError, first_line
from mirl.formats import official_mae, official_mirl
from mirl.formats.paddle import read_checkpoint
from mirl.formats.renaming import fit, split
from mirl.formats.shapes import Heads, encoder_arguments
from mirl.models.autoencoder import Autoencoder
from mirl.models.encoder import ARCHITECTURE
from mirl.models.weights import AutoencoderWeights, State, Weights
from mirl.tasks.plain_vit import ALLOWED, plain_vit
from mirl.tasks.settings.pretraining import Resolved, autoencoder_of

TIMM_HEADS = {192: 3} | official_mae.ENCODER_HEADS  # 384 is 6 in timm and 12 in the paper: it must be said
ENCODER_PARTS = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.", "fc_norm.", "head.")

Say = Callable[[str], None]


def from_paddle(
    path: Path, heads: Heads, taps: Sequence[int] | None, encoder_only: bool
) -> Weights | AutoencoderWeights:
    """Tell MIRL's checkpoints, with or without decoders, from other tensors of Paddle by timm's names."""
    tensors = read_checkpoint(path)
    with _naming(path):
        if encoder_only:
            _drop_decoders(tensors, "mask_token0")
        if "mask_token0" in tensors:
            settings = official_mirl.settings_of(tensors, heads, taps)
            return _renamed(settings, tensors, official_mirl.names_of, "decoder_pos_embed", transposed=True)
        return _bare(tensors, heads, official_mirl.ENCODER_HEADS, transposed=True)


def from_bare(path: Path, tensors: State, heads: Heads, say: Say, encoder_only: bool) -> Weights | AutoencoderWeights:
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


def _drop_decoders(tensors: MutableMapping[str, Tensor], mark: str) -> None:
    """Leave an official pre-training file's encoder alone; `mark` is a name that tells such a file."""
    if mark in tensors:
        for name in [name for name in tensors if not name.startswith(ENCODER_PARTS)]:
            del tensors[name]


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
        own = plain_vit(ARCHITECTURE, **arguments).state_dict()
    except ValueError as error:
        raise UserError(f"{first_line(error)}; give {ALLOWED}") from error
    classes = tuple(str(i) for i in range(arguments["num_classes"]))
    return Weights(ARCHITECTURE, arguments, fit(state, own), *channel_statistics(arguments["in_chans"]), classes)
