"""What the figures of an encoder's blocks say, in sentences that hold for what was measured and no more.

Each rule is a constant with its reason and a function that returns findings; every number in a sentence is evidence.
Symbols: m blocks.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from mirl.analysis.diagnosis import READ_OUTS, Diagnosis, ReadOut, compare, percent, points, spans
from mirl.analysis.representations import Measures
from mirl.errors import plural
from mirl.tasks.accuracy import wilson

# A block is idle if it changes tokens by a tenth of what the median block does (later blocks change a growing residual
# stream less, but not by that much) or by a hundredth of their norm (if most blocks are idle, so is the median) ...
IDLE_OF_MEDIAN, IDLE_UPDATE = 0.1, 0.01
# ... and keeps what differs between images: where tokens share a large part, a small update may change the rest. With
# labels no read-out may differ either: what a class depends on may be a small part of what differs between images.
IDLE_CKA = 0.99
NEEDED = 0.95  # CKA of the last tokens with and without idle blocks under which they are needed after all
COLLAPSED = 0.95  # mean cosine of two tokens of an image: a twentieth or less is left to tell patches apart
RANK_FALL = 0.5  # share of the highest rank; neighbouring blocks differ by some per cent, half is beyond that
# Relative distance of weights: an order of magnitude less than the median block's, or a hundredth.
UNMOVED_OF_MEDIAN, UNMOVED = 0.1, 0.01
ENOUGH = 500  # patches under which two estimates of CKA, each with its noise, are not compared
# Share of c (1 - c) that is added to c, the largest distance between an encoder with fresh weights and four others:
# half as much again where c is small, and never 1. Of 24 such encoders of 4 blocks another one is within 1.5 c at every
# block in 95 of 100 draws, and within c in 66; training leads to 10 times c (three epochs of 24 blocks on CIFAR-10).
FRESH_MARGIN = 0.5
LEVEL = 0.05  # of tests between read-outs, shared among all that are made for one sentence (Bonferroni)
CAVEAT = (
    "In masked pre-training the last blocks serve the reconstruction: what is found of them here need not harm "
    "fine-tuning, which --reinit tests."
)
ABOUT_FEATURES = ("idle", "lost", "rank", "collapsed")


@dataclass(frozen=True)
class Finding:
    """One thing that a rule found: which `blocks` it is about (from 1), in words, and the numbers in the words."""

    kind: str
    blocks: tuple[int, ...]
    sentence: str
    evidence: dict[str, Any]


def findings(d: Diagnosis) -> list[Finding]:
    """Return what every rule found."""
    rules = (_idle, _slight, _unmoved, _like_fresh, _no_better, _lost, _collapsed, _rank_falls, _harmed)
    return [finding for rule in rules for finding in rule(d)]


def verdict(d: Diagnosis, found: Sequence[Finding]) -> list[str]:
    """Return a summary in one line, then what was found."""
    lines = [_summary(d, {finding.kind: finding for finding in reversed(found)}), *(f.sentence for f in found)]
    if not d.trials and any(f.kind in ABOUT_FEATURES and d.depth in f.blocks for f in found):
        lines.append(CAVEAT)
    return lines


def _summary(d: Diagnosis, found: dict[str, Finding]) -> str:
    update = d.measures.update
    if "idle" in found:
        blocks = found["idle"].blocks
        named = f"{spans(blocks)} of {d.depth}"
        one = len(blocks) == 1
        hardly = f"{named} hardly {'changes its' if one else 'change their'} tokens"
        if d.without is None or math.isnan(d.without):
            return f"{hardly}; whether what follows needs {'it' if one else 'them'} cannot be told."
        if d.without < NEEDED:
            return f"{hardly}, yet what follows needs {'it' if one else 'them'}."
        return f"{named} {_verb('add', blocks)} next to nothing."
    if "unmoved" in found:
        blocks = found["unmoved"].blocks
        weights = f"{'its' if len(blocks) == 1 else 'their'} weights are almost the first ones"
        return f"{spans(blocks)} of {d.depth} hardly trained: {weights}."
    if "fresh" in found:
        named = f"{spans(found['fresh'].blocks)} of {d.depth}"
        return f"after {named} tokens are as near to those of fresh weights as fresh encoders are to each other."
    least = min(range(d.depth), key=update.__getitem__)
    said = (
        f"all {d.depth} blocks change their tokens: the least, block {least + 1}, by {percent(update[least])} of "
        f"their norm (median {percent(median(update))})"
    )
    if "harmed" in found:
        blocks = found["harmed"].blocks
        return f"{said}; {spans(blocks)} {_verb('fine-tune', blocks)} better with fresh weights."
    if "no_better" in found:
        return (
            f"{said}; after {spans(found['no_better'].blocks)} no read-out is shown to be better than fresh weights'."
        )
    if "lost" in found:
        lost = found["lost"]
        below = f"the {lost.evidence['read_out']} is below its best, after the last by {lost.evidence['points']}"
        return f"{said}; after {spans(lost.blocks)} {below}."
    if "collapsed" in found:
        return f"{said}; after {spans(found['collapsed'].blocks)} the tokens of an image are almost alike."
    return f"{said}{'; no read-out falls by more than the test images leave open' if d.read_outs else ''}."


def idle_blocks(measures: Measures, read_outs: Mapping[str, ReadOut]) -> tuple[int, ...]:
    """Return the blocks, from 1, that hardly change their tokens, nor what is read out of them."""
    return tuple(
        block for block in _small(measures)
        if measures.kept[block - 1] >= IDLE_CKA and not _changed(read_outs, block)
    )  # fmt: skip


def _small(measures: Measures) -> tuple[int, ...]:
    """Return the blocks, from 1, whose updates are small."""
    most = max(IDLE_UPDATE, IDLE_OF_MEDIAN * median(measures.update))
    return tuple(block for block, update in enumerate(measures.update, start=1) if update <= most)


def _changed(read_outs: Mapping[str, ReadOut], block: int) -> list[str]:
    """Return the names of read-outs that differ before and after a block by more than the test images leave open."""
    tests = {name: compare(read.right[block - 1], read.right[block]) for name, read in read_outs.items()}
    tried = sum(len(read.right) - 1 for read in read_outs.values())
    return [name for name, test in tests.items() if test.p <= LEVEL / tried]


def _verb(verb: str, blocks: Sequence[int]) -> str:
    return f"{verb}s" if len(blocks) == 1 else verb


def _idle(d: Diagnosis) -> Iterable[Finding]:
    if blocks := idle_blocks(d.measures, d.read_outs):
        updates = [d.measures.update[block - 1] for block in blocks]
        kept = min(d.measures.kept[block - 1] for block in blocks)
        usual = median(d.measures.update)
        sentence = (
            f"{_by_little(d, blocks)} and {_verb('keep', blocks)} what differs between images (CKA of input and output "
            f"{kept:.3f}{' or more' * (len(blocks) > 1)}{', and no read-out differs' * bool(d.read_outs)})"
        )
        if d.without is not None and not math.isnan(d.without):
            sentence += (
                f"; without {'it' if len(blocks) == 1 else 'them'} the last tokens have CKA {d.without:.3f} with"
            )
            sentence += " what they are"
        evidence = {"update": updates, "median_update": usual, "cka": kept, "without": d.without}
        yield Finding("idle", blocks, f"{sentence}.", evidence)


def _slight(d: Diagnosis) -> Iterable[Finding]:
    """A small update that is not nothing: of what differs between images it changes much, or what is read out."""
    for block in sorted({*_small(d.measures)} - {*idle_blocks(d.measures, d.read_outs)}):
        kept, changed = d.measures.kept[block - 1], _changed(d.read_outs, block)
        if math.isnan(kept) and not changed:
            continue
        told = [f"what differs between images has CKA {kept:.3f} before and after it"] * (kept < IDLE_CKA)
        top1 = {name: [d.read_outs[name].top1[place] for place in (block - 1, block)] for name in changed}
        told += [
            f"the {READ_OUTS[name]} finds {percent(before)} before and {percent(after)} after it"
            for name, (before, after) in top1.items()
        ]
        evidence = {"update": d.measures.update[block - 1], "cka": kept, "top1": top1}
        yield Finding("slight", (block,), f"{_by_little(d, (block,))}, yet {', '.join(told)}.", evidence)


def _by_little(d: Diagnosis, blocks: Sequence[int]) -> str:
    most = max(d.measures.update[block - 1] for block in blocks)
    return (
        f"{spans(blocks).capitalize()} {_verb('change', blocks)} tokens by {'at most ' * (len(blocks) > 1)}"
        f"{percent(most)} of their norm (median of all blocks {percent(median(d.measures.update))})"
    )


def _lost(d: Diagnosis) -> Iterable[Finding]:
    """After the last block less is read than after the best, and so after all blocks from some one on."""
    level = LEVEL / max(1, d.depth - 1)
    for name, read in d.read_outs.items():
        best, last = max(range(1, d.depth + 1), key=read.top1.__getitem__), d.depth
        test = compare(read.right[best], read.right[last])
        if test.p > level:
            continue
        kept = max(block for block in range(1, last) if compare(read.right[best], read.right[block]).p > level)
        sentence = (
            f"The {READ_OUTS[name]} finds {percent(read.top1[best])} after block {best} and "
            f"{percent(read.top1[last])} after block {last}: {test} are lost, more than the {len(read.truth)} test "
            "images leave open"
        )
        if kept > best:
            sentence += f" (block {kept}, {percent(read.top1[kept])}, is still within it)"
        top1 = {str(block): read.top1[block] for block in (best, kept, last)}
        evidence = {"read_out": READ_OUTS[name], "top1": top1, "points": str(test), "p": test.p}
        yield Finding("lost", tuple(range(kept + 1, d.depth + 1)), f"{sentence}.", evidence)


def _collapsed(d: Diagnosis) -> Iterable[Finding]:
    first, *after = d.measures.similarity
    blocks = tuple(block for block, value in enumerate(after, start=1) if value >= COLLAPSED)
    if blocks and first < COLLAPSED:
        values = [after[block - 1] for block in blocks]
        sentence = (
            f"After {spans(blocks)} the tokens of an image are almost alike (mean cosine {min(values):.3f} or more; "
            f"{first:.3f} before the first block)"
        )
        yield Finding("collapsed", blocks, f"{sentence}.", {"similarity": values, "embedding": first})


def _rank_falls(d: Diagnosis) -> Iterable[Finding]:
    rank = d.measures.rank
    peak = max(range(1, d.depth + 1), key=rank.__getitem__)
    if rank[-1] <= RANK_FALL * rank[peak]:
        blocks = tuple(range(peak + 1, d.depth + 1))
        sentence = (
            f"The effective rank of tokens falls from {rank[peak]:.1f} after block {peak} to {rank[-1]:.1f} after "
            f"block {d.depth} (fresh weights: {d.fresh.rank[-1]:.1f})"
        )
        evidence = {"rank": [rank[peak], rank[-1]], "fresh": d.fresh.rank[-1]}
        yield Finding("rank", blocks, f"{sentence}.", evidence)


def _like_fresh(d: Diagnosis) -> Iterable[Finding]:
    """Tokens are no farther from a fresh encoder's than those of other fresh ones are, with a margin."""
    if d.patches < ENOUGH:
        return
    limits = [chance + FRESH_MARGIN * chance * (1 - chance) for chance in d.chance]
    if blocks := tuple(block for block in range(1, d.depth + 1) if d.change[block] <= limits[block]):
        change, chance, limit = ([values[block] for block in blocks] for values in (d.change, d.chance, limits))
        sentence = (
            f"Tokens after {spans(blocks)} are as near to those of fresh weights (1 - CKA at most {max(change):.3f}) "
            f"as encoders with fresh weights are to each other (at most {max(chance):.3f}; with a margin for "
            f"what few draws leave open {max(limit):.3f})"
        )
        yield Finding("fresh", blocks, f"{sentence}.", {"change": change, "chance": chance, "limit": limit})


