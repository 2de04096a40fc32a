"""Shards of a server: fetched once for all processes, checked, tried again, deleted when there is no room."""

import errno
import multiprocessing
import os
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem

import mirl
from mirl.data.decode import BadImage
from mirl.data.shards import cache
from mirl.data.shards.cache import ShardCache
from mirl.data.sources import open_source
from mirl.errors import UserError


class Handler(SimpleHTTPRequestHandler):
    """Serve files, or what `faults` says; keep what was asked for."""

    asked: ClassVar[list[str]] = []
    faults: ClassVar[list[str]] = []
    index_busy: ClassVar[int] = 0  # so many answers about the index, GET or HEAD

    def do_HEAD(self):
        if not self.is_busy():
            super().do_HEAD()

    def is_busy(self):
        if not (type(self).index_busy and self.path.endswith("index.safetensors")):
            return False
        type(self).index_busy -= 1
        self.send_error(503)
        return True

    def do_GET(self):
        if self.is_busy():
            return
        type(self).asked.append(self.path)
        fault = type(self).faults.pop(0) if type(self).faults and self.path.endswith(".tar") else ""
        if fault == "busy":
            self.send_error(503)
        elif fault:  # half a shard, or one of other bytes
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if fault == "half" else bytes(len(content)))
            self.close_connection = True
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve four shards; the cache is in tmp_path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "PAUSES", (0.01, 0.01))
    mirl.shard("shapes:24:32", str(tmp_path / "s"), shard_mib=0.008, workers=0)
    Handler.asked, Handler.faults, Handler.index_busy = [], [], 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def tars():
    return [path for path in Handler.asked if path.endswith(".tar")]


def test_shards_of_a_server_are_those_of_the_disk(server, tmp_path):
    local, remote = open_source(f"{tmp_path}/s"), open_source(f"{server}/s/")
    assert len(remote) == 24 and not tars()  # the index is enough to begin
    assert [remote.name_of(i).rpartition("/s/")[2] for i in range(24)] == [
        local.name_of(i).rpartition("/s/")[2] for i in range(24)
    ]
    for index in (0, 1, 23, 0):
        assert remote.read(index).equal(local.read(index))
    assert len(tars()) == 2
    again = open_source(f"{server}/s/{{000000..000099}}.tar".replace("000099", f"{len(local.ends) - 1:06d}"))
    assert again.read(1).equal(local.read(1)) and len(tars()) == 2


def test_a_fetch_is_tried_again_until_the_bytes_are_right(server, tmp_path):
    source = open_source(f"{server}/s/")
    Handler.faults = ["busy", "half"]
    assert source.read(0).equal(open_source(f"{tmp_path}/s").read(0)) and len(tars()) == 3
    Handler.faults = ["other"] * 3
    last = len(source) - 1
    for _ in range(5):
        with pytest.raises(BadImage, match=r"cannot be fetched, tried 3 times: it has another checksum"):
            source.read(last)
    assert len(tars()) == 6  # its other images do not ask again for a while
    failed = next((tmp_path / "cache").rglob("*.failed"))
    failed.write_text("")  # by a process that was killed as it wrote
    assert source.read(last).shape == (3, 32, 32)


def test_an_index_that_cannot_be_fetched_is_not_taken_for_none(server, tmp_path):
    data = f"{server}/s/{{000000..000001}}.tar"
    Handler.index_busy = 100
    with pytest.raises(UserError) as caught:
        open_source(data)
    assert str(caught.value).startswith(f"{server}/s/index.safetensors cannot be fetched, tried 3 times: 503, ")
    assert str(caught.value).endswith("; check the address and the network, and start again")
    Handler.index_busy = 2  # one HEAD and one GET
    assert len(open_source(data)) > 0 and not tars()


def test_addresses_of_other_kinds_are_refused(server):
    with pytest.raises(UserError, match=r"^'ftp://.*' has an address of another kind; give one that begins with http"):
        open_source("ftp://host/s/")


def test_a_shard_that_another_process_deletes_as_it_is_opened_is_fetched_again(server):
    source = open_source(f"{server}/s/")
    fetched, deleted = source.fetched, []

    def makes_room(shard):
        path = fetched(shard)
        if not deleted:
            deleted.append(os.unlink(path))
        return path

    source.fetched = makes_room
    assert source.read(0).shape == (3, 32, 32) and len(tars()) == 2


def test_a_missing_shard_is_not_asked_for_again_and_again(server, tmp_path):
    (tmp_path / "s" / "000000.tar").unlink()
    source = open_source(f"{server}/s/")
    for _ in range(3):
        with pytest.raises(BadImage, match="is missing"):
            source.read(0)
    assert len(tars()) == 1


