"""The classes of a folder's label files: its `classes.json`, or those of ADE20K.

`classes.json` is a list of names, whose values are 0, 1 ...; an object of names and values; or an object with
`classes`, either of the two or a list of objects with `index` and `name`, and `void_index` or `ignore_index`, values
that are ignored. It may be the object `semantic` of another object. 255 is ignored if it is no class.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mirl.data.decode import BadImage
from mirl.data.label_files import LARGEST_VALUE, in_words, read_values
from mirl.data.semantic import IGNORE, SemanticClass
from mirl.errors import UserError

FILE = "classes.json"
EXAMPLE = '{"classes": [{"index": 0, "name": "other"}, {"index": 1, "name": "road"}], "void_index": 255}'
ADE20K_FILE = "objectInfo150.txt"
ADE20K_CLASSES = 150
VOID_KEYS = ("void_index", "ignore_index")
LABELS_LOOKED_AT = 10


@dataclass(frozen=True)
class Vocabulary:
    """What values of label files mean.

    Attributes:
        classes: by value.
        void: values that are ignored; 255 is too, unless it is a class.
    """

    classes: tuple[SemanticClass, ...]
    void: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()

    def indices(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the class index, or IGNORE, of each value, uint8 [256], and whether it is known, bool [256]."""
        index, known = np.full(256, IGNORE, np.uint8), np.zeros(256, bool)
        values = [one.value for one in self.classes]
        index[values] = np.arange(len(values))
        known[[*values, *self.void, IGNORE]] = True
        return index, known


def read_vocabulary(root: Path, labels: Path, examples: Iterable[str]) -> Vocabulary:
    """Read what the label files of a folder mean.

    Args:
        labels: the folder of label files, in `root`.
        examples: paths of some label files.

    Raises:
        UserError: if this is said nowhere, or it makes no sense.
    """
    if (root / FILE).exists():
        return _from_json(root / FILE)
    if (root / ADE20K_FILE).exists():
        return _from_table(root / ADE20K_FILE)
    if labels.relative_to(root).as_posix() in ("annotations/training", "annotations/validation"):
        classes = tuple(SemanticClass(value, f"class {value}") for value in range(1, ADE20K_CLASSES + 1))
        note = f"taken for ADE20K; without {ADE20K_FILE} its {ADE20K_CLASSES} classes have numbers for names"
        return Vocabulary(classes, frozenset({0}), (note,))
    raise UserError(f"{str(root)!r} has no {FILE}; {_advice(examples)}")


def _advice(examples: Iterable[str]) -> str:
    """Return the file that the user can write, by the values in some label files."""
    seen = np.zeros(256, bool)
    for path in list(examples)[:LABELS_LOOKED_AT]:
        try:
            seen[read_values(path)] = True
        except BadImage as error:
            return f"write one such as {EXAMPLE} (the label {path!r} {error.reason})"
    values = np.flatnonzero(seen).tolist()
    held = f"the first labels hold {in_words(values)}"
    if len(values) > 2:  # beside a single other value it is the object
        values = [value for value in values if value != IGNORE]
    names = json.dumps({f"class {value}": value for value in values})
    return f"{held}; write it with their names: {names}"


def _from_json(path: Path) -> Vocabulary:
    content = _parsed(path)
    if isinstance(content, dict) and isinstance(content.get("semantic"), dict):
        content = content["semantic"]
    void = _void(content, path)
    pairs = [(value, name) for value, name in _pairs(content) if value not in void]
    if not pairs:
        raise UserError(f"{str(path)!r} has no classes beside void; write it as {EXAMPLE}")
    if len(pairs) > IGNORE:
        raise UserError(f"{str(path)!r} has {len(pairs)} classes; {IGNORE} are the most that labels of 8 bits allow")
    for value, name in pairs:
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{str(path)!r} has a class without a name (its value is {value!r}); write {EXAMPLE}")
        if type(value) is not int or not 0 <= value <= LARGEST_VALUE:
            raise UserError(
                f"class {name!r} of {str(path)!r} has the value {value!r}; give a whole number from 0 to "
                f"{LARGEST_VALUE}"
            )
    for what, given in (("value", [value for value, _ in pairs]), ("name", [name for _, name in pairs])):
        if repeated := [one for one in given if given.count(one) > 1]:
            raise UserError(f"{str(path)!r} has the {what} {repeated[0]!r} twice; give each class its own")
    classes = tuple(SemanticClass(value, name) for value, name in sorted(pairs))
    return Vocabulary(classes, frozenset(value for value in void if 0 <= value <= IGNORE))


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}; give one that can") from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{str(path)!r} is not valid JSON ({reason}); write it as {EXAMPLE}") from error


def _pairs(content: Any) -> list[tuple[Any, Any]]:
    """Return values and names, of whatever types the file has for them."""
    if isinstance(content, dict) and isinstance(content.get("classes"), (list, dict)):
        content = content["classes"]
    if isinstance(content, dict):
        return [(value, name) for name, value in content.items() if name not in VOID_KEYS]
    if not isinstance(content, list):
        return []
    return [
        (item.get("index"), item.get("name")) if isinstance(item, dict) else (position, item)
        for position, item in enumerate(content)
    ]


def _void(content: Any, path: Path) -> list[int]:
    given = [content[key] for key in VOID_KEYS if key in content] if isinstance(content, dict) else []
    values = [value for one in given for value in (one if isinstance(one, list) else [one]) if value is not None]
    if wrong := [value for value in values if type(value) is not int]:
        raise UserError(f"{str(path)!r} has void_index {wrong[0]!r}; give a whole number or a list of them")
    return values


def _from_table(path: Path) -> Vocabulary:
    """Read ADE20K's table, of which the first column is the value and the last the synonyms of the name."""
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}; give one that can") from error
    rows = [[cell.strip() for cell in line.split("\t") if cell.strip()] for line in lines]
    synonyms = {int(row[0]): row[-1] for row in rows if len(row) > 1 and row[0].isdecimal()}
    names = {value: text.replace(";", ",").partition(",")[0].strip() for value, text in synonyms.items()}
    if len(names) != ADE20K_CLASSES or set(names) != set(range(1, ADE20K_CLASSES + 1)):
        raise UserError(
            f"{str(path)!r} has {len(names)} classes, not ADE20K's {ADE20K_CLASSES}; copy it again, or write {FILE} "
            f"beside it, such as {EXAMPLE}"
        )
    all_names = list(names.values())
    unique = {value: name if all_names.count(name) == 1 else synonyms[value] for value, name in names.items()}
    return Vocabulary(tuple(SemanticClass(value, unique[value]) for value in sorted(unique)), frozenset({0}))
