"""Analyses are tested on the tiny encoders and class folders of tests/tasks, and on runs of random weights."""

import sys
from pathlib import Path

import pytest
from tiny_reconstructions import write_run

from mirl.analysis.reconstructor import Reconstructor

sys.path.append(str(Path(__file__).resolve().parents[1] / "tasks"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three pairs on 32 px, 16 patches; made for each module, not to be changed."""
    folder = tmp_path_factory.mktemp("reconstruct") / "run"
    write_run(folder, segments=6)
    return str(folder)


@pytest.fixture
def model(run):
    return Reconstructor(run)
