"""The training loop, the only one.

A task brings a model, a loss over batches and pictures; the loop brings accumulation, skipped steps, out-of-memory,
checkpoints, evaluations and records. A step reads from top to bottom in `fit`.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mirl.data.loading import Batch
from mirl.errors import UserError
from mirl.training import checkpoints
from mirl.training.monitors import Monitor
from mirl.training.pictures import draw_curves
from mirl.training.processes import Fabric, Interrupted, as_one, from_all, over_processes, stop_signals
from mirl.training.runs import RunFolder

MAX_SKIPPED = 5  # non-finite steps in a row before the run stops
MAX_SKIPPED_FP16 = 25  # the loss scale starts at 2^16 and halves at each overflow


class Task(Protocol):
    """What a command trains."""

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return per-image values [b]: `loss`, which is minimised, and whatever else should be recorded."""

    def draw(self, run: RunFolder, step: int, epoch: float) -> None:
        """Write pictures after an evaluation; called in the first process only."""

    def example(self, size: int) -> Batch:
        """Return a batch of `size` meaningless images, to measure memory and time with."""

    def names(self, batch: Batch) -> list[str]:
        """Name the batch's images."""


@dataclass(frozen=True)
class Plan:
    """How long and how to train.

    Args:
        steps: optimizer steps of the whole run; batch_size: images in each, over all processes.
        micro_batches: batches that each process reads for one step.
        rate: maps the number of finished steps to the learning rate.
        clip_grad: largest gradient norm, or None.
        evaluate_every: steps; checkpoint_seconds: time between checkpoints.
        samples, max_bad: size of the data set, and the share of unusable files that stops the run.
    """

    steps: int
    steps_per_epoch: int
    batch_size: int
    micro_batches: int
    rate: Callable[[int], float]
    clip_grad: float | None
    evaluate_every: int
    checkpoint_seconds: float
    samples: int
    max_bad: float


@dataclass
class Progress:
    """What a resumed run must know besides weights: finished steps, steps skipped, unusable files by name."""

    step: int = 0
    skipped: int = 0
    bad: dict[str, str] = field(default_factory=dict)


def probe(fabric: Fabric, task: Task, model: nn.Module, micro_batch: int, run: RunFolder) -> tuple[int, float]:
    """Find a micro-batch that fits and measure the seconds that an image takes, by forward and backward passes.

    On a GPU the size is halved until it fits; all processes take the smallest found. A CPU keeps the size given.
    """
    gpu = fabric.device.type == "cuda"
    model.to(fabric.device)
    size = micro_batch
    while True:
        images = size if gpu else min(size, 16)
        try:
            for _ in range(2):  # the first pass warms up
                began = time.monotonic()
                with fabric.autocast():
                    loss = task.loss(model, task.example(images).to(fabric.device))["loss"].mean()
                loss.backward()
                loss.item()
            break
        except torch.OutOfMemoryError as error:
            if size == 1:
                raise UserError("one image does not fit in GPU memory; choose a smaller model or image") from error
            size //= 2
        finally:
            model.zero_grad()
    if gpu:
        torch.cuda.empty_cache()
    seconds = (time.monotonic() - began) / images
    size = int(over_processes(fabric, torch.tensor(float(size)), "min"))
    if size < micro_batch:
        run.say(f"{micro_batch} images at once do not fit in GPU memory; taking {size}")
    return size, seconds


def save(
    fabric: Fabric, run: RunFolder, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write a checkpoint from the first process."""
    with as_one(fabric):
        if fabric.is_global_zero:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "precision": fabric.strategy.precision.state_dict(),
                "skipped": progress.skipped,
                "bad": progress.bad,
            }
            checkpoints.save(run.checkpoints, progress.step, state)


def restore(fabric: Fabric, run: RunFolder, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Load the newest readable checkpoint into model and optimizer; without one, start at step 0.

    Raises:
        UserError: if the checkpoint is of another model.
    """
    with as_one(fabric):
        state = checkpoints.load_newest(run.checkpoints, run.say)
        if state is None:
            run.say("no checkpoint was written yet; starting at step 0")
            return Progress()
        try:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"the checkpoint of step {state['step']} in {run.checkpoints} is of another model "
                f"({' '.join(str(error).split())[:160]}); give the --model and sizes it was made with, or another --out"
            ) from error
    fabric.strategy.precision.load_state_dict(state["precision"])
    return Progress(state["step"], state["skipped"], state["bad"])


