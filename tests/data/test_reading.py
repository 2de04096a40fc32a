"""A read that hangs or fails for a moment is tried again, then given up; the process goes on."""

import errno
import fcntl
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from mirl.data import reading
from mirl.data.decode import BadImage, read_image
from mirl.data.loading import Views
from mirl.data.pictures import open_picture
from mirl.data.reading import Unread, beforehand, patiently
from mirl.data.sources import open_source
from mirl.errors import UserError


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(reading, "SECONDS", 0.3)
    monkeypatch.setattr(reading, "PAUSE", 0.05)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "x.jpg"
    Image.new("RGB", (20, 10), "red").save(path)
    return path


@pytest.fixture
def hold():
    """Let a process make the kernel hold up every open of a file, as a network disk does whose server is gone."""
    holders = []

    def begin(path, seconds):
        ready, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGIO, signal.SIG_IGN)
            file = os.open(path, os.O_RDWR)
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            os.write(told, b"x")
            time.sleep(seconds)
            os._exit(0)  # which ends the lease
        holders.append(pid)
        os.close(told)
        if not os.read(ready, 1):
            pytest.skip("this file system has no leases")
        os.close(ready)
        return pid

    yield begin
    for pid in holders:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


leases = pytest.mark.skipif(not hasattr(fcntl, "F_SETLEASE"), reason="leases are Linux's")


@leases
def test_a_file_that_hangs_is_skipped_and_others_are_read(photo, tmp_path, hold):
    other = tmp_path / "y.jpg"
    Image.new("RGB", (20, 10), "blue").save(other)
    hold(photo, 60)
    began = time.monotonic()
    with pytest.raises(BadImage) as caught:
        read_image(photo)
    assert caught.value.reason == "cannot be read within 0.3 s, tried 3 times"
    assert 0.9 < time.monotonic() - began < 5
    assert read_image(other).shape == (3, 10, 20) and open_picture(other).size == (10, 20)
    with pytest.raises(BadImage, match="within 0.3 s"):
        open_picture(photo)


@leases
def test_a_file_system_that_comes_back_in_time_costs_nothing_but_time(photo, hold):
    hold(photo, 0.4)  # the first try fails, the second or third does not
    assert read_image(photo).shape == (3, 10, 20)


@leases
def test_a_file_system_that_hangs_stops_with_one_line(photo, hold, monkeypatch):
    monkeypatch.setattr(reading, "MOST_LEFT_BEHIND", 2)
    monkeypatch.setattr(reading, "_left_behind", [])
    holder = hold(photo, 60)
    with pytest.raises(UserError) as caught:
        read_image(photo)
    assert str(caught.value) == (
        f"the file system hangs: 2 reads did not come back within 0.3 s, the last of {str(photo)!r}; check the disk or "
        "the network, then add --resume"
    )
    left = list(reading._left_behind)
    assert len(left) == 2 and all(thread.is_alive() for thread in left)
    os.kill(holder, signal.SIGKILL)
    for thread in left:
        thread.join(5)
        assert not thread.is_alive()  # they end when the kernel lets them
    assert read_image(photo).shape == (3, 10, 20)  # and no longer count


def test_bytes_that_trickle_count_against_the_time(tmp_path):
    ends = os.pipe()
    stopped = threading.Event()

    def trickle():
        while not stopped.wait(0.05):
            os.write(ends[1], b"x")
        os.close(ends[1])

    writer = threading.Thread(target=trickle)
    writer.start()
    try:
        with open(ends[0], "rb", buffering=0) as file, pytest.raises(Unread, match=r"within 0\.3 s, tried 3 times"):
            try:
                patiently(lambda _: file.read(), "a pipe")
            finally:
                stopped.set()
                writer.join()
                time.sleep(0.2)  # until the readers left behind have come to the end
    finally:
        stopped.set()


@leases
def test_files_read_together_are_those_read_alone_and_one_that_hangs_holds_none_up(tmp_path, hold, monkeypatch):
    monkeypatch.setattr(reading, "_left_behind", [])
    photos = [tmp_path / f"{number}.jpg" for number in range(6)]
    for number, path in enumerate(photos):
        Image.new("RGB", (20, 10), (40 * number, 0, 0)).save(path)
    source = open_source(str(tmp_path))
    views = Views(source, np.arange(6), lambda image: image, key=(0,), smallest=(1, 1), substitute=False)
    together = views.__getitems__([(0, index) for index in range(6)])
    for sample, path in zip(together, photos, strict=True):
        assert torch.equal(sample.images[0], read_image(path))
    hold(photos[3], 60)
    photos[4].unlink()
    samples = views.__getitems__([(0, index) for index in range(6)])
    assert [len(sample.images) for sample in samples] == [1, 1, 1, 0, 0, 1]
    assert [sample.bad[0][1] for sample in samples[3:5]] == ["cannot be read within 0.3 s, tried 3 times", "is missing"]
    assert len(reading._left_behind) == 3


