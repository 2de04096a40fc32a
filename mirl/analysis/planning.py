"""`mirl plan`: what a pre-training run will take before anything is spent on it: arithmetic, memory, time, price.

Arithmetic and memory are counted. Time is measured where `--gpu here` measures this machine; elsewhere it rests on the
share of the vendor's FLOP/s that a step is assumed to reach, and the plan says so.
"""

from dataclasses import dataclass
from typing import Any

import torch

from mirl.analysis.cost import parameter_count, step_cost
from mirl.analysis.machines import GIB, Machine, assumed_efficiency, gpu_named, this_machine
from mirl.analysis.memory import Memory, step_memory
from mirl.analysis.timing import time_step
from mirl.errors import UserError, plural
from mirl.models.autoencoder import Autoencoder
from mirl.models.encoder import parse_model
from mirl.tasks.settings.planning import HERE, PlanOptions
from mirl.tasks.settings.pretraining import Resolved, autoencoder_of
from mirl.training.processes import Precision, best_precision, launch
from mirl.training.runs import duration

USABLE = 0.9  # of a device's memory: the rest is the context's, the allocator's and the backward pass's own
AT_ONCE, AT_ONCE_ON_CPU, TIMED_ON_CPU = 512, 64, 8  # images: mirl pretrain's first choices, and what is timed
UPDATE_BYTES = 32  # moved for each weight by an update: norm 4, AdamW reads 16 and writes 12


@dataclass(frozen=True)
class Pace:
    """How fast one device trains.

    Attributes:
        machine: the device; micro_batch: images at once on it, 0 if not one fits.
        seconds: of an optimizer step.
        efficiency: share of the machine's FLOP/s that forward and backward passes reach; source: of that figure.
    """

    machine: Machine
    micro_batch: int
    seconds: float
    efficiency: float
    source: str


@dataclass(frozen=True)
class RunPlan:
    """What a run will take.

    Attributes:
        precision: of matrix products; pace: of one device.
        parameters: that are trained; flops: of an image, forward and backward (a multiply-add is two).
        recomputed: share of `flops` that checkpointing adds.
        memory: bytes on each device; fits, fits_checkpointed: images at once, in multiples of 8.
        steps: of the run; hours, device_hours, cost: of all steps.
        images_per_second: that the data must supply, over all devices.
    """

    precision: Precision
    pace: Pace
    parameters: int
    flops: float
    recomputed: float
    memory: Memory
    fits: int
    fits_checkpointed: int
    steps: int
    hours: float
    device_hours: float
    cost: float | None
    images_per_second: float


def plan(**options: Any) -> RunPlan:
    """Print what a pre-training run will take on given GPUs (FLOPs, memory, hours, price), and return it.

    Takes the fields of `mirl.PlanOptions`, e.g. `mirl.plan(model="vit_b_48", epochs=800, gpus=32, gpu="h200")`.

    Raises:
        UserError: on a mistake in the options.
    """
    given = PlanOptions(**options)
    machine = None if given.gpu == HERE else gpu_named(given.gpu)
    precision = _precision(given, machine)
    settings = given.settings(precision)
    with torch.device("meta"):
        model = autoencoder_of(settings)
        step, parameters = step_cost(model, given.mask_ratio), parameter_count(model)
    gpu = machine is not None or torch.cuda.is_available()
    memory = step_memory(model, given.mask_ratio, precision, devices=given.gpus, gpu=gpu)
    flops = 2 * step.forward_and_backward.total
    pace = _reckoned(given, machine, flops, memory, settings) if machine else _measured(given, flops, memory, settings)
    room = USABLE * pace.machine.memory * GIB
    steps = given.images // given.batch_size * given.epochs
    hours = steps * pace.seconds / 3600
    result = RunPlan(
        precision, pace, parameters, flops, 2 * (step.encoder + step.decoders).total / flops, memory,
        memory.fitting(room), memory.fitting(room, checkpointing=True), steps, hours, hours * given.gpus,
        None if given.price is None else hours * given.gpus * given.price, given.batch_size / pace.seconds,
    )  # fmt: skip
    print("\n".join(_lines(given, settings, model, result)))
    return result


def _precision(given: PlanOptions, machine: Machine | None) -> Precision:
    if machine is None:
        return best_precision() if given.precision == "auto" else given.precision
    if given.precision == "bf16" and not machine.bf16:
        raise UserError(f"--precision bf16: {machine.name} has none; give 16, 32 or auto")
    return ("bf16" if machine.bf16 else "16") if given.precision == "auto" else given.precision


