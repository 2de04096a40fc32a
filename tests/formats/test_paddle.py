"""Paddle's pickles: honest files open in every protocol; hostile ones are refused in a line, at once, in no memory."""

import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
from argparse import Namespace

import numpy as np
import pytest

from mirl.errors import UserError
from mirl.formats.paddle import read_checkpoint

ARRAYS = {
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "columns_first": np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)),
    "big_endian": np.arange(5, dtype=">f4"),
    "half": np.linspace(0, 1, 7).astype(np.float16),
    "double": np.linspace(0, 1, 7),
    "long": np.array([-1, 2**40]),
    "flags": np.array([True, False]),
    "number": np.array(3.5, dtype=np.float32),
    "strided": np.arange(12, dtype=np.float32)[::3],
}
PROTO2, PROTO4, STOP = b"\x80\x02", b"\x80\x04", b"."
DICT_OF_MODEL = b"}\x8c\x05model"


class NamedTensor:
    """What Paddle's own reduction makes of a tensor: a call of `tuple` on name and array."""

    def __init__(self, name, array):
        self.name, self.array = name, array

    def __reduce__(self):
        return tuple, ((self.name, self.array),)


class Call:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def honest(protocol, arrays=None):
    model = {name: NamedTensor(f"linear_{name}", array) for name, array in (arrays or ARRAYS).items()}
    rest = {"optimizer": {"w_moment1_0": ARRAYS["half"]}, "epoch": 7, "scaler": {}, "args": Namespace(lr=0.1, taps=[1])}
    return pickle.dumps({"model": model, **rest}, protocol)


def refusal(path, content):
    """Return the one line with which `content` is refused, in seconds and a few megabytes."""
    path.write_bytes(content)
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(UserError) as caught:
            read_checkpoint(path)
        took, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert "\n" not in message and message.isprintable() and len(message) < len(str(path)) + 400
    assert took < 20, f"{took:.1f} s"  # what these files ask for would take years
    assert peak < 20e6 + 200 * len(content), f"{peak / 1e6:.0f} MB for {len(content)} bytes"
    return message.removeprefix(str(path))


def text(string):
    return b"X" + struct.pack("<I", len(string)) + string.encode()


def named(module, name):
    """Push a class or function by protocol 0's opcode."""
    return f"c{module}\n{name}\n".encode()


def array(shape, raw, dtype="f4"):
    """Return the opcodes of an array whose state is what is given."""
    made = named("numpy.core.multiarray", "_reconstruct") + b"(" + named("numpy", "ndarray") + b"tR"
    kind = named("numpy", "dtype") + b"(" + text(dtype) + b"tR"
    return made + b"(K\x01" + shape + kind + b"\x89" + raw + b"tb"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_an_honest_file_opens_in_every_protocol(protocol, tmp_path):
    (tmp_path / "a.pd").write_bytes(honest(protocol))
    opened = read_checkpoint(tmp_path / "a.pd")
    assert list(opened) == list(ARRAYS)
    for name, value in ARRAYS.items():
        np.testing.assert_array_equal(opened[name], value.astype(np.float32))
        assert opened[name].is_contiguous(), name


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_parameters_alone_open_too(protocol, tmp_path):
    (tmp_path / "a.pd").write_bytes(pickle.dumps(ARRAYS | {"StructuredToParameterName@@": {"a": "b"}}, protocol))
    opened = read_checkpoint(tmp_path / "a.pd")
    assert list(opened) == list(ARRAYS)
    np.testing.assert_array_equal(opened["columns_first"], ARRAYS["columns_first"])


MALICIOUS = {
    "posix.system": Call(os.system, "touch owned"),
    "builtins.eval": Call(eval, "open('owned', 'w')"),
    "builtins.exec": Call(exec, "open('owned', 'w')"),
    "builtins.getattr": Call(getattr, "", "join"),
    "shutil.move": Call(shutil.move, "bad.pd", "owned"),
    "numpy.load": Call(np.load, "owned"),
}


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": {"a": x}}, lambda x: {"model": {}, "args": [(x,)]}])
@pytest.mark.parametrize("name", MALICIOUS)
@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_a_pickle_that_runs_code_is_refused_by_name(protocol, name, wrap, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = name.replace("builtins", "__builtin__") if protocol < 3 else name  # as Python 2 called it
    content = pickle.dumps(wrap(MALICIOUS[name]), protocol)
    assert f"asks for '{asked}'" in refusal(tmp_path / "bad.pd", content)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'touch owned'\ntR.",  # GLOBAL
        b"(S'touch owned'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch owned'\no.",  # OBJ
        PROTO4 + b"\x8c\x02os\x8c\x06system\x93\x8c\x0btouch owned\x85R.",  # STACK_GLOBAL
        PROTO2 + named("os", "system") + b"U\x0btouch owned\x85\x81.",  # NEWOBJ
    ],
)
def test_every_way_to_a_name_is_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "asks for 'os.system'" in refusal(tmp_path / "bad.pd", content)
    assert not (tmp_path / "owned").exists()


