"""Options of `mirl pretrain`, the choices made for those that are not given, and what they describe."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mirl.errors import UserError
from mirl.methods import (
    SEGMENTED,
    Context,
    DIDBlocks,
    DIDMemory,
    Method,
    MethodName,
    Separation,
    Target,
    mae,
    truncated_mae,
)
from mirl.tasks.options import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    Precision,
    Ranges,
    ResolvedRun,
    RunOptions,
    built_in,
    default_folder,
    resolve_run,
)

if TYPE_CHECKING:  # help and mistyped options need no PyTorch
    from mirl.models.autoencoder import Autoencoder
    from mirl.models.decoder import DecoderShape

PAPER_BATCH, PAPER_EPOCHS, PAPER_WARMUP, PAPER_LR = 4096, 300, 40, 1.5e-4

# Largest shorter side of an image (median over a sample) -> (image size, patch size).
SIZES = ((48, 32, 4), (96, 64, 8), (176, 128, 16), (float("inf"), 224, 16))

SMALL_PEAK = 5e-4  # smallest default peak rate: in proportion, batches under 850 images would hardly learn


@dataclass(frozen=True)
class _Pretraining:
    data: str = "shapes"
    """images: a folder (nested or flat, no labels), a glob, a text file of paths, tar shards, an address of shards,
    hf:NAME, hf:FOLDER, `shapes`, or a torchvision name (docs/pretraining.md)"""
    download: bool = False
    """let torchvision or the hub fetch a data set given by name"""

    weights: str | None = None
    """start from these: run folder, official checkpoint of MIRL or MAE, timm name, Hugging Face folder or file"""
    resume_from: str | None = None
    """extend this run to a larger --epochs, in another --out: begins where its rate was about to decay; options that
    are not given are that run's"""
    model: str | None = None
    """vit_{ti,s,b,l}_DEPTH or vit_WIDTHxHEADS_DEPTH, e.g. vit_s_54; by default that of --weights, else vit_s_54 on a
    GPU with 50,000 images or more, else vit_ti_12"""
    method: MethodName = "mirl"
    """masked image residual learning, the plain masked autoencoder, or what the paper compares them with
    (docs/methods.md)"""
    segments: int | None = None
    """equal segments of the encoder, for most methods an even number; by default 4 for 24 blocks, 6 for 48 and 54, else
    2 (the paper's, but for its ViT-L: 2)"""
    taps: list[int] | None = None
    """block counts after which decoders read, e.g. [4,12], for segments of unequal length; for truncated_mae the
    blocks that are trained"""
    context: Context = "dense"
    """what decoders of segments may cross-attend: all earlier segments (DID), the one before, or nothing"""
    image_size: int | tuple[int, int] | None = None
    """pixels, one number or [height,width]; by default from the images: 32, 64, 128 or 224"""
    patch_size: int | tuple[int, int] | None = None
    """pixels, one number or [height,width]; by default 4, 8 or 16 for 32, 64 or larger images"""
    channels: int = 3
    """1 grey, 3 RGB, 4 RGBA, any other number for .npy arrays"""
    decoder_width: int | None = None
    """by default the encoder's width, at most 512"""
    decoder_depth: int | None = None
    """blocks of each decoder; by default 2, or 4 for a single decoder (equal cost, the paper's Fig. 3)"""
    decoder_heads: int | None = None
    """by default one per 32 of decoder width"""
    did_blocks: DIDBlocks = "first"
    """decoder blocks with cross-attention: first (the paper) or all (the official code)"""
    did_memory: DIDMemory = "raw"
    """cross-attention reads the encoder's tokens (the paper) or decoder-width ones (the official code)"""
    weight_norm: bool = False
    """weight-normalised prediction layers (the official code)"""

    target: Target = "normalised"
    """predict pixels normalised within each patch, or raw"""
    separation: Separation = "gaussian"
    """what parts coarse from fine: a Gaussian, or the paper's Laplacian of Gaussian taken literally"""
    separation_sigma: float = 2.0
    """pixels; of the Gaussian"""
    feature: str | None = None
    """also predict a teacher's tokens: ema (an average of the encoder), or a trained ViT, named as for --weights"""
    feature_weight: float = 1.0
    """of that objective beside the pixels'; it grows to this during the warm-up"""
    vgg: str | None = None
    """also compare features of a VGG16, whose weights are in this file (torchvision's vgg16-397923af.pth)"""
    vgg_weight: float = 0.1
    """of that objective beside the pixels'"""
    extra_share: float = 0.5
    """share of each batch that --feature and --vgg look at; their expected gradient stays the same"""
    mask_ratio: float = 0.75
    """share of patches that is masked"""
    min_crop: float = 0.2
    """smallest share of an image's area that a random crop keeps"""
    flip: bool = True
    """mirror half of the images"""
    epochs: int | None = None
    """passes over the data; by default 300 from 100,000 images on (the paper), 800 for fewer, 5 for `shapes`"""
    base_lr: float | None = None
    """learning rate per 256 images of batch; by default 1.5e-4 (the paper), more if the peak would be under 5e-4"""
    warmup_epochs: float | None = None
    """linear warm-up; by default 40 of 300 epochs, in proportion"""
    schedule: Literal["step", "cosine"] = "step"
    """step: x0.1 at 90 % and at 95 % (the paper); cosine: to zero (the official code)"""

    compile: bool | None = None
    """compile the repeated blocks, which takes about a minute once; by default on a GPU for runs of an hour or more"""
    checkpointing: bool = False
    """compute blocks again in the backward pass: a third slower, for much less memory"""

    block_figures: bool = True
    """at every evaluation, effective rank and token similarity of every block: pictures/blocks.png"""
    labelled: str | None = None
    """class folders or `shapes`, on which every block is also read out (linear, k-NN); by default `shapes` on itself"""


