"""From names of shards to their images: the index that was written with them, one that was made before, or a new one.

An index is the data: a shard that it knows and that is gone or damaged keeps its images, which are skipped and counted
when they are read. So days of training do not end, and a run can be resumed, because of one file.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from filelock import FileLock
from rich.progress import track

from mirl.data.decode import MODES
from mirl.data.order import HELD_OUT_SHARDS, WINDOW
from mirl.data.reading import Unread
from mirl.data.shards.cache import LIMIT, ShardCache, is_remote, version_at
from mirl.data.shards.images import ShardImages
from mirl.data.shards.names import INDEX, beside, expand, index_of, is_folder, local_shards
from mirl.data.shards.tar_index import Index, Members, Shard, scan
from mirl.errors import UserError, plural
from mirl.training.runs import console

Part = tuple[Shard, Members]
NAMED = 3  # shards with problems
AT_ONCE = 8  # questions to a store


def open_shards(data: str, channels: int, cache: Path) -> ShardImages:
    """Open the shards that `--data` names.

    Args:
        cache: folder for the indexes that are made, and for shards of other machines.

    Raises:
        UserError: if there are none, none has images, or an address is of no known kind.
    """
    store = ShardCache(cache / "shards")
    names = expand(data)
    written = _written(names, channels, store)
    names = [shard for name in names for shard in (_in_folder(name, written) if is_folder(name) else [name])]
    new = [name for name in names if not _fits(Shard(name, 0), written.get(name), modified=False)]
    made = _made(new, channels, cache, store, written) if new else {}
    index = Index.joined([made[name] if name in made else written[name] for name in names], {})
    if not len(index.members):
        raise UserError(_nothing(data, index))
    far = sorted((shard.size for shard in index.shards if is_remote(shard.name)), reverse=True)
    room = store.room() if any(far) else 0.0
    warnings = tuple(_warnings(index, store, far, room))
    return ShardImages(index, partial(_fetched, store), channels, warnings, _ahead(far, room))


def _fetched(store: ShardCache, shard: Shard, ahead: bool = False) -> str:
    """Return a shard's path on this machine, fetched if it is elsewhere; `ahead` if nobody waits for it yet."""
    if not is_remote(shard.name):
        return shard.name
    path = store.fetched(shard.name, size=shard.size or None, sha256=shard.sha256, version=shard.version, ahead=ahead)
    return str(path)


def kind(channels: int) -> str:
    """Return which members are images: an index of the ones is none of the others."""
    return "images" if channels in MODES else "arrays"


def _in_folder(folder: str, written: dict[str, Part]) -> list[str]:
    """Return the shards of a folder: those that its index names; of a local one without, its tar files."""
    names = [name for name in written if beside(name, "") == beside(index_of(folder), "")]
    if not names and not is_remote(folder):
        names = local_shards(folder)
    if not names:
        example = beside(index_of(folder), "{000..127}.tar")
        raise UserError(f"{folder!r} has no {INDEX}; name its shards, such as {example!r}")
    return names


def _written(names: Iterable[str], channels: int, store: ShardCache) -> dict[str, Part]:
    """Return what the indexes beside the shards say, by the shards' full names."""
    found: dict[str, Part] = {}
    for place in dict.fromkeys(map(index_of, names)):
        try:
            index = Index.load(Path(_fetched(store, _at(place)) if is_remote(place) else place))
        except FileNotFoundError:
            continue
        except UserError:
            raise
        except Unread as error:
            raise UserError(f"{error}; check the address and the network, and start again") from error
        except (ValueError, OSError) as error:
            if is_remote(place):
                raise UserError(f"{place} cannot be used ({error}); put it there again, or take it away") from error
            console.print(f"warning: {place} cannot be used ({error}); the shards are indexed again", markup=False)
            continue
        if index.about.get("kind") == kind(channels):
            found |= {
                beside(place, name): (replace(shard, name=beside(place, name)), members)
                for name, (shard, members) in index.of_shards().items()
                if "/" not in name and os.sep not in name
            }
    return found


