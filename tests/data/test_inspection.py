"""Each file is told for what it is, and files that kill or keep their process do not stop a scan."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from mirl.data import scanning
from mirl.data.decode import BadImage
from mirl.data.inspection import Trait, inspect
from mirl.data.pictures import open_picture
from mirl.data.scanning import Lost, scan
from mirl.data.transforms import training_view
from mirl.errors import UserError

TRIALS = 30  # of damage


def picture(mode="RGB", size=(70, 50), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 5, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode)


def profile(space):
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()


def turned():
    exif = Image.Exif()
    exif[0x112] = 6
    return exif


def chequered(period):
    """Grey of one value on average in each block of a JPEG, which at an eighth of its size is all that is left."""
    return Image.fromarray((np.indices((64, 64)).sum(0) % period * 40 + 60).astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize(
    "name, image, options, expected",
    [
        ("plain.jpg", picture(), {"icc_profile": profile("sRGB")}, Trait(0)),
        ("plain.png", picture(), {}, Trait(0)),
        ("opaque.png", picture("RGBA"), {}, Trait(0)),
        ("grey.jpg", picture("L"), {}, Trait.GREY),
        ("grey_in_rgb.png", picture("L").convert("RGB"), {}, Trait.GREY),
        ("red.jpg", Image.new("RGB", (64, 64), "red"), {}, Trait.CONSTANT),
        ("chequered.jpg", chequered(2), {"quality": 95}, Trait.GREY),
        ("alpha.png", Image.merge("RGBA", (*picture().split(), picture("L"))), {}, Trait.ALPHA),
        ("deep.png", Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30)), {}, Trait.DEEP | Trait.GREY),
        ("cmyk.jpg", picture("CMYK"), {}, Trait.COLOURS),
        ("lab.jpg", picture(), {"icc_profile": profile("LAB")}, Trait.PROFILE),
        ("damaged_profile.jpg", picture(), {"icc_profile": b"no profile"}, Trait.PROFILE),
        ("moving.gif", picture(), {"save_all": True, "append_images": [picture(seed=1)]}, Trait.FRAMES),
        ("png.jpg", picture(), {"format": "PNG"}, Trait.SUFFIX),
        ("turned.jpg", picture(), {"exif": turned()}, Trait.TURNED),
    ],
)
def test_a_file_is_what_it_is(tmp_path, name, image, options, expected):
    path = tmp_path / name
    image.save(path, **options)
    found = inspect(str(path))
    assert (found.reason, found.traits) == ("", expected)
    width, height = image.size
    assert found.size == ((width, height) if name == "turned.jpg" else (height, width))
    assert found.bytes == path.stat().st_size


def test_an_array_is_known_by_its_numbers(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(5, 20, 30)))
    found = inspect(str(tmp_path / "x.npy"), channels=5)
    assert (found.traits, found.size, found.format, found.mode) == (Trait.DEEP, (20, 30), "NPY", "float64")


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 4), (4, 20, 30)])
def test_an_array_of_other_channels_is_not_called_broken(tmp_path, shape):
    path = tmp_path / "x.npy"
    np.save(path, np.zeros(shape))
    found = inspect(str(path))
    assert found.traits == Trait.CHANNELS
    fits = 1 if len(shape) == 2 else 4
    assert found.reason == f"is an array of shape {list(shape)}, not [h, w, 3] or [3, h, w] (give channels {fits}?)"
    assert not inspect(str(path), channels=fits).reason
    np.save(path, np.zeros(20))
    assert inspect(str(path)).traits == Trait.BROKEN


def test_what_could_not_be_read_is_not_called_broken(tmp_path):
    (tmp_path / "empty.jpg").touch()
    os.symlink("loop.jpg", tmp_path / "loop.jpg")
    empty, missing, loop = (inspect(str(tmp_path / name)) for name in ("empty.jpg", "gone.jpg", "loop.jpg"))
    assert (empty.traits, empty.reason) == (Trait.BROKEN, "is empty (0 bytes)")
    assert (missing.traits, missing.reason) == (Trait.UNREAD, "is missing")
    assert loop.traits == Trait.UNREAD and loop.reason.startswith("cannot be read")


@pytest.mark.parametrize(
    "suffix, frames", [(s, 1) for s in ("jpg", "png", "gif", "webp", "tif", "bmp")] + [("gif", 3), ("tif", 3)]
)
def test_what_training_cannot_use_is_broken_and_nothing_else(tmp_path, suffix, frames):
    path, random = tmp_path / f"x.{suffix}", np.random.default_rng(0)
    view = training_view((16, 16), 0.2, flip=True)
    more = [picture(size=(100, 80), seed=seed) for seed in range(1, frames)]
    picture(size=(100, 80)).save(path, **{"save_all": True, "append_images": more} if more else {})
    whole, broken = path.read_bytes(), 0
    for _ in range(TRIALS):
        content = bytearray(whole[: random.integers(len(whole) // 2, 2 * len(whole))])
        for place in random.integers(0, len(content), random.integers(0, 4)):
            content[place] ^= int(random.integers(1, 256))
        path.write_bytes(content)
        try:
            view(open_picture(path))
            trained_on = True
        except BadImage:
            trained_on = False
        broken += not trained_on
        assert bool(inspect(str(path)).traits & Trait.BROKEN) != trained_on
    assert (broken or frames > 1) and broken < TRIALS


KILLS, HANGS = {40, 41}, {70}


def cube(member):
    if member in KILLS:
        os.kill(os.getpid(), signal.SIGKILL)
    if member in HANGS:
        time.sleep(60)
    return member**3


def test_files_that_kill_or_keep_their_process_are_named_and_the_others_are_done():
    found = dict(scan(cube, np.arange(100), processes=2, timeout=1.0))
    lost = {member: str(result) for member, result in found.items() if isinstance(result, Lost)}
    assert sorted(found) == list(range(100))
    assert {member: r for member, r in found.items() if member not in lost} == {
        n: n**3 for n in range(100) if n not in KILLS | HANGS
    }
    killed = "ended the process that read it (by signal 9, out of memory?)"
    assert lost == {40: killed, 41: killed, 70: "took more than 1 s"}


def test_a_process_that_is_killed_by_chance_costs_no_file(tmp_path):
    def once(member):
        if member == 50 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return member

    for members in (np.arange(64), np.array([50])):
        (tmp_path / "killed").unlink(missing_ok=True)
        assert sorted(scan(once, members, processes=1, timeout=60)) == [(n, n) for n in members]


def test_slow_files_are_no_deaths_and_make_no_other_be_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(scanning, "HOPELESS", 1)
    monkeypatch.setattr(scanning, "TICK", 0.05)

    def slow(member):
        with open(tmp_path / "begun", "a") as file:
            file.write(f"{member}\n")
        time.sleep(60 if member in (20, 21) else 0)
        return member

    found = dict(scan(slow, np.arange(32), processes=1, timeout=1.0))
    assert sorted(member for member, result in found.items() if isinstance(result, Lost)) == [20, 21]
    assert sorted(map(int, (tmp_path / "begun").read_text().split())) == list(range(32))


def test_the_processes_end_when_their_parent_is_killed(tmp_path):
    def slow(member):
        (tmp_path / str(os.getpid())).touch()
        time.sleep(0.01)
        return member

    parent = os.fork()
    if not parent:
        for _ in scan(slow, np.arange(100_000), processes=2, timeout=60):
            pass
        os._exit(0)
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.01)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    running = [Path("/proc", path.name) for path in tmp_path.iterdir()]
    end = time.monotonic() + 10
    while any(is_running(process) for process in running) and time.monotonic() < end:
        time.sleep(0.05)
    left = [int(process.name) for process in running if is_running(process)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def is_running(process):
    try:
        return ") Z " not in (process / "stat").read_text()
    except OSError:
        return False


def test_a_machine_on_which_nothing_can_be_read_is_said(monkeypatch):
    monkeypatch.setattr(scanning, "HOPELESS", 3)
    with pytest.raises(UserError, match="4 processes that read images died in a row"):
        list(scan(lambda member: os._exit(1), np.arange(64), processes=1, timeout=60))
