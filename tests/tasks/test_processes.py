"""Processes of one run train as one does, make the same mistakes in one line, and are missed when they die."""

import json
import re
import signal
import subprocess
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import forks
import pytest
import torch
from PIL import Image
from tiny_runs import (
    assert_one_line,
    command,
    finish,
    losses,
    ranks,
    rows,
    wait_for_rows,
    weights,
)

import mirl
from mirl.tasks import run as running
from mirl.tasks.options import ResolvedRun
from mirl.training.runs import RunFolder, read_config

pytestmark = pytest.mark.usefixtures("undrawn")

HEADS = {
    "data": "shapes:24:32", "epochs": 1, "batch_size": 8, "width": 16, "precision": "32", "workers": 0, "report": False,
}  # fmt: skip
LOST = r"the last checkpoint is kept: add --resume to go on"
FEW_HELD_OUT = {"mirl.tasks.pretrain.HELD_OUT_LEAST": 2}
PATIENCE = {f"mirl.training.{module}.PATIENCE": timedelta(seconds=3) for module in ("companions", "processes")}


@pytest.fixture
def options(tiny, tmp_path):
    return tiny | {
        "data": "shapes:40", "batch_size": 8, "epochs": 1, "base_lr": 1e-2, "block_figures": False,
        "out": str(tmp_path / "run"),
    }  # fmt: skip


def together(options, count, *more, pictures=False, **start):
    """Let so many processes do a run; return their outputs and errors together."""
    ended = [finish(process) for process in ranks(options, count, *more, pictures=pictures, **start)]
    assert [code for code, *_ in ended] == [0] * count, ended
    return "".join(output for _, output, _ in ended), "".join(errors for *_, errors in ended)


def assert_near(left, right):
    """Check that two runs recorded losses equal to 1e-5."""
    for kind in ("train", "held_out"):
        a, b = ({row["step"]: row["loss"] for row in rows(run, kind)} for run in (left, right))
        assert a and b == pytest.approx(a, abs=1e-5)


@pytest.mark.parametrize("objective", [{}, {"feature": "ema", "extra_share": 1.0, "warmup_epochs": 0.0}], ids=str)
def test_two_and_four_processes_equal_one(options, tmp_path, monkeypatch, objective):
    """Two images are held out: of four processes, two have none to evaluate."""
    for name, few in FEW_HELD_OUT.items():
        monkeypatch.setattr(name, few)
    options |= {"data": "shapes:80", "batch_size": 16} | objective
    one = mirl.pretrain(**options)
    for count in (2,) if objective else (2, 4):
        several = tmp_path / str(count)
        output, errors = together(options | {"out": several}, count, patches=FEW_HELD_OUT)
        assert output.count("done:") == 1 and not errors
        assert_near(one, several)
        expected = weights(one)
        assert all((value - expected[name]).abs().max() < 1e-3 for name, value in weights(several).items())


def test_another_number_of_processes_goes_on(options, tmp_path):
    one = mirl.pretrain(**options | {"epochs": 3, "out": str(tmp_path / "one")})
    options |= {"epochs": 3, "checkpoint_steps": 1}
    for attempt, (count, steps) in enumerate([(2, 2), (1, 6)]):
        processes = ranks(options, count, *(["--resume"] if attempt else []), pictures=False)
        wait_for_rows(options["out"], steps, lambda p=processes: p[0].poll() is None)
        processes[-1].send_signal(signal.SIGTERM)  # told to one, all of them save and stop
        codes = [finish(process)[0] for process in processes]
        assert codes == [128 + signal.SIGTERM, *[0] * (count - 1)]
    output, _ = together(options, 4, "--resume")
    assert re.search(r"resumed at step ([6-9]|1\d) of 12", output)
    assert_near(one, options["out"])


def test_a_mistake_that_only_the_first_process_sees_is_one_line_and_ends_all(options):
    Path(options["out"]).mkdir()
    for name in ("config.yaml", "log.txt"):
        (Path(options["out"]) / name).touch()
    first, second = (finish(process) for process in ranks(options, 2))
    assert_one_line(first[0], first[2], "holds a run; add --resume")
    assert second == (0, "", "")


