"""Runs over images that are broken, vanish, or cost a data worker its life go on, and say what was left out."""

import io
import math
import multiprocessing
import os
import re
import signal
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import rows, without_pictures
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

import mirl
from mirl.errors import UserError
from mirl.tasks.options import resumed
from mirl.tasks.pretrain import split_off_held_out
from mirl.tasks.settings.pretraining import Pretraining
from mirl.training.runs import RunFolder, read_config

COUNT = 151  # good images; the nine broken ones of `damaged` are a little more than 5 %


@pytest.fixture(autouse=True)
def _undrawn():
    with without_pictures():
        yield


@pytest.fixture
def options(tiny, photos, tmp_path):
    quick = {"model": "vit_ti_2", "block_figures": False, "epochs": 1}
    return tiny | quick | {"data": str(photos), "out": str(tmp_path / "run")}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(COUNT):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"good_{index:03}.png")
    return folder


def header(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def damaged(folder):
    """Put broken files of nine kinds into a folder; return what is said of each."""
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole, "JPEG")
    (folder / "empty.jpg").touch()
    (folder / "truncated.jpg").write_bytes(whole.getvalue()[:-400])
    (folder / "text.jpg").write_text("not a picture\n")
    flipped = bytearray((folder / "good_000.png").read_bytes())
    flipped[len(flipped) // 2] ^= 255
    (folder / "flipped.png").write_bytes(flipped)
    (folder / "bomb.png").write_bytes(header(60_000, 60_000))
    (folder / "zero.png").write_bytes(header(0, 32))
    (folder / "dangling.png").symlink_to(folder / "nothing")
    os.mkfifo(folder / "pipe.png")
    np.save(folder / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    return {
        "empty.jpg": "is empty (0 bytes)", "truncated.jpg": "is truncated", "text.jpg": "is not an image",
        "flipped.png": "is ", "bomb.png": "is 3600 megapixels", "zero.png": "is ", "dangling.png": "is missing",
        "pipe.png": "is not a regular file", "objects.npy": "is damaged",
    }  # fmt: skip


def at_step(monkeypatch, step, happen):
    """Let something happen in a run as soon as so many steps are done."""
    record = RunFolder.record

    def recorded(run, row):
        record(run, row)
        if row["kind"] == "train" and row["step"] == step:
            happen()

    monkeypatch.setattr(RunFolder, "record", recorded)


def unusable(run):
    """Return the reasons by file name, of files that log.txt names."""
    lines = (run / "log.txt").read_text().splitlines()
    found = [re.fullmatch(r"\S+ \S+ skipped \S*/([^/ :]+): (.*)", line) for line in lines]
    names = [match[1] for match in found if match]
    assert len(names) == len(set(names))
    return {match[1]: match[2] for match in found if match}


def test_broken_files_and_files_that_vanish_are_named_once_with_their_reasons(photos, options, monkeypatch):
    expected = damaged(photos)
    (photos / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):  # the superuser, who may run this, is refused nothing
        if str(path).rstrip("/").endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    def change():
        (photos / "good_010.png").unlink()
        (photos / "good_011.png").rename(photos / "good_011.old")
        os.truncate(photos / "good_012.png", 500)
        (photos / "good_013.png").unlink()
        (photos / "good_013.png").mkdir()

    monkeypatch.setattr(os, "scandir", refuse)
    at_step(monkeypatch, 3, change)
    run = mirl.pretrain(**options | {"epochs": 4, "evaluate_epochs": 4})
    found, log = unusable(run), (run / "log.txt").read_text()
    expected |= {
        "good_010.png": "is missing", "good_011.png": "is missing", "good_012.png": "is truncated",
        "good_013.png": "is not a regular file",
    }  # fmt: skip
    assert found.keys() == expected.keys()
    for name, reason in expected.items():
        assert found[name].startswith(reason), found[name]
    assert f"warning: folders that cannot be listed, whose images are not in the data: {photos}/closed/" in log
    named = [row["text"] for row in rows(run, "incident") if row["what"] == "unusable file"]
    assert len(named) == len(expected)
    assert load_file(run / "autoencoder.safetensors")  # it came to its end


def test_few_images_of_which_most_that_are_held_out_are_broken(photos, options):
    for index in range(20, COUNT):
        (photos / f"good_{index:03}.png").unlink()
    held_out = split_off_held_out(20)[1]
    assert len(held_out) == 8 and [len(part) for part in split_off_held_out(5)] == [3, 2]
    for index in held_out[1:]:
        (photos / f"good_{index:03}.png").write_bytes(b"")
    run = mirl.pretrain(**options | {"batch_size": 4, "max_bad": 0.5, "block_figures": True})
    assert unusable(run).keys() == {f"good_{index:03}.png" for index in held_out[1:]}
    assert all(math.isfinite(row["loss"]) for row in rows(run, "held_out")) and rows(run, "blocks")


def test_the_budget_may_be_a_percentage_and_its_list_is_left(photos, options, tmp_path, monkeypatch):
    def empty():
        for index in range(40):
            (photos / f"good_{index:03}.png").write_bytes(b"")

    at_step(monkeypatch, 3, empty)
    options |= {"checkpoint_steps": 1}
    with pytest.raises(UserError) as caught:
        mirl.pretrain(**options, max_bad="1%")
    run = tmp_path / "run"
    line = re.fullmatch(
        r"(\d+) of 151 files cannot be used, more than --max_bad 0.01; mend the files listed in "
        rf"{run}/unusable.txt or raise --max_bad, then add --resume; the last good checkpoint is step (\d+)",
        str(caught.value),
    )
    assert line, caught.value
    listed = dict(text.split("\t") for text in (run / "unusable.txt").read_text().splitlines())
    assert len(listed) == int(line[1]) >= 2 and int(line[2]) >= 3
    assert set(listed.values()) == {"is empty (0 bytes)"} and set(map(os.path.basename, listed)) == set(unusable(run))
    assert read_config(run)["max_bad"] == 0.01
    given = {"data": str(photos), "out": str(run), "max_bad": 0.1}  # what it is by default, too, is taken
    assert resumed(Pretraining(**given), given, read_config(run)).max_bad == 0.1
    mirl.pretrain(**options, max_bad="50%", resume=True)
    assert rows(run, "train")[-1]["step"] == 8 and read_config(run)["max_bad"] == 0.5


@pytest.mark.parametrize("given", ["a few", "1%%", "%", "200%", "-1%"])
def test_a_budget_that_is_no_share_is_refused(given):
    with pytest.raises(UserError, match=r"^--max_bad .* is not allowed; give "):
        Pretraining(data="photos", max_bad=given)


def test_a_run_whose_data_workers_are_killed_ends_with_the_same_weights(options, tmp_path, monkeypatch):
    whole = mirl.pretrain(**options | {"out": str(tmp_path / "whole")})
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))

    def kill():
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)

    at_step(monkeypatch, 4, kill)
    run = mirl.pretrain(**options | {"workers": 2})
    (killed,) = (row for row in rows(run, "incident") if row["what"] == "worker killed")
    assert (
        killed["text"].startswith("a data worker was killed (SIGKILL")
        and killed["text"] in (run / "log.txt").read_text()
    )
    expected = load_file(whole / "autoencoder.safetensors")
    found = load_file(run / "autoencoder.safetensors")
    assert all((found[name] == expected[name]).all() for name in expected)
    losses = [[row["loss"] for row in rows(path, "train")] for path in (run, whole)]
    assert losses[0] == losses[1]