def test_a_name_within_an_admitted_one_is_refused(tmp_path):
    content = PROTO4 + text("numpy") + text("ndarray.__class__") + b"\x93."
    assert "asks for 'numpy.ndarray.__class__'" in refusal(tmp_path / "bad.pd", content)


def test_a_refused_name_cannot_write_to_the_terminal(tmp_path):
    module = "a\n\x1b[2J" + "b" * 10_000
    content = PROTO4 + text(module) + text("c") + b"\x93."
    assert r"asks for 'a\n\x1b[2Jbbb" in refusal(tmp_path / "bad.pd", content)


def test_a_file_cannot_change_what_stands_for_its_names(tmp_path):
    reconstruct = named("numpy.core.multiarray", "_reconstruct")
    content = PROTO2 + reconstruct + b"N}" + text("__defaults__") + b"(K\x01ts\x86b."
    assert "a state for what has none" in refusal(tmp_path / "bad.pd", content)
    (tmp_path / "a.pd").write_bytes(honest(4))
    assert list(read_checkpoint(tmp_path / "a.pd")) == list(ARRAYS)


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps({"weights": 1}), pickle.dumps([1])[:-3]])
def test_what_is_no_checkpoint_is_refused(content, tmp_path):
    assert "checkpoint" in refusal(tmp_path / "bad.pd", content)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_truncated_file_is_refused_wherever_it_ends(protocol, tmp_path):
    content = honest(protocol)
    for end in range(0, len(content), 7):
        assert "not a readable Paddle checkpoint" in refusal(tmp_path / "bad.pd", content[:end]), end


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_damaged_file_opens_or_is_refused_in_a_line(protocol, tmp_path):
    content, generator = honest(protocol), np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(content)
        for place in generator.integers(len(content), size=3):
            damaged[place] = generator.integers(256)
        (tmp_path / "a.pd").write_bytes(damaged)
        try:
            read_checkpoint(tmp_path / "a.pd")
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 100 < refused < 400


