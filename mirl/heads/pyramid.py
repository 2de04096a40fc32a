"""Feature pyramids on a plain ViT of any depth, for heads that need maps of several scales.

A ViT has one scale, that of its patches. `ViTPyramid` reads four depths and scales each (BEiT, CAE), `SimplePyramid`
scales the last map alone (ViTDet). Symbols: b images, c channels, h and w pixels, p pixels of a patch's side, d the
encoder's width.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from timm.layers import LayerNorm2d, Mlp
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from mirl.errors import UserError
from mirl.models.encoder import check_sizes
from mirl.models.patches import Size, grid_size
from mirl.models.weights import State, Weights

SHARES = ((1, 3), (1, 2), (2, 3), (1, 1))  # of the depth, after which the pyramid reads; BEiT's and CAE's


def pyramid_taps(depth: int) -> tuple[int, int, int, int]:
    """Return after how many blocks a pyramid reads, e.g. 12 -> (4, 6, 8, 12); a shallow encoder repeats some.

    The last is the whole depth, because blocks after it would get no gradient.
    """
    first, second, third, last = (max(1, depth * part // whole) for part, whole in SHARES)
    return first, second, third, last


class _Pyramid(nn.Module):
    """What pyramids share: an encoder whose maps [b, d, h / p, w / p] become four maps of strides p/4, p/2, p, 2p.

    Args:
        encoder: from `build_plain` or `build_windowed`.
        taps: numbers of finished blocks after which it is read.

    Raises:
        UserError: if a patch has no quarter.
    """

    channels: list[int]

    def __init__(self, encoder: nn.Module, taps: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder, self.taps = encoder, taps
        self.patch_size = _quartered(encoder.patch_embed.patch_size)  # type: ignore[union-attr, arg-type]

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """Pixels from one position to the next in each map."""
        p = self.patch_size
        return p // 4, p // 2, p, 2 * p

    def read(self, images: Tensor) -> list[Tensor]:
        """Run the encoder on `images` [b, c, h, w], whose sides must be multiples of 2p; return the map of each tap."""
        assert not (images.shape[-2] % (2 * self.patch_size) or images.shape[-1] % (2 * self.patch_size)), images.shape
        blocks = sorted({tap - 1 for tap in self.taps})  # a map is returned once however often it is asked for
        maps = self.encoder.forward_intermediates(images, indices=blocks, intermediates_only=True)  # type: ignore[operator]
        return [maps[blocks.index(tap - 1)] for tap in self.taps]


class ViTPyramid(_Pyramid):
    """Maps of four depths, the shallowest at the finest scale: [b, d, h / stride, w / stride] each.

    Differs from BEiT and CAE in the norm: each position's own, where they take SyncBatchNorm's. A process has one or
    two large images, and a norm without statistics needs no synchronisation and is the same in evaluation.
    """

    def __init__(self, encoder: nn.Module, taps: tuple[int, int, int, int] | None = None) -> None:
        super().__init__(encoder, taps or pyramid_taps(len(encoder.blocks)))  # type: ignore[arg-type]
        width = int(encoder.embed_dim)  # type: ignore[arg-type]
        self.channels = [width] * 4
        self.scales = nn.ModuleList([
            nn.Sequential(_double(width), LayerNorm2d(width), nn.GELU(), _double(width)),
            _double(width),
            nn.Identity(),
            nn.MaxPool2d(2),
        ])  # fmt: skip

    def forward(self, images: Tensor) -> list[Tensor]:
        return [scale(tokens) for scale, tokens in zip(self.scales, self.read(images), strict=True)]


class SimplePyramid(_Pyramid):
    """The last map at four scales: [b, width, h / stride, w / stride] each. Paper: Li et al. 2022 (ViTDet), Sec. 3."""

    def __init__(self, encoder: nn.Module, width: int = 256) -> None:
        super().__init__(encoder, (len(encoder.blocks),))  # type: ignore[arg-type]
        d = int(encoder.embed_dim)  # type: ignore[arg-type]
        self.channels = [width] * 4
        self.scales = nn.ModuleList([
            nn.Sequential(
                _double(d, d // 2), LayerNorm2d(d // 2), nn.GELU(), _double(d // 2, d // 4), *_mix(d // 4, width)
            ),
            nn.Sequential(_double(d, d // 2), *_mix(d // 2, width)),
            nn.Sequential(*_mix(d, width)),
            nn.Sequential(nn.MaxPool2d(2), *_mix(d, width)),
        ])  # fmt: skip

    def forward(self, images: Tensor) -> list[Tensor]:
        (tokens,) = self.read(images)
        return [scale(tokens) for scale in self.scales]


def build_plain(
    weights: Weights,
    *,
    image_size: Size | None = None,
    patch_size: Size | None = None,
    drop_path: float = 0.0,
    checkpointing: bool = False,
    **changes: Any,
) -> VisionTransformer:
    """Build an encoder with attention among all patches, for images of any size: timm's ViT without final norm.

    Args:
        image_size: (height, width) whose positions it keeps, from which those of other sizes are resampled; None: that
            of training.
        drop_path: rate of the last block, falling linearly to 0 at the first.
        checkpointing: compute blocks again in the backward pass, for memory.
        changes: others of `Weights.build`: `depth`, `trained`, `seed`.

    Raises:
        UserError: if patches do not tile the image, or have no quarter.
    """
    patch_size = patch_size or weights.patch_size
    if image_size is None:  # as many patches as in training, so that positions stay what they are
        rows, columns = grid_size(weights.image_size, weights.patch_size)
        image_size = rows * patch_size[0], columns * patch_size[1]
    _quartered(patch_size)
    check_sizes(image_size, patch_size)
    encoder = weights.build(
        img_size=image_size, patch_size=patch_size, drop_path_rate=drop_path, num_classes=0, global_pool="",
        final_norm=False, dynamic_img_size=True, **changes,
    )  # fmt: skip
    encoder.set_grad_checkpointing(checkpointing)
    return encoder


def build_windowed(
    weights: Weights,
    *,
    image_size: Size,
    window: int = 14,
    drop_path: float = 0.0,
    checkpointing: bool = False,
    **changes: Any,
) -> VisionTransformerSAM:
    """Build an encoder with attention within windows, but for four blocks, and relative positions, zero at first.

    The last block of each quarter has attention among all patches. Patches outside the image, which complete windows,
    are zeros that others attend to, as in ViTDet. There is no class token.

    Args:
        image_size: (height, width) of the images it is for; window: patches of a window's side.
        changes: others of `build_plain`. The others are those of `build_plain`.

    Raises:
        UserError: as `build_plain`; or if the weights are not of a plain ViT.
    """
    plain = build_plain(weights, image_size=image_size, drop_path=drop_path, **changes)
    plain_only = PlainOnly("windows need", "use --protocol coco_1x")
    depth, block = len(plain.blocks), plain.blocks[0]
    plain_only.check_blocks(plain)
    state = {name: value for name, value in plain.state_dict().items() if name not in ("cls_token", "reg_token")}
    encoder = VisionTransformerSAM(
        img_size=image_size, patch_size=plain.patch_embed.patch_size, in_chans=weights.channels, num_classes=0,
        global_pool="", embed_dim=plain.embed_dim, depth=depth, num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / plain.embed_dim, qkv_bias=block.attn.qkv.bias is not None,
        init_values=1.0 if "blocks.0.ls1.gamma" in state else None, drop_path_rate=drop_path,
        norm_layer=partial(nn.LayerNorm, eps=block.norm1.eps), act_layer=type(block.mlp.act), neck_chans=0,
        use_rel_pos=True, window_size=window, global_attn_indexes=global_blocks(depth),
    )  # fmt: skip
    encoder.neck = nn.Identity()  # a final norm, which no pyramid reads
    state["pos_embed"] = _positions(plain)
    plain_only.load(state, encoder, fresh=".rel_pos_")
    encoder.set_grad_checkpointing(checkpointing)
    return encoder.eval()


def global_blocks(depth: int) -> tuple[int, ...]:
    """Return the last block of each quarter, counted from 0, e.g. 12 -> (2, 5, 8, 11)."""
    return tuple(sorted({depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)} - {-1}))


def unfuse(model: nn.Module) -> None:
    """Let `model` compute attention in single steps: ONNX has no translation of the windowed encoder's fused form."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]


