"""Two processes on one machine train as one does, and make the same mistakes in one line."""

import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_runs import assert_one_line, command, finish, rows, weights, without_pictures

import mirl

HEADS = {
    "data": "shapes:24:32", "epochs": 1, "batch_size": 8, "width": 16, "precision": "32", "workers": 0, "report": False,
}  # fmt: skip
SEVERAL = """
import json, sys
sys.path.append(sys.argv[2])
from tiny_runs import without_pictures
import mirl
with without_pictures():
    for command, options in json.loads(sys.argv[3]).items():
        getattr(mirl, command)(**options)
"""
MODULE = (sys.executable, "-m", "mirl.cli")  # Fabric starts the other processes by the same name


@pytest.fixture
def options(tiny, tmp_path):
    return tiny | {"data": "shapes:33", "batch_size": 8, "epochs": 1, "base_lr": 1e-2, "out": str(tmp_path / "run")}


@pytest.mark.parametrize("objective", [{}, {"feature": "ema", "extra_share": 1.0, "warmup_epochs": 0.0}], ids=str)
def test_two_processes_equal_one(options, tmp_path, objective):
    options |= objective
    one = mirl.pretrain(**options)
    two = tmp_path / "two"
    code, output, errors = finish(command(options | {"out": two}, "--devices=2"))
    assert (code, errors) == (0, "")
    assert output.count("done:") == 1
    for kind, count in (("train", 4), ("held_out", 2)):
        a, b = ([row["loss"] for row in rows(run, kind)] for run in (one, two))
        assert len(a) == count and b == pytest.approx(a, abs=1e-5)
    expected = weights(one)
    assert all((value - expected[name]).abs().max() < 1e-3 for name, value in weights(two).items())


def test_a_mistake_that_only_the_first_process_sees_is_one_line_and_ends_all(options):
    Path(options["out"]).mkdir()
    for name in ("config.yaml", "log.txt"):
        (Path(options["out"]) / name).touch()
    code, _, errors = finish(command(options, "--devices=2", program=MODULE))
    assert_one_line(code, errors, "holds a run; add --resume")


def test_bad_files_that_either_process_meets_are_named(options, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(33):
        Image.new("RGB", (40, 40), (index, 0, 0)).save(folder / f"{index}.png")
    bad = [f"{index}.png" for index in range(0, 33, 4)]
    for name in bad:
        (folder / name).write_bytes(b"")
    code, _, errors = finish(command(options | {"data": folder, "max_bad": 0.5}, "--devices=2", program=MODULE))
    assert (code, errors) == (0, "")
    log = Path(options["out"], "log.txt").read_text()
    assert all(re.search(rf"[0-9] skipped \S*/{name}: is empty", log) for name in bad), log


def test_two_processes_judge_every_image_once(vit, tmp_path):
    """Detectors and segmenters, which before the first step are the one process's. One start serves both commands."""
    (tmp_path / "several.py").write_text(SEVERAL)
    kinds = {"detect": {"regions": 8}, "segment": {}}
    options = {kind: HEADS | {"weights": vit, "devices": 2, "out": str(tmp_path / kind)} | more
               for kind, more in kinds.items()}  # fmt: skip
    program = (sys.executable, str(tmp_path / "several.py"))
    code, output, errors = finish(
        command({}, str(Path(__file__).parent), json.dumps(options), task="both", program=program)
    )
    assert (code, errors) == (0, "") and output.count("done:") == 2
    for kind in kinds:
        with without_pictures():
            one = getattr(mirl, kind)(**options[kind] | {"devices": 1, "out": str(tmp_path / f"{kind}_alone")})
        assert rows(tmp_path / kind, "held_out")[0] == rows(one, "held_out")[0]
        assert len(rows(tmp_path / kind)) == 3
        found, alone = (json.loads((run / "results.json").read_text()) for run in (tmp_path / kind, one))
        assert found["images"] == alone["images"] == 10 and found.get("pixels") == alone.get("pixels")
