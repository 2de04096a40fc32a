"""What the loop knows of what it trains: a model, a loss over batches, averages, pictures."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic

import torch
from timm.models import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mirl.data.loading import B
from mirl.models.attention import choose_attention
from mirl.training.allocation import keep_freed_memory
from mirl.training.evaluation import Evaluation, Means
from mirl.training.monitors import Monitor
from mirl.training.processes import Fabric, mesh_of
from mirl.training.runs import RunFolder
from mirl.training.sharded import gathered, shard


class Task(ABC, Generic[B]):
    """What a command trains.

    Attributes:
        model: the module.
        average: a running average of its weights, evaluated beside it, or None.
        epoch: how far the run has come, in passes over the data; the loop sets it before each step and evaluation.
        about: what checkpoints say beside tensors, such as names of classes; a resumed run must find it unchanged.
        skeleton: the model without weights, where it is sharded (training/sharded.py), else None.
    """

    model: nn.Module
    average: ModelEmaV3 | None = None
    epoch: float = 0.0
    about: dict[str, Any] = {}  # noqa: RUF012
    skeleton: nn.Module | None = None

    @property
    def followers(self) -> dict[str, nn.Module]:
        """Averages of the model or of parts of it, by the names under which checkpoints keep them."""
        return {"average": self.average.module} if self.average else {}

    def follow(self, step: int) -> None:
        """Bring the followers up to date with the weights; called after each optimizer step that was taken."""
        if self.average:
            self.average.update(self.model, step=step)

    def shard(self, fabric: Fabric) -> None:
        """Share the model's weights among processes, if the strategy says so; before the optimizer is built."""
        if (mesh := mesh_of(fabric)) is not None:
            self.skeleton = shard(self.model, self.parts, mesh)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Let `model`, if it is sharded, be an ordinary one with its weights; every process must enter."""
        shards = self.model
        if self.skeleton is not None:
            self.model = gathered(shards, self.skeleton)
        try:
            yield
        finally:
            self.model = shards

    def to(self, device: torch.device) -> None:
        """Move the model, its followers and whatever else the loss needs to `device`."""
        for module in (self.model, *self.followers.values()):
            module.to(device)

    @property
    def encoder(self) -> VisionTransformer | None:
        """The part of the model whose blocks' gradients are followed, if there is one."""
        return None

    @property
    def parts(self) -> list[nn.Module]:
        """Parts of the model, the inner first: a sharded model has whole weights in the one that computes."""
        return list(self.encoder.blocks) if self.encoder else []

    def prepare(self, batch: B) -> B:
        """Return what the loss sees of a training batch: a function of the batch, on the same device."""
        return batch

    @abstractmethod
    def loss(self, model: nn.Module, batch: B) -> dict[str, Tensor]:
        """Return per-image values [b]: `loss`, which is minimised, and whatever else should be recorded."""

    def evaluation(self, fabric: Fabric, model: nn.Module) -> Evaluation[B]:
        """Begin an evaluation of `model`, which is in evaluation mode: by default the means of the loss's values."""
        return Means(fabric, lambda batch: self.loss(model, batch))

    def draw(self, run: RunFolder, monitor: Monitor, step: int, epoch: float) -> None:
        """Write pictures after an evaluation; called in the first process only."""

    def settle(self) -> None:
        """Wait for what is computed beside the training; called in every process, also before each checkpoint."""

    @abstractmethod
    def example(self, size: int) -> B:
        """Return a batch of `size` meaningless images, to measure memory and time with."""

    @abstractmethod
    def names(self, batch: B) -> list[str]:
        """Name the batch's images."""


def place(fabric: Fabric, task: Task[B]) -> None:
    """Move the task to its device, and let its timm blocks use the attention that is fastest there."""
    task.to(fabric.device)
    if fabric.device.type == "cpu":
        keep_freed_memory()
    with fabric.autocast():
        half = torch.is_autocast_enabled(fabric.device.type)
        dtype = torch.get_autocast_dtype(fabric.device.type) if half else torch.float32
    choose_attention(task.model, fabric.device, dtype)
