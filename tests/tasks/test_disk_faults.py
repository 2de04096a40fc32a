"""A disk that is full or read-only costs a run no more than what its last checkpoint lacks; a clock costs nothing."""

import errno
import os
import subprocess
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import assert_one_line, assert_same_run, flags, interrupted, rows, without_pictures

import mirl
from mirl.cli import main
from mirl.errors import UserError
from mirl.reports.contents import read_run
from mirl.training.checkpoints import saved_steps
from mirl.training.files import fault_of_disk
from mirl.training.monitors import Monitor
from mirl.training.runs import RunFolder


class Disk:
    """A small file system of its own; sizes are as mount takes them."""

    def __init__(self, path):
        self.path, self.filler = path, path / "filler"
        path.mkdir()

    def mount(self, *options):
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(self.path)], check=True, capture_output=True
        )

    def fill(self):
        with open(self.filler, "wb", buffering=0) as file:
            for size in (2**16, 2**12, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue


@pytest.fixture
def disk(tmp_path):
    """A disk that can be filled and made larger."""
    disk = Disk(tmp_path / "disk")
    try:
        disk.mount("size=64m")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only a user who may mount file systems can fill one")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk.path)], check=True)


@pytest.fixture
def options(tiny, tmp_path):
    """Options of a run of 6 steps whose checkpoints have 3.3 MB, on a disk of its own if there is one."""
    return tiny | {"model": "vit_64x2_4", "epochs": 1, "block_figures": False, "out": str(tmp_path / "disk" / "run")}


@pytest.fixture
def quick(uninterrupted):
    """Nothing here asks what curves look like."""
    with without_pictures():
        yield


def said(run):
    return (Path(run) / "log.txt").read_text()


def test_a_disk_that_is_full_in_the_middle_of_a_save_keeps_the_earlier_checkpoints(
    disk, options, uninterrupted, quick, capfd
):
    options |= {"checkpoint_minutes": 0.0}
    disk.mount("remount", "size=8500k")  # two checkpoints and half of a third
    code = main(["pretrain", *flags(options)])
    folder = Path(options["out"]) / "checkpoints"
    assert_one_line(
        code, capfd.readouterr().err,
        f"error: cannot save {folder}/step_00000003.pt: No space left on device; the last good checkpoint is step 2; "
        "free space or permit writing, then add --resume$",
    )  # fmt: skip
    assert saved_steps(folder) == [2, 1] and not list(folder.glob("*.tmp"))
    disk.mount("remount", "size=64m")
    mirl.pretrain(**options, resume=True)
    assert "resumed at step 2 of 6" in said(options["out"])
    assert_same_run(options["out"], uninterrupted)


def test_a_disk_that_is_full_where_a_run_is_recorded_stops_it_with_one_line(
    disk, options, uninterrupted, quick, capfd, monkeypatch
):
    interrupted(options, after=1)
    (kept,) = saved_steps(Path(options["out"]) / "checkpoints")
    capfd.readouterr()
    record = RunFolder.record

    def recorded(run, row):
        record(run, row)
        if (row["kind"], row["step"]) == ("train", kept + 1):
            metrics = Path(options["out"]) / "metrics.jsonl"
            with open(metrics, "ab") as file:  # to the end of its last page; such a line is none of a run's
                file.write(b"x" * (4095 - metrics.stat().st_size % 4096) + b"\n")
            disk.fill()

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "record", recorded)
        code = main(["pretrain", *flags(options), "--resume"])
    assert_one_line(
        code, capfd.readouterr().err,
        f"error: cannot write to {options['out']}: No space left on device; the last good checkpoint is step {kept}; "
        "free space or permit writing, then add --resume$",
    )  # fmt: skip
    disk.filler.unlink()
    mirl.pretrain(**options, resume=True)
    assert_same_run(options["out"], uninterrupted)
    assert [row["step"] for row in rows(options["out"])] == [1, 2, 3, 4, 5, 6]


