"""`mirl doctor` names each file under its kind and no good one, and suggests what pre-training chooses."""

import io
import json
import os
import shlex
import signal
import subprocess

import numpy as np
import pytest
from PIL import Image

import mirl
from mirl.checkup import doctor as command
from mirl.cli import main
from mirl.data.inspection import inspect
from mirl.data.sources import open_source
from mirl.tasks.pretrain import split_off_held_out, typical_side
from mirl.tasks.settings.pretraining import Pretraining, resolve

GOOD = 8
BROKEN = {"empty.jpg", "cut.jpg", "text.jpg", "bomb.png", "class/damaged.png", "pipe.jpg"}


def picture(size=(120, 100), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 5, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def fill(folder):
    """Write good images, and one file or more of every kind."""
    (folder / "class").mkdir(parents=True)
    for i in range(GOOD):
        picture(seed=i).save(folder / "class" / f"good {i}.jpg")
    jpeg = (folder / "class" / "good 0.jpg").read_bytes()
    png = io.BytesIO()
    picture().save(png, "PNG")
    damaged = bytearray(png.getvalue())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 40] = bytes(40)
    (folder / "empty.jpg").touch()
    (folder / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "text.jpg").write_text("hello")
    (folder / "class" / "damaged.png").write_bytes(damaged)
    Image.new("1", (10_000, 9_000)).save(folder / "bomb.png")
    os.mkfifo(folder / "pipe.jpg")
    os.symlink("nowhere.jpg", folder / "dangling.jpg")
    (folder / "copy.jpg").write_bytes(jpeg)
    picture((10, 9)).save(folder / "tiny.png")
    picture((40, 30)).save(folder / "small.png")
    picture((600, 100)).save(folder / "long.jpg")
    picture().convert("L").save(folder / "grey.png")
    picture().convert("CMYK").save(folder / "cmyk.jpg")
    picture().save(folder / "misnamed.jpg", "PNG")
    Image.new("RGB", (120, 100), "red").save(folder / "red.png")
    np.save(folder / "four.npy", np.zeros((40, 40, 4)))
    (folder / "notes.txt").touch()
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    data = fill(folder / "zoo")
    return data, mirl.doctor(str(data), out=str(folder / "out"), workers=2, gpus=0), folder / "out"


def named(report):
    """Return the names, relative to the data, of each kind in doctor.json."""
    content = json.loads((report / "doctor.json").read_text())
    assert all(finding["count"] == len(finding["files"]) for finding in content["findings"])
    return {
        finding["kind"]: {os.path.relpath(file["file"], content["data"]) for file in finding["files"]}
        for finding in content["findings"]
    }


def test_each_file_is_named_under_its_kind_and_no_good_one(zoo):
    data, report, out = zoo
    assert named(out) == {
        "broken": BROKEN, "unread": {"dangling.jpg"}, "channels": {"four.npy"}, "too small": {"tiny.png"},
        "small": {"small.png"}, "duplicate": {"copy.jpg"},  # "class/good 0.jpg" comes before it
        "constant": {"red.png"}, "grey": {"grey.png"}, "colour space": {"cmyk.jpg"}, "suffix": {"misnamed.jpg"},
        "elongated": {"long.jpg"},
    }  # fmt: skip
    details = {name: detail for finding in report.findings for name, detail in finding.files(report.records)}
    assert details[f"{data}/copy.jpg"] == f"same as {data}/class/good 0.jpg"
    assert details[f"{data}/tiny.png"] == "9x10 px"
    figures = report.figures()
    assert (figures["files"], figures["other_files"]) == (len(BROKEN) + GOOD + 10, 1)
    assert figures["usable"] == figures["files"] - len(BROKEN) - 2


def test_the_suggestion_is_what_pre_training_chooses(zoo):
    data, report, out = zoo
    source = open_source(str(data))
    training, _ = split_off_held_out(len(source))
    chosen = resolve(
        Pretraining(data=str(data)), images=len(training), shorter_side=typical_side(source), gpu=False, devices=1,
        precision="32",
    )  # fmt: skip
    content = json.loads((out / "doctor.json").read_text())
    for name in ("model", "image_size", "patch_size", "batch_size", "epochs"):
        expected = getattr(chosen, name)
        assert content["suggestion"][name] == (list(expected) if isinstance(expected, tuple) else expected)
    unusable = (len(BROKEN) + 3) / len(source)  # and the link, the array, and what is smaller than a patch
    assert 2 * unusable <= content["suggestion"]["max_bad"] < 2 * unusable + 0.01
    flags = shlex.split(content["command"])
    assert flags[:2] == ["mirl", "pretrain"] and f"--image_size {chosen.image_size[0]}" in content["command"]
    assert report.suggestion is not None and report.suggestion.settings.out == "runs/zoo"


def test_the_picture_is_one(zoo):
    with Image.open(zoo[2] / "sizes.png") as image:
        assert image.size[0] > 2 * image.size[1] > 600