def _no_better(d: Diagnosis) -> Iterable[Finding]:
    """No read-out tells more after a block than after the same one of an encoder with fresh weights."""
    level = LEVEL / (d.depth * max(1, len(d.read_outs)))

    def better(name: str, block: int) -> bool:
        test = compare(d.read_outs[name].right[block], d.fresh_read_outs[name].right[block])
        return test.share > 0 and test.p <= level

    blocks = tuple(b for b in range(1, d.depth + 1) if d.read_outs and not any(better(name, b) for name in d.read_outs))
    if blocks:
        last = blocks[-1]
        top1 = {name: [reads[name].top1[last] for reads in (d.read_outs, d.fresh_read_outs)] for name in d.read_outs}
        found = ", ".join(f"{READ_OUTS[n]} {percent(own)} against {percent(fresh)}" for n, (own, fresh) in top1.items())
        images = len(next(iter(d.read_outs.values())).truth)
        sentence = (
            f"After {spans(blocks)} no read-out is better than fresh weights' by more than the {images} test images "
            f"leave open (after block {last}: {found})"
        )
        yield Finding("no_better", blocks, f"{sentence}.", {"block": last, "top1": top1})


def _unmoved(d: Diagnosis) -> Iterable[Finding]:
    if d.distance is None:
        return
    usual = median(d.distance)
    most = max(UNMOVED, UNMOVED_OF_MEDIAN * usual)
    if blocks := tuple(block for block, moved in enumerate(d.distance, start=1) if moved <= most):
        moved = [d.distance[block - 1] for block in blocks]
        sentence = (
            f"The weights of {spans(blocks)} moved by at most {percent(max(moved))} of their first norm (median of "
            f"all blocks {percent(usual)})"
        )
        yield Finding("unmoved", blocks, f"{sentence}.", {"distance": moved, "median_distance": usual})


