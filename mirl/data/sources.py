"""What `--data` accepts: a folder, a glob, a list file, tar shards, built-in shapes, or a data set by its name.

`open_source` turns each into a `Source`: images by index, no labels. The order is the same on every machine.
Symbols: c channels, h and w image height and width.
"""

import difflib
import glob
import os
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from mirl.data import reading
from mirl.data.decode import (
    MODES,
    image_suffixes,
    image_to_tensor,
    is_array,
    only_bad_image,
    read_file,
    read_image,
)
from mirl.data.encoded import Undecoded
from mirl.data.huggingface import open_table
from mirl.data.packed import PackedStrings
from mirl.data.path_index import cache_folder, remembered
from mirl.data.pictures import DecodedPicture, Picture, open_picture
from mirl.data.shards.cache import is_remote
from mirl.data.shards.names import FORMS, local_shards, names_shards
from mirl.data.shards.opening import open_shards
from mirl.data.walking import read_list, suffix, walk
from mirl.errors import UserError, plural, printable

LIST_SUFFIXES = (".txt", ".lst")
NAMED = 5  # folders that cannot be listed
COMMON_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".bmp", ".npy")

# Name -> torchvision's class and the arguments of its training split (for STL-10, of the part made for this).
TORCHVISION_SETS: dict[str, tuple[str, dict[str, Any]]] = {
    "caltech101": ("Caltech101", {}),
    "cifar10": ("CIFAR10", {"train": True}),
    "cifar100": ("CIFAR100", {"train": True}),
    "dtd": ("DTD", {"split": "train"}),
    "eurosat": ("EuroSAT", {}),
    "fashionmnist": ("FashionMNIST", {"train": True}),
    "flowers102": ("Flowers102", {"split": "train"}),
    "food101": ("Food101", {"split": "train"}),
    "mnist": ("MNIST", {"train": True}),
    "pets": ("OxfordIIITPet", {"split": "trainval"}),
    "stl10": ("STL10", {"split": "unlabeled"}),
    "svhn": ("SVHN", {"split": "train"}),
}

ALLOWED = (
    f"a folder, a glob, a list file ({', '.join(LIST_SUFFIXES)}), {FORMS}, hf:NAME or hf:FOLDER, shapes, "
    f"or one of {', '.join(TORCHVISION_SETS)}"
)


class Source(Protocol):
    """Images by index."""

    def __len__(self) -> int: ...

    def name_of(self, index: int) -> str:
        """Return what logs call the image: for a file its path."""
        ...

    def read(self, index: int) -> torch.Tensor:
        """Return uint8 [c, h, w], or raise `BadImage`."""
        ...


def opened(source: Source, index: int) -> Picture:
    """Return an image whose pixels are decoded when a box is asked for, where the source can, or raise `BadImage`."""
    return source.open(index) if isinstance(source, Undecoded) else DecodedPicture(source.read(index))


def beforehand(source: Source, indices: Sequence[int]) -> int:
    """Read the first of some images' files together, where the source can; return how many need no further call."""
    return source.beforehand(indices) if isinstance(source, Undecoded) else len(indices)


class ImageFiles(Undecoded):
    """The image files of a folder, a glob or a list; opened only when they are read.

    Args:
        root: the folder that relative paths start from.
        paths: the files, in the order of their indices.
        channels: channels of every image read.
        ignored: number of files left out because their suffix is not an image's.
        unreadable: folders that could not be listed.
        remembered: whether the paths are those that an earlier start found.
    """

    def __init__(
        self, root: str, paths: PackedStrings, channels: int, *, ignored: int = 0,
        unreadable: Iterable[str] = (), remembered: bool = False,
    ):  # fmt: skip
        self.root, self.paths, self.channels = root, paths, channels
        self.ignored, self.unreadable, self.remembered = ignored, list(unreadable), remembered

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know of the data before it is used."""
        if not self.unreadable:
            return ()
        more = f" and {len(self.unreadable) - NAMED} more" if len(self.unreadable) > NAMED else ""
        named = ", ".join(map(printable, self.unreadable[:NAMED])) + more
        return (f"folders that cannot be listed, whose images are not in the data: {named}",)

    def __len__(self) -> int:
        return len(self.paths)

    def path_of(self, index: int) -> str:
        """Return the file's path."""
        return os.path.join(self.root, self.paths[index])

    def name_of(self, index: int) -> str:
        """Return the file's path, in a form that can be printed."""
        return printable(self.path_of(index))

    def read(self, index: int) -> torch.Tensor:
        """Return uint8 [c, h, w], or raise `BadImage`."""
        return read_image(self.path_of(index), self.channels)

    def open(self, index: int) -> Picture:
        """Return the image as one to ask for boxes, or raise `BadImage`."""
        return open_picture(self.path_of(index), self.channels)

    def beforehand(self, indices: Sequence[int]) -> int:
        """Read the first of some images' files together; return how many need no further call."""
        paths = [(path,) for path in map(self.path_of, indices) if not is_array(path)]
        return reading.beforehand(read_file, paths) if len(paths) == len(indices) else len(indices)