def fit(
    fabric: Fabric, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, run: RunFolder, plan: Plan,
    progress: Progress, training: Iterable[Batch], held_out: Iterable[Batch],
) -> dict[str, float]:  # fmt: skip
    """Train from `progress.step` to `plan.steps`; return the last evaluation's values.

    Raises:
        Interrupted: after SIGINT or SIGTERM, once the checkpoint is written.
        UserError: too many unusable files or non-finite steps, disk full, out of memory beyond remedy.
    """
    plain = model
    model, optimizer = fabric.setup(model, optimizer)
    accumulator = Accumulator(fabric, task, model, optimizer, plan, run)
    batches = iter(training)
    saved_at = time.monotonic()
    start, in_a_row, values = progress.step, 0, dict[str, float]()
    monitor = Monitor(run, start=start, steps=plan.steps, steps_per_epoch=plan.steps_per_epoch, images=plan.batch_size)
    with stop_signals(fabric) as stop_requested, monitor:
        if start == 0:
            values = evaluate(fabric, task, plain, held_out, run, monitor, progress, plan)
        while progress.step < plan.steps:
            began = time.monotonic()
            chunks = [next(batches) for _ in range(plan.micro_batches)]
            waited = time.monotonic() - began
            rate = plan.rate(progress.step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            means, norm = accumulator.step(chunks)
            finite = is_finite(means, norm)
            progress.step += 1
            in_a_row = 0 if finite else in_a_row + 1
            if not finite:
                progress.skipped += 1
                culprits = [name for names in from_all(fabric, accumulator.culprits(chunks)) for name in names]
                with as_one(fabric):
                    report_skipped(fabric, run, progress, culprits, in_a_row)
            report_bad(run, plan, progress, (file for chunk in chunks for file in chunk.bad))
            row = {"kind": "train", "step": progress.step, "epoch": progress.step / plan.steps_per_epoch, **means}
            seconds = time.monotonic() - began
            row |= {"lr": rate, "grad_norm": norm, "seconds": seconds, "data_wait": waited}
            row["images_per_second"] = plan.batch_size / seconds
            run.record(row)
            monitor.step(row)
            if progress.step % plan.evaluate_every == 0 or progress.step == plan.steps:
                values = evaluate(fabric, task, plain, held_out, run, monitor, progress, plan)
            signal_number = stop_requested()
            due = fabric.broadcast(time.monotonic() - saved_at > plan.checkpoint_seconds)
            if due or signal_number or progress.step == plan.steps:
                save(fabric, run, plain, optimizer, progress)
                saved_at = time.monotonic()
            if signal_number and progress.step < plan.steps:
                run.say(f"stopped at step {progress.step} of {plan.steps}, saved; go on with --out {run.path} --resume")
                raise Interrupted(signal_number)
    return values


class Accumulator:
    """Gradients of a step over its micro-batches; computes smaller pieces at once when a GPU's memory is short."""

    def __init__(
        self, fabric: Fabric, task: Task, model: Any, optimizer: torch.optim.Optimizer, plan: Plan, run: RunFolder
    ) -> None:
        self.fabric, self.task, self.model, self.optimizer, self.run = fabric, task, model, optimizer, run
        self.clip = plan.clip_grad or math.inf
        self.piece = 0  # images computed at once; 0: whole micro-batches

    def step(self, chunks: list[Batch]) -> tuple[dict[str, float], float]:
        """Do one optimizer step; return the mean of each recorded value and the gradient norm before clipping."""
        while True:
            try:
                means = self._gradients(chunks)
                break
            except torch.OutOfMemoryError as error:
                self._halve(len(chunks[0]), error)
        total = self.fabric.clip_gradients(self.model, self.optimizer, max_norm=self.clip, error_if_nonfinite=False)
        assert total is not None
        norm = float(total)
        # The fp16 loss scaler must see an overflow to lower its scale; it skips the update itself.
        if is_finite(means, norm) or self.fabric.strategy.precision.state_dict():
            self.optimizer.step()
        self.optimizer.zero_grad()
        return means, norm

    def _gradients(self, chunks: list[Batch]) -> dict[str, float]:
        images = sum(len(chunk) for chunk in chunks)
        pieces = [piece for chunk in chunks for piece in chunk.pieces(self.piece or len(chunk))]
        sums: dict[str, Tensor] = {}
        for number, piece in enumerate(pieces, start=1):
            with self.fabric.no_backward_sync(self.model, enabled=number < len(pieces)):
                values = self.task.loss(self.model, piece.to(self.fabric.device))
                self.fabric.backward(values["loss"].sum() / images)
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value.detach().sum()
        means = torch.stack(list(sums.values())) / images
        return dict(zip(sums, over_processes(self.fabric, means, "mean").tolist(), strict=True))

    def _halve(self, micro_batch: int, error: torch.OutOfMemoryError) -> None:
        size = self.piece or micro_batch
        if size == 1 or self.fabric.world_size > 1:  # processes must agree on the number of pieces
            remedy = "a smaller model or image" if size == 1 else f"--micro_batch {max(1, size // 2)}"
            raise UserError(f"out of GPU memory with {size} images at once; try {remedy}") from error
        self.piece = size // 2
        self.optimizer.zero_grad()
        torch.cuda.empty_cache()
        self.run.say(f"out of GPU memory with {size} images at once; going on with {self.piece}")

    @torch.no_grad()
    def culprits(self, chunks: list[Batch]) -> list[str]:
        """Name the images whose own loss is not finite; if none is, the gradient alone overflowed."""
        names = []
        for chunk in chunks:
            for piece in chunk.pieces(self.piece or len(chunk)):
                finite = self.task.loss(self.model, piece.to(self.fabric.device))["loss"].isfinite().tolist()
                names += [name for name, good in zip(self.task.names(piece), finite, strict=True) if not good]
        return names


def is_finite(means: dict[str, float], norm: float) -> bool:
    """Tell whether a step may be taken: a loss can overflow where its gradient does not, and the other way round."""
    return math.isfinite(means["loss"]) and math.isfinite(norm)


def report_skipped(fabric: Fabric, run: RunFolder, progress: Progress, culprits: list[str], in_a_row: int) -> None:
    """Say that a step was skipped and why; stop after too many in a row."""
    shown = ", ".join(culprits[:5]) + (f" and {len(culprits) - 5} more" if len(culprits) > 5 else "")
    cause = f"the loss of {shown} is not finite" if culprits else "the gradient is not finite"
    run.say(f"step {progress.step} skipped: {cause} ({progress.skipped} skipped so far)")
    limit = MAX_SKIPPED_FP16 if fabric.strategy.precision.state_dict() else MAX_SKIPPED
    if in_a_row >= limit:
        raise UserError(
            f"{in_a_row} steps in a row had a non-finite loss or gradient; the last checkpoint is kept: "
            "try --clip_grad 1, a lower --base_lr or --precision 32, and look at the images named in log.txt"
        )


def report_bad(run: RunFolder, plan: Plan, progress: Progress, files: Iterable[tuple[str, str]]) -> None:
    """Name unusable files, given as (name, reason), once each; stop when they are more than the budget."""
    fresh = {name: reason for name, reason in files if name not in progress.bad}
    progress.bad |= fresh
    for name, reason in fresh.items():
        run.note(f"skipped {name}: {reason}")
    if fresh:
        name, reason = next(iter(fresh.items()))
        run.say(f"skipped {len(progress.bad)} unusable files so far, e.g. {name}: {reason} (all are named in log.txt)")
    if len(progress.bad) > plan.max_bad * plan.samples:
        raise UserError(
            f"{len(progress.bad)} of {plan.samples} files cannot be used, more than --max_bad {plan.max_bad}; "
            "mend the files named in log.txt or raise --max_bad"
        )


@torch.no_grad()
def evaluate(
    fabric: Fabric, task: Task, model: nn.Module, held_out: Iterable[Batch], run: RunFolder, monitor: Monitor,
    progress: Progress, plan: Plan,
) -> dict[str, float]:  # fmt: skip
    """Average the task's values over held-out images (all processes'), record them and let the task draw.

    `model` is the module itself, not the distributed wrapper, whose forward would wait for other processes.
    """
    model.eval()
    sums: dict[str, Tensor] = {}
    count = torch.zeros((), device=fabric.device)
    for batch in held_out:
        report_bad(run, plan, progress, batch.bad)
        with fabric.autocast():
            values = task.loss(model, batch.to(fabric.device))
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value.sum()
        count += len(batch)
    with as_one(fabric):  # only the first process writes a log, and each reads other files
        report_bad(run, plan, progress, (file for bad in from_all(fabric, progress.bad) for file in bad.items()))
    totals = over_processes(fabric, torch.stack([*sums.values(), count]), "sum")
    means = dict(zip(sums, (totals[:-1] / totals[-1]).tolist(), strict=True))
    epoch = progress.step / plan.steps_per_epoch
    run.record({"kind": "held_out", "step": progress.step, "epoch": epoch, **means})
    monitor.scalars("held_out", means, progress.step)
    parts = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in means.items() if name != "loss")
    left = f" · {time_left}" if (time_left := monitor.time_left()) else ""
    run.say(f"epoch {epoch:g} · held-out loss {means['loss']:.4f}{f' ({parts})' if parts else ''}{left}")
    if fabric.is_global_zero:
        task.draw(run, progress.step, epoch)
        draw_curves(run.rows(), run.pictures / "curves.png")
    fabric.barrier()
    model.train()
    return means
