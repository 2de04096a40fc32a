"""Shards of a server are asked for before they are read; what comes of it is what came without."""

import multiprocessing
import os
import signal
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import mirl
from mirl.data.loading import StepSampler, Views, collate
from mirl.data.order import ShardOrder
from mirl.data.shards import ahead, cache, opening
from mirl.data.shards.ahead import fetched_ahead
from mirl.data.sources import open_source
from mirl.data.workers import Batches

COUNT, BATCH = 24, 4


class Store:
    """Files of a folder behind `address`; tars come if `answers` is set, and fail so many times as `busy` says."""

    def __init__(self, folder):
        self.asked, self.answers, self.busy = [], threading.Event(), {}
        self.answers.set()
        store = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self):
                name = os.path.basename(self.path)
                if name.endswith(".tar"):
                    store.asked.append(name)
                    store.answers.wait(60)
                if store.busy.get(name):
                    store.busy[name] -= 1
                    return self.send_error(503)
                return super().do_GET()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "PAUSES", (0.01, 0.01))
    mirl.shard(f"shapes:{COUNT}:32", str(tmp_path / "s"), shard_mib=0.008, workers=0)
    made = Store(tmp_path)
    yield made
    made.answers.set()
    made.server.shutdown()
    made.server.server_close()


def views(data):
    return Views(open_source(data), np.arange(COUNT), lambda image: image.float(), substitute=True)


def sampler(data, stop=2 * COUNT // BATCH):
    order = ShardOrder.of(data.source, data.members)
    return StepSampler(COUNT, BATCH, BATCH, seed=0, start=0, stop=stop, rank=0, world_size=1, shards=order)


def until(true):
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_shards_are_asked_for_before_they_are_needed_and_batches_are_the_same(store, tmp_path):
    local, remote = views(f"{tmp_path}/s"), views(f"{store.address}/s/")
    assert fetched_ahead((keys := sampler(local)), local, processes=1) is keys
    shards = {os.path.basename(shard.name) for shard in remote.source.index.shards}
    assert len(shards) > ahead.AT_ONCE and remote.source.ahead == len(shards)
    coming = iter(fetched_ahead(sampler(remote), remote, processes=1))
    first = next(coming)
    kept = tmp_path / "cache" / "mirl" / "shards"
    until(lambda: len(list(kept.glob("*.tar"))) == len(shards) + 1)  # and the index, though nothing was read yet
    assert [first, *coming] == list(sampler(remote))
    batches = Batches(remote, fetched_ahead(sampler(remote), remote, processes=1), workers=1, pin=False)
    for batch, expected in zip(batches, Batches(local, sampler(local), workers=0, pin=False), strict=True):
        assert batch.images.equal(expected.images) and batch.indices.equal(expected.indices) and not batch.bad
    assert sorted(store.asked) == sorted(shards)  # each once
    assert multiprocessing.active_children() == []


def test_no_more_shards_are_fetched_than_have_room_beside_those_that_are_read(store, monkeypatch):
    data, fetched = views(f"{store.address}/s/"), []

    @contextmanager
    def noted(_):
        yield fetched.append

    monkeypatch.setattr(ahead, "_fetching", noted)
    keys = [[(epoch, index)] for epoch in (0, 1) for index in range(COUNT)]
    number = {shard.name: i for i, shard in enumerate(data.source.index.shards)}
    for room, processes, reach, beside in ((2, 1, 99, 2), (5, 2, 99, 2), (1, 2, 99, 0), (9, 1, 2, 1)):
        monkeypatch.setattr(ahead, "REACH", reach)
        data.source.ahead = room
        most, needed = 0, 0
        fetched.clear()
        for (batch,), expected in zip(fetched_ahead(keys, data, processes=processes), keys, strict=True):
            assert [batch] == expected
            needed = batch[0] * len(number) + data.source.shard_of(batch[1]) + 1
            assert len(fetched) >= needed
            most = max(most, len(fetched) - needed)
        assert most == beside
        assert [number[shard.name] for shard in fetched] == [*range(len(number))] * 2
    sizes, window = [3] * 50, 3 * (opening.WINDOW + opening.HELD_OUT_SHARDS)
    rooms = (window - 1, window, window + 8, 150)
    assert [opening._ahead(sizes, room) for room in rooms] == [None, 0, 2, 50]
    assert opening._ahead([], 0) is opening._ahead([0], 9) is None


def test_a_shard_that_cannot_be_fetched_is_tried_and_named_by_its_reader(store, tmp_path):
    (tmp_path / "s" / "000001.tar").unlink()
    store.busy["000002.tar"] = tries = 1 + len(cache.PAUSES)
    data = views(f"{store.address}/s/")
    coming = iter(fetched_ahead(sampler(data, stop=COUNT // BATCH), data, processes=1))
    first = next(coming)
    until(lambda: store.asked.count("000002.tar") == tries and "000001.tar" in store.asked)
    batches = [collate(data.__getitems__(keys)) for keys in (first, *coming)]
    reasons = {(name.rpartition("/s/")[2].partition("/")[0], reason) for batch in batches for name, reason in batch.bad}
    assert reasons == {("000001.tar", "is missing")}
    assert store.asked.count("000002.tar") == tries + 1


def test_the_process_that_fetches_can_be_lost_and_ends_at_once(store):
    data = views(f"{store.address}/s/")
    store.answers.clear()
    coming = fetched_ahead(sampler(data), data, processes=1)
    first = next(coming)
    (process,) = multiprocessing.active_children()
    until(lambda: len(store.asked) == ahead.AT_ONCE)
    os.kill(process.pid, signal.SIGINT)  # as Ctrl-C does to all
    process.join(10)
    assert process.exitcode == -signal.SIGINT
    assert [first, *coming] == list(sampler(data))
    coming = fetched_ahead(sampler(data), data, processes=1)
    next(coming)
    began = time.monotonic()
    coming.close()
    assert multiprocessing.active_children() == [] and time.monotonic() - began < 5
