"""A small detector learns two images; anchors, sizes and masks are where the geometry says."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from mirl.heads.mask_rcnn import Anchors, FitImages, paste_masks

LOSSES = {"rpn_class", "rpn_box", "box_class", "box", "mask"}
PROTOCOLS = ["coco_1x", "vitdet"]
STEPS = 110


def scene(*objects: tuple[int, int, int, int, int], height: int = 64, width: int = 64):
    """Draw rectangles (x0, y0, x1, y1, label), the colour of each label its own."""
    image = torch.full((3, height, width), 0.2)
    masks = torch.zeros(len(objects), height, width, dtype=torch.bool)
    for (x0, y0, x1, y1, label), mask in zip(objects, masks, strict=True):
        mask[y0:y1, x0:x1] = True
        image[:, mask] = torch.tensor([[0.9], [0.1], [0.1]] if label == 1 else [[0.1], [0.9], [0.1]])
    numbers = torch.tensor(objects).reshape(-1, 5)
    return image, {"boxes": numbers[:, :4].float(), "labels": numbers[:, 4].long(), "masks": masks}


SCENES = [scene((4, 6, 30, 28, 1), (36, 34, 60, 58, 2)), scene((20, 10, 52, 26, 2))]


@pytest.fixture(scope="module")
def trained(make_detector):
    """A detector that was trained on the two scenes alone, for some seconds."""
    detector = make_detector("coco_1x", regions=32).train()
    optimizer = torch.optim.AdamW(detector.parameters(), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS)
    images, targets = zip(*SCENES, strict=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(STEPS):
            optimizer.zero_grad()
            sum(detector(list(images), list(targets)).values()).backward()
            torch.nn.utils.clip_grad_norm_(detector.parameters(), 10.0)
            optimizer.step()
            schedule.step()
    return detector.eval()


def check_found(found, target):
    """Check that the best-scored detection of each object's class overlaps it, box and mask."""
    overlaps = []
    for box, label, mask in zip(*target.values(), strict=True):
        best = int(torch.where(found["labels"] == label, found["scores"], 0).argmax())
        shared, either = (found["masks"][best] & mask).sum(), (found["masks"][best] | mask).sum()
        overlaps += [box_iou(found["boxes"][best, None], box[None]).item(), (shared / either).item()]
    assert min(overlaps) > 0.5 and sum(overlaps) / len(overlaps) > 0.7, overlaps


def test_two_images_are_learnt(trained):
    with torch.no_grad():
        results = trained([image for image, _ in SCENES])
    for found, (_, target) in zip(results, SCENES, strict=True):
        check_found(found, target)
        assert found["scores"][0] > 0.5 and found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)
        assert found["masks"].dtype == torch.bool and found["masks"].shape[1:] == (64, 64)


