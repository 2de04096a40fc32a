"""The lists of objects in a COCO annotation file, read a key at a time; rows with values of another type are found."""

import gc
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirl.errors import UserError, printable

FORM = "COCO annotations are an object with images, annotations and categories"
NO_INTEGER = -(2**63)  # in place of what is no whole number: no id or size is so low


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


class Table:
    """A list of objects: a row each.

    Attributes:
        faults: bool [rows] for each kind of mistake, true where a row has it. Every column that is read adds its own.

    Raises:
        UserError: if `content[key]` is no list.
    """

    def __init__(self, path: Path, content: dict[str, Any], key: str):
        if key not in content:
            raise UserError(f"{str(path)!r} has no {key!r}; {FORM}")
        rows = content[key]
        if not isinstance(rows, list):
            raise UserError(f"{str(path)!r}: {key!r} is not a list of objects; {FORM}")
        self.file = path
        self.rows: list[dict[str, Any]] = [row if isinstance(row, dict) else {} for row in rows]
        self.faults = {"not an object": np.array([not isinstance(row, dict) for row in rows], dtype=bool)}

    def anything(self, key: str) -> list[Any]:
        """Return the rows' values of any type, None where there is none."""
        return [row.get(key) for row in self.rows]

    def texts(self, key: str) -> list[str]:
        """Return the rows' texts, empty where there is none."""
        return self._column(key, _text, "a text", "")

    def integers(self, key: str) -> NDArray[np.int64]:
        """Return the rows' whole numbers, int64 [rows], `NO_INTEGER` where there is none."""
        return np.array(self._column(key, _integer, "a whole number of 64 bits", NO_INTEGER), dtype=np.int64)

    def flags(self, key: str) -> NDArray[np.bool_]:
        """Return whether the rows have 1, bool [rows]; null or nothing is 0."""
        return np.array(self._column(key, _flag, "0 or 1", False, optional=True), dtype=bool)

    def numbers(self, key: str) -> NDArray[np.float64]:
        """Return the rows' numbers, float64 [rows], NaN where there is null or nothing."""
        return np.array(self._column(key, _number, "a number", math.nan, optional=True), dtype=np.float64)

    def boxes(self, key: str) -> NDArray[np.float64]:
        """Return the rows' lists of four numbers, float64 [rows, 4], NaN where there is none."""
        values = self._column(key, _four_numbers, "four numbers", [math.nan] * 4)
        return np.array(values, dtype=np.float64).reshape(-1, 4)

    def _column(
        self, key: str, convert: Callable[[Any], Any], what: str, blank: Any, *, optional: bool = False
    ) -> list[Any]:
        """Return converted values, `blank` where there is none; note where a value is missing or converts to None."""
        absent, why = (blank, f"{key} not {what}") if optional else (None, f"{key} missing or not {what}")
        values = [absent if value is None else convert(value) for value in self.anything(key)]
        self.faults[why] = np.array([value is None for value in values], dtype=bool)
        return [blank if value is None else value for value in values]


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _integer(value: Any) -> int | None:
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and NO_INTEGER < value < -NO_INTEGER else None


def _flag(value: Any) -> bool | None:
    return bool(value) if value in (0, 1) else None


def _number(value: Any) -> float | None:
    if type(value) not in (int, float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _four_numbers(value: Any) -> list[float] | None:
    if not isinstance(value, list) or len(value) != 4:
        return None
    numbers = [number for number in map(_number, value) if number is not None]
    return numbers if len(numbers) == 4 else None
