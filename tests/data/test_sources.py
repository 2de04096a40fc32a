"""`--data` finds the images that are there, in one order on every machine, and says what to type when it does not."""

import gzip
import os
import pickle
import struct

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from mirl.data import sources
from mirl.data.decode import BadImage
from mirl.data.packed import PackedStrings
from mirl.data.sources import ImageFiles, open_source
from mirl.errors import UserError


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Make tmp_path the current folder, with a folder of images and other files in it."""
    monkeypatch.chdir(tmp_path)
    for index, name in enumerate(["b.PNG", "a/z.jpg", "a-b/x.webp", "a/c/d.tiff", "B.jpeg"]):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4 + index, 3), "red").save(path)
    for name in ["notes.txt", "a/no_suffix", "a/film.mp4", ".hidden.jpg", ".git/x.jpg", "__MACOSX/x.jpg", "jpg"]:
        path = tmp_path / "photos" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "photos"


def names(source):
    return [source.name_of(index).replace(os.sep, "/") for index in range(len(source))]


def error(data, **options):
    with pytest.raises(UserError) as caught:
        open_source(data, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder_is_searched_in_the_order_of_paths(photos):
    source = open_source("photos")
    relative = ["B.jpeg", "a-b/x.webp", "a/c/d.tiff", "a/z.jpg", "b.PNG"]
    assert relative == sorted(relative)
    assert names(source) == [f"photos/{name}" for name in relative]
    assert source.ignored == 4  # notes.txt, no_suffix, film.mp4, jpg
    assert source.unreadable == []
    assert [source.read(index).shape[2] for index in range(5)] == [8, 6, 7, 5, 4]
    assert names(open_source(photos)) == [f"{photos.as_posix()}/{name}" for name in relative]


def test_channels(photos):
    assert open_source(photos, channels=1).read(0).shape == (1, 3, 8)
    assert "end in .npy" in error(photos, channels=5)
    np.save(photos / "x.npy", np.zeros((2, 2, 5), np.uint8))
    source = open_source(photos, channels=5)
    assert len(source) == 1 and source.read(0).shape == (5, 2, 2)
    assert "give 1 or more" in error(photos, channels=0)


def test_linked_folders_are_followed_once(photos, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.new("L", (2, 2)).save(elsewhere / "y.png")
    (photos / "a" / "loop").symlink_to(photos, target_is_directory=True)
    (photos / "link").symlink_to(elsewhere, target_is_directory=True)
    (photos / "link2").symlink_to(elsewhere, target_is_directory=True)
    (photos / "self").symlink_to(photos / "self")
    (photos / "gone.png").symlink_to(photos / "nothing")
    found = names(open_source("photos"))
    assert len(found) == len(set(found)) == 7
    assert "photos/link/y.png" in found
    gone = open_source("photos")
    with pytest.raises(BadImage, match="is missing"):
        gone.read(found.index("photos/gone.png"))


def test_unreadable_folder_is_reported(photos, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if "a-b" in path:
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    source = open_source("photos")
    assert len(source) == 4
    assert source.unreadable == [os.path.join("photos", "a-b/")]
    assert source.warnings == ("folders that cannot be listed, whose images are not in the data: photos/a-b/",)


def test_bad_files_are_found_when_they_are_read(photos):
    (photos / "broken.jpg").write_text("not a picture")
    (photos / "folder.jpg").mkdir()
    Image.new("L", (2, 2)).save(photos / "folder.jpg" / "x.png")
    source = open_source("photos")
    assert "photos/folder.jpg/x.png" in names(source) and "photos/folder.jpg" not in names(source)
    with pytest.raises(BadImage, match="not an image"):
        source.read(names(source).index("photos/broken.jpg"))


def test_glob(photos):
    assert names(open_source("photos/**/*.jp*g")) == ["photos/B.jpeg", "photos/a/z.jpg"]
    source = open_source("photos/**/*")
    assert names(source) == names(open_source("photos"))
    assert source.ignored > 0
    assert "matches no images, but 1 others" in error("photos/*.txt")
    assert "matches no images, but 0 others" in error("photos/*.xyz")
    photos.rename("photos [1]")
    assert len(open_source("photos [1]")) == 5


def test_list_file(photos, tmp_path):
    listed = tmp_path / "photos" / "train.lst"
    listed.write_bytes(
        b"\xef\xbb\xbf# comment\r\n\r\n  b.PNG\na/z.jpg  \n" + os.fsencode(photos / "B.jpeg") + b"\nb.PNG"
    )
    source = open_source("photos/train.lst")
    expected = ["photos/b.PNG", "photos/a/z.jpg", (photos / "B.jpeg").as_posix(), "photos/b.PNG"]
    assert names(source) == expected
    assert source.read(2).shape == (3, 3, 8)
    listed.write_text("# nothing\n\n")
    assert "lists no images" in error(listed)


def test_file_errors_say_what_to_give(photos):
    assert error("photos/b.PNG") == "'photos/b.PNG' is a single image; give its folder, 'photos'"
    assert "give a folder, a glob, a list file (.txt, .lst), tar shards (" in error("photos/a/film.mp4")
    os.chdir("photos")
    assert "give its folder, '.'" in error("b.PNG")


def test_missing_paths_suggest_what_is_there(photos):
    assert error("photo") == "'photo' does not exist; did you mean 'photos'?"
    assert "did you mean 'photos'?" in error("Photos/")
    assert error("phots/a/b") == "'phots/a/b' does not exist ('phots' is missing); did you mean 'photos'?"
    assert "did you mean 'cifar10', 'cifar100'?" in error("CIFAR10")
    assert "give a folder, a glob" in error("qqqqqq")
    assert "does not exist" in error("")
    assert "does not exist" in error("/qqqqqq/b")
    assert "does not exist" in error("nul\0")


def test_folder_without_images(photos, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "x.csv").touch()
    message = error("empty")
    assert message.startswith("'empty' has no images, but 1 other file; ")
    assert ".jpg, .jpeg, .png" in message and len(message) < 200


def test_names_that_are_not_utf8(photos):
    name = b"photos/\xff\n.png"
    try:
        os.rename("photos/b.PNG", name)
    except OSError:
        pytest.skip("this file system wants valid names")
    source = open_source("photos")
    index = next(index for index in range(len(source)) if "xff" in source.name_of(index))
    assert source.name_of(index) == r"photos/\xff\n.png"  # a line of a log or a list, which steers no terminal
    assert source.read(index).shape == (3, 3, 4)


def test_home_is_expanded(photos, monkeypatch):
    monkeypatch.setenv("HOME", str(photos.parent))
    monkeypatch.setenv("USERPROFILE", str(photos.parent))
    assert len(open_source("~/photos")) == 5


def test_path_list_is_small_to_send():
    paths = [f"n{index % 1000:08}/image_{index}.jpg" for index in range(20_000)]
    packed = PackedStrings(paths)
    assert list(packed) == paths
    sent = pickle.dumps(packed)
    assert list(pickle.loads(sent)) == paths
    assert len(sent) < sum(map(len, paths)) + 8 * len(paths) + 1000
    with pytest.raises(IndexError):
        packed[-1]


def test_source_travels_to_workers(photos):
    source = open_source("photos")
    copy = pickle.loads(pickle.dumps(source))
    assert isinstance(copy, ImageFiles) and names(copy) == names(source)
    assert torch.equal(copy.read(0), source.read(0))


def test_shapes(photos):
    assert len(open_source("shapes")) == 10_000
    assert open_source("shapes:5:48").read(0).shape == (3, 48, 48)
    for size in ("8", "-1", "large", ""):
        assert "shapes:10000:64" in error(f"shapes:5:{size}")
    source = open_source("shapes:12")
    assert len(source) == 12 and source.read(3).shape == (3, 64, 64) and source.read(3).dtype == torch.uint8
    for count in ("0", "-1", "many", "", "1.5"):
        assert "shapes:10000" in error(f"shapes:{count}")
    assert "channels 3" in error("shapes", channels=1)
    photos.rename("shapes")
    assert isinstance(open_source("./shapes"), ImageFiles)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mirl" / "datasets"


def write_mnist(folder, images):
    """Write MNIST's own files, so that torchvision's real class reads them."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        header = struct.pack(">IIII", 0x803, *images.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(images)) + bytes(len(images)))


