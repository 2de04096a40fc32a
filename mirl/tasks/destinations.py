"""Formats that weights can be written to: how each is written, and how it is opened again and run."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from mirl.errors import UserError
from mirl.formats import graphs, huggingface
from mirl.models.autoencoder import Autoencoder
from mirl.models.masking import split
from mirl.models.patches import gather, patchify
from mirl.models.weights import AutoencoderWeights, Weights
from mirl.tasks.export import write_encoder
from mirl.tasks.weight_files import about
from mirl.tasks.weights import build_autoencoder, encoder_of, open_checkpoint
from mirl.training.checkpoints import save_tensors

Outputs = list[Tensor]
Run = Callable[[Tensor], Outputs]
Returns = Literal["scores", "cls", "mean", "predictions"]


@dataclass(frozen=True)
class Destination:
    """A format.

    Attributes:
        write: writes weights, with the model that is built of them, to a path; some trace the model on example images
            [b, c, h, w], some keep a model card.
        open: opens what was written and returns what runs it on images; told what the model returns.
        suffix: what the file's name must end in; empty for a folder.
        decoders: whether it holds an autoencoder, not its encoder alone.
        note: what else a user should know of what was written.
    """

    write: Callable[[Weights | AutoencoderWeights, nn.Module, Path, Tensor, str], None]
    open: Callable[[Path, Returns], Run]
    suffix: str = ""
    decoders: bool = False
    note: str = ""


def model_of(weights: Weights | AutoencoderWeights) -> nn.Module:
    """Build the model of these weights, whose memory it shares."""
    return build_autoencoder(weights) if isinstance(weights, AutoencoderWeights) else weights.share()


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Outputs:
    """Return features or scores [b, d], or every decoder's predictions [b, n, p] of all patches in their order."""
    if not isinstance(model, Autoencoder):
        return [model(images)]
    patches = patchify(images, model.patch_size)
    visible, masked = split(mask_noise(images, patches.shape[1]), 0.75)
    places = torch.cat([visible, masked], dim=1).argsort(dim=1)
    return [gather(prediction, places) for prediction in model(patches, visible, masked, all_patches=True)]


def mask_noise(images: Tensor, patches: int) -> Tensor:
    """Return the noise [b, n] that orders patches for masking, the same for both sides."""
    return torch.rand(len(images), patches, generator=torch.Generator().manual_seed(1))


def returns_of(model: nn.Module) -> Returns:
    """Tell what `outputs` of a model are."""
    if isinstance(model, Autoencoder):
        return "predictions"
    if model.num_classes:
        return "scores"
    return "cls" if model.global_pool == "token" else "mean"


def _write_timm(weights: Weights | AutoencoderWeights, model: nn.Module, path: Path, _: Tensor, card: str) -> None:
    assert isinstance(model, VisionTransformer) and isinstance(weights, Weights)
    write_encoder(model, weights, path, card)


def _write_safetensors(weights: Weights | AutoencoderWeights, _: nn.Module, path: Path, *__: Any) -> None:
    save_tensors(weights.state, path, mirl=json.dumps(about(weights)))


def _write_onnx(weights: Weights | AutoencoderWeights, model: nn.Module, path: Path, example: Tensor, _: str) -> None:
    output = "scores" if isinstance(weights, Weights) and weights.classes else "features"
    graphs.write_onnx(model, path, example, [output], about(weights))


def _write_exported(
    weights: Weights | AutoencoderWeights, model: nn.Module, path: Path, example: Tensor, _: str
) -> None:
    graphs.write_exported(model, path, example, about(weights))


def _write_hugging_face(
    weights: Weights | AutoencoderWeights, model: nn.Module, folder: Path, _: Tensor, card: str
) -> None:
    if isinstance(weights, AutoencoderWeights):
        assert isinstance(model, Autoencoder)
        config, tensors = huggingface.to_vit_mae(model, weights.state, weights.settings)
        seen = encoder_of(weights)
    else:
        config, tensors = huggingface.to_vit(weights)
        seen = weights
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "resample": 3, "do_rescale": True,
        "size": dict(zip(("height", "width"), seen.image_size, strict=True)), "do_normalize": True,
        "image_mean": list(seen.mean), "image_std": list(seen.deviation),
    }  # fmt: skip
    folder.mkdir()
    save_tensors({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    for name, content in (("config.json", config), ("preprocessor_config.json", processor)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "README.md").write_text(card)


def _open_timm(path: Path, _: Returns) -> Run:
    model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    return lambda images: outputs(model, images)


def _open_ours(path: Path, _: Returns) -> Run:
    model = model_of(open_checkpoint(str(path)))
    return lambda images: outputs(model, images)


def _open_hugging_face(path: Path, returns: Returns) -> Run:
    if returns == "scores":
        model = _from_pretrained("ViTForImageClassification", path)
        return lambda images: [_quiet(model, images).logits]
    model = _from_pretrained("ViTModel", path, add_pooling_layer=False)
    # A ViTModel returns every token; the encoder pools them.
    pool = (lambda tokens: tokens[:, 0]) if returns == "cls" else (lambda tokens: tokens[:, 1:].mean(dim=1))
    return lambda images: [pool(_quiet(model, images).last_hidden_state)]


def _open_vit_mae(path: Path, _: Returns) -> Run:
    model = _from_pretrained("ViTMAEForPreTraining", path)

    def run(images: Tensor) -> Outputs:
        noise = mask_noise(images, model.vit.embeddings.patch_embeddings.num_patches)
        return [_quiet(model, images, noise=noise).logits]

    return run


def _listed(run: Callable[[Tensor], Tensor]) -> Run:
    return lambda images: [run(images).detach()]


def _from_pretrained(kind: str, path: Path, **options: Any) -> Any:
    """Open a folder with a class of transformers, without its progress bars."""
    try:
        import transformers
    except ImportError as error:
        raise UserError("Hugging Face's models need transformers: pip install 'mirl[export]'") from error
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        return getattr(transformers, kind).from_pretrained(path, **options)
    finally:
        if shown:
            bars.enable_progress_bar()


@torch.no_grad()
def _quiet(model: Any, images: Tensor, **options: Any) -> Any:
    return model.eval()(images, **options)


DESTINATIONS: dict[str, Destination] = {
    "timm": Destination(_write_timm, _open_timm),
    "huggingface": Destination(_write_hugging_face, _open_hugging_face),
    "huggingface_mae": Destination(_write_hugging_face, _open_vit_mae, decoders=True),
    "safetensors": Destination(_write_safetensors, _open_ours, ".safetensors", decoders=True),
    "onnx": Destination(
        _write_onnx, lambda path, _: _listed(graphs.run_onnx(path)), ".onnx", note=f"opset {graphs.OPSET}"
    ),
    "torch_export": Destination(_write_exported, lambda path, _: _listed(graphs.run_exported(path)), ".pt2"),
}
