"""A run that was killed, interrupted or ran out of disk goes on as if nothing had happened."""

import os
import random
import resource
import shutil
import signal
from pathlib import Path

import killing
import pytest
import torch
from PIL import Image
from tiny_runs import (
    assert_identical,
    assert_one_line,
    assert_same_run,
    command,
    finish,
    flags,
    interrupted,
    losses,
    rows,
    wait_for_rows,
)

import mirl
from mirl.cli import main
from mirl.errors import UserError
from mirl.training.checkpoints import checkpoint_path, saved_steps
from mirl.training.runs import read_config

pytestmark = pytest.mark.usefixtures("undrawn")

KILLED = killing.KILLED_RUN | {"epochs": 12}  # 24 steps


@pytest.fixture
def options(tiny, tmp_path):
    """Options of a run of 24 steps that saves after each of them."""
    return tiny | {
        "out": str(tmp_path / "run"),
        "epochs": 4,
        "checkpoint_minutes": 0.0,
        "evaluate_epochs": 2,
        "block_figures": False,
    }


def log(options):
    return (Path(options["out"]) / "log.txt").read_text()


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """Two runs of the same command, not interrupted."""
    folders = [tmp_path_factory.mktemp("twice") / name for name in ("one", "two")]
    for process in [killing.start(KILLED | {"out": str(folder), "workers": 0}, resume=False) for folder in folders]:
        assert finish(process)[0] == 0
    return folders


def test_the_same_command_twice_is_the_same_run_bit_for_bit(twice):
    assert_identical(*twice)


@pytest.mark.parametrize("number, count", [(signal.SIGKILL, 20), (signal.SIGTERM, 6)])
def test_killed_at_random_moments_equals_uninterrupted(number, count, twice, tmp_path):
    """In a step, a save, an evaluation or a start; each time other numbers of data workers go on."""
    seed = random.randrange(10**6)
    options = KILLED | {"out": str(tmp_path / "run")}
    phases = list(killing.survive(options, count, number=number, seed=seed))
    print(f"seed {seed}: {killing.table(phases)}")  # pytest shows it if the test fails
    process = killing.start(options | {"workers": 1}, resume=True)
    code, output, errors = finish(process)
    assert (code, errors) == (0, "") and "done:" in output
    assert_identical(options["out"], twice[0])
    assert not list((tmp_path / "run").rglob("*.tmp"))
    if number == signal.SIGKILL:
        assert {"in a step", "in an evaluation", "while a checkpoint was written"} <= set(phases)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(options, uninterrupted, number, code):
    options |= {"checkpoint_minutes": 10, "workers": 1, "block_figures": True}
    process = command(options)
    wait_for_rows(options["out"], 3, lambda: process.poll() is None)
    # To the data workers as well, as a terminal, `timeout` and Slurm do.
    os.killpg(process.pid, number)
    returned, output, errors = finish(process)
    assert (returned, errors) == (code, "")
    step = rows(options["out"])[-1]["step"]
    assert f"stopped at step {step} of 24, saved; go on with --out {options['out']} --resume" in output
    mirl.pretrain(**options, resume=True)
    assert f"resumed at step {step} of 24" in log(options)
    assert_same_run(options["out"], uninterrupted)


def test_interrupted_before_the_first_checkpoint_starts_again(options, uninterrupted):
    interrupted(options, after=2)
    for step in saved_steps(Path(options["out"]) / "checkpoints"):
        checkpoint_path(Path(options["out"]) / "checkpoints", step).unlink()
    mirl.pretrain(**options, resume=True)
    assert "no checkpoint was written yet; starting at step 0" in log(options)
    assert_same_run(options["out"], uninterrupted)