def test_files_are_read_together_up_to_a_size(tmp_path, monkeypatch):
    handed = []
    monkeypatch.setattr(reading, "TOGETHER", (100, 60.0))

    def read(path):
        handed.append((path, threading.current_thread().name))
        return b"x" * 40

    names = [str(number) for number in range(6)]
    calls = [(name,) for name in names]
    assert beforehand(read, calls) == 3 and [name for name, _ in handed] == names[:3]
    assert [patiently(read, name) for name in names[:3]] == [b"x" * 40] * 3 and len(handed) == 3
    assert patiently(read, "0") == b"x" * 40 and len(handed) == 4  # what was asked for is not kept
    assert beforehand(read, calls) == 3 and beforehand(read, calls[3:]) == 3
    patiently(read, "0")
    assert len(handed) == 11  # nor what was not, once others are read
    assert beforehand(read, []) == 0


def test_what_came_of_reading_together_is_the_first_try():
    handed, codes = [], {"busy": errno.EIO, "gone": errno.ENOENT}

    def read(name, part):
        handed.append((name, part))
        if name in codes:
            raise OSError(codes[name], os.strerror(codes[name]))
        return f"{name} {part}"

    calls = [("gone", 0), ("busy", 0), ("good", 0), ("good", 1)]
    assert beforehand(read, calls) == 1 + 1 + 1  # up to a value that is not bytes, whose size is not known
    assert handed == calls[:3]
    assert [patiently(read, "good", part) for part in (1, 0)] == ["good 1", "good 0"] and len(handed) == 4
    with pytest.raises(FileNotFoundError):
        patiently(read, "gone", 0)
    assert handed.count(("gone", 0)) == 1
    with pytest.raises(Unread, match=r"cannot be read \(Input/output error\), tried 3 times"):
        patiently(read, "busy", 0)
    assert handed.count(("busy", 0)) == 3
    codes.clear()
    beforehand(read, calls)  # while nothing fails any more
    assert patiently(read, "gone", 0) == "gone 0"


def failing(code, times):
    calls = []

    def read(path):
        calls.append(path)
        if len(calls) <= times:
            raise OSError(code, os.strerror(code))
        return b"content"

    return read, calls


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET])
def test_what_may_be_over_in_a_moment_is_tried_again(code):
    read, calls = failing(code, 2)
    assert patiently(read, "x") == b"content" and len(calls) == 3
    read, calls = failing(code, 3)
    with pytest.raises(Unread) as caught:
        patiently(read, "x")
    assert str(caught.value) == f"cannot be read ({os.strerror(code)}), tried 3 times"


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EACCES, errno.EISDIR])
def test_what_stays_is_not_tried_again(code):
    read, calls = failing(code, 1)
    with pytest.raises(OSError, match=os.strerror(code)):
        patiently(read, "x")
    assert len(calls) == 1


def test_a_call_that_a_signal_breaks_off_leaves_no_answer_for_the_next():
    def interrupt(*_):
        raise KeyboardInterrupt

    def slow(name):
        time.sleep(0.2)
        return name

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            patiently(slow, "first")
        assert patiently(lambda name: name, "second") == "second"
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_forked_process_reads_with_a_thread_of_its_own(photo):
    reading._end_reader()
    before = threading.active_count()
    read_image(photo)
    assert threading.active_count() == before + 1
    pid = os.fork()
    if pid == 0:
        os._exit(0 if read_image(photo).shape == (3, 10, 20) else 1)
    assert threading.active_count() == before  # a process with several threads should not fork
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert read_image(photo).shape == (3, 10, 20)


def test_threads_that_read_do_not_wait_for_each_other_and_leave_none_behind(monkeypatch):
    monkeypatch.setattr(reading, "SECONDS", 30)
    names, before = [], threading.active_count()

    def read(number):
        names.append(patiently(lambda name: (time.sleep(0.5), name)[1], number))

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(names) == [0, 1, 2, 3] and time.monotonic() - began < 1.6
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
