"""`mirl convert`: weights from one format to another, checked by running both sides on the same images."""

import ctypes
import gc
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.utils.parametrize import remove_parametrizations

from mirl.errors import UserError, first_line, plural
from mirl.formats.paddle import read_checkpoint
from mirl.formats.reference import Reference
from mirl.formats.shapes import Heads
from mirl.models.autoencoder import Autoencoder
from mirl.models.masking import split
from mirl.models.weights import AutoencoderWeights, Weights
from mirl.tasks.card import model_card, run_of
from mirl.tasks.destinations import DESTINATIONS, Outputs, mask_noise, model_of, outputs, returns_of
from mirl.tasks.settings.converting import ConvertOptions, Kind
from mirl.tasks.settings.pretraining import Resolved, autoencoder_of
from mirl.tasks.weight_files import PADDLE, PYTORCH, load_pytorch
from mirl.tasks.weights import build_autoencoder, encoder_of, open_checkpoint
from mirl.training.files import writing
from mirl.training.runs import console

TOLERANCE = 1e-4  # of the largest output; float32 sums in another order differ by about 1e-6
ELSEWHERE = "give another destination"
IMAGES = 3  # shown to both sides; graphs are traced with 2, so that a fixed batch size would show


@dataclass(frozen=True)
class Conversion:
    """What `mirl convert` wrote, and how well both sides agree.

    Attributes:
        path: the file or folder.
        difference: largest absolute difference between outputs of the source's model and of what was written.
        source_difference: the same between an official file's own tensors and the source's model; None for others.
        scale: largest absolute output, to which the differences relate.
    """

    path: Path
    difference: float
    source_difference: float | None
    scale: float


def convert(source: str, destination: str, to: Kind = ConvertOptions.to, **options: Any) -> Conversion:
    """Convert weights to another format, and check it by running both sides on the same images.

    Takes the fields of `mirl.ConvertOptions`, e.g. `mirl.convert("runs/a", "runs/a.onnx", "onnx")`.

    Raises:
        UserError: if the source cannot be read or has another form than was given, the destination's format cannot hold
            it, or the two sides disagree.
    """
    given = ConvertOptions(source=source, destination=destination, to=to, **options)
    source, heads = given.source, Heads(given.heads, given.decoder_heads)
    kind, path = DESTINATIONS[to], Path(given.destination).expanduser().resolve()
    _check_destination(path, to, given.overwrite)
    _check_upload(given.push_to_hub, given.public, to)
    opened = open_checkpoint(
        source, say=_say, heads=heads, taps=given.taps, decoders=kind.decoders, encoder_only=not kind.decoders
    )
    _check_form(opened, source, heads=given.heads, decoder_heads=given.decoder_heads, taps=given.taps)
    if to == "huggingface_mae" and isinstance(opened, Weights):
        raise UserError(f"{source} has no decoder; give the run folder of mirl pretrain --method mae")
    images = torch.randn(IMAGES, *_input_shape(opened), generator=torch.Generator().manual_seed(0))
    _say(f"source   {source}: {_describe(opened)}")

    source_difference = None
    if official := _official_outputs(Path(source).expanduser(), opened, images):
        source_difference, scale = _difference(outputs(model_of(opened), images), official)
        _agree(source_difference, scale, f"{source} and the model read from it")
        _say(f"checked  the file's own tensors against this model: largest difference {source_difference:.1e}")
        del official
        _release_memory()
    weights = encoder_of(opened) if isinstance(opened, AutoencoderWeights) and not kind.decoders else opened
    expected = outputs(model_of(weights), images)
    if given.fold_weight_norm:
        weights = _folded(weights)
    card = model_card(weights, run_of(Path(source).expanduser()), to)
    with _staged(path) as fresh:
        try:
            model = model_of(weights)
            returns = returns_of(model)
            kind.write(weights, model, fresh, images[:2], card)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk can be any of them
            raise UserError(f"cannot write {path}: {first_line(error)}; {ELSEWHERE}") from error
        del opened, weights, model
        _release_memory()  # it holds one side at a time
        difference, scale = _difference(expected, kind.open(fresh, returns)(images))
        _agree(difference, scale, f"{source} and what was written as {to}")
    _say(f"written  {path} ({_size(path) / 1e6:.1f} MB{', ' if kind.note else ''}{kind.note})")
    _say(f"checked  {path} as {to} against the source: largest difference {difference:.1e} of {scale:.2g}")
    if given.push_to_hub:
        push(path, given.push_to_hub, public=given.public)
    return Conversion(path, difference, source_difference, scale)


