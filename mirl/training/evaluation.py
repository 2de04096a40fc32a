"""What an evaluation makes of held-out images, batch by batch and over all processes."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic

import torch
from torch import Tensor

from mirl.data.loading import B
from mirl.training.processes import Fabric, from_all, over_processes


class Evaluation(ABC, Generic[B]):
    """Collects what one model makes of held-out batches.

    Attributes:
        headline: names of the values that the console shows; None is all of them.
    """

    headline: tuple[str, ...] | None = None

    @abstractmethod
    def add(self, batch: B) -> None:
        """Take in a batch, which is on the model's device."""

    @abstractmethod
    def values(self) -> dict[str, float]:
        """Return what was found over all processes, each of which must call it; what is unknown is NaN."""


class Means(Evaluation[B]):
    """Means over images of the values [b] that `loss` returns for a batch."""

    def __init__(self, fabric: Fabric, loss: Callable[[B], dict[str, Tensor]]) -> None:
        self.fabric, self.loss = fabric, loss
        self.sums: dict[str, Tensor] = {}
        self.count = torch.zeros((), device=fabric.device)

    def add(self, batch: B) -> None:
        """Add the batch's values."""
        for name, value in self.loss(batch).items():
            self.sums[name] = self.sums.get(name, 0) + value.sum()
        self.count += len(batch)

    def values(self) -> dict[str, float]:
        """Return the means."""
        names: list[str] = next(
            filter(None, from_all(self.fabric, list(self.sums))), []
        )  # a process may have had no image
        nothing = torch.zeros_like(self.count)
        sums = torch.stack([*(self.sums.get(name, nothing) for name in names), self.count])
        totals = over_processes(self.fabric, sums, "sum")
        return dict(zip(names, (totals[:-1] / totals[-1]).tolist(), strict=True))
