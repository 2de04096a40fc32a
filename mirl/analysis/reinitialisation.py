"""Fresh weights in the last blocks before fine-tuning: did pre-training help them? Paper: Sec. 2.2, Figure 2."""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mirl.errors import UserError
from mirl.tasks.finetune import finetune
from mirl.training.runs import console, duration, read_config


@dataclass(frozen=True)
class Trial:
    """A fine-tuning with fresh weights in the last `count` blocks: the share of `images` test images told right."""

    count: int
    seed: int
    top1: float
    images: int


def counts(depth: int, given: Sequence[int] | None) -> list[int]:
    """Return the numbers of last blocks to give fresh weights: 0, and up to four others, to half of the depth.

    Raises:
        UserError: if one was given that the encoder does not allow.
    """
    chosen = np.round(np.linspace(0, max(1, depth // 2), 5)).astype(int).tolist() if given is None else given
    if wrong := [count for count in chosen if not 0 <= count <= depth]:
        raise UserError(f"--reinit_blocks {wrong[0]} is not allowed: the encoder has {depth} blocks; give 0 to {depth}")
    return sorted({0, *chosen})


def reinitialise(
    weights: str, folder: Path, counts: Sequence[int], seeds: Sequence[int], seconds: float, **options: Any
) -> list[Trial]:
    """Fine-tune with fresh weights in so many last blocks, once for each seed; runs that are finished are read.

    Args:
        weights: what to start from.
        folder: where the runs go, `k03_seed0` and so on.
        counts: numbers of last blocks; seeds: of fresh weights, order and augmentation.
        seconds: that a run will take, roughly.
        options: of `mirl.finetune`, the same for all.

    Raises:
        UserError: if a run in `folder` has other options.
    """
    plan = {(k, seed): folder / f"k{k:02}_seed{seed}" for seed in seeds for k in counts}
    waiting = [key for key, run in plan.items() if not (run / "results.json").exists()]
    console.print(
        f"{weights}: {len(plan)} fine-tunings of {options['epochs']} epoch{'s' * (options['epochs'] > 1)}, "
        f"{len(plan) - len(waiting)} of them are there; {len(waiting)} take{'s' * (len(waiting) == 1)} about "
        f"{duration(seconds * len(waiting))}",
        markup=False,
    )
    done, started = 0, time.monotonic()
    for (k, seed), run in plan.items():
        given = {"weights": weights, "reinit_last": k, "seed": seed, **options}
        begun = (run / "config.yaml").exists()
        if begun:
            _check_same(run, given)
        if (k, seed) not in waiting:
            continue
        finetune(**given, out=str(run), resume=begun, evaluate_epochs=options["epochs"], devices=1, report=False)
        shutil.rmtree(run / "checkpoints", ignore_errors=True)  # two of them, three times the model each
        done += 1
        left = (time.monotonic() - started) / done * (len(waiting) - done)
        console.print(f"{done} of {len(waiting)} is done: {run}; about {duration(left)} left", markup=False)
    return [_read(run, k, seed) for (k, seed), run in plan.items()]


def _check_same(run: Path, given: dict[str, Any]) -> None:
    saved = read_config(run)
    for name, value in given.items():
        if value is not None and saved.get(name) not in (value, list(value) if isinstance(value, tuple) else value):
            raise UserError(
                f"{run} was fine-tuned with --{name} {saved.get(name)}, not {value}; choose another --out or remove it"
            )


def _read(run: Path, count: int, seed: int) -> Trial:
    try:
        found = json.loads((run / "results.json").read_text())["weights"]
        return Trial(count, seed, found["top1"], found["images"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run}/results.json cannot be read ({type(error).__name__}); remove {run}") from error
