"""The lists of objects in a COCO annotation file, read a key at a time; what is not of COCO's form is named."""

import gc
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from mirl.errors import UserError

FORM = "COCO annotations are an object with images, annotations and categories"
IN_WORDS = {str: "text", int: "a whole number of 64 bits", float: "a number", list: "a list of four numbers"}
NUMBERS = {int, float}


@contextmanager
def without_collection() -> Iterator[None]:
    """Pause the garbage collector, which would look through millions of new objects of which none is garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def parse(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        UserError: if it holds none.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}; give annotations that can") from error
    except (ValueError, RecursionError) as error:
        reason = printable(str(error))[:120]
        raise UserError(f"{str(path)!r} is not valid JSON ({reason}); was it cut off? Copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} holds a {type(content).__name__}; {FORM}")
    return content


def printable(text: str) -> str:
    """Return text in one line, whatever strangers call their images."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


class Table:
    """A list of objects: a row each.

    Raises:
        UserError: if `content[key]` is none, and from every method where a value is missing or of another type.
    """

    def __init__(self, path: Path, content: dict[str, Any], key: str):
        if key not in content:
            raise UserError(f"{str(path)!r} has no {key!r}; {FORM}")
        rows = content[key]
        if not isinstance(rows, list) or not set(map(type, rows)) <= {dict}:
            raise UserError(f"{str(path)!r}: {key!r} is not a list of objects; {FORM}")
        self.file, self.key = path, key
        self.rows: list[dict[str, Any]] = rows

    def column(self, key: str, types: set[type], default: Any = None) -> list[Any]:
        """Return the rows' values; those that have none get `default`, which has to be of an allowed type too."""
        values = [row.get(key, default) for row in self.rows]
        if not set(map(type, values)) <= types:
            self._refuse([type(value) in types for value in values], key, types)
        return values

    def anything(self, key: str) -> list[Any]:
        """Return the rows' values of any type, None where there is none."""
        return [row.get(key) for row in self.rows]

    def texts(self, key: str) -> list[str]:
        """Return the rows' texts."""
        return self.column(key, {str})

    def integers(self, key: str) -> NDArray[np.int64]:
        """Return the rows' whole numbers, int64 [rows]."""
        values = self.column(key, {int})
        try:
            return np.array(values, dtype=np.int64)
        except OverflowError:
            self._refuse([-(2**63) <= value < 2**63 for value in values], key, {int})

    def numbers(self, key: str, default: float) -> NDArray[np.float64]:
        """Return the rows' numbers, float64 [rows]."""
        return np.array(list(map(_to_float, self.column(key, NUMBERS, default))), dtype=np.float64)

    def boxes(self, key: str) -> NDArray[np.float64]:
        """Return the rows' lists of four numbers, float64 [rows, 4]."""
        values = self.column(key, {list})
        if not set(map(len, values)) <= {4} or not set(map(type, chain.from_iterable(values))) <= NUMBERS:
            self._refuse([len(value) == 4 and set(map(type, value)) <= NUMBERS for value in values], key, {list})
        return np.array(list(map(_to_float, chain.from_iterable(values))), dtype=np.float64).reshape(-1, 4)

    def _refuse(self, right: list[bool], key: str, types: set[type]) -> NoReturn:
        row = right.index(False)
        place = f"{self.key}[{row}]"
        if key not in self.rows[row]:
            raise UserError(f"{str(self.file)!r}: {place} has no {key!r}; add it, or leave that entry out")
        allowed = next(words for kind, words in reversed(IN_WORDS.items()) if kind in types)
        given = printable(repr(self.rows[row][key])[:40])
        raise UserError(f"{str(self.file)!r}: {key!r} of {place} is {given}; it has to be {allowed}")


def _to_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf
