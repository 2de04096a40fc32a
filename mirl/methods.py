"""A pre-training method is data: where decoders read, what they may look at, and which sums are compared with what.

Every method of the paper is one value of `Method`. The autoencoder reads `taps` and `context`, the loss reads
`terms`; neither knows a method's name. Decoders and segments are numbered from 1, shallow to deep; 0 is the patch
embedding z_0, before the first block.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from mirl.errors import UserError

MethodName = Literal[
    "mirl", "mae", "truncated_mae", "multi_decoder", "coarse_to_fine", "fine_to_coarse", "explicit_residual"
]
Context = Literal["dense", "previous", "none"]
Part = Literal["image", "coarse", "fine"]
# Choices beside the method that options, decoders and objectives share.
DIDBlocks = Literal["first", "all"]
DIDMemory = Literal["raw", "embedded"]
Target = Literal["normalised", "raw"]
Separation = Literal["gaussian", "log"]


@dataclass(frozen=True)
class Term:
    """One reconstruction: the sum of `decoders`' predictions is compared with a part of the image, times `weight`.

    In a pair (shallow, deep) the first member predicts the main component, the second the residual (Eq. 6).

    Args:
        decoders: whose predictions are added.
        weight: of this term's loss.
        target: the image, or its coarse or fine part (Table 2e).
        detached: those of `decoders` whose predictions are taken as they are: this term does not train them.
    """

    decoders: tuple[int, ...]
    weight: float
    target: Part = "image"
    detached: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """What records call this term: pair_1, residual_1 (beside a detached main component), decoder_2, fine_2."""
        if len(self.decoders) > 1:
            return f"{'residual' if self.detached else 'pair'}_{min(self.decoders)}"
        return f"{'decoder' if self.target == 'image' else self.target}_{self.decoders[0]}"


def is_term(name: str) -> bool:
    """Tell whether a recorded value is a term's loss, by its name."""
    return re.fullmatch(r"(pair|residual|decoder|coarse|fine)_\d+", name) is not None


def _train_all(terms: Sequence[Term], decoders: int) -> bool:
    """Tell whether `terms` name decoders 1 to `decoders` alone, and train each of them.

    One that no term trains would get no gradient, which stops distributed training.
    """
    named = {decoder for term in terms for decoder in term.decoders}
    trained = {decoder for term in terms for decoder in term.decoders if decoder not in term.detached}
    return named == trained == set(range(1, decoders + 1))


@dataclass(frozen=True)
class Method:
    """Three choices that make a masked-reconstruction method.

    Args:
        name: what the user typed and the run folder records.
        taps: after how many encoder blocks each decoder reads, ascending. Blocks after the last tap are not built.
        context: whose tokens a decoder may cross-attend: `none`, `previous`, the segment before its own (z_0 for the
            first), or `dense`, every shallower segment's and z_0's.
        terms: the sums that the loss compares with their targets.

    Raises:
        UserError: if `taps` do not ascend, or a term names a decoder that is not there, or no term trains one that is.
    """

    name: str
    taps: tuple[int, ...]
    context: Context
    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        if not self.taps or self.taps[0] < 1 or any(a >= b for a, b in zip(self.taps, self.taps[1:], strict=False)):
            raise UserError(f"taps {list(self.taps)} are not ascending block counts from 1; give e.g. 6,12")
        if not _train_all(self.terms, len(self.taps)):
            named = ", ".join(str(term.decoders) for term in self.terms)
            count = len(self.taps)
            raise UserError(f"terms of decoders {named} at {count} taps: name 1 to {count} alone, and train each")

    @property
    def depth(self) -> int:
        """Number of encoder blocks that are built and trained."""
        return self.taps[-1]

    @property
    def separates(self) -> bool:
        """Whether its terms are compared with the coarse and the fine part of the image. Paper: Table 2e."""
        return any(term.target != "image" for term in self.terms)

    @property
    def reconstructions(self) -> tuple[Term, ...]:
        """List the sums that are whole images, each once, for pictures: the main component or the coarse part first."""
        coarse, fine = ([t.decoders[0] for t in self.terms if t.target == part] for part in ("coarse", "fine"))
        if coarse:
            return tuple(Term(pair, 1 / len(coarse), "coarse") for pair in zip(coarse, fine, strict=True))
        sums = [set(term.decoders) for term in self.terms]
        return tuple(term for term in self.terms if not any(set(term.decoders) < other for other in sums))

    def memory(self, decoder: int) -> tuple[int, ...]:
        """List the segments whose tokens `decoder` cross-attends, deepest first, z_0 last. Paper: Eq. (8)."""
        reach = {"none": 0, "previous": 1, "dense": decoder}[self.context]
        return tuple(range(decoder - 1, decoder - 1 - reach, -1))


def default_segments(depth: int) -> int:
    """Return the number of segments for an encoder of `depth` blocks that is not told its own.

    It is the paper's for each of its models but ViT-L, whose 24 blocks it cuts into 2, and those of ViT-B-24 into 4.
    Paper: Sec. 4, pre-training setup; Table 2b.
    """
    return {24: 4, 48: 6, 54: 6}.get(depth, 2)


def mae(depth: int) -> Method:
    """Build the masked autoencoder: one decoder after the last block predicts the pixels. Paper: Eq. (1)-(4)."""
    return Method("mae", (depth,), "none", (Term((1,), 1.0),))


