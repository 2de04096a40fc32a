"""What model a bare file of tensors holds, read from the names and shapes; timm's names for the encoder."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mirl.errors import UserError
from mirl.models.encoder import parse_model, timm_arguments


@dataclass(frozen=True)
class Heads:
    """Attention heads as the user gave them: the one size of a ViT that its tensors do not tell.

    Attributes:
        encoder, decoder: None where not given.
    """

    encoder: int | None = None
    decoder: int | None = None

    def of_encoder(self, width: int, known: Mapping[int, int]) -> int:
        """Return the encoder's heads: those given, or those `known` for its width."""
        return _choose("heads", self.encoder, width, known)

    def of_decoder(self, width: int, known: Mapping[int, int]) -> int:
        """Return the decoders' heads: those given, or those `known` for their width."""
        return _choose("decoder_heads", self.decoder, width, known)


def _choose(option: str, given: int | None, width: int, known: Mapping[int, int]) -> int:
    heads = given or known.get(width)
    if heads is None:
        raise UserError(
            f"a file of tensors does not tell the heads of a width of {width}; give --{option}, if this command has "
            "none then to mirl convert"
        )
    if width % heads:
        raise UserError(f"--{option} {heads} does not divide the width of {width}; give a number that does")
    return heads


def block_count(names: Iterable[str], prefix: str) -> int:
    """Return the number of blocks `prefix`.0, `prefix`.1 and so on up to the first that is missing."""
    numbers = {match[1] for name in names if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))}
    count = 0
    while str(count) in numbers:
        count += 1
    return count


def encoder_arguments(tensors: Mapping[str, Tensor], heads: Heads, known: Mapping[int, int]) -> dict[str, Any]:
    """Return the arguments with which timm builds the encoder or classifier whose tensors these are.

    Args:
        tensors: by timm's names; matrices may be transposed.
        heads: the user's; known: heads by width where none are given.

    Raises:
        UserError: if they are no plain ViT, or heads must be given.
    """
    try:
        width = tensors["cls_token"].shape[-1]
        _, channels, *patch = tensors["patch_embed.proj.weight"].shape
        patches = tensors["pos_embed"].shape[-2] - 1
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"the file holds no ViT that is known here: it lacks {error}") from error
    side = math.isqrt(max(patches, 0))
    if side < 1 or side * side != patches or len(patch) != 2:
        raise UserError(f"the file's positions are of {patches} patches, which are no square; convert it with timm")
    size = (side * patch[0], side * patch[1])
    depth = block_count(tensors, "blocks")
    chosen = heads.of_encoder(width, known)
    parse_model(f"vit_{width}x{chosen}_{depth}")  # says what is wrong with them
    arguments = timm_arguments(width, chosen, depth, size, (patch[0], patch[1]), channels)
    if "head.bias" in tensors:
        arguments["num_classes"] = tensors["head.bias"].numel()
    if "fc_norm.weight" in tensors:
        arguments["fc_norm"] = True
    elif "head.bias" in tensors:
        arguments["global_pool"] = "token"
    return arguments
