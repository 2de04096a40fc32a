"""How every command that trains runs: measure, say what was chosen, train, leave what was promised."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from mirl.data.loading import B, StepSampler, Views
from mirl.data.order import ShardOrder
from mirl.data.shards.ahead import fetched_ahead
from mirl.data.workers import Batches
from mirl.errors import UserError, plural
from mirl.reports.page import write_report
from mirl.tasks.options import Machine, ResolvedRun, RunOptions, restarts
from mirl.training import loop, processes
from mirl.training.checkpoints import last_good, saved_steps
from mirl.training.files import fault_of_disk
from mirl.training.probe import probe
from mirl.training.processes import Fabric, from_all, together
from mirl.training.runs import RunFolder, duration
from mirl.training.saving import Progress, restore
from mirl.training.schedules import undecayed_steps
from mirl.training.task import Task

LONG = 24 * 3600  # seconds after which a run deserves a warning
TRAINING, HELD_OUT = 0, 1  # streams of random numbers


class RunnableTask(Task[B]):
    """A task with its data, its optimizer and its results.

    Attributes:
        settings: every choice made; `carry_out` puts in what it measures.
        training, held_out: what it learns from and what it is evaluated on.
        samples: size of the whole data set; a resumed run must find it unchanged.
        held_out_batch: held-out images read at once; None is the micro-batch.
    """

    settings: ResolvedRun
    training: Views
    held_out: Views
    samples: int
    held_out_batch: int | None = None

    @abstractmethod
    def optimizer(self) -> torch.optim.Optimizer:
        """Build the optimizer of the model's parameters."""

    @abstractmethod
    def rate(self, epoch: float) -> float:
        """Return the learning rate after so many epochs."""

    @property
    def extensible(self) -> bool:
        """Whether a longer run can go on from where the rate first decays; a checkpoint of that is kept."""
        return False

    def begin(self, run: RunFolder) -> None:
        """Put into a new run folder what the run starts from."""

    def decide(self, device: torch.device, seconds: float) -> None:
        """Choose what depends on how long the run will take, once that is measured."""

    @abstractmethod
    def summary(self) -> list[str]:
        """Say what was chosen, before the first step."""

    @abstractmethod
    def finish(self, run: RunFolder) -> None:
        """Leave results in the run folder; called in the first process only."""


def train(given: RunOptions, task_for: Callable[[Machine], RunnableTask[B]]) -> Path:
    """Train on the devices that were asked for, and return the run folder.

    Args:
        given: the options; task_for: builds the task for these devices, and makes every choice that depends on them.

    Raises:
        UserError, KeyboardInterrupt: as `carry_out`; a UserError of `task_for` in any process ends all.
    """
    precision = processes.precision_of(given.precision)
    fabric = processes.launch(given.devices, given.num_nodes, precision, given.strategy)
    with processes.as_one(fabric):
        task = task_for({"gpu": fabric.device.type == "cuda", "devices": fabric.world_size, "precision": precision})
        run = RunFolder(
            task.settings.run_folder, resume=given.resume, overwrite=given.overwrite, writes=fabric.is_global_zero
        )
        task.begin(run)
    carry_out(fabric, task, run)
    return run.path


def carry_out(fabric: Fabric, task: RunnableTask[B], run: RunFolder) -> None:
    """Run `task` from its first or its last saved step to the end, and close the run folder.

    Raises:
        UserError: what the loop raises, and a disk that is full or fails.
        KeyboardInterrupt: after SIGINT or SIGTERM, once the state is saved.
    """
    started = False
    try:
        micro_batch, of_image = probe(fabric, task, task.settings.micro_batch, run)
        task.settings = replace(task.settings, micro_batch=micro_batch)
        seconds = of_image * len(task.training) * task.settings.epochs / fabric.world_size
        task.decide(fabric.device, seconds)
        run.write_config(task.settings.saved())
        started = True
        for line in [*task.summary(), *_machine(fabric, task.settings, seconds)]:
            run.say(line)
        with together(fabric.global_rank, fabric.world_size):
            _train(fabric, task, run)
        with task.whole():
            if fabric.is_global_zero:
                task.finish(run)
    except UserError as error:
        if started and fabric.is_global_zero:
            with suppress(OSError):  # that the disk is full may be what is to be said
                run.incident(run.last_step(), "failed", str(error), quiet=True)
        raise
    except (OSError, SafetensorError) as error:
        reason = fault_of_disk(error)
        if not reason:
            raise
        raise UserError(
            f"cannot write to {run.path}: {reason}; {last_good(run.checkpoints)}; free space or permit writing, then "
            "add --resume"
        ) from error
    finally:
        try:
            if started and fabric.is_global_zero and task.settings.report:
                leave_report(run)
        finally:
            run.close()


