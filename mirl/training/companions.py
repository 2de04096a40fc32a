"""The other processes of a run: start those of this machine, and say in one line when one is lost.

Whoever started the processes (this module, torchrun, Slurm) knows which one died; the others only find that a
connection broke, or that nobody met them for a long time. They stop, and the last checkpoint is kept.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch.distributed.rendezvous import rendezvous

from mirl.errors import UserError, plural

# The first process draws and reads out alone while the others wait: far less than this.
PATIENCE = timedelta(minutes=10)
GRACE = 60  # seconds in which the first process should meet a loss itself; waiting for a GPU it cannot
STARTER = "MIRL_STARTED_BY"
BROKEN = re.compile("gloo|NCCL|Connection (was )?(closed|reset|refused)|Broken pipe", re.IGNORECASE)
LATE = re.compile("timed out|timeout", re.IGNORECASE)

_others: dict[int, subprocess.Popen[bytes]] = {}  # by rank among all
_meetings = 0  # blocks of `together` that this process is in


class Lost(UserError):
    """Another process died or does not answer; no mistake of the user, so the exit code is another."""

    exit_code = 1


def start_others(count: int, num_nodes: int, node: int, address: str, port: int) -> None:
    """Start this machine's other processes, this command with ranks of their own, and watch over them."""
    os.environ |= {
        "MASTER_ADDR": address, "MASTER_PORT": str(port), "WORLD_SIZE": str(count * num_nodes), "NODE_RANK": str(node),
        "LOCAL_RANK": "0",
    }  # fmt: skip
    for rank in range(1, count):
        environment = os.environ | {"LOCAL_RANK": str(rank), STARTER: str(os.getpid())}
        _others[node * count + rank] = subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=environment)
    threading.Thread(target=_watch, args=(count * num_nodes,), daemon=True).start()


def meet_again(backend: str) -> None:
    """Join the other processes after torchrun has started all of them again.

    Its store outlives them, and keeps addresses of processes that are no more: they meet in another part of it.
    """
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if count == "0":
        return
    store, rank, world_size = next(rendezvous("env://", timeout=PATIENCE))
    fresh = torch.distributed.PrefixStore(f"mirl/restart_{count}", store)
    torch.distributed.init_process_group(backend, store=fresh, rank=rank, world_size=world_size, timeout=PATIENCE)


def _watch(world_size: int) -> None:
    """End this process some time after another has failed, if it does not end by itself."""
    while not any(process.poll() for process in _others.values()):
        if all(process.poll() == 0 for process in _others.values()):
            return
        time.sleep(1)
    time.sleep(GRACE)
    if not _meetings:  # it has what it needs of them
        return
    print(f"mirl: error: {_what_happened(world_size, '')}", file=sys.stderr, flush=True)
    _end_others()
    os._exit(Lost.exit_code)


@contextmanager
def together(rank: int, world_size: int) -> Iterator[None]:
    """Make of a broken or endless wait for other processes one line, said by one process.

    Raises:
        Lost: in the process that says it; the others leave with the same exit code.
    """
    global _meetings
    _meetings += 1
    try:
        yield
    except RuntimeError as error:
        known = isinstance(error, torch.distributed.DistError) or BROKEN.search(str(error))
        if world_size == 1 or not known:
            raise
        time.sleep(1)  # until the system knows of what ended
        line = _what_happened(world_size, str(error))
        speaks = _speaks(rank)
        _end_others()
        if speaks:
            raise Lost(line) from error
        raise SystemExit(Lost.exit_code) from error
    finally:
        _meetings -= 1


def _what_happened(world_size: int, error: str) -> str:
    remedy = "all have stopped and the last checkpoint is kept: "
    restarts = "torchrun goes on from it if --max-restarts allows, else add --resume"
    remedy += restarts if "TORCHELASTIC_MAX_RESTARTS" in os.environ else "add --resume to go on"
    ended = {rank: code for rank, process in _others.items() if (code := process.poll())}
    if _orphaned():
        ended = {0: 0}
    for rank, code in ended.items():
        how = f" (killed by {signal.Signals(-code).name})" if code < 0 else f" (exit code {code})" if code else ""
        return f"rank {rank} of {world_size} processes was lost{how}; {remedy}"
    if LATE.search(error):
        waited = plural(PATIENCE / timedelta(minutes=1), "minute", form="g")
        return f"one of {world_size} processes did not answer for {waited}, it hangs or was stopped; {remedy}"
    return f"one of {world_size} processes was lost, its launcher says which; {remedy}"


def _orphaned() -> bool:
    """Tell whether the process that started this one is gone."""
    return STARTER in os.environ and os.getppid() != int(os.environ[STARTER])


def _speaks(rank: int) -> bool:
    """Choose one process to say what happened: the first that is left."""
    if _others or STARTER in os.environ:
        return rank == 0 or (_orphaned() and rank == 1)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it outlives all of them
        return torch.distributed.distributed_c10d._get_default_store().add("mirl/lost", 1) == 1
    try:
        socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=5).close()
    except (OSError, KeyError):  # rank 0 is gone
        return rank == 1
    return rank == 0


def _end_others() -> None:
    """Let the other processes of this machine leave; kill those that hang."""
    until = time.monotonic() + 5
    for process in _others.values():
        try:
            process.wait(max(0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
