"""Fully sharded data parallelism (FSDP2): each process holds some rows of every weight, gradient and moment.

Weights are gathered for one part of the model at a time (`Task.parts`), when it computes. Whatever is no training step
(evaluation, pictures, results, averages of weights) sees an ordinary model of gathered weights: `Task.whole`.
"""

import copy
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mirl.training import checkpoints
from mirl.training.files import sync
from mirl.training.integrity import MANIFEST, digest
from mirl.training.parts import REST, Rows, leaves, part_name, without
from mirl.training.processes import Fabric, as_one, from_all, full


def shard(model: nn.Module, parts: Sequence[nn.Module], mesh: DeviceMesh) -> nn.Module:
    """Shard a model among the devices of `mesh`; return its skeleton, a copy without the storage of weights."""
    weights = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    skeleton: nn.Module = copy.deepcopy(model, weights)
    # PyTorch fears that the output of a part, often a view, is changed in place. Nothing here does that.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for part in parts:
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return skeleton


@torch.no_grad()
def gathered(model: nn.Module, skeleton: nn.Module) -> nn.Module:
    """Return an ordinary module with the weights of a sharded model; every process must call it."""
    result = copy.deepcopy(skeleton)
    result.load_state_dict({name: full(value) for name, value in model.state_dict().items()}, assign=True)
    return result.train(model.training)


def own_rows(target: Tensor | None, value: Tensor | Rows) -> Tensor:
    """Return `value` sharded as `target` is.

    Raises:
        ValueError: if the two differ in shape.
    """
    if not isinstance(target, DTensor):
        return value[:] if isinstance(value, Rows) else value
    if value.shape != target.shape:
        raise ValueError(f"a tensor of {tuple(value.shape)} where the model has {tuple(target.shape)}")
    mesh = target.device_mesh
    size = -(-target.shape[0] // mesh.size())  # the last processes may have fewer rows, or none
    rows = value[mesh.get_local_rank() * size : (mesh.get_local_rank() + 1) * size].to(target.device)
    return DTensor.from_local(
        rows, mesh, target.placements, run_check=False, shape=target.shape, stride=target.stride()
    )


def own_weights(module: nn.Module, state: dict[str, Tensor | Rows]) -> dict[str, Tensor]:
    """Return a module's state, sharded as the module is."""
    own = module.state_dict()
    return {name: own_rows(own.get(name), value) for name, value in state.items()}


def own_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state, its moments sharded as its parameters are.

    Numbers of steps, which may stay on the CPU, are copied out of a file that is mapped.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    own = {
        index: {
            name: own_rows(parameters[index], value) if isinstance(value, Rows) or value.ndim else value.clone()
            for name, value in moments.items()
        }
        for index, moments in state["state"].items()
    }  # fmt: skip
    return {**state, "state": own}


def save(fabric: Fabric, folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write `state`, some of whose tensors are sharded, as the checkpoint of `step`; every process must call it.

    Raises:
        UserError: if the disk is full or not writable; earlier checkpoints are untouched.
    """
    path = checkpoints.sharded_path(folder, step)
    temporary = path.with_name(path.name + ".tmp")
    with as_one(fabric), checkpoints.faults_named(path):
        if fabric.is_global_zero:
            checkpoints.delete(temporary)
            temporary.mkdir(parents=True)
    shards = {place: value for place, value in leaves(state) if isinstance(value, DTensor)}
    mine = {}
    with as_one(fabric), checkpoints.faults_named(path):
        # Copies, because a row may be part of a larger storage, which would be written whole.
        rows = {place: value.to_local().detach().to("cpu", copy=True) for place, value in shards.items()}
        name = part_name(fabric.global_rank, fabric.world_size)
        mine[name] = _write(temporary / name, rows)
        if fabric.is_global_zero:
            rest = {"version": checkpoints.VERSION, "step": step, **without(state, shards)}
            mine[REST] = _write(temporary / REST, rest)
    files = {name: digest for part in from_all(fabric, mine) for name, digest in part.items()}
    with as_one(fabric), checkpoints.faults_named(path):
        if fabric.is_global_zero:
            manifest = temporary / MANIFEST
            manifest.write_text(json.dumps({"version": checkpoints.VERSION, "step": step, "files": files}, indent=1))
            sync(manifest)
            sync(temporary)
            checkpoints.delete(path)
            os.replace(temporary, path)
            sync(folder)
            checkpoints.tidy(folder, step)


def _write(path: Path, state: dict[Any, Any]) -> str:
    with open(path, "wb") as file:  # PyTorch itself says of a full disk that a position is unexpected
        torch.save(state, file)
    sync(path)
    return digest(path)
