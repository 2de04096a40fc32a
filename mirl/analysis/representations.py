"""What whole images show of every block of an encoder: its tokens, how it changes them, where it attends.

One pass of a frozen encoder; hooks look at the blocks, so that every block that keeps the number of tokens can be
looked at, whoever trained it. Tokens are patch tokens. Rank, similarity and CKA are of tokens normalised as the next
block sees them, so that blocks compare; norm, update and cosine are of the residual stream itself. Where positions
make most of what differs between tokens, CKA is near 1 whatever a block does to the rest: what a block keeps is
therefore measured on content, tokens less each position's mean over images.

Symbols: b images, m blocks (0 is the embedding, before the first), n tokens, d width, r rows: tokens of many images.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from timm.layers import Attention
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from mirl.data.loading import Views
from mirl.errors import UserError, none_readable
from mirl.tasks.blocks import ROWS, effective_rank, evenly, token_similarity
from mirl.tasks.features import FrozenEncoder, batches
from mirl.tasks.settings.features import ReadingOptions

CKA_ROWS = 1000  # of the rows of the rank; a Gram matrix of each block is in memory at once, 4 MB each
ALIKE = 1e-12  # share of a Gram matrix that float32 rounding leaves between rows that are equal
ROUNDING = 1e-5  # of the tokens' norm, under which content is what float32 leaves between images that are equal
LEAST_ROWS = 16  # rows under which none of the figures means anything; the estimator itself needs four


@dataclass(frozen=True)
class Measures:
    """Figures of each block, means over images.

    Attributes:
        rank, similarity, norm: after the embedding and each block [1 + m]: effective rank of tokens, mean cosine of two
            tokens of an image, mean Euclidean norm of a token.
        update: of each block [m], ||x_l - x_(l-1)|| / ||x_(l-1)|| of a token.
        cosine: of each block [m], between a token before and after. 1 - cosine is the "block influence" of ShortGPT
            (Men et al., 2024).
        entropy: of each block's attention [m], as a share of uniform attention's; None if it is not timm's own.
        cka: between the tokens after each two of the embedding and the blocks [1 + m, 1 + m].
        kept: of each block [m], CKA between the content of tokens before and after it; NaN if images do not differ.
    """

    rank: list[float]
    similarity: list[float]
    norm: list[float]
    update: list[float]
    cosine: list[float]
    entropy: list[float] | None
    cka: list[list[float]]
    kept: list[float]

    @property
    def depth(self) -> int:
        return len(self.update)


@dataclass(frozen=True)
class Observation:
    """What one pass leaves, on the CPU.

    Attributes:
        rows: normalised tokens after the embedding and each block, each [r, d], of every image at the same positions.
        means: means over images by the names of `Measures`, for those blocks that have them.
        images: how many could be read.
        bad: (name, reason) of files that could not be read.
    """

    rows: list[Tensor]
    means: dict[str, list[float]]
    images: int
    bad: tuple[tuple[str, str], ...]

    def measures(self) -> Measures:
        """Compute what follows from the tokens."""
        depth = len(self.rows) - 1
        entropy = self.means.get("entropy", [])
        return Measures(
            rank=[effective_rank(rows) for rows in self.rows],
            **{name: self.means[name] for name in ("similarity", "norm", "update", "cosine")},
            entropy=entropy if len(entropy) == depth else None,
            cka=cka_between(self.rows).tolist(),
            kept=[float(a @ b) for a, b in pairwise(_unit_gram(self.content(i)) for i in range(depth + 1))],
        )

    def content(self, number: int) -> Tensor:
        """Return the rows after a block, 0 is the embedding, less each position's mean over images [r, d]."""
        by_image = self.rows[number].unflatten(0, (self.images, -1))
        content = by_image - by_image.mean(dim=0)
        if content.norm() <= ROUNDING * by_image.norm():
            content.zero_()
        return content.flatten(0, 1)


