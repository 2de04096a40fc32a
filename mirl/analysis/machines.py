"""What a machine could do at best: accelerators by their vendors' figures, and the machine here by measuring it."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from mirl.errors import UserError
from mirl.tasks.settings.planning import HERE
from mirl.training.processes import Precision

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """A device.

    Attributes:
        half, single: FLOP/s of dense matrix products in 16 bits (summed in float32) and in float32.
        bandwidth: of its memory, bytes/s.
        memory: GiB that a process sees, which are fewer than the vendor's GB.
        bf16: whether 16 bits may be bfloat16.
    """

    name: str
    half: float
    single: float
    bandwidth: float
    memory: float
    bf16: bool = True

    def peak(self, precision: Precision) -> float:
        """Return the FLOP/s of matrix products in this precision."""
        return self.single if precision == "32" else self.half


# As the vendors state them, not yet checked against data sheets: dense products at boost clock, SXM forms.
GPUS = {
    machine.name: machine
    for machine in (
        Machine("b200", 2250e12, 75e12, 7.7e12, 178),
        Machine("h200", 989.5e12, 67e12, 4.8e12, 139.7),
        Machine("h100", 989.5e12, 67e12, 3.35e12, 79.1),
        Machine("a100", 312e12, 19.5e12, 2.04e12, 79.2),
        Machine("a100-40", 312e12, 19.5e12, 1.56e12, 39.4),
        Machine("l40s", 362e12, 91.6e12, 0.864e12, 44.4),
        Machine("rtx4090", 165.2e12, 82.6e12, 1.01e12, 23.5),
        Machine("v100", 125e12, 15.7e12, 0.9e12, 31.7, bf16=False),
    )
}


def gpu_named(name: str) -> Machine:
    """Look up an accelerator.

    Raises:
        UserError: if it is not in the table.
    """
    if name.lower() not in GPUS:
        raise UserError(f"--gpu {name} is not known; give one of {', '.join(GPUS)}, or {HERE} to measure this machine")
    return GPUS[name.lower()]


def assumed_efficiency(width: int) -> float:
    """Return the share of the vendor's FLOP/s that a pre-training step is assumed to reach.

    A rule, not a measurement: wider matrices keep a GPU busier, and half of its peak is about what training code
    without hand-written kernels comes to at best. 17 % for a width of 192, 25 % for 384, 33 % for 768, 36 % for 1024.
    """
    return 0.5 * width / (width + 384)


def this_machine(device: torch.device, precision: Precision) -> Machine:
    """Measure the machine's products of large square matrices and the bandwidth of its memory."""
    gpu = device.type == "cuda"
    if gpu:
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = f"this CPU, {torch.get_num_threads()} threads", _ram()
    half = {"bf16": torch.bfloat16, "16": torch.float16}.get(precision, torch.float32)
    side = 8192 if gpu else 1024
    one, other = (torch.randn(side, side, device=device).to(half) for _ in range(2))
    flops = 2 * side**3 / _seconds(lambda: one @ other, gpu)
    source = torch.ones(2**28 if gpu else 2**24, device=device)  # floats
    target = torch.empty_like(source)
    bandwidth = 8 * len(source) / _seconds(lambda: target.copy_(source), gpu)
    return Machine(name, flops, flops, bandwidth, memory / GIB, precision != "16")


def _seconds(run: Callable[[], object], gpu: bool) -> float:
    times = []
    for _ in range(6):
        began = time.perf_counter()
        run()
        if gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return median(times[1:])  # the first warms up


def _ram() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
