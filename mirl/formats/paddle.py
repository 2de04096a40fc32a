"""Open Paddle's pickled checkpoints without Paddle, and without running anything that a file asks for.

A pickle can name any function and have it called. The few names that an official checkpoint needs stand here for inert
classes of our own; any other name is refused. What a file says of sizes is never trusted: nothing is allocated that the
file does not hold, so that a few bytes cannot ask for terabytes.
"""

import math
import mmap
import pickle
import re
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mirl.errors import UserError

LARGE = 2**16  # bytes; what is read at once and larger stays in the file's pages
LONGEST_LINE = 2**13
LARGEST_KEY, MOST_ARGUMENTS, MOST_AXES = 2**31, 8, 8


class _Namespace:
    """Stands for argparse.Namespace: the options of the trainer, which are not kept."""

    def __setstate__(self, state: Any) -> None:
        pass


class _DType:
    """Stands for numpy.dtype: numbers of 1 to 8 bytes, nothing else."""

    def __init__(self, code: str, *_: Any) -> None:
        if type(code) is not str or not re.fullmatch(r"[fiub][1248]", code):
            raise pickle.UnpicklingError(f"arrays of {_brief(code)}, not of numbers")
        self.code, self.order = code, "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">", "|", "=") else "="

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


class _Array:
    """Stands for numpy.ndarray: bytes that the file holds, with a shape that they fill."""

    value: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, columns_first, raw = state
        if not (
            isinstance(dtype, _DType)
            and isinstance(raw, bytes | bytearray | memoryview)
            and type(shape) is tuple
            and len(shape) <= MOST_AXES
            and all(type(n) is int and 0 <= n < 2**63 for n in shape)
        ):
            raise pickle.UnpicklingError("an array that is not plain numbers")
        if math.prod(shape) * dtype.numpy.itemsize != len(raw):
            raise pickle.UnpicklingError(f"an array of shape {shape} in {len(raw)} bytes")
        self.value = np.frombuffer(raw, dtype.numpy).reshape(shape, order="F" if columns_first else "C")


def _reconstruct(kind: Any, *_: Any) -> _Array:
    if kind is not _Array:
        raise pickle.UnpicklingError("an array of a foreign class")
    return _Array()


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", raw))
    return array


def _named_tensor(items: Any) -> tuple[str, Any]:
    name, value = items
    if type(name) is not str:
        raise pickle.UnpicklingError("a tensor whose name is no text")
    return name, value


# All that a checkpoint needs. NumPy 2 moved modules; protocol 2 has Python 2's names, and 5 its own way with arrays.
ADMITTED: dict[str, Any] = {
    "builtins.tuple": _named_tensor,
    "__builtin__.tuple": _named_tensor,
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy._core.multiarray._reconstruct": _reconstruct,
    "numpy.core.numeric._frombuffer": _from_buffer,
    "numpy._core.numeric._frombuffer": _from_buffer,
    "numpy.ndarray": _Array,
    "numpy.dtype": _DType,
    "argparse.Namespace": _Namespace,
}


def _brief(value: Any) -> str:
    """Quote text from a file on one line; nested tuples can be written out in more space than there is."""
    return repr(value[:60]) if isinstance(value, str) else type(value).__name__


class _Mapped:
    """A file in memory-mapped pages: large pieces are not copied, and none is larger than the file."""

    def __init__(self, content: memoryview) -> None:
        self._content, self._place = content, 0

    def read(self, count: int) -> bytes | memoryview:
        start, self._place = self._place, self._place + count
        if not 0 <= count <= len(self._content) - start:
            raise EOFError("it ends too early")
        piece = self._content[start : self._place]
        return piece if count >= LARGE else bytes(piece)

    def readline(self) -> bytes:
        line, end, _ = bytes(self._content[self._place : self._place + LONGEST_LINE]).partition(b"\n")
        if not end:
            raise EOFError("it ends too early")
        self._place += len(line) + 1
        return line + end


_Python: Any = pickle._Unpickler  # its methods are not in the type stubs


