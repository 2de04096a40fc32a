"""The layout holds: imports point one way, and each third party has one door."""

import ast
from pathlib import Path

import pytest

import mirl

PACKAGE = Path(__file__).resolve().parents[1] / "mirl"
# A module may import from its own layer's names and from earlier layers. docs/architecture.md explains the order.
LAYERS = [
    ["mirl.errors"],
    ["mirl.methods", "mirl.models.patches", "mirl.models.masking"],
    ["mirl.models", "mirl.objectives"],
    ["mirl.data", "mirl.training", "mirl.heads"],
    ["mirl.reports"],
    ["mirl.formats"],
    ["mirl.tasks"],
    ["mirl.analysis", "mirl.checkup"],
    ["mirl.studies"],
    ["mirl.cli", "mirl"],
]
DOORS = {
    "bokeh": "mirl.reports.charts",
    "lightning_fabric": "mirl.training.processes",
    "jsonargparse": "mirl.cli",
    "segmentation_models_pytorch": "mirl.heads.upernet",
    "tensorboard": "mirl.training.events",
}
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(module: str) -> int:
    matches = [
        (len(prefix), i) for i, names in enumerate(LAYERS) for prefix in names if f"{module}.".startswith(f"{prefix}.")
    ]
    return max(matches)[1]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    own = {name for name in imports(MODULES[module]) if name in MODULES}
    assert {name for name in own if layer(name) > layer(module)} == set()
    if module.startswith("mirl.models"):
        assert not {name for name in own if name.startswith("mirl.objectives")}
    if module.startswith("mirl.objectives"):
        assert own <= {"mirl", "mirl.methods", "mirl.models.patches", "mirl.errors"} | {
            m for m in own if "objectives" in m
        }


def test_torchvisions_detectors_are_behind_the_heads():
    users = {module for module, path in MODULES.items() if any("models.detection" in name for name in imports(path))}
    assert users == {"mirl.heads.mask_rcnn", "mirl.heads.regions"}


@pytest.mark.parametrize("package", DOORS)
def test_a_third_party_has_one_door(package):
    users = {module for module, path in MODULES.items() if any(package in name for name in imports(path))}
    assert users == {DOORS[package]}


def test_public_names_are_listed_and_known_to_type_checkers():
    tree = ast.parse(MODULES["mirl"].read_text())
    found = [
        (node.module, alias) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    typed = {alias.asname: module for module, alias in found if alias.asname == alias.name}
    assert typed == mirl._HOMES
    assert set(dir(mirl)) == set(mirl.__all__) == {*typed, "__version__"}
    assert all(hasattr(mirl, name) for name in dir(mirl))


def test_no_file_has_a_name_that_says_nothing():
    empty = {"utils", "util", "misc", "common", "helpers", "base", "engine"}
    assert [path for path in PACKAGE.rglob("*.py") if path.stem in empty] == []