class TorchvisionImages:
    """The images of a torchvision data set, without their labels."""

    def __init__(self, name: str, dataset: Any, channels: int):
        self.name, self.dataset, self.channels = name, dataset, channels

    def __len__(self) -> int:
        return len(self.dataset)

    def name_of(self, index: int) -> str:
        """Return a name such as `cifar10[17]`."""
        return f"{self.name}[{index}]"

    def read(self, index: int) -> torch.Tensor:
        """Return uint8 [c, h, w], or raise `BadImage`."""
        with only_bad_image():
            return image_to_tensor(self.dataset[index][0], self.channels)


def open_source(data: str | Path, *, channels: int = 3, download: bool = False) -> Source:
    """Open what the user named as a source of images.

    Names of built-in and torchvision sets win over folders of the same name; `./shapes` is the folder.

    Args:
        data: a folder (searched below, in the order of relative paths), a glob such as `photos/**/*.jpg`, a list file
            (one path a line, relative to the list's folder; blank lines and lines that start with # are skipped),
            tar shards such as `shards/{000000..000127}.tar`, a folder of them, addresses of either,
            `hf:NAME` or `hf:FOLDER` for a Hugging Face data set,
            `shapes`, `shapes:COUNT` or `shapes:COUNT:PIXELS`, or a name in `TORCHVISION_SETS`.
        channels: channels of every image; other than 1, 3 and 4 only `.npy` files are images.
        download: fetch a torchvision set that is not in the cache folder.

    Raises:
        UserError: if there is nothing like that, there is no image in it, or a download fails.
    """
    if channels < 1:
        raise UserError(f"channels {channels} is too small; give 1 or more (1 is grey, 3 RGB, 4 RGBA)")
    text = os.fspath(data)
    if isinstance(data, str):
        name, colon, count = text.partition(":")
        if name == "shapes":
            return _open_shapes(count if colon else "10000", channels)
        if name == "hf" and colon and not is_remote(text):
            return open_table(count, channels, download)
        if text in TORCHVISION_SETS:
            return _open_torchvision(text, channels, download)
    path = os.path.expanduser(text)
    if names_shards(path):
        return open_shards(text, channels, cache_folder())
    if os.path.isdir(path):
        return _open_folder(path, channels)
    if os.path.isfile(path):
        return _open_list(path, channels)
    if glob.has_magic(path):
        return _open_glob(path, channels)
    raise UserError(not_there(text, ALLOWED, ("shapes", *TORCHVISION_SETS)))


def _open_shapes(text: str, channels: int) -> Source:
    from mirl.data.shapes import MIN_SIZE, Shapes

    if channels != 3:
        raise UserError(f"shapes are RGB images but channels is {channels}; give channels 3 or your own images")
    count, colon, size = text.partition(":")
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"'shapes:{text}' has no valid count; give a whole number from 1, such as shapes:10000")
    if colon and not (size.isdecimal() and int(size) >= MIN_SIZE):
        raise UserError(f"'shapes:{text}' has no valid size; give pixels from {MIN_SIZE} on, such as shapes:10000:64")
    return Shapes(int(count), size=int(size) if colon else 64)


def _open_folder(folder: str, channels: int) -> Source:
    suffixes = image_suffixes(channels)
    found = remembered(folder, suffixes, partial(walk, folder, suffixes))
    if not found.paths and local_shards(folder):
        return open_shards(folder, channels, cache_folder())
    if not found.paths:
        closed = f" and {plural(len(found.unreadable), 'folder')} that cannot be read" if found.unreadable else ""
        others = f"{plural(found.ignored, 'other file')}{closed}"
        raise UserError(f"{folder!r} has no images, but {others}; {_allowed_suffixes(channels)}")
    return ImageFiles(
        folder, found.paths, channels, ignored=found.ignored, unreadable=found.unreadable, remembered=found.remembered
    )


