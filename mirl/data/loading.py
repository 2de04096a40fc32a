"""Batches of images that depend on (seed, epoch, sample index) alone.

Order is a function of (seed, epoch); crop, flip and mask are functions of (seed, epoch, index), drawn in the data
worker. So neither the number of workers nor of processes nor an interruption changes what a run sees.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mirl.data.decode import BadImage
from mirl.data.order import ShardOrder
from mirl.data.pictures import Picture
from mirl.data.sources import Source, beforehand, opened
from mirl.data.transforms import RandomCrop
from mirl.errors import UserError, plural
from mirl.models.masking import split
from mirl.models.patches import Size

Key = tuple[int, int]  # (epoch, sample index)
MAX_CONSECUTIVE_BAD = 100


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images, uint8 [b, c, h, w], and where in the source they came from, `indices` [b].

    `bad` lists (name, reason) of files that could not be read.
    """

    images: Tensor
    indices: Tensor
    bad: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Apply `change` to every tensor."""
        return self._changed(change)

    def to(self, device: torch.device) -> Self:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        return self.map(Tensor.pin_memory)

    def pieces(self, size: int) -> list[Self]:
        """Cut into batches of at most `size` images."""
        return [self.part(slice(i, i + size)) for i in range(0, len(self), size)]

    def part(self, images: slice) -> Self:
        """Return the batch of these images."""
        return self._changed(lambda tensor: tensor[images])

    @classmethod
    def joined(cls, batches: Sequence[Self]) -> Self:
        """Return one batch of all images of `batches`; `bad` is the first's."""
        tensors: dict[str, Any] = {name: torch.cat([getattr(b, name) for b in batches]) for name in cls._tensors()}
        return replace(batches[0], **tensors)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in self._tensors()}
        return replace(self, **changed)

    @classmethod
    def _tensors(cls) -> list[str]:
        return [field.name for field in fields(cls) if field.type is Tensor]


B = TypeVar("B", bound=Batch)


@dataclass(frozen=True, kw_only=True)
class MaskedBatch(Batch):
    """Images with patch indices `visible` [b, v] and `masked` [b, m]."""

    visible: Tensor
    masked: Tensor


@dataclass(frozen=True, kw_only=True)
class LabelledBatch(Batch):
    """Images with the indices of their classes, int64 `labels` [b]."""

    labels: Tensor


@contextmanager
def seeded(*key: int, torch_alone: bool = False) -> Iterator[None]:
    """Make random numbers of torch, NumPy and Python functions of `key` in the block; leave the CPU's as they were.

    timm's augmentations draw from all three. `torch_alone` leaves out the other two, 0.1 ms.
    """
    seeds = np.random.SeedSequence(key).generate_state(2, np.uint64)
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(int(seeds[0]))
    if torch.cuda.is_initialized():  # never in a data worker
        torch.cuda.manual_seed(int(seeds[0]))
    try:
        with nullcontext() if torch_alone else _others_seeded(int(seeds[1])):
            yield
    finally:
        torch.set_rng_state(state)


@contextmanager
def _others_seeded(seed: int) -> Iterator[None]:
    states = np.random.get_state(), random.getstate()  # noqa: NPY002
    np.random.seed(seed >> 32)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(states[0])  # noqa: NPY002
        random.setstate(states[1])


