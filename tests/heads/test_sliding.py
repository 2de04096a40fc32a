"""Label maps do not depend on how they are computed: in windows or whole, in bands or at once."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from mirl.errors import UserError
from mirl.heads import sliding
from mirl.heads.bands import Bands, stitched
from mirl.heads.pyramid import build_plain
from mirl.heads.relative import build_relative
from mirl.heads.sliding import Inference, check, scores_in_bands, segment
from mirl.heads.upernet import build_segmenter


@pytest.fixture
def make_segmenter(make_weights):
    """Make a small segmenter of six classes whose scores differ."""

    def make(build=build_plain, classes=6):
        weights = make_weights("vit_32x2_2", spread=0.1)
        segmenter = build_segmenter(
            build(weights, image_size=(64, 64)), classes=classes, width=16, mean=weights.mean,
            deviation=weights.deviation,
        )  # fmt: skip
        nn.init.normal_(segmenter.classifier[1].weight, generator=torch.Generator().manual_seed(0))
        return segmenter.eval()

    return make


class Colours(nn.Module):
    """Stands for a segmenter: the scores of a position are multiples of the brightest colours in its 2x2 pixels."""

    multiple, classes, fixed_size = 16, 9, None

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.seen = []

    def forward(self, images):
        self.seen.append(tuple(images.shape))
        return F.max_pool2d(images, 2).repeat(1, 3, 1, 1) * torch.arange(1, 10)[:, None, None]


def picture(height, width, channels=3):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(256, (1, channels, 5, 7), generator=generator).float()
    return F.interpolate(coarse, (height, width), mode="bilinear")[0].to(torch.uint8)


def options(**changes):
    return Inference(**{"image_size": 64, "crop_size": 64, "stride": 40} | changes)


def all_scores(segmenter, image, inference):
    return torch.cat([scores for _, scores in scores_in_bands(segmenter, image, inference)], dim=1)


@pytest.mark.parametrize("target", [(40, 61), (7, 5), (1, 1), (13, 17), (1300, 3), (1, 40)])
def test_bands_are_those_of_the_whole_interpolation(target):
    scores = torch.randn(5, 13, 17)
    expected = F.interpolate(scores[None], target, mode="bilinear", align_corners=False)[0]
    bands = Bands.of(scores).resized(target)
    for step in (1, 3, 2000):
        parts = [bands.rows(start, min(start + step, target[0])) for start in range(0, target[0], step)]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=0)


def test_windows_are_averaged_where_they_overlap():
    scores = torch.randn(4, 2, 3, 4)
    places = [(0, 0), (0, 6), (4, 0), (4, 6)]
    total, count = torch.zeros(2, 10, 14), torch.zeros(10, 14)
    large = F.interpolate(scores, (6, 8), mode="bilinear", align_corners=False)
    for window, (top, left) in zip(large, places, strict=True):
        total[:, top : top + 6, left : left + 8] += window
        count[top : top + 6, left : left + 8] += 1
    bands = stitched(scores, places, (6, 8), (10, 14))
    found = torch.cat([bands.rows(start, start + 2) for start in range(0, 10, 2)], dim=1)
    torch.testing.assert_close(found, total / count)
    assert count.max() == 4 and count.min() == 1


@pytest.mark.parametrize("size", [(64, 64), (90, 70), (30, 45), (61, 200), (200, 61)])
def test_an_image_that_fits_into_a_window_is_seen_whole(make_segmenter, size):
    segmenter, image = make_segmenter(), picture(*size)
    slide = all_scores(segmenter, image, options(crop_size=256, stride=100))
    assert torch.equal(slide, all_scores(segmenter, image, options(mode="whole")))
    assert slide.shape == (6, *size)


def test_windows_see_no_padding_where_they_cover_the_image():
    """As in mmseg: 150 px are no multiple of two patches, but windows of 64 px are; 50 px are less than a window."""
    white, looked = torch.full((3, 64, 150), 255, dtype=torch.uint8), []
    colours = Colours().eval()
    colours.register_forward_pre_hook(lambda module, inputs: looked.append(inputs[0]))
    segment(colours, white, options())
    assert all((window == 1).all() for window in looked)
    looked.clear()
    segment(colours, white[:, :50], options(image_size=50))
    assert all((window[..., :50, :] == 1).all() and (window[..., 50:, :] == 0).all() for window in looked)


def test_sliding_looks_through_every_window_once(make_segmenter):
    colours = Colours().eval()
    segment(colours, picture(64, 150), options(batch=2))
    assert colours.seen == [(2, 3, 64, 64), (2, 3, 64, 64)]  # of 150 pixels, from 0, 40, 80 and 86
    small, large = picture(64, 150), options(batch=3)
    segmenter = make_segmenter()
    torch.testing.assert_close(all_scores(segmenter, small, options()), all_scores(segmenter, small, large))


@pytest.mark.parametrize("mode", ["slide", "whole"])
@pytest.mark.parametrize("size", [(64, 150), (300, 64), (97, 203), (20, 20), (1000, 1), (1, 1)])
def test_what_does_not_look_around_is_the_same_in_windows(size, mode):
    """Scores of a stand-in are its pixels, so they must come back at their places."""
    image = picture(*size)
    said = all_scores(Colours().eval(), image, options(mode=mode)) / torch.arange(1, 10)[:, None, None]
    error = (said - image.repeat(3, 1, 1) / 255).abs()
    assert error.mean() < 0.08 and error.max() < 0.25, (error.mean(), error.max())


def test_a_label_map_is_the_best_of_the_scores_in_any_bands(make_segmenter, monkeypatch):
    segmenter, image = make_segmenter(), picture(90, 150)
    expected = all_scores(segmenter, image, options()).argmax(0)
    for band in (1, 6 * 150 * 7, 2**30):
        monkeypatch.setattr(sliding, "BAND", band)
        labels = segment(segmenter, image, options())
        assert labels.dtype == torch.uint8 and torch.equal(labels.long(), expected)
    assert len(expected.unique()) > 2


def test_one_scale_is_the_resized_image_in_one_pass(make_segmenter):
    segmenter, image = make_segmenter(), picture(90, 150)
    resized = transforms.resize(image, [64, 107], antialias=True)
    with torch.no_grad():
        scores = segmenter(F.pad(resized, (0, 5))[None] / 255)
    pixels = F.interpolate(scores, (64, 112), mode="bilinear", align_corners=False)[..., :107]
    expected = F.interpolate(pixels, (90, 150), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(all_scores(segmenter, image, options(mode="whole")), expected, atol=1e-5, rtol=1e-5)


def test_several_scales_are_the_mean_of_their_probabilities(make_segmenter):
    segmenter, image = make_segmenter(), picture(90, 150)
    expected = torch.zeros(6, 90, 150)
    for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75):
        one = options(image_size=round(64 * ratio))
        expected += all_scores(segmenter, image, one).softmax(0)
        expected += all_scores(segmenter, image.flip(-1), one).flip(-1).softmax(0)
    found = all_scores(segmenter, image, options(multi_scale=True))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(0), torch.full((90, 150), 12.0))
    mirrored = segment(segmenter, image.flip(-1), options(multi_scale=True))
    assert (mirrored == segment(segmenter, image, options(multi_scale=True)).flip(-1)).float().mean() > 0.999


def test_relative_positions_see_windows_of_their_own_size(make_segmenter):
    segmenter = make_segmenter(build_relative)
    assert segmenter.fixed_size == (64, 64)
    for size in ((64, 64), (150, 90), (10, 300)):
        assert segment(segmenter, picture(*size), options()).shape == size
    small = options(image_size=48)
    image = picture(48, 48)
    with torch.no_grad():
        scores = segmenter(F.pad(image, (0, 16, 0, 16))[None] / 255)
    pixels = F.interpolate(scores, (64, 64), mode="bilinear", align_corners=False)[0, :, :48, :48]
    torch.testing.assert_close(all_scores(segmenter, image, small), pixels, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (5000, 10), (3, 1)])
@pytest.mark.parametrize("changes", [{}, {"mode": "whole"}, {"multi_scale": True}])
def test_images_of_any_shape(size, changes):
    labels = segment(Colours().eval(), picture(*size), options(**changes))
    assert labels.shape == size and labels.max() < 9


def test_a_model_in_training_is_not_asked(make_segmenter):
    with pytest.raises(AssertionError):
        segment(make_segmenter().train(), picture(64, 64), options())


@pytest.mark.parametrize(
    ("changes", "build", "message"),
    [
        ({"crop_size": 60}, build_plain, "--crop_size 60 is no multiple of 16, .*; give --crop_size 64"),
        ({"crop_size": 4}, build_plain, "--crop_size 4 is no multiple of 16, .*; give --crop_size 16"),
        ({"stride": 65}, build_plain, "--stride 65 would leave gaps between windows; give 1 to 64"),
        ({"stride": 0}, build_plain, "--stride 0 would"),
        ({"image_size": 0}, build_plain, "--image_size 0 is not allowed"),
        ({"mode": "whole"}, build_relative, "relative positions are those of 64x64 px, .* leave --inference whole out"),
        ({"crop_size": 48}, build_relative, "relative positions are those of 64x64 px; give --crop_size 64"),
    ],
)
def test_what_does_not_fit_the_segmenter_is_one_line(make_segmenter, changes, build, message):
    segmenter = make_segmenter(build)
    check(segmenter, options())
    with pytest.raises(UserError, match=message) as caught:
        check(segmenter, options(**{"stride": 4} | changes))
    assert "\n" not in str(caught.value)