def test_without_an_index_shards_are_fetched_once_to_be_indexed(server, tmp_path, capsys):
    (tmp_path / "s" / "index.safetensors").unlink()
    count = len(list((tmp_path / "s").glob("*.tar")))
    data = f"{server}/s/{{000000..{count - 1:06d}}}.tar"
    source = open_source(data)
    assert f"{count} shards without index.safetensors beside them: fetched once" in capsys.readouterr().out
    assert len(source) == 24 and source.read(5).shape == (3, 32, 32) and len(tars()) == count
    assert len(open_source(data)) == 24 and len(tars()) == count
    with pytest.raises(UserError, match=r"has no index.safetensors; name its shards"):
        open_source(f"{server}/s/")
    mirl.shard("shapes:3:48", str(tmp_path / "other"), workers=0)
    shutil.copy(tmp_path / "other" / "000000.tar", tmp_path / "s" / "000000.tar")  # another shard at that address
    os.utime(tmp_path / "s" / "000000.tar", (1, 1))  # of the same size, and http knows seconds
    changed = open_source(data)
    assert changed.read(0).shape == (3, 48, 48) and len(tars()) == count + 1
    assert len(changed) == len(open_source(data)) and len(tars()) == count + 1


def test_addresses_of_the_hub_are_shards_and_no_name_of_a_data_set(server, tmp_path, monkeypatch):
    files = LocalFileSystem()
    monkeypatch.setattr(cache, "filesystem_of", lambda url: (files, url.replace("hf://datasets/u/n", str(tmp_path))))
    folder, pattern = (open_source(f"hf://datasets/u/n/s/{name}") for name in ("", "00000{0..1}.tar"))
    assert len(folder) == 24 and folder.read(1).equal(pattern.read(1))


def test_a_new_index_at_the_same_address_is_seen(server, tmp_path):
    before = len(open_source(f"{server}/s/"))
    shutil.rmtree(tmp_path / "s")
    mirl.shard("shapes:30:32", str(tmp_path / "s"), shard_mib=0.02, workers=0)
    assert (before, len(open_source(f"{server}/s/"))) == (24, 30)
    (tmp_path / "s" / "index.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(UserError, match=r"index.safetensors cannot be used .*; put it there again, or take it away"):
        open_source(f"{server}/s/")


def test_the_shards_used_longest_ago_make_room(server, tmp_path, monkeypatch):
    size = (tmp_path / "s" / "000000.tar").stat().st_size
    monkeypatch.setenv("MIRL_CACHE_GIB", f"{2.5 * size / 2**30:.12f}")
    source = open_source(f"{server}/s/")
    assert "they will be fetched again and again" in source.warnings[0]
    firsts = [0, *source.ends[:-1].tolist()]
    kept = tmp_path / "cache" / "mirl" / "shards"
    for first in firsts[:4]:
        source.read(first)
    assert sum(path.stat().st_size for path in kept.glob("*.tar")) <= 2.5 * size
    source.read(0)  # deleted, but still open
    assert len(tars()) == 4
    open_source(f"{server}/s/").read(firsts[3])
    assert len(tars()) == 4
    open_source(f"{server}/s/").read(0)
    assert len(tars()) == 5
    usage = shutil.disk_usage(kept)
    monkeypatch.delenv("MIRL_CACHE_GIB")
    with monkeypatch.context() as patched:  # a disk that takes no further shard
        patched.setattr(shutil, "disk_usage", lambda _: usage._replace(free=cache.SPARE + size // 2))
        source = open_source(f"{server}/s/")
        assert "or the room on its disk" in source.warnings[0]
        source.read(firsts[2])
    assert source.read(0).shape == (3, 32, 32)
    assert 0 < sum(path.stat().st_size for path in kept.glob("*.tar")) <= 2.5 * size
    monkeypatch.setenv("MIRL_CACHE_GIB", "lots")
    with pytest.raises(UserError, match="MIRL_CACHE_GIB=lots is not allowed"):
        open_source(f"{server}/s/")


def test_a_quota_that_shards_fill_is_kept_to(tmp_path, monkeypatch):
    class Store:
        def get_file(self, place, to):
            if len(list(tmp_path.glob("*.tar"))) == 3:
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
            Path(to).write_bytes(bytes(99))

    monkeypatch.setattr(cache, "filesystem_of", lambda url: (Store(), url))
    monkeypatch.setattr(cache, "PAUSES", (0.01,))
    store = ShardCache(tmp_path)
    assert all(store.fetched(f"s3://b/{i}.tar", size=99).exists() for i in range(6))
    assert len(list(tmp_path.glob("*.tar"))) == 3


def test_what_killed_processes_were_fetching_is_removed(server, tmp_path):
    """But not what a living one is writing."""
    folder = tmp_path / "cache" / "mirl" / "shards"
    folder.mkdir(parents=True)
    killed, index, living = (folder / name for name in ("a.tar.tmp", "b.index.tmp", "c.tar.tmp"))
    for path in (killed, index, living):
        path.write_bytes(b"half")
    ready, done = multiprocessing.get_context("fork").Event(), multiprocessing.get_context("fork").Event()

    def write():
        with FileLock(folder / "c.lock"):
            ready.set()
            done.wait(30)

    process = multiprocessing.get_context("fork").Process(target=write)
    process.start()
    assert ready.wait(30)
    open_source(f"{server}/s/")
    assert living.exists() and not killed.exists() and not index.exists()
    done.set()
    process.join(30)
    open_source(f"{server}/s/")
    assert not living.exists()


def test_of_several_processes_one_fetches(server, tmp_path):
    begin = multiprocessing.get_context("fork").Process
    folder = tmp_path / "cache" / "x"
    processes = [begin(target=ShardCache(folder).fetched, args=(f"{server}/s/000000.tar",)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(tars()) == 1 and len(list(folder.glob("*.tar"))) == 1
