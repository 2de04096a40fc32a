"""What tells a detector from a segmenter, and both from everything else that `--weights` may be."""

import json

import pytest
import torch
import yaml
from safetensors.torch import save_file

import mirl
from mirl.errors import UserError
from mirl.tasks.settings.detection import ResolvedDetection
from mirl.tasks.settings.finetuning import ResolvedFinetuning
from mirl.tasks.settings.pretraining import Resolved
from mirl.tasks.settings.segmentation import ResolvedSegmentation
from mirl.tasks.trained import as_it_says, read_trained, save_trained, trained_by
from mirl.training.checkpoints import save
from mirl.training.runs import NOUNS, TRAINED

SETTINGS = {"detect": ResolvedDetection(), "segment": ResolvedSegmentation()}
OTHER = {"detect": "segment", "segment": "detect"}
COMMANDS = pytest.mark.parametrize("command", list(SETTINGS))


@pytest.fixture
def run(tmp_path):
    """A folder with nothing in it."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def write_config(folder, settings):
    (folder / "config.yaml").write_text(yaml.safe_dump(settings.saved()))


def write_trained(path, command):
    """Write a model of one weight as if `command` had trained it; return the path."""
    save_trained(torch.nn.Linear(1, 1, bias=False), SETTINGS[command], {"classes": ["a"]}, path)
    return path


def refused(weights, command):
    with pytest.raises(UserError) as caught:
        read_trained(weights, command)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@COMMANDS
@pytest.mark.parametrize("name", ["moved.safetensors", *TRAINED.values()])
def test_a_file_tells_what_trained_it_whatever_its_name(run, command, name):
    path = write_trained(run / name, command)
    assert trained_by(path) == trained_by(str(path)) == command
    facts, state = read_trained(path, command)
    assert facts == {"settings": json.loads(json.dumps(SETTINGS[command].saved())), "classes": ["a"]}
    assert list(state) == ["weight"] and state["weight"].shape == (1, 1)
    other = OTHER[command]
    assert refused(path, other) == (
        f"{path} holds a {NOUNS[command]}, no {NOUNS[other]}; give a run folder of mirl {other}"
    )


@COMMANDS
def test_a_run_is_told_by_its_file_or_by_its_options(run, command):
    write_config(run, SETTINGS[command])
    assert trained_by(run) == command
    other = OTHER[command]
    message = f"{run} holds a {NOUNS[command]}, no {NOUNS[other]}; give a run folder of mirl {other}"
    assert refused(run, other) == message
    write_trained(run / TRAINED[command], command)
    (run / "config.yaml").unlink()
    assert trained_by(run) == command and refused(run, other) == message


@COMMANDS
def test_an_unfinished_run_is_read_from_its_checkpoint(run, command, capsys):
    write_config(run, SETTINGS[command])
    assert refused(run, command) == (
        f"{run} holds no {NOUNS[command]} yet; finish it with mirl {command} --out {run} --resume"
    )
    save(run / "checkpoints", 7, {"model": {"weight": torch.ones(1)}, "about": {"classes": ["b"]}})
    for weights in (run, run / TRAINED[command]):
        facts, state = read_trained(weights, command)
        assert facts["settings"] == SETTINGS[command].saved() and facts["classes"] == ["b"]
        assert state["weight"].tolist() == [1]
    assert capsys.readouterr().out.count(f"{run} is not finished: using its checkpoint of step 7") == 2


@pytest.mark.parametrize("settings", [Resolved(), ResolvedFinetuning()], ids=["pretrain", "finetune"])
def test_other_runs_hold_neither(run, settings):
    write_config(run, settings)
    save_file({"weight": torch.ones(1)}, run / "model.safetensors", {"mirl": json.dumps({"architecture": "vit"})})
    save_file({"weight": torch.ones(1)}, run / "bare.safetensors")
    for weights in (run, run / "model.safetensors", run / "bare.safetensors"):
        assert trained_by(weights) is None
        for command, noun in NOUNS.items():
            assert refused(weights, command) == f"{weights} holds no {noun}; give a run folder of mirl {command}"


@pytest.mark.parametrize("weights", ["vit_base_patch16_224.mae", "nowhere", "nowhere/segmenter.safetensors"])
def test_what_is_not_there_is_neither(weights):
    assert trained_by(weights) is None
    assert "holds no segmenter; give a run folder of mirl segment" in refused(weights, "segment")


@COMMANDS
def test_a_damaged_file_is_still_known_by_its_name(run, command):
    """So that it is named as what it was meant to be."""
    path = write_trained(run / TRAINED[command], command)
    path.write_bytes(path.read_bytes()[:50])
    assert trained_by(path) == trained_by(run) == command
    assert f"{path} cannot be read" in refused(path, command)
    path.rename(run / "moved.safetensors")
    assert trained_by(run / "moved.safetensors") is None


@COMMANDS
@pytest.mark.parametrize("error", [KeyError("encoder"), RuntimeError("Missing key(s):\n\t'weight'"), TypeError("x")])
def test_what_cannot_be_built_is_one_line(command, error):
    expected = rf"^a\.safetensors is not the {NOUNS[command]} that it says \([^\n]+\); train it again$"
    with pytest.raises(UserError, match=expected), as_it_says("a.safetensors", command):
        raise error


def test_a_missing_package_is_not_the_files_fault():
    with pytest.raises(UserError, match="^install it$"), as_it_says("a.safetensors", "segment"):
        raise UserError("install it") from ImportError("no module")


@COMMANDS
@pytest.mark.parametrize("other", ["pretrain", "finetune", "detect", "segment"])
def test_a_run_is_resumed_by_its_own_command_alone(run, command, other):
    write_config(run, SETTINGS[command])
    kept = (run / "config.yaml").read_text()
    with pytest.raises(UserError) as caught:
        getattr(mirl, other)(out=run, resume=True)
    if other != command:
        remedy = f"go on with mirl {command} --out {run} --resume"
        assert str(caught.value) == f"{run} is a run of mirl {command}; {remedy}"
    assert (run / "config.yaml").read_text() == kept
