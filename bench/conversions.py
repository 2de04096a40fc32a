"""Every source in every format that can hold it, at real sizes: largest differences, time and memory.

    python bench/conversions.py --models vit_b_12 vit_s_54 vit_b_48 --out bench/results/conversions.json

Weights are random, because differences, time and memory do not depend on them. Each conversion is one `mirl convert`
of its own, so that its peak memory is its own. Files go to a temporary folder, about 20 GB for vit_b_48.
"""

import argparse
import json
import os
import pickle
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mirl.formats import official_mae, official_mirl
from mirl.formats.renaming import Names, join
from mirl.models.autoencoder import Autoencoder
from mirl.models.encoder import parse_model, timm_arguments
from mirl.tasks.destinations import DESTINATIONS
from mirl.tasks.settings.pretraining import Resolved, autoencoder_of

SIZES = {"image_size": (224, 224), "patch_size": (16, 16), "channels": 3}
DECODERS = {"did_blocks": "all", "did_memory": "embedded", "weight_norm": True}
Save = Callable[[str, Path], None]


def randomise(module: nn.Module) -> None:
    """Fill a module's parameters, those of norms too, so that none is one or zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)


def run(model: str, path: Path, **options: Any) -> None:
    """Write what a pre-training run leaves."""
    settings = Resolved(model=model, **SIZES, **options)
    autoencoder = autoencoder_of(settings)
    randomise(autoencoder)
    about = {"model": model, **options, **SIZES}
    save_file(autoencoder.state_dict(), path, metadata={"mirl": json.dumps(about)})


def official(
    autoencoder: Autoencoder, names_of: Callable[[Autoencoder], Names], prefix: str, *, transposed: bool
) -> Mapping[str, Tensor]:
    """Return an autoencoder's weights as an official file has them, with its decoders' positions."""
    tensors = join(autoencoder.state_dict(), names_of(autoencoder))
    if transposed:
        tensors = {name: value.T.contiguous() if value.ndim == 2 else value for name, value in tensors.items()}
    positions = torch.cat([torch.zeros(1, autoencoder.shape.width), autoencoder.positions])[None]
    count = range(len(autoencoder.decoders)) if transposed else [""]
    return tensors | {f"{prefix}{number}": positions for number in count}


def official_pretraining(model: str, path: Path) -> None:
    """Write a pre-training checkpoint as the official MIRL's trainer does, without the optimizer's state."""
    width = parse_model(model)[0]
    decoders = {"decoder_width": 384, "decoder_heads": 12, "decoder_depth": 1} if width == 384 else {
        "decoder_width": 512, "decoder_heads": 16, "decoder_depth": 2}  # fmt: skip
    autoencoder = autoencoder_of(Resolved(model=model, **SIZES, **DECODERS, **decoders))
    randomise(autoencoder)
    pickled(official(autoencoder, official_mirl.names_of, "decoder_pos_embed", transposed=True), path)


def official_classifier(model: str, path: Path) -> None:
    """Write a fine-tuned checkpoint as the official MIRL's trainer does."""
    state = classifier(model, global_pool="avg", fc_norm=True).state_dict()
    pickled({name: value.T.contiguous() if value.ndim == 2 else value for name, value in state.items()}, path)


def pickled(tensors: Mapping[str, Tensor], path: Path) -> None:
    content = {"model": {name: (name, value.detach().numpy()) for name, value in tensors.items()}, "epoch": 0}
    with open(path, "wb") as file:
        pickle.dump(content, file, protocol=4)


def mae_checkpoint(model: str, path: Path) -> None:
    """Write a pre-training checkpoint as the official MAE's trainer does, without the optimizer's state."""
    autoencoder = autoencoder_of(Resolved(model=model, method="mae", decoder_width=512, decoder_depth=8, **SIZES))
    randomise(autoencoder)
    tensors = official(autoencoder, official_mae.names_of, "decoder_pos_embed", transposed=False)
    torch.save({"model": tensors, "args": argparse.Namespace(model=model)}, path)


def timm_classifier(model: str, path: Path) -> None:
    """Write a file of tensors as timm does, of a classifier that reads the class token."""
    torch.save(classifier(model, global_pool="token", fc_norm=False).state_dict(), path)


def classifier(model: str, **changes: Any) -> nn.Module:
    width, heads, depth = parse_model(model)
    arguments = timm_arguments(width, heads, depth, SIZES["image_size"], SIZES["patch_size"], 3)
    built = timm.create_model("vit_base_patch16_224", **arguments | {"num_classes": 1000} | changes)
    randomise(built)
    return built


SOURCES: dict[str, tuple[str, Save]] = {
    "run of mirl": ("run.safetensors", partial(run, method="mirl")),
    "run of mae": ("mae.safetensors", partial(run, method="mae")),
    "official MIRL": ("official.pd", official_pretraining),
    "official MIRL, fine-tuned": ("classifier.pd", official_classifier),
    "official MAE": ("mae.pth", mae_checkpoint),
    "timm classifier": ("timm.pth", timm_classifier),
}


def measure(source: Path, destination: Path, to: str, heads: int) -> dict[str, Any]:
    """Run one `mirl convert`; return its figures, or why the format cannot hold the source."""
    command = [sys.executable, "-m", "mirl.cli", "convert", str(source), str(destination), "--to", to, "--overwrite"]
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, f"--heads={heads}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    output, errors = process.stdout.read(), process.stderr.read()  # type: ignore[union-attr]
    _, status, usage = os.wait4(process.pid, 0)  # the memory of this one process, not of the largest so far
    if status:
        return {"refused": errors.strip().splitlines()[-1]}
    found = dict(
        re.findall(r"checked +.* (the file's own tensors|against the source).*largest difference (\S+)", output)
    )
    return {
        "difference": float(found["against the source"]),
        "scale": float(re.search(r"largest difference \S+ of (\S+)", output)[1]),  # type: ignore[index]
        "source_difference": float(found["the file's own tensors"]) if "the file's own tensors" in found else None,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_mb": round(usage.ru_maxrss / 1024),
        "source_mb": round(source.stat().st_size / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit_b_12", "vit_s_54", "vit_b_48"])
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), choices=list(SOURCES))
    parser.add_argument("--to", nargs="+", default=list(DESTINATIONS), choices=list(DESTINATIONS))
    parser.add_argument("--out", type=Path, default=Path("bench/results/conversions.json"))
    options = parser.parse_args()
    results = json.loads(options.out.read_text())["results"] if options.out.exists() else []
    for model in options.models:
        for name in options.sources:
            with tempfile.TemporaryDirectory() as folder:
                file, save = SOURCES[name]
                source = Path(folder, file)
                # Elsewhere, because a process begins with its parent's peak memory as its own.
                maker = get_context("spawn").Process(target=save, args=(model, source))
                maker.start()
                maker.join()
                if maker.exitcode:
                    raise SystemExit(f"{name} of {model} could not be made")
                for to in options.to:
                    figures = measure(source, Path(folder, f"out{DESTINATIONS[to].suffix}"), to, parse_model(model)[1])
                    print(f"{model} · {name} -> {to}: {figures}", flush=True)
                    key = {"model": model, "source": name, "to": to}
                    results = [row for row in results if any(row[k] != v for k, v in key.items())] + [key | figures]
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


def machine() -> dict[str, Any]:
    packages = ("torch", "timm", "transformers", "onnx", "onnxruntime", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


if __name__ == "__main__":
    main()