def push(folder: Path, name: str, *, public: bool = False) -> str:
    """Upload a folder to the Hugging Face hub as the model OWNER/NAME, made if missing; return its address.

    Raises:
        UserError: if the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        hub = HfApi()
        hub.create_repo(name, private=not public, exist_ok=True)
        address = str(hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Add weights"))
    except (OSError, ValueError, HTTPError) as error:  # the hub's own errors, and what lies below: no connection
        raise UserError(
            f"cannot upload to {name} ({first_line(error)}); {folder} is written; log in with hf auth login"
        ) from error
    _say(f"uploaded {address}")
    return address


def _release_memory() -> None:
    """Give freed memory back to the system: glibc would keep it, in pieces too small for what comes next."""
    gc.collect()
    with suppress(OSError, AttributeError):  # other systems' libraries do so by themselves
        ctypes.CDLL(None).malloc_trim(0)


def _check_destination(path: Path, to: Kind, overwrite: bool) -> None:
    suffix = DESTINATIONS[to].suffix
    if suffix and path.suffix != suffix:
        raise UserError(f"--to {to} writes a file; give a destination that ends in {suffix}")
    if path.is_file() if not suffix else path.is_dir():
        kinds = ("file", "folder") if not suffix else ("folder", "file")
        raise UserError(f"{path} is a {kinds[0]}, and --to {to} writes a {kinds[1]}; give another destination")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; add --overwrite, or give another destination")
    if path.is_dir() and (entries := list(path.iterdir())):
        names = {entry.name for entry in entries}
        if not {"config.json", "model.safetensors"} <= names or any(entry.is_dir() for entry in entries):
            raise UserError(
                f"{path} is not a model's folder, and --overwrite would delete it; give another destination"
            )


def _check_form(opened: Weights | AutoencoderWeights, source: str, **given: int | list[int] | None) -> None:
    """Raise UserError about an option that the source did not need, and that says something else than it."""
    if isinstance(opened, AutoencoderWeights):
        model = _meta(opened)
        form = {
            "heads": model.encoder.blocks[0].attn.num_heads, "decoder_heads": model.shape.heads,
            "taps": list(model.method.taps),
        }  # fmt: skip
    else:
        form = {"heads": opened.arguments["num_heads"]}
    for name, value in given.items():
        if value is not None and name not in form:
            raise UserError(f"--{name} {value} is of decoders, and only the encoder is converted here; leave it out")
        if value is not None and value != form[name]:
            raise UserError(f"--{name} {value} is not what {source} says, {form[name]}; leave it out")


def _check_upload(name: str | None, public: bool, to: Kind) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if name is None:
        if public:
            raise UserError("--public belongs to --push_to_hub; give OWNER/NAME there, or leave it out")
        return
    if DESTINATIONS[to].suffix:
        folders = ", ".join(each for each, kind in DESTINATIONS.items() if not kind.suffix)
        raise UserError(f"--push_to_hub uploads a folder; give --to {folders}")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub '{name}' is no name on the hub; give OWNER/NAME") from error


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """Yield a path of the same name in a folder beside; what is there when the block ends well takes its place."""
    folder = path.with_name(f".unfinished-{path.name}")
    previous = folder / ".previous"
    try:
        with writing(path, ELSEWHERE):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        yield folder / path.name
        with writing(path, ELSEWHERE):
            parts = list(folder.iterdir())  # a large ONNX has two
            if path.exists():
                os.replace(path, previous)
            try:
                for part in parts:
                    os.replace(part, path.with_name(part.name))
            except OSError:
                if previous.exists():
                    os.replace(previous, path)
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@torch.no_grad()
def _official_outputs(path: Path, weights: Weights | AutoencoderWeights, images: Tensor) -> Outputs | None:
    """Run an official checkpoint's own tensors, without our models; None if `path` is none."""
    if path.suffix in PADDLE and path.is_file():
        tensors: Mapping[str, Tensor] = read_checkpoint(path)
    elif path.suffix in PYTORCH and path.is_file():
        tensors = load_pytorch(path)
    else:
        return None
    if isinstance(weights, Weights):
        reference = Reference(tensors, weights.arguments["num_heads"], transposed=path.suffix in PADDLE)
        return [reference.classify(images)]
    model = _meta(weights)
    reference = Reference(tensors, model.encoder.blocks[0].attn.num_heads, transposed=path.suffix in PADDLE)
    visible, _ = split(mask_noise(images, len(model.positions)), 0.75)
    if model.method.name == "mae":
        return reference.mae(images, visible, model.shape.heads)
    return reference.mirl(images, visible, model.shape.heads, model.method.taps)


