"""What a training step of a detector takes: seconds and memory, for any model and protocol at the protocol's size.

    python bench/detection.py --model vit_b_48 --images 2 --checkpointing

A step is the loop's own on images as large as training has them: forward, backward, gradient norm, AdamW. Weights are
random, because neither time nor memory depends on them.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from objectives import machine

from mirl.data.instances import open_instances
from mirl.models.encoder import ARCHITECTURE, build_encoder, parse_model, timm_arguments
from mirl.models.weights import Weights
from mirl.tasks.detection import DetectTask
from mirl.tasks.settings.detection import PROTOCOLS, Detection, resolve_detection
from mirl.training import processes
from mirl.training.runs import RunFolder
from mirl.training.steps import Accumulator


def weights_of(model: str) -> Weights:
    """Return random weights of an encoder for 224 px in patches of 16."""
    width, heads, depth = parse_model(model)
    state = build_encoder(width, heads, depth, (224, 224), (16, 16), 3).state_dict()
    arguments = timm_arguments(width, heads, depth, (224, 224), (16, 16), 3)
    return Weights(ARCHITECTURE, arguments, state, (0.5,) * 3, (0.5,) * 3)


def task_of(options: argparse.Namespace, gpu: bool) -> DetectTask:
    """Return the task that `mirl detect` would run, for 80 classes of which the built-in images' are the first."""
    weights = weights_of(options.model)
    given = Detection(
        weights=options.model, data="shapes:100", protocol=options.protocol, batch_size=options.images,
        image_size=options.image_size or PROTOCOLS[options.protocol].image_size, width=256, regions=512,
        checkpointing=options.checkpointing,
    )  # fmt: skip
    settings = resolve_detection(
        given, images=100, shorter_side=480, depth=weights.depth, patch_size=16, gpu=gpu, devices=1,
        precision=options.precision,
    )  # fmt: skip
    return DetectTask(settings, weights, *open_instances(given.data))


def peak_memory(device: torch.device) -> float:
    """Return GiB: on a GPU what tensors took at most, else what the process did."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_b_48")
    parser.add_argument("--protocol", default="coco_1x", choices=list(PROTOCOLS))
    parser.add_argument("--image_size", type=int)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--precision", default="bf16", choices=["32", "bf16", "16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench/results/detection.json"))
    options = parser.parse_args()
    fabric = processes.launch("auto", 1, options.precision)
    task = task_of(options, fabric.device.type == "cuda")
    task.to(fabric.device)
    model, optimizer = fabric.setup(task.model, task.optimizer())
    batch, seconds = task.example(options.images), []
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder, "run"), resume=False, overwrite=False)
        accumulator = Accumulator(fabric, task, model, optimizer, None, run)
        for number in range(options.repeats + 1):  # the first warms up
            began = time.perf_counter()
            step = accumulator.step([batch], (0, number), number=number)  # its means are read, so it is finished
            assert step.finite, step
            seconds.append(time.perf_counter() - began)
            print(f"step {number}: {seconds[-1]:.2f} s, {peak_memory(fabric.device):.1f} GiB at most", flush=True)
        run.close()
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]), "model": options.model, "protocol": options.protocol,
        "image": list(batch.images.shape[-2:]), "images": options.images, "checkpointing": options.checkpointing,
        "precision": options.precision, "seconds": round(median(seconds[1:]), 3),
        "gib": round(peak_memory(fabric.device), 2), "parameters": sum(p.numel() for p in task.model.parameters()),
        **machine(fabric),
    }  # fmt: skip
    known = json.loads(options.out.read_text()) if options.out.exists() else []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps([*known, result], indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
