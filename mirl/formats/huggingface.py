"""Hugging Face's ViT and ViTMAE: names and configurations, both ways.

Files have the names that the hub's own checkpoints have; every version of transformers reads them.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from mirl.errors import UserError
from mirl.formats.renaming import Names, affine, join, split
from mirl.models.autoencoder import Autoencoder
from mirl.models.decoder import NORM_EPS
from mirl.models.encoder import ARCHITECTURE, model_name, timm_arguments
from mirl.models.patches import Size, grid_size, pair, sincos_positions
from mirl.models.weights import AutoencoderWeights, Weights

BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
DECODER_BLOCK = {
    "norm_self": "layernorm_before",
    "norm_mlp": "layernorm_after",
    "self_attention.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
LARGEST_EPS = 1e-5  # of layer norms; what is smaller, as 1e-12 on the hub, makes no difference
Tensors = dict[str, Tensor]


def encoder_names(depth: int, *, prefix: str = "", classifier: bool = False) -> Names:
    """Map timm's names of a ViT to Hugging Face's."""
    names: dict[str, tuple[str, ...]] = {
        "cls_token": (f"{prefix}embeddings.cls_token",),
        "pos_embed": (f"{prefix}embeddings.position_embeddings",),
    }
    modules = {"patch_embed.proj": f"{prefix}embeddings.patch_embeddings.projection", "norm": f"{prefix}layernorm"}
    if classifier:
        modules["head"] = "classifier"
    for b in range(depth):
        theirs = f"{prefix}encoder.layer.{b}"
        modules |= {f"blocks.{b}.{a}": f"{theirs}.{c}" for a, c in BLOCK.items()}
        names |= _parts(f"blocks.{b}.attn.qkv", f"{theirs}.attention.attention", "query", "key", "value")
    return names | affine(modules)


def decoder_names(depth: int) -> Names:
    """Map our names of a single decoder to those of ViTMAE's."""
    names: dict[str, tuple[str, ...]] = {"mask_token": ("decoder.mask_token",)}
    modules = {
        "embed": "decoder.decoder_embed", "norm": "decoder.decoder_norm", "predict": "decoder.decoder_pred",
    }  # fmt: skip
    for b in range(depth):
        theirs = f"decoder.decoder_layers.{b}"
        modules |= {f"blocks.{b}.{a}": f"{theirs}.{c}" for a, c in DECODER_BLOCK.items()}
        names |= _parts(f"blocks.{b}.self_attention.q", f"{theirs}.attention.attention", "query")
        names |= _parts(f"blocks.{b}.self_attention.kv", f"{theirs}.attention.attention", "key", "value")
    return names | affine(modules)


def _parts(ours: str, attention: str, *parts: str) -> dict[str, tuple[str, ...]]:
    return {f"{ours}.{kind}": tuple(f"{attention}.{part}.{kind}" for part in parts) for kind in ("weight", "bias")}


def to_vit(weights: Weights) -> tuple[dict[str, Any], Tensors]:
    """Return config and tensors of a `ViTModel`, or of a `ViTForImageClassification` for a classifier.

    Raises:
        UserError: if the model is not of ViT's form, or classifies from the mean over patches.
    """
    arguments, classes = weights.arguments, len(weights.classes)
    hidden = len(weights.state["blocks.0.mlp.fc1.bias"])
    if hidden != 4 * arguments["embed_dim"]:
        raise UserError(f"the model's MLP is {hidden} wide, not 4 times its width; give --to timm")
    if classes and arguments.get("global_pool") != "token":
        raise UserError(
            "ViTForImageClassification reads the class token, and this classifier the mean over patches: open its "
            "encoder/ with transformers.AutoModelForImageClassification, or fine-tune with --pool cls"
        )
    names = encoder_names(weights.depth, prefix="vit." if classes else "", classifier=bool(classes))
    check_plain(weights.state, weights.depth, classifier=bool(classes))
    labels = {str(i): name for i, name in enumerate(weights.classes)}
    config = {
        "architectures": ["ViTForImageClassification" if classes else "ViTModel"],
        **_vit_config("vit", arguments["embed_dim"], arguments["num_heads"], weights.depth),
        **_input_config(weights.image_size, weights.patch_size, weights.channels),
        **({"id2label": labels, "label2id": {name: int(i) for i, name in labels.items()}} if classes else {}),
    }
    return config, split(dict(weights.state), names)


