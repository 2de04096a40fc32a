"""Shards of other machines (http, S3, Google's and Azure's stores), each fetched whole into a folder of this one.

All processes of a machine share the folder: one of them fetches a shard, the others wait for it. When the folder or
its disk is full, the shards whose use began longest ago are deleted; who still reads one keeps it open. What processes
that were killed had begun to write is deleted when the folder is opened.
"""

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from mirl.data.reading import Unread
from mirl.errors import UserError, printable
from mirl.training.files import atomic

SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf", "sftp")
LIMIT = "MIRL_CACHE_GIB"  # environment variable
DEFAULT_LIMIT = 100.0  # GiB
SPARE = 2**28  # bytes of the disk that are left for what other processes write meanwhile; 256 MiB
SECONDS = 30  # without a byte, after which a server counts as lost
PAUSES = (1.0, 5.0, 20.0)  # seconds between tries to fetch a shard
FAILED_FOR = 60  # seconds for which a shard that could not be fetched is not asked for again
MISSING = (403, 404, 410)  # what a web server answers where nothing is; 403 is that of stores that do not list

# What stores say of a file that changes with it; not when it was read last, nor the signed address of a redirection.
TELLING = ("Content-MD5", "Digest", "ETag", "LastModified", "Last-Modified", "blob_id", "etag", "generation",
           "last_modified", "mtime", "size")  # fmt: skip

T = TypeVar("T")


def is_remote(name: str) -> bool:
    """Tell whether a name is an address, such as s3://bucket/000000.tar."""
    return re.match(r"[a-z][a-z0-9+.-]*://", name) is not None


class ShardCache:
    """A folder of fetched files of at most `limit` bytes, of less where its disk has no room for them.

    Raises:
        UserError: if `MIRL_CACHE_GIB` is no number.
    """

    def __init__(self, folder: Path) -> None:
        text = os.environ.get(LIMIT, str(DEFAULT_LIMIT))
        if not re.fullmatch(r"\d*\.?\d+", text) or float(text) <= 0:
            raise UserError(f"{LIMIT}={text} is not allowed; give the GiB that fetched shards may take, such as 100")
        self.folder, self.limit = folder, float(text) * 2**30
        self._remove_unfinished()

    def fetched(
        self, url: str, *, size: int | None = None, sha256: str = "", version: str = "", ahead: bool = False
    ) -> Path:
        """Return where the file at `url` is on this machine; fetch it if it is not there yet.

        Args:
            size: bytes, sha256: checksum that the file must have, where they are known. version: what tells it from
                others that were at this address. ahead: nobody waits for it yet: whoever will is not spared the tries.

        Raises:
            Unread: if it cannot be fetched, or is not what was expected; FileNotFoundError: if there is no such file.
        """
        key = hashlib.sha256(f"{url}|{sha256}|{version}".encode()).hexdigest()[:32]
        path, failed = self.folder / f"{key}.tar", self.folder / f"{key}.failed"
        if not _is_whole(path, size):
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / f"{key}.lock"):
                if not _is_whole(path, size):
                    _raise_again(failed)
                    try:
                        _asked(url, partial(self._fetch, url, path, size, sha256))
                    except OSError as error:
                        if not ahead:
                            with suppress(OSError):  # of a disk that is full
                                failed.write_text(f"{type(error) is FileNotFoundError:d}{error}", encoding="utf-8")
                        raise
        with suppress(OSError):  # of a cache that was filled by someone else, or deleted by another process just now
            os.utime(path)
        return path

    def _remove_unfinished(self) -> None:
        """Delete what killed processes were writing: whoever writes holds the lock of the file's key."""
        for path in self.folder.glob("*.tmp"):
            with suppress(OSError), FileLock(self.folder / f"{path.name.partition('.')[0]}.lock", blocking=False):
                path.unlink(missing_ok=True)

    def room(self) -> float:
        """Return how many bytes fetched files may take: the limit, or what the disk has for them if that is less."""
        taken = sum(size for _, size, _ in self._kept())
        return max(0.0, min(self.limit, taken + shutil.disk_usage(self.folder).free - SPARE))

    def _fetch(self, url: str, path: Path, size: int | None, sha256: str) -> None:
        filesystem, place = filesystem_of(url)
        self._make_room(size or 0)
        with atomic(path) as temporary:
            try:
                filesystem.get_file(place, str(temporary))
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):  # a quota, which the disk's free room does not tell
                    self.limit = sum(size for _, size, _ in self._kept())
                raise
            found = temporary.stat().st_size
            if size is not None and found != size:
                raise OSError(f"it has {found:,} bytes instead of {size:,}")
            if sha256 and checksum(temporary) != sha256:
                raise OSError("it has another checksum")

    def _make_room(self, size: int) -> None:
        """Delete the shards whose use began longest ago until one of `size` bytes fits beside the others."""
        kept, room = self._kept(), self.room()
        taken = size + sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if taken <= room:
                return
            with suppress(FileNotFoundError):  # another process made room
                os.unlink(path)
            taken -= size

    def _kept(self) -> list[tuple[int, int, str]]:
        """Return (when its use began, bytes, path) of each fetched file."""
        kept = []
        for entry in os.scandir(self.folder):
            if entry.name.endswith(".tar"):
                with suppress(FileNotFoundError):  # another process made room
                    kept.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
        return kept


