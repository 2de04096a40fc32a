"""`mirl study`: a study runs to its end, in pieces and after being killed, and says what it will do."""

import json
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_studies import ONE_CELL, SMALL, pretend, small_study, write_study
from tiny_runs import assert_one_line, command, finish, rows, wait_for_rows, without_pictures

import mirl
from mirl.errors import UserError
from mirl.studies import cells
from mirl.studies.results import find_results
from mirl.studies.stages import stages_of
from mirl.tasks.accuracy import write_json

SMOKE = Path(__file__).resolve().parents[2] / "studies" / "smoke.yaml"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def result(folder, cell, study="small"):
    return json.loads((folder / "studies" / "results" / study / f"{cell}.json").read_text())


def test_the_smoke_study_is_killed_goes_on_and_ends(here):
    (here / "studies").mkdir()
    (here / "studies" / "smoke.yaml").write_text(SMOKE.read_text().replace("seeds: [0, 1]", "seeds: [0]"))
    first = here / "runs" / "studies" / "smoke" / "mirl_2_seed0" / "pretrain"
    process = command({}, "smoke", task="study", cwd=here, pictures=False)
    wait_for_rows(first, 1, lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    code, output, errors = finish(process)
    assert code == 128 + signal.SIGTERM and "6 cells, 0 finished, 6 missing" in output, errors
    assert "mirl_2_seed0 is not finished; the same command goes on with it" in output
    assert not (here / "studies" / "results").exists()

    with without_pictures():
        table = mirl.study("smoke")
    assert [row["step"] for row in rows(first)] == [1, 2, 3, 4] and "resumed at step" in (first / "log.txt").read_text()
    assert "6 of 6 cells are finished" in table.read_text() and "missing" not in table.read_text()
    assert table == Path("studies/results/smoke.md") and table.with_suffix(".png").stat().st_size > 20_000
    found = list((here / "studies" / "results" / "smoke").glob("*.json"))
    assert len(found) == 6 and not any(str(here) in path.read_text() for path in found)

    whole, fresh = result(here, "mirl_4_seed0", "smoke"), result(here, "mae_2_replaced1_seed0", "smoke")
    assert list(whole["results"]) == ["held_out_loss", "finetune", "probe", "knn", "diagnosis"]
    assert {len(whole["results"]["diagnosis"][name]) for name in ("rank", "similarity", "change")} == {5}
    assert whole["results"]["finetune"]["images"] == whole["images"]["test"] == 10
    assert whole["options"]["pretrain"]["segments"] is None and whole["options"]["pretrain"]["decoder_depth"] == 1
    assert whole["seconds"].keys() == whole["options"].keys() and all(value > 0 for value in whole["seconds"].values())
    assert whole["versions"].keys() == {"mirl", "torch", "timm", "python"} and whole["hardware"]["cores"] >= 1
    assert list(fresh["results"]) == ["held_out_loss", "finetune"] and fresh["options"]["finetune"]["reinit_last"] == 1
    assert fresh["commands"][0] == result(here, "mae_2_seed0", "smoke")["commands"][0]
    cut = result(here, "truncated_mae_2_replaced1_seed0", "smoke")
    assert len(cut["results"]["diagnosis"]["rank"]) == 2 and cut["options"]["finetune"]["depth"] == 2


def test_finished_stages_are_not_run_again(here, monkeypatch):
    write_study(here, **ONE_CELL)
    called = []

    def counted(name, function):
        def run(**options):
            called.append(name)
            if name == "knn" and called.count("knn") == 1:
                raise KeyboardInterrupt
            return function(**options)

        return run

    monkeypatch.setattr(cells, "FUNCTIONS", {name: counted(name, run) for name, run in cells.FUNCTIONS.items()})
    with pytest.raises(KeyboardInterrupt):
        mirl.study("small")
    mirl.study("small")
    mirl.study("small")
    assert called == ["pretrain", "finetune", "probe", "knn", "knn", "diagnose"]
    assert result(here, "mirl_2_seed0")["results"].keys() == {"held_out_loss", "finetune", "probe", "knn", "diagnosis"}


def test_a_training_that_was_killed_at_its_end_is_not_trained_again(here, monkeypatch):
    """Before the ledger says that it is finished, or after, while checkpoints are removed."""

    def kill(*_, **__):
        raise KeyboardInterrupt

    def write_the_beginning(path, ledger):
        write_json(path, kill() if any(entry["finished"] for entry in ledger.values()) else ledger)

    write_study(here, **ONE_CELL)
    folder = here / "runs" / "studies" / "small" / "mirl_2_seed0" / "pretrain"
    monkeypatch.setattr(cells, "FUNCTIONS", cells.FUNCTIONS | {"finetune": kill})
    for patches in ({"write_json": write_the_beginning}, {"shutil": SimpleNamespace(rmtree=kill)}, {}):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            for name, value in patches.items():
                patch.setattr(cells, name, value)
            mirl.study("small")
        assert [row["step"] for row in rows(folder)] == [1, 2]
        assert (folder / "checkpoints").exists() == bool(patches)


def test_runs_of_another_definition_are_not_taken_for_these(here, monkeypatch):
    def stop(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cells, "FUNCTIONS", cells.FUNCTIONS | {"finetune": stop})
    write_study(here, **ONE_CELL)
    with pytest.raises(KeyboardInterrupt):
        mirl.study("small")
    write_study(here, **ONE_CELL | {"pretrain": SMALL["pretrain"] | {"base_lr": 0.01}})
    with pytest.raises(UserError, match="small/mirl_2_seed0/pretrain is of another definition .*; remove runs.*--out"):
        mirl.study("small")


def test_a_budget_is_kept(here, monkeypatch, capfd):
    write_study(here)
    monkeypatch.setattr(cells, "_finish", lambda *_: pytest.fail("something ran"))
    mirl.study("small", next=True, minutes=0.01)
    said = capfd.readouterr().out
    assert "14 cells, 0 finished, 14 missing" in said and "next: mae_2_seed0" in said
    assert re.search(r"no missing cell fits: [01] s are left, and the shortest takes about", said)  # slow machines: 0
    assert "no cell was timed on this machine yet" in said and "give more --minutes" in said


def test_next_runs_one_cell_and_minutes_as_many_as_fit(here, monkeypatch):
    study, ran, now = small_study(here, seeds=[0]), [], [0.0]

    def pretended(study, cell, *_):
        ran.append(cell.name)
        now[0] += 40
        pretend(study, cell, 0.5, seconds=40 / len(stages_of(study, cell)))
        return study.results / f"{cell.name}.json"

    monkeypatch.setattr("mirl.studies.running.run_cell", pretended)
    monkeypatch.setattr("mirl.studies.running.time", SimpleNamespace(monotonic=lambda: now[0]))
    mirl.study("small", next=True)
    assert ran == ["mae_2_seed0"]
    # Twice as many blocks take longer than a minute, as far as one cell can tell; the next of two blocks fits.
    mirl.study("small", minutes=1)
    assert ran == ["mae_2_seed0", "mirl_2_seed0"]
    mirl.study("small")
    assert len(ran) == 7 and not find_results(study).missing


def test_a_table_runs_nothing_and_needs_no_data(here, capfd):
    write_study(here, data="nowhere")
    mirl.study("small", table=True)
    assert "0 of 14 cells are finished" in capfd.readouterr().out
    assert (here / "studies" / "results" / "small.png").exists() and not (here / "runs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "big"}, "there is no studies/big.yaml; give small or a YAML file"),
        ({"minutes": 0}, "--minutes 0 is not allowed; give more than 0"),
        ({"table": True, "next": True}, "--table runs nothing; leave out --next and --minutes"),
        ({"data": "nowhere"}, "'nowhere' does not exist"),
        ({"data": "shapes:50:32"}, "is of 40 training images, and shapes:50:32 has 50; give --data with as many"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(here, options, message):
    write_study(here)
    with pytest.raises(UserError, match=message) as caught:
        mirl.study(**{"name": "small"} | options)
    assert "\n" not in str(caught.value) and not (here / "runs").exists()


def test_the_command_says_mistakes_in_one_line(here):
    write_study(here, seeds=["a"])
    code, _, errors = finish(command({}, "small", task="study", cwd=here))
    assert_one_line(code, errors, "studies/small.yaml: seeds, number 1 'a' is not allowed; give a whole number")
