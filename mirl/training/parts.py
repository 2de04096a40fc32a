"""Checkpoints of sharded models: a folder to which each process writes the rows of tensors that it has.

`part_00000_of_00002.pt` holds the first process's rows, and so on; joined in this order they are the tensors, so that
any number of processes can read them. `rest.pt` holds all that is not sharded.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REST = "rest.pt"
Place = tuple[str | int, ...]  # keys of nested dictionaries


class Rows:
    """A tensor whose rows lie in several files; a slice of it reads what it needs."""

    def __init__(self, parts: list[Tensor]) -> None:
        self.parts = parts
        self.shape = torch.Size([sum(len(part) for part in parts), *parts[0].shape[1:]])

    def __getitem__(self, rows: slice) -> Tensor:
        begin, end, _ = rows.indices(self.shape[0])
        pieces, first = [], 0
        for part in self.parts:
            pieces.append(part[max(begin - first, 0) : max(end - first, 0)])
            first += len(part)
        return torch.cat(pieces)


def part_name(number: int, count: int) -> str:
    """Name the file of one of `count` processes."""
    return f"part_{number:05d}_of_{count:05d}.pt"


def read(folder: Path) -> dict[str, Any]:
    """Read a state whose sharded tensors are `Rows`. Files become tensors and plain values, never code.

    Raises:
        ValueError: if a part is missing.
        Exception: nearly any, if a file is not what it should be.
    """
    names = sorted(path.name for path in folder.glob("part_*"))
    if not names or names != [part_name(i, len(names)) for i in range(len(names))]:
        raise ValueError(f"it has {', '.join(names) or 'no parts'}, and the others are missing")
    state: dict[str, Any] = torch.load(folder / REST, map_location="cpu", weights_only=True)
    parts = [torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True) for name in names]
    for *outer, last in parts[0]:
        at = state
        for key in outer:
            at = at.setdefault(key, {})
        at[last] = Rows([part[*outer, last] for part in parts])
    return state


def joined(state: Any) -> Any:
    """Return a state with whole tensors in place of `Rows`."""
    if isinstance(state, dict):
        return {key: joined(value) for key, value in state.items()}
    return state[:] if isinstance(state, Rows) else state


def leaves(state: Mapping[Any, Any], within: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Yield what nested dictionaries hold, each with its place."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from leaves(value, (*within, key))
        else:
            yield (*within, key), value


def without(state: Mapping[Any, Any], places: Mapping[Place, Any], within: Place = ()) -> dict[Any, Any]:
    """Return nested dictionaries without what is at `places`."""
    return {
        key: without(value, places, (*within, key)) if isinstance(value, dict) else value
        for key, value in state.items()
        if (*within, key) not in places
    }