def observe(encoder: FrozenEncoder, images: Views, options: ReadingOptions, title: str) -> Observation:
    """Pass images through an encoder once.

    Raises:
        UserError: if none of the images can be read, they are too few, or tokens are not finite.
    """
    patches = encoder.encoder.patch_embed.num_patches
    if patches < 2:
        raise UserError("the encoder cuts an image into a single patch, which leaves nothing to compare; give another")
    watch = _Watch(encoder.encoder, per_image=min(patches, -(-ROWS // len(images))))
    count = 0
    bad: list[tuple[str, str]] = []
    with watch.watching():
        for batch in batches(images, options.batch_size, options.workers, title):
            bad += batch.bad
            if len(batch):
                encoder(batch.images)
                count += len(batch)
    if not count:
        raise none_readable(len(images), bad)
    rows = [torch.cat(parts) for parts in watch.rows]
    if len(rows[0]) < LEAST_ROWS:
        raise UserError(f"{len(rows[0])} patches in all are too few to look at; give more --images")
    return Observation(rows, watch.means(), count, tuple(bad))


class _Watch:
    """Hooks that note what is to be known of each block, and let the tokens go.

    Args:
        per_image: patch tokens of an image whose values are kept, at places spread evenly.
    """

    def __init__(self, encoder: VisionTransformer, per_image: int) -> None:
        self.encoder, self.prefix = encoder, encoder.num_prefix_tokens
        self.places = torch.linspace(0, encoder.patch_embed.num_patches - 1, per_image).long()
        self.rows: list[list[Tensor]] = [[] for _ in range(1 + len(encoder.blocks))]
        self._noted: dict[tuple[str, int], list[Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        for number, block in enumerate(self.encoder.blocks, start=1):
            handles.append(block.register_forward_hook(partial(self._after, number)))
            if type(getattr(block, "attn", None)) is Attention:  # another kind has other queries and keys
                handles.append(block.attn.register_forward_pre_hook(partial(self._attend, number)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def means(self) -> dict[str, list[float]]:
        """Return means over images, in the order of the blocks."""
        found: dict[str, list[float]] = {}
        for (name, _), parts in sorted(self._noted.items()):
            found.setdefault(name, []).append(float(torch.cat(parts).double().mean()))
        return found

    def _note(self, name: str, number: int, values: Tensor) -> None:
        """Keep a figure of each image [b]."""
        self._noted.setdefault((name, number), []).append(values.cpu())

    def _after(self, number: int, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        before, after = (tokens[:, self.prefix :].float() for tokens in (inputs[0], output))
        if number == 1:
            self._tokens(0, before)
        self._tokens(number, after)
        change = (after - before).norm(dim=-1) / before.norm(dim=-1).clamp(min=torch.finfo(before.dtype).tiny)
        self._note("update", number, change.mean(dim=1))
        self._note("cosine", number, F.cosine_similarity(before, after, dim=-1).mean(dim=1))

    def _tokens(self, number: int, tokens: Tensor) -> None:
        if not tokens.isfinite().all():
            where = f"after block {number}" if number else "before the first block"
            raise UserError(f"tokens {where} are not finite numbers: the weights are damaged; give others")
        self._note("norm", number, tokens.norm(dim=-1).mean(dim=1))
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        self._note("similarity", number, token_similarity(tokens))
        self.rows[number].append(tokens[:, self.places].flatten(0, 1).cpu())

    def _attend(self, number: int, attention: Attention, inputs: tuple[Tensor, ...]) -> None:
        self._note("entropy", number, attention_entropy(attention, inputs[0]))


def attention_entropy(attention: Attention, tokens: Tensor) -> Tensor:
    """Return the entropy of an image's attention [b], mean over heads and queries, as a share of uniform attention's.

    1 is attention to all n tokens alike, 0 to a single one.

    Args:
        attention: timm's; tokens: what it is given [b, n, d].
    """
    b, n, _ = tokens.shape
    q, k, _ = attention.qkv(tokens).reshape(b, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    pairs = zip(attention.q_norm(q).float(), attention.k_norm(k).float(), strict=True)
    with torch.autocast(tokens.device.type, enabled=False):
        # An image at a time: maps of all would be the largest tensors of the pass.
        maps = ((q @ k.mT * attention.scale).softmax(dim=-1) for q, k in pairs)
        return torch.stack([torch.special.entr(each).sum(dim=-1).mean() for each in maps]) / math.log(n)


def cka(one: Tensor, other: Tensor) -> float:
    """Return the linear CKA of representations [r, d] and [r, e] of the same rows: 1 if equal up to rotation and scale.

    HSIC is the unbiased estimator, of which independent rows have 0 on average also where r < d (Song et al., 2012;
    Nguyen et al., 2021, Eq. 3). Representations without any difference between rows have none: NaN.
    """
    return float(_unit_gram(one) @ _unit_gram(other))


def cka_between(representations: Sequence[Tensor]) -> Tensor:
    """Return `cka` of each two representations [m, m]."""
    grams = torch.stack([_unit_gram(rows) for rows in representations])
    return grams @ grams.T


def _unit_gram(rows: Tensor) -> Tensor:
    """Return the Gram matrix of at most `CKA_ROWS` rows, centred without bias, as a vector [r * r] of length one.

    U-centring (Székely & Rizzo, 2014, Eq. 3.1) makes the unbiased HSIC a scalar product: r (r - 3) HSIC = <K, L>.
    """
    rows = rows[evenly(np.arange(len(rows)), CKA_ROWS)].double()
    n = len(rows)
    gram = rows @ rows.T
    least = ALIKE * gram.norm()
    gram.fill_diagonal_(0)
    sums = gram.sum(dim=0) / (n - 2)
    gram += sums.sum() / (n - 1) - sums[:, None] - sums
    gram.fill_diagonal_(0)
    norm = gram.norm()
    return (gram / norm.where(norm > least, torch.nan)).flatten().float()


def finite(value: Any) -> Any:
    """Return lists, tables and numbers with None in place of what JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
