"""`mirl shard` writes what was there, the same bytes each time, whatever happens; runs on shards are exact."""

import csv
import io
import json
import multiprocessing
import os
import signal
import tarfile
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mirl
from mirl.data.shards import writing
from mirl.data.sources import open_source
from mirl.errors import UserError
from mirl.training.locking import LOCK, take_lock


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Make tmp_path the current folder, with 60 images in three folders, two broken ones and other files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    for i in range(60):
        pixels = generator.integers(0, 256, (40, 48 + i % 3, 3), dtype=np.uint8)
        path = tmp_path / "photos" / "abc"[i // 20] / f"{i:02d}.{'png' if i % 4 == 0 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (tmp_path / "photos" / "a" / "text.jpg").write_text("not a picture")
    cut = (tmp_path / "photos" / "a" / "01.jpg").read_bytes()
    (tmp_path / "photos" / "b" / "cut.jpg").write_bytes(cut[: len(cut) // 2])
    (tmp_path / "photos" / "c" / "notes.txt").touch()
    return tmp_path / "photos"


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != LOCK}


def members(folder):
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [(member.name, tar.extractfile(member).read()) for member in tar]
    return found


def test_shards_hold_the_files_bytes_under_their_paths(photos, tmp_path, capsys):
    folder = mirl.shard("photos", "out", shard_mib=0.05, workers=2)
    good = {path.relative_to(photos).as_posix(): path.read_bytes() for path in photos.rglob("[0-9]*.*")}
    found = members(tmp_path / "out")
    assert dict(found) == good and len(found) == 60
    classes = [name[0] for name, _ in found[:15]]
    assert set(classes) == set("abc")  # mixed, though folders are sorted
    assert len(list(folder.glob("*.tar"))) > 3
    said = capsys.readouterr().out
    assert "saved 60 images in" in said and "left out 2 images, listed in out/skipped.csv" in said
    rows = list(csv.reader((tmp_path / "out" / "skipped.csv").read_text().splitlines()))
    assert rows[0] == ["image", "reason"] and sorted(row[0] for row in rows[1:]) == [
        "photos/a/text.jpg",
        "photos/b/cut.jpg",
    ]
    assert any("truncated" in row[1] for row in rows)
    source = open_source("out")
    assert len(source) == 60 and source.warnings == ()
    assert {source.name_of(i).partition(".tar/")[2] for i in range(60)} == set(good)
    assert open_source("out/*.tar").read(9).equal(source.read(9))


def test_the_same_images_give_the_same_bytes(photos):
    first, second = (mirl.shard("photos", out, shard_mib=0.05, workers=n) for out, n in (("x", 0), ("y", 2)))
    assert contents(first) == contents(second)
    assert contents(mirl.shard("photos", "z", shard_mib=0.05, workers=0, seed=1)) != contents(first)
    in_order = members(mirl.shard("photos", "o", shard_mib=0.05, workers=0, shuffle=False))
    assert [name for name, _ in in_order] == sorted(name for name, _ in in_order)


def test_killed_and_started_again_it_ends_with_the_same_bytes(photos, tmp_path):
    whole = contents(mirl.shard("photos", "whole", shard_mib=0.02, workers=0))
    delay = np.random.default_rng(1)
    for kill in range(1, 4):
        child = os.fork()
        if not child:
            try:
                slow_down()
                mirl.shard("photos", "out", shard_mib=0.02, workers=1)
            finally:
                os._exit(1)
        wait_for(lambda kill=kill: len(list(tmp_path.glob("out/*.index"))) >= 2 * kill)
        time.sleep(delay.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        time.sleep(0.2)  # its worker ends with it
        before = contents(tmp_path / "out")
        time.sleep(0.2)
        assert contents(tmp_path / "out") == before
    assert "index.safetensors" not in before and len(before) < len(whole) + 10
    assert contents(mirl.shard("photos", "out", shard_mib=0.02, workers=0)) == whole
    assert contents(mirl.shard("photos", "out", shard_mib=0.02, workers=0)) == whole


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def slow_down():
    made = writing.shard_image

    def slowly(*given):
        time.sleep(0.005)
        return made(*given)

    writing.shard_image = slowly


def test_a_shard_whose_worker_is_killed_is_tried_again_once(photos, tmp_path, monkeypatch):
    made, photo = writing.shard_image, open_source("photos")
    (tmp_path / "deaths").mkdir()

    def kill_at_the_third(source, index, *rest):
        third = multiprocessing.parent_process() and photo.name_of(index).endswith("03.jpg")
        if third and len(os.listdir("deaths")) < deaths:
            (tmp_path / "deaths" / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return made(source, index, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(writing, "shard_image", kill_at_the_third)
        deaths = 2
        with pytest.raises(UserError, match=r"was killed, probably for want of memory; start again .* it goes on"):
            mirl.shard("photos", "out", shard_mib=0.05, workers=1)
        assert multiprocessing.active_children() == []
        deaths = 3
        mirl.shard("photos", "out", shard_mib=0.05, workers=1)
    assert len(os.listdir("deaths")) == 3 and len(members(tmp_path / "out")) == 60


def test_resized_images_are_smaller_and_upright(photos, tmp_path):
    (tmp_path / "large").mkdir()
    pixels = np.zeros((120, 200, 3), np.uint8)
    pixels[:, :100] = 250  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right by a quarter: white on top
    Image.fromarray(pixels).save(tmp_path / "large" / "turned.jpg", exif=exif, quality=95)
    Image.fromarray(np.dstack([pixels, pixels[..., :1]])).save(tmp_path / "large" / "alpha.webp", lossless=True)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "large" / "deep.png")
    small = Image.fromarray(pixels[:20, 90:110])
    small.save(tmp_path / "large" / "small.jpg")
    several = [Image.fromarray(pixels), small]  # as cameras write them, with a small picture to show
    several[0].save(tmp_path / "large" / "camera.jpg", "MPO", save_all=True, append_images=several[1:])
    found = dict(members(mirl.shard("large", "out", resize=60, workers=0)))
    assert sorted(found) == ["alpha.png", "camera.jpg", "deep.png", "small.jpg", "turned.jpg"]
    with Image.open(io.BytesIO(found["camera.jpg"])) as image:
        assert (image.format, image.size) == ("JPEG", (100, 60))
    for name in ("deep.png", "small.jpg"):
        assert found[name] == (tmp_path / "large" / name).read_bytes()
    source = open_source("out", channels=4)
    images = {source.name_of(i).rpartition("/")[2]: source.read(i) for i in range(5)}
    assert images["alpha.png"].shape == (4, 60, 100) and images["alpha.png"][3, :, 90].max() == 0
    assert images["turned.jpg"].shape == (4, 100, 60)
    assert images["turned.jpg"][0, 10].min() > 240 and images["turned.jpg"][0, 90].max() < 10


def test_what_data_takes_can_be_sharded(photos, tmp_path):
    first = mirl.shard("photos", "first", workers=0)
    again = mirl.shard("first/*.tar", "again", shard_mib=0.05, workers=0)
    assert sorted(members(again)) == sorted(members(first)) and len(list(again.glob("*.tar"))) > 1
    (tmp_path / "list.txt").write_text(f"photos/a/01.jpg\n{photos}/b/20.png\nphotos/../photos/c/41.jpg\n")
    names = [name for name, _ in members(mirl.shard("list.txt", "listed", shuffle=False, workers=0))]
    assert names[::2] == ["photos/a/01.jpg", "photos/photos/c/41.jpg"] and names[1].endswith("/photos/b/20.png")
    assert not names[1].startswith("/")
    generated = open_source(mirl.shard("shapes:5:32", "generated", shuffle=False, workers=0))
    shapes = open_source("shapes:5:32")
    assert all(torch.equal(generated.read(i), shapes.read(i)) for i in range(5))


def test_mistakes_are_said_in_one_line(photos, tmp_path):
    mirl.shard("photos", "out", shard_mib=1, workers=0)

    def error(*given, **options):
        with pytest.raises(UserError) as caught:
            mirl.shard(*given, **{"workers": 0} | options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert error("photos", "out", shard_mib=2) == (
        "out holds shards of other shard_mib; give a new folder, or the same options"
    )
    assert error("photos/a", "out", shard_mib=1).startswith("out holds shards of other images and names")
    assert error("photos", "photos") == "photos holds other things, e.g. a; give a new folder"
    assert "give pixels, 1 or more" in error("photos", "new", resize=0)
    assert "give more than 0" in error("photos", "new", shard_mib=0)
    (tmp_path / "file").touch()
    assert "cannot write file: File exists; mend that" in error("photos", "file")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.jpg").write_text("no")
    assert error("bad", "new") == (
        "none of the first 1 images can be read, e.g. bad/x.jpg is not an image; check the data"
    )


def test_a_folder_that_another_process_writes_is_left_alone(photos, tmp_path):
    (tmp_path / "out").mkdir()
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        lock = take_lock(tmp_path / "out")
        os.write(told, b"x")
        time.sleep(60 if lock else 0)
        os._exit(0)
    os.read(ready, 1)
    try:
        with pytest.raises(UserError, match=f"^out is in use by process {child} on "):
            mirl.shard("photos", "out", workers=0)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK]
    mirl.shard("photos", "out", workers=0)


def test_shards_that_were_lost_since_are_not_called_whole(photos, tmp_path):
    mirl.shard("photos", "out", shard_mib=0.05, workers=0)
    os.truncate(tmp_path / "out" / "000001.tar", 512)
    with pytest.raises(UserError) as caught:
        mirl.shard("photos", "out", shard_mib=0.05, workers=0)
    assert str(caught.value) == (
        "out was written before, and is not whole any more (000001.tar); delete it to write it again"
    )
    (tmp_path / "out" / "000001.tar").unlink()
    with pytest.raises(UserError, match=r"not whole any more \(.*000001.tar"):
        mirl.shard("photos", "out", shard_mib=0.05, workers=0)


def test_a_disk_that_reads_something_else_is_noticed(photos, monkeypatch):
    monkeypatch.setattr(writing, "checksum", lambda path: "0" * 64)
    with pytest.raises(UserError, match="what was written does not read the same; check the disk"):
        mirl.shard("photos", "out", workers=0)
    assert not list((photos.parent / "out").glob("*.tar"))


@contextmanager
def served(folder):
    """Serve a folder, and say nothing."""
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tiny, photos, monkeypatch):
    """Return a function that pre-trains on shards and returns the weights and the losses."""
    mirl.shard("photos", "shards", shard_mib=0.02, workers=0)
    for drawing in ("draw_curves", "draw_gradients"):
        monkeypatch.setattr(f"mirl.training.loop.{drawing}", lambda *_, **__: None)
    monkeypatch.setattr("mirl.tasks.pretrain.PretrainTask.draw", lambda *_, **__: None)

    def train(out, **options):
        folder = mirl.pretrain(**tiny | {"data": "shards", "block_figures": False, "out": out} | options)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return load_file(folder / "autoencoder.safetensors"), [r["loss"] for r in rows if r["kind"] == "train"], folder

    return train


def test_a_run_on_shards_is_the_same_wherever_they_are(run, tmp_path):
    weights, _, _ = run("runs/one")
    again, _, _ = run("runs/two", data="shards/{000000..000010}.tar", workers=2)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    os.rename("shards", "elsewhere")
    with served(tmp_path) as address:
        far, _, _ = run("runs/far", data=f"{address}/elsewhere/", workers=2)
    assert all(torch.equal(weights[name], far[name]) for name in weights)


def test_a_run_goes_on_without_a_shard_that_is_lost(run, tmp_path):
    lost = tmp_path / "shards" / "000005.tar"
    lost.unlink()
    _, losses, folder = run("runs/lost", max_bad=0.5)
    log = (folder / "log.txt").read_text()
    assert "warning: 1 of 11 shards cannot be read to the end: shards/000005.tar is missing" in log
    assert np.isfinite(losses).all() and "shards/000005.tar/" in log.split("warning:")[1]