HUGE = struct.pack("<Q", 2**40)
BOMBS = {
    "BINBYTES8": (PROTO4 + b"\x8e" + HUGE + STOP, "ends too early"),
    "BYTEARRAY8": (b"\x80\x05\x96" + HUGE + STOP, "ends too early"),
    "BYTEARRAY8 of 8 GB": (b"\x80\x05\x96" + struct.pack("<Q", 2**33) + STOP, "ends too early"),
    "BINUNICODE8": (PROTO4 + b"\x8d" + HUGE + STOP, "ends too early"),
    "more than any": (PROTO4 + b"\x8e" + b"\xff" * 8 + STOP, "not a readable"),
    "BINBYTES": (b"\x80\x03B" + b"\xff" * 4 + STOP, "ends too early"),
    "BINSTRING": (PROTO2 + b"T\xff\xff\xff\x7f" + STOP, "ends too early"),
    "LONG4": (PROTO2 + b"\x8b\xff\xff\xff\x7f" + STOP, "ends too early"),
    "FRAME": (PROTO4 + b"\x95" + HUGE + b"N" + STOP, "ends too early"),
    "memo index": (PROTO2 + b"}r" + struct.pack("<I", 2**31 - 1) + STOP, "no model of named arrays"),
    "memo index in text": (b"(dp9223372036854775806\n" + STOP, "no model of named arrays"),
    "shape": (PROTO2 + DICT_OF_MODEL + b"}" + text("a") + array(b"\x8a\x06\0\0\0\0\0\x10\x85", b"U\x04abcd") + b"ss" +
              STOP, "not plain numbers"),
    "objects": (pickle.dumps({"model": {"a": np.array([None])}}, 4), "arrays of 'O8', not of numbers"),
    "text": (pickle.dumps({"model": {"a": np.array(["a"])}}, 4), "not of numbers"),
    "complex numbers": (pickle.dumps({"model": {"a": np.array([1j])}}, 4), "arrays of 'c16', not of numbers"),
    "structures": (pickle.dumps({"model": {"a": np.zeros(2, [("x", "f4")])}}, 4), "not of numbers"),
    "subarrays": (PROTO2 + array(b"K\x01\x85", b"U\x04abcd", "(1000000000,1000)f4") + STOP, "not of numbers"),
    "sets": (pickle.dumps({"model": {1, 2}}, 4), "no official checkpoint needs"),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_asks_for_more_than_the_file_holds_is_refused(bomb, tmp_path):
    content, reason = BOMBS[bomb]
    assert reason in refusal(tmp_path / "bomb.pd", content)


def test_a_shape_must_be_filled_by_the_bytes(tmp_path):
    terabyte = b"\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85"
    raw = b"C\x04abcd"
    content = b"\x80\x03" + DICT_OF_MODEL + b"}" + text("a") + array(terabyte, raw) + b"ss" + STOP
    assert "an array of shape (1000000000000,) in 4 bytes" in refusal(tmp_path / "bad.pd", content)
    opened = content.replace(terabyte, b"K\x01\x85")
    (tmp_path / "good.pd").write_bytes(opened)
    np.testing.assert_array_equal(read_checkpoint(tmp_path / "good.pd")["a"], np.frombuffer(b"abcd", np.float32))


@pytest.mark.parametrize("opcodes", [b"]" * 100_000 + b"a" * 99_999, b")" + b"\x85" * 100_000, b"(" * 100_000])
def test_deep_nesting_is_refused(opcodes, tmp_path):
    assert "checkpoint" in refusal(tmp_path / "bad.pd", PROTO2 + opcodes + STOP)


DOUBLED = b")" + b"2\x86" * 100  # each tuple holds the one before twice: written out, 2**100 items


@pytest.mark.parametrize(
    "content",
    [
        b"}" + DOUBLED + b"Ns" + STOP,  # SETITEM
        b"}(" + DOUBLED + b"Nu" + STOP,  # SETITEMS
        b"(" + DOUBLED + b"Nd" + STOP,  # DICT
        b"}(" + b")" + b"\x85" * 300_000 + b"Nu" + STOP,  # so deep that hashing it would end the process
        b"\x8f(" + DOUBLED + b"\x90" + STOP,  # ADDITEMS
        b"(" + DOUBLED + b"\x91" + STOP,  # FROZENSET
        named("numpy", "dtype") + DOUBLED + b"\x85R" + STOP,
        named("builtins", "tuple") + DOUBLED + b"N\x86\x85R" + STOP,
        named("_codecs", "encode") + DOUBLED + DOUBLED + b"\x86R" + STOP,
        named("argparse", "Namespace") + b")\x81(" + DOUBLED + b"Ndb" + STOP,
        b"}" + text("model") + b"}" + text("a") + DOUBLED + b"ss" + STOP,
    ],
)
def test_tuples_that_double_are_never_written_out_or_hashed(content, tmp_path):
    assert "checkpoint" in refusal(tmp_path / "bad.pd", PROTO4 + content)


def test_what_is_kept_once_is_not_copied_many_times(tmp_path):
    many, long = 20_000, 100_000
    put, get = b"q\x01", b"h\x01"
    numbers = b"(" + b"K\x01" * long + b"t" + put + b"0"
    calls = numbers + (named("numpy", "dtype") + b"q\x020" + (b"h\x02" + get + b"R0") * many)
    assert "a call that no array needs" in refusal(tmp_path / "calls.pd", PROTO2 + calls + b"N" + STOP)

    texts = text("a" * long) + put + b"0" + text("latin1") + b"q\x030" + named("_codecs", "encode") + b"q\x020"
    texts += b"(" + (b"h\x02" + get + b"h\x03\x86R") * many + b"l"
    assert "more encoded bytes than the file has" in refusal(tmp_path / "texts.pd", PROTO2 + texts + STOP)

    states = b"}" + b"(" + b"".join(text(str(i)) + b"N" for i in range(long // 10)) + b"u" + put + b"0"
    states += named("argparse", "Namespace") + b"q\x020(" + (b"h\x02)\x81" + get + b"b") * many + b"l"
    assert "holds no 'model'" in refusal(tmp_path / "states.pd", PROTO2 + states + STOP)

    shared = np.zeros(100_000, np.int8)
    content = pickle.dumps({"model": {str(i): shared for i in range(2_000)}}, 4)
    assert "one array under many names" in refusal(tmp_path / "names.pd", content)


def test_keys_that_collide_do_not_cost_time(tmp_path):
    keys = b"".join(b"\x8a\x0c" + (i * (2**61 - 1)).to_bytes(12, "little") + b"N" for i in range(1, 20_000))
    assert "a key that is neither" in refusal(tmp_path / "bad.pd", PROTO2 + b"}(" + keys + b"u" + STOP)


def test_the_process_itself_stays_small(tmp_path):
    """Memory that tracemalloc does not see counts too: each bomb is opened where there is little of it."""
    for name, (content, _) in BOMBS.items():
        (tmp_path / f"{name}.pd").write_bytes(content)
    code = f"""
import pathlib, resource
from mirl.formats.paddle import read_checkpoint
from mirl.errors import UserError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
paths = list(pathlib.Path({str(tmp_path)!r}).glob("*.pd"))
for path in paths:
    try:
        read_checkpoint(path)
    except UserError:
        continue
    raise SystemExit(path)
print(len(paths), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    opened, grown = map(int, done.stdout.split())
    assert opened == len(BOMBS)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    assert grown * unit < 50e6