def _open_glob(pattern: str, channels: int) -> ImageFiles:
    suffixes = image_suffixes(channels)
    matches = sorted(glob.iglob(pattern, recursive=True), key=lambda path: Path(path).as_posix())
    paths = PackedStrings(path for path in matches if suffix(path) in suffixes and "__MACOSX" not in Path(path).parts)
    if not paths:
        raise UserError(f"{pattern!r} matches no images, but {len(matches)} others; {_allowed_suffixes(channels)}")
    return ImageFiles("", paths, channels, ignored=len(matches) - len(paths))


def _open_list(path: str, channels: int) -> ImageFiles:
    folder = os.path.dirname(path)
    if suffix(path) in image_suffixes(channels):
        raise UserError(f"{path!r} is a single image; give its folder, {folder or '.'!r}")
    if suffix(path) not in LIST_SUFFIXES:
        raise UserError(f"{path!r} is neither a folder nor a list file; give {ALLOWED}")
    try:
        found = remembered(path, (), partial(read_list, path))
    except OSError as error:
        raise UserError(f"{path!r} cannot be read: {error.strerror}; give a list file that can") from error
    if not found.paths:
        raise UserError(f"{path!r} lists no images; write one path a line, relative to its folder or absolute")
    return ImageFiles(folder, found.paths, channels, remembered=found.remembered)


def _open_torchvision(name: str, channels: int, download: bool) -> TorchvisionImages:
    if channels not in MODES:
        raise UserError(f"{name} cannot have {channels} channels; give 1, 3 or 4")
    import torchvision.datasets

    class_name, arguments = TORCHVISION_SETS[name]
    make = getattr(torchvision.datasets, class_name)
    folder = cache_folder() / "datasets" / name
    missing = not folder.exists()
    if missing and not download:
        hint = f" (for the folder of that name give ./{name})" if os.path.exists(name) else ""
        raise UserError(f"{name} is not in {folder}; add --download to fetch it{hint}")
    try:
        if missing:
            # Into a fresh folder, then renamed: torchvision takes half of an unpacked archive for the whole.
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
                make(Path(fresh) / name, **arguments, download=True)
                os.rename(Path(fresh) / name, folder)
        return TorchvisionImages(name, make(folder, **arguments), channels)
    except ImportError as error:
        raise UserError(f"{name} needs the package {error.name}; run pip install {error.name}") from error
    except Exception as error:  # torchvision lets through errors of the network, archives and pickles alike
        failure = "could not be downloaded" if missing else f"in {folder} cannot be read"
        remedy = "check the network and try again" if missing else "delete that folder and add --download"
        raise UserError(f"{name} {failure} ({' '.join(str(error).split())}); {remedy}") from error


def not_there(text: str, allowed: str, built_in: Iterable[str]) -> str:
    """Say which part of a path is missing, and which file or `built_in` name is similar, else what is `allowed`."""
    path = Path(os.path.expanduser(text))
    while not path.parent.is_dir():
        path = path.parent
    try:
        names = [entry.name for entry in os.scandir(path.parent)]
    except OSError:
        names = []
    if path.name == text:
        names += built_in
    by_lower_case = {name.lower(): name for name in names}
    close = difflib.get_close_matches(path.name.lower(), by_lower_case, n=3)
    similar = ", ".join(repr(str(path.parent / by_lower_case[name])) for name in close)
    advice = f"did you mean {similar}?" if similar else f"give {allowed}"
    within = "" if str(path) == os.path.expanduser(text) else f" ({str(path)!r} is missing)"
    return f"{text!r} does not exist{within}; {advice}"


def _allowed_suffixes(channels: int) -> str:
    suffixes = image_suffixes(channels)
    common = [suffix for suffix in COMMON_SUFFIXES if suffix in suffixes]
    more = f" and {len(suffixes) - len(common)} more" if len(suffixes) > len(common) else ""
    return f"with {channels} channels, images are files that end in {', '.join(common)}{more}"