def leave_report(run: RunFolder) -> None:
    """Write report.html; if it cannot be written, say so: the run itself is whole."""
    try:
        run.say(f"open {write_report(run.path)} to see the run")
    except Exception as error:  # whatever is wrong with a page must not fail days of training
        reason = " ".join(str(error).split()) or type(error).__name__
        run.say(f"report.html could not be written ({reason}); try mirl report {run.path}")


def _machine(fabric: Fabric, settings: ResolvedRun, seconds: float) -> list[str]:
    device = fabric.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    count = f"{fabric.world_size} x " if fabric.world_size > 1 else ""
    shared = ", which share the model" if settings.strategy == "fsdp" else ""
    advice = f"advice: {duration(seconds)} is long; for a first look add --epochs {max(1, settings.epochs // 50)}"
    return [
        f"machine   {count}{name}{shared} · precision {settings.precision} · micro-batch {settings.micro_batch} "
        f"· {plural(settings.workers, 'data worker')}",
        f"run       {settings.out} · about {duration(seconds)} if data keep up",
        *([advice] if seconds > LONG else []),
    ]


def _train(fabric: Fabric, task: RunnableTask[B], run: RunFolder) -> None:
    settings = task.settings
    steps_per_epoch = len(task.training) // settings.batch_size
    steps = steps_per_epoch * settings.epochs
    task.shard(fabric)
    optimizer = task.optimizer()
    # By an earlier start, or by the run that this one extends.
    begun = settings.resume or any(from_all(fabric, saved_steps(run.checkpoints)))
    progress = restore(fabric, run, task, optimizer, task.samples) if begun else Progress()
    run.forget_after(progress.step or -1)  # a run that starts again evaluates again before its first step
    if not progress.step:
        run.record({"kind": "data", "step": 0, "samples": task.samples})
    if progress.step >= steps:
        longer = f"; for a longer one: --resume_from {run.path} --epochs MORE" if task.extensible else ""
        run.say(f"the run is complete ({plural(steps, 'step')}){longer}")
        return
    if progress.step:
        restart = f"restart {count}: " if (count := restarts()) else ""
        run.incident(progress.step, "resumed", f"{restart}resumed at step {progress.step} of {steps}")
    plan = loop.Plan(
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        batch_size=settings.batch_size,
        micro_batches=math.ceil(settings.batch_size / fabric.world_size / settings.micro_batch),
        rate=lambda step: task.rate(step / steps_per_epoch),
        clip_grad=settings.clip_grad,
        evaluate_every=settings.evaluate_epochs * steps_per_epoch,
        checkpoint_seconds=settings.checkpoint_minutes * 60,
        checkpoint_steps=settings.checkpoint_steps or steps,
        undecayed=undecayed_steps(settings.epochs, steps_per_epoch) if task.extensible else None,
        samples=task.samples,
        max_bad=settings.max_bad,
        seed=settings.seed,
        rollback=settings.rollback,
    )
    pin = fabric.device.type == "cuda"

    def told(line: str) -> None:
        run.incident(progress.step, "worker killed", line)

    def training(progress: Progress) -> Iterable[B]:
        sampler = StepSampler(
            len(task.training), settings.batch_size, settings.micro_batch, seed=settings.seed, start=progress.step,
            stop=steps, rank=fabric.global_rank, world_size=fabric.world_size, jumps=progress.jumps,
            shards=ShardOrder.of(task.training.source, task.training.members),
        )  # fmt: skip
        keys = fetched_ahead(sampler, task.training, processes=fabric.world_size)
        return Batches(task.training, keys, workers=settings.workers, pin=pin, told=told)

    mine = list(range(len(task.held_out)))[fabric.global_rank :: fabric.world_size]
    size = task.held_out_batch or settings.micro_batch
    keys = [[(0, i) for i in mine[k : k + size]] for k in range(0, len(mine), size)]
    held_out = Batches(task.held_out, keys, workers=settings.workers, pin=pin, told=told)
    loop.fit(fabric, task, optimizer, run, plan, progress, training, held_out)
