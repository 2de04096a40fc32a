"""What a user sees of a run: one live line, TensorBoard curves, and advice when the data are slow.

`metrics.jsonl` is written by the run folder; here is only what is looked at.
"""

import time
from collections import deque
from typing import Any

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.text import Text

from mirl.methods import is_term
from mirl.training.events import EventFile
from mirl.training.runs import RunFolder, console, duration

WINDOW = 50  # steps over which speed and waiting are averaged
SLOW_DATA = 0.2  # share of the time waiting for data above which the user gets advice
PLAIN_SECONDS = 30  # between lines where the console cannot redraw one (a log file, a pipe)
TENSORBOARD_EVERY = 10  # steps


class _Line(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["line"])


class Monitor:
    """Follows one run from step `start` to `steps`.

    Args:
        images: in one step, over all processes.
        steps_per_epoch: to name the epoch.
        advise: say so when data are slow; on a CPU, which reads and trains with the same cores, there is no remedy.
    """

    def __init__(
        self, run: RunFolder, *, start: int, steps: int, steps_per_epoch: int, images: int, advise: bool
    ) -> None:
        self.run, self.start, self.steps, self.steps_per_epoch, self.images = run, start, steps, steps_per_epoch, images
        self._recent: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._done = start
        self._advised = not advise
        self._printed = time.monotonic()
        self._events: EventFile | None = None
        self._begin_events(start)
        columns = TextColumn("{task.description}"), BarColumn(20), TaskProgressColumn(), _Line()
        self._bar = Progress(
            *columns, console=console, transient=True, disable=not (run.writes and console.is_terminal)
        )
        self._task = self._bar.add_task("training", total=steps, completed=start, line="")

    def __enter__(self) -> "Monitor":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._end_events()

    def rewind(self, step: int) -> None:
        """Go on from an earlier step, and let TensorBoard forget the later ones."""
        self._done = step
        self._bar.update(self._task, completed=step)
        self._end_events()
        self._begin_events(step)

    def step(self, row: dict[str, Any]) -> None:
        """Show a training step: `row` has step, loss and its parts, lr, grad_norm, seconds, data_wait (seconds)."""
        self._recent.append((row["seconds"], row["data_wait"]))
        self._done = row["step"]
        line = self._line(row)
        self._bar.update(self._task, completed=row["step"], line=line)
        if not console.is_terminal and time.monotonic() - self._printed > PLAIN_SECONDS:
            self._printed = time.monotonic()
            self.run.say(line)
        if row["step"] % TENSORBOARD_EVERY == 0:
            self.scalars("train", {k: v for k, v in row.items() if k not in ("kind", "step", "epoch")}, row["step"])
        if not self._advised and len(self._recent) == WINDOW and self.waiting > SLOW_DATA:
            self._advised = True
            self.run.say(
                f"advice: {self.waiting:.0%} of the time goes to waiting for data; "
                "try more --workers, smaller files, or a faster disk"
            )

    def scalars(self, group: str, values: dict[str, float], step: int) -> None:
        """Add a point to each curve of TensorBoard's."""
        if self._events:
            with self.run.optional("tensorboard/"):
                self._events.scalars({f"{group}/{name}": value for name, value in values.items()}, step)

    def _begin_events(self, step: int) -> None:
        if self.run.writes:
            with self.run.optional("tensorboard/"):
                self._events = EventFile(self.run.tensorboard, purge_step=step + 1 if step else 0)

    def _end_events(self) -> None:
        if self._events:
            with self.run.optional("tensorboard/"):
                self._events.close()

    @property
    def speed(self) -> float:
        """Images a second over the last steps."""
        return self.images * len(self._recent) / max(sum(seconds for seconds, _ in self._recent), 1e-9)

    @property
    def waiting(self) -> float:
        """Share of the time spent waiting for data over the last steps."""
        return sum(wait for _, wait in self._recent) / max(sum(seconds for seconds, _ in self._recent), 1e-9)

    def time_left(self) -> str:
        """Say how long the rest takes at the present speed; empty before the first step and after the last."""
        remaining = self.steps - self._done
        return f"{duration(remaining * self.images / self.speed)} left" if self._recent and remaining else ""

    def _line(self, row: dict[str, Any]) -> str:
        pairs = " ".join(f"{value:.3f}" for name, value in row.items() if is_term(name))
        return (
            f"epoch {row['step'] // self.steps_per_epoch}/{self.steps // self.steps_per_epoch} "
            f"step {row['step']}/{self.steps} · loss {row['loss']:.4f}{f' ({pairs})' if ' ' in pairs else ''} "
            f"· lr {row['lr']:.1e} · grad {row['grad_norm']:.2f} · {self.speed:.0f} images/s "
            f"· data_wait {self.waiting:.0%} · {self.time_left()}"
        )