def test_torchvision_set_in_the_cache(cache):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    write_mnist(cache / "mnist", images)
    source = open_source("mnist", channels=1)
    assert len(source) == 5 and source.name_of(2) == "mnist[2]"
    np.testing.assert_array_equal(source.read(2)[0].numpy(), images[2])
    assert open_source("mnist").read(4).shape == (3, 28, 28)
    assert "give 1, 3 or 4" in error("mnist", channels=5)


def test_torchvision_set_not_there(cache):
    message = error("cifar10")
    assert str(cache / "cifar10") in message and "add --download" in message
    (cache.parents[2] / "cifar10").mkdir()
    assert "give ./cifar10" in error("cifar10")
    (cache / "cifar10").mkdir(parents=True)
    assert "delete that folder and add --download" in error("cifar10")


@pytest.mark.parametrize("failure", [OSError("no route\nto host"), RuntimeError("bad archive"), gzip.BadGzipFile("x")])
def test_failed_download_leaves_nothing(cache, monkeypatch, failure):
    def make(root, *, download=False, **_):
        (root / "half").mkdir(parents=True)
        raise failure

    monkeypatch.setattr(torchvision.datasets, "STL10", make)
    assert "could not be downloaded" in error("stl10", download=True)
    assert list(cache.iterdir()) == []


def test_download_appears_whole(cache, monkeypatch):
    real = torchvision.datasets.MNIST

    def make(root, *, download=False, **arguments):
        assert not (cache / "mnist").exists() or not download
        if download:
            write_mnist(root, np.zeros((3, 28, 28), np.uint8))
        return real(root, **arguments)

    monkeypatch.setattr(torchvision.datasets, "MNIST", make)
    assert len(open_source("mnist", download=True)) == 3
    assert [path.name for path in cache.iterdir()] == ["mnist"]
    assert len(open_source("mnist", download=True)) == 3


def test_missing_package_is_named(cache, monkeypatch):
    (cache / "svhn").mkdir(parents=True)

    def make(*_, **__):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    monkeypatch.setattr(torchvision.datasets, "SVHN", make)
    assert "pip install scipy" in error("svhn")


def test_every_listed_set_exists_in_torchvision():
    assert all(hasattr(torchvision.datasets, name) for name, _ in sources.TORCHVISION_SETS.values())
