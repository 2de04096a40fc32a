"""Fresh weights in the last blocks before fine-tuning: did pre-training help them? Paper: Sec. 2.2, Figure 2."""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirl.errors import UserError, plural
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
        blocks = plural(depth, "block")
        raise UserError(f"--reinit_blocks {wrong[0]} is not allowed: the encoder has {blocks}; give 0 to {depth}")
    return sorted({0, *chosen})


def reinitialise(
    weights: str, folder: Path, counts: Sequence[int], seeds: Sequence[int], seconds: float, fingerprint: str,
    **options: Any,
) -> list[Trial]:  # fmt: skip
    """Fine-tune with fresh weights in so many last blocks, once for each seed; runs that are finished are read.

    Args:
        weights: what to start from.
        folder: where the runs go, `k03_seed0` and so on.
        counts: numbers of last blocks; seeds: of fresh weights, order and augmentation.
        seconds: that a run will take, roughly.
        fingerprint: of the encoder's tensors and the images' number: trials of others are not these.
        options: of `mirl.finetune`, the same for all.

    Raises:
        UserError: if a run in `folder` has other options, or began with other weights or images.
    """
    _check_began(folder, fingerprint)
    plan = {(k, seed): folder / f"k{k:02}_seed{seed}" for seed in seeds for k in counts}
    waiting = [key for key, run in plan.items() if not (run / "results.json").exists()]
    console.print(
        f"{weights}: {plural(len(plan), 'fine-tuning')} of {plural(options['epochs'], 'epoch')}, "
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


def fingerprint_of(state: Mapping[str, Tensor], images: int) -> str:
    """Return what tells an encoder's tensors, with so many images, from any others."""
    digest = hashlib.sha256(str(images).encode())
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_began(folder: Path, fingerprint: str) -> None:
    """Keep the fingerprint with the first trial, and hold later ones to it."""
    path = folder / "began_with.txt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(fingerprint + "\n")
    elif path.read_text().strip() != fingerprint:
        raise UserError(
            f"the fine-tunings in {folder} began with other weights or images; remove it or choose another --out"
        )


def _check_same(run: Path, given: dict[str, Any]) -> None:
    saved = read_config(run)
    for name, value in given.items():
        if name == "workers" or value is None:
            continue
        if saved.get(name) not in (value, list(value) if isinstance(value, tuple) else value):
            raise UserError(
                f"{run} was fine-tuned with --{name} {saved.get(name)}, not {value}; choose another --out or remove it"
            )


def _read(run: Path, count: int, seed: int) -> Trial:
    try:
        found = json.loads((run / "results.json").read_text())["weights"]
        return Trial(count, seed, found["top1"], found["images"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run}/results.json cannot be read ({type(error).__name__}); remove {run}") from error
