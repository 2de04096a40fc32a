"""Images per second and core that one data worker makes ready, against the plain pipeline of Pillow and torchvision.

    python bench/data.py --data FOLDER
    python bench/data.py --size 4000 3000 --images 8

Plain is what most training scripts have: Pillow decodes all of an image, torchvision crops, flips, converts to floats
and normalises it, a random mask is drawn, and PyTorch's default collation makes batches. Ours is what `mirl pretrain`
reads its images with; its batches are uint8 and normalised on the device, so both are shown without and with this.
The two take turns, each in a process of one thread, as data workers are; seconds are of the processor, which other
programs change less.
Without --data the images are synthetic JPEGs: noise with the spectrum of photographs, 1 / frequency, and grain.
"""

import argparse
import json
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from recording import add, machine
from sides import Side
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import transforms

from mirl.data.loading import MaskedBatch, MaskedImages, collate, seeded
from mirl.data.sources import ImageFiles, open_source, opened
from mirl.data.transforms import channel_statistics, normalise, resize, training_view
from mirl.data.workers import begin_worker
from mirl.errors import UserError
from mirl.training import processes

SIZE, PATCH, RATIO = 224, 16, 0.75
PATCHES = (SIZE // PATCH) ** 2
MIN_CROP = 0.2
BICUBIC = transforms.InterpolationMode.BICUBIC


def synthesise(folder: Path, count: int, width: int, height: int) -> None:
    """Write JPEGs of quality 90 whose spectrum is that of photographs; they take about 2 bits a pixel."""
    rows, columns = np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width
    amplitude = 1 / np.maximum(1, np.hypot(rows, columns))
    for number in range(count):
        generator = np.random.default_rng(number)
        noise = generator.standard_normal((3, height, width), np.float32)
        planes = np.stack([np.fft.irfft2(np.fft.rfft2(plane) * amplitude, (height, width)) for plane in noise])
        planes *= np.array([50, 12, 12])[:, None, None] / planes.std((1, 2), keepdims=True)  # luminance and colours
        planes[0] += 2 * generator.standard_normal((height, width), np.float32)  # a sensor's grain
        pixels = np.stack([128 + planes[0] + planes[1], 128 + planes[0], 128 + planes[0] + planes[2]], -1)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:04d}.jpg", quality=90)


class Pipeline(ABC):
    """One side, in its own process."""

    def __init__(self, source: ImageFiles) -> None:
        torch.set_num_threads(1)
        self.source, self.indices = source, range(len(source))

    @abstractmethod
    def batch(self, epoch: int) -> Any:
        """Make a batch of all images."""

    @abstractmethod
    def decode(self) -> list[Any]:
        """Decode what the batch's crops need."""

    @abstractmethod
    def resize(self, image: Any) -> Any:
        """Make a view of what `decode` gave."""

    def seconds(self, epoch: int) -> dict[str, float]:
        """Return the processor's seconds for a batch, and by part."""
        batch, taken = timed(partial(self.batch, epoch))
        images, decoding = timed(self.decode)
        _, resizing = timed(lambda: [self.resize(image) for image in images])
        parts = {"decode": decoding, "crop_resize": resizing, "rest": taken - decoding - resizing}
        _, normalisation = timed(partial(normalise, batch.images, 3)) if isinstance(batch, MaskedBatch) else (None, 0)
        return {"all": taken, "normalise": normalisation, **parts}


class Plain(Pipeline):
    """The pipeline of most training scripts, image by image."""

    def __init__(self, source: ImageFiles) -> None:
        super().__init__(source)
        self.crop = transforms.RandomResizedCrop(SIZE, scale=(MIN_CROP, 1.0), interpolation=BICUBIC)
        normalisation = transforms.Normalize(*channel_statistics(3))
        self.rest = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalisation])

    def decode(self) -> list[Image.Image]:
        return [self._image(index) for index in self.indices]

    def resize(self, image: Image.Image) -> Image.Image:
        return self.crop(image)

    def batch(self, epoch: int) -> Any:
        return default_collate([self._sample(index) for index in self.indices])

    def _image(self, index: int) -> Image.Image:
        with Image.open(self.source.path_of(index)) as image:
            return image.convert("RGB")

    def _sample(self, index: int) -> tuple[Tensor, Tensor, Tensor, int]:
        view = self.rest(self.crop(self._image(index)))
        order = torch.rand(PATCHES).argsort()
        visible = int(PATCHES * (1 - RATIO))
        return view, order[:visible], order[visible:], index