@dataclass(frozen=True)
class PlainOnly:
    """Takes weights of a plain ViT alone.

    Attributes:
        needs, remedy: beginning and end of the error for others, e.g. "windows need", "use --protocol coco_1x".
    """

    needs: str
    remedy: str

    def check_blocks(self, encoder: VisionTransformer) -> None:
        """Raise UserError if blocks are not those of the plain ViT, whose names others may share."""
        block = encoder.blocks[0]
        for part, expected in ((block, Block), (getattr(block, "mlp", None), Mlp)):
            if type(part) is not expected:
                raise self._error(f"their {type(part).__name__}")

    def load(self, state: State, encoder: nn.Module, fresh: str) -> None:
        """Load `state` into `encoder`, which may have tensors of its own where `fresh` is in their names.

        Raises:
            UserError: if other names or shapes differ.
        """
        given, own = ({name: value.shape for name, value in each.items()} for each in (state, encoder.state_dict()))
        for name in given | own:
            if given.get(name) != own.get(name) and fresh not in name:
                raise self._error(name)
        encoder.load_state_dict(state, strict=False)

    def _error(self, difference: str) -> UserError:
        return UserError(f"{self.needs} a plain ViT, but the weights differ in {difference}; {self.remedy}")


def _positions(plain: VisionTransformer) -> Tensor:
    """Return the positions of patches [1, rows, columns, d], without the class token's."""
    rows, columns = plain.patch_embed.grid_size
    return plain.pos_embed.detach()[:, -rows * columns :].reshape(1, rows, columns, -1)


def _quartered(patch_size: Size) -> int:
    """Return the side of a patch, whose quarter is the finest stride."""
    height, width = patch_size
    if height != width or height % 4:
        raise UserError(
            f"patches of {height}x{width} have no square quarters for a pyramid; give --patch_size 16, to which the "
            "patch embedding is resampled"
        )
    return height


def _double(width: int, narrower: int | None = None) -> nn.Module:
    return nn.ConvTranspose2d(width, narrower or width, kernel_size=2, stride=2)


def _mix(channels: int, width: int) -> list[nn.Module]:
    """Return a pointwise and a 3x3 convolution, each normalised, to `width` channels."""
    return [
        nn.Conv2d(channels, width, 1, bias=False), LayerNorm2d(width),
        nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width),
    ]  # fmt: skip
