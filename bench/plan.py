"""How far `mirl plan --gpu here` is from real steps, and its count of memory from what a process takes.

    python bench/plan.py --models vit_s_54 vit_b_24 --batches 8 32 --turns 3

Real steps are the loop's own with the whole model: forward, backward, gradient norm, AdamW. In every turn they and the
plan's measurement of shallow models follow each other, and are compared with each other, because other work slows both.
On a CPU the seconds are the processor's, from which what waits for others is left out; wall seconds stand beside them.
Memory is compared once, at the first forward pass: by how much the process grows, and what is counted.
"""

import argparse
import ctypes
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from recording import machine

from mirl.analysis.memory import step_memory
from mirl.analysis.planning import TIMED_ON_CPU
from mirl.analysis.timing import time_step
from mirl.data.sources import open_source
from mirl.tasks.pretrain import PretrainTask, split_off_held_out
from mirl.tasks.settings.planning import PlanOptions
from mirl.tasks.settings.pretraining import Resolved, autoencoder_of
from mirl.training import processes
from mirl.training.runs import RunFolder
from mirl.training.steps import Accumulator
from mirl.training.task import place

MIB = 2**20


class Real:
    """The whole model, whose steps are the loop's."""

    def __init__(self, fabric: processes.Fabric, run: RunFolder, settings: Resolved) -> None:
        source = open_source(settings.data)
        self.fabric, self.task = fabric, PretrainTask(settings, source, *split_off_held_out(len(source)))
        place(fabric, self.task)
        model, optimizer = fabric.setup(self.task.model, self.task.optimizer())
        self.accumulator, self.steps = Accumulator(fabric, self.task, model, optimizer, None, run), 0

    def seconds(self, images: int) -> tuple[float, float]:
        """Return the seconds of a step, by the bench's clock and on the wall."""
        batch = self.task.example(images)
        began, wall = self._now(), time.perf_counter()
        assert self.accumulator.step([batch], (0, self.steps), number=self.steps).finite
        self.steps += 1
        return self._now() - began, time.perf_counter() - wall

    def growth(self, images: int) -> float:
        """Return by how many MiB the process grows in a forward pass whose graph is kept."""
        batch = self.task.example(images)
        ctypes.CDLL(None).malloc_trim(0)  # what earlier work has freed would be used again
        before = resident()
        with self.fabric.autocast():
            values = self.task.loss(self.task.model, batch)
        grown = resident() - before
        del values
        return grown / MIB

    def _now(self) -> float:
        if self.fabric.device.type == "cuda":
            torch.cuda.synchronize()
        return clock_of(self.fabric)()


def clock_of(fabric: processes.Fabric) -> Callable[[], float]:
    """Return a clock of the processor on a CPU, of the wall on a GPU."""
    return time.perf_counter if fabric.device.type == "cuda" else time.process_time


def resident() -> int:
    """Return the bytes of memory that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def compare(fabric: processes.Fabric, run: RunFolder, model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure and plan a model's steps in turns."""
    settings = PlanOptions(model=model, batch_size=max(options.batches)).settings(options.precision)
    with torch.device("meta"):
        empty = autoencoder_of(settings)
    gpu = fabric.device.type == "cuda"
    counted = step_memory(empty, settings.mask_ratio, options.precision, gpu=gpu)
    real, images = Real(fabric, run, settings), min(options.batches)
    grown, expected = real.growth(images), (counted.copies + images * counted.image) / MIB
    print(f"{model}: a forward pass of {images} images takes {grown:.0f} MiB, counted {expected:.0f}", flush=True)
    real.seconds(images)
    pairs: dict[int, list[tuple[float, float, float]]] = {batch: [] for batch in options.batches}
    for _ in range(options.turns):
        taken = {batch: real.seconds(batch) for batch in options.batches}
        timing = time_step(fabric, settings, TIMED_ON_CPU, clock_of(fabric))
        for batch, (seconds, wall) in taken.items():
            planned = batch * timing.passes + timing.update
            pairs[batch].append((planned, seconds, wall))
            print(f"{model}, batch {batch}: {seconds:.2f} s, planned {planned:.2f} s, {timing}", flush=True)
    return [
        {
            "model": model, "batch": batch, "seconds": round(median(b for _, b, _ in both), 3),
            "planned": round(median(a for a, _, _ in both), 3), "ratio": round(median(a / b for a, b, _ in both), 3),
            "ratios": [round(a / b, 3) for a, b, _ in both],
            "all_seconds": [round(b, 3) for _, b, _ in both], "all_planned": [round(a, 3) for a, _, _ in both],
            "all_wall_seconds": [round(wall, 3) for *_, wall in both],
            "memory_mib": {"images": images, "grown": round(grown), "counted": round(expected)},
        }
        for batch, both in pairs.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit_s_54", "vit_b_24"])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--precision", default="bf16", choices=["32", "bf16", "16"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench/results/plan.json"))
    options = parser.parse_args()
    fabric = processes.launch("auto", 1, options.precision)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder, "run"), resume=False, overwrite=False)
        results = [row for model in options.models for row in compare(fabric, run, model, options)]
        run.close()
    for row in results:
        print(f"{row['model']}, batch {row['batch']}: planned {row['ratio']:.2f} of what was measured")
    about = {"command": " ".join(["python", *sys.argv]), "machine": machine(fabric), "precision": options.precision}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