def test_a_disk_that_is_full_at_the_end_costs_no_training(disk, options, quick, capfd):
    options |= {"schedule": "cosine"}
    disk.mount("remount", "size=3900k")  # the last checkpoint and the pictures, and not the encoder
    code = main(["pretrain", *flags(options)])
    assert_one_line(
        code, capfd.readouterr().err,
        f"error: cannot write to {options['out']}: No space left on device; the last good checkpoint is step 6; "
        "free space or permit writing, then add --resume$",
    )  # fmt: skip
    disk.mount("remount", "size=64m")
    run = mirl.pretrain(**options, resume=True)
    assert "the run is complete (6 steps)" in said(run) and mirl.load_encoder(run)


def test_a_read_only_disk_is_one_line(disk, options):
    disk.mount("remount", "ro")
    expected = f"cannot write the run folder {options['out']}: Read-only file system; choose another --out"
    with pytest.raises(UserError, match=f"^{expected}$"):
        mirl.pretrain(**options)


def test_pictures_that_cannot_be_written_stop_no_training(options, uninterrupted, capfd):
    """They are said once, although each evaluation has some."""
    interrupted(options, after=1)
    pictures = Path(options["out"]) / "pictures"
    for name in ("step_00000006", "curves"):
        (pictures / f"{name}.png").unlink(missing_ok=True)
        (pictures / f"{name}.png").mkdir()  # in the way
    capfd.readouterr()
    mirl.pretrain(**options, resume=True)
    output = capfd.readouterr().out
    assert output.count("pictures/ cannot be written ([Errno 21] Is a directory") == 1
    assert "; the training goes on without" in output
    assert_same_run(options["out"], uninterrupted)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.EACCES])
def test_what_a_disk_does_is_told_from_mistakes_of_programs(number):
    assert fault_of_disk(OSError(number, "it says")) == os.strerror(number)
    for other in (OSError(errno.ENOENT, "gone"), OSError("without a number"), ValueError("of another kind")):
        assert fault_of_disk(other) is None


def test_curves_and_log_meet_a_full_disk_without_a_traceback(disk, capfd):
    run = RunFolder(disk.path / "run", resume=False, overwrite=False)
    disk.fill()
    with Monitor(run, start=0, steps=100, steps_per_epoch=10, images=1, advise=False) as monitor:
        for step in range(50):
            monitor.scalars("held_out", {"loss": 1.0}, step)
            run.note("a line " * 100)
    run.close()
    output, errors = capfd.readouterr()
    full = "No space left on device"
    lines = output.splitlines()
    assert len(lines) == 2 and not errors
    assert f"tensorboard/ cannot be written ([Errno 28] {full}); the training goes on without" in lines
    assert f"{run.path}/log.txt cannot be written ([Errno 28] {full}); lines are shown here only" in lines


def test_safetensors_words_for_a_full_disk_are_understood(disk):
    disk.fill()
    with pytest.raises(Exception, match="No space left") as caught:
        save_file({"weight": torch.zeros(10**5)}, disk.path / "weights.safetensors")
    assert not isinstance(caught.value, OSError) and fault_of_disk(caught.value) == os.strerror(errno.ENOSPC)


def test_a_clock_that_is_set_back_changes_nothing(options, uninterrupted, quick, monkeypatch):
    """A day back in the middle of a run, and another before it goes on."""
    clock, calls = time.time, []

    def set_back():
        calls.append(None)
        return clock() - 86_400 * ((len(calls) > 20) + (len(calls) > 10**6))

    class Calendar(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(set_back(), tz)

    monkeypatch.setattr(time, "time", set_back)
    monkeypatch.setattr("mirl.training.runs.datetime", Calendar)
    monkeypatch.setattr("mirl.training.locking.datetime", Calendar)
    interrupted(options, after=3)
    calls.extend([None] * 10**6)
    run = mirl.pretrain(**options, resume=True)
    assert_same_run(run, uninterrupted)
    assert len(saved_steps(run / "checkpoints")) == 2
    times = [datetime.fromisoformat(row["time"]) for row in rows(run, "incident")]
    assert times == sorted(times, reverse=True) and len(times) == 2  # the clock of the incidents did go back
    assert [row["step"] for row in read_run(run).rows["train"]] == [1, 2, 3, 4, 5, 6]
    curves = EventAccumulator(str(run / "tensorboard")).Reload()
    found = [(event.step, pytest.approx(event.value)) for event in curves.Scalars("held_out/loss")]
    assert found == [(row["step"], row["loss"]) for row in rows(uninterrupted, "held_out")]
