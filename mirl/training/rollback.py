"""Going back: to the last checkpoint from before trouble began, and past the batches that were read since.

Where the run goes on reading depends on the steps alone, not on which checkpoints there are: what is between the
checkpoint and the trouble is done again as it was.
"""

import torch

from mirl.data.loading import B
from mirl.errors import UserError
from mirl.training import checkpoints
from mirl.training.divergence import Trouble, Watch
from mirl.training.processes import Fabric, as_one, from_all
from mirl.training.runs import RunFolder
from mirl.training.saving import Progress, restore
from mirl.training.task import Task

MOST = 3  # rollbacks
SPAN = 1000  # within so many steps, after which the run stops
ADVICE = "look at the images named in log.txt, or start again with a lower --base_lr"


def forget_trouble(fabric: Fabric, run: RunFolder, watch: Watch) -> None:
    """Let trouble that began before all that is kept be over: a run without rollbacks saves in trouble, too."""
    kept = from_all(fabric, checkpoints.saved_steps(run.checkpoints))
    if watch.began is not None and not any(step <= watch.began for steps in kept for step in steps):
        watch.calm()


def roll_back(
    fabric: Fabric, run: RunFolder, task: Task[B], optimizer: torch.optim.Optimizer, progress: Progress,
    trouble: Trouble, samples: int,
) -> None:  # fmt: skip
    """Restore the state from before `trouble`, and let `progress` leave out the batches that were read since.

    The batch before the first of them is left out too: its update may be what made the next losses large.

    Args:
        samples: size of the data set.

    Raises:
        UserError: if nothing is left to go back to, or it was done too often.
    """
    reached = progress.step
    with as_one(fabric):
        good = [step for step in checkpoints.saved_steps(run.checkpoints) if step <= trouble.began]
        if not good:
            raise UserError(f"{trouble.cause}, and no checkpoint is from before step {trouble.began + 1}; {ADVICE}")
        start = max(trouble.began - 1, min(good))
        if sum(at > start - SPAN for at, _ in progress.jumps) >= MOST:
            raise UserError(
                f"{trouble.cause}, after {MOST} rollbacks within {SPAN} steps; a checkpoint from before is kept; "
                f"add --resume and --clip_grad 1 or --precision 32, {ADVICE}"
            )
    with as_one(fabric):  # all have seen what there is
        if fabric.is_global_zero:
            checkpoints.forget_after(run.checkpoints, start)
    jumps = [*progress.jumps, (start, progress.batch)]
    restored = restore(fabric, run, task, optimizer, samples)
    progress.step, progress.skipped, progress.watch, progress.jumps = (
        restored.step, restored.skipped, restored.watch, jumps,
    )  # fmt: skip
    run.forget_after(progress.step)
    text = (
        f"rolled back from step {reached} to step {progress.step}: {trouble.cause}; "
        f"the batches of steps {start + 1} to {reached} are left out"
    )
    run.incident(start, "rollback", text)