def test_a_truncated_checkpoint_costs_a_step_and_no_more(options, uninterrupted):
    interrupted(options, after=4)
    folder = Path(options["out"]) / "checkpoints"
    newest, before = saved_steps(folder)
    path = checkpoint_path(folder, newest)
    path.write_bytes(path.read_bytes()[:-1000])
    with open(Path(options["out"]) / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # as a kill leaves it
    mirl.pretrain(**options, resume=True)
    assert f"checkpoint {path} cannot be read" in log(options) and f"resumed at step {before} of" in log(options)
    assert_same_run(options["out"], uninterrupted)


def test_a_full_disk_keeps_the_earlier_checkpoint(options, uninterrupted, capsys):
    interrupted(options, after=2)
    folder = Path(options["out"]) / "checkpoints"
    kept = saved_steps(folder)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))  # no file larger than 1 MiB
    try:
        code = main(["pretrain", *flags(options), "--resume"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    expected = f"cannot save {folder}.*too large; the last good checkpoint is step {kept[0]}; .*--resume"
    assert_one_line(code, capsys.readouterr().err, expected)
    assert saved_steps(folder) == kept and not list(Path(options["out"]).rglob("*.tmp"))
    mirl.pretrain(**options, resume=True)
    assert_same_run(options["out"], uninterrupted)


def test_a_teacher_goes_on_too(options, tmp_path):
    options |= {"feature": "ema", "epochs": 2, "warmup_epochs": 1.0, "block_figures": False}
    whole = mirl.pretrain(**options | {"out": str(tmp_path / "whole")})
    interrupted(options, after=4)
    mirl.pretrain(**options, resume=True)
    assert_same_run(options["out"], whole)
    assert [row["feature"] for row in rows(options["out"])] == [row["feature"] for row in rows(whole)]
    a, b = (torch.load(checkpoint_path(Path(run) / "checkpoints", 12)) for run in (whole, options["out"]))
    assert all(torch.equal(value, b["feature_average"][name]) for name, value in a["feature_average"].items())


def test_a_finished_run_is_said_to_be_complete(uninterrupted, options, capsys):
    before = losses(uninterrupted)
    assert main(["pretrain", *flags(options | {"out": uninterrupted}), "--resume"]) == 0
    output, errors = capsys.readouterr()
    assert "the run is complete (24 steps)" in output and not errors
    assert losses(uninterrupted) == before


@pytest.mark.parametrize("change", [{"model": "vit_ti_6"}, {"seed": 1}, {"patch_size": 4}, {"epochs": 5}], ids=str)
def test_resume_refuses_another_run(options, change):
    interrupted(options, after=1)
    (name,) = change
    with pytest.raises(UserError, match=f"started with --{name} .*cannot change it to .*another --out") as caught:
        mirl.pretrain(**options | change, resume=True)
    assert "\n" not in str(caught.value)


def test_resume_takes_what_is_not_given_from_the_run(options, uninterrupted):
    interrupted(options, after=1)
    mirl.pretrain(out=options["out"], resume=True)
    assert_same_run(options["out"], uninterrupted)


def test_what_is_given_counts_also_with_the_value_of_the_default(options, capsys):
    interrupted(options | {"mask_ratio": 0.5}, after=1)
    resume = ["pretrain", f"--out={options['out']}", "--resume"]
    assert_one_line(main([*resume, "--mask_ratio=0.75"]), capsys.readouterr().err, "with --mask_ratio 0.5, and .* 0.75")
    assert main([*resume, "--checkpoint_minutes=10"]) == 0
    kept = read_config(options["out"])
    assert (kept["checkpoint_minutes"], kept["mask_ratio"], kept["evaluate_epochs"]) == (10, 0.5, 2)


def test_a_checkpoint_of_another_model_is_refused(options, tiny, tmp_path):
    interrupted(options, after=1)
    other = mirl.pretrain(**tiny | {"model": "vit_ti_2", "epochs": 1}, out=str(tmp_path / "other"))
    shutil.rmtree(Path(options["out"]) / "checkpoints")
    shutil.copytree(other / "checkpoints", Path(options["out"]) / "checkpoints")
    with pytest.raises(UserError, match=r"checkpoint of step 6 in .* is of another model") as caught:
        mirl.pretrain(**options, resume=True)
    assert "\n" not in str(caught.value)


def test_resume_without_a_run_is_an_error(options, tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        mirl.pretrain(**options, resume=True)
    assert not Path(options["out"]).exists()


def test_resume_refuses_data_that_have_grown(options, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(40):
        Image.new("RGB", (32, 32), (index, 0, 0)).save(photos / f"{index:02}.png")
    options = options | {"data": str(photos)}
    interrupted(options, after=1)
    Image.new("RGB", (32, 32)).save(photos / "new.png")
    with pytest.raises(UserError, match="began with 40 images and the data now have 41"):
        mirl.pretrain(**options, resume=True)


def test_resume_takes_the_remedies_that_an_error_names(options):
    interrupted(options, after=1)
    run = mirl.pretrain(**options | {"micro_batch": 8, "clip_grad": 1.0, "precision": "bf16"}, resume=True)
    assert "resumed at step" in (run / "log.txt").read_text()
