"""TensorBoard's file of curves. The door to TensorBoard.

The thread that trains writes it, and so does one that computes figures beside it: a record is a single write to an
unbuffered file, so that two never mix, and the file is closed only after `Task.settle`.

PyTorch's SummaryWriter has a thread of its own, which prints a traceback when the disk is full, and names files by the
clock. TensorBoard reads files in order of their names: after a clock was set back, what a resumed run wrote would be
taken for what came first.
"""

import os
import re
import socket
import time
from pathlib import Path


class EventFile:
    """A new file in `folder`, after those that are there; TensorBoard forgets what they say of `purge_step` and later.

    Raises:
        OSError: if it cannot be written, as its methods do.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        # Slow to import, and only training needs it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        numbers = [int(match[1]) for path in folder.iterdir() if (match := re.match(r".*tfevents\.(\d+)\.", path.name))]
        number = max([int(time.time()), *(number + 1 for number in numbers)])
        name = f"events.out.tfevents.{number:010d}.{socket.gethostname()}.{os.getpid()}.0"
        # Unbuffered: what a full disk did not take is not tried again when the file is closed.
        self._file = RecordWriter(open(folder / name, "wb", buffering=0))  # noqa: SIM115 - closed by `close`
        try:
            self._write(Event(step=purge_step, file_version="brain.Event:2"))
            self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        except OSError:
            self.close()
            raise

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add a point to each curve, by its name."""
        points = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(self._event(step=step, summary=self._summary(value=points)))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: object) -> None:
        event.wall_time = time.time()  # type: ignore[attr-defined]
        self._file.write(event.SerializeToString())  # type: ignore[attr-defined]
