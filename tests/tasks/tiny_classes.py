"""Tiny class folders, encoders and classifiers of random weights, and fine-tuning tasks that need no run."""

import json
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from mirl.data.labels import open_split
from mirl.data.transforms import channel_statistics
from mirl.models.encoder import ARCHITECTURE, timm_arguments
from mirl.tasks.finetune import FinetuneTask
from mirl.tasks.settings.finetuning import Finetuning, resolve_finetuning
from mirl.tasks.weights import Weights, open_weights

PATTERNS = {
    "across": lambda x, y: y // 2 % 2,
    "checks": lambda x, y: (x // 2 + y // 2) % 2,
    "down": lambda x, y: x // 2 % 2,
    "plain": lambda x, y: 0 * x,
}
# Every augmentation off, and a rate at which patterns are told apart after 36 steps.
PLAIN = {
    "randaugment": "none", "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0, "drop_path": 0.0,
    "min_crop": 1.0, "flip": False, "precision": "32", "workers": 0, "batch_size": 16, "epochs": 6, "base_lr": 3.2e-2,
    "evaluate_epochs": 6, "report": False,
}  # fmt: skip


def pattern(name, *key, side=32):
    """Return uint8 [side, side, 3]: stripes or checks of a dark and a light colour, shifted at random."""
    random = np.random.default_rng((*name.encode(), *key))
    y, x = np.mgrid[:side, :side] + random.integers(4, size=2)[:, None, None]
    dark, light = random.integers(0, 100, 3), random.integers(156, 256, 3)
    return np.where(PATTERNS[name](x, y)[..., None], light, dark).astype(np.uint8)


def write_patterns(folder, **counts):
    """Write class folders of so many patterns in each split; return the folder."""
    for number, (split, count) in enumerate(counts.items()):
        for name in PATTERNS:
            (Path(folder) / split / name).mkdir(parents=True)
            for index in range(count):
                Image.fromarray(pattern(name, number, index)).save(Path(folder) / split / name / f"{index:02}.png")
    return folder


def write_encoder(folder, *, depth=2, size=(16, 16), patch=(8, 8), channels=3, classes=()):
    """Write an encoder, or a classifier, of which no weight, norm's or bias's either, is what a fresh model has."""
    arguments = timm_arguments(48, 4, depth, size, patch, channels)
    if classes:
        arguments |= {"num_classes": len(classes), "fc_norm": True}
    model = timm.create_model(ARCHITECTURE, **arguments)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    mean, deviation = channel_statistics(channels)
    known = {"mean": mean, "std": deviation, "label_names": classes}
    folder.mkdir()
    config = {"architecture": ARCHITECTURE, "model_args": arguments, "pretrained_cfg": known}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return str(folder)


def task_of(weights, **options):
    """Return the task that `mirl finetune` would run with these options; `weights` are a path or opened."""
    opened = weights if isinstance(weights, Weights) else open_weights(weights)
    given = Finetuning(**{"weights": str(weights), "data": "shapes:20:32"} | options)
    train, val = open_split(given.data, channels=opened.channels, val_fraction=given.val_fraction)
    settings = resolve_finetuning(
        given, images=len(train), depth=opened.full_depth or opened.depth, image_size=opened.image_size,
        patch_size=opened.patch_size, gpu=False, devices=1, precision="32",
    )  # fmt: skip
    return FinetuneTask(settings, opened, train, val)


def differing(model, state):
    """Return the parameters that `state` has and of which the model has other values."""
    own = model.state_dict()
    return {name for name in state if name in own and not torch.equal(own[name], state[name])}
