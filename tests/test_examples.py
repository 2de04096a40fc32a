"""The examples run and learn, and what the run and the README tell users to type works."""

import re
import runpy
from pathlib import Path

import pytest

import mirl
from mirl.cli import COMMANDS, build_parser
from mirl.formats.paddle import ADMITTED

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()


def test_plain_pytorch_learns_in_at_most_80_lines():
    path = REPOSITORY / "examples" / "plain_pytorch.py"
    assert len(path.read_text().splitlines()) <= 80
    losses = runpy.run_path(str(path))["main"](steps=12, batch_size=8)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("plain_pytorch.py", "--help", "--steps"),
        ("plain_pytorch.py", "--steps many", "invalid int value: 'many'"),
        ("read_out.py", "", "required: run"),
        ("read_out.py", "gone", "error: gone is no folder; give that of a run, e.g. runs/demo"),
        ("read_out.py", ".", "error: . holds no encoder; give a run folder"),
    ],
)
def test_an_example_says_how_it_is_used(script, arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [script, *arguments.split()])
    with pytest.raises(SystemExit) as leave:
        runpy.run_path(str(REPOSITORY / "examples" / script), run_name="__main__")
    assert said in "".join(capsys.readouterr()) + str(leave.value.code)  # which Python prints if it is text


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


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{path.name}" for path in REPOSITORY.glob("docs/*.md"))])
def test_documented_commands_have_the_options_that_they_are_given(document):
    code = "\n".join(re.findall(r"`[^`\n]+`|^    .*$", (REPOSITORY / document).read_text(), re.M)).replace("\\\n", " ")
    for command, rest in re.findall(r"mirl (\w+)((?: +[^\s`|;]+)*)", code):
        if command in COMMANDS:
            known = {option for action in build_parser(command)._actions for option in action.option_strings}
            given = {word.partition("=")[0] for word in re.findall(r"(?<!\S)--[a-z]\S*", rest)}
            assert given <= known, f"{command}{rest}"


def test_the_readmes_commands_targets_and_files_exist():
    commands = re.findall(r"mirl (\w+)", "\n".join(re.findall(r"`[^`]+`|^    .*$", README, re.M)))
    assert {command for command in commands if command in COMMANDS} == set(COMMANDS)
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
    run = mirl.pretrain(**tiny | {"epochs": 1, "block_figures": False}, out=str(tmp_path / "run"))
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