class Ours(Pipeline):
    """What `mirl pretrain` reads its images with."""

    def __init__(self, source: ImageFiles) -> None:
        super().__init__(source)
        begin_worker(0)
        self.view = training_view((SIZE, SIZE), MIN_CROP, flip=True)
        self.images = MaskedImages(
            source, np.arange(len(source)), self.view, patches=PATCHES, mask_ratio=RATIO, smallest=(PATCH, PATCH),
            substitute=True, key=(0, 0),
        )  # fmt: skip
        self.boxes = []
        for index in self.indices:
            with seeded(0, 0, 0, index):
                self.boxes.append(self.view.box(opened(source, index).size))

    def batch(self, epoch: int) -> MaskedBatch:
        batch = collate(self.images.__getitems__([(epoch, index) for index in self.indices]))
        if batch.bad:
            raise UserError(f"{batch.bad[0][0]} {batch.bad[0][1]}; give a folder without damaged images")
        assert isinstance(batch, MaskedBatch)
        return batch

    def decode(self) -> list[Tensor]:
        return [opened(self.source, index).region(box, self.view.size) for index, box in enumerate(self.boxes)]

    def resize(self, image: Tensor) -> Tensor:
        return resize(image, self.view.size)


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    """Return what an action returns and the seconds of the processor that it took."""
    began = time.process_time()
    result = action()
    return result, time.process_time() - began


def measured(source: ImageFiles, repeats: int) -> dict[str, Any]:
    """Time both pipelines in turn, after a round that warms up."""
    rounds: list[dict[str, float]] = []
    with Side(partial(Plain, source)) as plain, Side(partial(Ours, source)) as ours:
        for epoch in range(repeats + 1):
            sides = {"plain": plain.ask("seconds", epoch), "ours": ours.ask("seconds", epoch)}
            row = {f"{side}.{part}": taken for side, parts in sides.items() for part, taken in parts.items()}
            rounds.append(row)
            print(
                f"round {epoch}: {row['plain.all'] / row['ours.all']:.2f} times as fast as the plain pipeline",
                flush=True,
            )
    rounds = rounds[1:]
    milliseconds = {name: round(1000 * median(r[name] for r in rounds) / len(source), 3) for name in rounds[0]}
    with_normalisation = (r["plain.all"] / (r["ours.all"] + r["ours.normalise"]) for r in rounds)
    return {
        "ratio": round(median(r["plain.all"] / r["ours.all"] for r in rounds), 2),
        "ratio_with_normalisation": round(median(with_normalisation), 2),
        "images_per_second_and_core": {side: round(1000 / milliseconds[f"{side}.all"]) for side in ("plain", "ours")},
        "milliseconds": milliseconds,
    }


def chosen(source: ImageFiles, count: int) -> ImageFiles:
    """Return `count` images from all over a folder."""
    paths = [source.paths[int(index)] for index in np.unique(np.linspace(0, len(source) - 1, count).astype(int))]
    return ImageFiles(source.root, type(source.paths)(paths), 3)


def described(source: ImageFiles) -> dict[str, Any]:
    sizes = [opened(source, index).size for index in range(len(source))]
    return {
        "images": len(source), "size": [int(median(side)) for side in zip(*sizes, strict=True)],
        "kilobytes": round(median(Path(source.path_of(index)).stat().st_size for index in range(len(source))) / 1000),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a folder of images; without it they are synthetic")
    parser.add_argument("--size", type=int, nargs=2, default=[500, 375], help="width and height of synthetic images")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("bench/results/data.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not options.data:
            synthesise(Path(folder), options.images, *options.size)
        source = open_source(options.data or folder)
        if not isinstance(source, ImageFiles):
            raise UserError(f"{options.data!r} is no folder of images; give one")
        source = chosen(source, options.images)
        result = {
            "command": " ".join(["python", *sys.argv]), "synthetic": not options.data, **described(source),
            **measured(source, options.repeats), **machine(processes.Fabric(accelerator="cpu", devices=1)),
            "pillow": version("pillow"),
        }  # fmt: skip
    add(result, options.out)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
