"""The autoencoder: one encoder, one decoder at each of the method's taps. Paper: Sec. 3.1 and Figure 4.

There is one class for every method; what differs is the `Method` it is given.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mirl.methods import Method
from mirl.models.decoder import NORM_EPS, Decoder, DecoderShape
from mirl.models.encoder import build_encoder, embed_visible, initialise, parse_model, run_segments
from mirl.models.patches import Size, grid_size, sincos_positions


class Autoencoder(nn.Module):
    """A timm encoder with a decoder at each tap of `method`.

    Args:
        encoder: a ViT of exactly `method.depth` blocks.
        method: taps and context are read here; terms belong to the loss.
        shape: the form of every decoder.

    Its parameters are exactly those that the method trains.
    """

    positions: Tensor

    def __init__(self, encoder: VisionTransformer, method: Method, shape: DecoderShape) -> None:
        super().__init__()
        assert len(encoder.blocks) == method.depth, f"{len(encoder.blocks)} blocks built, {method.depth} trained"
        self.encoder = encoder
        self.method = method
        self.shape = shape
        self.patch_size: Size = encoder.patch_embed.patch_size
        self.image_size: Size = encoder.patch_embed.img_size
        width, did = encoder.embed_dim, method.context != "none"
        self.patch_values = self.patch_size[0] * self.patch_size[1] * encoder.in_chans
        # The deepest tap is normed by the encoder's own final norm, which the exported encoder keeps.
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=NORM_EPS) for _ in method.taps[:-1])
        decoders = [Decoder(shape, width, self.patch_values, did=did) for _ in method.taps]
        self.decoders = nn.ModuleList(decoders)
        self.embed_input: nn.Sequential | None = None
        if did and shape.did_memory == "embedded":
            self.embed_input = nn.Sequential(nn.LayerNorm(width, eps=NORM_EPS), nn.Linear(width, shape.width))
            initialise(self.embed_input)
        self.register_buffer("positions", self._fixed_positions(), persistent=False)
        self.checkpointing = False

    def _fixed_positions(self) -> Tensor:
        return sincos_positions(self.shape.width, grid_size(self.image_size, self.patch_size))

    def place(self, device: torch.device | str = "cpu") -> None:
        """Compute the decoders' positions, which are no weights, on `device`: for a model built on the meta device."""
        with torch.device(device):
            self.positions = self._fixed_positions()

    def set_checkpointing(self, enabled: bool = True) -> None:
        """Compute blocks and decoders again in the backward pass: much less memory, the same results."""
        self.checkpointing = enabled
        self.encoder.set_grad_checkpointing(enabled)

    def compile_repeated(self) -> None:
        """Compile blocks and decoders, not the whole: the code of the first of a kind then serves all of its kind."""
        for module in (*self.encoder.blocks, *self.decoders):
            module.compile()

    def forward(self, patches: Tensor, visible: Tensor, masked: Tensor, *, all_patches: bool = False) -> list[Tensor]:
        """Predict the masked patches from the visible ones, once per decoder.

        Args:
            patches: [b, n, p], normalised as images are.
            visible, masked: [b, v] and [b, m] patch indices, together all n.
            all_patches: return predictions for visible patches too (for pictures and tests).

        Returns:
            One tensor per decoder, shallow to deep: [b, m, p] in the order of `masked`, or [b, n, p] in the order of
            `visible` then `masked`; features, where decoders predict them, after the p pixel values.
        """
        segments = run_segments(self.encoder, embed_visible(self.encoder, patches, visible), self.method.taps)
        norms = [*self.norms, self.encoder.norm]
        decoders = cast(Sequence[Decoder], self.decoders)
        tokens = [decoder.embed(norm(z)) for decoder, norm, z in zip(decoders, norms, segments[1:], strict=True)]
        sources = segments if self.embed_input is None else [self.embed_input(segments[0]), *tokens]
        recompute = self.checkpointing and torch.is_grad_enabled()
        predictions = []
        for number, decoder in enumerate(decoders, start=1):
            memory = [sources[segment] for segment in self.method.memory(number)]
            did = torch.cat(memory, dim=1) if memory else None
            inputs = (tokens[number - 1], did, self.positions, visible, masked)
            predictions.append(
                checkpoint(decoder, *inputs, all_patches=all_patches, use_reentrant=False)
                if recompute
                else decoder(*inputs, all_patches=all_patches)
            )
        return predictions

    def parted(self, predictions: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Part predictions [b, m, p + features] into pixels [b, m, p] and features [b, m, features] of each decoder."""
        p = self.patch_values
        return [both[..., :p] for both in predictions], [both[..., p:] for both in predictions]


def without_features(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the layers that predict a teacher's tokens: they serve the training alone."""
    return {name: value for name, value in state.items() if ".predict_features." not in name}


def build_autoencoder(
    model: str, method: Method, shape: DecoderShape, *, image_size: Size, patch_size: Size, channels: int
) -> Autoencoder:
    """Build an autoencoder around the named encoder, cut at the method's last tap."""
    width, heads, _ = parse_model(model)
    encoder = build_encoder(width, heads, method.depth, image_size, patch_size, channels)
    return Autoencoder(encoder, method, shape)
