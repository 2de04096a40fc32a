"""`mirl probe`: a linear classifier on frozen features. Learning rates of two optimizers compete in one pass.

The protocol is MAE's (batch norm without affine before the classifier, LARS, no weight decay) with cached features, so
without augmentation, and with a sweep whose winner is chosen on a tenth of the training images, never on test images.
"""

import math
from functools import partial
from typing import Any

import torch
from timm.optim import Lars
from torch import Tensor, nn
from torch.nn import functional as F

from mirl.tasks.accuracy import Accuracy
from mirl.tasks.readout import read_out
from mirl.tasks.settings.readouts import ProbeOptions
from mirl.training.runs import console
from mirl.training.schedules import learning_rate

ADAMW_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
LARS_RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
CHOOSING = 0.1  # share of the training images on which the sweep's winner is chosen
WARMUP = 0.1


def probe(**options: Any) -> dict[int, dict[str, Accuracy]]:
    """Train a linear classifier on frozen features, and say how often it is right.

    `--data` is a folder with train/ and val/ or test/, one of class folders with --val_fraction, or `shapes`. Takes the
    fields of `mirl.ProbeOptions`; returns accuracies by block, and writes them as JSON.

    Raises:
        UserError: on a mistake in options, weights or data.
    """
    settings = ProbeOptions(**options)
    fit = partial(fit_linear, epochs=settings.epochs, batch_size=settings.probe_batch, seed=settings.seed)
    return read_out("probe", settings, fit)


def fit_linear(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, *, epochs: int, batch_size: int, seed: int
) -> dict[str, Tensor]:
    """Return the scores [t, classes] of the best linear classifier of the sweep.

    Args:
        train, test: features [n, d] and [t, d]; labels: [n].
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train), generator=generator).to(train.device)
    chosen_on, fitted_on = order[: max(1, int(CHOOSING * len(train)))], order[max(1, int(CHOOSING * len(train))) :]
    sweep = _Sweep(train.shape[1], classes, generator).to(train.device)
    steps_per_epoch = math.ceil(len(fitted_on) / batch_size)
    steps = epochs * steps_per_epoch
    for step in range(steps):
        if step % steps_per_epoch == 0:
            fitted_on = fitted_on[torch.randperm(len(fitted_on), generator=generator).to(train.device)]
        start = step % steps_per_epoch * batch_size
        batch = fitted_on[start : start + batch_size]
        if len(batch) > 1:  # batch norm needs two
            rate = learning_rate(step, steps, peak=1.0, warmup=WARMUP * steps, schedule="cosine")
            sweep.step(train[batch], labels[batch], rate)
    best, share = sweep.best(train[chosen_on], labels[chosen_on])
    console.print(f"  best of the sweep on {len(chosen_on)} training images: {sweep.names[best]} ({share:.2%})")
    return {"linear": sweep.scores(test)[best]}


class _Sweep(nn.Module):
    """One linear classifier for each (optimizer, learning rate), fed with the same normalised features."""

    def __init__(self, width: int, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.names = [f"AdamW {rate:g}" for rate in ADAMW_RATES] + [f"LARS {rate:g}" for rate in LARS_RATES]
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.heads = nn.ModuleList(nn.Linear(width, classes) for _ in self.names)
        for head in self.heads:
            nn.init.trunc_normal_(head.weight, std=0.01, generator=generator)  # type: ignore[arg-type]
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]
        adamw, lars = self.heads[: len(ADAMW_RATES)], self.heads[len(ADAMW_RATES) :]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [{"params": head.parameters(), "peak": rate} for head, rate in zip(adamw, ADAMW_RATES, strict=True)],
                weight_decay=0.0,
            ),
            # As in MAE's LARS, biases take plain steps.
            Lars(
                [
                    {"params": [parameter], "peak": rate, "always_adapt": parameter.ndim > 1}
                    for head, rate in zip(lars, LARS_RATES, strict=True)
                    for parameter in head.parameters()
                ],
                lr=1.0,
            ),
        ]

    def step(self, features: Tensor, labels: Tensor, scale: float) -> None:
        self.train()
        normalised = self.norm(features)
        losses = [F.cross_entropy(head(normalised), labels) for head in self.heads]
        torch.stack(losses).sum().backward()  # each classifier sees the gradient of its own loss alone
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = scale * group["peak"]
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """Return [heads, b, classes]."""
        normalised = self.eval().norm(features)
        return torch.stack([head(normalised) for head in self.heads])

    def best(self, features: Tensor, labels: Tensor) -> tuple[int, float]:
        """Return the head that is right most often, and how often."""
        shares = (self.scores(features).argmax(dim=-1) == labels).float().mean(dim=-1)
        return int(shares.argmax()), float(shares.max())