class _Unpickler(_Python):  # type: ignore[misc]
    """Python's own unpickler, not C's: that one allocates as many memo slots as the file says.

    What a few bytes can repeat at length is checked before it is done: hashing nested tuples takes time that doubles
    with each level, arguments are copied at each call, and a text is encoded anew each time.
    """

    dispatch: ClassVar[dict[int, Callable[["_Unpickler"], None]]] = dict(_Python.dispatch)

    def __init__(self, file: _Mapped, size: int) -> None:
        super().__init__(file)
        self._to_encode = size  # bytes

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full == "_codecs.encode":  # how protocol 2 writes bytes
            return self._latin1
        if full not in ADMITTED:
            raise UserError(f"the checkpoint asks for {_brief(full)}, which no official checkpoint needs; not opened")
        return ADMITTED[full]

    def _latin1(self, text: str, encoding: str) -> bytes:
        if type(text) is not str or encoding != "latin1":
            raise pickle.UnpicklingError("bytes that are not encoded as latin1")
        self._to_encode -= len(text)
        if self._to_encode < 0:
            raise pickle.UnpicklingError("more encoded bytes than the file has")
        return text.encode("latin1")

    def _read_bytearray(self) -> None:  # Python's own sets the memory aside first
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("something that no official checkpoint needs")

    def _check_state(self) -> None:
        if not isinstance(self.stack[-2], _Namespace | _DType | _Array):
            raise pickle.UnpicklingError("a state for what has none")

    def _check_arguments(self) -> None:
        if type(self.stack[-1]) is not tuple or len(self.stack[-1]) > MOST_ARGUMENTS:
            raise pickle.UnpicklingError("a call that no array needs")

    def _check_key(self) -> None:
        self._check_keys(self.stack[-2:-1])

    def _check_keys(self, keys: list[Any] | None = None) -> None:
        for key in self.stack[::2] if keys is None else keys:  # the stack holds all since the mark
            if type(key) is not str and not (type(key) is int and abs(key) < LARGEST_KEY):
                raise pickle.UnpicklingError("a key that is neither a name nor a number")


def _checked(check: Callable[[_Unpickler], None], load: Callable[[_Unpickler], None]) -> Callable[[_Unpickler], None]:
    def checked(self: _Unpickler) -> None:
        check(self)
        load(self)

    return checked


for _code, _check in (
    (pickle.BUILD, _Unpickler._check_state),
    (pickle.REDUCE, _Unpickler._check_arguments),
    (pickle.NEWOBJ, _Unpickler._check_arguments),
    (pickle.SETITEM, _Unpickler._check_key),
    (pickle.SETITEMS, _Unpickler._check_keys),
    (pickle.DICT, _Unpickler._check_keys),
):
    _Unpickler.dispatch[_code[0]] = _checked(_check, _Python.dispatch[_code[0]])
_Unpickler.dispatch[pickle.BYTEARRAY8[0]] = _Unpickler._read_bytearray
for _code in (  # sets hash what they hold; the others make objects in ways that arrays do not need
    pickle.ADDITEMS, pickle.FROZENSET, pickle.NEWOBJ_EX, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4,
    pickle.NEXT_BUFFER, pickle.READONLY_BUFFER,
):  # fmt: skip
    _Unpickler.dispatch[_code[0]] = _Unpickler._refuse


class Parameters(MutableMapping[str, Tensor]):
    """Arrays of a checkpoint by name; each becomes a float32 tensor of its own when it is asked for."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self._arrays = arrays

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self._arrays[name], dtype=np.float32, order="C"))

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._arrays[name] = value.numpy()

    def __delitem__(self, name: str) -> None:
        del self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def read_checkpoint(path: str | Path) -> Parameters:
    """Return the model's parameters by their official names, in the file's layout: matrices are (in, out).

    Such a file holds {'model': {name: (tensor's name, array)}, 'optimizer', 'epoch', 'scaler', 'args'}, or the
    parameters alone. It stays mapped, not read, until they are asked for.

    Raises:
        UserError: if the file names anything beyond `ADMITTED`, or is not an official checkpoint.
    """
    try:
        with open(path, "rb") as file:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        size = len(mapped)
        content = _Unpickler(_Mapped(mapped), size).load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # a hostile file may end in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{path} is not a readable Paddle checkpoint ({reason}); download it again") from error
    model = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise UserError(f"{path} holds no 'model'; give a checkpoint that the official trainer saved")
    arrays = {str(name): value[1] if _is_named(value) else value for name, value in model.items()}
    arrays.pop("StructuredToParameterName@@", None)  # paddle.save's own table of names
    if not arrays or not all(isinstance(value, _Array) and hasattr(value, "value") for value in arrays.values()):
        raise UserError(f"{path} holds no model of named arrays; give a checkpoint that the official trainer saved")
    if sum(value.value.nbytes for value in arrays.values()) > size:  # each will get memory of its own
        raise UserError(f"{path} has one array under many names; give a checkpoint that the official trainer saved")
    return Parameters({name: value.value for name, value in arrays.items()})


def _is_named(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2
