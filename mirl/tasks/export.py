"""What a finished run leaves: an encoder that timm opens, the autoencoder, and lines that say how to use them."""

import json
import shutil

from safetensors.torch import save_file
from timm.models import save_for_hf

from mirl.data.transforms import channel_statistics
from mirl.models.autoencoder import Autoencoder
from mirl.models.encoder import parse_model, timm_arguments
from mirl.tasks.settings import Resolved, ResolvedRun
from mirl.training.checkpoints import atomic
from mirl.training.runs import RunFolder


def export(model: Autoencoder, settings: Resolved, saved: ResolvedRun, run: RunFolder) -> None:
    """Write `encoder/`, which timm opens, and `autoencoder.safetensors`, which holds the decoders too."""
    encoder, channels = model.encoder, settings.channels
    mean, deviation = channel_statistics(channels)
    encoder.pretrained_cfg = {
        "architecture": "vit_base_patch16_224", "input_size": (channels, *model.image_size), "fixed_input_size": True,
        "mean": mean, "std": deviation, "interpolation": "bicubic", "crop_pct": 1.0, "num_classes": 0,
        "first_conv": "patch_embed.proj", "classifier": "head",
    }  # fmt: skip
    arguments = timm_arguments(
        encoder.embed_dim,
        encoder.blocks[0].attn.num_heads,
        len(encoder.blocks),
        model.image_size,
        model.patch_size,
        channels,
    )
    fresh = run.encoder.with_name("encoder.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    save_for_hf(encoder, str(fresh), model_args=arguments, safe_serialization=True)
    shutil.rmtree(run.encoder, ignore_errors=True)
    fresh.rename(run.encoder)
    state = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
    with atomic(run.autoencoder) as temporary:
        save_file(state, temporary, metadata={"format": "pt", "mirl": json.dumps(saved.saved())})


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
