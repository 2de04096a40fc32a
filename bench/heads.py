"""What a training step of a detector or a segmenter takes: seconds and memory, for any model at the protocol's size.

    python bench/heads.py --command detect --model vit_b_48 --images 2 --checkpointing
    python bench/heads.py --command segment --model vit_b_48 --images 2 --checkpointing

A step is the loop's own on images as large as training has them: forward, backward, gradient norm, AdamW. Weights are
random, because neither time nor memory depends on them. Detectors have COCO's 80 classes, segmenters ADE20K's 150.
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

import numpy as np
import torch
from recording import add, machine

from mirl.data.instances import Category, InstanceSplit, ShapeInstances
from mirl.data.semantic import SemanticClass, SemanticSplit, ShapesSemantic
from mirl.data.shapes import Shapes
from mirl.models.encoder import ARCHITECTURE, build_encoder, parse_model, timm_arguments
from mirl.models.weights import Weights
from mirl.tasks.detection import DetectTask
from mirl.tasks.run import RunnableTask
from mirl.tasks.segmentation import SegmentTask
from mirl.tasks.settings.detection import PROTOCOLS, Detection, resolve_detection
from mirl.tasks.settings.segmentation import SIDE, Segmentation, resolve_segmentation
from mirl.training import processes
from mirl.training.runs import RunFolder
from mirl.training.steps import Accumulator
from mirl.training.task import place

IMAGES = 100  # of the data that a task asks for; a step sees none of them


class ManyObjects(ShapeInstances):
    """As many classes as COCO has."""

    categories = tuple(Category(number, f"class {number}") for number in range(1, 81))


class ManyClasses(ShapesSemantic):
    """As many classes as ADE20K has."""

    classes = tuple(SemanticClass(value, f"class {value}") for value in range(1, 151))


def weights_of(model: str) -> Weights:
    """Return random weights of an encoder for 224 px in patches of 16."""
    width, heads, depth = parse_model(model)
    state = build_encoder(width, heads, depth, (224, 224), (16, 16), 3).state_dict()
    arguments = timm_arguments(width, heads, depth, (224, 224), (16, 16), 3)
    return Weights(ARCHITECTURE, arguments, state, (0.5,) * 3, (0.5,) * 3)


def detector_task(options: argparse.Namespace, gpu: bool) -> DetectTask:
    """Return the task that `mirl detect` would run."""
    weights = weights_of(options.model)
    given = Detection(
        weights=options.model, data="shapes", protocol=options.protocol, batch_size=options.images,
        image_size=options.image_size or PROTOCOLS[options.protocol].image_size, width=256, regions=512,
        checkpointing=options.checkpointing,
    )  # fmt: skip
    settings = resolve_detection(
        given, images=IMAGES, shorter_side=480, depth=weights.depth, patch_size=16, gpu=gpu, devices=1,
        precision=options.precision,
    )  # fmt: skip
    split = InstanceSplit(ManyObjects(Shapes(IMAGES)), np.arange(IMAGES))
    return DetectTask(settings, weights, split, split)


def segmenter_task(options: argparse.Namespace, gpu: bool) -> SegmentTask:
    """Return the task that `mirl segment` would run."""
    weights, side = weights_of(options.model), options.image_size or SIDE
    width = weights.arguments["embed_dim"]
    given = Segmentation(
        weights=options.model, data="shapes", batch_size=options.images, image_size=side, crop_size=side, width=width,
        relative_positions=options.relative_positions, checkpointing=options.checkpointing,
    )  # fmt: skip
    settings = resolve_segmentation(
        given, images=IMAGES, shorter_side=side, depth=weights.depth, width=width, patch_size=16, gpu=gpu, devices=1,
        precision=options.precision,
    )  # fmt: skip
    split = SemanticSplit(ManyClasses(Shapes(IMAGES)), np.arange(IMAGES))
    return SegmentTask(settings, weights, split, split)


def peak_memory(device: torch.device) -> float:
    """Return GiB: on a GPU what tensors took at most, else what the process did."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def timed(fabric: processes.Fabric, task: RunnableTask[Any], batch: Any, repeats: int) -> list[float]:
    """Return the seconds of each of so many steps on a batch, after one that warms up."""
    place(fabric, task)
    model, optimizer = fabric.setup(task.model, task.optimizer())
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder, "run"), resume=False, overwrite=False)
        accumulator = Accumulator(fabric, task, model, optimizer, None, run)
        for number in range(repeats + 1):
            began = time.perf_counter()
            step = accumulator.step([batch], (0, number), number=number)  # its means are read, so it is finished
            assert step.finite, step
            seconds.append(time.perf_counter() - began)
            print(f"step {number}: {seconds[-1]:.2f} s, {peak_memory(fabric.device):.1f} GiB at most", flush=True)
        run.close()
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--command", default="detect", choices=["detect", "segment"])
    parser.add_argument("--model", default="vit_b_48")
    parser.add_argument("--protocol", default="coco_1x", choices=list(PROTOCOLS), help="of detect")
    parser.add_argument("--relative_positions", action="store_true", help="of segment")
    parser.add_argument("--image_size", type=int, help="shorter side for detect, the crop's for segment")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--precision", default="bf16", choices=["32", "bf16", "16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench/results/heads.json"))
    options = parser.parse_args()
    fabric = processes.launch("auto", 1, options.precision)
    task: RunnableTask[Any]
    if options.command == "detect":
        task, own = detector_task(options, fabric.device.type == "cuda"), "protocol"
    else:
        task, own = segmenter_task(options, fabric.device.type == "cuda"), "relative_positions"
    batch = task.example(options.images)
    seconds = timed(fabric, task, batch, options.repeats)
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]), "trains": options.command, "model": options.model,
        own: vars(options)[own], "image": list(batch.images.shape[-2:]), "images": options.images,
        "checkpointing": options.checkpointing, "precision": options.precision, "seconds": round(median(seconds), 3),
        "gib": round(peak_memory(fabric.device), 2), "parameters": sum(p.numel() for p in task.model.parameters()),
        **machine(fabric),
    }  # fmt: skip
    add(result, options.out)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