class Views(Dataset[Batch]):
    """Views of a source's `members`, one image a batch; `collate` joins them.

    Args:
        members: indices into `source`; sample i of this data set is `source.read(members[i])`.
        view: maps uint8 [c, h, w] to the model's image size; may draw random numbers. A `RandomCrop` is given pictures
            that are not decoded yet.
        smallest: (height, width); smaller images are bad images.
        key: numbers that, with (epoch, index), determine everything random.
        substitute: take the next readable image for one that cannot be read. If False the batch is empty.
    """

    torch_alone = False  # whether only torch draws random numbers, which takes less time to seed

    def __init__(
        self,
        source: Source,
        members: np.ndarray,
        view: Callable[..., Any],
        *,
        smallest: Size = (1, 1),
        key: tuple[int, ...] = (),
        substitute: bool = False,
    ) -> None:
        self.source, self.members, self.view, self.key = source, members, view, key
        self.smallest, self.substitute = smallest, substitute

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, key: Key) -> Batch:
        epoch, index = key
        bad: list[tuple[str, str]] = []
        for member in self._candidates(index):
            try:
                sample = self._open(member)
                with seeded(*self.key, epoch, index, torch_alone=self.torch_alone):
                    return replace(self._batch(sample, member), bad=tuple(bad))
            except BadImage as error:
                bad.append((self.source.name_of(member), error.reason))
        if not self.substitute:
            return Batch(images=torch.empty(0, 0, 0, 0), indices=torch.empty(0), bad=tuple(bad))
        name, reason = bad[-1]
        count = plural(len(bad), "image")
        raise UserError(f"{count} in a row cannot be used, the last: {name} {reason}; check the data")

    def __getitems__(self, keys: Sequence[Key]) -> list[Batch]:
        """Return several samples, whose files are read before the first is decoded; PyTorch asks for a batch so."""
        samples: list[Batch] = []
        ready = 0
        for number, key in enumerate(keys):
            if number == ready:
                ready += beforehand(self.source, [int(self.members[index]) for _, index in keys[number:]])
            samples.append(self[key])
        return samples

    def _candidates(self, index: int) -> Iterator[int]:
        """Return where in the source sample `index` is, then what may stand in for it."""
        for shift in range(min(MAX_CONSECUTIVE_BAD, len(self)) if self.substitute else 1):
            # Neighbours first, then ever farther: a whole broken folder must not stop the run.
            offset = shift if shift < 10 else shift * shift << max(0, shift - 50)
            yield int(self.members[(index + offset) % len(self)])

    def _batch(self, sample: Any, member: int) -> Batch:
        """Make a batch of what `_open` returned, or raise BadImage."""
        return Batch(images=self.view(sample)[None], indices=torch.tensor([member]))

    def _open(self, member: int) -> Any:
        """Return image `member` as the view takes it, and what else its batch needs, or raise BadImage."""
        if isinstance(self.view, RandomCrop):
            picture = opened(self.source, member)
            self._check_size(picture.size)
            return picture
        return self._checked(self.source.read(member))

    def _checked(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        self._check_size((height, width))
        return image

    def _check_size(self, size: Size) -> None:
        if size[0] < self.smallest[0] or size[1] < self.smallest[1]:
            smallest = f"{self.smallest[0]}x{self.smallest[1]}"
            raise BadImage(f"is {size[0]}x{size[1]} px, smaller than a patch ({smallest})")


class MaskedImages(Views):
    """Views with a random mask each.

    Args:
        patches: number of patches n; mask_ratio: share of them that is masked. The others are those of `Views`; `view`
            draws from torch's generator alone.
    """

    torch_alone = True

    def __init__(self, *views: Any, patches: int, mask_ratio: float, **options: Any) -> None:
        super().__init__(*views, **options)
        self.patches, self.mask_ratio = patches, mask_ratio

    def _batch(self, image: Tensor | Picture, member: int) -> MaskedBatch:
        images = self.view(image)[None]
        visible, masked = split(torch.rand(1, self.patches), self.mask_ratio)
        return MaskedBatch(images=images, indices=torch.tensor([member]), visible=visible, masked=masked)


class LabelledImages(Views):
    """Views with their classes: `labels` [n], one for each image of the source."""

    def __init__(self, *views: Any, labels: np.ndarray, **options: Any) -> None:
        super().__init__(*views, **options)
        self.labels = labels

    def _batch(self, image: Tensor | Picture, member: int) -> LabelledBatch:
        label = torch.tensor([int(self.labels[member])])
        return LabelledBatch(images=self.view(image)[None], indices=torch.tensor([member]), labels=label)


def collate(samples: Sequence[B]) -> B:
    """Join samples of one image, or of none, to a batch."""
    read = [sample for sample in samples if len(sample)] or samples[:1]
    return replace(read[0].joined(read), bad=tuple(bad for sample in samples for bad in sample.bad))


def spread(views: Views, count: int) -> Batch:
    """Read `count` images from all over a data set, as epoch 0 has them; fewer if some cannot be read."""
    chosen = np.unique(np.linspace(0, len(views) - 1, count).astype(int))
    return collate([views[0, int(index)] for index in chosen])


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order in which an epoch visits `count` samples."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def batch_of(step: int, jumps: Sequence[tuple[int, int]]) -> int:
    """Return the number of the batch that a step reads, which is the step's own until the first of the `jumps`."""
    since, first = next((jump for jump in reversed(jumps) if jump[0] <= step), (0, 0))
    return first + step - since


class StepSampler(Sampler[list[Key]]):
    """Keys of the micro-batches of steps `start` to `stop`, this process's share of each global batch.

    Args:
        count: samples in an epoch; batch_size: images in one step over all processes; the epoch's incomplete last
            batch is left out. micro_batch: images in one list of keys.
        rank, world_size: this process among all.
        jumps: pairs of a step and a batch: from that step on, the batches from that one on are read; the last holds.
        shards: where the samples' shards end, if they have some.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        micro_batch: int,
        *,
        seed: int,
        start: int,
        stop: int,
        rank: int,
        world_size: int,
        jumps: Sequence[tuple[int, int]] = (),
        shards: ShardOrder | None = None,
    ) -> None:
        self.count, self.batch_size, self.micro_batch, self.seed = count, batch_size, micro_batch, seed
        self.start, self.stop, self.rank, self.world_size = start, stop, rank, world_size
        self.jumps, self.shards = tuple(jumps), shards

    def __iter__(self) -> Iterator[list[Key]]:
        steps_per_epoch, share = self.count // self.batch_size, self.batch_size // self.world_size
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for batch in (batch_of(step, self.jumps) for step in range(self.start, self.stop)):
            if batch // steps_per_epoch != epoch:
                epoch = batch // steps_per_epoch
                order = self._order(epoch)
            first = (batch % steps_per_epoch) * self.batch_size + self.rank * share
            keys = [(epoch, int(index)) for index in order[first : first + share]]
            for i in range(0, share, self.micro_batch):
                yield keys[i : i + self.micro_batch]

    def _order(self, epoch: int) -> np.ndarray:
        if self.shards:
            return self.shards.epoch(self.seed, epoch, self.batch_size)
        return epoch_order(self.count, self.seed, epoch)
