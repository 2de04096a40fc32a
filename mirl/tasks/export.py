"""What a finished run leaves: an encoder that timm opens, the autoencoder, and lines that say how to use them."""

import json
import shutil
from pathlib import Path

from timm.models import VisionTransformer, save_for_hf

from mirl.data.transforms import channel_statistics
from mirl.models.autoencoder import Autoencoder, without_features
from mirl.models.encoder import ARCHITECTURE, parse_model, timm_arguments
from mirl.models.patches import Size
from mirl.models.weights import Weights
from mirl.tasks.card import model_card
from mirl.tasks.settings.pretraining import Resolved
from mirl.training.checkpoints import save_tensors
from mirl.training.files import atomic
from mirl.training.runs import RunFolder


def export(model: Autoencoder, settings: Resolved, run: RunFolder) -> None:
    """Write `encoder/`, which timm opens, and `autoencoder.safetensors`, which holds the decoders too."""
    encoder, channels = model.encoder, settings.channels
    heads = encoder.blocks[0].attn.num_heads
    arguments = timm_arguments(
        encoder.embed_dim, heads, len(encoder.blocks), model.image_size, model.patch_size, channels
    )  # fmt: skip
    depth = parse_model(settings.model)[2]
    weights = Weights(
        ARCHITECTURE, arguments, encoder.state_dict(), *channel_statistics(channels),
        full_depth=depth if depth > len(encoder.blocks) else None,
    )  # fmt: skip
    _replace(run, encoder, weights)
    state = {name: value.contiguous().cpu() for name, value in without_features(model.state_dict()).items()}
    with atomic(run.autoencoder) as temporary:
        save_tensors(state, temporary, mirl=json.dumps(settings.saved()))


def export_classifier(
    model: VisionTransformer, weights: Weights, classes: tuple[str, ...], image_size: Size, run: RunFolder
) -> None:
    """Write a fine-tuned classifier to `encoder/`, which timm opens, with the names of its classes."""
    arguments = weights.arguments | {
        "depth": len(model.blocks), "img_size": list(image_size), "patch_size": list(model.patch_embed.patch_size),
        "num_classes": len(classes), "global_pool": model.global_pool, "fc_norm": model.global_pool == "avg",
    }  # fmt: skip
    trained = Weights(
        weights.architecture, arguments, model.state_dict(), weights.mean, weights.deviation, tuple(classes)
    )
    _replace(run, model, trained)


def _replace(run: RunFolder, model: VisionTransformer, weights: Weights) -> None:
    fresh = run.encoder.with_name("encoder.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    write_encoder(model, weights, fresh, model_card(weights, run.path, "timm"))
    shutil.rmtree(run.encoder, ignore_errors=True)
    fresh.rename(run.encoder)


def write_encoder(model: VisionTransformer, weights: Weights, folder: Path, card: str) -> None:
    """Write `model`, built from `weights`, as a folder that timm and transformers open; `card` is its README.md."""
    arguments = {name: value for name, value in weights.arguments.items() if name != "num_classes"}
    model.pretrained_cfg = weights.pretrained_cfg(model)
    save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
    # For transformers, which passes num_classes itself, and looks for the names of classes at the top.
    config = json.loads((folder / "config.json").read_text())
    config["model_args"].pop("num_classes", None)
    config |= {"label_names": list(weights.classes)} if weights.classes else {}
    config |= {"full_depth": weights.full_depth} if weights.full_depth else {}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "README.md").write_text(card)
    shutil.copymode(folder / "README.md", folder / "model.safetensors")  # else its owner's alone


def how_to_classify(run: RunFolder, image_size: Size, channels: int, classes: int) -> str:
    """Return lines that a user can paste."""
    return f"""
done: {run.path} · results.json has the accuracy of each class, pictures/ shows examples

    import timm, torch
    classifier = timm.create_model("local-dir:{run.encoder}", pretrained=True).eval()
    images = torch.zeros(1, {channels}, {image_size[0]}, {image_size[1]})   # normalised as its config.json says
    scores = classifier(images)   # [1, {classes}], in the order of label_names in config.json

    mirl evaluate --weights {run.path} --data OTHER_FOLDER
"""


def how_to_use(run: RunFolder, settings: Resolved) -> str:
    """Return lines that a user can paste."""
    height, width = settings.image_size
    features = parse_model(settings.model)[0]
    return f"""
done: {run.path} · pictures/ shows what was learned, checkpoints/ can be resumed

    import timm, torch
    encoder = timm.create_model("local-dir:{run.encoder}", pretrained=True).eval()
    images = torch.zeros(1, {settings.channels}, {height}, {width})   # normalised as its config.json says
    features = encoder(images)   # [1, {features}], the mean over patches
"""