def test_bad_files_that_either_process_meets_are_named(options, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(33):
        Image.new("RGB", (40, 40), (index, 0, 0)).save(folder / f"{index}.png")
    bad = [f"{index}.png" for index in range(0, 33, 4)]
    for name in bad:
        (folder / name).write_bytes(b"")
    _, errors = together(options | {"data": folder, "max_bad": 0.5}, 2)
    assert not errors
    log = Path(options["out"], "log.txt").read_text()
    assert all(re.search(rf"[0-9] skipped \S*/{name}: is empty", log) for name in bad), log


@pytest.mark.parametrize("kind, more", [("detect", {"regions": 8}), ("segment", {})])
def test_two_processes_judge_every_image_once(kind, more, vit, tmp_path):
    """Detectors and segmenters, which before the first step are the one process's."""
    options = HEADS | {"weights": vit, "out": str(tmp_path / "two")} | more
    output, errors = together(options, 2, task=kind)
    assert not errors and output.count("done:") == 1
    one = getattr(mirl, kind)(**options | {"out": str(tmp_path / "one")})
    assert rows(tmp_path / "two", "held_out")[0] == rows(one, "held_out")[0]
    assert len(rows(tmp_path / "two")) == 3
    found, alone = (json.loads((run / "results.json").read_text()) for run in (tmp_path / "two", one))
    assert found["images"] == alone["images"] == 10 and found.get("pixels") == alone.get("pixels")


def test_what_is_chosen_by_the_time_of_a_run_is_chosen_by_that_of_all_processes(monkeypatch, tmp_path):
    monkeypatch.setattr(running, "probe", lambda *_: (8, 10.0))
    monkeypatch.setattr(running, "_train", forks.nothing)
    times = []

    fabric = SimpleNamespace(world_size=4, global_rank=0, is_global_zero=True, device=torch.device("cpu"))
    settings = ResolvedRun(out=str(tmp_path / "run"), epochs=20, report=False)
    task = SimpleNamespace(
        settings=settings, training=range(36), decide=lambda device, seconds: times.append(seconds), summary=list,
        whole=nullcontext, finish=forks.nothing,
    )  # fmt: skip
    running.carry_out(fabric, task, RunFolder(settings.out, resume=False, overwrite=False))
    assert times == [36 * 20 * 10 / 4]
    assert "about 30 min if data keep up" in Path(settings.out, "log.txt").read_text()
    assert task.settings.micro_batch == 8 != settings.micro_batch  # what was measured, in one place
    assert read_config(settings.run_folder) == task.settings.saved()


# A process that is lost


def test_the_command_starts_its_processes_and_names_the_one_that_was_lost(options):
    """One command, which starts the other process by itself as a new one."""
    options |= {"epochs": 50, "checkpoint_steps": 1}
    process = command(options, "--devices=2", pictures=False)
    wait_for_rows(options["out"], 2, lambda: process.poll() is None)
    (other,) = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    subprocess.run(["kill", "-9", other])
    code, _, errors = finish(process)
    lost = "rank 1 of 2 processes was lost (killed by SIGKILL); all have stopped and"
    assert errors == f"mirl pretrain: error: {lost} {LOST}\n"
    assert code == 1
    assert list(Path(options["out"], "checkpoints").glob("step_*")) and not other_alive(other)


def other_alive(pid):
    return Path("/proc", pid).exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_rank_dies_the_others_say_so_once_and_stop(options, victim):
    options |= {"epochs": 50, "checkpoint_steps": 1, "batch_size": 6}
    processes = ranks(options, 3 - victim, pictures=False)
    wait_for_rows(options["out"], 2, lambda: processes[0].poll() is None)
    processes[victim].kill()
    ended = [finish(process) for rank, process in enumerate(processes) if rank != victim]
    assert {code for code, *_ in ended} == {1}
    said = "".join(errors for *_, errors in ended)
    assert re.fullmatch(rf"mirl pretrain: error: one of {len(processes)} processes was lost, .*{LOST}\n", said), said


def test_when_a_rank_hangs_the_others_do_not_wait_for_ever(options):
    first, second = ranks(options | {"epochs": 50, "checkpoint_steps": 1}, 2, pictures=False, patches=PATIENCE)
    wait_for_rows(options["out"], 2, lambda: first.poll() is None)
    second.send_signal(signal.SIGSTOP)
    code, _, errors = finish(first)
    second.kill()
    assert code == 1
    assert re.search(rf"one of 2 processes did not answer for 0.05 minutes, it hangs or was stopped; .*{LOST}", errors)


def test_restarted_by_torchrun_the_run_goes_on_by_itself(options, tmp_path):
    """Torchrun's agent starts both ranks again when one dies; the same command, which says --overwrite."""
    whole = tmp_path / "whole"
    options |= {"epochs": 3, "checkpoint_steps": 1}
    together(options | {"out": whole}, 2)
    agent = command(options, "--devices=2", "--overwrite", pictures=False, program="torchrun_agent:main")
    wait_for_rows(options["out"], 4, lambda: agent.poll() is None)
    for pid in subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout.split()[-1:]:
        subprocess.run(["kill", "-9", pid])
    code, output, errors = finish(agent)
    assert code == 0, errors
    log = Path(options["out"], "log.txt").read_text()
    assert re.search(r"restart 1: resumed at step ([3-9]|1\d) of 12", log), log + output + errors
    assert losses(options["out"]) == losses(whole)
    a, b = weights(whole), weights(options["out"])
    assert all((a[name] == b[name]).all() for name in a)
