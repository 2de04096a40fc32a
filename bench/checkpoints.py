"""Size of a checkpoint, and seconds to write it, to compare its sums and to load it, on this machine's disk.

    python bench/checkpoints.py --models vit_s_54 vit_b_48 --folder runs

The state is a run's own, as in the paper's recipes: autoencoder with six decoders of 2 blocks, AdamW's two moments of
every weight. Writing ends when the disk says that it has everything. `compare` and `load` are of a file that the system
still has in its memory, `load_cold` of one that it has not; loading compares first. `raw` is the same number of bytes,
written and synced: what no way of writing can beat. Each figure is the median of --repeats.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from recording import add, machine

from mirl.tasks.settings.pretraining import Resolved, autoencoder_of
from mirl.training import checkpoints, integrity, processes
from mirl.training.optimizers import adamw

MINUTES = 10  # the default of --checkpoint_minutes


def state_of(model: str) -> dict[str, Any]:
    """Return what a run of `model` keeps, with moments."""
    settings = Resolved(model=model, decoder_depth=2, segments=6, image_size=(224, 224), patch_size=(16, 16))
    autoencoder = autoencoder_of(settings)
    optimizer = adamw(autoencoder, lr=0.0, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
    for parameter in autoencoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # fills the moments
    optimizer.zero_grad(set_to_none=True)
    return {"model": autoencoder.state_dict(), "optimizer": optimizer.state_dict(), "bad": {}, "skipped": 0}


def forget(path: Path) -> None:
    """Let the system drop a file that it keeps in memory."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_raw(size: int, path: Path) -> None:
    """Write and sync `size` bytes."""
    block = memoryview(os.urandom(2**26))
    with open(path, "wb", buffering=0) as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        os.fsync(file.fileno())
    path.unlink()


def timed(function: Callable[[], object], repeats: int, before: Callable[[], object] = lambda: None) -> float:
    """Return the median of the seconds that `function` takes."""
    seconds = []
    for _ in range(repeats):
        before()
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def write(model: str, folder: Path, repeats: int) -> tuple[Path, float]:
    """Return the checkpoint of a run of `model`, and the seconds that it took."""
    state = state_of(model)
    path = checkpoints.save(folder, 0, state)
    return path, timed(lambda: checkpoints.save(folder, 0, state), repeats)


def measure(model: str, folder: Path, repeats: int) -> dict[str, Any]:
    path, seconds = write(model, folder, repeats)
    size = path.stat().st_size
    found = {
        "write": seconds,
        "raw": timed(lambda: write_raw(size, folder / "raw"), repeats),
        "compare": timed(lambda: integrity.check_archive(path), repeats),
        "digest": timed(lambda: integrity.digest(path), repeats),
        "load": timed(lambda: checkpoints.load(path), repeats),
        "load_cold": timed(lambda: checkpoints.load(path), repeats, before=lambda: forget(path)),
    }
    return {
        "model": model, "gigabytes": round(size / 1e9, 2), "seconds": {name: round(s, 2) for name, s in found.items()},
        "share": round(found["write"] / (60 * MINUTES + found["write"]), 4),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["vit_b_48"])
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; by default the system's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench/results/checkpoints.json"))
    options = parser.parse_args()
    fabric = processes.launch("auto", 1, "32")
    for model in options.models:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found = measure(model, Path(folder), options.repeats)
        print(found, flush=True)
        add({"machine": machine(fabric), **found}, options.out)


if __name__ == "__main__":
    main()
