"""Learning-rate schedules: linear warm-up per step, then `step` decay (the paper) or `cosine` (the official code)."""

import math
from typing import Literal

Schedule = Literal["step", "cosine"]


def learning_rate(progress: float, peak: float, warmup: float, schedule: Schedule, *, least: float = 0.0) -> float:
    """Return the rate at `progress` in 0..1 of training.

    Args:
        peak: the rate after warm-up; warmup: its share of training, 0..1; least: where `cosine` ends.

    Paper: Sec. 4.2, training schedules: `step` decays by 10 at 90 % and again at 95 % of the length.
    """
    if progress < warmup:
        return peak * progress / warmup
    if schedule == "cosine":
        return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
    return peak * (1.0 if progress < 0.9 else 0.1 if progress < 0.95 else 0.01)
