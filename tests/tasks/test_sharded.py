"""Several devices train as one does, each with the whole model or a share of it, and go on in any number."""

import json
import os
import shutil
import socket

import pytest
import torch
from forks import server
from tiny_runs import ENVIRONMENT, flags, rows, weights

import mirl
from mirl.errors import UserError
from mirl.training import checkpoints

CLIP = 0.5
OPTIONS = {
    "data": "shapes:40", "model": "vit_32x2_4", "image_size": 32, "patch_size": 8, "decoder_width": 32,
    "decoder_depth": 1, "epochs": 1, "batch_size": 8, "micro_batch": 2, "workers": 0, "precision": "32",
    "clip_grad": CLIP, "checkpointing": True, "checkpoint_steps": 2, "block_figures": False, "report": False,
}  # fmt: skip


def start(processes, *outs, **options):
    """Start `mirl pretrain` as torchrun does; each process may see another folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    count = str(processes)
    environment = ENVIRONMENT | {
        "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_WORLD_SIZE": "1", "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    ranks = [environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    arguments = [["pretrain", *flags(OPTIONS | options | {"out": outs[rank % len(outs)]})] for rank in range(processes)]
    return [server().start(*given) for given in zip(arguments, ranks, strict=True)]


def finish(processes):
    ended = [process.communicate(timeout=300) for process in processes]
    codes, errors = [process.returncode for process in processes], [error for _, error in ended]
    assert (codes, errors) == ([0] * len(processes), [""] * len(processes)), ended


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of one process, and the same of two that each have the model, and of two that share it."""
    folder = tmp_path_factory.mktemp("runs")
    several = [start(2, folder / strategy, strategy=strategy) for strategy in ("ddp", "fsdp")]
    mirl.pretrain(**OPTIONS, out=folder / "one")
    for processes in several:
        finish(processes)
    return folder


def assert_equal_runs(run, other):
    """Check that two runs recorded and learned the same, but for the order of sums."""
    for kind, name in (("train", "loss"), ("train", "grad_norm"), ("held_out", "loss"), ("gradients", "blocks")):
        a, b = ([row[name] for row in rows(folder, kind)] for folder in (run, other))
        assert len(a) == len(b) > 0
        assert all(left == pytest.approx(right, rel=1e-5) for left, right in zip(a, b, strict=True)), (kind, name)
    a, b = weights(run), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        left, right = a[name], b[name]
        if name.endswith(("qkv.bias", "kv.bias")):
            # A key's bias changes no softmax: its gradient is rounding errors, which AdamW makes steps of.
            keys = slice(len(left) // 3, -len(left) // 3) if name.endswith("qkv.bias") else slice(len(left) // 2)
            left, right = left.clone(), right.clone()
            left[keys], right[keys] = 0, 0
        assert (left - right).abs().max() < 1e-5, name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_devices_train_as_one_does(runs, strategy):
    assert_equal_runs(runs / "one", runs / strategy)
    assert min(row["grad_norm"] for row in rows(runs / strategy)) > CLIP
    images = torch.rand(2, 3, 32, 32)
    one, two = (mirl.load_encoder(str(runs / name)).eval() for name in ("one", strategy))
    assert (one(images) - two(images)).abs().max() < 1e-4


def test_each_process_writes_its_share(runs):
    newest = runs / "fsdp" / "checkpoints" / "step_00000004"
    parts = [f"part_0000{rank}_of_00002.pt" for rank in (0, 1)]
    manifest = json.loads((newest / "manifest.json").read_text())
    assert (manifest["step"], sorted(manifest["files"])) == (4, [*parts, "rest.pt"])
    sizes = [(newest / name).stat().st_size for name in parts]
    whole = (runs / "one" / "checkpoints" / "step_00000004.pt").stat().st_size
    assert max(sizes) < 0.6 * whole
    shares = [torch.load(newest / name, weights_only=True) for name in parts]
    name = ("model", "encoder.blocks.0.attn.qkv.weight")
    assert [share[name].shape for share in shares] == [(48, 32)] * 2
    assert not any(key in torch.load(newest / "rest.pt", weights_only=True)["model"] for _, key, *_ in shares[0])


def before_the_end(run, out):
    """Copy a run as it was after two steps of four."""
    shutil.copytree(run, out)
    (newest,) = (out / "checkpoints").glob("step_00000004*")
    shutil.rmtree(newest) if newest.is_dir() else newest.unlink()
    return out


@pytest.mark.parametrize(
    ("begun", "processes", "strategy"),
    [("fsdp", 1, "auto"), ("one", 2, "fsdp"), ("fsdp", 4, "fsdp")],
)
def test_a_run_goes_on_with_any_number_of_devices(runs, tmp_path, begun, processes, strategy):
    run = before_the_end(runs / begun, tmp_path / "run")
    if processes == 1:
        mirl.pretrain(**OPTIONS, out=run, resume=True)
    else:
        finish(start(processes, run, strategy=strategy, resume=True, micro_batch=1))
    assert "resumed at step 2 of 4" in (run / "log.txt").read_text()
    assert_equal_runs(runs / "one", run)


def test_machines_that_see_different_checkpoints_stop(runs, tmp_path):
    first = shutil.copytree(runs / "ddp", tmp_path / "first")
    second = before_the_end(runs / "ddp", tmp_path / "second")
    errors = [process.communicate(timeout=100)[1] for process in start(2, first, second, resume=True)]
    assert f"of different steps in {first / 'checkpoints'}, 2 and 4; let all machines see the same --out" in errors[0]
    assert errors[0].count("\n") == 1 and not errors[1]


def test_a_damaged_share_is_named_and_the_checkpoint_before_is_used(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "fsdp", run)
    share = run / "checkpoints" / "step_00000004" / "part_00001_of_00002.pt"
    content = bytearray(share.read_bytes())
    content[len(content) // 2] ^= 1
    share.write_bytes(content)
    said = []
    state = checkpoints.load_newest(run / "checkpoints", said.append)
    assert state["step"] == 2
    assert len(said) == 1 and "step_00000004 cannot be read" in said[0] and share.name in said[0]


def test_a_sharded_checkpoint_becomes_one_file(runs, tmp_path):
    checkpoints.join(runs / "fsdp" / "checkpoints" / "step_00000004", tmp_path / "checkpoint.pt")
    joined = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    one = torch.load(runs / "one" / "checkpoints" / "step_00000004.pt", weights_only=True)
    assert joined.keys() == one.keys()
    assert {name: value.shape for name, value in joined["model"].items()} == {
        name: value.shape for name, value in one["model"].items()
    }
    moments = [state["optimizer"]["state"] for state in (joined, one)]
    assert moments[0].keys() == moments[1].keys()
    for index, own in moments[1].items():
        assert {name: value.shape for name, value in moments[0][index].items()} == {
            name: value.shape for name, value in own.items()
        }


def test_a_teacher_that_follows_a_sharded_encoder(tmp_path):
    teacher = {"feature": "ema", "extra_share": 1.0, "warmup_epochs": 0.0, "checkpointing": False}
    two = start(2, tmp_path / "two", strategy="fsdp", **teacher)
    one = mirl.pretrain(**OPTIONS | teacher, out=tmp_path / "one")
    finish(two)
    assert_equal_runs(one, tmp_path / "two")


def test_sharing_needs_several_devices(tmp_path):
    with pytest.raises(UserError, match="--strategy fsdp shares a model among several devices, and there is one"):
        mirl.pretrain(**OPTIONS, out=tmp_path / "run", strategy="fsdp")
    assert os.listdir(tmp_path) == []
