"""Before the first step: how many images fit in memory at once, and how long one takes."""

import time

import torch
from torch import Tensor, nn

from mirl.data.loading import B
from mirl.errors import UserError
from mirl.models.products import fast_products
from mirl.training.processes import Fabric, as_one, mesh_of, over_processes
from mirl.training.runs import RunFolder
from mirl.training.task import Task, place


def probe(fabric: Fabric, task: Task[B], micro_batch: int, run: RunFolder) -> tuple[int, float]:
    """Find a micro-batch that fits and measure the seconds that an image takes, by forward and backward passes.

    On a GPU the size is halved until it fits; all processes take the smallest found. A CPU keeps the size given.
    """
    gpu, model = fabric.device.type == "cuda", task.model
    place(fabric, task)
    reserve = _reserve(fabric, model) if gpu else []
    size = micro_batch
    with as_one(fabric):
        while (measured := _try(fabric, task, size if gpu else min(size, 16))) is None:
            if size == 1:
                raise UserError("one image does not fit in GPU memory; choose a smaller model or image")
            size //= 2
    del reserve
    if gpu:
        torch.cuda.empty_cache()
    seconds = measured or 0.0
    size = int(over_processes(fabric, torch.tensor(float(size)), "min"))
    if size < micro_batch:
        run.say(f"{micro_batch} images at once do not fit in GPU memory; taking {size}")
    return size, seconds


def _reserve(fabric: Fabric, model: nn.Module) -> list[Tensor]:
    """Take the memory of a GPU that a step needs beside what `_try` computes."""
    # AdamW's two moments. A sharded model has more room: here it is still whole, with whole gradients.
    moments = 2 if mesh_of(fabric) is None else 0
    reserve = [torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in range(moments)]
    if fabric.world_size > 1:  # NCCL's buffers, which it takes at the first exchange
        total = torch.cuda.get_device_properties(fabric.device).total_memory
        reserve.append(torch.empty(total // 20, dtype=torch.uint8, device=fabric.device))
    return reserve


def _try(fabric: Fabric, task: Task[B], images: int) -> float | None:
    """Return the seconds an image takes when so many are computed at once, or None if they do not fit."""
    try:
        example = task.example(images).to(fabric.device)  # drawing it may take longer than a GPU's two passes
        for _ in range(2):  # the first pass warms up
            began = time.monotonic()
            with fast_products(task.model, fabric.device):
                with fabric.autocast():
                    loss = task.loss(task.model, task.prepare(example))["loss"].mean()
                loss.backward()
            loss.item()
        return (time.monotonic() - began) / images
    except torch.OutOfMemoryError:
        return None
    finally:
        task.model.zero_grad()
