"""Hugging Face data sets: by name, or a folder of parquet or Arrow files, through the package `datasets`.

The package finds rows; the bytes of an image come undecoded and are decoded as those of files are. Versions of
`datasets` from 4 on run no code that a data set brings.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mirl.data.decode import BadImage, only_bad_image
from mirl.data.encoded import EncodedImages
from mirl.errors import UserError


class TableImages(EncodedImages):
    """The images in a column of a table.

    Args:
        name: what the user called it. rows: a `datasets.Dataset` of that column alone, undecoded.
    """

    def __init__(self, name: str, rows: Any, column: str, channels: int) -> None:
        super().__init__(channels)
        self.name, self.rows, self.column = name, rows, column

    def __len__(self) -> int:
        return len(self.rows)

    def name_of(self, index: int) -> str:
        """Return a name such as `hf:cats[17]`."""
        return f"hf:{self.name}[{index}]"

    def content(self, index: int) -> tuple[bytes, str]:
        """Return the bytes of an image's file and its name, or raise `BadImage`."""
        with only_bad_image():
            cell = self.rows[index][self.column]
        if cell is None:
            raise BadImage("is empty")
        if cell["bytes"] is None:  # a path comes from whoever made the table, and is not followed
            raise BadImage("has no bytes but a path, which is not followed; save the data set with its images in it")
        return cell["bytes"], f"{index:09d}"  # names repeat, and tell nothing of where the image is


def open_table(name: str, channels: int, download: bool) -> TableImages:
    """Open a Hugging Face data set.

    Args:
        name: NAME or NAME:SPLIT on the hub or in its cache, or a folder of .parquet or .arrow files or of a data set
            that `save_to_disk` wrote.
        download: fetch it if it is not in the cache.

    Raises:
        UserError: if it cannot be opened, or has no column of images.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"hf:{name} needs the package datasets; run pip install 'mirl[huggingface]'") from error
    try:
        rows = _rows(datasets, name, download)
    except UserError:
        raise
    except Exception as error:  # the package lets through errors of the network, of Arrow and of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        remedy = "check the name" if download else "check the name, or add --download to fetch it"
        raise UserError(f"hf:{name} cannot be opened ({reason}); {remedy}") from error
    columns = [column for column, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    columns = columns or [column for column, feature in rows.features.items() if _is_bytes(feature)]
    if not columns:
        raise UserError(f"hf:{name} has no column of images; it has {', '.join(rows.features)}")
    if not len(rows):
        raise UserError(f"hf:{name} has no rows; give a data set with images")
    column = "image" if "image" in columns else columns[0]
    rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return TableImages(name, rows, column, channels)


def _rows(datasets: Any, name: str, download: bool) -> Any:
    """Return the rows of all splits that are for training."""
    if not name:
        raise UserError("hf: names no data set; give hf:NAME, hf:NAME:SPLIT or hf:FOLDER")
    folder = Path(os.path.expanduser(name))
    if name.endswith("/") and not folder.exists():
        raise UserError(f"hf:{name} does not exist; give a folder that does, or hf:NAME")
    if folder.is_dir():
        if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
            return _training(datasets.load_from_disk(str(folder)))
        for kind in ("parquet", "arrow"):
            files = sorted(str(path) for path in folder.rglob(f"*.{kind}"))
            if files:
                return datasets.load_dataset(kind, data_files=files, split="train")
        raise UserError(f"{name!r} has no .parquet or .arrow files; give a folder that has, or that save_to_disk wrote")
    name, _, split = name.partition(":")
    with _offline(not download):
        return datasets.load_dataset(name, split=split or "train")


def _is_bytes(feature: Any) -> bool:
    """Tell whether a column holds bytes: images in a table that another program than `datasets` wrote."""
    content = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(content, "dtype", None) in ("binary", "large_binary")


@contextmanager
def _offline(offline: bool) -> Iterator[None]:
    """Keep the packages from the network; `local_files_only` still asks the hub, and the variable is read on import."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _training(found: Any) -> Any:
    """Return the split called train, of several."""
    if not isinstance(found, dict):
        return found
    return found["train"] if "train" in found else next(iter(found.values()))