def _is_whole(path: Path, size: int | None) -> bool:
    try:
        return size in (None, path.stat().st_size)
    except FileNotFoundError:
        return False


def _raise_again(failed: Path) -> None:
    """Raise the error of a moment ago, of whichever process, so that each image of a lost shard costs no time."""
    try:
        text = failed.read_text(encoding="utf-8")  # empty if a process was killed as it wrote
        if text and abs(time.time() - failed.stat().st_mtime) < FAILED_FOR:  # a clock may be set back
            raise FileNotFoundError(text[1:]) if text[0] == "1" else Unread(text[1:])
    except FileNotFoundError as error:
        if error.errno is None:
            raise


def _asked(url: str, ask: Callable[[], T]) -> T:
    """Return what a store answers; ask again while it or the network fails.

    Raises:
        FileNotFoundError: if nothing is at `url`; Unread: if it failed to the last time.
    """
    pauses = list(PAUSES)
    while True:
        try:
            return ask()
        except UserError:
            raise
        except Exception as error:  # every store's library has errors of its own
            # fsspec says of a web server that failed, when asked about a file, that the file is missing.
            failure = error.__cause__ if isinstance(error, FileNotFoundError) and url.startswith("http") else None
            if isinstance(error, FileNotFoundError) and (not failure or getattr(failure, "status", 0) in MISSING):
                raise FileNotFoundError(f"{url} is missing") from error
            if not pauses:
                reason = printable(" ".join(str(failure or error).split()))[:120] or type(error).__name__
                raise Unread(f"{url} cannot be fetched, tried {len(PAUSES) + 1} times: {reason}") from error
        time.sleep(pauses.pop(0))


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def version_at(url: str) -> tuple[str, int]:
    """Return what changes when another file is put at an address (its size, its time, its tag), and its bytes or 0.

    Raises:
        Unread: if it cannot be asked for; FileNotFoundError: if there is none.
    """
    filesystem, place = filesystem_of(url)
    about = _asked(url, partial(filesystem.info, place))
    said = [(key, str(about[key])) for key in TELLING if about.get(key) is not None]
    return repr(said) if said else "", about.get("size") or 0


def filesystem_of(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for an address, and the place in it.

    Raises:
        UserError: if there is none, or its package is missing.
    """
    scheme = url.partition(":")[0]
    if scheme not in SCHEMES or "::" in url:  # fsspec's others start programs, or nest
        raise UserError(f"{url!r} has an address of another kind; give one that begins with {', '.join(SCHEMES)}")
    try:
        import fsspec

        options: dict[str, Any] = {}
        if scheme in ("http", "https"):
            from aiohttp import ClientTimeout

            options["client_kwargs"] = {"timeout": ClientTimeout(None, sock_connect=SECONDS, sock_read=SECONDS)}
        filesystem, place = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise UserError(f"{url!r} needs packages that are missing; run pip install 'mirl[remote]' ({error})") from error
    return filesystem, place
