"""A run that is extended equals one that was planned so long from the start."""

import shutil
from unittest.mock import Mock

import pytest
import torch
import yaml
from tiny_runs import assert_same_run, interrupted, rows

import mirl
from mirl.errors import UserError
from mirl.training.checkpoints import UNDECAYED, saved_steps

pytestmark = pytest.mark.usefixtures("undrawn")

STEP = {"warmup_epochs": 0.5, "schedule": "step", "evaluate_epochs": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("short") / "run"


@pytest.fixture
def short(tiny, folder):
    """A finished run of 2 epochs of 6 steps, undecayed up to step 11; made once, not to be changed."""
    return folder if folder.exists() else mirl.pretrain(**tiny | STEP, out=folder)


@pytest.fixture
def planned(tiny, folder):
    """A run of 4 epochs, planned so long from the start; made once, not to be changed."""
    path = folder.with_name("planned")
    return path if path.exists() else mirl.pretrain(**tiny | STEP | {"epochs": 4}, out=path)


def test_an_extended_run_equals_one_planned_long(short, planned, tmp_path):
    extended = mirl.pretrain(resume_from=str(short), epochs=4, out=str(tmp_path / "extended"), report=False)
    assert_same_run(extended, planned)
    assert [row["lr"] for row in rows(extended)] == [row["lr"] for row in rows(planned)]
    assert len(rows(extended)) == 24


def test_the_undecayed_state_is_that_of_a_longer_run(tiny, short, tmp_path):
    """At 90 %, and not only in the end: weights, moments of AdamW and all."""
    options = tiny | STEP | {"epochs": 4, "checkpoint_steps": 11, "out": str(tmp_path / "planned")}
    interrupted(options, after=11)
    planned = torch.load(tmp_path / "planned" / "checkpoints" / "step_00000011.pt", weights_only=True)
    kept = torch.load(short / "checkpoints" / UNDECAYED, weights_only=True)
    assert kept["step"] == 11
    for part in ("model", "optimizer"):
        torch.testing.assert_close(kept[part], planned[part], rtol=0, atol=0)


def test_an_extension_can_be_extended_and_be_killed(short, planned, tmp_path):
    options = {"resume_from": str(short), "epochs": 3, "out": str(tmp_path / "killed"), "report": False}
    interrupted(options, after=14)
    mirl.pretrain(out=options["out"], resume=True)
    longer = mirl.pretrain(resume_from=options["out"], epochs=4, out=str(tmp_path / "longer"), report=False)
    assert_same_run(longer, planned)


def test_an_extension_killed_while_it_takes_over_the_first_run_goes_on(short, tmp_path, monkeypatch):
    options = {"resume_from": str(short), "epochs": 3, "out": str(tmp_path / "killed"), "report": False}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mirl.training.checkpoints.shutil.copyfile", Mock(side_effect=KeyboardInterrupt))
        mirl.pretrain(**options)
    assert rows(tmp_path / "killed") and not saved_steps(tmp_path / "killed" / "checkpoints")
    extended = mirl.pretrain(out=options["out"], resume=True)
    assert [row["step"] for row in rows(extended)] == [*range(1, 19)]
    assert "resumed at step 11 of 18" in (extended / "log.txt").read_text()


def test_a_kill_before_the_undecayed_checkpoint_is_kept_loses_nothing(short, tiny, tmp_path, monkeypatch):
    options = tiny | STEP | {"out": str(tmp_path / "killed")}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mirl.training.checkpoints.keep_undecayed", Mock(side_effect=KeyboardInterrupt))
        mirl.pretrain(**options)
    run = mirl.pretrain(out=options["out"], resume=True)
    kept = [torch.load(folder / "checkpoints" / UNDECAYED, weights_only=True) for folder in (run, short)]
    torch.testing.assert_close(kept[0]["model"], kept[1]["model"], rtol=0, atol=0)


def test_an_extension_that_is_started_again_goes_on(short, tmp_path, monkeypatch):
    copy = shutil.copytree(short, tmp_path / "short")
    options = {"resume_from": str(copy), "epochs": 3, "report": False}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mirl.training.loop.evaluate", Mock(side_effect=KeyboardInterrupt))
        mirl.pretrain(**options)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    extended = mirl.pretrain(**options)
    assert "restart 1: resumed at step" in (extended / "log.txt").read_text()


def test_the_first_run_is_left_alone_and_the_folder_named_after_it(short, tmp_path):
    copy = shutil.copytree(short, tmp_path / "short")
    before = sorted((path, path.stat().st_mtime_ns) for path in copy.rglob("*"))
    extended = mirl.pretrain(resume_from=str(copy), epochs=3, report=False)
    assert extended == tmp_path / "short_3_epochs"
    assert sorted((path, path.stat().st_mtime_ns) for path in copy.rglob("*")) == before
    assert yaml.safe_load((extended / "config.yaml").read_text())["resume_from"] == str(copy)
    assert saved_steps(extended / "checkpoints") == [18, 17]  # 17: undecayed again, at 90 % of 18 steps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": None}, "needs --epochs; give more than its 2"),
        ({"epochs": 2}, "needs --epochs; give more than its 2"),
        ({"base_lr": 1.0}, "cannot change it to 1.0"),
        ({"resume_from": "nowhere"}, "nowhere holds no run"),
    ],
)
def test_a_mistake_is_one_line(short, tmp_path, change, message):
    options = {"resume_from": str(short), "epochs": 4, "out": str(tmp_path / "long")} | change
    with pytest.raises(UserError, match=message):
        mirl.pretrain(**options)
    assert not (tmp_path / "long").exists()


def test_runs_that_cannot_be_extended_say_why(short, tiny, tmp_path):
    def refused(**changes):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(short, copy)
        config = yaml.safe_load((copy / "config.yaml").read_text()) | changes
        (copy / "config.yaml").write_text(yaml.safe_dump(config))
        if not changes:
            (copy / "checkpoints" / UNDECAYED).unlink()
        with pytest.raises(UserError) as caught:
            mirl.pretrain(resume_from=str(copy), epochs=4)
        return str(caught.value)

    assert "--schedule cosine" in refused(schedule="cosine")
    assert "all warm-up" in refused(warmup_epochs=3.0)
    assert "no checkpoint from before its rate decays, at 90 % of its 2 epochs" in refused()
    with pytest.raises(UserError, match="is the run to extend"):
        mirl.pretrain(resume_from=str(short), epochs=4, out=str(short))