def check_plain(state: Tensors, depth: int, *, classifier: bool = False) -> None:
    """Raise UserError if `state` is not exactly a plain ViT's: no scales of layers, registers or gates."""
    wanted = set(encoder_names(depth, classifier=classifier))
    for problem, names in (("has", state.keys() - wanted), ("lacks", wanted - state.keys())):
        if names:
            raise UserError(f"the model {problem} '{min(names)}', unlike a plain ViT; timm opens it")


def from_vit(
    config: dict[str, Any], tensors: Tensors, mean: tuple[float, ...], deviation: tuple[float, ...]
) -> Weights:
    """Return the weights of a `ViTModel` or `ViTForImageClassification`; its pooler is left out."""
    labels = config.get("id2label") or {}
    classifier = "classifier.weight" in tensors
    prefix = "vit." if any(name.startswith("vit.") for name in tensors) else ""
    depth = config["num_hidden_layers"]
    _check_form(config)
    arguments = timm_arguments(
        config["hidden_size"], config["num_attention_heads"], depth, pair(config.get("image_size", 224)),
        pair(config.get("patch_size", 16)), config.get("num_channels", 3),
    )  # fmt: skip
    state = join(tensors, encoder_names(depth, prefix=prefix, classifier=classifier))
    _check_left(tensors, f"{prefix}encoder.")
    classes: tuple[str, ...] = ()
    if classifier:
        classes = tuple(str(labels.get(str(i), i)) for i in range(len(state["head.bias"])))
        arguments |= {"num_classes": len(classes), "global_pool": "token"}
    return Weights(ARCHITECTURE, arguments, state, mean, deviation, classes)


