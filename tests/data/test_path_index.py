"""A search for images is remembered where it took long, and believed only as long as nothing has changed."""

import os
import pickle
import time
from pathlib import Path

import pytest
from PIL import Image

from mirl.data import path_index
from mirl.data.sources import open_source
from mirl.errors import UserError


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder of images in two folders, as if made an hour ago, and a cache folder of its own."""
    monkeypatch.setattr(path_index, "FROM", 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in ("a/1.png", "a/2.png", "b/3.png", "notes.txt"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "list.txt").write_text("photos/a/1.png\nphotos/b/3.png\nphotos/a/2.png\n")
    old(tmp_path)
    return tmp_path


def old(folder, hours=1):
    then = time.time() - 3600 * hours
    for path in (folder, *folder.rglob("*")):
        if "cache" not in path.parts:
            os.utime(path, (then, then))


def names(source):
    return [source.name_of(index) for index in range(len(source))]


def index_files(place):
    return sorted((place / "cache" / "mirl" / "paths").glob("*"))


@pytest.mark.parametrize("data", ["photos", "list.txt"])
def test_the_second_start_finds_the_same_without_a_search(place, monkeypatch, data):
    first = open_source(data)
    assert not first.remembered
    (file,) = index_files(place)
    with monkeypatch.context() as forbidden:
        forbidden.setattr(os, "scandir", None)
        second = open_source(data)
    assert second.remembered and names(second) == names(first) and len(second) == 3
    assert (second.ignored, second.unreadable) == (first.ignored, [])
    assert str(file) in Path("/proc/self/maps").read_text()  # workers share its pages
    assert names(pickle.loads(pickle.dumps(second))) == names(first)
    os.chdir("photos")  # another way to name the same place
    assert open_source(f"../{data}").remembered


def test_other_channels_are_another_search(place):
    open_source("photos")
    (place / "photos" / "x.npy").write_bytes(b"")
    old(place)
    assert names(open_source("photos", channels=5)) == ["photos/x.npy"]


@pytest.mark.parametrize("change", ["add", "remove", "rename", "replace a folder", "new folder"])
def test_a_changed_folder_is_searched_again(place, change):
    open_source("photos")
    photos = place / "photos"
    if change == "add":
        (photos / "b" / "4.png").write_bytes(b"")
    elif change == "remove":
        (photos / "b" / "3.png").unlink()
    elif change == "rename":
        (photos / "a" / "1.png").rename(photos / "a" / "9.png")
    elif change == "replace a folder":  # by one that looks as old
        kept = (photos / "b").stat()
        (photos / "b").rename(place / "elsewhere")
        (photos / "b").mkdir()
        (photos / "b" / "5.png").write_bytes(b"")
        os.utime(photos / "b", ns=(kept.st_atime_ns, kept.st_mtime_ns))
        os.utime(photos, (time.time() - 3600, time.time() - 3600))
    else:
        (photos / "c").mkdir()
        (photos / "c" / "6.png").write_bytes(b"")
    source = open_source("photos")
    assert not source.remembered
    there = sorted(str(path.relative_to(place)) for path in photos.rglob("*.png"))
    assert names(source) == there


def test_a_changed_list_is_read_again(place):
    open_source("list.txt")
    (place / "list.txt").write_text("photos/a/1.png\nphotos/b/3.png\nphotos/a/7.png\n")
    source = open_source("list.txt")
    assert not source.remembered and names(source)[2] == "photos/a/7.png"


def test_what_changed_just_now_is_not_remembered(place):
    (place / "photos" / "b" / "4.png").write_bytes(b"")  # another could follow within the clock's tick
    open_source("photos")
    assert index_files(place) == []


def test_a_link_to_a_disk_that_is_not_there_yet_is_not_remembered(place):
    (place / "photos" / "c").symlink_to(place / "disk")
    old(place / "photos" / "a")
    os.utime(place / "photos", (1, 1))
    assert len(open_source("photos")) == 3
    (place / "disk").mkdir()
    (place / "disk" / "7.png").write_bytes(b"")
    assert names(open_source("photos"))[-1] == "photos/c/7.png"


def test_few_paths_are_not_remembered(place, monkeypatch):
    monkeypatch.setattr(path_index, "FROM", 4)
    open_source("photos")
    assert index_files(place) == []


def test_a_damaged_index_is_not_believed(place):
    expected = names(open_source("photos"))
    (file,) = index_files(place)
    whole = file.read_bytes()
    for position in range(len(whole)):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        assert names(open_source("photos")) == expected
    for size in range(0, len(whole), 7):
        file.write_bytes(whole[:size])
        assert names(open_source("photos")) == expected
    file.write_bytes(whole + b"x")
    assert names(open_source("photos")) == expected
    assert open_source("photos").remembered  # it was written again


def test_a_cache_that_cannot_be_written_is_no_error(place, monkeypatch):
    (place / "cache").write_bytes(b"no folder")
    assert len(open_source("photos")) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert len(open_source("photos")) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)  # that of nobody, as in some containers
    assert len(open_source("photos")) == 3
    with pytest.raises(UserError, match="set XDG_CACHE_HOME to a folder"):
        path_index.cache_folder()


def test_workers_read_from_a_remembered_folder(place):
    for path in (place / "photos").rglob("*.png"):
        Image.new("RGB", (4, 4)).save(path)
    old(place)
    open_source("photos")
    source = open_source("photos")
    assert source.remembered and source.read(2).shape == (3, 4, 4)
