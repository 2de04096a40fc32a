"""`mirl knn`: weighted nearest neighbours on frozen features, the read-out that trains nothing."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mirl.errors import UserError
from mirl.tasks.accuracy import Accuracy
from mirl.tasks.readout import read_out
from mirl.tasks.settings.readouts import KNNOptions

CHUNK = 2**26  # similarities held in memory at once: 256 MiB
TRAIN_CHUNK = 2**16  # training images of them, or k if that is more


def knn(**options: Any) -> dict[int, dict[str, Accuracy]]:
    """Classify by weighted nearest neighbours on frozen features, and say how often that is right.

    `--data` is a folder with train/ and val/ or test/, one of class folders with --val_fraction, or `shapes`. Takes the
    fields of `mirl.KNNOptions`; returns accuracies by block and by k, and writes them as JSON.

    Raises:
        UserError: on a mistake in options, weights or data.
    """
    settings = KNNOptions(**options)
    ks = [settings.k] if isinstance(settings.k, int) else list(settings.k)
    if not ks or min(ks) < 1:
        raise UserError(f"--k {settings.k} is not allowed; give numbers from 1 on")
    return read_out("knn", settings, partial(vote, ks=ks, temperature=settings.temperature))


def vote(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, *, ks: list[int], temperature: float
) -> dict[str, Tensor]:
    """Return votes [t, classes] for each k that the training features allow.

    Works through chunks of similarities, so that memory does not grow with either number of images.

    Args:
        train, test: features [n, d] and [t, d]; labels: [n].
    """
    ks = sorted({min(k, len(train)) for k in ks})
    test, most = F.normalize(test, dim=1), ks[-1]
    width = min(len(train), max(most, TRAIN_CHUNK))
    votes: dict[int, list[Tensor]] = {k: [] for k in ks}
    for queries in test.split(max(1, CHUNK // width)):
        best = torch.empty(len(queries), 0, device=test.device)
        nearest = torch.empty(len(queries), 0, dtype=torch.int64, device=test.device)
        for start in range(0, len(train), width):
            similarity = queries @ F.normalize(train[start : start + width], dim=1).T
            top, index = similarity.topk(min(most, similarity.shape[1]), dim=1)
            best, kept = torch.cat([best, top], dim=1).topk(min(most, best.shape[1] + top.shape[1]), dim=1)
            nearest = torch.cat([nearest, index + start], dim=1).gather(1, kept)
        weights = ((best - best[:, :1]) / temperature).exp()  # of the nearest 1: the same votes without overflow
        for k in ks:
            count = torch.zeros(len(queries), classes, device=test.device)
            votes[k].append(count.scatter_add_(1, labels[nearest[:, :k]], weights[:, :k]))
    return {f"k={k}": torch.cat(parts) for k, parts in votes.items()}
