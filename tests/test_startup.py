"""Commands start fast because they load nothing that they do not need: held by what is loaded, not by a clock."""

import json
import subprocess
import sys

import pytest

from mirl.cli import COMMANDS

TORCH = ("torch", "numpy", "timm", "torchvision", "PIL", "matplotlib")
OTHERS = ("sklearn", "scipy.stats", "tensorboard", "bokeh", "jinja2", "pandas", "onnx", "gradio", "transformers")


def loaded(arguments, folder):
    """Return the exit code of a `mirl` command and the modules that it has loaded at its end."""
    code = (
        "import json, sys\nfrom mirl.cli import main\n"
        "try: code = main(sys.argv[1:])\nexcept SystemExit as leave: code = leave.code\n"
        "print('\\n' + json.dumps([code, list(sys.modules)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments.split()], cwd=folder, capture_output=True, text=True, check=True
    )
    found, modules = json.loads(done.stdout.splitlines()[-1])
    return found, set(modules)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("--help", 0),
        *((f"{command} --help", 0) for command in COMMANDS),
        ("finetune --bogus 1", 2),
        ("probe --pool max", 2),
        ("convert a b --to keras", 2),
        ("study broken.yaml", 2),
    ],
)
def test_help_and_mistakes_load_no_pytorch(tmp_path, arguments, expected):
    (tmp_path / "broken.yaml").write_text("titel: a study\n")
    code, modules = loaded(arguments, tmp_path)
    assert code == expected
    assert modules & {*TORCH, *OTHERS} == set()
