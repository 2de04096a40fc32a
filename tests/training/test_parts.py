"""Tensors whose rows lie in several files, and folders that are not what they should be."""

import json
import os

import pytest
import torch

from mirl.training.integrity import Damaged, check_folder, digest
from mirl.training.parts import Rows, joined, leaves, part_name, read, without


@pytest.mark.parametrize("counts", [[5], [3, 2], [2, 2, 1, 0], [0, 5]])
def test_slices_of_rows_are_slices_of_the_whole(counts):
    whole = torch.arange(10.0).reshape(5, 2)
    rows = Rows(list(whole.split(counts)))
    assert rows.shape == (5, 2)
    for begin in range(7):
        for end in range(7):
            assert torch.equal(rows[begin:end], whole[begin:end])
    assert torch.equal(rows[:], whole)


def test_what_is_taken_out_comes_back_to_its_place(tmp_path):
    state = {"model": {"a.weight": torch.arange(6.0).reshape(3, 2)}, "optimizer": {"state": {0: {"m": torch.ones(3)}}}}
    state |= {"step": 7, "empty": {}, "rate": torch.tensor(0.5)}
    sharded = {place: value for place, value in leaves(state) if getattr(value, "ndim", 0)}
    torch.save(without(state, sharded), tmp_path / "rest.pt")
    for rank, some in enumerate((slice(2), slice(2, None))):
        torch.save({place: value[some].clone() for place, value in sharded.items()}, tmp_path / part_name(rank, 2))
    found = joined(read(tmp_path))
    assert torch.equal(found["model"]["a.weight"], state["model"]["a.weight"])
    assert torch.equal(found["optimizer"]["state"][0]["m"], torch.ones(3))
    assert (found["step"], found["empty"], float(found["rate"])) == (7, {}, 0.5)
    (tmp_path / part_name(1, 2)).unlink()
    with pytest.raises(ValueError, match="the others are missing"):
        read(tmp_path)


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_file_that_the_manifest_does_not_name_is_refused(tmp_path):
    """It was compared with nothing."""
    torch.save({"step": 1}, tmp_path / "rest.pt")
    named = {"rest.pt": digest(tmp_path / "rest.pt")}
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 1, "step": 1, "files": named}))
    check_folder(tmp_path)
    torch.save({("model", "a"): torch.ones(2)}, tmp_path / part_name(0, 1))
    with pytest.raises(Damaged, match="does not name part_00000_of_00001.pt"):
        check_folder(tmp_path)


@pytest.mark.parametrize("name", ["rest.pt", part_name(0, 1)])
def test_a_malicious_file_is_refused_and_not_executed(tmp_path, name):
    torch.save({"step": 1}, tmp_path / "rest.pt")
    torch.save({("model", "a"): torch.ones(2)}, tmp_path / part_name(0, 1))
    assert read(tmp_path)["step"] == 1
    torch.save(Malicious(tmp_path / "executed"), tmp_path / name)
    with pytest.raises(Exception, match="weights_only|Weights only"):
        read(tmp_path)
    assert not (tmp_path / "executed").exists()
