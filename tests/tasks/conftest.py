"""A finished run that tests of what comes after pre-training share."""

import pytest

import mirl


@pytest.fixture(scope="session")
def finished_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def finished(tiny, finished_folder):
    """A finished run of 4 blocks on 32 px; made once, not to be changed."""
    return finished_folder if finished_folder.exists() else mirl.pretrain(**tiny | {"epochs": 1}, out=finished_folder)
