"""The training loop, the only one.

A task brings a model, a loss over batches and pictures; the loop brings accumulation, skipped steps, out-of-memory,
checkpoints, evaluations and records. A step reads from top to bottom in `fit`.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mirl.data.loading import B
from mirl.errors import UserError
from mirl.models.products import fast_products
from mirl.training import checkpoints
from mirl.training.monitors import Monitor
from mirl.training.pictures import draw_curves, draw_gradients
from mirl.training.processes import Fabric, Interrupted, as_one, from_all, stop_signals
from mirl.training.runs import RunFolder
from mirl.training.saving import Progress, save
from mirl.training.steps import Accumulator, Task

MAX_SKIPPED = 5  # non-finite steps in a row before the run stops
GRADIENTS_EVERY = 10  # steps; the first one's too
STEPS = 2  # the stream of a step's random numbers; the data have others
MAX_SKIPPED_FP16 = 25  # the loss scale starts at 2^16 and halves at each overflow


@dataclass(frozen=True)
class Plan:
    """How long and how to train.

    Args:
        steps: optimizer steps of the whole run; batch_size: images in each, over all processes.
        micro_batches: batches that each process reads for one step.
        rate: maps the number of finished steps to the learning rate.
        clip_grad: largest gradient norm, or None.
        evaluate_every: steps; checkpoint_seconds, checkpoint_steps: longest time and most steps between checkpoints.
        undecayed: the step at which the rate is about to decay, whose checkpoint is kept; None if none is.
        seed: of what is random inside a step.
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
    checkpoint_steps: int
    samples: int
    max_bad: float
    seed: int = 0
    undecayed: int | None = None


def fit(
    fabric: Fabric, task: Task[B], optimizer: torch.optim.Optimizer, run: RunFolder, plan: Plan, progress: Progress,
    training: Iterable[B], held_out: Iterable[B],
) -> None:  # fmt: skip
    """Train from `progress.step` to `plan.steps`.

    Raises:
        Interrupted: after SIGINT or SIGTERM, once the checkpoint is written.
        UserError: too many unusable files or non-finite steps, disk full, out of memory beyond remedy.
    """
    model, optimizer = fabric.setup(task.model, optimizer)
    accumulator = Accumulator(fabric, task, model, optimizer, plan.clip_grad, run)
    batches = iter(training)
    saved_at = time.monotonic()
    start, in_a_row = progress.step, 0
    monitor = Monitor(
        run,
        start=start,
        steps=plan.steps,
        steps_per_epoch=plan.steps_per_epoch,
        images=plan.batch_size,
        advise=fabric.device.type == "cuda",
    )
    with stop_signals(fabric) as stop_requested, monitor, settling(task):
        if start == 0:
            evaluate(fabric, task, held_out, run, monitor, progress, plan)
        while progress.step < plan.steps:
            began = time.monotonic()
            chunks = [next(batches) for _ in range(plan.micro_batches)]
            waited = time.monotonic() - began
            task.epoch = progress.step / plan.steps_per_epoch
            rate = plan.rate(progress.step)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            key = (plan.seed, STEPS, progress.step, fabric.global_rank)
            by_block = progress.step % GRADIENTS_EVERY == 0
            step = accumulator.step(chunks, key, number=progress.step + 1, by_block=by_block)
            if step.finite:
                task.follow(progress.step)
            progress.step += 1
            in_a_row = 0 if step.finite else in_a_row + 1
            if not step.finite:
                progress.skipped += 1
                culprits = [name for names in from_all(fabric, accumulator.culprits(chunks, key)) for name in names]
                with as_one(fabric):
                    report_skipped(fabric, run, progress, culprits, in_a_row)
            report_bad(run, progress, (file for chunk in chunks for file in chunk.bad))
            if fabric.world_size == 1:  # several processes count together, at each evaluation
                check_budget(plan, progress)
            done = {"step": progress.step, "epoch": progress.step / plan.steps_per_epoch}
            seconds = time.monotonic() - began
            row = {"kind": "train", **done, **step.means, "lr": rate, "grad_norm": step.norm, "seconds": seconds}
            row |= {"data_wait": waited, "images_per_second": plan.batch_size / seconds}
            run.record(row)
            if step.blocks:
                run.record({"kind": "gradients", **done, "encoder": step.blocks[0], "blocks": step.blocks[1:]})
                monitor.scalars("gradients", {f"{i:02}": norm for i, norm in enumerate(step.blocks)}, progress.step)
            monitor.step(row)
            if progress.step % plan.evaluate_every == 0 or progress.step == plan.steps:
                evaluate(fabric, task, held_out, run, monitor, progress, plan)
            signal_number = stop_requested()
            due = fabric.broadcast(time.monotonic() - saved_at > plan.checkpoint_seconds)
            due = due or progress.step % plan.checkpoint_steps == 0 or progress.step == plan.undecayed
            if due or signal_number or progress.step == plan.steps:
                save(fabric, run, task, optimizer, progress, plan.samples)
                if progress.step == plan.undecayed and fabric.is_global_zero:
                    checkpoints.keep_undecayed(run.checkpoints, progress.step)
                saved_at = time.monotonic()
            if signal_number and progress.step < plan.steps:
                line = f"stopped at step {progress.step} of {plan.steps}, saved; go on with --out {run.path} --resume"
                run.incident(progress.step, "stopped", line)
                # Another exit code of another process would make Fabric kill the first.
                raise Interrupted(signal_number) if fabric.is_global_zero else SystemExit(0)