def truncated_mae(depth: int, blocks: int) -> Method:
    """Build a masked autoencoder of the first `blocks` of `depth` blocks; fine-tuning adds the others, fresh.

    Raises:
        UserError: if nothing would be left out.

    Paper: Sec. 2.2, Figures 1b and 2.
    """
    if not 1 <= blocks < depth:
        raise UserError(f"truncated_mae trains the first of {depth} blocks; give --taps with one number below {depth}")
    return Method("truncated_mae", (blocks,), "none", (Term((1,), 1.0),))


def mirl(
    depth: int, segments: int | None = None, *, taps: Sequence[int] | None = None, context: Context = "dense"
) -> Method:
    """Build masked image residual learning: segment g and segment G-g+1 reconstruct the image together.

    Args:
        depth: encoder blocks.
        segments: G, even or 1 (one decoder, nothing to pair); by default as many as `default_segments` says.
        taps: block counts after which the decoders read, for uneven segments; the last must be `depth`.
        context: `dense` is the paper's DID; `none` leaves it out (Table 2c).

    Raises:
        UserError: if the segments cannot be paired or do not divide the depth, or `taps` disagree with either.

    Paper: Eq. (5)-(8), Table 2b.
    """
    return _segmented(
        "mirl", depth, segments, taps, context, lambda n: [Term(each, min(1.0, 2 / n)) for each in _pairs(n) or [(1,)]]
    )


def multi_decoder(
    depth: int, segments: int | None = None, *, taps: Sequence[int] | None = None, context: Context = "dense"
) -> Method:
    """Build simple multi-decoders: every segment reconstructs the whole image by itself. Arguments as for `mirl`.

    Paper: Sec. 4.2, Table 2d.
    """
    return _segmented(
        "multi_decoder", depth, segments, taps, context, lambda n: [Term((g,), 1 / n) for g in range(1, n + 1)]
    )


def coarse_to_fine(
    depth: int, segments: int | None = None, *, taps: Sequence[int] | None = None, context: Context = "dense"
) -> Method:
    """Build fixed targets in place of learnt ones: shallow segments predict the image's coarse part, deep its fine.

    Arguments as for `mirl`. Paper: Sec. 4.2, Table 2e.
    """
    return _segmented("coarse_to_fine", depth, segments, taps, context, partial(_parts, "coarse", "fine"))


def fine_to_coarse(
    depth: int, segments: int | None = None, *, taps: Sequence[int] | None = None, context: Context = "dense"
) -> Method:
    """Build `coarse_to_fine` with its targets exchanged. Paper: Sec. 4.2, Table 2e."""
    return _segmented("fine_to_coarse", depth, segments, taps, context, partial(_parts, "fine", "coarse"))


def explicit_residual(
    depth: int, segments: int | None = None, *, taps: Sequence[int] | None = None, context: Context = "dense"
) -> Method:
    """Build residuals that are asked for: a shallow decoder learns the image alone, the deep one what it left.

    Where `mirl` compares only the sum, here the main component has a loss of its own, and is detached in the sum's.
    Arguments as for `mirl`. Ours, after the paper's mention of another form of Eq. (6) in Appendix B.2, which is not
    published with it.
    """

    def terms(n: int) -> list[Term]:
        mains = [Term((shallow,), 1 / n) for shallow, _ in _pairs(n)]
        return mains + [Term((shallow, deep), 1 / n, detached=(shallow,)) for shallow, deep in _pairs(n)]

    return _segmented("explicit_residual", depth, segments, taps, context, terms)


# By the names that users type; all take depth, segments, taps and context.
SEGMENTED: dict[str, Callable[..., Method]] = {
    "mirl": mirl,
    "multi_decoder": multi_decoder,
    "coarse_to_fine": coarse_to_fine,
    "fine_to_coarse": fine_to_coarse,
    "explicit_residual": explicit_residual,
}


def _pairs(count: int) -> list[tuple[int, ...]]:
    """Pair shallow with deep: (1, G), (2, G - 1) ... Nothing if there is only one."""
    return [(g, count - g + 1) for g in range(1, count // 2 + 1)]


def _parts(shallow: Part, deep: Part, n: int) -> list[Term]:
    """Let the members of each pair predict a part of the image each."""
    return [
        Term((decoder,), 1 / n, part) for pair in _pairs(n) for decoder, part in zip(pair, (shallow, deep), strict=True)
    ]


def _segmented(
    name: MethodName, depth: int, segments: int | None, taps: Sequence[int] | None, context: Context,
    terms: Callable[[int], list[Term]],
) -> Method:  # fmt: skip
    """Build a method that reads at `taps`, or after equal segments.

    Args:
        terms: of so many segments. A number of which they leave one untrained is refused: that one has no partner.
    """

    def allowed(count: int) -> bool:
        return _train_all(terms(count), count)

    if taps is None:
        segments = default_segments(depth) if segments is None else segments
        if segments < 1 or depth % segments:
            counts = ", ".join(str(count) for count in range(1, depth + 1) if depth % count == 0 and allowed(count))
            raise UserError(f"depth {depth} does not divide into {segments} segments; choose {counts} or give --taps")
        taps = range(depth // segments, depth + 1, depth // segments)
    elif segments not in (None, len(taps)):
        raise UserError(f"{len(taps)} taps were given for {segments} segments; give one of the two")
    elif list(taps)[-1:] != [depth]:
        raise UserError(
            f"taps {list(taps)} do not end at depth {depth}; the deepest decoder reads after the last block"
        )
    if not allowed(len(taps)):
        count = f"{len(taps)} segments" if len(taps) > 1 else "one segment"
        raise UserError(f"{count} cannot be paired; choose {'1 or ' if allowed(1) else ''}an even number")
    return Method(name, tuple(taps), context, tuple(terms(len(taps))))
