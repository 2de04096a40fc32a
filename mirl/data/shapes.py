"""Built-in images: one textured shape of ten classes, partly hidden, on a textured background.

Every image is drawn when it is read and is a function of (seed, split, index) alone, so it is the same in any order,
process or thread. Colour, texture, size, place and rotation do not depend on the class: only the outline tells it.
Lengths are in units of the image's short side, so an index shows the same scene at any square size.
Symbols: h, w image height and width; x [1, w] or [h, w] and y [h, 1] or [h, w] coordinates, origin at the centre.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Field = NDArray[np.floating]  # float32 wherever it has a value per pixel

SPLITS = ("train", "val")
MIN_SIZE = 16

OCCLUDED_IMAGES = 0.3  # fraction of all images
HIDDEN = (0.05, 0.20)  # fraction of an occluded shape's pixels
RADIUS = (0.30, 0.44)
PERIOD = (0.3, 0.6)
# A pattern is multiplied by its sharpness and cut at +-1: about 1 is soft, 2 is crisp.
SHARPNESS = (0.9, 2.2)
# OKLab lightness of background, shape and occluder, in random order: any two of them contrast.
LIGHTNESS = (0.34, 0.60, 0.86)


def _radius(u: Field, v: Field) -> Field:
    # np.hypot guards against overflow and is four times slower.
    return np.sqrt(u * u + v * v)


def _star(u: Field, v: Field) -> Field:
    """Return the depth inside a five-pointed star: two reflections fold the plane into half of one point."""
    u = np.abs(u)
    for sign in (1, -1):
        normal_u, normal_v = sign * math.cos(math.pi / 5), -math.sin(math.pi / 5)
        beyond = 2 * np.maximum(normal_u * u + normal_v * v, 0)
        u, v = u - beyond * normal_u, v - beyond * normal_v
    return 0.45 - 0.9 * np.abs(u) - 0.43 * v


def _flower(u: Field, v: Field) -> Field:
    """Return the depth inside six petals, |cos(3a)| long at angle a; the cubic gives it without a slow arctan2."""
    radius = _radius(u, v) + 1e-6
    cosine = u * (u * u - 3 * v * v) / (radius * radius * radius)
    return 0.48 + 0.46 * np.abs(cosine) - radius


def _cross(u: Field, v: Field) -> Field:
    u, v = np.abs(u), np.abs(v)
    return np.minimum(0.32 - np.minimum(u, v), 0.95 - np.maximum(u, v))


# How deep a point lies inside the outline, negative outside; all lengths in units of the shape's radius.
OUTLINES: dict[str, Callable[[Field, Field], Field]] = {
    "disk": lambda u, v: 0.85 - _radius(u, v),
    "square": lambda u, v: 0.75 - np.maximum(np.abs(u), np.abs(v)),
    "triangle": lambda u, v: 0.52 - np.maximum(-v, 0.866 * np.abs(u) + 0.5 * v),
    "star": _star,
    "cross": _cross,
    "ring": lambda u, v: 0.22 - np.abs(_radius(u, v) - 0.75),
    "half_disk": lambda u, v: np.minimum(1 - _radius(u, v + 0.45), v + 0.45),
    "crescent": lambda u, v: np.minimum(1 - _radius(u, v), _radius(u - 0.5, v) - 0.78),
    "flower": _flower,
    "hourglass": lambda u, v: np.minimum(0.8 - np.abs(v), 0.7 * np.abs(v) - 0.8 * np.abs(u) + 0.09),
}
CLASSES: tuple[str, ...] = tuple(OUTLINES)

# Patterns of coordinates in radians; about -1 to 1.
TEXTURES: tuple[Callable[[Field, Field], Field], ...] = (
    lambda u, v: np.sin(u),
    lambda u, v: np.sin(0.7 * u) * np.sin(0.7 * v) * 1.5,
    lambda u, v: np.sin(u) + np.sin(v) - 0.6,
    lambda u, v: np.sin(u + 1.3 * np.sin(0.6 * v)),
    lambda u, v: np.sin(0.15 * u),
)


@dataclass(frozen=True)
class ShapesSample:
    """One image with everything that is known about it.

    Attributes:
        image: uint8 [h, w, 3].
        label: index into `CLASSES`.
        masks: bool [instances, h, w], the visible pixels of each instance; there is one instance.
        boxes: float32 [instances, 4], x0, y0, x1, y1 in pixels around the visible pixels, x1 and y1 exclusive.
        semantic: uint8 [h, w], 0 background (the occluder too), 1 + label where the shape is visible.
    """

    image: NDArray[np.uint8]
    label: int
    masks: NDArray[np.bool_]
    boxes: NDArray[np.float32]
    semantic: NDArray[np.uint8]


class Shapes:
    """A data set of `count` generated images with labels, masks, boxes and semantic maps.

    Classes are balanced: each run of ten consecutive indices from a multiple of ten holds every class once.

    Args:
        count: number of images.
        size: height and width in pixels, or one number for both.
        seed: a different seed is a different data set.
        split: "train" or "val"; they share no image.

    Raises:
        ValueError: if an argument is outside its range.
    """

    classes = CLASSES

    def __init__(self, count: int = 10_000, *, size: int | tuple[int, int] = 64, seed: int = 0, split: str = "train"):
        height, width = (size, size) if isinstance(size, int) else size
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not known; choose one of {', '.join(SPLITS)}")
        if count < 1:
            raise ValueError(f"count {count} is too small; give 1 or more")
        if min(height, width) < MIN_SIZE:
            raise ValueError(f"size {height}x{width} is too small; give {MIN_SIZE} pixels or more a side")
        if seed < 0:
            raise ValueError(f"seed {seed} is negative; give 0 or more")
        self.count, self.size, self.seed, self.split = count, (height, width), seed, split
        short = min(height, width)
        self._x = ((np.arange(width, dtype=np.float32) + 0.5 - width / 2) / short)[None, :]
        self._y = ((np.arange(height, dtype=np.float32) + 0.5 - height / 2) / short)[:, None]
        blocks = np.tile(np.arange(len(CLASSES), dtype=np.uint8), (math.ceil(count / len(CLASSES)), 1))
        self._labels = self._generator().permuted(blocks, axis=1).reshape(-1)[:count]

    def __len__(self) -> int:
        return self.count

    def name_of(self, index: int) -> str:
        """Return a name such as `shapes/train/000123`."""
        return f"shapes/{self.split}/{self._checked(index):06d}"

    def label_of(self, index: int) -> int:
        """Return the index into `classes`, without drawing the image."""
        return int(self._labels[self._checked(index)])

    def read(self, index: int) -> torch.Tensor:
        """Return the image alone, uint8 [3, h, w]."""
        image, _ = self._draw(index)
        return torch.from_numpy(image)

    def sample(self, index: int) -> ShapesSample:
        """Return the image with its label, mask, box and semantic map."""
        image, visibility = self._draw(index)
        label = self.label_of(index)
        mask = visibility > 0.5
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = np.array([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]], dtype=np.float32)
        semantic = mask * np.uint8(1 + label)
        return ShapesSample(np.ascontiguousarray(image.transpose(1, 2, 0)), label, mask[None], box, semantic)

    def _checked(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(f"index {index} is out of range; this split has images 0 to {self.count - 1}")
        return index

    def _generator(self, *key: int) -> np.random.Generator:
        # A spawn key, unlike a longer seed, keeps (split,) and (split, 0) apart.
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(SPLITS.index(self.split), *key)))

    def _draw(self, index: int) -> tuple[NDArray[np.uint8], Field]:
        """Return the image [3, h, w] and how much of each pixel is visible shape [h, w], from 0 to 1."""
        outline = OUTLINES[self.classes[self.label_of(index)]]
        rng = self._generator(index)
        x, y = self._x, self._y

        radius = rng.uniform(*RADIUS)
        # At most a corner of the shape leaves the picture.
        height, width = self.size
        short = min(height, width)
        centre_x = (width / short / 2 - radius) * rng.uniform(-1, 1)
        centre_y = (height / short / 2 - radius) * rng.uniform(-1, 1)
        u, v = _rotate((x - centre_x) / radius, (y - centre_y) / radius, rng.uniform(0, math.tau))
        radius_px = radius * short
        depth = outline(u, v) * radius_px
        shape = _coverage(depth)
        front = np.zeros_like(shape)
        if rng.random() < OCCLUDED_IMAGES:
            front = _occluder(rng, u, v, depth > 0, radius_px)

        # Pixels are linear in the colours: each region adds weight x base + weight x texture x swing.
        visibility = shape * (1 - front)
        weights = np.stack([1 - front - visibility, visibility, front])
        textures = np.stack([_texture(rng, x, y) for _ in weights])
        image = np.einsum("kc,khw->chw", _colours(rng), np.concatenate([weights, weights * textures]))
        return image.astype(np.uint8), visibility


def _rotate(x: Field, y: Field, angle: float) -> tuple[Field, Field]:
    """Return the coordinates [h, w] of points x [1, w], y [h, 1] along axes turned by `angle`."""
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def _coverage(depth: Field) -> Field:
    """Return the covered part of pixels whose centres lie `depth` pixels inside an edge: one pixel of soft edge."""
    return np.clip(depth + 0.5, 0, 1)


def _occluder(rng: np.random.Generator, u: Field, v: Field, shape: NDArray[np.bool_], radius_px: float) -> Field:
    """Return the coverage [h, w] of a bar or a disk that hides a random fraction of the `shape`'s pixels.

    Its width is a quantile of those pixels' nearness to its centre, so the fraction holds for any outline.
    """
    du, dv = _rotate(u, v, rng.uniform(0, math.tau))
    if rng.random() < 0.5:
        nearness = -np.abs(du - rng.uniform(0.0, 0.9))
    else:
        nearness = -_radius(du - rng.uniform(0.7, 1.2), dv)
    inside = nearness[shape]
    kept = int(inside.size * (1 - rng.uniform(*HIDDEN)))
    return _coverage((nearness - np.partition(inside, kept)[kept]) * radius_px)


def _texture(rng: np.random.Generator, x: Field, y: Field) -> Field:
    """Return a random pattern [h, w] from -1 to 1: stripes, checks, dots, waves or a smooth ramp."""
    kind = TEXTURES[rng.integers(len(TEXTURES))]
    frequency = math.tau / rng.uniform(*PERIOD)
    # A random origin is the phase; it is added to rows and columns before they make a full grid.
    u, v = _rotate(x * frequency + rng.uniform(0, 99), y * frequency + rng.uniform(0, 99), rng.uniform(0, math.tau))
    return np.clip(kind(u, v) * rng.uniform(*SHARPNESS), -1, 1)


# Signs of a texture's darkest and lightest colour; thirds of a turn between the regions' hues.
ENDS = np.array([-1.0, 1.0])
THIRDS = math.tau / 3 * np.arange(3)[:, None]

# Bjoern Ottosson, "A perceptual color space for image processing", 2020.
LAB_TO_LMS = np.array([[1, 0.3963, 0.2158], [1, -0.1056, -0.0639], [1, -0.0895, -1.2915]])
LMS_TO_RGB = np.array([[4.0767, -3.3077, 0.2310], [-1.2684, 2.6098, -0.3413], [-0.0042, -0.7034, 1.7076]])


def _colours(rng: np.random.Generator) -> Field:
    """Return colours [6, 3] in 0 to 255: three regions' bases, then their swings; a texture spans base +- swing."""
    shift, contrast, turn, chroma = rng.random((4, 3, 1))
    lightness = rng.permutation(LIGHTNESS)[:, None] + 0.06 * (shift - 0.5) + (0.01 + 0.02 * contrast) * ENDS
    hue = math.tau * rng.random() + THIRDS + 0.8 * (turn - 0.5) + 0.2 * (contrast - 0.5) * ENDS
    colours = 255 * _oklch_to_srgb(lightness, 0.06 + 0.10 * chroma, hue)
    low, high = colours[..., 0], colours[..., 1]
    return np.concatenate([high + low, high - low]) / 2


def _oklch_to_srgb(lightness: Field, chroma: Field, hue: Field) -> Field:
    """Return sRGB in 0 to 1, [regions, 3, ends], of OKLCH colours [regions, ends]; beyond the gamut it is clipped."""
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=1)
    lms = LAB_TO_LMS @ lab
    linear = np.clip(LMS_TO_RGB @ (lms * lms * lms), 0, 1)
    # A pure power is within a shade of sRGB's own curve.
    return (linear ** (1 / 2.2)).astype(np.float32)
