"""The examples run and learn, and what the run and the README tell users to type works."""

import inspect
import re
import runpy
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import mirl
from mirl.cli import COMMANDS
from mirl.formats.paddle import ADMITTED

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()


def test_plain_pytorch_learns_in_at_most_80_lines():
    path = REPOSITORY / "examples" / "plain_pytorch.py"
    assert len(path.read_text().splitlines()) <= 80
    losses = runpy.run_path(str(path))["main"](steps=12, batch_size=8)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


@pytest.mark.filterwarnings("ignore:An ill-conditioned matrix")
def test_a_runs_encoder_can_be_read_out_and_used_as_it_says(tiny, tmp_path, capsys):
    run = mirl.pretrain(**tiny, out=str(tmp_path / "run"))
    block = capsys.readouterr().out.split("can be resumed\n")[1]
    names: dict = {}
    exec("\n".join(line.strip() for line in block.splitlines()), names)
    assert names["features"].shape == (1, 192)

    table = runpy.run_path(str(REPOSITORY / "examples" / "read_out.py"))["main"](run, train=60, test=20)
    assert list(table) == ["raw pixels", "untrained encoder", "this encoder"]
    assert all(0 <= value <= 1 for row in table.values() for value in row.values())
    assert (run / "read_out.json").exists()


def test_the_readmes_commands_options_and_files_exist():
    commands_options = (
        *(mirl.Pretraining, mirl.Finetuning, mirl.EvaluateOptions),
        *(mirl.ProbeOptions, mirl.KNNOptions, mirl.EmbedOptions),
    )
    options = {f"--{field.name}" for kind in commands_options for field in fields(kind)} | {"--config", "--help"}
    options |= {f"--{name}" for name in inspect.signature(mirl.convert).parameters}
    commands = re.findall(r"mirl (\w+)((?: [^\s`]+)*)", "\n".join(re.findall(r"`[^`]+`|^    .*$", README, re.M)))
    given = {command for command, _ in commands if command in COMMANDS}
    assert given == set(COMMANDS)
    assert {word for _, rest in commands for word in shlex.split(rest) if word.startswith("--")} <= options
    targets = set(re.findall(r"^    make (\w+)", README, re.M)) | set(re.findall(r"`make (\w+)`", README))
    makefile = (REPOSITORY / "Makefile").read_text()
    assert {"setup", "demo", "test", "lint"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets)
    links = re.findall(r"\]\(([^)]+)\)", README) + re.findall(r"recipes/[\w/]+\.yaml", README)
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


def test_the_readmes_tree_names_every_part_of_the_package():
    parts = {path.name for path in (REPOSITORY / "mirl").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert [part for part in sorted(parts) if f"      {part}/" not in README] == []


def test_the_examples_of_loading_weights_run(tiny, tmp_path, capsys):
    run = mirl.pretrain(**tiny, out=str(tmp_path / "run"))
    capsys.readouterr()
    examples = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "converting.md").read_text(), re.S)
    for code in examples:
        exec(code.replace('"RUN"', repr(str(run))), {})
    assert capsys.readouterr().out.splitlines() == [
        "torch.Size([2, 192]) torch.Size([2, 145, 192])",
        "2 torch.Size([2, 12, 192])",
    ]


def test_the_names_that_the_unpickler_admits_are_documented():
    documented = re.findall(r"^\| `([\w.]+)` \|", (REPOSITORY / "docs" / "converting.md").read_text(), re.M)
    assert [name for name in documented if "." in name] == [*ADMITTED, "_codecs.encode"]
