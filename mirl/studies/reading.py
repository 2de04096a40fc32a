"""From what YAML says to dataclasses: names and types are checked, mistakes are one line."""

import dataclasses
import difflib
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mirl.errors import UserError, in_words

Kind = TypeVar("Kind")


def build(kind: type[Kind], given: Any, what: str, **known: Any) -> Kind:
    """Build the dataclass `kind`, and those in it, from a mapping; fields that are `known` may not be in it.

    Args:
        what: the name in errors.

    Raises:
        UserError: if `given` is no mapping, or a name is unknown or missing, or a value is of another type.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"{what} is {given!r}; give names and values")
    fields = [field for field in dataclasses.fields(kind) if field.name not in known]  # type: ignore[arg-type]
    names = [field.name for field in fields]
    if unknown := [str(name) for name in given if name not in names]:
        close = difflib.get_close_matches(unknown[0], names, n=3) or names
        raise UserError(f"{what} has no option {unknown[0]!r}; choose {', '.join(close)}")
    for field in fields:
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in given:
            raise UserError(f"{what} has no {field.name}; add it")
    hints = get_type_hints(kind)
    return kind(**{name: _convert(value, hints[name], f"{what}: {name}") for name, value in given.items()}, **known)


def _convert(value: Any, hint: Any, what: str) -> Any:
    """Return `value` as the type `hint` wants it: lists as tuples, mappings as dataclasses."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if dataclasses.is_dataclass(kind):
        return build(kind, value, what)  # type: ignore[arg-type]
    if kind in (Union, UnionType):
        for part in parts:
            try:
                return _convert(value, part, what)
            except UserError:
                continue
    elif kind is Any or (kind is Literal and value in parts) or (kind is NoneType and value is None):
        return value
    elif kind in (list, tuple) and isinstance(value, list):
        return kind(_convert(each, parts[0], f"{what}, number {i}") for i, each in enumerate(value, start=1))
    elif kind is Mapping and isinstance(value, Mapping):
        return {name: _convert(each, parts[1], f"{what}: {name}") for name, each in value.items()}
    elif type(value) is kind or (kind is float and type(value) is int):
        return value
    raise UserError(f"{what} {value!r} is not allowed; give {in_words(hint)}")