def test_people_are_shown_some_names_and_told_where_the_others_are(tmp_path, capsys):
    data = fill(tmp_path / "zoo")
    (data / "a\x1b[31m.jpg").touch()
    assert main(["doctor", str(data), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    lines = said.splitlines()
    start = lines.index("skipped   broken: 7; no image comes out of them")
    assert lines[start + 1].endswith("a\\x1b[31m.jpg is empty (0 bytes)")
    assert lines[start + 4] == "            and 4 more"
    assert lines[-1] == f"written   {tmp_path}/out/doctor.json, which names all files; {tmp_path}/out/sizes.png"
    command = next(line for line in lines if line.startswith("command"))
    assert command.startswith(
        f"command   mirl pretrain --data {data} --out runs/zoo --model vit_ti_12 --image_size 128"
    )


def test_the_same_folder_gives_the_same_report(zoo, tmp_path):
    data, _, out = zoo
    mirl.doctor(str(data), out=str(tmp_path), workers=1, gpus=0)
    first, second = (json.loads((folder / "doctor.json").read_text()) for folder in (out, tmp_path))
    assert first.pop("speed") and second.pop("speed")
    assert first == second


def test_the_current_folder_can_be_looked_at_again_and_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        picture(seed=i).save(f"{i}.jpg")
    first, second = (mirl.doctor(".", workers=1, gpus=0).figures() for _ in range(2))
    assert first == second and (first["files"], first["other_files"]) == (4, 0)
    assert sorted(path.name for path in (tmp_path / "runs" / "data_doctor").iterdir()) == ["doctor.json", "sizes.png"]


def test_broken_files_alone_are_moved_and_can_be_moved_back(tmp_path, capsys):
    data, bad = fill(tmp_path / "zoo"), tmp_path / "bad"
    (bad / "class").mkdir(parents=True)
    (bad / "class" / "damaged.png").write_text("another")
    before = sorted(path.relative_to(data) for path in data.rglob("*"))
    report = mirl.doctor(str(data), out=str(tmp_path / "out"), move_bad=str(bad))
    moved = BROKEN - {"class/damaged.png"}
    assert f"{data}/class/damaged.png stays: there is a {bad}/class/damaged.png already" in capsys.readouterr().out
    assert {str(p) for p in before if not os.path.lexists(data / p)} == moved
    assert all(os.path.lexists(bad / name) for name in moved)
    assert (bad / "class" / "damaged.png").read_text() == "another"
    content = json.loads((tmp_path / "out" / "doctor.json").read_text())
    assert {os.path.relpath(name, data) for name in content["moved"]} == moved
    remaining = len(open_source(str(data)))
    assert report.suggestion is not None
    assert report.suggestion.training == len(split_off_held_out(remaining)[0])
    assert content["suggestion"]["max_bad"] == pytest.approx(
        4 / remaining * 2, abs=0.01
    )  # damaged, tiny, four, the link

    subprocess.run(["sh", str(bad / "moved.txt")], check=True)
    assert sorted(path.relative_to(data) for path in data.rglob("*")) == before


def test_a_sample_says_that_it_is_one(zoo, tmp_path, capsys):
    report = mirl.doctor(str(zoo[0]), out=str(tmp_path), sample=10, workers=1)
    assert report.figures()["inspected"] == 10
    assert "10 of them looked at, so figures are estimates" in capsys.readouterr().out
    assert json.loads((tmp_path / "doctor.json").read_text())["sampled"] is True


def test_a_file_that_kills_what_reads_it_is_named(tmp_path, monkeypatch):
    for i in range(4):
        picture(seed=i).save(tmp_path / f"{i}.jpg")

    def dies_of_one(source, member):
        if member == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return inspect(source.path_of(member), source.channels)

    monkeypatch.setattr(command, "_inspect", dies_of_one)
    mirl.doctor(str(tmp_path), out=str(tmp_path / ".out"), move_bad=str(tmp_path / ".bad"), workers=1)
    assert named(tmp_path / ".out") == {"unread": {"2.jpg"}}
    assert (tmp_path / "2.jpg").exists()  # it may be good


def test_a_folder_without_one_good_image_is_reported(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jpg").touch()
    (data / "b.png").write_text("no")
    report = mirl.doctor(str(data), out=str(tmp_path / "out"), workers=1)
    assert report.suggestion is None and len(report.findings) == 1
    assert "no suggestion: none of the images looked at can be read" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "doctor.json").read_text())["command"] is None


@pytest.mark.parametrize(
    "options, said",
    [
        ({"data": "shapes"}, "shapes is not a folder of image files"),
        ({"data": "DATA/*.jpg", "out": "DATA"}, "--out DATA holds another sizes.png, which would be lost"),
        ({"move_bad": "DATA/bad"}, "is inside DATA and would be taken for data"),
        ({"move_bad": "DATA/.."}, "is around DATA; give a folder beside it"),
        ({"data": "DATA/*.jpg", "move_bad": "bad"}, "--move_bad needs a folder of images"),
        ({"sample": 0}, "--sample 0 is not allowed; give 1 or more"),
        ({"timeout": 0.0}, "--timeout 0.0 is not allowed; give more than 0"),
    ],
)
def test_mistakes_are_said_before_anything_is_read(tmp_path, options, said):
    data = tmp_path / "data"
    data.mkdir()
    picture().save(data / "a.jpg")
    picture().save(data / "sizes.png")
    given = {"data": "DATA", "out": str(tmp_path / "out")} | options
    given = {key: value.replace("DATA", str(data)) if isinstance(value, str) else value for key, value in given.items()}
    with pytest.raises(mirl.UserError) as caught:
        mirl.doctor(**given)
    assert said.replace("DATA", str(data)) in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == [data, data / "a.jpg", data / "sizes.png"]


def test_advice_is_given_where_it_helps(tmp_path, capsys):
    for i in range(4):
        picture(seed=i).convert("L").save(tmp_path / f"{i}.jpg")
    assert mirl.doctor(str(tmp_path), out=str(tmp_path / ".out"), workers=1).advice() == [
        "all images are grey: --channels 1 computes a third of the pixels"
    ]
    assert not mirl.doctor(str(tmp_path), out=str(tmp_path / ".out"), workers=1, channels=1).advice()
    assert "--channels 1 --out" in capsys.readouterr().out
