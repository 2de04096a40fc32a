"""Regions are read where they are, and their losses are what the protocols say."""

import pytest
import torch
from torchvision.ops import generalized_box_iou_loss, roi_align

from mirl.heads.regions import AlignedRoIAlign, crop_masks

STRIDES = (4, 8, 16, 32)


def random_boxes(count: int, *, size: float = 256.0) -> torch.Tensor:
    """Boxes [count, 4] of at least 8 pixels within an image of `size`."""
    corner = torch.rand(count, 2) * (size - 40)
    return torch.cat([corner, corner + 8 + torch.rand(count, 2) * (size - corner - 8)], dim=1)


def squares(*sides: float) -> torch.Tensor:
    return torch.tensor([[3.0, 5.0, 3 + side, 5 + side] for side in sides])


def test_one_map_is_read_as_by_torchvision():
    torch.manual_seed(0)
    cells, boxes = torch.rand(2, 3, 32, 32), [random_boxes(5), random_boxes(4)]
    got = AlignedRoIAlign([8], 7)({"0": cells}, boxes, [(256, 256)] * 2)
    torch.testing.assert_close(got, roi_align(cells, boxes, 7, spatial_scale=1 / 8, aligned=True))
    assert not got.allclose(roi_align(cells, boxes, 7, spatial_scale=1 / 8), atol=1e-3)


