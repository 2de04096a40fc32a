"""`mirl pretrain --weights`: pre-training that starts from trained weights, also those of a shallower model."""

from mirl.data.transforms import channel_statistics
from mirl.errors import UserError, plural
from mirl.models.autoencoder import Autoencoder, without_features
from mirl.models.patches import grid_size
from mirl.models.weights import AutoencoderWeights, Weights
from mirl.tasks.settings.pretraining import Pretraining
from mirl.tasks.weights import encoder_of, open_checkpoint
from mirl.training.checkpoints import saved_steps

HEAD = ("head.", "fc_norm.")  # what a classifier has beyond an encoder


def open_start(settings: Pretraining) -> Weights | AutoencoderWeights | None:
    """Open the weights to start from; None if there are none, or the run goes on from a checkpoint of its own."""
    begun = settings.resume_from or (settings.resume and saved_steps(settings.run_folder / "checkpoints"))
    if not settings.weights or begun:
        return None
    return open_checkpoint(settings.weights, say=lambda _: None, decoders=True)


def start_from(weights: Weights | AutoencoderWeights, model: Autoencoder, channels: int) -> list[str]:
    """Copy trained weights into `model`, and say what was taken, resampled and left fresh.

    Blocks beyond those of the weights keep their first values; positions and patch embedding are resampled to the sizes
    of `model`; decoders are taken where they have the same form.

    Raises:
        UserError: if width, heads or channels differ, or the weights have layers that a plain ViT has not.
    """
    encoder, own = encoder_of(weights) if isinstance(weights, AutoencoderWeights) else weights, model.encoder
    width, heads = encoder.arguments["embed_dim"], encoder.arguments["num_heads"]
    if (width, heads) != (own.embed_dim, own.blocks[0].attn.num_heads):
        raise UserError(
            f"--weights are of width {width} with {heads} heads, --model of {own.embed_dim} with "
            f"{own.blocks[0].attn.num_heads}; give --model vit_{width}x{heads}_DEPTH"
        )
    if encoder.channels != channels:
        raise UserError(f"--weights are of {encoder.channels} channels; give --channels {encoder.channels}, or others")
    depth, trained = len(own.blocks), min(encoder.depth, len(own.blocks))
    forms = {name: value.shape for name, value in own.state_dict().items()}
    left_out = (*HEAD, *(f"blocks.{b}." for b in range(depth, encoder.depth)))
    taken = {name for name in encoder.state if not name.startswith(left_out)}
    if foreign := sorted(taken - forms.keys()):
        raise UserError(f"--weights have '{foreign[0]}', which a plain ViT has not; give others")
    if not {"cls_token", "pos_embed"} <= taken:
        raise UserError("--weights have no class token or no absolute positions, which pre-training needs; give others")
    state = {name: value for name, value in encoder.resampled(own).items() if name in taken}
    if foreign := sorted(name for name, value in state.items() if value.shape != forms[name]):
        name = foreign[0]
        raise UserError(
            f"--weights have a '{name}' of shape {list(state[name].shape)}, and a plain ViT of {list(forms[name])}; "
            "give others"
        )
    missing = own.load_state_dict(state, strict=False).missing_keys
    lines = [f"{encoder.name}: the first {trained} of {depth} blocks are trained"]
    if depth > trained:
        lines[0] += f", blocks {trained + 1} to {depth} are fresh"
    if encoder.depth > depth:
        lines[0] += f"; its last {encoder.depth - depth} are left out"
    fresh = tuple(f"blocks.{b}." for b in range(trained, depth))
    if lacking := [name for name in missing if not name.startswith((*fresh, "pos_embed"))]:
        lines.append(f"fresh, because the weights lack them: {', '.join(lacking)}")
    if encoder.patch_size != model.patch_size:
        lines.append(f"patch embedding resampled from {encoder.patch_size} to {model.patch_size}")
    if grid_size(encoder.image_size, encoder.patch_size) != grid_size(model.image_size, model.patch_size):
        lines.append("positions resampled to another number of patches")
    if tuple(encoder.mean) != tuple(channel_statistics(channels)[0]):
        lines.append(f"images are normalised otherwise than those it was trained on (mean {encoder.mean})")
    if isinstance(weights, AutoencoderWeights):
        lines.append(_take_decoders(weights, model))
    return lines


def _take_decoders(weights: AutoencoderWeights, model: Autoencoder) -> str:
    theirs, ours = (
        {name: value for name, value in state.items() if not name.startswith("encoder.")}
        for state in (weights.state, without_features(model.state_dict()))
    )
    if {name: value.shape for name, value in theirs.items()} != {name: value.shape for name, value in ours.items()}:
        return "decoders are fresh: those of the weights have another form"
    model.load_state_dict(theirs, strict=False)
    fresh = "; their layers that predict features are fresh" if model.shape.features else ""
    return f"{plural(len(model.decoders), 'decoder')} trained too{fresh}"
