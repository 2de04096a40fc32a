"""Tiny runs, in this process and as the command that users start."""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import forks
import pytest
import torch
from safetensors.torch import load_file

import mirl
from mirl.errors import UserError

COMMAND = str(Path(sys.executable).with_name("mirl"))
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": ""}

PICTURES = (
    "training.loop.draw_curves", "training.loop.draw_gradients", "tasks.pretrain.draw", "tasks.detection.draw_training",
    "tasks.detection.draw_found", "tasks.segmentation.draw_training", "tasks.segmentation.draw_predictions",
    "tasks.segmentation_scores.draw_confusion",
)  # fmt: skip


@contextmanager
def without_pictures() -> Iterator[None]:
    """Let runs go without pictures, which take longer than all else of tiny ones."""
    with pytest.MonkeyPatch.context() as patch:
        for name in PICTURES:
            patch.setattr(f"mirl.{name}", forks.nothing)
        yield


def flags(options):
    return [f"--{name}={value}".replace(" ", "") for name, value in options.items()]


def command(options, *more, task="pretrain", environment=None, pictures=True, patches=None, **start):
    """Start `mirl pretrain`, or another task, with `options`, in a process group of its own."""
    patches = ({} if pictures else {f"mirl.{name}": forks.nothing for name in PICTURES}) | (patches or {})
    given = [task, *flags(options), *more]
    return forks.server().start(given, ENVIRONMENT | (environment or {}), patches=patches, **start)


def ranks(options, count, *more, **start):
    """Start so many processes of one run, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    of_rank = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    more = (*more, f"--devices={count}")
    return [command(options, *more, environment=environment, **start) for environment in of_rank]


def finish(process, timeout=200):
    """Wait for a command; return its exit code, output and errors."""
    output, errors = process.communicate(timeout=timeout)
    return process.returncode, output, errors


def assert_one_line(code, errors, *parts):
    """Check a user's mistake: exit code 2, one line that has all `parts`."""
    lines = errors.splitlines()
    assert code == 2, f"exit code {code}: {errors}"
    assert len(lines) == 1 and lines[0].startswith("mirl"), errors
    for part in parts:
        assert re.search(part, lines[0]), f"{part!r} is not in {lines[0]!r}"


def mistake(function, *arguments, **options):
    """Return what a user is told of a call, which is one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows(folder, kind="train"):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def losses(folder):
    """Return what a run recorded, without its times."""
    return [(kind, row["step"], row["loss"]) for kind in ("train", "held_out") for row in rows(folder, kind)]


def weights(folder):
    return load_file(Path(folder) / "autoencoder.safetensors")


TIMES = ("seconds", "data_wait", "images_per_second", "time", "timings", "examples_per_second")


def records(folder):
    """Return all that a run recorded, without times and what happened to it."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] != "incident"]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def assert_identical(left, right):
    """Check that two runs recorded the same and left the same weights and checkpoints, bit for bit."""
    left, right = Path(left), Path(right)
    assert records(left) == records(right)
    for name in ("autoencoder.safetensors", "encoder/model.safetensors"):  # whose metadata name the run folder
        torch.testing.assert_close(*(load_file(folder / name) for folder in (left, right)), rtol=0, atol=0)
    newest = [max((folder / "checkpoints").glob("step_*")) for folder in (left, right)]
    assert newest[0].name == newest[1].name
    states = [torch.load(path, weights_only=True) for path in newest]
    for part in ("model", "optimizer"):
        torch.testing.assert_close(*(state[part] for state in states), rtol=0, atol=0)


def assert_same_run(left, right):
    """Check that two runs recorded the same losses and ended with the same weights, bit for bit."""
    assert losses(left) == losses(right)
    a, b = weights(left), weights(right)
    assert a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


def assert_same_tensors(left, right):
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def wait_for_rows(folder, count, alive=lambda: True):
    """Wait until a run has recorded `count` training steps."""
    path = Path(folder) / "metrics.jsonl"
    until = time.monotonic() + 100
    while time.monotonic() < until and alive():
        if path.exists() and path.read_text().count('"train"') >= count:
            return
        time.sleep(0.005)
    raise AssertionError(f"no {count} steps in {path}")


def interrupted(options, *, after, number=signal.SIGINT):
    """Run in this process and send it a signal after so many steps; return the exception."""

    def send():
        wait_for_rows(options["out"], after)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(KeyboardInterrupt) as caught:
        mirl.pretrain(**options)
    thread.join()
    return caught.value