def test_a_box_is_read_from_the_map_on_which_it_spans_14_to_28_cells():
    pool = AlignedRoIAlign(STRIDES, 7)
    assert pool.levels(squares(1, 111, 112, 223, 224, 447, 448, 9999)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    wide = torch.tensor([[0.0, 0.0, 448.0, 112.0], [0.0, 0.0, 0.0, 50.0]])  # as a square of 224; nothing
    assert pool.levels(wide).tolist() == [2, 0]
    assert AlignedRoIAlign((1, 2, 4, 8), 7).levels(squares(27, 28, 56, 112)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("strides", [STRIDES, (2, 4, 8, 16), (1, 2, 4, 8)])
def test_what_is_read_lies_where_the_box_is(strides):
    """Maps that hold the coordinates of their cells' centres give the centres of the box's parts."""
    torch.manual_seed(0)
    maps = {}
    for level, stride in enumerate(strides):
        centres = (torch.arange(512 // stride) + 0.5) * stride
        maps[str(level)] = torch.stack(torch.meshgrid(centres, centres, indexing="xy"))[None]
    maps["pool"] = torch.full((1, 2, 8, 8), torch.nan)  # is not read
    boxes = 40 + random_boxes(40, size=400)
    got = AlignedRoIAlign(strides, 7)(maps, [boxes], [(512, 512)])
    part = (torch.arange(7) + 0.5) / 7
    x, y = (boxes[:, i, None] + (boxes[:, i + 2] - boxes[:, i])[:, None] * part for i in (0, 1))
    torch.testing.assert_close(got[:, 0], x[:, None, :].expand(-1, 7, -1), atol=1e-2, rtol=0)
    torch.testing.assert_close(got[:, 1], y[:, :, None].expand(-1, -1, 7), atol=1e-2, rtol=0)


def test_the_box_losses(make_detector):
    torch.manual_seed(0)
    regions, true, offsets = random_boxes(6), random_boxes(6), torch.randn(6, 4)
    giou, offset = (make_detector(protocol).roi_heads for protocol in ("coco_1x", "vitdet"))
    boxes = giou.box_coder.decode_single(offsets, regions)
    want = 10 * generalized_box_iou_loss(boxes, true, reduction="sum")
    torch.testing.assert_close(giou.box_loss(offsets, regions, true), want)
    right = giou.box_coder.encode_single(true, regions)
    torch.testing.assert_close(offset.box_loss(offsets, regions, true), (offsets - right).abs().sum())
    for heads in (giou, offset):
        assert heads.box_loss(right, regions, true).item() == pytest.approx(0, abs=1e-3)


def test_masks_are_cropped_to_their_regions():
    masks = torch.zeros(3, 40, 40, dtype=torch.bool)
    masks[2, 10:20, 8:30] = True
    boxes = torch.tensor([[8.0, 10.0, 30.0, 20.0], [8.0, 0.0, 30.0, 20.0], [0.0, 0.0, 8.0, 40.0]])
    crops = crop_masks(masks, boxes, torch.tensor([2, 2, 2]), 28)
    assert crops.shape == (3, 28, 28) and crops.dtype == torch.float32
    assert crops[0].all() and not crops[2].any()
    assert not crops[1, :14].any() and crops[1, 14:].all()
    assert not crop_masks(masks, boxes, torch.tensor([0, 1, 0]), 28).any()
    assert crop_masks(masks, boxes[:0], torch.tensor([], dtype=torch.int64), 28).shape == (0, 28, 28)


class Fixed(torch.nn.Module):
    """Heads that say the same of every region: class 2, and for it a box shifted by a tenth and a mask of a half."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, read):
        if self.size:
            return read.new_tensor([9.0, 9, 0])[:, None, None].repeat(len(read), 1, self.size, self.size)
        scores, offsets = read.new_tensor([0.0, 0, 5]), read.new_tensor([9.0, 9, 9, 9, 9, 9, 9, 9, 1, 0, 0, 0])
        return scores.repeat(len(read), 1), offsets.repeat(len(read), 1)


@pytest.fixture
def certain(make_detector):
    """The second stage with such heads."""
    heads = make_detector("coco_1x").roi_heads
    heads.box_head = heads.mask_head = torch.nn.Identity()
    heads.box_predictor, heads.mask_predictor = Fixed(0), Fixed(28)
    return heads


BOX = torch.tensor([[10.0, 10.0, 50.0, 50.0]])
SHIFT = torch.tensor([[4.0, 0.0, 4.0, 0.0]])  # a tenth of its width
FEATURES = {str(i): torch.zeros(1, 32, 64 // s, 64 // s) for i, s in enumerate((2, 4, 8, 16))}


def test_losses_are_means_over_the_sampled_regions(certain):
    """One object and three regions, of which its own box and one other hold it."""
    certain.fg_bg_sampler.positive_fraction = 1.0
    target = {"boxes": BOX, "labels": torch.tensor([2]), "masks": torch.ones(1, 64, 64, dtype=torch.bool)}
    losses = certain.train()(FEATURES, [torch.cat([BOX, BOX + 40, BOX - 200])], [(64, 64)], [target])[1]
    scores = torch.log_softmax(torch.tensor([0.0, 0, 5]), 0)
    assert losses["box_class"].item() == pytest.approx(-(2 * scores[2] + 2 * scores[0]).item() / 4)
    giou = generalized_box_iou_loss(BOX + SHIFT, BOX).item()
    assert losses["box"].item() == pytest.approx(2 * 10 * giou / 4, rel=1e-5)
    assert losses["mask"].item() == pytest.approx(torch.tensor(2.0).log().item())


def test_what_is_found_is_of_its_own_class(certain):
    (found,), losses = certain.eval()(FEATURES, [torch.cat([BOX, BOX + 1])], [(64, 64)])
    assert losses == {}
    torch.testing.assert_close(found["boxes"], BOX + SHIFT)  # the other is suppressed
    assert found["labels"].tolist() == [2] and found["scores"].item() == pytest.approx(
        torch.tensor([0.0, 0, 5]).softmax(0)[2].item()
    )
    assert found["masks"].equal(torch.full((1, 1, 28, 28), 0.5))


@pytest.mark.parametrize("protocol", ["coco_1x", "vitdet"])
def test_no_regions_at_all(make_detector, protocol):
    """Without objects and proposals there is nothing to find, and every parameter still has a gradient."""
    heads = make_detector(protocol).roi_heads
    features = {str(i): torch.rand(2, 32, 64 // s, 64 // s) for i, s in enumerate((2, 4, 8, 16))}
    nothing = [torch.zeros(0, 4)] * 2
    target = {
        "boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 64, 64, dtype=torch.bool),
    }  # fmt: skip
    losses = heads.train()(features, list(nothing), [(64, 64)] * 2, [target, target])[1]
    sum(losses.values()).backward()
    assert {name: loss.item() for name, loss in losses.items()} == {"box_class": 0, "box": 0, "mask": 0}
    assert [name for name, value in heads.named_parameters() if value.grad is None or value.grad.any()] == []
    found, _ = heads.eval()(features, list(nothing), [(64, 64)] * 2)
    assert [tuple(value.shape) for value in found[1].values()] == [(0, 4), (0,), (0,), (0, 1, 28, 28)]
