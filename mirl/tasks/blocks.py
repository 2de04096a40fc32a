"""Which blocks learn: four curves over depth, followed while a model is pre-trained.

At every evaluation whole held-out images pass through the encoder once; the figures are then computed in a thread
beside the training. Symbols: b images, m blocks, n patches, d width, r rows.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from timm.models import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from mirl.data.labels import LabelledSource
from mirl.data.loading import LabelledBatch, LabelledImages, Views, collate
from mirl.data.transforms import fixed_view, normalise
from mirl.reports.depth import FIGURES
from mirl.tasks.knn import vote
from mirl.training.drawing import save_figure
from mirl.training.monitors import Monitor
from mirl.training.runs import RunFolder

IMAGES = 256  # most held-out images for rank and similarity
ROWS = 2048  # patch tokens of which the effective rank is computed
LABELLED = 3000  # most labelled images for the read-outs, two thirds of them to fit
CHUNK = 32
NEIGHBOURS, TEMPERATURE = 20, 0.07


@dataclass(frozen=True)
class Look:
    """What one pass over images leaves, on the CPU.

    Attributes:
        rows: patch tokens [r, m, d]; similarity: of the tokens of an image, mean over images [m].
        means: mean tokens [b, m, d]; labels: [b], empty without labels.
    """

    rows: Tensor
    similarity: Tensor
    means: Tensor
    labels: Tensor


class BlockMonitor:
    """Effective rank, token similarity and, with labels, read-outs of every block.

    Args:
        encoder: one like those that will be observed.
        held_out: views of images that it is not trained on.
        labelled: a split to fit read-outs on and one to test them on, or None.
        channels, precision: of the run.
        between: training images from one evaluation to the next; a twentieth as many are looked at, or some hundreds.
    """

    def __init__(
        self, encoder: VisionTransformer, held_out: Views, labelled: tuple[LabelledSource, LabelledSource] | None,
        *, channels: int, precision: str, between: int,
    ) -> None:  # fmt: skip
        self.channels, self.precision = channels, precision
        view = partial(fixed_view, size=encoder.patch_embed.img_size)
        seen = evenly(held_out.members, min(IMAGES, max(60, between // 20)))
        self.images = Views(held_out.source, seen, view, substitute=True)
        looked_at = min(LABELLED, max(600, between // 20))
        counts = (looked_at * 2 // 3, looked_at // 3)
        self.labelled = [
            LabelledImages(split.source, evenly(split.members, count), view, labels=split.labels, substitute=True)
            for split, count in zip(labelled or (), counts, strict=False)
        ]
        self.classes = len(labelled[0].classes) if labelled else 0
        self._pending: list[tuple[ThreadPoolExecutor, Future[None]]] = []

    def observe(self, encoder: VisionTransformer, run: RunFolder, monitor: Monitor, step: int, epoch: float) -> None:
        """Compute tokens now, and what follows from them beside the training; it is recorded when it is there."""
        looks = [self._look(encoder, images) for images in (self.images, *self.labelled)]
        # One thread for this alone, with one core: OpenMP slows the training down while another thread owns a team.
        thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self._pending.append((thread, thread.submit(self._finish, run, monitor, step, epoch, *looks)))
        thread.shutdown(wait=False)

    def settle(self) -> None:
        """Wait for what is still being computed."""
        while self._pending:
            thread, result = self._pending.pop(0)
            thread.shutdown()
            result.result()

    def _finish(self, run: RunFolder, monitor: Monitor, step: int, epoch: float, look: Look, *labelled: Look) -> None:
        ranks = [effective_rank(block) for block in look.rows.unbind(1)]
        found = {"rank": ranks, "similarity": look.similarity.tolist()}
        if labelled:
            fit, test = labelled
            for a, b in zip(fit.means.unbind(1), test.means.unbind(1), strict=True):
                for name, right in read_outs(a, fit.labels, b, test.labels, self.classes).items():
                    found.setdefault(name, []).append(100 * float(right.float().mean()))
        run.record({"kind": "blocks", "step": step, "epoch": epoch, **found})
        for name, values in found.items():
            monitor.scalars(f"blocks_{name}", {f"{i:02}": value for i, value in enumerate(values, start=1)}, step)
        with run.optional("pictures/"):
            draw_blocks([row for row in run.rows() if row["kind"] == "blocks"], run.pictures / "blocks.png")

    @torch.no_grad()
    def _look(self, encoder: VisionTransformer, data: Views) -> Look:
        """Pass images through every block; tokens are normalised as the next block sees them, to compare blocks."""
        device = next(encoder.parameters()).device
        reduced = {"bf16": torch.bfloat16, "16": torch.float16}.get(self.precision)
        patches = encoder.patch_embed.num_patches
        per_image = min(patches, -(-ROWS // len(data)))
        places = torch.linspace(0, patches - 1, per_image).long().to(device)
        rows, similarities, means, labels = [], [], [], []
        for start in range(0, len(data), CHUNK):
            batch = collate([data[0, i] for i in range(start, min(start + CHUNK, len(data)))])
            labels.append(batch.labels if isinstance(batch, LabelledBatch) else torch.empty(0))
            with torch.autocast(device.type, reduced) if reduced else nullcontext():
                blocks = encoder.forward_intermediates(
                    normalise(batch.images.to(device), self.channels), intermediates_only=True, output_fmt="NLC"
                )
            tokens = [F.layer_norm(block.float(), block.shape[-1:]) for block in blocks]
            similarities.append(torch.stack([token_similarity(block) for block in tokens], dim=1).cpu())
            rows.append(torch.stack([block[:, places].flatten(0, 1) for block in tokens], dim=1).cpu())
            means.append(torch.stack([block.mean(dim=1) for block in tokens], dim=1).cpu())
        return Look(torch.cat(rows), torch.cat(similarities).mean(dim=0), torch.cat(means), torch.cat(labels))


def effective_rank(rows: Tensor) -> float:
    """Return how many directions `rows` [r, d] use: exp of the entropy of their singular values.

    RankMe (Garrido et al., 2023), Eq. (1).
    """
    values = torch.linalg.svdvals(rows.double())
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def token_similarity(tokens: Tensor) -> Tensor:
    """Return the mean cosine [b] between two different tokens of an image, of `tokens` [b, n, d]."""
    units = F.normalize(tokens, dim=-1)
    n = tokens.shape[1]
    return (units.sum(dim=1).square().sum(dim=-1) - n) / (n * (n - 1))


def read_outs(fit: Tensor, labels: Tensor, test: Tensor, truth: Tensor, classes: int) -> dict[str, Tensor]:
    """Tell for each of the test images whether a linear and a k-NN read-out find its class, bool [t] each.

    Args:
        fit, test: features [n, d] and [t, d]; labels: [n]; truth: [t].
    """
    (votes,) = vote(fit, labels, test, classes, ks=[NEIGHBOURS], temperature=TEMPERATURE).values()
    return {"linear": _ridge(fit, labels, test) == truth, "knn": votes.argmax(dim=1) == truth}


def linear_accuracy(fit: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> float:
    """Return the share of `truth` [t] that a ridge classifier on features [n, d] finds."""
    return float((_ridge(fit, labels, test) == truth).double().mean())


def _ridge(fit: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Return the classes [t] that a ridge classifier finds; its penalty is chosen on the features to fit."""
    from sklearn.linear_model import RidgeClassifierCV  # slow to import, and only labelled images need it
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=np.logspace(0, 5, 6)))
    return torch.from_numpy(classifier.fit(fit.numpy(), labels.numpy()).predict(test.numpy()))


def draw_blocks(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw each figure against the block's index, one line for each evaluation, to a PNG."""
    names = [name for name in FIGURES if name in rows[-1]]
    figure = Figure(figsize=(3.1 * len(names) + 0.8, 3.2), dpi=120, layout="constrained")
    scale = Normalize(0, max(rows[-1]["epoch"], 1e-9))
    colours = colormaps["viridis_r"]
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for row in rows:
            blocks = range(1, len(row[name]) + 1)
            axes.plot(blocks, row[name], color=colours(scale(row["epoch"])), marker=".", markersize=3, linewidth=1)
        axes.set_title(", ".join(FIGURES[name]), fontsize=8)
        axes.set_xlabel("block", fontsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    figure.colorbar(ScalarMappable(scale, colours), ax=figure.axes, label="epoch", pad=0.01)
    save_figure(figure, path)


def evenly(members: np.ndarray, count: int) -> np.ndarray:
    """Keep at most `count` members, spread evenly."""
    return members[np.unique(np.linspace(0, len(members) - 1, count).astype(int))]
