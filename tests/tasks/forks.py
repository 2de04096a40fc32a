"""Commands as processes of their own, in a tenth of a second: forked from one that has imported what they need.

What runs is `mirl.cli.main` with arguments, environment, folder, output and process group of its own, to the end of the
interpreter. The server has one thread and has computed nothing, so that a fork of it is as good as a new process.
"""

import atexit
import gc
import importlib
import json
import os
import pickle
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

IMPORTED = (
    *("mirl.cli", "mirl.tasks.pretrain", "mirl.tasks.finetune", "mirl.tasks.detect", "mirl.tasks.segment"),
    *("mirl.tasks.convert", "mirl.studies.study", "jsonargparse", "jsonargparse.typing"),
    *("tensorboard.compat.proto.event_pb2", "torch.utils.tensorboard", "matplotlib.backends.backend_agg", "rich.live"),
    *("sklearn.linear_model", "sklearn.metrics"),
)


def nothing(*_: object, **__: object) -> None:
    """Stand in for a function that draws."""


class Fork:
    """A command that was started; what subprocess.Popen is, with its output in files."""

    def __init__(self, connection: int, files: Sequence[Path]) -> None:
        self._connection, self._files = connection, files
        self.pid = json.loads(os.read(connection, 100))
        self.returncode: int | None = None

    def __del__(self) -> None:
        os.close(self._connection)  # what nobody waits for is killed

    def poll(self) -> int | None:
        """Return the exit code, as subprocess has it, or None."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("mirl", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait, and return output and errors."""
        self.wait(timeout)
        output, errors = (path.read_text() for path in self._files)
        return output, errors

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], timeout)[0]:
            self.returncode = json.loads(os.read(self._connection, 100))
        return self.returncode


class Server:
    """The process that commands are forked from; it ends with this one."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mirl-forks-"))
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
        self._process = subprocess.Popen(
            [sys.executable, __file__, self.folder / "socket"], env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout and self._process.stdout.readline() == b"ready\n"
        self._started = 0
        atexit.register(self.close)

    def close(self) -> None:
        self._process.communicate()  # its input is closed; it ends
        shutil.rmtree(self.folder)

    def start(
        self, arguments: Sequence[str], environment: Mapping[str, str], *, cwd: str | os.PathLike[str] | None = None,
        patches: Mapping[str, object] | None = None, program: str = "mirl.cli:main",
    ) -> Fork:  # fmt: skip
        """Start `mirl`, or another program, with arguments; `patches` are values of names in modules."""
        self._started += 1
        files = [self.folder / f"{self._started}.{kind}" for kind in ("output", "errors")]
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self.folder / "socket"))
        given = list(arguments), dict(environment), str(cwd or Path.cwd()), files, dict(patches or {}), program
        request = pickle.dumps(given)
        connection.sendall(len(request).to_bytes(4) + request)
        return Fork(connection.detach(), files)


_server: Server | None = None


def server() -> Server:
    """Return the server of this process, started when it is first needed."""
    global _server
    _server = _server or Server()
    return _server


# In the server


def serve(path: str) -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, "a process of several threads must not be forked"
    gc.collect()
    gc.freeze()  # a fork that looked through all of it would copy it
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # none waits for those that wait for commands
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            attend(connection)
        connection.close()
    os._exit(0)


def attend(connection: socket.socket) -> None:
    """Fork a command, tell its number and how it ended; kill it if nobody waits for it any more."""
    size = int.from_bytes(connection.recv(4))
    request = b""
    while len(request) < size:
        request += connection.recv(size)
    child = os.fork()
    if not child:
        connection.close()
        become(*pickle.loads(request))
    connection.sendall(json.dumps(child).encode())
    ended = os.pidfd_open(child)
    if connection in select.select([connection, ended], [], [])[0]:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    try:
        connection.sendall(json.dumps(os.waitstatus_to_exitcode(status)).encode())
    finally:
        os._exit(0)


def become(arguments, environment, cwd, files, patches, program) -> None:
    """Be the command."""
    os.setpgid(0, 0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate(("/dev/null", *files)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [str(Path(sys.executable).with_name("mirl")), *arguments]
    sys.orig_argv = [sys.executable, *sys.argv]  # what starts other processes
    for name, value in patches.items():
        module, _, attribute = name.rpartition(".")
        setattr(importlib.import_module(module), attribute, value)
    module, _, function = program.partition(":")
    code: object = 1
    try:
        code = getattr(importlib.import_module(module), function)()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    leave(code)


def leave(code: object) -> None:
    """End as the interpreter does, but do not take apart all modules first: that takes longer than a tiny run."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    serve(sys.argv[1])
