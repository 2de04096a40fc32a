"""Millions of strings in one block of bytes."""

import os
from array import array
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


class PackedStrings:
    """Strings in one block of bytes: millions cost little more than their letters and travel to a worker at once."""

    def __init__(self, strings: Iterable[str] = ()):
        self._letters: bytearray | NDArray[np.uint8] = bytearray()
        self._ends: array[int] | NDArray[np.int64] = array("q")
        for string in strings:
            self.append(string)

    @classmethod
    def of(cls, letters: NDArray[np.uint8], ends: NDArray[np.int64]) -> "PackedStrings":
        """Return strings that are `letters` [l] up to each of `ends` [n], without a copy; none can be added."""
        strings = cls()
        strings._letters, strings._ends = letters, ends
        return strings

    def arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return letters [l] and ends [n], of which `of` makes the same strings."""
        return np.frombuffer(self._letters, np.uint8), np.frombuffer(self._ends, np.int64)

    def append(self, string: str) -> None:
        assert isinstance(self._letters, bytearray) and isinstance(self._ends, array)
        self._letters += os.fsencode(string)
        self._ends.append(len(self._letters))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range; there are {len(self)} strings")
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(bytes(self._letters[start : self._ends[index]]))
