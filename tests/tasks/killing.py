"""A run that is killed again and again at random moments, and gone on with each time."""

import json
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forks
from tiny_runs import command

AIMS = ("start", "step", "save", "evaluation")
# Three evaluations and two saves in six steps; what is drawn beside the reconstructions takes longer than all else.
KILLED_RUN: dict[str, Any] = {
    "data": "shapes:40", "model": "vit_ti_2", "image_size": 32, "patch_size": 8, "decoder_width": 32,
    "decoder_depth": 1, "batch_size": 16, "precision": "32", "report": False, "block_figures": False,
    "checkpoint_minutes": 0.0, "evaluate_epochs": 1,
}  # fmt: skip
UNDRAWN = ("mirl.training.loop.draw_curves", "mirl.training.loop.draw_gradients")


def survive(options: dict[str, Any], kills: int, *, number: signal.Signals, seed: int) -> Iterator[str]:
    """Start a run and go on with it until it was killed so many times; yield where each kill fell."""
    moments = random.Random(seed)
    folder, attempt = Path(options["out"]), 0
    while kills:
        begun = (folder / "config.yaml").exists()
        process = start(options | {"workers": attempt % 3}, resume=begun)
        before, begins = done(folder), begun_lines(folder)
        aim(AIMS[attempt % len(AIMS)], folder, before, moments, process)
        assert process.poll() is None, process.communicate()
        process.send_signal(number)
        code = process.wait(100)
        assert code in (-number, 128 + number), process.communicate()
        attempt, kills = attempt + 1, kills - 1
        yield phase(folder) if begun_lines(folder) > begins else "while it started"


def start(options: dict[str, Any], *, resume: bool) -> Any:
    return command(options, *(["--resume"] if resume else []), patches=dict.fromkeys(UNDRAWN, forks.nothing))


def aim(what: str, folder: Path, before: int, moments: random.Random, process: Any) -> None:
    """Wait for a random moment near the start of the process, in a step, in a save or in an evaluation."""
    if what == "start":
        return time.sleep(moments.uniform(0, 0.5))
    metrics, until = folder / "metrics.jsonl", time.monotonic() + 100
    while process.poll() is None and time.monotonic() < until:
        known = metrics.read_bytes() if metrics.exists() else b""
        steps = known.count(b'"kind": "train"')
        if what == "save" and any(folder.glob("checkpoints/*.tmp")):
            return time.sleep(moments.uniform(0, 0.004))
        if what == "step" and (folder / f"checkpoints/step_{before + 1:08d}.pt").exists():
            return time.sleep(moments.uniform(0, 0.03))
        if what == "evaluation" and steps > before and steps % 2 == 0:  # an epoch has two steps
            return time.sleep(moments.uniform(0, 0.25))
        time.sleep(0.0005)
    raise AssertionError(f"no {what}: {process.poll()}")


def done(folder: Path) -> int:
    """Return the step of the newest checkpoint."""
    return max((int(path.stem[5:]) for path in folder.glob("checkpoints/step_*.pt")), default=0)


def begun_lines(folder: Path) -> int:
    """Count the starts that came as far as their first step or evaluation."""
    path = folder / "log.txt"
    return len(re.findall("resumed at step|about .* if data keep up", path.read_text())) if path.exists() else 0


def phase(folder: Path) -> str:
    """Tell from the files where a kill fell."""
    if any(folder.glob("checkpoints/*.tmp")):
        return "while a checkpoint was written"
    text = (folder / "metrics.jsonl").read_text() if (folder / "metrics.jsonl").exists() else ""
    found = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    steps = [row["step"] for row in found if row["kind"] == "train"]
    if not steps:
        return "before the first step"
    evaluated = any(row["kind"] == "held_out" and row["step"] == steps[-1] for row in found)
    if steps[-1] == done(folder):
        return "in a step"
    if steps[-1] % 2 == 0 and not (evaluated and (folder / f"pictures/step_{steps[-1]:08d}.png").exists()):
        return "in an evaluation"
    return "between a step and its checkpoint"


def table(phases: list[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(phases).most_common())
