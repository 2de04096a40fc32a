"""Writing tar shards: each is a function of the images and the options, whole or not there, and checked.

A shard's own index is written after it, so whoever goes on after a kill knows which shards are done.
"""

import errno
import hashlib
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import IO, cast

import numpy as np

from mirl.data.decode import BadImage
from mirl.data.shards.cache import checksum
from mirl.data.shards.packing import shard_image
from mirl.data.shards.tar_index import BLOCK, Index, Members, scan
from mirl.data.sources import Source
from mirl.errors import UserError
from mirl.training.files import atomic

SAMPLED = 256  # images of which the number for a shard is reckoned


@dataclass(frozen=True)
class Plan:
    """Which images go into which shard of `folder`.

    Attributes:
        order: indices into `source`, in the order of writing. per_shard: images in a shard.
        resize, channels: as for `shard_image`.
    """

    source: Source
    folder: Path
    order: np.ndarray
    per_shard: int
    resize: int | None
    channels: int

    @property
    def shards(self) -> int:
        return -(-len(self.order) // self.per_shard)

    def part(self, number: int) -> np.ndarray:
        """Return the indices of a shard's images."""
        return self.order[number * self.per_shard :][: self.per_shard]

    def tar(self, number: int) -> Path:
        return self.folder / f"{number:06d}.tar"

    def index(self, number: int) -> Path:
        return self.folder / f"{number:06d}.index"


def images_per_shard(source: Source, order: np.ndarray, size: float, resize: int | None, channels: int) -> int:
    """Return how many images make shards of about `size` bytes, all equally many, from the first ones of an order.

    Raises:
        UserError: if none of those can be read.
    """
    sizes, bad = [], ""
    for index in order[:SAMPLED].tolist():
        try:
            content = shard_image(source, index, resize, channels)[1]
            sizes.append(BLOCK + _padded(len(content)))
        except BadImage as error:
            bad = f"{source.name_of(index)} {error.reason}"
    if not sizes:
        raise UserError(f"none of the first {min(len(order), SAMPLED)} images can be read, e.g. {bad}; check the data")
    shards = max(1, round(len(order) * float(np.mean(sizes)) / size))
    return -(-len(order) // shards)


def write_shard(plan: Plan, number: int) -> None:
    """Write a shard and its index, in which the images that were left out are named.

    The index has the images' own names, so that what is said of them leads to their files; the tar those of `_apart`.

    Raises:
        OSError: if it cannot be written, or does not hold what was written.
    """
    skipped: list[tuple[str, str]] = []
    with atomic(plan.tar(number)) as temporary:
        rows, names, digest = _write(temporary, _images(plan, number, skipped))
        shard, members = scan(str(temporary), plan.channels)
        if shard.problem or rows != list(members.rows()) or checksum(temporary) != digest:
            raise OSError(errno.EIO, "what was written does not read the same; check the disk")
    described = replace(shard, name=plan.tar(number).name, changed=0, sha256=digest)
    named = Members.of([(offset, size, name) for (offset, size, _), name in zip(rows, names, strict=True)])
    Index.joined([(described, named)], {"skipped": skipped}).save(plan.index(number))


def written(plan: Plan, number: int) -> Index | None:
    """Return the index of a shard that is written, None if it is not."""
    try:
        index = Index.load(plan.index(number))
        return index if plan.tar(number).stat().st_size == index.shards[0].size else None
    except (OSError, ValueError):
        return None


def _images(plan: Plan, number: int, skipped: list[tuple[str, str]]) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of each image of a shard; add those that cannot be used to `skipped`, with the reason."""
    for index in plan.part(number).tolist():
        try:
            yield shard_image(plan.source, index, plan.resize, plan.channels)
        except BadImage as error:
            skipped.append((plan.source.name_of(index), error.reason))


def _write(path: Path, images: Iterator[tuple[str, bytes]]) -> tuple[list[tuple[int, int, str]], list[str], str]:
    """Write a tar file that depends on its images alone.

    Returns:
        (offset, size, name in the tar) of each image, their own names, and the file's checksum.
    """
    rows, names = [], []
    taken: dict[str, int] = {}
    with open(path, "wb") as file:
        hashing = _Hashing(file)
        with tarfile.open(fileobj=cast(IO[bytes], hashing), mode="w", errors="surrogateescape") as tar:
            for name, content in images:
                member = tarfile.TarInfo(_apart(name, taken))  # of time 0 and user 0
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
                rows.append((tar.offset - _padded(len(content)), len(content), member.name))
                names.append(name)
                tar.members = []  # type: ignore[attr-defined]  # or it would keep them all
    return rows, names, hashing.sha256.hexdigest()


def _apart(name: str, taken: dict[str, int]) -> str:
    """Return a name in the tar that is no other's up to its first dot: webdataset makes one sample of those that are.

    Args:
        taken: such beginnings of names of this tar, and how many images would have each; this one is added.
    """
    path, suffix = os.path.splitext(name)
    folder, slash, stem = path.rpartition("/")
    begin = unique = folder + slash + stem.replace(".", "_")
    while unique in taken:
        taken[begin] += 1
        unique = f"{begin}_{taken[begin]}"
    taken[unique] = 1
    return unique + suffix


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


class _Hashing:
    """A file that knows the SHA-256 of what was written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self.tell = file.tell

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        return self.file.write(content)
