"""Where the images of tar shards are: an index, made once from the headers alone, kept as one safetensors file.

Nothing is unpacked. What is not a regular file (links, devices, folders, sparse files) is not followed and not read;
names are only names. Offsets and sizes are held to the shard's own bytes. Symbols: s shards, n images.
"""

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import safetensors
from safetensors.numpy import save

from mirl.data.decode import image_suffixes
from mirl.data.packed import PackedStrings
from mirl.training.files import atomic

FORMAT = "mirl-shards-1"
BLOCK = tarfile.BLOCKSIZE  # every member begins at a multiple of 512 bytes
HEADER_LIMIT = 2**20  # bytes that a header with its long names may take; 1 MiB
MEMBER_LIMIT = 2**30  # bytes of the largest image; 1 GiB


@dataclass(frozen=True)
class Shard:
    """A tar file: its name or address, its bytes, the images in it, and what is wrong with it, if anything.

    `changed` is its time of modification in ns, `sha256` its checksum, `version` what its store says that changes with
    it; empty where they are not known.
    """

    name: str
    size: int
    count: int = 0
    ignored: int = 0
    changed: int = 0
    sha256: str = ""
    problem: str = ""
    version: str = ""


@dataclass(frozen=True)
class Members:
    """Images of shards: 16 bytes each and their names.

    Attributes:
        blocks: uint32 [n], offset of the image's bytes in its shard, in blocks of 512. sizes: uint32 [n], bytes.
        letters: uint8, the names one after the other. name_ends: int64 [n].
    """

    blocks: np.ndarray
    sizes: np.ndarray
    letters: np.ndarray
    name_ends: np.ndarray

    def __len__(self) -> int:
        return len(self.blocks)

    def name(self, index: int) -> str:
        return PackedStrings.of(self.letters, self.name_ends)[index]

    def rows(self) -> Iterator[tuple[int, int, str]]:
        """Yield (offset, size, name) of each."""
        for index, (block, size) in enumerate(zip(self.blocks.tolist(), self.sizes.tolist(), strict=True)):
            yield block * BLOCK, size, self.name(index)

    def part(self, start: int, stop: int) -> "Members":
        first, last = (int(self.name_ends[i - 1]) if i else 0 for i in (start, stop))
        ends = self.name_ends[start:stop] - first
        return Members(self.blocks[start:stop], self.sizes[start:stop], self.letters[first:last], ends)

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, str]]) -> "Members":
        """Return members from (offset, size, name) of each."""
        letters, ends = PackedStrings(name for _, _, name in rows).arrays()
        return cls(
            np.array([offset // BLOCK for offset, _, _ in rows], np.uint32),
            np.array([size for _, size, _ in rows], np.uint32),
            letters,
            ends,
        )

    @classmethod
    def joined(cls, parts: Sequence["Members"]) -> "Members":
        starts = np.cumsum([0, *(len(part.letters) for part in parts)])
        ends = [part.name_ends + start for part, start in zip(parts, starts, strict=False)]
        blocks, sizes, letters = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("blocks", "sizes", "letters")
        )
        return cls(blocks, sizes, letters, np.concatenate(ends))


class _Bounded:
    """A file of which `tarfile` can read no more at a time than a header takes, whatever that header declares."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= HEADER_LIMIT:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self.file.read(size)


def scan(path: str, channels: int) -> tuple[Shard, Members]:
    """Read the headers of a tar file; what is wrong with it is in `Shard.problem`, and ends the members before it.

    Raises:
        OSError: if it cannot be read.
    """
    suffixes = image_suffixes(channels)
    rows: list[tuple[int, int, str]] = []
    ignored, problem = 0, ""
    with open(path, "rb") as file:
        info = os.fstat(file.fileno())
        try:
            for member in _members(file, info.st_size):
                wanted = member.isreg() and not member.issparse() and member.size <= MEMBER_LIMIT
                if wanted and os.path.splitext(member.name)[1].lower() in suffixes and not _hidden(member.name):
                    rows.append((member.offset_data, member.size, member.name))
                elif not member.isdir():
                    ignored += 1
        except Exception as error:  # damaged archives make tarfile raise nearly every built-in exception
            if isinstance(error, OSError) and error.errno is not None:
                raise
            problem = "is cut short or damaged" if rows else _instead_of_a_tar(file)
    return Shard(path, info.st_size, len(rows), ignored, info.st_mtime_ns, problem=problem), Members.of(rows)


def _members(file: IO[bytes], size: int) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar file of `size` bytes, one after the other, or raise if it ends before its end."""
    if size > BLOCK * 2**32:
        raise tarfile.ReadError("larger than 2 TiB")
    last = -1
    with tarfile.open(fileobj=cast(IO[bytes], _Bounded(file)), mode="r:", errors="surrogateescape") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # or it would keep them all
            taken = member.size if member.isreg() and not member.issparse() else 0  # sparse: what it would be unpacked
            if not (last < member.offset_data <= member.offset_data + taken <= size):
                raise tarfile.ReadError("a member outside the file")
            last = member.offset_data
            yield member
        file.seek(tar.offset)
        end = file.read(BLOCK)
        if not end or end.strip(b"\0"):  # tarfile takes damage behind the first member for the end
            raise tarfile.ReadError("no mark of the end")


def _instead_of_a_tar(file: IO[bytes]) -> str:
    file.seek(0)
    compressed = file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
    return "is compressed; unpack it" if compressed else "is not a tar"


def _hidden(name: str) -> bool:
    """Tell what a folder's search leaves out too, such as macOS's ._a.jpg."""
    return name.rpartition("/")[2].startswith(".") or "__MACOSX" in name.split("/")


@dataclass(frozen=True)
class Index:
    """Shards, and the images of all of them in order; `about` is what made the index."""

    shards: tuple[Shard, ...]
    members: Members
    about: dict[str, Any]

    @property
    def ends(self) -> np.ndarray:
        """Number of images up to the end of each shard, int64 [s]."""
        return np.cumsum([shard.count for shard in self.shards], dtype=np.int64)

    def of_shards(self) -> dict[str, tuple[Shard, Members]]:
        """Return each shard's part by the shard's name."""
        stops = self.ends.tolist()
        return {
            shard.name: (shard, self.members.part(stop - shard.count, stop))
            for shard, stop in zip(self.shards, stops, strict=True)
        }

    @classmethod
    def joined(cls, parts: Sequence[tuple[Shard, Members]], about: dict[str, Any]) -> "Index":
        return cls(tuple(shard for shard, _ in parts), Members.joined([members for _, members in parts]), about)

    def save(self, path: Path) -> None:
        """Write the index, whole or not at all."""
        m = self.members
        tensors = {"blocks": m.blocks, "sizes": m.sizes, "letters": m.letters, "name_ends": m.name_ends}
        # One entry: safetensors writes several in any order, and the same images give the same bytes.
        metadata = {FORMAT: json.dumps({"shards": [asdict(shard) for shard in self.shards], "about": self.about})}
        with atomic(path) as temporary:  # by our own hand: save_file's files are the user's alone to read
            temporary.write_bytes(save({name: np.ascontiguousarray(t) for name, t in tensors.items()}, metadata))

    @classmethod
    def load(cls, path: Path) -> "Index":
        """Read an index that `save` wrote, from whoever it is.

        Raises:
            ValueError: if it is not whole or contradicts itself. OSError: if it cannot be read.
        """
        try:
            with safetensors.safe_open(path, framework="np") as file:
                metadata = json.loads((file.metadata() or {})[FORMAT])
                shards = tuple(Shard(**shard) for shard in metadata["shards"])
                members = Members(*(file.get_tensor(name) for name in ("blocks", "sizes", "letters", "name_ends")))
            index = cls(shards, members, metadata["about"])
            _check(index)
        except (
            safetensors.SafetensorError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise ValueError(" ".join(str(error).split())) from error
        return index


def _check(index: Index) -> None:
    """Raise ValueError unless an index keeps to what it says itself, so that it can be read without care."""
    m, counts = index.members, [shard.count for shard in index.shards]
    kinds = [(m.blocks, np.uint32), (m.sizes, np.uint32), (m.letters, np.uint8), (m.name_ends, np.int64)]
    if any(tensor.dtype != kind or tensor.ndim != 1 for tensor, kind in kinds):
        raise ValueError("has tensors of other kinds")
    texts = [value for shard in index.shards for value in (shard.name, shard.sha256, shard.problem, shard.version)]
    numbers = [value for shard in index.shards for value in (shard.size, shard.count, shard.ignored, shard.changed)]
    if not all(isinstance(text, str) and "\0" not in text for text in texts):
        raise ValueError("has shards without a name")
    if not all(isinstance(number, int) and number >= 0 for number in numbers) or not isinstance(index.about, dict):
        raise ValueError("has shards that are not described")
    if not len(m.blocks) == len(m.sizes) == len(m.name_ends) == sum(counts):
        raise ValueError("has another number of images")
    bounds = np.repeat(np.array([shard.size for shard in index.shards], np.int64), counts)
    if (m.blocks.astype(np.int64) * BLOCK + m.sizes > bounds).any() or (m.sizes > MEMBER_LIMIT).any():
        raise ValueError("has images outside their shard")
    steps = np.diff(m.name_ends, prepend=0)
    if (steps < 0).any() or (len(steps) and m.name_ends[-1] > len(m.letters)):
        raise ValueError("has names outside their block")
