"""Masks as run lengths are COCO's own; what is none is refused before COCO's tools see it."""

import numpy as np
import pytest

from mirl.data.run_lengths import Malformed, area, compress, decode, encode_mask

oracle = pytest.importorskip("pycocotools.mask")
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of pycocotools

HEIGHT, WIDTH = 37, 53


def masks():
    """Noise, blobs, columns, rows, single pixels, all and nothing."""
    rng = np.random.default_rng(0)
    for share in (0.5, 0.02, 0.98):
        yield (rng.random((HEIGHT, WIDTH)) < share).astype(np.uint8)
    for top, bottom, left, right in (
        (3, 20, 5, 50),
        (0, HEIGHT, 7, 8),
        (9, 10, 0, WIDTH),
        (0, 1, 0, 1),
        (36, 37, 52, 53),
    ):
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[top:bottom, left:right] = 1
        yield mask
    yield np.ones((HEIGHT, WIDTH), np.uint8)
    yield np.zeros((HEIGHT, WIDTH), np.uint8)
    yield np.indices((HEIGHT, WIDTH)).sum(0).astype(np.uint8) % 2


def runs(mask):
    """Return uncompressed counts, in plain Python."""
    counts, value = [0], 0
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


def polygons(seed):
    rng = np.random.default_rng(seed)
    return [rng.uniform(-5, 60, 2 * rng.integers(3, 12)).round(2).tolist() for _ in range(rng.integers(1, 4))]


@pytest.mark.parametrize("mask", list(masks()))
def test_run_lengths_are_cocos(mask):
    expected = oracle.encode(np.asfortranarray(mask))["counts"].decode()
    assert encode_mask(mask) == {"size": [HEIGHT, WIDTH], "counts": expected}
    for counts in (expected, runs(mask)):
        found = compress({"size": [HEIGHT, WIDTH], "counts": counts}, HEIGHT, WIDTH)
        assert found == (expected, not mask.any())
    assert np.array_equal(decode([expected], HEIGHT, WIDTH)[0], mask)
    assert area(expected, HEIGHT, WIDTH) == mask.sum()


def test_masks_of_several_sizes_and_none():
    every = list(masks())
    decoded = decode([encode_mask(mask)["counts"] for mask in every], HEIGHT, WIDTH)
    assert np.array_equal(decoded, np.stack(every)) and decoded.is_contiguous()
    assert decode([], HEIGHT, WIDTH).shape == (0, HEIGHT, WIDTH)
    large = np.zeros((3000, 4000), np.uint8)
    large[10:2900, 5:3990] = 1
    assert np.array_equal(decode([encode_mask(large)["counts"]], 3000, 4000)[0], large)


@pytest.mark.parametrize("seed", range(20))
def test_polygons_are_rasterised_as_coco_does(seed):
    given = polygons(seed)
    expected = oracle.merge(oracle.frPyObjects(given, HEIGHT, WIDTH))
    counts, empty = compress(given, HEIGHT, WIDTH)
    assert counts == expected["counts"].decode()
    assert empty == (oracle.area(expected) == 0)


def test_polygons_of_too_few_points_are_left_out():
    triangle = [3, 3, 20, 3, 3, 20.5]
    assert compress([triangle, [1, 1, 30, 30], [5], []], HEIGHT, WIDTH) == compress([triangle], HEIGHT, WIDTH)
    assert compress([[3, 3, 3.1, 3, 3, 3.1]], HEIGHT, WIDTH)[1]  # without a pixel
    assert compress([[60, 3, 70, 3, 70, 30]], HEIGHT, WIDTH)[1]  # beside the image


@pytest.mark.parametrize("nothing", [None, [], {}, ""])
def test_no_segmentation(nothing):
    with pytest.raises(Malformed, match="no segmentation"):
        compress(nothing, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    "segmentation",
    [
        "text", 5, [[]], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5]], [1, 2, 3, 4, 5, 6], [["1", 2, 3, 4, 5, 6]],
        [[float("nan"), 2, 3, 4, 5, 6]], [[1, 2, 3, float("nan"), 5, 6]], [[1, 2, 3, 4, 5, float("inf")]],
        [[0, 0, 1e9, 0, 0, 1e9]], [[0, 0, 10**400, 0, 0, 5]], [[0, 0, True, 0, 0, 5]], [None],
    ],
)  # fmt: skip
def test_malformed_polygons(segmentation):
    with pytest.raises(Malformed, match="segmentation malformed"):
        compress(segmentation, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    "counts",
    [
        None, 5, [], "", [HEIGHT * WIDTH + 1], [HEIGHT * WIDTH - 1], [-1, HEIGHT * WIDTH + 1], ["5"], [True], [1.0],
        [2**63, HEIGHT * WIDTH, 2**63], [10**400], "é", "\x00", "p" * 20, "0" * 10, "~", "PPPPPPPPPPPP0", " ",
    ],
)  # fmt: skip
def test_malformed_counts(counts):
    with pytest.raises(Malformed):
        compress({"size": [HEIGHT, WIDTH], "counts": counts}, HEIGHT, WIDTH)


def test_counts_of_another_size():
    good = encode_mask(next(masks()))
    for size in ([WIDTH, HEIGHT], [HEIGHT], None, "37x53"):
        with pytest.raises(Malformed):
            compress(dict(good, size=size), HEIGHT, WIDTH)
    with pytest.raises(Malformed):
        compress({"size": [HEIGHT, WIDTH]}, HEIGHT, WIDTH)


def test_corrupted_counts_are_refused_or_a_mask():
    good = encode_mask(next(masks()))["counts"]
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(500):
        letters = list(good)
        for place in rng.integers(len(letters), size=rng.integers(1, 4)):
            letters[place] = chr(rng.integers(40, 120))
        corrupted = {"size": [HEIGHT, WIDTH], "counts": "".join(letters)}
        try:
            counts, _ = compress(corrupted, HEIGHT, WIDTH)
        except Malformed:
            outcomes.add("refused")
            continue
        outcomes.add("mask")
        assert np.array_equal(decode([counts], HEIGHT, WIDTH)[0], oracle.decode(corrupted))
    assert "refused" in outcomes