def _measured(given: PlanOptions, flops: float, memory: Memory, settings: Resolved) -> Pace:
    """Measure this machine and training steps on it."""
    fabric = launch("auto", 1, settings.precision)
    machine, cpu, share = this_machine(fabric.device, settings.precision), fabric.device.type == "cpu", given.share
    micro_batch = _at_once(memory, machine, min(AT_ONCE_ON_CPU if cpu else AT_ONCE, share))
    timing = time_step(fabric, settings, max(1, min(micro_batch, TIMED_ON_CPU) if cpu else micro_batch))
    words = (
        f"measured here: {plural(timing.blocks[0], 'block')} with all decoders, "
        f"{plural(timing.blocks[1], 'block')} alone, {plural(timing.images, 'image')} at once"
    )
    efficiency = flops / timing.passes / machine.peak(settings.precision)
    return Pace(machine, micro_batch, share * timing.passes + timing.update, efficiency, words)


def _reckoned(given: PlanOptions, machine: Machine, flops: float, memory: Memory, settings: Resolved) -> Pace:
    """Take the vendor's figures, and the share of them that is given or assumed."""
    if given.efficiency is None:
        width = parse_model(given.model)[0]
        efficiency, words = (
            assumed_efficiency(width),
            f"assumed for a width of {width}, not measured on {machine.name};",
        )
        words += "\n               to measure: mirl plan --gpu here on one of them; or give --efficiency"
    else:
        efficiency, words = given.efficiency, "as given by --efficiency"
    seconds = given.share * flops / (machine.peak(settings.precision) * efficiency)
    seconds += UPDATE_BYTES * memory.trained / machine.bandwidth
    return Pace(machine, _at_once(memory, machine, min(AT_ONCE, given.share)), seconds, efficiency, words)


def _at_once(memory: Memory, machine: Machine, most: int) -> int:
    """Return how many images a step computes at once: `most`, halved until they fit, as mirl pretrain does."""
    while most and memory.needed(most) > USABLE * machine.memory * GIB:
        most //= 2
    return most


def _lines(given: PlanOptions, settings: Resolved, model: Autoencoder, p: RunPlan) -> list[str]:
    pace, machine, shape, memory = p.pace, p.pace.machine, model.shape, p.memory
    (height, across), single = settings.image_size, p.precision == "32"
    rate = f"{machine.peak(p.precision) / 1e12:.4g} TFLOP/s in {'float32' if single else p.precision}"
    price = "" if p.cost is None else f"; {p.cost:,.0f} at {given.price:g} an hour"
    at_once = f"{memory.needed(pace.micro_batch) / GIB:.3g} GiB for {plural(pace.micro_batch, 'image')} at once"
    return [
        f"{given.model}: {plural(given.images, 'image')}, {plural(given.epochs, 'epoch')}, batch {given.batch_size}",
        f"machine: {given.gpus} x {machine.name}, each {rate}, {machine.memory:.4g} GiB",
        f"pre-training: {given.method}, {len(model.decoders)} x {plural(shape.depth, 'decoder block')} {shape.width} "
        f"wide, {given.mask_ratio:.0%} masked, {height}x{across} px",
        f"  parameters   {p.parameters / 1e6:.1f} M",
        f"  arithmetic   {p.flops / 1e9:.1f} GFLOP an image, {p.flops * given.batch_size * p.steps:.3g} FLOP in all",
        f"  efficiency   {pace.efficiency:.0%} of these FLOP/s, {pace.source}",
        f"  step         {pace.seconds:.3g} s for {plural(given.share, 'image')} on each device; "
        f"{plural(p.steps, 'step')}",
        f"  run          {duration(p.hours * 3600)} if data keep up, {p.device_hours:,.1f} device-hours{price}",
        f"  data         {_count(p.images_per_second)} images/s in all, {_count(p.images_per_second / given.gpus)} for "
        "each device",
        f"  memory       {memory.needed(0) / GIB:.3g} GiB for weights, gradients and AdamW, {memory.image / 2**20:.3g} "
        f"MiB an image; {at_once if pace.micro_batch else 'not one image fits'}",
        f"  fits         {plural(p.fits, 'image')} at once in {USABLE:.0%} of a device's memory; with --checkpointing "
        f"{p.fits_checkpointed},",
        f"               of {memory.checkpointed / 2**20:.3g} MiB each, for {p.recomputed:.0%} more arithmetic",
    ]


def _count(number: float) -> str:
    """Write a number with three digits or all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