def _difference(a: Outputs, b: Outputs) -> tuple[float, float]:
    """Return the largest absolute difference, and the largest absolute number of `a`."""
    pairs = zip(a, b, strict=True)
    return max(float((x - y).abs().max()) for x, y in pairs), max(float(x.abs().max()) for x in a)


def _agree(difference: float, scale: float, what: str) -> None:
    if not difference <= TOLERANCE * scale:
        raise UserError(
            f"{what} differ by {difference:.1e} in outputs of up to {scale:.2g}; nothing is written; please report it"
        )


def _folded(weights: Weights | AutoencoderWeights) -> Weights | AutoencoderWeights:
    if isinstance(weights, Weights) or not weights.settings.get("weight_norm"):
        raise UserError("there are no weight-normalised predictions to fold; leave out --fold_weight_norm")
    model = build_autoencoder(weights)
    for decoder in model.decoders:
        remove_parametrizations(decoder.predict, "weight")  # type: ignore[arg-type]
    return AutoencoderWeights(weights.settings | {"weight_norm": False}, model.state_dict())


def _describe(weights: Weights | AutoencoderWeights) -> str:
    encoder = encoder_of(weights) if isinstance(weights, AutoencoderWeights) else weights
    (height, width), patch = encoder.image_size, encoder.patch_size
    count = sum(value.numel() for value in weights.state.values()) / 1e6
    parts = [f"{encoder.name}, {height}x{width} px, patches of {patch[0]}x{patch[1]}"]
    if isinstance(weights, AutoencoderWeights):
        model = _meta(weights)
        taps = ", ".join(map(str, model.method.taps))
        parts.append(f"{plural(len(model.decoders), 'decoder')} of {model.method.name} after blocks {taps}")
    elif weights.classes:
        parts.append(f"{plural(len(weights.classes), 'class', 'es')}")
    return ", ".join([*parts, f"{count:.1f} M numbers"])


def _meta(weights: AutoencoderWeights) -> Autoencoder:
    """Build the autoencoder without memory for its weights, to read its form."""
    with torch.device("meta"):
        return autoencoder_of(Resolved(**weights.settings))


def _input_shape(weights: Weights | AutoencoderWeights) -> tuple[int, int, int]:
    encoder = encoder_of(weights) if isinstance(weights, AutoencoderWeights) else weights
    return encoder.channels, *encoder.image_size


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir())
    parts = (path, path.with_name(f"{path.name}.data"))  # the second: a large ONNX's tensors
    return sum(part.stat().st_size for part in parts if part.exists())


def _say(line: str) -> None:
    console.print(line, markup=False)
