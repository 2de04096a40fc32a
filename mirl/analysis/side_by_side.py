"""What differs between several encoders that were diagnosed on the same images, in sentences."""

import math
from collections.abc import Iterable, Sequence

from mirl.analysis.diagnosis import READ_OUTS, Diagnosis, compare, percent, points, spans
from mirl.analysis.verdict import LEVEL, idle_blocks


def compare_all(diagnoses: Sequence[Diagnosis]) -> list[str]:
    """Return a sentence for each measure in which several encoders may differ."""

    def each(words: Iterable[str]) -> str:
        return ", ".join(f"{d.name} {said}" for d, said in zip(diagnoses, words, strict=True))

    ranks = [d.measures.rank for d in diagnoses]
    idle = [idle_blocks(d.measures, d.read_outs) for d in diagnoses]
    lines = [
        f"Blocks that hardly change their tokens: {each(map(_listed, idle))}.",
        f"Effective rank after the last block: {each(f'{rank[-1]:.1f}' for rank in ranks)}; as a share of the highest "
        f"of all blocks: {each(percent(rank[-1] / max(rank[1:])) for rank in ranks)}.",
    ]
    for name in diagnoses[0].read_outs:
        reads = [d.read_outs[name] for d in diagnoses]
        best = each(
            f"{percent(max(r.top1[1:]))} (block {max(range(1, d.depth + 1), key=r.top1.__getitem__)} of {d.depth})"
            for d, r in zip(diagnoses, reads, strict=True)
        )
        lines.append(
            f"Best {READ_OUTS[name]}: {best}; after the last block: {each(percent(r.top1[-1]) for r in reads)}"
        )
        first, second, *_ = sorted(zip(diagnoses, reads, strict=True), key=lambda pair: -pair[1].top1[-1])
        if first[1].truth.equal(second[1].truth):
            test = compare(first[1].right[-1], second[1].right[-1])
            images, more = len(first[1].truth), "more" if test.p <= LEVEL / math.comb(len(reads), 2) else "no more"
            if first[1].right[-1].equal(second[1].right[-1]):
                said = f"and {second[0].name} are equal on each of {images} test images, which leave up to"
                lines[-1] += f"; there {first[0].name} {said} {points(test.high)} open"
            else:
                said = f"is {test} above {second[0].name}, {more} than {images} test images leave open"
                lines[-1] += f"; there {first[0].name} {said}"
        lines[-1] += "."
    return lines


def _listed(blocks: Sequence[int]) -> str:
    return spans(blocks).partition(" ")[2] if blocks else "none"
