"""Features of images from a frozen encoder, at any depth: what probes, k-NN and `mirl embed` read.

Images are never masked and never augmented: one fixed view each. Symbols: b images, m blocks read, n patches, d width.
"""

import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from mirl.data.labels import LabelledSource
from mirl.data.loading import Batch, LabelledImages, Views
from mirl.data.transforms import fixed_view, standardise
from mirl.data.workers import Batches
from mirl.errors import UserError, none_readable, plural
from mirl.models.encoder import check_sizes
from mirl.models.patches import pair
from mirl.tasks.options import available_cores, default_workers
from mirl.tasks.settings.features import PIXELS, FeatureOptions, Pool, ReadingOptions
from mirl.tasks.weights import Weights, open_weights
from mirl.training.runs import console

PIXEL_SIZE = 32


class FrozenEncoder:
    """Maps uint8 images to features after some of an encoder's blocks.

    A block's features are what the model would return if that block were its last: final norm, pooling, norm after
    pooling if there is one. So the last block's are those of `timm.create_model("local-dir:...")(images)`.

    Args:
        blocks: from 1, in order; by default the last one.
        pool: "mean" over patch tokens, "cls" token, or "patch": every patch token.
        seed: of fresh weights.

    Raises:
        UserError: if the encoder has no such block or no class token, or its patches do not tile `image_size`.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        untrained: bool = False,
        blocks: Sequence[int] = (),
        pool: Pool = "mean",
        image_size: tuple[int, int] | None = None,
        precision: Literal["32", "bf16"] = "32",
        seed: int = 0,
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.size, self.channels, self.pool = image_size or weights.image_size, weights.channels, pool
        self.statistics = weights.mean, weights.deviation
        self.blocks = list(blocks) or [weights.depth]
        if self.blocks[-1] > weights.depth:
            raise UserError(f"--block {self.blocks[-1]} is not there: the encoder has {plural(weights.depth, 'block')}")
        if image_size is not None:
            check_sizes(image_size, weights.patch_size)
        self.encoder = weights.build(
            trained=not untrained, seed=seed, num_classes=0, img_size=self.size, depth=self.blocks[-1]
        ).to(self.device)
        if pool == "cls" and not self.encoder.has_class_token:
            raise UserError("this encoder has no class token; give --pool mean")
        patches = (self.encoder.patch_embed.num_patches,) if pool == "patch" else ()
        self.shape: tuple[int, ...] = (len(self.blocks), *patches, self.encoder.embed_dim)
        self.reduced = precision == "bf16"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 images [b, c, h, w] to float32 features [b, m, d], or [b, m, n, d] of patches."""
        pixels = standardise(images.to(self.device), *self.statistics)
        with torch.autocast(self.device.type, torch.bfloat16) if self.reduced else nullcontext():
            outputs = self.encoder.forward_intermediates(
                pixels, indices=[block - 1 for block in self.blocks], norm=True, intermediates_only=True,
                output_fmt="NLC", return_prefix_tokens=self.pool == "cls",
            )  # fmt: skip
            features = [self._pooled(output) for output in outputs]
        return torch.stack(features, dim=1).float()

    def _pooled(self, output: Any) -> Tensor:
        """Pool patch tokens [b, n, d]; for "cls" (patch tokens, other tokens), the class token first among these."""
        if self.pool == "patch":
            return output
        return self.encoder.fc_norm(output[1][:, 0] if self.pool == "cls" else output.mean(dim=1))


class RawPixels:
    """The images themselves, small: what any encoder must beat. Has the interface of `FrozenEncoder`."""

    def __init__(self, channels: int = 3) -> None:
        self.size, self.channels, self.blocks = (PIXEL_SIZE, PIXEL_SIZE), channels, [0]
        self.shape: tuple[int, ...] = (1, channels * PIXEL_SIZE**2)

    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 images [b, c, 32, 32] to float32 features [b, 1, c * 1024] in 0..1."""
        return images.flatten(1)[:, None].float() / 255


Encoder = FrozenEncoder | RawPixels


def open_encoder(options: FeatureOptions, *, every_block: bool = False, pool: Pool | None = None) -> Encoder:
    """Open what `--weights` names as something that maps images to features."""
    assert options.weights is not None
    if options.weights == PIXELS:
        return RawPixels()
    weights = open_weights(options.weights, say=console.print)
    return FrozenEncoder(
        weights, untrained=options.untrained, pool=pool or options.pool, precision=options.precision,
        blocks=range(1, weights.depth + 1) if every_block else [options.block] if options.block else (),
        image_size=None if options.image_size is None else pair(options.image_size),
    )  # fmt: skip


def batches(dataset: Views, size: int, workers: int | None, title: str) -> Iterator[Batch]:
    """Read a data set once, in order, `size` images at once, with a progress bar.

    Images that cannot be read are missing from the batches, which may be empty.
    """
    if workers is None:
        workers = default_workers(available_cores(), torch.cuda.is_available())
    keys = [[(0, i) for i in range(k, min(k + size, len(dataset)))] for k in range(0, len(dataset), size)]
    loader = Batches(dataset, keys, workers=workers, pin=torch.cuda.is_available())
    yield from track(loader, title, total=len(keys), console=console, transient=True, disable=not console.is_terminal)


@dataclass(frozen=True)
class Cached:
    """Features of a split, in a temporary file that memory maps, not in memory.

    Attributes:
        features: float32 [n, m, d]; labels: int64 [n]; bad: (name, reason) of files that could not be read.
    """

    features: np.ndarray
    labels: np.ndarray
    bad: tuple[tuple[str, str], ...]


def cache(encoder: Encoder, split: LabelledSource, options: ReadingOptions, title: str) -> Cached:
    """Compute the features of a split once.

    Raises:
        UserError: if none of its images can be read, or the features do not fit on the disk of temporary files.
    """
    folder, shape = tempfile.gettempdir(), (len(split), *encoder.shape)
    needed, free = 4 * math.prod(shape), shutil.disk_usage(folder).free
    if needed > free:  # writing to a mapped file on a full disk would kill the process
        raise UserError(
            f"features need {needed / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f}; set TMPDIR to a larger disk"
        )
    view = partial(fixed_view, size=encoder.size)
    dataset = LabelledImages(split.source, split.members, view, labels=split.labels)
    with tempfile.TemporaryFile() as file:  # stays until nothing maps it any more
        features = np.memmap(file, np.float32, "w+", shape=shape)
    labels = np.empty(len(split), np.int64)
    count = 0
    bad: list[tuple[str, str]] = []
    for batch in batches(dataset, options.batch_size, options.workers, title):
        bad += batch.bad
        if len(batch):
            features[count : count + len(batch)] = encoder(batch.images).cpu().numpy()
            labels[count : count + len(batch)] = batch.labels.numpy()  # type: ignore[attr-defined]
            count += len(batch)
    if not count:
        raise none_readable(len(split), bad)
    for name, reason in bad:
        console.print(f"left out {name}: {reason}", markup=False)
    return Cached(features[:count], labels[:count], tuple(bad))
