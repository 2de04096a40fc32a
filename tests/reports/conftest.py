"""A real run, made once, and one written by hand that has everything."""

import pytest
from written_runs import write_results, write_run

import mirl


@pytest.fixture(scope="session")
def real_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("real") / "run"


@pytest.fixture
def real(tiny, real_folder):
    """A finished run of 4 blocks on 32 px with all that it records; not to be changed."""
    return real_folder if real_folder.exists() else mirl.pretrain(**tiny | {"method": "mirl"}, out=real_folder)


@pytest.fixture(scope="session")
def rich(tmp_path_factory):
    """A run written by hand, with pairs, results of every kind and incidents; not to be changed."""
    folder = write_run(tmp_path_factory.mktemp("rich") / "run")
    write_results(folder)
    return folder
