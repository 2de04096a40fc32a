"""What is read of a run folder: whole, cut short, of several kinds; series and what is left of long ones."""

import json

import numpy as np
import pytest
from written_runs import write_results, write_rows, write_run

from mirl.errors import UserError
from mirl.reports.contents import number, read_run, read_runs
from mirl.reports.series import series, smooth, thin


def test_a_finished_run(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    assert (run.name, run.step, run.steps, run.finished, run.pretraining) == ("run", 40, 40, True, True)
    assert {kind: len(rows) for kind, rows in run.rows.items()} == {
        "train": 40, "gradients": 4, "held_out": 3, "blocks": 3, "pictures": 3, "incident": 0,
    }  # fmt: skip


def test_a_run_that_is_being_written(tmp_path):
    folder = write_run(tmp_path / "run", finished=False, epochs=8)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 41, "epo')
    run = read_run(folder)
    assert (run.step, run.steps, run.finished) == (40, 80, False)


def test_nothing_but_options(tmp_path):
    (tmp_path / "config.yaml").write_text("model: vit_ti_12\n")
    run = read_run(tmp_path)
    assert (run.step, run.steps, run.finished, run.written, run.log) == (0, None, False, None, "")


def test_rows_of_no_use_are_left_out(tmp_path):
    folder = write_run(tmp_path / "run")
    write_rows(folder, [[1, 2], "text", {"kind": "train"}, {"kind": "train", "step": None, "epoch": 1.0}])
    assert len(read_run(folder).rows["train"]) == 40


def test_images_that_were_skipped(tmp_path):
    folder = write_run(tmp_path / "run")
    with open(folder / "log.txt", "a") as log:
        log.write(
            "2026-01-02 03:04:05 skipped a b.jpg: is no image: truncated\n"
            "2026-01-02 03:04:05 skipped 1 unusable file so far, e.g. a b.jpg: is empty (all are named in log.txt)\n"
            "2026-01-02 03:04:05 skipped 2 unusable files so far, e.g. a b.jpg: is empty (all are named in log.txt)\n"
            "2026-01-02 03:04:06 skipped 7.jpg: is empty (0 bytes)\n"
            "2026-01-02 03:04:07 step 5 skipped: the gradient is not finite (1 skipped so far)\n"
        )
    assert read_run(folder).skipped_images() == {"a b.jpg": "is no image: truncated", "7.jpg": "is empty (0 bytes)"}


def test_documents_that_cannot_be_read_are_named(tmp_path):
    folder = write_run(tmp_path / "run")
    write_results(folder)
    (folder / "readouts" / "cut.json").write_text('{"command": "kn')
    (folder / "readouts" / "list.json").write_text("[1, 2]")
    documents = read_run(folder).documents("readouts/*.json")
    assert set(documents.found) == {"readouts/knn.json", "readouts/probe_every_block.json"}
    assert documents.unreadable == ("readouts/cut.json", "readouts/list.json")


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("a/run", "b/run", "b/other")]
    assert [run.name for run in read_runs(runs[1:])] == ["run", "other"]
    assert [run.name for run in read_runs(runs)] == ["a/run", "b/run", "b/other"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: [], "no run was given"),
        (lambda p: [p / "nowhere"], r"nowhere holds no run \(no config.yaml\)"),
        (lambda p: [p], "holds no run"),
        (lambda p: [p / "file"], "file holds no run"),
        (lambda p: [p / "damaged"], "config.yaml cannot be read"),
        (lambda p: [p / "good", p / "good" / ".." / "good"], "good was given twice"),
    ],
)
def test_mistakes(tmp_path, make, message):
    (tmp_path / "file").write_text("")
    for name in ("damaged", "good"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("a: [" if name == "damaged" else "a: 1")
    with pytest.raises(UserError, match=message) as caught:
        read_runs(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_values_that_are_no_numbers_are_left_out():
    values = [1, None, 3.0, float("nan")]
    rows = [{"step": i, "epoch": i / 2, "loss": value, "seconds": 2 * i} for i, value in enumerate(values)]
    found = series([*rows, {"step": 9, "epoch": 9}], "loss")
    assert found.steps.tolist() == [0, 2] and found.values.tolist() == [1, 3] and (found.first, found.last) == (1, 3)
    assert series(rows, "loss", scale=100, over="seconds").values.tolist() == [75]  # what is divided by 0 is left out
    assert len(series([], "loss")) == 0
    assert [number(value) for value in (True, "1", None, 2, float("inf"))] == [None, None, None, 2.0, None]


@pytest.mark.parametrize("count", [0, 1, 2, 100, 100_000])
def test_long_series_are_thinned(count):
    values = np.random.default_rng(0).standard_normal(count)
    values[count // 3 : count // 3 + 1] = 99
    rows = [{"step": i, "epoch": i / 10, "loss": value} for i, value in enumerate(values.tolist())]
    found = series(rows, "loss")
    kept, average = thin(found, 1500), smooth(found, 400)
    assert len(kept) <= 1500 and len(average) <= 400
    assert len(kept) == count or len(kept) > 1000
    assert set(kept.values) <= set(values) and (np.diff(kept.steps) > 0).all()
    if count:
        assert kept.values.max() == values.max() and kept.values.min() == values.min()  # no spike is lost
        half = count // 100
        assert average.first == pytest.approx(values[: half + 1].mean())
        assert average.last == pytest.approx(values[count - half - 1 :].mean())


def test_rows_as_they_are_recorded(tmp_path):
    """A number that is not finite is null, and an incident has no epoch."""
    folder = write_run(tmp_path / "run")
    incident = {"kind": "incident", "step": 3, "time": "2026-01-02T03:04:05+00:00", "what": "stopped", "text": "at 3"}
    write_rows(folder, [incident, {"kind": "train", "step": 41, "epoch": 4.1, "loss": None}])
    run = read_run(folder)
    assert run.rows["incident"] == [incident] and len(series(run.rows["train"], "loss")) == 40
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["loss"] is None
