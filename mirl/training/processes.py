"""Devices and processes: start them, let them agree, and let signals stop them together. The door to Fabric."""

import atexit
import gc
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from mirl.errors import UserError

__all__ = ["Fabric", "Interrupted", "Precision", "as_one", "best_precision", "from_all", "launch", "over_processes",
           "precision_of", "stop_signals"]  # fmt: skip

Precision = Literal["32", "bf16", "16"]


class Interrupted(KeyboardInterrupt):
    """The run was told to stop and saved its state; `signal_number` says by what."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


def launch(devices: str | int, num_nodes: int, precision: Precision) -> Fabric:
    """Start one process per device and return this one's Fabric."""
    names: dict[Precision, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # the summary says what was chosen
    try:
        # A CPU is one device however many cores it has; several CPU processes are asked for by number.
        count = devices if devices != "auto" or torch.cuda.is_available() else 1
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
        if accelerator == "cpu" and precision == "16":
            raise UserError("--precision 16 needs a GPU; give 32, bf16 or auto")
        fabric = Fabric(accelerator=accelerator, devices=count, num_nodes=num_nodes, precision=names[precision])
        fabric.launch()
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as error:
        raise UserError(
            f"cannot use --devices {devices} --num_nodes {num_nodes}: {str(error).splitlines()[0]}"
        ) from error
    if fabric.world_size > 1 and accelerator == "cpu":
        atexit.unregister(_leave)  # a second training of one script
        atexit.register(_leave)  # for NCCL Fabric does it
    return fabric


def _leave() -> None:
    """End the process group while Python still runs.

    Its threads drop Python's tensors after each collective; one that comes to it late, when the interpreter is already
    going, ends the process with SIGABRT.
    """
    gc.collect()  # a model in a cycle would keep the group
    torch.distributed.destroy_process_group()


def precision_of(choice: Literal["auto"] | Precision) -> Precision:
    """Return what was chosen, or for auto the device's best."""
    return best_precision() if choice == "auto" else choice


def best_precision() -> Precision:
    """Return bf16 where the device multiplies bf16 matrices in hardware, else 32."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "16"
    if not hasattr(torch.cpu, "get_capabilities"):  # PyTorch before 2.12
        return "32"
    cpu = torch.cpu.get_capabilities()
    return "bf16" if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else "32"


@contextmanager
def as_one(fabric: Fabric) -> Iterator[None]:
    """Let a UserError of any process end all: the first process raises it, so that it is said once, the others leave.

    Without it the others would wait for one that stopped.
    """
    mine = ""
    try:
        yield
    except UserError as error:
        mine = str(error)
        if fabric.world_size == 1:
            raise
    if told := next(filter(None, from_all(fabric, mine)), ""):
        if fabric.is_global_zero:
            raise UserError(told)
        raise SystemExit(0)  # another code would make Fabric kill the first process before it has said what is wrong


def from_all(fabric: Fabric, value: Any) -> list[Any]:
    """Collect every process's `value`."""
    values = [value] * fabric.world_size
    if fabric.world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def over_processes(fabric: Fabric, values: Tensor, operation: Literal["mean", "sum", "min", "max"]) -> Tensor:
    """Combine every process's `values`."""
    result = fabric.all_reduce(values.to(fabric.device), reduce_op=operation)
    assert isinstance(result, Tensor)
    return result


@contextmanager
def stop_signals(fabric: Fabric) -> Iterator[Callable[[], int]]:
    """Note SIGINT and SIGTERM instead of dying; yields a function that returns the signal's number, or 0.

    A second signal acts at once. All processes answer alike, so that none waits for one that stopped.
    """
    received = 0
    signals = (signal.SIGINT, signal.SIGTERM)

    def note(number: int, _: FrameType | None) -> None:
        nonlocal received
        received = number
        for s in signals:
            signal.signal(s, previous[s])

    def answer() -> int:
        if fabric.world_size == 1:
            return received
        return int(over_processes(fabric, torch.tensor(float(received)), "max"))

    previous = {s: signal.getsignal(s) for s in signals}
    try:
        for s in signals:
            signal.signal(s, note)
        yield answer
    finally:
        for s in signals:
            signal.signal(s, previous[s])
