"""A small decoder: a few transformer blocks over visible tokens and mask tokens, with DID cross-attention.

Symbols: b batch, v visible and m masked patches, w decoder width, p values of one patch. Tokens stand in the order
class token, visible, masked: attention does not care about order, and slices then replace scatter and gather.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from mirl.methods import DIDBlocks, DIDMemory
from mirl.models.attention import attend
from mirl.models.encoder import initialise

NORM_EPS = 1e-6


@dataclass(frozen=True)
class DecoderShape:
    """What every decoder of an autoencoder looks like.

    Args:
        width, depth, heads: of its transformer blocks.
        did_blocks: blocks with cross-attention: `first` (the paper) or `all` (the official code).
        did_memory: what cross-attention reads: `raw`, the segments' outputs z at encoder width (the paper's Eq. 8), or
            `embedded`, the same after that segment's norm and decoder embedding (the official code).
        weight_norm: give each input feature's column of the prediction layer unit length (the official code).
        features: values (a teacher's token) that a second layer predicts of each patch, besides its pixels.
    """

    width: int
    depth: int
    heads: int
    did_blocks: DIDBlocks = "first"
    did_memory: DIDMemory = "raw"
    weight_norm: bool = False
    features: int = 0


class Attention(nn.Module):
    """Multi-head attention of `queries` [b, q, w] over `memory` [b, k, c]; self-attention if both are the same."""

    def __init__(self, width: int, heads: int, memory_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(memory_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        return self.projected(self.q(queries), self.kv(memory))

    def projected(self, q: Tensor, kv: Tensor) -> Tensor:
        """Attend with what `self.q` and `self.kv` have returned, [b, q, w] and [b, k, 2 w]."""
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = kv.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """Self-attention, then DID cross-attention if `memory_width` is given, then MLP, each pre-normed and residual."""

    def __init__(self, width: int, heads: int, memory_width: int | None) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(width, eps=NORM_EPS)
        self.self_attention = Attention(width, heads, width)
        self.did: Attention | None = None
        if memory_width is not None:
            self.norm_did = nn.LayerNorm(width, eps=NORM_EPS)
            self.norm_memory = nn.LayerNorm(memory_width, eps=NORM_EPS)
            self.did = Attention(width, heads, memory_width)
        self.norm_mlp = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor, memory: Tensor | None, first_query: int = 0) -> Tensor:
        """Map tokens [b, t, w] to [b, t - first_query, w]: tokens before `first_query` are only attended to."""
        normed = self.norm_self(x)
        x = x[:, first_query:] + self.self_attention(normed[:, first_query:], normed)
        return self._did_and_mlp(x, memory)

    def begin(
        self, seen: Tensor, hidden: Tensor, masked: Tensor, memory: Tensor | None, first_query: int = 0
    ) -> Tensor:
        """Do what `forward` does for `seen` [b, 1 + v, w] followed by rows `masked` [b, m] of `hidden` [n, w].

        Before the first block a masked patch is a mask token and a position, the same in every image: it is projected
        once for each position, not once for each image.
        """
        attention = self.self_attention
        normed, normed_hidden = self.norm_self(seen), self.norm_self(hidden)
        kv = attention.kv(normed)
        x, q, kv_hidden = (
            look_up(t, masked) for t in (hidden, attention.q(normed_hidden), attention.kv(normed_hidden))
        )
        if first_query < seen.shape[1]:
            x = torch.cat([seen[:, first_query:], x], dim=1)
            q = torch.cat([attention.q(normed[:, first_query:]), q], dim=1)
        x = x + attention.projected(q, torch.cat([kv, kv_hidden], dim=1))
        return self._did_and_mlp(x, memory)

    def _did_and_mlp(self, x: Tensor, memory: Tensor | None) -> Tensor:
        if self.did is not None:
            x = x + self.did(self.norm_did(x), self.norm_memory(memory))
        return x + self.mlp(self.norm_mlp(x))


def look_up(table: Tensor, rows: Tensor) -> Tensor:
    """Return `rows` [b, m] of `table` [n, d] as [b, m, d]; gradients of a row add up over images in float32."""
    return F.embedding(rows, table.float()).to(table.dtype)


class Decoder(nn.Module):
    """H_g: predicts the masked patches from one segment's tokens and, through DID, from earlier ones'.

    Paper: Eq. (3), (8); Sec. 4 ("each appended decoder has 2 Transformer blocks").
    """

    def __init__(self, shape: DecoderShape, encoder_width: int, patch_values: int, *, did: bool) -> None:
        super().__init__()
        width = shape.width
        memory_width = encoder_width if shape.did_memory == "raw" else width
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(
            DecoderBlock(width, shape.heads, memory_width if did and (i == 0 or shape.did_blocks == "all") else None)
            for i in range(shape.depth)
        )
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.predict = nn.Linear(width, patch_values)
        self.predict_features = nn.Linear(width, shape.features) if shape.features else None
        initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)
        if shape.weight_norm:  # after initialise, which would fill a weight that is computed
            weight_norm(self.predict, dim=1)
            gain = self.predict.get_parameter("parametrizations.weight.original0")
            nn.init.ones_(gain.requires_grad_(False))

    def forward(
        self, tokens: Tensor, memory: Tensor | None, positions: Tensor, visible: Tensor, masked: Tensor, *,
        all_patches: bool = False,
    ) -> Tensor:  # fmt: skip
        """Predict patches.

        Args:
            tokens: [b, 1 + v, w], this segment's class token and visible tokens after `embed`.
            memory: [b, k, c] tokens for DID, or None.
            positions: [n, w] of all patches; the class token's is zero.
            visible, masked: [b, v] and [b, m] patch indices.
            all_patches: predict visible patches too; training needs only the masked ones, so the last block then
                computes queries for these alone.

        Returns:
            [b, m, p] predictions of the masked patches, or [b, v + m, p], visible first. Where the shape has features,
            they follow the p pixel values.
        """
        seen = tokens + F.pad(positions[visible], (0, 0, 1, 0))
        hidden = self.mask_token[0] + positions
        first, *others = cast(Sequence[DecoderBlock], self.blocks)
        first_query = 1 if all_patches else tokens.shape[1]
        x = first.begin(seen, hidden, masked, memory, 0 if others else first_query)
        for block in others:
            x = block(x, memory, first_query if block is others[-1] else 0)
        x = self.norm(x)
        pixels = self.predict(x)
        return pixels if self.predict_features is None else torch.cat([pixels, self.predict_features(x)], dim=-1)
