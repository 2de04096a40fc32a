"""A checkpoint is whole or not there; the one before it is kept and used."""

import io
import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mirl.errors import UserError
from mirl.training.checkpoints import (
    KEEP,
    VERSION,
    atomic,
    checkpoint_path,
    faults_named,
    load,
    load_in_parts,
    load_newest,
    save,
    save_tensors,
    saved_steps,
    sharded_path,
    step_of,
    tidy,
)
from mirl.training.integrity import MANIFEST, digest
from mirl.training.parts import REST, part_name


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


def same(one, other):
    return one["step"] == other["step"] and torch.equal(one["model"]["weight"], other["model"]["weight"])


def flipped(data, position, bit):
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    return changed


def test_a_flipped_bit_is_noticed_wherever_it_changes_what_is_read(three):
    """Every bit of what the archive says of a tensor, and some of everything."""
    path = checkpoint_path(three, 3)
    data, whole = path.read_bytes(), load(path)
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"/data/0"))
    places = [(at, bit) for at in range(entry, entry + 64) for bit in range(8)]
    places += [(random.Random(seed + i).randrange(len(data)), i % 8) for i in range(300)]
    noticed = 0
    for at, bit in places:
        path.write_bytes(flipped(data, at, bit))
        try:
            assert same(load(path), whole), f"bit {bit} of byte {at}"
        except AssertionError:
            raise
        except Exception:  # a damaged file can raise nearly anything
            noticed += 1
    assert noticed > 0.5 * len(places)  # the rest are dates, paddings and the like, of which nothing is read


def test_pytorch_alone_does_not_notice_a_flipped_bit_of_a_tensor(three):
    """Why there are sums of our own reading; should it come to compare them, ours are needed no longer."""
    data = checkpoint_path(three, 3).read_bytes()
    inside = data.index(torch.full((4,), 3.0).numpy().tobytes()) + 1000
    changed = torch.load(io.BytesIO(flipped(data, inside, 6)), weights_only=True)
    assert not same(changed, {"step": 3, **state(3)})


def test_a_damaged_one_is_named_and_the_one_before_used(three):
    path = checkpoint_path(three, 3)
    data = path.read_bytes()
    path.write_bytes(flipped(data, len(data) // 2, 0))
    said = []
    assert load_newest(three, said.append)["step"] == 2
    (line,) = said
    assert re.fullmatch(
        rf"checkpoint {path} cannot be read \(Damaged checksum of \S+/data/0 differs\); trying the one before", line
    )
    with pytest.raises(UserError, match=r"cannot be read \(Damaged checksum .*start a new run"):
        step_of(path)


def test_what_a_run_could_not_read_is_deleted_when_it_has_saved_again(tmp_path):
    for step in (10, 20):
        save(tmp_path, step, state(step))
    checkpoint_path(tmp_path, 20).write_bytes(b"damaged")
    (tmp_path / "step_00000010 copy.pt").touch()
    save(tmp_path, 15, state(15))
    assert saved_steps(tmp_path) == [15, 10] and load_newest(tmp_path, pytest.fail)["step"] == 15
    assert (tmp_path / "step_00000010 copy.pt").exists()


def test_an_old_one_is_brought_up_to_date_and_a_later_one_refused(tmp_path):
    """The first runs' checkpoints have no version, and do not say what they are about."""
    torch.save({"step": 5, **state(5)}, checkpoint_path(tmp_path, 5))
    loaded = load_newest(tmp_path, pytest.fail)
    assert (loaded["version"], loaded["about"], loaded["jumps"]) == (VERSION, {}, [])
    assert loaded["watch"] == {"losses": []} and "losses" not in loaded
    assert same(loaded, {"step": 5, **state(5)})
    torch.save({"version": 1, "step": 5, "losses": [0.5], **state(5)}, checkpoint_path(tmp_path, 5))
    assert load_newest(tmp_path, pytest.fail)["watch"] == {"losses": [0.5]}
    path = save(tmp_path, 6, {**state(6), "version": VERSION + 1})
    expected = (
        f"checkpoint {path} is of version {VERSION + 1}, and this mirl reads versions up to {VERSION}; "
        "upgrade it: pip install --upgrade mirl"
    )
    with pytest.raises(UserError) as caught:
        load_newest(tmp_path, pytest.fail)  # the one before is of no use: it would undo what was learned since
    assert str(caught.value) == expected


def test_mapped_tensors_stay_in_their_file(three):
    path = checkpoint_path(three, 3)
    for mapped in (True, False):
        loaded = load_in_parts(path, mapped=mapped)
        assert same(loaded, {"step": 3, **state(3)})
        assert (str(path) in Path("/proc/self/maps").read_text()) == mapped
        del loaded


def test_plain_pytorch_opens_it(three):
    opened = torch.load(checkpoint_path(three, 3), weights_only=True)
    assert opened["version"] == VERSION and same(opened, {"step": 3, **state(3)})


def write_sharded(folder, step):
    """Write a checkpoint of two processes, as a folder."""
    path = sharded_path(folder, step)
    path.mkdir()
    rows = state(step)["model"]["weight"].chunk(2)
    torch.save({"version": VERSION, "step": step, "model": {}}, path / REST)
    for number, part in enumerate(rows):
        torch.save({("model", "weight"): part.clone()}, path / part_name(number, 2))
    files = {file.name: digest(file) for file in path.iterdir()}
    (path / MANIFEST).write_text(json.dumps({"version": VERSION, "step": step, "files": files}))
    return path


def test_folders_are_checkpoints_too(three):
    path = write_sharded(three, 4)
    assert saved_steps(three) == [4, 3, 2] and same(load_newest(three, pytest.fail), {"step": 4, **state(4)})
    cut_short = write_sharded(three, 5)
    (cut_short / MANIFEST).unlink()
    assert saved_steps(three) == [4, 3, 2]
    tidy(three, 4)
    assert sorted(three.iterdir()) == [checkpoint_path(three, 3), path]


@pytest.mark.parametrize("damage", ["a flipped bit", "a missing file", "a file outside", "no manifest's words"])
def test_a_damaged_folder_is_named_and_the_one_before_used(three, damage):
    path = write_sharded(three, 4)
    part = path / part_name(1, 2)
    if damage == "a flipped bit":
        data = part.read_bytes()
        part.write_bytes(flipped(data, len(data) // 2, 3))
    elif damage == "a missing file":
        part.unlink()
    elif damage == "a file outside":
        outside = checkpoint_path(three, 3)
        (path / MANIFEST).write_text(json.dumps({"files": {f"../{outside.name}": digest(outside)}}))
    else:
        (path / MANIFEST).write_text("[1]")
    said = []
    assert load_newest(three, said.append)["step"] == 3
    assert len(said) == 1 and f"checkpoint {path} cannot be read" in said[0] and "\n" not in said[0]


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


def test_an_error_that_is_no_disks_is_left_alone(tmp_path):
    with pytest.raises(RuntimeError, match="of another kind"), faults_named(tmp_path / "step_00000001.pt"):
        raise RuntimeError("of another kind")


def test_tensors_are_readable_by_those_who_may_read_other_files(tmp_path):
    (tmp_path / "other").touch()
    save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors", kind="test")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "kind": "test"} and torch.equal(file.get_tensor("a"), torch.ones(2))