# A dataclass lists its last base's fields first, and help should begin with what is learned.
@dataclass(frozen=True)
class Pretraining(RunOptions, _Pretraining):
    """Options of `mirl pretrain`. What is None is chosen from the data and the machine, and printed."""

    def ranges(self) -> Ranges:
        """Return what is allowed for numbers of pre-training."""
        return super().ranges() | {
            "mask_ratio": (lambda x: 0 < x < 1, "more than 0 and less than 1"),
            "min_crop": (lambda x: 0 < x <= 1, "more than 0 and at most 1"),
            "base_lr": POSITIVE, "warmup_epochs": NOT_NEGATIVE, "epochs": COUNT, "channels": COUNT,
            "decoder_width": COUNT, "decoder_depth": COUNT, "decoder_heads": COUNT,
            "separation_sigma": POSITIVE, "feature_weight": POSITIVE, "vgg_weight": POSITIVE,
            "extra_share": (lambda x: 0 < x <= 1, "more than 0 and at most 1"),
        }  # fmt: skip

    @property
    def run_folder(self) -> Path:
        """Where the run goes: --out, or beside the run that it extends, or runs/ and the name of the data."""
        if self.resume_from and not self.out:
            origin = Path(self.resume_from).expanduser()
            return origin.with_name(f"{origin.name}_{self.epochs}_epochs")
        return Path(self.out) if self.out else default_folder(self.data, "pretrain")


@dataclass(frozen=True)
class Resolved(ResolvedRun, Pretraining):
    """Options of pre-training, of which every choice is made."""

    model: str = ""
    image_size: tuple[int, int] = (0, 0)
    patch_size: tuple[int, int] = (0, 0)
    base_lr: float = PAPER_LR
    warmup_epochs: float = 0

    @property
    def peak_rate(self) -> float:
        """The learning rate after warm-up: `base_lr` for 256 images, in proportion to the batch."""
        return self.base_lr * self.batch_size / 256


