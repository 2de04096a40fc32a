"""Images per second and core that one data worker makes ready from tar shards, against the same images in files.

    python bench/shards.py
    python bench/shards.py --index 10000000

The two take turns in one process of one thread; seconds are of the processor, and what a disk takes beside them is not
in it: everything is in memory. With --index the index of so many made-up images is opened instead, and weighed.
"""

import argparse
import json
import multiprocessing
import pickle
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from data import Ours, described, synthesise, timed
from recording import add, machine

import mirl
from mirl.data.order import ShardOrder
from mirl.data.shards.images import ShardImages
from mirl.data.shards.tar_index import Index, Members, Shard
from mirl.data.sources import ImageFiles, open_source
from mirl.training import processes


def compared(folder: Path, images: int, size: tuple[int, int], repeats: int) -> dict[str, Any]:
    """Time what pre-training reads its images with, from files and from shards."""
    (folder / "files").mkdir()
    synthesise(folder / "files", images, *size)
    mirl.shard(str(folder / "files"), str(folder / "shards"), shard_mib=1, shuffle=False, workers=0)
    files, shards = open_source(folder / "files"), open_source(folder / "shards")
    assert isinstance(files, ImageFiles) and isinstance(shards, ShardImages)
    rounds: list[dict[str, float]] = []
    for epoch in range(repeats + 1):
        row = {}
        for name, source in (("files", files), ("shards", shards)):
            _, row[name] = timed(lambda source=source, epoch=epoch: Ours(source).batch(epoch))
        _, row["shards.read"] = timed(lambda: [shards.content(index) for index in range(len(shards))])
        rounds.append(row)
    milliseconds = {name: round(1000 * median(row[name] for row in rounds[1:]) / images, 3) for name in rounds[0]}
    per_second = {name: round(1000 / milliseconds[name]) for name in ("files", "shards")}
    return {**described(files), "images_per_second_and_core": per_second, "milliseconds": milliseconds}


def opened(folder: Path, images: int, per_shard: int = 10_000) -> dict[str, Any]:
    """Open the index of many made-up images; nothing of them is read."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(20_000, 200_000, per_shard)
    offsets = np.cumsum([512, *(sizes[:-1] + 1023) // 512 * 512])
    names = [f"n{i % 1000:08}/n{i % 1000:08}_{i:07}.jpg" for i in range(per_shard)]
    members = Members.of(list(zip(offsets.tolist(), sizes.tolist(), names, strict=True)))
    count = images // per_shard
    shard = [Shard(f"{i:06d}.tar", int(offsets[-1] + sizes[-1]), per_shard) for i in range(count)]
    index = Index.joined([(one, members) for one in shard], {"kind": "images"})
    index.save(folder / "index.safetensors")
    del index, members
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # whose memory is that of opening alone
        found = pool.apply(weighed, (folder / "index.safetensors",))
    return {"images": images, "shards": count, **found}


def weighed(path: Path) -> dict[str, Any]:
    """Open an index; return what that takes, and what a worker and an epoch take."""
    status = Path("/proc/self/status")
    megabytes = lambda: int(status.read_text().split("VmHWM:")[1].split()[0]) // 1024  # noqa: E731
    before = megabytes()
    index, opening = timed(lambda: Index.load(path))
    after = megabytes()
    source = ShardImages(index, str, 3)
    _, sending = timed(lambda: pickle.dumps(source, protocol=5))
    _, ordering = timed(lambda: ShardOrder(source.ends).epoch(0, 0, 4096))
    return {
        "file_mib": round(path.stat().st_size / 2**20), "peak_mib": after, "peak_mib_before": before,
        "seconds": {"open": round(opening, 2), "send_to_worker": round(sending, 2), "order": round(ordering, 2)},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--index", type=int, help="made-up images in an index to open")
    parser.add_argument("--size", type=int, nargs=2, default=[500, 375], help="width and height of synthetic images")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("bench/results/shards.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.index:
            found = opened(folder, options.index)
        else:
            found = compared(folder, options.images, tuple(options.size), options.repeats)
    command = " ".join(["python", *sys.argv])
    result = {"command": command, **found, **machine(processes.Fabric(accelerator="cpu", devices=1))}
    add(result, options.out)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
