"""A pre-training method is data: where decoders read, what they may look at, and which sums are compared with what.

Every method of the paper is one value of `Method`. The autoencoder reads `taps` and `context`, the loss reads
`terms`; neither knows a method's name. Decoders and segments are numbered from 1, shallow to deep; 0 is the patch
embedding z_0, before the first block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mirl.errors import UserError

Context = Literal["none", "dense"]


@dataclass(frozen=True)
class Term:
    """One reconstruction: the sum of `decoders`' predictions is compared with the pixels, times `weight`.

    In a pair (shallow, deep) the first member predicts the main component, the second the residual (Eq. 6).
    """

    decoders: tuple[int, ...]
    weight: float


@dataclass(frozen=True)
class Method:
    """Three choices that make a masked-reconstruction method.

    Args:
        name: what the user typed and the run folder records.
        taps: after how many encoder blocks each decoder reads, ascending. Blocks after the last tap are not built.
        context: whose tokens a decoder may cross-attend: `none`, or `dense`, every shallower segment's and z_0's.
        terms: the sums that the loss compares with the target.
    """

    name: str
    taps: tuple[int, ...]
    context: Context
    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        if not self.taps or self.taps[0] < 1 or any(a >= b for a, b in zip(self.taps, self.taps[1:], strict=False)):
            raise UserError(f"taps {list(self.taps)} are not ascending block counts from 1; give e.g. 6,12")
        used = {decoder for term in self.terms for decoder in term.decoders}
        # A decoder in no term would get no gradient, which stops distributed training.
        assert used == set(range(1, len(self.taps) + 1)), f"terms use decoders {used}, there are {len(self.taps)}"

    @property
    def depth(self) -> int:
        """Number of encoder blocks that are built and trained."""
        return self.taps[-1]

    def memory(self, decoder: int) -> tuple[int, ...]:
        """List the segments whose tokens `decoder` cross-attends, deepest first, z_0 last. Paper: Eq. (8)."""
        return tuple(range(decoder - 1, -1, -1)) if self.context == "dense" else ()


def default_segments(depth: int) -> int:
    """Return the paper's number of segments for an encoder of `depth` blocks. Paper: Sec. 4, pre-training setup."""
    return {24: 4, 48: 6, 54: 6}.get(depth, 2)


def mirl(
    depth: int, segments: int | None = None, *, taps: Sequence[int] | None = None, context: Context = "dense"
) -> Method:
    """Build masked image residual learning: segment g and segment G-g+1 reconstruct the image together.

    Args:
        depth: encoder blocks.
        segments: G, even or 1 (one decoder, nothing to pair); by default the paper's number for this depth.
        taps: block counts after which the decoders read, for uneven segments; the last must be `depth`.
        context: `dense` is the paper's DID; `none` leaves it out (Table 2c).

    Raises:
        UserError: if the segments cannot be paired or do not divide the depth, or `taps` disagree with either.

    Paper: Eq. (5)-(8), Table 2b.
    """
    if taps is None:
        taps = _equal_taps(depth, default_segments(depth) if segments is None else segments)
    elif segments not in (None, len(taps)):
        raise UserError(f"{len(taps)} taps were given for {segments} segments; give one of the two")
    elif list(taps)[-1:] != [depth]:
        raise UserError(
            f"taps {list(taps)} do not end at depth {depth}; the deepest decoder reads after the last block"
        )
    count = len(taps)
    if count > 1 and count % 2:
        raise UserError(f"{count} segments cannot be paired; choose 1 or an even number")
    pairs = [(g, count - g + 1) for g in range(1, count // 2 + 1)] if count > 1 else [(1,)]
    return Method("mirl", tuple(taps), context, tuple(Term(pair, 1 / len(pairs)) for pair in pairs))


def mae(depth: int) -> Method:
    """Build the masked autoencoder: one decoder after the last block predicts the pixels. Paper: Eq. (1)-(4)."""
    return Method("mae", (depth,), "none", (Term((1,), 1.0),))


def _equal_taps(depth: int, segments: int) -> tuple[int, ...]:
    if segments < 1 or depth % segments:
        allowed = [str(count) for count in range(1, depth + 1) if depth % count == 0 and (count == 1 or count % 2 == 0)]
        raise UserError(
            f"depth {depth} does not divide into {segments} segments; choose {', '.join(allowed)} or give --taps"
        )
    return tuple(range(depth // segments, depth + 1, depth // segments))
