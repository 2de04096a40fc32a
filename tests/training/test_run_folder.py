"""A run folder has one writer at a time; what is recorded in it is read whatever became of the file."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from datetime import datetime
from unittest.mock import Mock

import pytest

from mirl.errors import UserError
from mirl.training.locking import locked
from mirl.training.runs import RunFolder, read_config

# Starts a run in the folder that is given, leaves a data worker behind, and says that it is ready.
HOLDER = """
import os, sys, time
from mirl.training.runs import RunFolder
run = RunFolder(sys.argv[1], resume=len(sys.argv) > 2, overwrite=False)
run.write_config({"seed": 0})
worker = os.fork()
if worker:
    print(worker, flush=True)
time.sleep(100)
"""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def holder(folder):
    """A process that runs in the folder, with a data worker."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()
    process.stdout.close()
    os.kill(worker, signal.SIGKILL)


def start(folder, **changes):
    return RunFolder(folder, **{"resume": False, "overwrite": False} | changes)


def test_a_second_run_is_refused_until_the_first_has_ended(folder, holder):
    before = sorted(folder.iterdir())
    for given in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError) as caught:
            start(folder, **given)
        line = re.fullmatch(
            rf"{folder} is in use by process {holder.pid} on {socket.gethostname()} since (.*); wait until it ends, "
            "stop it, or choose another --out",
            str(caught.value),
        )
        assert line and datetime.strptime(line[1], "%Y-%m-%d %H:%M:%S %z")
    with pytest.raises(UserError, match=f"is in use by process {holder.pid}"), locked(folder):  # as a study does
        pytest.fail("two processes write one folder")
    assert sorted(folder.iterdir()) == before and read_config(folder) == {"seed": 0}
    assert start(folder, writes=False).rows() == []  # readers need no lock
    holder.kill()
    holder.wait()
    start(folder, resume=True).close()  # at once, although the killed run's data worker is still there
    start(folder, overwrite=True).close()


def test_the_lock_is_given_back_with_the_folder(folder):
    start(folder).close()
    code = "import sys; from mirl.training.runs import RunFolder; RunFolder(sys.argv[1], resume=False, overwrite=False)"
    assert subprocess.run([sys.executable, "-c", code, str(folder)], stderr=subprocess.DEVNULL).returncode == 0


def test_where_there_are_no_locks_a_line_says_so(folder, monkeypatch, capsys):
    def missing(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("mirl.training.locking.fcntl.lockf", missing)
    start(folder).close()
    line = f"warning: the file system of {folder} has no locks; start no second run in it"
    assert line in capsys.readouterr().out.replace("\n", "") and line in (folder / "log.txt").read_text()


def test_a_folder_of_something_else_is_left_as_it_is(tmp_path):
    (tmp_path / "photo.jpg").touch()
    for given in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match="is not empty and not a run folder; choose another --out"):
            start(tmp_path, **given)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_kill_while_a_run_is_overwritten_leaves_a_run(folder, monkeypatch):
    run = start(folder)
    run.write_config({"seed": 0})
    run.checkpoints.mkdir()
    run.close()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", Mock(side_effect=KeyboardInterrupt))
        start(folder, overwrite=True)
    run = start(folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "log.txt", "pictures"]
    run.close()


def test_lines_that_are_none_of_a_runs_are_left_out(folder):
    run = start(folder)
    good = [{"kind": "train", "step": step, "loss": 1.0} for step in (1, 2, 3)]
    run.record(good[0])
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\xfe\x00\n[1]\n3\nnull\n{}\n" + b'{"kind": "train", "step": "2"}\n{"kind": 1, "step": 2}\n')
        file.write(b'{"kind": "train", "step": NaN}\n' + b"[" * 100_000 + b'\n{"kind": "train", "st\n')
    for row in good[1:]:
        run.record(row)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    assert run.rows() == good and run.last_step() == 3
    run.forget_after(2)
    run.close()
    assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == good[:2]


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['touch ran']", "[1", "seed", "\0", "&a [*a]"])
def test_a_config_that_is_none_is_one_line_and_runs_nothing(folder, text, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder.mkdir()
    (folder / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config.yaml cannot be read: \S") as caught:
        read_config(folder)
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


def test_a_log_that_cannot_be_written_is_said_once(folder, capfd, monkeypatch):
    full = "/dev/full"
    if not os.path.exists(full):
        pytest.skip("this system has no /dev/full")
    folder.mkdir()
    (folder / "log.txt").symlink_to(full)
    run = start(folder)
    for line in ("one", "two"):
        run.say(line)
        run.note(line)
    run.close()
    output, errors = capfd.readouterr()
    said = output.splitlines()
    expected = f"{folder}/log.txt cannot be written ([Errno 28] No space left on device); lines are shown here only"
    assert said == ["one", expected, "two"] and not errors


def test_what_a_run_can_do_without_is_said_once(folder, capfd):
    run = start(folder)
    shutil.rmtree(run.pictures)
    for _ in range(2):
        with run.optional("pictures/"):
            (run.pictures / "curves.png").write_text("")
    with pytest.raises(KeyboardInterrupt), run.optional("pictures/"):
        raise KeyboardInterrupt
    run.close()
    (said,) = capfd.readouterr().out.splitlines()
    assert said.startswith("pictures/ cannot be written ([Errno 2] No such file or directory")
    assert said.endswith("; the training goes on without")
