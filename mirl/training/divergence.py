"""When a training goes wrong: steps without finite numbers, a loss that leaves its usual course, weights that overflow.

Steps alone decide, no clock and no checkpoint: a run goes wrong at the same step in every process, however often it
was interrupted before. What is known of its last steps is part of a checkpoint.
"""

import math
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mirl.errors import plural
from mirl.training.processes import Fabric, over_processes
from mirl.training.steps import Step
from mirl.training.task import Task

WINDOW = 128  # usual losses, from which an unusual one is told
ENOUGH = 32  # of them, before any loss is called unusual
DEVIATIONS = 10  # standard deviations above the usual loss, and
LEAST = 0.1  # the share of it by which an unusual one must exceed it
SPIKE = 3  # unusual steps in a row that are reported
PERSISTENT = 20  # unusual steps in a row after which the loss is not expected to come back by itself
MAX_SKIPPED = 5  # non-finite steps in a row before the run stops
MAX_SKIPPED_FP16 = 25  # the loss scale starts at 2^16 and halves at each overflow


@dataclass(frozen=True)
class Trouble:
    """Why training should not go on as it is.

    Attributes:
        began: steps that were finished before; cause: in words; fatal: whether nothing more can be learned so.
    """

    began: int
    cause: str
    fatal: bool = True


@dataclass
class Watch:
    """Follows the steps of a run, and tells a loss that has left its usual course from one that is noisy.

    Usual is the median of the last losses that were not unusual; their median absolute deviation tells how noisy they
    are. Neither is moved by single steps, and both follow a loss that falls or drifts.

    Attributes:
        losses: the last usual ones.
        began: steps finished when trouble began, if it lasts; skipped, unusual: such steps since then.
    """

    losses: list[float] = field(default_factory=list)
    began: int | None = None
    skipped: int = 0
    unusual: int = 0

    @property
    def usual(self) -> float:
        """The usual loss."""
        return median(self.losses)

    @property
    def highest(self) -> float:
        """The highest loss that is not unusual."""
        if len(self.losses) < ENOUGH:
            return math.inf
        usual = self.usual
        deviation = 1.4826 * median(abs(loss - usual) for loss in self.losses)  # of a normal distribution
        return usual + max(DEVIATIONS * deviation, LEAST * abs(usual))

    def follow(self, number: int, step: Step, *, scaled: bool = False) -> Trouble | None:
        """Take notice of step `number`; return what is wrong if it has lasted too long.

        Args:
            scaled: whether float16's loss scale has to settle, which skips steps.
        """
        loss = step.means["loss"]
        unusual = step.finite and loss > self.highest
        if step.finite and not unusual:
            self.losses.append(loss)
            del self.losses[:-WINDOW]
            self.calm()
            return None
        self.began = number - 1 if self.began is None else self.began
        self.skipped = 0 if step.finite else self.skipped + 1
        self.unusual += unusual
        if self.skipped >= (MAX_SKIPPED_FP16 if scaled else MAX_SKIPPED):
            return Trouble(self.began, f"{plural(self.skipped, 'step')} in a row had a non-finite loss or gradient")
        if self.unusual >= PERSISTENT:
            cause = f"the loss stays high: {loss:.4g} at step {number}, {self.usual:.4g} usually"
            return Trouble(self.began, cause, fatal=False)
        return None

    def calm(self) -> None:
        """Let trouble be over."""
        self.began, self.skipped, self.unusual = None, 0, 0

    def accept(self) -> None:
        """Let trouble be over because what is unusual becomes usual."""
        self.losses.clear()
        self.calm()


@torch.no_grad()
def is_finite(fabric: Fabric, task: Task[Any], optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether weights, averages and the optimizer's moments are finite in all processes."""
    modules = [task.model, *task.followers.values()]
    tensors: list[Tensor] = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    mine = [t.to_local() if hasattr(t, "to_local") else t for t in tensors if t.is_floating_point()]  # of a shard
    largest = torch.nn.utils.get_total_norm([t for t in mine if t.numel()], math.inf)  # a shard may have no rows
    return bool(over_processes(fabric, largest.isfinite().float(), "min"))
