"""Learning-rate schedules: linear warm-up per step, then one of three decays.

They are `step` (the paper), `cosine` (the official code) and `linear` (segmentation's protocol).
"""

import math
from typing import Literal

Schedule = Literal["step", "cosine", "linear"]
DECAYS = (0.9, 0.95)  # shares of the length after which `step` decays by 10, and by 10 again


def learning_rate(
    done: float, length: float, *, peak: float, warmup: float, schedule: Schedule, least: float = 0.0,
    decays: tuple[float, float] = DECAYS,
) -> float:  # fmt: skip
    """Return the rate when `done` of `length` is trained.

    A `step` schedule's rates up to its first decay do not depend on the length, not even in the last bit: a run can be
    extended from there.

    Args:
        done, length, warmup: in one unit, epochs or steps.
        peak: the rate after warm-up; least: where `cosine` and `linear` end.
        decays: shares of the length after which `step` decays.

    Paper: Sec. 4.2, training schedules: `step` decays by 10 at 90 % and again at 95 % of the length.
    """
    if done < warmup:
        return peak * done / warmup
    if schedule == "cosine":
        return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (length - warmup)))
    if schedule == "linear":
        return least + (peak - least) * (length - done) / (length - warmup)
    first, second = decays
    return peak * (1.0 if done < first * length else 0.1 if done < second * length else 0.01)


def undecayed_steps(epochs: int, steps_per_epoch: int) -> int:
    """Return after how many steps a `step` schedule is about to decay for the first time."""
    steps = int(DECAYS[0] * epochs * steps_per_epoch)
    while steps / steps_per_epoch < DECAYS[0] * epochs:
        steps += 1
    return steps