def test_what_is_found_is_in_the_pixels_of_the_image_given(trained):
    image, target = SCENES[0]
    image, masks = (value.repeat_interleave(3, dim=1).repeat_interleave(3, dim=2) for value in (image, target["masks"]))
    with torch.no_grad():
        (found,) = trained([image])
    check_found(found, {"boxes": 3 * target["boxes"], "labels": target["labels"], "masks": masks})


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_parameter_learns_in_float32_losses(make_detector, protocol, autocast):
    detector = make_detector(protocol, pixels=96).train()
    mixed = [scene((4, 6, 30, 28, 1), width=80), scene(height=80)]
    for scenes in (mixed, [scene(), scene()]):
        detector.zero_grad(set_to_none=True)
        images, targets = zip(*scenes, strict=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = detector(list(images), list(targets))
        assert set(losses) == LOSSES and {loss.dtype for loss in losses.values()} == {torch.float32}
        total = sum(losses.values())
        assert total.isfinite()
        total.backward()
        assert [name for name, value in detector.named_parameters() if value.grad is None] == []
    assert losses["box"] == losses["mask"] == losses["rpn_box"] == 0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_boxes_are_not_rounded_to_bfloat16(make_detector, protocol):
    """Its numbers from 512 on are multiples of 4."""
    detector = make_detector(protocol, pixels=64).eval()
    detector.roi_heads.score_thresh = 0.0
    proposals = []
    detector.rpn.register_forward_hook(lambda *parts: proposals.extend(parts[-1][0]))
    image = [torch.rand(3, 700, 1000, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (found,) = detector(image)
    for boxes in (found["boxes"], *proposals):
        assert boxes.dtype == torch.float32
        assert not boxes.equal(boxes.bfloat16().float())


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_anchors_lie_at_known_strides(patch):
    """Also where a map has an odd side: of 3 cells the coarser one keeps 2, whose stride is still twice as large."""
    strides = [patch // 4, patch // 2, patch, 2 * patch, 4 * patch]
    side = 6 * patch
    maps = [torch.zeros(1, 1, -(-side // s), -(-side // s), dtype=torch.bfloat16) for s in strides]
    first, second = Anchors(strides)(ImageList(torch.zeros(2, 3, side, side), [(side, side)] * 2), maps)
    assert first is second and first.dtype == torch.float32
    for anchors, map_, stride in zip(first.split([3 * m[0, 0].numel() for m in maps]), maps, strides, strict=True):
        centres, sides = (anchors[:, 2:] + anchors[:, :2]) / 2, anchors[:, 2:] - anchors[:, :2]
        rows = torch.arange(map_.shape[-1]) * float(stride)
        assert centres[::3].equal(torch.cartesian_prod(rows, rows).flip(1))
        assert sides[1].tolist() == [8 * stride] * 2
        torch.testing.assert_close(sides.prod(1), torch.full((len(sides),), 64.0 * stride**2), rtol=0.35, atol=0)
        torch.testing.assert_close((sides[:3, 1] / sides[:3, 0]), torch.tensor([0.5, 1, 2]), rtol=0.35, atol=0)


def fit(**options):
    return FitImages(40, 60, [0.5] * 3, [0.25] * 3, size_divisible=16, **options)


def test_training_only_normalises_and_pads():
    images = [torch.rand(3, 20, 50), torch.rand(3, 33, 20)]
    batch, targets = fit().train()(images, [{"boxes": torch.ones(1, 4)}] * 2)
    assert batch.tensors.shape == (2, 3, 48, 64) and batch.image_sizes == [(20, 50), (33, 20)]
    torch.testing.assert_close(batch.tensors[0, :, :20, :50], (images[0] - 0.5) / 0.25)
    assert not batch.tensors[0, :, 20:].any() and not batch.tensors[0, :, :, 50:].any()
    assert targets[0]["boxes"].equal(torch.ones(1, 4))


def test_evaluation_scales_the_shorter_side():
    sizes = {(20, 20): (40, 40), (80, 100): (40, 50), (20, 40): (30, 60), (1, 200): (1, 60)}
    batch, _ = fit().eval()([torch.rand(3, *size) for size in sizes])
    assert batch.image_sizes == list(sizes.values()) and batch.tensors.shape == (4, 3, 48, 64)


def test_evaluation_does_not_alias():
    stripes = torch.zeros(3, 160, 160)
    stripes[:, ::4] = 1
    batch, _ = fit().eval()([stripes])
    assert (batch.tensors[0, :, 5:35, 5:35] + 1).abs().max() < 0.1  # the stripes' mean is a quarter


def test_a_fixed_size_is_that_of_all_batches():
    square = FitImages(64, 64, [0.5] * 3, [0.25] * 3, size_divisible=16, fixed_size=(64, 64))
    batch, _ = square.eval()([torch.rand(3, 32, 16)])
    assert batch.tensors.shape == (1, 3, 64, 64) and batch.image_sizes == [(64, 32)]
    with pytest.raises(AssertionError):
        square.train()([torch.rand(3, 65, 16)])


def centres_within(box, size):
    """Return which pixels' centres lie in a box: bool [h, w]."""
    y, x = (torch.arange(count) + 0.5 for count in size)
    return ((y >= box[1]) & (y <= box[3]))[:, None] & ((x >= box[0]) & (x <= box[2]))


def test_pasted_masks_are_exact_to_the_pixel():
    size = (40, 50)
    boxes = torch.tensor([[10.3, 5.7, 30.9, 25.1], [-5.2, 30.6, 12.6, 44.4], [3.1, 3.1, 3.4, 3.4], [60.0, 60, 70, 70]])
    whole = paste_masks(torch.ones(4, 1, 28, 28), boxes, size)
    for box, pasted in zip(boxes, whole, strict=True):
        assert pasted.equal(centres_within(box, size))
    left = torch.ones(4, 1, 28, 28)
    left[..., 14:] = 0
    halves = boxes.clone()
    halves[:, 2] = (boxes[:, 0] + boxes[:, 2]) / 2
    for box, pasted in zip(halves, paste_masks(left, boxes, size), strict=True):
        assert pasted.equal(centres_within(box, size))


def test_a_slanted_half_plane_is_pasted_along_its_line():
    ramp = (torch.arange(28) + 0.5) / 28
    mask = 0.5 + 0.6 * ramp[None, :] + 0.2 * ramp[:, None] - 0.45  # at least half where 0.6 u + 0.2 v >= 0.45
    box, size = (10.4, 8.2, 90.1, 95.7), (120, 110)
    (pasted,) = paste_masks(mask[None, None], torch.tensor([box]), size)
    v, u = ((torch.arange(n) + 0.5 - box[i]) / (box[i + 2] - box[i]) for n, i in ((120, 1), (110, 0)))
    margin = 0.6 * u[None] + 0.2 * v[:, None] - 0.45
    inner = ((v > 1 / 56) & (v < 1 - 1 / 56))[:, None] & (u > 1 / 56) & (u < 1 - 1 / 56)  # centres of its cells
    assert pasted[inner].equal(margin[inner] >= 0)
    assert 0.2 < pasted[inner].float().mean() < 0.8


def test_pasting_holds_one_box_at_a_time(monkeypatch):
    sizes = []
    sample = F.grid_sample
    monkeypatch.setattr(
        F, "grid_sample", lambda mask, grid, **o: sizes.append(grid[..., 0].numel()) or sample(mask, grid, **o)
    )
    boxes = torch.tensor([[0.0, 0.0, 300.0, 200.0], [-9.0, -9.0, 900.0, 900.0], [5.5, 5.5, 15.5, 15.5]])
    assert paste_masks(torch.rand(3, 1, 28, 28), boxes, (200, 300)).shape == (3, 200, 300)
    assert sizes == [200 * 300, 200 * 300, 11 * 11]
    assert paste_masks(torch.zeros(0, 1, 28, 28), torch.zeros(0, 4), (200, 300)).shape == (0, 200, 300)


def test_the_same_seed_builds_the_same_detector(make_detector):
    state = torch.get_rng_state()
    first, second = (make_detector("coco_1x").state_dict() for _ in range(2))
    assert all(value.equal(second[name]) for name, value in first.items())
    assert torch.get_rng_state().equal(state)
    assert first["roi_heads.box_predictor.bbox_pred.weight"].std() == pytest.approx(0.001, rel=0.1)


def test_vitdet_has_more_norms_and_one_more_convolution(make_detector):
    def count(protocol, part, kind):
        return sum(isinstance(module, kind) for module in getattr(make_detector(protocol), part).modules())

    assert [count(protocol, "rpn", nn.Conv2d) for protocol in PROTOCOLS] == [3, 4]
    assert [count(protocol, "roi_heads", nn.LayerNorm) for protocol in PROTOCOLS] == [4, 8]
    assert [count(protocol, "roi_heads", nn.Conv2d) for protocol in PROTOCOLS] == [9, 9]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_encoder_is_one_module_of_the_detector(make_detector, protocol):
    detector = make_detector(protocol)
    names = [name for name, module in detector.named_modules() if module is detector.backbone.encoder]
    assert names == ["backbone.pyramid.encoder"]
    assert detector.backbone.strides == (2, 4, 8, 16, 32)
