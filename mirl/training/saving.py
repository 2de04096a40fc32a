"""What a run keeps of itself, and how it finds itself again: model, optimizer, averages, how far it has come."""

from dataclasses import asdict, dataclass, field
from functools import partial

import torch

from mirl.data.loading import B, batch_of
from mirl.errors import UserError
from mirl.training import checkpoints, sharded
from mirl.training.divergence import Watch
from mirl.training.processes import Fabric, as_one, from_all
from mirl.training.runs import RunFolder
from mirl.training.task import Task


@dataclass
class Progress:
    """What a resumed run must know besides weights.

    Attributes:
        step: steps finished; skipped: those of them that were not applied.
        bad: unusable files, reasons by name; bad_shared: the first so many are known to every process.
        jumps: of each rollback the step from which on other batches are read, and the number of the first of them.
        watch: the last usual losses, and whether trouble lasts.
    """

    step: int = 0
    skipped: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    jumps: list[tuple[int, int]] = field(default_factory=list)
    watch: Watch = field(default_factory=Watch)
    bad_shared: int = 0

    @property
    def batch(self) -> int:
        """The number of the batch that the next step reads."""
        return batch_of(self.step, self.jumps)


def save(
    fabric: Fabric, run: RunFolder, task: Task[B], optimizer: torch.optim.Optimizer, progress: Progress, samples: int
) -> None:
    """Write a checkpoint, from the first process or, of a sharded model, from all.

    Args:
        samples: size of the data set.

    Raises:
        UserError: if the disk is full or not writable; earlier checkpoints are untouched.
    """
    state = {
        "model": task.model.state_dict(),
        **{name: follower.state_dict() for name, follower in task.followers.items()},
        "optimizer": optimizer.state_dict(),
        "precision": fabric.strategy.precision.state_dict(),
        "about": task.about,
        "skipped": progress.skipped,
        "bad": progress.bad,
        "jumps": progress.jumps,
        "watch": asdict(progress.watch),
        "samples": samples,
    }
    if task.skeleton is not None:
        sharded.save(fabric, run.checkpoints, progress.step, state)
        return
    with as_one(fabric):
        if fabric.is_global_zero:
            checkpoints.save(run.checkpoints, progress.step, state)


def restore(fabric: Fabric, run: RunFolder, task: Task[B], optimizer: torch.optim.Optimizer, samples: int) -> Progress:
    """Load the newest readable checkpoint into the task's model and optimizer; without one, start at step 0.

    Raises:
        UserError: if the checkpoint is of another model, the data have grown or shrunk since (order and held-out
            images are functions of their number), or their classes have changed.
    """
    # What goes to a GPU is not read into this machine's memory by each of its processes first.
    read = partial(checkpoints.load_in_parts, mapped=fabric.device.type == "cuda")
    with as_one(fabric):
        state = checkpoints.load_newest(run.checkpoints, run.say, read=read)
    steps = sorted(set(from_all(fabric, state["step"] if state else 0)))
    with as_one(fabric):
        if len(steps) > 1:
            raise UserError(
                f"processes read checkpoints of different steps in {run.checkpoints}, {' and '.join(map(str, steps))}; "
                "let all machines see the same --out, then add --resume"
            )
        if state is None:
            run.say("no checkpoint was written yet; starting at step 0")
            return Progress()
        if state["samples"] != samples:
            raise UserError(
                f"the run began with {state['samples']} images and the data now have {samples}; "
                "restore them, or start a new run with another --out"
            )
        for name, known in state.get("about", {}).items():
            if task.about.get(name) != known:
                raise UserError(
                    f"{name}: not what the run began with; restore it, or start a new run with another --out"
                )
        try:
            for group in state["optimizer"]["param_groups"]:
                # Another --precision may need the other kind, which counts steps on another device.
                group["fused"] = optimizer.defaults["fused"]
            task.model.load_state_dict(sharded.own_weights(task.model, state["model"]))
            for name, follower in task.followers.items():
                follower.load_state_dict(state[name])
            optimizer.load_state_dict(sharded.own_moments(optimizer, state["optimizer"]))
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"the checkpoint of step {state['step']} in {run.checkpoints} is of another model "
                f"({' '.join(str(error).split())[:160]}); give the --model and sizes it was made with, or another --out"
            ) from error
    if state["precision"]:  # only 16 has a loss scale
        fabric.strategy.precision.load_state_dict(state["precision"])
    known = {name: state[name] for name in ("step", "skipped", "bad", "jumps")}
    return Progress(**known, watch=Watch(**state["watch"]))