def resolve(
    given: Pretraining, *, images: int, shorter_side: float, gpu: bool, devices: int, precision: Precision
) -> Resolved:
    """Choose what was not given.

    Args:
        given: the options.
        images: training images; shorter_side: median pixels of a sample's shorter sides.
        gpu: whether there is one; devices: processes of the whole run; precision: the device's best.

    Raises:
        UserError: if the batch is larger than the data or cannot be shared by the devices.
    """
    from mirl.models.patches import pair

    size, patch = next((size, patch) for limit, size, patch in SIZES if shorter_side <= limit)
    if given.image_size is not None:
        patch = default_patch(given.image_size)
    epochs = given.epochs or (5 if built_in(given.data) else PAPER_EPOCHS if images >= 100_000 else 800)
    run = resolve_run(
        given, images=images, most=PAPER_BATCH, epochs=epochs, gpu=gpu, devices=devices, precision=precision
    )
    choices = {
        "out": str(given.run_folder),
        "model": given.model or ("vit_s_54" if gpu and images >= 50_000 else "vit_ti_12"),
        "image_size": pair(size if given.image_size is None else given.image_size),
        "patch_size": pair(patch if given.patch_size is None else given.patch_size),
        "warmup_epochs": epochs * PAPER_WARMUP / PAPER_EPOCHS if given.warmup_epochs is None else given.warmup_epochs,
        "base_lr": given.base_lr or max(PAPER_LR, SMALL_PEAK * 256 / run["batch_size"]),
    }
    return Resolved(**dataclasses.asdict(given) | run | choices)


def default_patch(image_size: int | Sequence[int]) -> int:
    """Return the patch size that goes with an image size: 4 to 48 px, 8 to 96 px, else 16."""
    from mirl.models.patches import pair

    side = min(pair(image_size))
    return 4 if side <= 48 else 8 if side <= 96 else 16


def autoencoder_of(settings: Resolved, *, features: int = 0) -> "Autoencoder":
    """Build the autoencoder that the settings describe, with fresh weights.

    Its decoders also predict `features` values of a teacher, whom only a run that trains has.
    """
    from mirl.models.autoencoder import build_autoencoder
    from mirl.models.patches import pair

    method = method_of(settings)
    shape = dataclasses.replace(decoder_shape(settings, method), features=features)
    return build_autoencoder(
        settings.model, method, shape, image_size=pair(settings.image_size),
        patch_size=pair(settings.patch_size), channels=settings.channels,
    )  # fmt: skip


def method_of(settings: Resolved) -> Method:
    """Build the method that the settings name."""
    from mirl.models.encoder import parse_model

    depth = parse_model(settings.model)[2]
    if settings.method in SEGMENTED:
        return SEGMENTED[settings.method](depth, settings.segments, taps=settings.taps, context=settings.context)
    if settings.segments not in (None, 1) or (settings.taps and settings.method == "mae"):
        given = "--segments and --taps" if settings.method == "mae" else "--segments"
        raise UserError(f"{settings.method} has one decoder, after its last block; leave out {given}")
    if settings.method == "mae":
        return mae(depth)
    blocks = settings.taps or []
    return truncated_mae(depth, blocks[0] if len(blocks) == 1 else 0)


def decoder_shape(settings: Resolved, method: Method) -> "DecoderShape":
    """Choose the decoders' form: the encoder's width (at most 512), 2 blocks (4 for a single decoder), 32 a head."""
    from mirl.models.decoder import DecoderShape
    from mirl.models.encoder import parse_model

    width = settings.decoder_width or min(512, parse_model(settings.model)[0])
    heads = settings.decoder_heads or max(1, width // 32)
    if width % heads or width % 4:
        raise UserError(
            f"--decoder_width {width} with --decoder_heads {heads}: give a width that 4 and the heads divide"
        )
    depth = settings.decoder_depth or (2 if len(method.taps) > 1 else 4)
    return DecoderShape(width, depth, heads, settings.did_blocks, settings.did_memory, settings.weight_norm)


def idle_options(settings: Resolved, method: Method) -> list[str]:
    """Say which options were given that nothing reads, and what they would need."""
    readers = {
        "several segments": (settings.method in SEGMENTED, ("context",)),
        "cross-attention": (method.context != "none", ("did_blocks", "did_memory")),
        "coarse and fine targets": (method.separates, ("separation", "separation_sigma")),
        "--feature": (settings.feature, ("feature_weight",)),
        "--vgg": (settings.vgg, ("vgg_weight",)),
        "--feature or --vgg": (settings.feature or settings.vgg, ("extra_share",)),
        "--block_figures": (settings.block_figures, ("labelled",)),
    }
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    return [
        f"--{name} has no effect without {reader}"
        for reader, (there, names) in readers.items()
        for name in names
        if not there and getattr(settings, name) != defaults[name]
    ]