def _made(names: list[str], channels: int, cache: Path, store: ShardCache, written: dict[str, Part]) -> dict[str, Part]:
    """Return each shard's part: from the cached index if the shard has not changed since, else from its headers."""
    full = [name if is_remote(name) else os.path.abspath(name) for name in names]
    key = hashlib.sha256(json.dumps([*full, kind(channels)]).encode(errors="surrogateescape")).hexdigest()[:32]
    path = cache / "shards" / f"{key}.index"
    now = _now(names)
    with _alone(path):
        try:
            before = Index.load(path).of_shards()
        except (ValueError, OSError):
            before = {}
        known = {name: before.get(name) or written.get(name) for name in names}
        new = [name for name in names if not _fits(now[name], before.get(name), modified=True)]
        if far := [name for name in new if is_remote(name)]:
            console.print(
                f"{plural(len(far), 'shard')} without {INDEX} beside them: fetched once, to be indexed", markup=False
            )
        parts = {name: part for name, part in before.items() if name not in new}
        for name in track(new, "indexing shards", console=console, transient=True, disable=not console.is_terminal):
            parts[name] = _part(now[name], channels, store, known[name])
        if new:
            _keep(Index.joined([parts[name] for name in names], {}), path)
    return parts


def _now(names: list[str]) -> dict[str, Shard]:
    """Return what is known of shards before they are read: of those in a store what it says, if it can be asked."""

    def ask(name: str) -> Shard:
        try:
            return _at(name)
        except OSError:
            return Shard(name, 0)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        said = pool.map(ask, filter(is_remote, names))
        return {name: Shard(name, 0) for name in names} | {shard.name: shard for shard in said}


def _at(address: str) -> Shard:
    """Return what a store says of a file, or raise OSError."""
    version, size = version_at(address)
    return Shard(address, size, version=version)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process of the machine make an index while the others wait for it, where that is possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        lock.acquire()
    except OSError:  # the cache folder cannot be written
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _keep(index: Index, path: Path) -> None:
    try:
        index.save(path)
    except OSError as error:
        console.print(f"the index of the shards is not kept: {error}; it is made again next time", markup=False)


def _fits(now: Shard, part: Part | None, *, modified: bool) -> bool:
    """Tell whether an index's part still is the shard's: by its size and, for `modified`, its time or its version.

    A copy of a shard has another time than the shard, so the index that was written with it goes by the size. Where a
    store says nothing of a shard `now`, the index is believed.
    """
    if part is None:
        return False
    if is_remote(now.name):
        return not part[0].problem and not (modified and now.version and now.version != part[0].version)
    try:
        info = os.stat(now.name)
    except OSError:
        return False
    return info.st_size == part[0].size and (not modified or info.st_mtime_ns == part[0].changed)


def _part(now: Shard, channels: int, store: ShardCache, known: Part | None) -> Part:
    """Index a shard; if it is damaged or gone, what was known of it stays, with what is wrong."""
    try:
        shard, members = scan(_fetched(store, now), channels)
        shard = replace(shard, name=now.name, version=now.version)
    except OSError as error:
        reason = error.strerror or str(error)
        missing = isinstance(error, FileNotFoundError)
        shard, members = (
            Shard(now.name, 0, problem="is missing" if missing else f"cannot be read: {reason}"),
            Members.of([]),
        )
    if shard.problem and known and known[0].count > shard.count:
        return replace(known[0], problem=shard.problem), known[1]
    return shard, members


def _nothing(data: str, index: Index) -> str:
    """Say why shards have no images."""
    wrong = [shard for shard in index.shards if shard.problem]
    if wrong:
        more = f" ({len(wrong)} of {len(index.shards)} shards are like that)" if len(index.shards) > 1 else ""
        return f"{wrong[0].name!r} {wrong[0].problem}{more}; give tar files of images, as mirl shard writes them"
    others = plural(sum(shard.ignored for shard in index.shards), "other member")
    return f"{data!r} has no images, but {others}; give shards with .jpg, .png, .webp ... in them"


def _read_at_a_time(far: list[int]) -> int:
    """Return the bytes of the shards that are read at a time, for the bytes of each, the largest first."""
    return sum(far[: WINDOW + HELD_OUT_SHARDS])


def _ahead(far: list[int], room: float) -> int | None:
    """Return how many shards have room beside those that are read at a time; None if those have none."""
    beside = room - _read_at_a_time(far)
    if not sum(far) or beside < 0:
        return None
    return len(far) if sum(far) <= room else int(beside // far[0])


def _warnings(index: Index, store: ShardCache, far: list[int], room: float) -> Iterator[str]:
    wrong = [shard for shard in index.shards if shard.problem]
    if wrong:
        named = ", ".join(f"{shard.name} {shard.problem}" for shard in wrong[:NAMED])
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        yield f"{len(wrong)} of {len(index.shards)} shards cannot be read to the end: {named}{more}"
    at_a_time = _read_at_a_time(far)
    if at_a_time > room:
        yield (
            f"the shards that are read at a time have {at_a_time / 2**30:.3g} GiB, but {store.folder} may take "
            f"{room / 2**30:.3g} ({LIMIT}, or the room on its disk): they will be fetched again and again"
        )
