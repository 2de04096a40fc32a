"""Devices and processes: start them, let them agree, and let signals stop them together. The door to Fabric."""

import atexit
import gc
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mirl.errors import UserError
from mirl.training.companions import PATIENCE, meet_again, start_others, together

__all__ = ["Autocast", "Fabric", "Interrupted", "Precision", "Strategy", "as_one", "best_precision", "from_all", "full",
           "launch", "mesh_of", "over_processes", "precision_of", "stop_signals", "together"]  # fmt: skip

Precision = Literal["32", "bf16", "16"]
Strategy = Literal["auto", "ddp", "fsdp"]


class Autocast(MixedPrecision):
    """Mixed precision by autocast alone: it casts what it multiplies.

    Fabric's own casts all that the model is given, too: boxes of over 256 px and pixels would lose their last digits
    before anything is computed with them.
    """

    def convert_input(self, data: Any) -> Any:
        """Return what the model is given as it is."""
        return data


class Replicas(DDPStrategy):
    """A whole model on each device, whose buffers are constants: they need not be exchanged in each step."""

    def setup_module(self, module: nn.Module) -> DistributedDataParallel:
        """Wrap a model that every process has."""
        replica = super().setup_module(module)
        replica.broadcast_buffers = False  # as an argument it has another name from PyTorch 2.15 on
        return replica


class Interrupted(KeyboardInterrupt):
    """The run was told to stop and saved its state; `signal_number` says by what."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


def launch(devices: str | int, num_nodes: int, precision: Precision, strategy: Strategy = "auto") -> Fabric:
    """Start one process per device, unless torchrun or Slurm has, and return this one's Fabric.

    Several devices each have the whole model (ddp, auto) or share its weights, gradients and moments (fsdp).

    Raises:
        UserError: if there are no such devices, or they cannot do what is asked.
    """
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # the summary says what was chosen
    try:
        # A CPU is one device however many cores it has; several CPU processes are asked for by number.
        count = devices if devices != "auto" or torch.cuda.is_available() else 1
        if torch.distributed.is_torchelastic_launched():  # torchrun knows how many it has started
            count = int(os.environ["LOCAL_WORLD_SIZE"]) if devices == "auto" else count
            num_nodes = int(os.environ["GROUP_WORLD_SIZE"]) if num_nodes == 1 else num_nodes
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
        if accelerator == "cpu" and precision == "16":
            raise UserError("--precision 16 needs a GPU; give 32, bf16 or auto")
        asked: dict[str, Any] = {"accelerator": accelerator, "devices": count, "num_nodes": num_nodes}
        if precision != "32":
            asked["plugins"] = Autocast("bf16-mixed" if precision == "bf16" else "16-mixed", accelerator)
        fabric = Fabric(**asked)
        if isinstance(fabric.strategy, DDPStrategy):  # Fabric's own choice for several devices
            chosen = _strategy(strategy, fabric.strategy.num_processes * num_nodes, precision)
            fabric = Fabric(strategy=chosen, **asked)
        elif strategy == "fsdp":
            raise UserError("--strategy fsdp shares a model among several devices, and there is one; leave it out")
        _complete(fabric, num_nodes)
        meet_again("nccl" if accelerator == "cuda" else "gloo")
        fabric.launch()
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as error:
        raise UserError(
            f"cannot use --devices {devices} --num_nodes {num_nodes}: {str(error).splitlines()[0]}"
        ) from error
    if fabric.world_size > 1:
        atexit.unregister(_leave)  # a second training of one script
        atexit.register(_leave)
    return fabric


def _strategy(choice: Strategy, processes: int, precision: Precision) -> DDPStrategy | ModelParallelStrategy:
    if choice == "fsdp":
        if precision == "16":
            raise UserError("--strategy fsdp knows no loss scale for fp16; give --precision bf16 or 32")
        # The model is sharded before its optimizer is built (training/sharded.py): Fabric finds it ready.
        return ModelParallelStrategy(
            lambda model, _: model, data_parallel_size=processes, tensor_parallel_size=1, timeout=PATIENCE
        )
    # Gradients live in the buckets that are exchanged.
    return Replicas(timeout=PATIENCE, gradient_as_bucket_view=True)


def mesh_of(fabric: Fabric) -> DeviceMesh | None:
    """Return the devices that share the model, or None if each has the whole."""
    strategy = fabric.strategy
    return strategy.device_mesh["data_parallel"] if isinstance(strategy, ModelParallelStrategy) else None


def full(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be sharded; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _complete(fabric: Fabric, num_nodes: int) -> None:
    """Start this machine's other processes where no launcher has done it.

    Fabric would, too; but when one of them dies it kills the first before that can say what happened.
    """
    strategy = fabric.strategy
    if not isinstance(strategy, ParallelStrategy):
        return
    environment = strategy.cluster_environment
    assert environment is not None
    if not environment.creates_processes_externally:
        start_others(
            len(strategy.parallel_devices or ()), num_nodes, environment.node_rank(), environment.main_address,
            environment.main_port,
        )  # fmt: skip


def _leave() -> None:
    """End the process group while Python still runs.

    Its threads drop Python's tensors after each collective; one that comes to it late, when the interpreter is already
    going, ends the process with SIGABRT.
    """
    gc.collect()  # a model in a cycle would keep the group
    if torch.distributed.is_initialized():
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
    with together(fabric.global_rank, fabric.world_size):
        told = next(filter(None, from_all(fabric, mine)), "")
    if told:
        if fabric.is_global_zero:
            raise UserError(told)
        raise SystemExit(0)  # at another code a launcher kills the first process before it has said what is wrong


def from_all(fabric: Fabric, value: Any) -> list[Any]:
    """Collect every process's `value`."""
    values = [value] * fabric.world_size
    if fabric.world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def over_processes(fabric: Fabric, values: Tensor, operation: Literal["mean", "sum", "min", "max"]) -> Tensor:
    """Combine every process's `values`, on this one's device."""
    result = values.to(fabric.device, copy=True)
    if fabric.world_size > 1:  # by one collective: Fabric's has a barrier before it
        name = "sum" if operation == "mean" else operation  # gloo knows no mean
        torch.distributed.all_reduce(result, getattr(torch.distributed.ReduceOp, name.upper()))
    return result / fabric.world_size if operation == "mean" else result


@contextmanager
def stop_signals(fabric: Fabric) -> Iterator[Callable[[bool], tuple[int, bool]]]:
    """Note SIGINT and SIGTERM instead of dying; a second signal acts at once.

    Yields a function that is told whether this process has reason to save, and returns the number of a signal, or 0,
    and whether any process has such reason. All processes answer alike, so that none waits for one that stopped.
    """
    received = 0
    signals = (signal.SIGINT, signal.SIGTERM)

    def note(number: int, _: FrameType | None) -> None:
        nonlocal received
        received = number
        for s in signals:
            signal.signal(s, previous[s])

    def answer(late: bool) -> tuple[int, bool]:
        if fabric.world_size == 1:
            return received, late
        signal_number, any_late = over_processes(fabric, torch.tensor([received, late]), "max").tolist()
        return signal_number, bool(any_late)

    previous = {s: signal.getsignal(s) for s in signals}
    try:
        for s in signals:
            signal.signal(s, note)
        yield answer
    finally:
        for s in signals:
            signal.signal(s, previous[s])
