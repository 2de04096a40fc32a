"""How long commands take to start: until their help, until a mistake is said, until the first optimizer step is done.

    python bench/startup.py
    python bench/startup.py --against ../before --repeats 5

Every figure is of whole processes, from the command to what the user sees, by the clock and in seconds of the
processor, which a busy machine changes less; the median of several, that take turns with those of another working tree,
where one is given. The first step's end is its row in metrics.jsonl; the process is killed then. What it did until then
is told by one more process each time, in which the parts' functions are timed; modules that a part imports are in it.
Files are in the system's cache: the first turn is not counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

HELP = ["--help", *(f"{command} --help" for command in ("pretrain", "finetune", "report"))]
MISTAKES = ["finetune --bogus 1", "study {folder}/broken.yaml"]
TRAINING = "pretrain --data {folder}/photos --out {folder}/run --overwrite --model {model} --epochs 2"
Times = tuple[float, float]  # seconds by the clock, and of the processor
RUN = "import sys; from mirl.cli import main; sys.exit(main())"
# In order: the later parts of a run lie inside no earlier one, but for pictures, which are of the evaluation.
PARTS = [
    ("open the folder", "mirl.tasks.pretrain", "open_source"),
    ("look at image sizes", "mirl.tasks.pretrain", "typical_side"),
    ("build the model", "mirl.tasks.pretrain", "PretrainTask.__init__"),
    ("measure a micro-batch", "mirl.tasks.run", "probe"),
    ("first evaluation", "mirl.training.loop", "evaluate"),
    ("of that, pictures and blocks", "mirl.tasks.pretrain", "PretrainTask.draw"),
    ("first step", "mirl.training.steps", "Accumulator.step"),
]
# Imports the command, times its parts, and writes {part: times} to the file of its first argument at the first step.
TIMED = """
import functools, importlib, json, os, sys, time
now = lambda: (time.perf_counter(), time.process_time())
since = lambda start: [b - a for a, b in zip(start, now())]
began, seconds = now(), {}
out, parts = sys.argv[1], json.loads(sys.argv[2])
del sys.argv[1:3]
importlib.import_module("mirl.tasks.pretrain")
seconds["imports"] = since(began)
def timed(part, function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        start = now()
        result = function(*args, **kwargs)
        seconds.setdefault(part, since(start))
        if part == "first step":
            with open(out, "w") as file:
                json.dump(seconds, file)
            os._exit(0)
        return result
    return wrapper
for part, module, name in parts:
    owner = importlib.import_module(module)
    *path, name = name.split(".")
    for each in path:
        owner = getattr(owner, each)
    setattr(owner, name, timed(part, getattr(owner, name)))
from mirl.cli import main
sys.exit(main())
"""


def write_photos(folder: Path, count: int, side: int) -> None:
    """Write smooth random JPEGs of `side` pixels and a study with a mistake."""
    (folder / "photos").mkdir()
    random = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / "photos" / f"{index:04}.jpg", quality=90)
    (folder / "broken.yaml").write_text("title: a study with a mistake\ntitel: twice\n")


def started(tree: Path, program: list[str]) -> subprocess.Popen[bytes]:
    """Start a Python program with the package of a working tree; -P keeps the one of the current folder out."""
    return subprocess.Popen(
        [sys.executable, "-P", *program], env=os.environ | {"PYTHONPATH": str(tree)}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip


def ended(process: subprocess.Popen[bytes]) -> float:
    """Wait for a process and return its seconds of the processor."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime


def until_end(tree: Path, arguments: str) -> Times:
    """Return the times until a command has ended."""
    began = time.perf_counter()
    spent = ended(started(tree, ["-c", RUN, *arguments.split()]))
    return time.perf_counter() - began, spent


def until_step(tree: Path, arguments: str, metrics: Path) -> Times:
    """Return the times until a training's first step is recorded; then kill it."""
    metrics.unlink(missing_ok=True)
    began = time.perf_counter()
    process = started(tree, ["-c", RUN, *arguments.split()])
    while not (metrics.exists() and '"train"' in metrics.read_text()):
        assert process.poll() is None, f"mirl {arguments} ended before its first step"
        time.sleep(0.005)
    seconds = time.perf_counter() - began
    process.kill()
    return seconds, ended(process)


def by_part(tree: Path, arguments: str, folder: Path) -> dict[str, Times]:
    """Return the times of each part of a training until its first step."""
    out = folder / "parts.json"
    started(tree, ["-c", TIMED, str(out), json.dumps(PARTS), *arguments.split()]).wait()
    found: dict[str, Times] = json.loads(out.read_text())
    out.unlink()
    return found


def measure(trees: dict[str, Path], model: str, repeats: int, folder: Path) -> dict[str, dict[str, list[Times]]]:
    """Return times by tree and by what was timed, of `repeats` turns after one that is not counted."""
    times: dict[str, dict[str, list[Times]]] = {name: {} for name in trees}
    for turn in range(repeats + 1):
        for name, tree in trees.items():
            taken = {f"mirl {a}": until_end(tree, a.format(folder=folder)) for a in [*HELP, *MISTAKES]}
            training = TRAINING.format(folder=folder, model=model)
            taken["first step"] = until_step(tree, training, folder / "run" / "metrics.jsonl")
            taken |= {f"part: {part}": value for part, value in by_part(tree, training, folder).items()}
            for what, value in taken.items() if turn else ():
                times[name].setdefault(what.format(folder="FOLDER"), []).append(value)
            print(f"turn {turn} of {repeats}, {name}: first step after {taken['first step'][0]:.2f} s", flush=True)
    return times


def row_of(what: str, times: dict[str, list[Times]]) -> dict[str, Any]:
    """Return and print what is kept of one thing that was timed: medians of each tree, and their ratio turn by turn."""
    row: dict[str, Any] = {"what": what}
    for k, kind in enumerate(("seconds", "processor")):
        now, *before = ([each[k] for each in taken] for taken in times.values())
        row[kind] = round(median(now), 3)
        for other in before:
            row[f"{kind}_before"] = round(median(other), 3)
            row[f"{kind}_ratio"] = round(median(a / b for a, b in zip(now, other, strict=True)), 3)
        row[f"all_{kind}"] = [round(each, 3) for each in now]
    print("  ".join(f"{name} {value}" for name, value in row.items() if "all" not in name), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="another working tree, whose processes take turns with this one's")
    parser.add_argument("--model", default="vit_ti_4")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--side", type=int, default=96, help="pixels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench/results/startup.json"))
    options = parser.parse_args()
    trees = {"now": Path(__file__).resolve().parents[1]} | ({"before": options.against} if options.against else {})
    with tempfile.TemporaryDirectory() as name:
        write_photos(Path(name), options.images, options.side)
        named = {name: tree.resolve() for name, tree in trees.items()}
        times = measure(named, options.model, options.repeats, Path(name))
    rows = [row_of(what, {name: found[what] for name, found in times.items()}) for what in times["now"]]
    # Imported last, because it loads PyTorch, which would take memory from what is measured.
    from recording import machine

    from mirl.training import processes

    about = {"command": " ".join(["python", *sys.argv]), "machine": machine(processes.launch("auto", 1, "32"))}
    chosen = {"model": options.model, "images": options.images, "side": options.side, "repeats": options.repeats}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**about, **chosen, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
