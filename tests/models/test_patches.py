"""Patches, positions and masks."""

import re

import pytest
import torch

from mirl.errors import UserError
from mirl.models.masking import split, visible_count
from mirl.models.patches import gather, patchify, sincos_positions, unpatchify

SIZES = [((32, 32), (4, 4), 3), ((24, 40), (8, 4), 1), ((6, 9), (2, 3), 5)]


@pytest.mark.parametrize(("image", "patch", "channels"), SIZES)
def test_unpatchify_inverts_patchify(image, patch, channels):
    images = torch.randn(2, channels, *image)
    assert torch.equal(unpatchify(patchify(images, patch), image, patch), images)


def test_patches_are_row_by_row_and_flattened_row_column_channel():
    image = torch.arange(2 * 4 * 6).view(1, 2, 4, 6)
    second = patchify(image, (2, 3))[0, 1]
    assert torch.equal(second, image[0, :, 0:2, 3:6].permute(1, 2, 0).flatten())


def test_positions_tell_columns_in_the_first_half_and_rows_in_the_second():
    positions = sincos_positions(16, (3, 5)).view(3, 5, 16)
    assert torch.equal(positions[0, :, :8], positions[2, :, :8])
    assert torch.equal(positions[:, 0, 8:], positions[:, 4, 8:])
    assert len(positions.flatten(0, 1).unique(dim=0)) == 15
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_positions(18, (2, 2))


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 0.9])
def test_a_mask_partitions_the_patches(ratio):
    visible, masked = split(torch.rand(4, 50), ratio)
    assert visible.shape[1] == {0.1: 45, 0.5: 25, 0.75: 12, 0.9: 5}[ratio]
    assert torch.equal(torch.cat([visible, masked], 1).sort().values, torch.arange(50).expand(4, -1))


def test_the_lowest_noise_stays_visible():
    visible, masked = split(torch.tensor([0.9, 0.1, 0.5, 0.2]), 0.5)
    assert visible.tolist() == [1, 3]
    assert masked.tolist() == [2, 0]


@pytest.mark.parametrize("ratio", [0.0, 0.999, 1.0])
def test_a_ratio_that_hides_all_or_nothing_is_refused(ratio):
    with pytest.raises(UserError, match="choose 0.016 to 0.984"):
        visible_count(64, ratio)


def test_the_ratios_that_a_refusal_names_are_allowed():
    for patches in (*range(2, 300), *(side * side for side in range(18, 129))):
        with pytest.raises(UserError) as refusal:
            visible_count(patches, 1.0)
        lowest, highest = re.findall(r"choose (\S+) to (\S+)", str(refusal.value))[0]
        assert visible_count(patches, float(highest)) >= 1
        assert visible_count(patches, float(lowest)) <= patches - 1
        assert patches * (1 - float(highest)) < 2  # no mask that is possible lies far outside
    with pytest.raises(UserError, match="an image of one patch leaves nothing to mask; choose a smaller --patch_size"):
        visible_count(1, 0.75)


def test_gather_picks_rows_of_each_image():
    items = torch.randn(2, 5, 3)
    picked = gather(items, torch.tensor([[4, 0], [1, 1]]))
    assert torch.equal(picked, torch.stack([items[0, [4, 0]], items[1, [1, 1]]]))