def _harmed(d: Diagnosis) -> Iterable[Finding]:
    """The paper's Observation I, Figure 2: fresh weights in the last blocks against the trained ones."""
    by_count: dict[int, list[float]] = {}
    for trial in d.trials:
        by_count.setdefault(trial.count, []).append(trial.top1)
    (_, trained), *others = sorted(by_count.items()) or [(0, [])]
    if not others:
        return
    gains = {count: mean(found) - mean(trained) for count, found in others}
    best = max(gains, key=gains.__getitem__)
    gain, images, seeds = gains[best], d.trials[0].images, len(trained)
    spread = max(max(found) - min(found) for found in (trained, by_count[best]))
    low, high = wilson(round(mean(trained) * images), images)
    half = math.sqrt(2) * (high - low) / 2  # of a difference, as if each side had been tested on images of its own
    # The best of several is chosen, hence Bonferroni; trials of a seed share order and augmentation, hence pairs.
    p = _better(by_count[best], trained) * len(others)
    beyond_seeds, beyond_images = p <= LEVEL, gain > half
    last = "the last block" if best == 1 else f"the last {best} blocks"
    better = f"Fresh weights in {last} fine-tune {points(gain)} better than the trained ones"
    if beyond_seeds and beyond_images:
        said = f"{better}: at this budget pre-training harmed them (the paper's Observation I)"
    elif beyond_seeds:
        said = f"{better}, more than seeds but not more than the test images leave open"
    elif gain > 0:
        said = f"{better}, within what seeds leave open: no harm of pre-training is shown"
    elif gain == 0:
        said = f"Fresh weights in {last} fine-tune as well as the trained ones"
    else:
        said = f"Fresh weights in {last} fine-tune {points(-gain)} worse than the trained ones"
        said += ", the least loss of all" if len(others) > 1 else ""
        if _better(trained, by_count[best]) > LEVEL:
            said += ", within what seeds leave open"
    means = ", ".join(f"{count}: {percent(mean(found))}" for count, found in sorted(by_count.items()))
    apart = f"at most {points(spread)} apart" if seeds > 1 else "so no spread is known"
    sentence = (
        f"{said}. Accuracy by number of fresh last blocks: {means} (fine-tuned for {plural(d.epochs, 'epoch')}; "
        f"{plural(seeds, 'seed')}, {apart}; {images} test images, which leave ± {points(half)} open)."
    )
    harmed = beyond_seeds and beyond_images
    top1 = {str(count): found for count, found in by_count.items()}
    evidence = {"top1": top1, "spread": spread, "half": half, "p": min(1.0, p)}
    blocks = tuple(range(d.depth - best + 1, d.depth + 1)) if harmed else ()
    yield Finding("harmed" if harmed else "reinit", blocks, sentence, evidence)


def _better(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the p of a paired t-test that `one` is better, seed by seed; 1 where seeds are too few to tell."""
    differences = {round(a - b, 12) for a, b in zip(one, other, strict=True)}
    if len(one) < 3 or len(differences) == 1:  # no spread is no evidence of none
        return 1.0
    from scipy.stats import ttest_rel  # slow to import, and seldom needed

    return float(ttest_rel(one, other, alternative="greater").pvalue)
