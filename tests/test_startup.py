"""Commands start fast because they load nothing that they do not need: held by what is loaded, not by a clock."""

import json
import subprocess
import sys

import pytest

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
        ("finetune --help", 0),
        ("pretrain --help", 0),
        ("finetune --bogus 1", 2),
        ("study broken.yaml", 2),
    ],
)
def test_help_and_mistakes_load_no_pytorch(tmp_path, arguments, expected):
    (tmp_path / "broken.yaml").write_text("titel: a study\n")
    code, modules = loaded(arguments, tmp_path)
    assert code == expected
    assert modules & {*TORCH, *OTHERS} == set()


def test_a_report_is_explained_without_pytorch(tmp_path):
    code, modules = loaded("report --help", tmp_path)  # its pictures and series are numpy's and Pillow's
    assert code == 0 and modules & ({*TORCH, *OTHERS} - {"numpy", "PIL"}) == set()
