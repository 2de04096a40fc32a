"""What objectives beside the pixels cost: seconds of whole training steps, relative to pixels alone.

    python bench/objectives.py --batch 8 --repeats 7

A step is the loop's own: forward, backward, gradient norm, AdamW, the teacher's average. The cases take turns, and each
is compared with the pixels' step of its own turn, so that a busy machine slows all alike. VGG's weights are random,
because time does not depend on them. Paper: Table 2a, ViT-B (1.8x with features, 2.5x with VGG, of all images).
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from recording import machine
from torchvision.models import vgg16

from mirl.data.sources import open_source
from mirl.tasks.pretrain import PretrainTask, split_off_held_out
from mirl.tasks.settings.pretraining import Resolved
from mirl.training import processes
from mirl.training.runs import RunFolder
from mirl.training.steps import Accumulator
from mirl.training.task import place

SETTINGS = {
    "data": "shapes:100", "image_size": (224, 224), "patch_size": (16, 16), "segments": 2, "block_figures": False,
    "warmup_epochs": 0,
}  # fmt: skip
PAPER = {"pixel": 1.0, "pixel+feature": 1.8, "pixel+vgg": 2.5}


class Trainer:
    """A model with its optimizer, whose steps are timed."""

    def __init__(self, fabric: processes.Fabric, run: RunFolder, batch: int, **options: Any) -> None:
        settings = Resolved(**SETTINGS, batch_size=batch, **options)
        source = open_source(settings.data)
        self.fabric, self.task = fabric, PretrainTask(settings, source, *split_off_held_out(len(source)))
        place(fabric, self.task)
        model, optimizer = fabric.setup(self.task.model, self.task.optimizer())
        self.accumulator = Accumulator(fabric, self.task, model, optimizer, None, run)
        self.batch, self.steps = self.task.example(batch), 0

    def step(self, share: float) -> float:
        """Return the seconds of a step whose objectives look at `share` of the batch."""
        self.task.settings = replace(self.task.settings, extra_share=share)
        self._wait()
        began = time.perf_counter()
        taken = self.accumulator.step([self.batch], (0, self.steps), number=self.steps)
        self.task.follow(self.steps)
        self._wait()
        assert taken.finite, taken
        self.steps += 1
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.fabric.device.type == "cuda":
            torch.cuda.synchronize()


def write_vgg(path: Path) -> str:
    """Write random weights of a VGG16's features."""
    features = vgg16(weights=None).features
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, path)
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_b_12")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", default="bf16", choices=["32", "bf16", "16"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.5])
    parser.add_argument("--out", type=Path, default=Path("bench/results/objectives.json"))
    options = parser.parse_args()
    fabric = processes.launch("auto", 1, options.precision)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder, "run"), resume=False, overwrite=False)
        objectives = {
            "pixel": {}, "pixel+feature": {"feature": "ema"}, "pixel+vgg": {"vgg": write_vgg(Path(folder, "vgg.pth"))}
        }  # fmt: skip
        trainers = {
            name: Trainer(fabric, run, options.batch, model=options.model, precision=options.precision, **objective)
            for name, objective in objectives.items()
        }
        cases = [("pixel", 1.0), *((name, share) for name in list(objectives)[1:] for share in options.shares)]
        seconds: dict[tuple[str, float], list[float]] = {case: [] for case in cases}
        for turn in range(options.repeats + 1):  # the first warms up
            for name, share in cases:
                taken = trainers[name].step(share)
                if turn:
                    seconds[name, share].append(taken)
                    print(f"turn {turn}: {name}, share {share:g}: {taken:.2f} s", flush=True)
        run.close()
    results = [
        {
            "objectives": name, "share": share, "seconds": round(median(taken), 3),
            "ratio": round(median(a / b for a, b in zip(taken, seconds["pixel", 1.0], strict=True)), 2),
            "paper": PAPER[name], "all_seconds": [round(each, 3) for each in taken],
        }
        for (name, share), taken in seconds.items()
    ]  # fmt: skip
    for row in results:
        print(f"{row['objectives']:15} share {row['share']:<4g} {row['ratio']:.2f}x (the paper: {row['paper']:g}x)")
    about = {"command": " ".join(["python", *sys.argv]), "machine": machine(fabric)}
    chosen = {"model": options.model, "batch": options.batch, "precision": options.precision}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**about, **chosen, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
