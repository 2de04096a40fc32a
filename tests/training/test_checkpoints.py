"""A checkpoint is whole or not there; the one before it is kept and used."""

import pytest
import torch
from safetensors import safe_open

from mirl.errors import UserError
from mirl.training.checkpoints import KEEP, atomic, checkpoint_path, load_newest, save, save_tensors, saved_steps


def state(step):
    return {"model": {"weight": torch.full((64, 64), float(step))}}


@pytest.fixture
def three(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, state(step))
    return tmp_path


def test_the_newest_are_kept_and_nothing_else_is_left(three):
    assert saved_steps(three) == [3, 2] and KEEP == 2
    assert sorted(path.name for path in three.iterdir()) == ["step_00000002.pt", "step_00000003.pt"]


def test_the_newest_comes_back_without_a_word(three):
    loaded = load_newest(three, pytest.fail)
    assert loaded["step"] == 3 and torch.equal(loaded["model"]["weight"], state(3)["model"]["weight"])


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_a_truncated_one_is_named_and_the_one_before_used(three, keep):
    path = checkpoint_path(three, 3)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if keep < 1 else keep])
    said = []
    assert load_newest(three, said.append)["step"] == 2
    assert len(said) == 1 and str(path) in said[0] and "\n" not in said[0]


def test_code_in_a_checkpoint_is_not_run(three):
    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemExit('ran')",))

    torch.save({"step": 4, "model": Bomb()}, checkpoint_path(three, 4))
    said = []
    assert load_newest(three, said.append)["step"] == 3
    assert len(said) == 1


def test_none_readable_is_an_error(three):
    for step in saved_steps(three):
        checkpoint_path(three, step).write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"none of the 2 checkpoints.*--overwrite"):
        load_newest(three, lambda _: None)


def test_no_checkpoint_is_none(tmp_path):
    assert load_newest(tmp_path, pytest.fail) is None
    assert load_newest(tmp_path / "missing", pytest.fail) is None


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic(path) as temporary:
        temporary.write_text("new, half")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"


def test_what_a_kill_left_is_cleared_by_the_next_save(three):
    (three / "step_00000004.pt.tmp").write_bytes(b"half")
    save(three, 5, state(5))
    assert not list(three.glob("*.tmp"))


def test_an_unwritable_place_is_a_user_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(UserError, match=r"cannot save .*no checkpoint exists yet"):
        save(tmp_path / "checkpoints", 1, state(1))


def test_tensors_are_readable_by_those_who_may_read_other_files(tmp_path):
    (tmp_path / "other").touch()
    save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors", kind="test")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "kind": "test"} and torch.equal(file.get_tensor("a"), torch.ones(2))
