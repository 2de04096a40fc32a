"""Tiny runs, in this process and as the command that users start."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

import mirl

COMMAND = str(Path(sys.executable).with_name("mirl"))
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": ""}

PICTURES = (
    "training.loop.draw_curves", "training.loop.draw_gradients", "tasks.detection.draw_training",
    "tasks.detection.draw_found", "tasks.segmentation.draw_training", "tasks.segmentation.draw_predictions",
    "tasks.segmentation_scores.draw_confusion",
)  # fmt: skip


@contextmanager
def without_pictures() -> Iterator[None]:
    """Let detectors and segmenters train without pictures, which take longer than all else."""
    with pytest.MonkeyPatch.context() as patch:
        for name in PICTURES:
            patch.setattr(f"mirl.{name}", lambda *_, **__: None)
        yield


def flags(options):
    return [f"--{name}={value}".replace(" ", "") for name, value in options.items()]


def command(options, *more, task="pretrain", program=(COMMAND,), **popen):
    """Start `mirl pretrain`, or another task, with `options`."""
    return subprocess.Popen(
        [*program, task, *flags(options), *more], env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **popen,
    )  # fmt: skip


def finish(process):
    """Wait for a command; return its exit code, output and errors."""
    output, errors = process.communicate(timeout=200)
    return process.returncode, output, errors


def assert_one_line(code, errors, *parts):
    """Check a user's mistake: exit code 2, one line that has all `parts`."""
    lines = errors.splitlines()
    assert code == 2, f"exit code {code}: {errors}"
    assert len(lines) == 1 and lines[0].startswith("mirl"), errors
    for part in parts:
        assert re.search(part, lines[0]), f"{part!r} is not in {lines[0]!r}"


def rows(folder, kind="train"):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def losses(folder):
    """Return what a run recorded, without its times."""
    return [(kind, row["step"], row["loss"]) for kind in ("train", "held_out") for row in rows(folder, kind)]


def weights(folder):
    return load_file(Path(folder) / "autoencoder.safetensors")


def assert_same_run(left, right):
    """Check that two runs recorded the same losses and ended with the same weights, bit for bit."""
    assert losses(left) == losses(right)
    a, b = weights(left), weights(right)
    assert a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


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
