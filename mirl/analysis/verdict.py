"""What the figures of an encoder's blocks say, in sentences that hold for what was measured and no more.

Each rule is a constant with its reason and a function that returns findings; every number in a sentence is evidence.
Symbols: m blocks.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from mirl.analysis.diagnosis import READ_OUTS, Diagnosis, compare, percent, points, spans
from mirl.analysis.representations import Measures
from mirl.errors import plural
from mirl.tasks.accuracy import wilson

# A block is idle if it changes tokens by a tenth of what the median block does (later blocks change a growing residual
# stream less, but not by that much) or by a hundredth of their norm (if most blocks are idle, so is the median) ...
IDLE_OF_MEDIAN, IDLE_UPDATE = 0.1, 0.01
# ... and keeps what differs between tokens: where all share a large part, a small update may change the rest.
IDLE_CKA = 0.99
NEEDED = 0.95  # CKA of the last tokens with and without idle blocks under which they are needed after all
COLLAPSED = 0.95  # mean cosine of two tokens of an image: a twentieth or less is left to tell patches apart
RANK_FALL = 0.5  # share of the highest rank; neighbouring blocks differ by some per cent, half is beyond that
# Relative distance of weights: an order of magnitude less than the median block's, or a hundredth.
UNMOVED_OF_MEDIAN, UNMOVED = 0.1, 0.01
ENOUGH = 500  # patches under which two estimates of CKA, each with its noise, are not compared
LEVEL = 0.05  # of tests for a loss, shared among the blocks that could have been the best (Bonferroni)
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
    rules = (_idle, _unmoved, _lost, _collapsed, _rank_falls, _like_fresh, _harmed)
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
        named = f"{spans(found['idle'].blocks)} of {d.depth}"
        if d.without is not None and not d.without >= NEEDED:  # NaN, of tokens all alike, proves nothing
            return f"{named} hardly change their tokens, yet what follows needs it."
        return f"{named} add next to nothing."
    if "unmoved" in found:
        return f"{spans(found['unmoved'].blocks)} of {d.depth} hardly trained: their weights are almost the first ones."
    least = min(range(d.depth), key=update.__getitem__)
    said = (
        f"all {d.depth} blocks change their tokens: the least, block {least + 1}, by {percent(update[least])} of "
        f"their norm (median {percent(median(update))})"
    )
    if "harmed" in found:
        return f"{said}; {spans(found['harmed'].blocks)} fine-tune better with fresh weights."
    if "lost" in found:
        lost = found["lost"]
        below = f"the {lost.evidence['read_out']} is below its best, after the last by {lost.evidence['points']}"
        return f"{said}; after {spans(lost.blocks)} {below}."
    if "collapsed" in found:
        return f"{said}; after {spans(found['collapsed'].blocks)} the tokens of an image are almost alike."
    return f"{said}{'; no read-out falls by more than the test images leave open' if d.read_outs else ''}."


def idle_blocks(measures: Measures) -> tuple[int, ...]:
    """Return the blocks, from 1, that hardly change their tokens."""
    most = max(IDLE_UPDATE, IDLE_OF_MEDIAN * median(measures.update))
    return tuple(
        block for block, update in enumerate(measures.update, start=1)
        if update <= most and measures.kept(block) >= IDLE_CKA
    )  # fmt: skip


def _idle(d: Diagnosis) -> Iterable[Finding]:
    if blocks := idle_blocks(d.measures):
        updates = [d.measures.update[block - 1] for block in blocks]
        kept = min(d.measures.kept(block) for block in blocks)
        usual = median(d.measures.update)
        sentence = (
            f"{spans(blocks).capitalize()} change tokens by at most {percent(max(updates))} of their norm (median of "
            f"all blocks {percent(usual)}) and keep what differs between them (CKA of input and output {kept:.3f} or "
            "more)"
        )
        if d.without is not None and not math.isnan(d.without):
            sentence += (
                f"; without {'it' if len(blocks) == 1 else 'them'} the last tokens have CKA {d.without:.3f} with"
            )
            sentence += " what they are"
        evidence = {"update": updates, "median_update": usual, "cka": kept, "without": d.without}
        yield Finding("idle", blocks, f"{sentence}.", evidence)


def _lost(d: Diagnosis) -> Iterable[Finding]:
    """After the last block less is read than after the best, and so after all blocks from some one on."""
    level = LEVEL / max(1, d.depth - 1)
    for name, read in d.read_outs.items():
        best, last = max(range(d.depth), key=read.top1.__getitem__), d.depth - 1
        test = compare(read.right[best], read.right[last])
        if test.p > level:
            continue
        kept = max(block for block in range(last) if compare(read.right[best], read.right[block]).p > level)
        sentence = (
            f"The {READ_OUTS[name]} finds {percent(read.top1[best])} after block {best + 1} and "
            f"{percent(read.top1[last])} after block {d.depth}: {test} are lost, more than the {len(read.truth)} test "
            "images leave open"
        )
        if kept > best:
            sentence += f" (block {kept + 1}, {percent(read.top1[kept])}, is still within it)"
        top1 = {str(block + 1): read.top1[block] for block in (best, kept, last)}
        evidence = {"read_out": READ_OUTS[name], "top1": top1, "points": str(test), "p": test.p}
        yield Finding("lost", tuple(range(kept + 2, d.depth + 1)), f"{sentence}.", evidence)


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
    """Tokens are no farther from a fresh encoder's than those of another fresh one are."""
    if d.patches < ENOUGH:
        return
    pairs = list(zip(d.change, d.chance, strict=True))[1:]
    blocks = tuple(block for block, (change, chance) in enumerate(pairs, start=1) if change <= chance)
    if blocks:
        change, chance = ([values[block] for block in blocks] for values in (d.change, d.chance))
        sentence = (
            f"Tokens after {spans(blocks)} are as near to those of fresh weights (1 - CKA at most {max(change):.3f}) "
            f"as two encoders with fresh weights are to each other (at most {max(chance):.3f})"
        )
        yield Finding("fresh", blocks, f"{sentence}.", {"change": change, "chance": chance})


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
