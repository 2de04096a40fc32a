"""What `--data` calls tar shards: braces as webdataset has them, globs, addresses, folders with an index."""

import itertools
import os
import re
from glob import escape, glob, has_magic

from mirl.data.shards.cache import filesystem_of, is_remote
from mirl.errors import UserError

INDEX = "index.safetensors"  # beside the shards that `mirl shard` wrote
MOST_SHARDS = 1_000_000
FORMS = "tar shards ('shards/{000000..000127}.tar', also behind https://, s3://, gs:// ...)"
ENDINGS = (".tar", ".tar.gz", ".tgz")


def names_shards(data: str) -> bool:
    """Tell whether `--data` means shards: it ends in .tar, is an address, or a folder that `mirl shard` wrote."""
    return is_remote(data) or data.endswith(ENDINGS) or os.path.isfile(os.path.join(data, INDEX))


def local_shards(folder: str) -> list[str]:
    """Return the tar files of a folder of this machine, in order."""
    return sorted(glob(os.path.join(escape(folder), "*.tar")))


def expand(data: str) -> list[str]:
    """Return the shards that a name with braces or stars means, in order; a name that ends in / is a folder.

    Raises:
        UserError: if it means none, or more than a million.
    """
    names = []
    for name in _without_braces(data):
        if is_remote(name):
            names += _remote_matches(name) if "*" in name else [name]
        else:
            path = os.path.expanduser(name)
            names += sorted(glob(path, recursive=True)) if has_magic(path) and not os.path.exists(path) else [path]
    if not names:
        raise UserError(f"{data!r} matches no shards; give names such as 'shards/{{000000..000127}}.tar'")
    return list(dict.fromkeys(names))


def _without_braces(text: str) -> list[str]:
    """Return what `{000..127}` and `{a,b}` stand for, in the order of a shell."""
    parts = re.split(r"\{([^{}]*)\}", text)
    choices = [[part] if i % 2 == 0 else _choices(part, text) for i, part in enumerate(parts)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > MOST_SHARDS:
        raise UserError(f"{text!r} means {count:,} shards; give at most {MOST_SHARDS:,}")
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(inside: str, text: str) -> list[str]:
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = map(int, span.groups())
        if abs(last - first) >= MOST_SHARDS:
            raise UserError(f"{text!r} means {abs(last - first) + 1:,} shards; give at most {MOST_SHARDS:,}")
        step = 1 if last >= first else -1
        width = max(map(len, span.groups())) if any(len(end) > 1 and end[0] == "0" for end in span.groups()) else 0
        return [f"{number:0{width}d}" for number in range(first, last + step, step)]
    return inside.split(",") if "," in inside else [f"{{{inside}}}"]


def _remote_matches(pattern: str) -> list[str]:
    filesystem, place = filesystem_of(pattern)
    try:
        return sorted(filesystem.unstrip_protocol(name) for name in filesystem.glob(place))
    except Exception as error:  # every store's library has errors of its own
        raise UserError(
            f"{pattern!r} cannot be listed ({' '.join(str(error).split())}); give braces instead"
        ) from error


def beside(name: str, other: str) -> str:
    """Return what is called `other` in the folder of a shard, which may be an address."""
    if is_remote(name):
        return f"{name.rpartition('/')[0]}/{other}"
    return os.path.join(os.path.dirname(name), other)


def is_folder(name: str) -> bool:
    """Tell whether a name that `expand` returned is a folder, whose index names its shards."""
    return name.endswith("/") if is_remote(name) else os.path.isdir(name)


def index_of(name: str) -> str:
    """Return where the index of a shard or of a folder is, if it has one."""
    return f"{name.rstrip('/')}/{INDEX}" if is_folder(name) else beside(name, INDEX)
