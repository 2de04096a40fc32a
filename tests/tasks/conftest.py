"""Finished runs, encoders and images that tests share."""

import pytest
from tiny_classes import PLAIN, write_encoder, write_patterns
from tiny_runs import without_pictures

import mirl


@pytest.fixture
def undrawn():
    """Let runs go without pictures, which take longer than all else."""
    with without_pictures():
        yield


@pytest.fixture(scope="session")
def finished_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def finished(tiny, finished_folder):
    """A finished run of 4 blocks on 32 px; made once, not to be changed."""
    return finished_folder if finished_folder.exists() else mirl.pretrain(**tiny | {"epochs": 1}, out=finished_folder)


@pytest.fixture(scope="module")
def module_run(tmp_path_factory):
    """Where the run lies that the tests of a module share."""
    return tmp_path_factory.mktemp("module") / "run"


@pytest.fixture
def uninterrupted(options, module_run):
    """The run of a module's `options` that every interrupted one must equal; made once, not to be changed."""
    if not module_run.exists():
        mirl.pretrain(**options | {"out": str(module_run), "checkpoint_minutes": 10})
    return module_run


@pytest.fixture(scope="session")
def patterns(tmp_path_factory):
    """Class folders of four patterns: 96 images to train on, 24 to test on."""
    return str(write_patterns(tmp_path_factory.mktemp("data") / "patterns", train=24, val=6))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """An encoder of 2 blocks on 16 px, of random weights."""
    return write_encoder(tmp_path_factory.mktemp("weights") / "encoder")


@pytest.fixture(scope="session")
def vit(tmp_path_factory):
    """An encoder of 2 blocks on 32 px in patches of 8, of random weights."""
    return write_encoder(tmp_path_factory.mktemp("weights") / "vit", size=(32, 32))


@pytest.fixture(scope="session")
def classified_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("classified") / "run"


@pytest.fixture
def classified(finished, patterns, classified_folder):
    """The finished run, fine-tuned to tell patterns apart; made once, not to be changed."""
    if not classified_folder.exists():
        mirl.finetune(weights=str(finished), data=patterns, **PLAIN, out=classified_folder)
    return classified_folder


@pytest.fixture(scope="session")
def runs_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def runs(tiny, finished, classified, patterns, runs_folder):
    """Return a function from a name to a finished run; each is made once, not to be changed."""

    def run(name):
        path = runs_folder / name
        if name in ("mirl", "mean"):
            return finished if name == "mirl" else classified
        if name == "mae" and not path.exists():
            mirl.pretrain(**tiny | {"epochs": 1, "method": "mae"}, out=path)
        if name == "normed" and not path.exists():
            mirl.pretrain(**tiny | {"epochs": 1, "weight_norm": True}, out=path)
        if name == "cls" and not path.exists():
            mirl.finetune(weights=str(finished), data=patterns, **PLAIN | {"epochs": 1, "pool": "cls"}, out=path)
        return path

    return run
