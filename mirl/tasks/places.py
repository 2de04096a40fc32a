"""Where results go that are not given an --out: beside the weights, under the name of the data they are of."""

import json
import os
from itertools import count
from pathlib import Path


def beside(weights: str) -> Path:
    """Return the run folder that `weights` names, or this folder if it names something else."""
    run = Path(weights).expanduser()
    return run if (run / "config.yaml").exists() else Path()


def named_after(data: str) -> str:
    """Return the last part of the path of `data`, of a file without its ending; of other names what a file may have."""
    path = _absolute(data)
    return (path.stem if path.is_file() else path.name).replace(":", "-") or "data"


def results_of(data: str, folder: Path, form: str, name: str) -> Path:
    """Return the JSON file in `folder` for results of `data`, which does not hold those of other data.

    Args:
        form: its path, with {} for the `name`; a name that is taken by other data becomes name-2, name-3 ...
    """
    for number in count(1):
        path = folder / form.format(name if number == 1 else f"{name}-{number}")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            other = found.get("options", found)["data"]  # a read-out says all its options
            if _absolute(other) == _absolute(data):
                break
        except (OSError, ValueError, LookupError, AttributeError, TypeError):  # nothing, or none of ours
            break
    return path


def _absolute(data: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(data)))
