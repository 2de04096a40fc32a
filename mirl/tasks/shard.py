"""`mirl shard`: images in tar files of equal size, mixed, for disks and networks that are slow with many small files.

In OUT: 000000.tar ...  index.safetensors (where each image is)  shard.json (how they were made)  skipped.csv
"""

import csv
import hashlib
import json
import math
import os
import re
from collections.abc import Generator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mirl.data.scanning import Lost, scan
from mirl.data.shards.names import INDEX
from mirl.data.shards.opening import kind
from mirl.data.shards.tar_index import Index
from mirl.data.shards.writing import Plan, images_per_shard, write_shard, written
from mirl.data.sources import Source, open_source
from mirl.errors import UserError, plural
from mirl.tasks.options import available_cores
from mirl.tasks.settings.sharding import ShardOptions
from mirl.training.files import atomic
from mirl.training.locking import LOCK, locked
from mirl.training.runs import console

MADE_BY, SKIPPED = "shard.json", "skipped.csv"
OURS = re.compile("|".join([r"\d{6,}\.(tar|index)", *map(re.escape, (INDEX, MADE_BY, SKIPPED))]))


def shard(data: str, out: str, **options: Any) -> Path:
    """Write images into tar shards that `--data` takes, and webdataset reads.

    Shards are checked after they are written. What is not an image is left out and listed in `skipped.csv`. Started
    again after a kill, it goes on behind the last whole shard; the result is the same, byte for byte.

    Takes the fields of `mirl.ShardOptions`, e.g. `mirl.shard("photos", "shards", resize=256)`.

    Returns:
        The path of the folder.

    Raises:
        UserError: on a mistake in the options or the data, or if the folder holds other things or cannot be written.
    """
    given = ShardOptions(data=data, out=out, **options)
    source = open_source(given.data, channels=given.channels, download=given.download)
    count = len(source)
    order = np.random.default_rng(given.seed).permutation(count) if given.shuffle else np.arange(count)
    folder = Path(given.out).expanduser()
    made_by = {
        "images": count, "names": _digest(source), "shard_mib": given.shard_mib, "resize": given.resize,
        "shuffle": given.shuffle, "seed": given.seed, "channels": given.channels,
    }  # fmt: skip
    try:
        _claim(folder, made_by)  # before a lock is written in a folder of something else
        with locked(folder):
            before = _claim(folder, made_by)
            per_shard = before or images_per_shard(source, order, given.shard_mib * 2**20, given.resize, given.channels)
            _write_json(folder / MADE_BY, made_by | {"per_shard": per_shard})
            plan = Plan(source, folder, order, per_shard, given.resize, given.channels)
            if not (folder / INDEX).exists():
                _write_shards(plan, available_cores() if given.workers is None else given.workers)
                _finish(plan, made_by)
            _tell(folder)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {folder}: {reason}; mend that and start again, it goes on") from error
    return folder


def _digest(source: Source) -> str:
    """Return what tells these images from others: a checksum of their names."""
    digest = hashlib.sha256()
    for index in range(len(source)):
        digest.update(source.name_of(index).encode() + b"\0")
    return digest.hexdigest()


def _claim(folder: Path, made_by: dict[str, Any]) -> int | None:
    """Return the images of a shard in a folder of the same command, None for an empty one; refuse any other."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {entry.name for entry in os.scandir(folder)} - {LOCK}
    if not names:
        return None
    if others := sorted(name for name in names if not OURS.fullmatch(name.removesuffix(".tmp"))):
        raise UserError(f"{folder} holds other things, e.g. {others[0]}; give a new folder")
    try:
        found = json.loads((folder / MADE_BY).read_text(encoding="utf-8"))
        per_shard = int(found.pop("per_shard"))
    except FileNotFoundError:
        if all(name.endswith(".tmp") for name in names):
            return None
        raise UserError(f"{folder} holds shards that are not mirl's; give a new folder") from None
    except (ValueError, KeyError, AttributeError):
        raise UserError(f"{folder / MADE_BY} is damaged; give a new folder") from None
    if found != made_by:
        changed = [name for name in made_by if found.get(name) != made_by[name]]
        raise UserError(
            f"{folder} holds shards of other {' and '.join(changed)}; give a new folder, or the same options"
        )
    return per_shard


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _write_shards(plan: Plan, workers: int) -> None:
    """Write the shards that are not written yet, with a bar of images."""
    left = [number for number in range(plan.shards) if written(plan, number) is None]
    done = sum(len(plan.part(number)) for number in range(plan.shards)) - sum(len(plan.part(n)) for n in left)
    if done:
        console.print(f"{plan.shards - len(left)} of {plan.shards} shards are written already; going on", markup=False)
    columns = (TextColumn("writing shards"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        closing(_writing(plan, left, workers)) as finished,
    ):
        bar = progress.add_task("", total=len(plan.order), completed=done)
        for number, problem in finished:
            if isinstance(problem, Lost):
                raise UserError(
                    "a process that wrote a shard was killed, probably for want of memory; start again with fewer "
                    "--workers, it goes on"
                )
            if problem:
                raise problem
            progress.advance(bar, len(plan.part(number)))


def _writing(plan: Plan, left: list[int], workers: int) -> Generator[tuple[int, Exception | Lost | None], None, None]:
    """Yield the number of each shard when it is written, or with why it is not."""
    write = partial(_write_one, plan)
    if workers:
        yield from scan(write, np.array(left), processes=workers, timeout=math.inf, at_once=1)
    else:
        yield from ((number, write(number)) for number in left)


def _write_one(plan: Plan, number: int) -> Exception | None:
    try:
        write_shard(plan, number)
    except Exception as error:  # another process raises it
        return error
    return None


def _finish(plan: Plan, made_by: dict[str, Any]) -> None:
    """Join the shards' indexes to one, list what was left out, and delete the parts."""
    parts = [index for number in range(plan.shards) if (index := written(plan, number))]
    assert len(parts) == plan.shards, f"{len(parts)} of {plan.shards} shards are written"
    skipped = [row for part in parts for row in part.about["skipped"]]
    if skipped:
        with atomic(plan.folder / SKIPPED) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("image", "reason"), *skipped])
    about = {**made_by, "kind": kind(plan.channels), "skipped": len(skipped)}
    Index.joined([(part.shards[0], part.members) for part in parts], about).save(plan.folder / INDEX)
    for number in range(plan.shards):
        plan.index(number).unlink(missing_ok=True)


def _tell(folder: Path) -> None:
    try:
        index = Index.load(folder / INDEX)
        changed = [shard.name for shard in index.shards if (folder / shard.name).stat().st_size != shard.size]
    except (ValueError, FileNotFoundError) as error:
        changed = [str(error)]
    if changed:
        raise UserError(
            f"{folder} was written before, and is not whole any more ({changed[0]}); delete it to write it again"
        )
    size, skipped = sum(shard.size for shard in index.shards), index.about["skipped"]
    console.print(
        f"saved {plural(len(index.members), 'image')} in {plural(len(index.shards), 'shard')} ({size / 2**20:.4g} "
        f"MiB), each checked; use them with --data {folder}",
        markup=False,
    )
    if skipped:
        console.print(f"left out {plural(skipped, 'image')}, listed in {folder / SKIPPED}", markup=False)