def to_vit_mae(model: Autoencoder, state: Tensors, settings: dict[str, Any]) -> tuple[dict[str, Any], Tensors]:
    """Return config and tensors of a `ViTMAEForPreTraining`.

    Args:
        model: what the weights belong to, on any device; its form is read.
        state: the weights; settings: those of the run, whose target and mask ratio are kept.

    Raises:
        UserError: if the autoencoder is not MAE's: one decoder after the last block, without cross-attention.
    """
    encoder, shape = model.encoder, model.shape
    if model.method.name != "mae" or shape.weight_norm:
        raise UserError(
            f"ViTMAEForPreTraining holds what --method mae trains, and these weights are of {model.method.name}"
            f"{' with weight-normalised predictions' if shape.weight_norm else ''}; give --to huggingface"
        )
    grid = grid_size(model.image_size, model.patch_size)
    if grid[0] != grid[1]:
        raise UserError(
            f"ViTMAEForPreTraining takes square grids of patches, and this model's is {grid[0]}x{grid[1]}; "
            "give --to safetensors, or --to huggingface for its encoder"
        )
    parts = (
        ("encoder.", encoder_names(len(encoder.blocks), prefix="vit.")),
        ("decoders.0.", decoder_names(shape.depth)),
    )
    tensors: Tensors = {}
    for prefix, names in parts:
        tensors |= split({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, names)
    tensors["decoder.decoder_pos_embed"] = _decoder_positions(shape.width, model.image_size, model.patch_size)
    heads = encoder.blocks[0].attn.num_heads
    config = {
        "architectures": ["ViTMAEForPreTraining"],
        **_vit_config("vit_mae", encoder.embed_dim, heads, len(encoder.blocks)),
        **_input_config(model.image_size, model.patch_size, encoder.patch_embed.proj.in_channels),
        "decoder_hidden_size": shape.width,
        "decoder_num_hidden_layers": shape.depth,
        "decoder_num_attention_heads": shape.heads,
        "decoder_intermediate_size": 4 * shape.width,
        "mask_ratio": settings.get("mask_ratio", 0.75),
        "norm_pix_loss": settings.get("target", "normalised") == "normalised",
    }
    return config, tensors


def from_vit_mae(config: dict[str, Any], tensors: Tensors) -> AutoencoderWeights:
    """Return the weights of a `ViTMAEForPreTraining`.

    Raises:
        UserError: if its form is not MAE's, or its decoder has other positions than MAE's.
    """
    _check_form(config)
    depth, width = config["num_hidden_layers"], config["decoder_hidden_size"]
    decoder_depth = config["decoder_num_hidden_layers"]
    image_size, patch_size = pair(config.get("image_size", 224)), pair(config.get("patch_size", 16))
    # transformers 5 saves these layers under another name than the hub's files have.
    tensors = {name.replace("decoder_encoder.layer.", "decoder_layers."): value for name, value in tensors.items()}
    positions = tensors.pop("decoder.decoder_pos_embed", None)
    expected = _decoder_positions(width, image_size, patch_size)
    if positions is not None and (positions.shape != expected.shape or (positions - expected).abs().max() > 1e-4):
        raise UserError(
            "its decoder's positions are not MAE's (transformers' own have rows and columns the other way round); "
            "save its encoder alone, as a ViTModel"
        )
    encoder = join(tensors, encoder_names(depth, prefix="vit."))
    decoder = join(tensors, decoder_names(decoder_depth))
    _check_left(tensors, "vit.encoder.", "decoder.")
    state = {f"encoder.{k}": v for k, v in encoder.items()} | {f"decoders.0.{k}": v for k, v in decoder.items()}
    settings = {
        "model": model_name(config["hidden_size"], config["num_attention_heads"], depth),
        "method": "mae",
        "image_size": list(image_size),
        "patch_size": list(patch_size),
        "channels": config.get("num_channels", 3),
        "decoder_width": width,
        "decoder_depth": decoder_depth,
        "decoder_heads": config["decoder_num_attention_heads"],
        "target": "normalised" if config.get("norm_pix_loss", False) else "raw",
        "mask_ratio": config.get("mask_ratio", 0.75),
    }
    return AutoencoderWeights(settings, state)


def _decoder_positions(width: int, image_size: Size, patch_size: Size) -> Tensor:
    return F.pad(sincos_positions(width, grid_size(image_size, patch_size)), (0, 0, 1, 0))[None]


def _vit_config(model_type: str, width: int, heads: int, depth: int) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "hidden_act": "gelu",
        "layer_norm_eps": NORM_EPS,
        "qkv_bias": True,
    }


def _input_config(image_size: Size, patch_size: Size, channels: int) -> dict[str, Any]:
    """Sizes as one number where both sides agree, which is what most readers expect."""
    sizes = {"image_size": image_size, "patch_size": patch_size}
    return {
        **{name: size[0] if size[0] == size[1] else list(size) for name, size in sizes.items()},
        "num_channels": channels,
    }


def _check_form(config: dict[str, Any]) -> None:
    width = config["hidden_size"]
    wanted = {"intermediate_size": 4 * width, "hidden_act": "gelu", "qkv_bias": True}
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise UserError(f"its {name} is {config[name]}; here it is {value}")
    if config.get("layer_norm_eps", NORM_EPS) > LARGEST_EPS:
        raise UserError(f"its layer_norm_eps is {config['layer_norm_eps']}; here it is {NORM_EPS}")


def _check_left(tensors: Tensors, *prefixes: str) -> None:
    if left := [name for name in tensors if name.startswith(prefixes)]:
        raise UserError(f"the checkpoint's '{min(left)}' (and {len(left) - 1} more) has no place in this model")
