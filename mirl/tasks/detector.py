"""A trained detector on disk: `detector.safetensors` of a run, with everything that builds it again."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from mirl.data.instances import Category
from mirl.errors import UserError
from mirl.formats.graphs import save_onnx
from mirl.heads.mask_rcnn import Detector, DetectorShape, build_detector
from mirl.heads.pyramid import build_plain, build_windowed, unfuse
from mirl.models.weights import State, Weights
from mirl.tasks.settings.detection import ResolvedDetection
from mirl.tasks.weights import about
from mirl.training.checkpoints import atomic, load_newest, save_tensors
from mirl.training.runs import console, read_config

FILE = "detector.safetensors"
PROPOSALS = 1000  # of an image, both protocols'; fewer where fewer are trained on
ENCODER = "backbone.pyramid.encoder."  # before the names of the encoder's tensors


def detector_of(settings: ResolvedDetection, weights: Weights, classes: int, *, trained: bool = True) -> Detector:
    """Build the detector that the settings describe on an encoder of `weights`, with fresh heads.

    Args:
        classes: without background.
        trained: False leaves the encoder's weights as they were before training.

    Raises:
        UserError: if the encoder does not suit the protocol or the sizes.
    """
    size, patch = settings.image_size, settings.patch_size
    options: dict[str, Any] = {
        "patch_size": (patch, patch), "depth": weights.full_depth or weights.depth, "drop_path": settings.drop_path,
        "checkpointing": settings.checkpointing, "trained": trained, "seed": settings.seed,
    }  # fmt: skip
    if settings.protocol == "vitdet":
        encoder = build_windowed(weights, image_size=(size, size), window=settings.window, **options)
    else:
        encoder = build_plain(weights, **options)
    proposals = min(PROPOSALS, 2 * settings.regions)
    shape = DetectorShape(
        classes, settings.width, regions=settings.regions, after_suppression=(proposals, proposals),
        protocol=settings.protocol,
    )  # fmt: skip
    return build_detector(
        encoder, shape, image_size=size, largest=settings.largest, mean=weights.mean, deviation=weights.deviation,
        seed=settings.seed,
    )  # fmt: skip


def described(weights: Weights, categories: Sequence[Category]) -> dict[str, Any]:
    """Return what, beside the options, builds a detector: its encoder's form and its categories."""
    form = {name: value for name, value in about(weights).items() if name != "classes"}
    return {
        "encoder": json.loads(json.dumps(form | {"depth": weights.full_depth or weights.depth})),
        "categories": [[category.id, category.name] for category in categories],
    }


def save_detector(model: Detector, settings: ResolvedDetection, facts: dict[str, Any], path: Path) -> None:
    """Write a detector; `facts` are from `described`."""
    state = {name: value.detach().contiguous().cpu() for name, value in model.state_dict().items()}
    with atomic(path) as temporary:
        save_tensors(state, temporary, mirl=json.dumps({"settings": settings.saved(), **facts}))


def holds_detector(weights: str | Path) -> bool:
    """Tell whether `load_detector` is what opens `weights`."""
    path = Path(weights).expanduser()
    if path.suffix == ".safetensors" and path.is_file():
        try:
            with safe_open(path, "pt") as file:
                return "categories" in json.loads((file.metadata() or {}).get("mirl", "{}"))
        except (OSError, SafetensorError, json.JSONDecodeError):
            return path.name == FILE
    return (path / FILE).exists() or ((path / "config.yaml").exists() and "protocol" in read_config(path))


def load_detector(weights: str | Path) -> tuple[Detector, tuple[Category, ...]]:
    """Return a trained detector, in evaluation mode, and its categories: label k is the category k - 1.

    The detector maps a list of images, float [c, h, w] in 0..1 and of any sizes, to torchvision's dicts: `boxes` [n, 4]
    in pixels, `labels` [n], `scores` [n], and `masks`, bool [n, h, w], best first.

    Args:
        weights: run folder of mirl detect, finished or not, or its detector.safetensors.

    Raises:
        UserError: if there is no detector in it.
    """
    path = Path(weights).expanduser()
    facts, state = _read(path if path.suffix == ".safetensors" else path / FILE)
    try:
        settings = ResolvedDetection(**facts["settings"])
        form = facts["encoder"]
        categories = tuple(Category(number, name) for number, name in facts["categories"])
        encoder = {name.removeprefix(ENCODER): value for name, value in state.items() if name.startswith(ENCODER)}
        built = Weights(
            form["architecture"], form["arguments"], encoder, tuple(form["mean"]), tuple(form["deviation"]),
            full_depth=form["depth"],
        )  # fmt: skip
        model = detector_of(settings, built, len(categories), trained=False)
        model.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{weights} is not the detector that it says ({reason}); train it again") from error
    return model.eval(), categories


def _read(path: Path) -> tuple[dict[str, Any], State]:
    """Return what describes a detector and its tensors: of the file, or of an unfinished run's newest checkpoint."""
    if path.exists():
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {}).get("mirl", "{}"))
            return facts, load_file(path)
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise UserError(f"{path} cannot be read ({error}); give a run folder of mirl detect") from error
    run = path.parent
    if path.name != FILE or not holds_detector(run):
        shown = run if path.name == FILE else path
        raise UserError(f"{shown} holds no detector; give a run folder of mirl detect")
    settings = read_config(run)
    state = load_newest(run / "checkpoints", console.print)
    if state is None:
        raise UserError(f"{run} holds no detector yet; finish it with mirl detect --out {run} --resume")
    console.print(f"{run} is not finished: using its checkpoint of step {state['step']}", markup=False)
    return {"settings": settings, **state["about"]}, state["model"]


def write_backbone(detector: Detector, path: Path) -> Path:
    """Write what a detector makes of images, before its heads, to ONNX: [b, c, h, w], normalised, to five maps.

    Height and width are those of the largest image in evaluation, the number of images is free.
    """
    fit = detector.transform
    height, width = fit.fixed_size or (fit.min_size[-1], fit.max_size)
    height, width = (math.ceil(side / fit.size_divisible) * fit.size_divisible for side in (height, width))
    example = torch.zeros(2, len(fit.image_mean), height, width)
    maps = [f"stride_{stride}" for stride in detector.backbone.strides]
    about = {"backbone": detector.backbone.encoder.embed_dim, "mean": fit.image_mean, "deviation": fit.image_std}
    unfuse(detector.backbone)
    opset = save_onnx(_Maps(detector.backbone).eval(), path, example, maps, about)
    statistics = " and ".join(f"[{', '.join(f'{v:g}' for v in values)}]" for values in (fit.image_mean, fit.image_std))
    console.print(
        f"saved {path} ({opset}): images [b, {example.shape[1]}, {height}, {width}], of 0..1 normalised by mean and "
        f"deviation {statistics}, to {', '.join(maps)}",
        markup=False,
    )
    return path


class _Maps(torch.nn.Module):
    """A detector's backbone with its maps as a tuple, which a graph can return."""

    def __init__(self, backbone: torch.nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(images).values())