@contextmanager
def settling(task: Task[B]) -> Iterator[None]:
    """Let the task finish what it computes beside the training, however the block ends."""
    try:
        yield
    finally:
        task.settle()


def report_skipped(fabric: Fabric, run: RunFolder, progress: Progress, culprits: list[str], in_a_row: int) -> None:
    """Say that a step was skipped and why; stop after too many in a row."""
    shown = ", ".join(culprits[:5]) + (f" and {len(culprits) - 5} more" if len(culprits) > 5 else "")
    cause = f"the loss of {shown} is not finite" if culprits else "the gradient is not finite"
    line = f"step {progress.step} skipped: {cause} ({progress.skipped} skipped so far)"
    run.incident(progress.step, "skipped step", line)
    limit = MAX_SKIPPED_FP16 if fabric.strategy.precision.state_dict() else MAX_SKIPPED
    if in_a_row >= limit:
        raise UserError(
            f"{in_a_row} steps in a row had a non-finite loss or gradient; the last checkpoint is kept: "
            "add --resume and --clip_grad 1 or --precision 32, look at the images named in log.txt, or start again "
            "with a lower --base_lr"
        )


def report_bad(run: RunFolder, progress: Progress, files: Iterable[tuple[str, str]]) -> None:
    """Name unusable files, given as (name, reason), once each."""
    fresh = {name: reason for name, reason in files if name not in progress.bad}
    progress.bad |= fresh
    for name, reason in fresh.items():
        run.incident(progress.step, "unusable file", f"skipped {name}: {reason}", quiet=True)
    if fresh:
        name, reason = next(iter(fresh.items()))
        run.say(f"skipped {len(progress.bad)} unusable files so far, e.g. {name}: {reason} (all are named in log.txt)")


def check_budget(plan: Plan, progress: Progress) -> None:
    """Stop when the unusable files are more than the budget."""
    if len(progress.bad) > plan.max_bad * plan.samples:
        raise UserError(
            f"{len(progress.bad)} of {plan.samples} files cannot be used, more than --max_bad {plan.max_bad}; "
            "mend the files named in log.txt or raise --max_bad"
        )


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # type: ignore[untyped-decorator]  # each shape would be compiled
def evaluate(
    fabric: Fabric, task: Task[B], held_out: Iterable[B], run: RunFolder, monitor: Monitor, progress: Progress,
    plan: Plan,
) -> dict[str, float]:  # fmt: skip
    """Let the task evaluate its model on held-out images, record what it finds, and let it draw.

    It takes the module itself, not the distributed wrapper, whose forward would wait for other processes; and, where
    there are averaged weights, these too, whose values are named `average_...`.
    """
    models = {"": task.model} | ({"average_": task.average.module} if task.average else {})
    evaluations = {prefix: task.evaluation(fabric, model.eval()) for prefix, model in models.items()}
    epoch = task.epoch = progress.step / plan.steps_per_epoch
    for batch in held_out:
        report_bad(run, progress, batch.bad)
        if not len(batch):
            continue
        on_device = batch.to(fabric.device)
        for evaluation in evaluations.values():
            with fast_products(task.model, fabric.device), fabric.autocast():
                evaluation.add(on_device)
    with as_one(fabric):  # only the first process writes a log, and each reads other files
        report_bad(run, progress, (file for bad in from_all(fabric, progress.bad) for file in bad.items()))
        check_budget(plan, progress)
    found = {prefix + name: value for prefix, part in evaluations.items() for name, value in part.values().items()}
    run.record({"kind": "held_out", "step": progress.step, "epoch": epoch, **found})
    monitor.scalars("held_out", found, progress.step)
    shown = [prefix + name for prefix, part in evaluations.items() for name in part.headline or ()] or list(found)
    first, *parts = (f"{name.replace('_', ' ')} {found[name]:.4f}" for name in sorted(shown, key="loss".__ne__))
    others = f" ({', '.join(parts)})" if parts else ""
    left = f" · {time_left}" if (time_left := monitor.time_left()) else ""
    run.say(f"epoch {epoch:g} · held-out {first}{others}{left}")
    if fabric.is_global_zero:
        task.draw(run, monitor, progress.step, epoch)
        rows = run.rows()
        draw_curves(rows, run.pictures / "curves.png")
        if any(row["kind"] == "gradients" for row in rows):
            draw_gradients(rows, run.pictures / "gradients.png")
    fabric.barrier()
    task.model.train()
    return found
