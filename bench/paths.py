"""How long ten million paths take to open: the first time, and again from the index.

    python bench/paths.py
    python bench/paths.py --tree_files 0 --list_paths 1000000

A list file has generated paths of files that are not there; a folder tree has real, empty files. Each opening is a
process of its own: seconds of `open_source` and of the split into training and held-out images, by the clock; its
largest memory before and after them, in which mapped pages count; and, in two forked data workers each, the memory that
is theirs alone after ten thousand paths. The tree's files are in the system's cache.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import recording

from mirl.training import processes

OPENING = """
import json, os, resource, sys, time
import numpy as np
from mirl.data.loading import StepSampler
from mirl.data.sources import open_source
from mirl.tasks.pretrain import split_off_held_out

def mib():
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

def own():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return round(sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024)

result = {"mib_imports": mib()}
start = time.perf_counter()
source = open_source(sys.argv[1])
result |= {"open_s": round(time.perf_counter() - start, 2), "mib_opened": mib()}
training, held_out = split_off_held_out(len(source))
sampler = StepSampler(len(training), 4096, 64, seed=0, start=0, stop=10, rank=0, world_size=1)
next(iter(sampler))
result |= {"start_s": round(time.perf_counter() - start, 2), "mib_most": mib(), "paths": len(source)}
read, write = os.pipe()
for worker in range(2):
    if os.fork() == 0:
        before = own()
        for index in np.random.default_rng(worker).choice(training, 10_000):
            source.name_of(int(index))
        os.write(write, f"{own() - before} ".encode())
        os._exit(0)
    os.wait()
result |= {"remembered": source.remembered, "mib_worker": [int(text) for text in os.read(read, 100).split()]}
print(json.dumps(result))
"""


def opened(data: Path, cache: Path) -> dict[str, Any]:
    """Open `data` in a fresh process."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-c", OPENING, str(data)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    print(f"{data.name}: {found}")
    return found


def write_list(path: Path, count: int) -> None:
    """Write a list of `count` generated paths."""
    with open(path, "w") as file:
        for start in range(0, count, 1000):
            file.writelines(f"n{start // 1000:08d}/image_{index:08d}.jpg\n" for index in range(start, start + 1000))


def write_tree(folder: Path, count: int) -> None:
    """Make `count` empty files, a thousand in each folder, which look as if nothing had changed for a while."""
    for start in range(0, count, 1000):
        inner = folder / f"n{start // 1000:08d}"
        inner.mkdir(parents=True)
        for index in range(start, start + 1000):
            os.close(os.open(inner / f"image_{index:08d}.jpg", os.O_CREAT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list_paths", type=int, default=10_000_000)
    parser.add_argument("--tree_files", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "paths.json")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.list_paths:
            write_list(folder / "list.txt", options.list_paths)
        if options.tree_files:
            write_tree(folder / "tree", options.tree_files)
        time.sleep(3)  # what changed in the last two seconds is not remembered
        for name in ("list.txt", "tree"):
            if (folder / name).exists():
                found[name] = {turn: opened(folder / name, folder / "cache") for turn in ("first", "again")}
    recording.add({"machine": recording.machine(processes.launch("auto", 1, "32")), **found}, options.out)


if __name__ == "__main__":
    main()
