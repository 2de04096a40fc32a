"""Runs that look finished, with autoencoders of random weights: made in a moment, of any method, size and channels."""

import numpy as np
import torch
from PIL import Image

from mirl.data.sources import open_source
from mirl.models.patches import patchify
from mirl.tasks.export import export
from mirl.tasks.pretrain import PretrainTask, split_off_held_out
from mirl.tasks.settings.pretraining import Pretraining, resolve
from mirl.training.runs import RunFolder

OPTIONS = {
    "data": "shapes:100", "model": "vit_48x4_6", "segments": 2, "image_size": 32, "patch_size": 8, "decoder_width": 32,
    "decoder_depth": 1, "epochs": 2, "batch_size": 16, "workers": 0, "precision": "32", "block_figures": False,
}  # fmt: skip


def write_run(folder, **options):
    """Write a run of `options`, of which no weight is what a fresh model has; return its task."""
    given = Pretraining(**OPTIONS | options | {"out": str(folder)})
    source = open_source(given.data, channels=given.channels)
    training, held_out = split_off_held_out(len(source))
    settings = resolve(
        given, images=len(training), shorter_side=32, gpu=False, devices=1, precision="32"
    )  # fmt: skip
    task = PretrainTask(settings, source, training, held_out)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    task.model.eval()
    run = RunFolder(folder, resume=False, overwrite=False)
    run.write_config(settings.saved())
    export(task.model, settings, run)
    run.close()
    return task


def write_images(folder, count=3, size=(40, 56), channels=3):
    """Write a folder of random pictures, .npy arrays where no picture has so many channels; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    random, paths = np.random.default_rng(0), []
    for number in range(count):
        pixels = random.integers(256, size=(*size, channels), dtype=np.uint8)
        pictures = channels in (1, 3)
        path = folder / f"{number}.{'png' if pictures else 'npy'}"
        Image.fromarray(pixels.squeeze()).save(path) if pictures else np.save(path, pixels)
        paths.append(path)
    return paths


def noise(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def cells(images, patch_size=(8, 8)):
    """Cut images [b, c, h, w] into patches [b, n, p]."""
    return patchify(images.float(), patch_size)
