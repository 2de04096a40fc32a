"""The training loop, the only one.

A task brings a model, a loss over batches and pictures; the loop brings accumulation, skipped steps, out-of-memory,
checkpoints, evaluations and records. A step reads from top to bottom in `fit`.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import cast

import torch

from mirl.data.loading import B
from mirl.errors import UserError, plural
from mirl.models.products import fast_products
from mirl.training import checkpoints
from mirl.training.divergence import SPIKE, Trouble, Watch, is_finite
from mirl.training.monitors import Monitor
from mirl.training.pictures import draw_curves, draw_gradients
from mirl.training.processes import Fabric, Interrupted, as_one, from_all, stop_signals
from mirl.training.rollback import ADVICE, forget_trouble, roll_back
from mirl.training.runs import RunFolder
from mirl.training.saving import Progress, save
from mirl.training.steps import NAMED, Accumulator, Step
from mirl.training.task import Task

GRADIENTS_EVERY = 10  # steps; the first one's too
ALL_COUNTED = 20  # unusable files, of which each is counted on the console; then each doubling
STEPS = 2  # the stream of a step's random numbers; the data have others


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
        rollback: go back to before trouble instead of stopping or going on with it.
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
    rollback: bool = False


def fit(
    fabric: Fabric, task: Task[B], optimizer: torch.optim.Optimizer, run: RunFolder, plan: Plan, progress: Progress,
    training: Callable[[Progress], Iterable[B]], held_out: Iterable[B],
) -> None:  # fmt: skip
    """Train from `progress.step` to `plan.steps`.

    Args:
        training: returns the micro-batches of the steps that are still to do.

    Raises:
        Interrupted: after SIGINT or SIGTERM, once the checkpoint is written.
        UserError: too many unusable files or non-finite steps, disk full, out of memory beyond remedy.
    """
    model, optimizer = fabric.setup_module(task.model), cast(torch.optim.Optimizer, fabric.setup_optimizers(optimizer))
    accumulator = Accumulator(fabric, task, model, optimizer, plan.clip_grad, run)
    scaled = bool(fabric.strategy.precision.state_dict())
    watch = progress.watch
    if plan.rollback:
        forget_trouble(fabric, run, watch)
    batches = iter(training(progress))
    saved_at, start, due = time.monotonic(), progress.step, False
    monitor = Monitor(
        run,
        start=start,
        steps=plan.steps,
        steps_per_epoch=plan.steps_per_epoch,
        images=plan.batch_size,
        advise=fabric.device.type == "cuda",
    )
    with stop_signals(fabric) as stop_requested, monitor, settling(task):
        keep_undecayed(fabric, run, progress, plan)  # a kill may have come between the checkpoint and its copy
        if start == 0:
            with task.whole():
                evaluate(fabric, task, held_out, run, monitor, progress, plan)
            if plan.rollback:
                save(fabric, run, task, optimizer, progress, plan.samples)
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
            if step.finite and task.followers:
                with task.whole():
                    task.follow(progress.step)
            progress.step += 1
            trouble = watch.follow(progress.step, step, scaled=scaled)
            if not step.finite:
                progress.skipped += 1
                if is_finite(fabric, task, optimizer):
                    lost = not math.isfinite(step.means["loss"])  # else the gradient alone overflowed, in no one image
                    culprits = from_all(fabric, accumulator.culprits(chunks, key)) if lost else []
                    report_skipped(run, progress, step, [name for names in culprits for name in names])
                else:
                    trouble = Trouble(progress.step - 1, f"the weights are not finite at step {progress.step}")
            elif watch.unusual == SPIKE:
                highest = from_all(fabric, accumulator.highest(chunks, key))
                report_spike(run, progress, watch, step, [pair for pairs in highest for pair in pairs])
            report_bad(run, progress, (file for chunk in chunks for file in chunk.bad))
            if fabric.world_size == 1:  # several processes count together, at each evaluation
                check_budget(run, plan, progress)
            done = {"step": progress.step, "epoch": progress.step / plan.steps_per_epoch}
            seconds = time.monotonic() - began
            row = {"kind": "train", **done, **step.means, "lr": rate, "grad_norm": step.norm, "seconds": seconds}
            row |= {"data_wait": waited, "images_per_second": plan.batch_size / seconds}
            run.record(row)
            if step.blocks:
                run.record({"kind": "gradients", **done, "encoder": step.blocks[0], "blocks": step.blocks[1:]})
                monitor.scalars("gradients", {f"{i:02}": norm for i, norm in enumerate(step.blocks)}, progress.step)
            monitor.step(row)
            ended = progress.step == plan.steps
            goes_on = trouble is None or not (trouble.fatal or plan.rollback)
            if goes_on and (progress.step % plan.evaluate_every == 0 or ended):
                with task.whole():
                    evaluate(fabric, task, held_out, run, monitor, progress, plan)
            signal_number, late = stop_requested(time.monotonic() - saved_at > plan.checkpoint_seconds)
            due = due or late or progress.step % plan.checkpoint_steps == 0 or progress.step == plan.undecayed
            saving = due or ended or signal_number
            if goes_on and saving and not is_finite(fabric, task, optimizer):
                trouble = Trouble(progress.step, f"the weights are not finite after step {progress.step}")
            if trouble and plan.rollback:
                task.settle()  # or it would record steps that are undone
                roll_back(fabric, run, task, optimizer, progress, trouble, plan.samples)
                monitor.rewind(progress.step)
                watch, batches = progress.watch, iter(training(progress))
                saved_at, due = time.monotonic(), False
                continue
            if trouble:
                with as_one(fabric):
                    bear(run, progress, watch, trouble)
            # What may have to be undone is not kept; but a run has an end, and a longer one its beginning.
            held = plan.rollback and watch.began is not None and progress.step not in (plan.steps, plan.undecayed)
            if saving and not held:
                task.settle()  # what was recorded after this could be lost: the step is not done again
                save(fabric, run, task, optimizer, progress, plan.samples)
                keep_undecayed(fabric, run, progress, plan)
                saved_at, due = time.monotonic(), False
            if signal_number and not ended:
                what = f"in trouble and so not saved, {checkpoints.last_good(run.checkpoints)}" if held else "saved"
                line = f"stopped at step {progress.step} of {plan.steps}, {what}; go on with --out {run.path} --resume"
                run.incident(progress.step, "stopped", line)
                # At another exit code of another process a launcher kills the first.
                raise Interrupted(signal_number) if fabric.is_global_zero else SystemExit(0)


@contextmanager
def settling(task: Task[B]) -> Iterator[None]:
    """Let the task finish what it computes beside the training, however the block ends."""
    try:
        yield
    finally:
        task.settle()


def keep_undecayed(fabric: Fabric, run: RunFolder, progress: Progress, plan: Plan) -> None:
    """Keep the checkpoint just written or read, if it is the one from which a longer run can go on."""
    if progress.step == plan.undecayed:
        with as_one(fabric):
            if fabric.is_global_zero:
                checkpoints.keep_undecayed(run.checkpoints, progress.step)


def report_skipped(run: RunFolder, progress: Progress, step: Step, culprits: list[str]) -> None:
    """Say that a step was skipped and why."""
    shown = ", ".join(culprits[:NAMED]) + (f" and {len(culprits) - NAMED} more" if len(culprits) > NAMED else "")
    what = "gradient" if math.isfinite(step.means["loss"]) else f"loss of {shown}" if culprits else "loss"
    cause = f"the {what} is not finite"
    line = f"step {progress.step} skipped: {cause} ({progress.skipped} skipped so far)"
    run.incident(progress.step, "skipped step", line)


def report_spike(run: RunFolder, progress: Progress, watch: Watch, step: Step, images: list[tuple[float, str]]) -> None:
    """Say that the loss is unusual, and which `images` have the highest, given as (loss, name)."""
    shown = ", ".join(f"{name} ({loss:.4g})" for loss, name in sorted(images, reverse=True)[:NAMED])
    line = (
        f"loss spike: {step.means['loss']:.4g} at step {progress.step}, {watch.usual:.4g} usually; "
        f"{SPIKE} unusual steps in a row; highest for {shown}"
    )
    run.incident(progress.step, "loss spike", line)


def bear(run: RunFolder, progress: Progress, watch: Watch, trouble: Trouble) -> None:
    """Go on with a loss that stays unusual, which becomes the usual one; stop at what cannot be gone on with."""
    if trouble.fatal:
        raise UserError(
            f"{trouble.cause}; {checkpoints.last_good(run.checkpoints)}; add --resume and --rollback, which goes back "
            f"to before it and leaves those batches out, or --resume and --clip_grad 1 or --precision 32; else {ADVICE}"
        )
    line = f"{trouble.cause}; going on with it (--rollback would go back to step {trouble.began})"
    run.incident(progress.step, "loss spike", line)
    watch.accept()


def report_bad(run: RunFolder, progress: Progress, files: Iterable[tuple[str, str]]) -> None:
    """Name unusable files, given as (name, reason), once each."""
    fresh = {name: reason for name, reason in files if name not in progress.bad}
    progress.bad |= fresh
    for name, reason in fresh.items():
        run.incident(progress.step, "unusable file", f"skipped {name}: {reason}", quiet=True)
    count = len(progress.bad)
    doubled = count.bit_length() > (count - len(fresh)).bit_length()
    if fresh and (count <= ALL_COUNTED or doubled):  # of millions of files a few are bad in every step
        name, reason = next(iter(fresh.items()))
        run.say(f"skipped {plural(count, 'unusable file')} so far, e.g. {name}: {reason} (all are named in log.txt)")


def exchange_bad(fabric: Fabric, run: RunFolder, progress: Progress) -> None:
    """Let every process know what any of them could not use; each reads other files, and the first writes the log."""
    fresh = list(islice(progress.bad.items(), progress.bad_shared, None))
    report_bad(run, progress, (file for files in from_all(fabric, fresh) for file in files))
    progress.bad_shared = len(progress.bad)


def check_budget(run: RunFolder, plan: Plan, progress: Progress) -> None:
    """Stop when the unusable files are more than the budget, and leave their list."""
    if len(progress.bad) > plan.max_bad * plan.samples:
        run.write_unusable(progress.bad)
        raise UserError(
            f"{len(progress.bad)} of {plan.samples} files cannot be used, more than --max_bad {plan.max_bad:g}; mend "
            f"the files listed in {run.unusable} or raise --max_bad, then add --resume; "
            f"{checkpoints.last_good(run.checkpoints)}"
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
    with as_one(fabric):
        exchange_bad(fabric, run, progress)
        check_budget(run, plan, progress)
    found = {prefix + name: value for prefix, part in evaluations.items() for name, value in part.values().items()}
    run.record({"kind": "held_out", "step": progress.step, "epoch": epoch, **found})
    monitor.scalars("held_out", found, progress.step)
    shown = [prefix + name for prefix, part in evaluations.items() for name in part.headline or ()] or list(found)
    first, *parts = (f"{name.replace('_', ' ')} {found[name]:.4f}" for name in sorted(shown, key="loss".__ne__))
    others = f" ({', '.join(parts)})" if parts else ""
    left = f" · {time_left}" if (time_left := monitor.time_left()) else ""
    run.say(f"epoch {epoch:g} · held-out {first}{others}{left}")
    if fabric.is_global_zero:
        with run.optional("pictures/"):
            task.draw(run, monitor, progress.step, epoch)
            rows = run.rows()
            draw_curves(rows, run.pictures / "curves.png")
            if any(row["kind"] == "gradients" for row in rows):
                draw_gradients(rows, run.pictures / "gradients.png")
    fabric.barrier()
    task.model.train()
    return found
