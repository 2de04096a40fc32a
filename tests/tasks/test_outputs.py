"""An output that cannot be written is told before the work begins."""

import subprocess
from pathlib import Path

import pytest
from tiny_runs import mistake

import mirl
from mirl.training.files import check_writable


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with a file and a folder in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "path, fault",
    [("folder", "Is a directory"), ("file/x.json", "Not a directory"), ("/proc/x.json", "No such file or directory")],
)
def test_a_place_that_cannot_be_written_is_one_line(here, path, fault):
    assert mistake(check_writable, Path(path)) == f"cannot write {path}: {fault}; choose another --out"


def test_a_disk_that_is_read_only_is_one_line(here):
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", "folder"]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only a user who may mount file systems can have a read-only one")
    try:
        assert "Read-only file system" in mistake(check_writable, Path("folder/x.json"))
    finally:
        subprocess.run(["umount", "--lazy", "folder"], check=True)


@pytest.mark.parametrize("path", ["x.json", "file", "folder/x.json", "new/and/new/x.json"])
def test_looking_leaves_nothing(here, path):
    check_writable(Path(path))
    assert sorted(str(found.relative_to(here)) for found in here.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize(
    "command, out, given",
    [
        (mirl.evaluate, "file", {"weights": "nowhere"}),
        (mirl.knn, "folder", {"weights": "nowhere"}),
        (mirl.probe, "file/x.json", {"weights": "nowhere"}),
        (mirl.embed, "file/x", {"weights": "nowhere"}),
        (mirl.diagnose, "file", {"weights": ["nowhere"]}),
        (mirl.reconstruct, "file/x.png", {"run": "nowhere"}),
    ],
    ids=lambda given: getattr(given, "__name__", str(given)),
)
def test_commands_look_first(here, command, out, given):
    assert f"cannot write {out}" in mistake(command, **given, out=out)


def test_a_detector_s_onnx_is_looked_at_first(here):
    message = mistake(mirl.detect, "nowhere", onnx="folder")
    assert message == "cannot write folder: Is a directory; choose another --onnx"
