"""Mistakes that a user can mend, and how lines name files, counts and the values that are allowed."""

import re
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

# Control characters, line separators, marks that turn the direction of writing, and bytes that are not UTF-8.
STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """A user's mistake: one line that says what was given, what is allowed and what to do.

    The command line prints it and exits with `exit_code`, without a traceback.
    """

    exit_code = 2


def printable(text: str) -> str:
    """Return text, such as a stranger's file name, as one line that is valid UTF-8 and does not steer a terminal."""
    return STEERING.sub(_escaped, text)


def _escaped(letter: re.Match[str]) -> str:
    code = ord(letter[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else ascii(letter[0])[1:-1]  # from os.fsdecode


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, of the system's without number and path; else its type's name."""
    said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return said.splitlines()[0]


def none_readable(images: int, bad: Sequence[tuple[str, str]]) -> UserError:
    """Return what to raise where no image can be read, of which `bad` has (name, reason)."""
    return UserError(f"none of {plural(images, 'image')} can be read, e.g. {' '.join(bad[0])}; check the data")


def plural(count: float, noun: str, ending: str = "s", *, form: str = "") -> str:
    """Return a count with its noun: 1 image, 2 images. `form` is how the number is written, such as "," or ".3g"."""
    number = f"{count:{form}}"
    return f"{number} {noun}{ending if number != '1' else ''}"


def in_words(hint: Any) -> str:
    """Return what people call the values of a type."""
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(in_words(part) for part in get_args(hint) if part is not NoneType)
    words: dict[Any, str] = {
        int: "a whole number", float: "a number", str: "text", bool: "true or false", list[float]: "numbers",
        list[int]: "numbers such as 4 12", list[str]: "one or more", tuple[int, int]: "[height,width]",
    }  # fmt: skip
    if hint not in words and get_origin(hint) in (list, tuple):
        return f"a list, each of it {in_words(get_args(hint)[0])}"
    return words.get(hint, "names and values" if get_origin(hint) is Mapping else str(hint))
