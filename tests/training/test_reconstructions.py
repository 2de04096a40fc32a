"""Pictures show pixels: predictions get their patches' statistics back, visible patches are the image's own."""

import numpy as np
import pytest
import torch
from PIL import Image

from mirl import methods
from mirl.data.transforms import channel_statistics, normalise
from mirl.methods import Term
from mirl.models.masking import split
from mirl.models.patches import gather, patchify
from mirl.objectives.pixels import pixel_target
from mirl.training.reconstructions import Panel, compose, panels, to_rgb, write_atlas

SIZES = {"image_size": (16, 24), "patch_size": (4, 8)}
ALONE, PAIR = Term((1,), 1.0), Term((1, 2), 1.0)


def scene(channels=3, target="normalised", seed=0):
    """Return images, what `compose` wants of them, a perfect prediction [b, n, p] in its order, and options."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (2, channels, 16, 24), dtype=torch.uint8, generator=generator)
    patches = patchify(normalise(images, channels), SIZES["patch_size"])
    visible, masked = split(torch.rand(2, patches.shape[1], generator=generator), 0.75)
    truth = pixel_target(gather(patches, torch.cat([visible, masked], dim=1)), target)
    return images / 255, (patches, visible, masked), truth, {"target": target, "channels": channels, **SIZES}


def cells(images):
    return patchify(images, SIZES["patch_size"])


@pytest.mark.parametrize("target", ["normalised", "raw"])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_perfect_pair_sums_to_the_original(channels, target):
    images, masks, truth, options = scene(channels, target)
    main = truth * 0.5
    shown = compose(*masks, [main, truth - main], [PAIR], **options)
    (term,) = shown.terms
    assert term.decoders == (1, 2)
    torch.testing.assert_close(shown.original, images, atol=1e-5, rtol=1e-4)
    for whole in (term.total, term.pasted):
        torch.testing.assert_close(whole, images, atol=1e-4, rtol=1e-3)
    # what the main component lacks is what the residual, centred on grey, adds
    torch.testing.assert_close(term.main + term.residual - 0.5, images, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("target", ["normalised", "raw"])
def test_main_and_residual_sum_whatever_is_predicted(target):
    _, masks, truth, options = scene(target=target)
    predictions = [torch.randn(truth.shape, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    terms = [Term((1, 4), 0.5), Term((2, 3), 0.5)]
    shown = compose(*masks, predictions, terms, **options)
    assert [term.decoders for term in shown.terms] == [(1, 4), (2, 3)]
    for term, given in zip(shown.terms, terms, strict=True):
        torch.testing.assert_close(term.main + term.residual - 0.5, term.total, atol=1e-5, rtol=1e-5)
        alone = compose(*masks, [sum(predictions[k - 1] for k in given.decoders)], [ALONE], **options)
        torch.testing.assert_close(term.total, alone.terms[0].total, atol=1e-5, rtol=1e-5)


def test_masked_patches_are_grey_and_visible_ones_are_shown():
    images, (patches, visible, masked), truth, options = scene()
    shown = compose(patches, visible, masked, [truth], [ALONE], **options)
    assert torch.all(gather(cells(shown.masked), masked) == 0.5)
    torch.testing.assert_close(gather(cells(shown.masked), visible), gather(cells(images), visible))
    assert shown.hidden.shape == (2, 1, 16, 24) and shown.hidden.dtype == torch.bool
    hidden = cells(shown.hidden)
    assert gather(hidden, masked).all() and not gather(hidden, visible).any()


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_pasted_is_the_original_on_visible_patches_bit_for_bit(channels):
    _, (patches, visible, masked), truth, options = scene(channels)
    shown = compose(patches, visible, masked, [truth + 1, truth], [PAIR], **options)
    (term,) = shown.terms
    assert torch.equal(gather(cells(term.pasted), visible), gather(cells(shown.original), visible))
    assert torch.equal(gather(cells(term.pasted), masked), gather(cells(term.total), masked))
    assert not torch.isclose(gather(cells(term.total), visible), gather(cells(shown.original), visible)).any()


def test_predictions_are_put_where_their_patches_are():
    """A prediction for one patch alone changes that patch alone."""
    _, (patches, visible, masked), truth, options = scene()
    before = compose(patches, visible, masked, [truth], [ALONE], **options).terms[0].total
    order = torch.cat([visible, masked], dim=1)
    for place in range(truth.shape[1]):
        other = truth.clone()
        other[:, place] += 1
        changed = cells(compose(patches, visible, masked, [other], [ALONE], **options).terms[0].total) != cells(before)
        for changes, patch in zip(changed.any(-1), order[:, place], strict=True):
            assert changes.nonzero().flatten().tolist() == [patch]


def test_a_residual_of_nothing_is_grey():
    _, masks, truth, options = scene()
    (term,) = compose(*masks, [truth, torch.zeros_like(truth)], [PAIR], **options).terms
    torch.testing.assert_close(term.residual, torch.full_like(term.residual, 0.5))
    torch.testing.assert_close(term.main, term.total)


def test_a_decoder_alone_has_no_parts():
    _, masks, truth, options = scene()
    (term,) = compose(*masks, [truth], [ALONE], **options).terms
    assert term.main is None and term.residual is None


# Panels


def test_panels_name_what_they_show():
    _, masks, truth, options = scene()

    def titles(*terms):
        return [panel.title for panel in panels(compose(*masks, [truth] * 4, terms, **options))]

    assert titles(ALONE) == ["original", "masked", "reconstruction"]
    assert titles(PAIR) == ["original", "masked", "main", "residual", "sum"]
    pairs = [f"pair {g}: {name}" for g in (1, 2) for name in ("main", "residual", "sum")]
    assert titles(Term((1, 4), 0.5), Term((2, 3), 0.5)) == ["original", "masked", *pairs]


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("target", ["normalised", "raw"])
def test_panels_show_what_the_loss_asks_for(channels, target):
    """Predictions for visible patches, which nothing trains, are nowhere: the image is, and a residual's grey."""
    images, (patches, visible, masked), truth, options = scene(channels, target)
    truth[:, : visible.shape[1]] = 1e3
    main = truth * 0.25
    columns = panels(compose(patches, visible, masked, [main, truth - main], [PAIR], **options))
    shown = {panel.title: panel.images for panel in columns}
    torch.testing.assert_close(shown["sum"], images, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(shown["main"] + shown["residual"] - 0.5, images, atol=1e-4, rtol=1e-3)
    original = gather(cells(shown["original"]), visible)
    assert torch.equal(gather(cells(shown["main"]), visible), original)
    assert (gather(cells(shown["residual"]), visible) == 0.5).all()


@pytest.mark.parametrize(("channels", "first"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (5, [0, 1, 2])])
def test_what_is_shown_of_channels_are_the_first_three_or_the_first(channels, first):
    images = torch.tensor([-1.0, 0.0, 0.2, 0.5, 1.0, 7.0]).view(1, 1, 2, 3).repeat(1, channels, 1, 1)
    images[:, -1] *= 0.5
    shown = to_rgb(images)
    assert shown.shape == (1, 2, 3, 3) and shown.dtype == torch.uint8
    expected = (images.clamp(0, 1) * 255).round().to(torch.uint8)[:, first].permute(0, 2, 3, 1)
    assert torch.equal(shown, expected)
    assert torch.equal(to_rgb(images[0]), shown[0])


# The atlas


def flat(*values, height=16, width=24):
    """Return grey images [b, 1, height, width] of these values."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, height, width) / 255


def atlas(path):
    with Image.open(path) as image:
        assert image.format == "WEBP"
        return np.asarray(image.convert("RGB")).astype(int)


def test_cells_of_an_atlas_are_where_they_are_promised(tmp_path):
    values = [[10, 60, 110], [200, 150, 240]]  # [image][panel]
    columns = [Panel(str(j), flat(values[0][j], values[1][j])) for j in range(3)]
    assert write_atlas(columns, tmp_path / "panels" / "a.webp") == (16, 24)
    pixels = atlas(tmp_path / "panels" / "a.webp")
    assert pixels.shape == (2 * 16, 3 * 24, 3)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            cell = pixels[16 * i + 2 : 16 * i + 14, 24 * j + 2 : 24 * j + 22]
            assert abs(cell - value).max() <= 6
    assert [path.name for path in (tmp_path / "panels").iterdir()] == ["a.webp"]


def test_small_cells_of_an_atlas_are_kept_exactly(tmp_path):
    images = torch.randint(256, (2, 3, 32, 64), generator=torch.Generator().manual_seed(0)) / 255
    write_atlas([Panel("a", images), Panel("b", 1 - images)], tmp_path / "a.webp")
    cut = torch.from_numpy(atlas(tmp_path / "a.webp")).view(2, 32, 2, 64, 3)
    assert torch.equal(cut[:, :, 0], to_rgb(images).int())
    assert torch.equal(cut[:, :, 1], to_rgb(1 - images).int())


@pytest.mark.parametrize(("size", "cell"), [((160, 40), (160, 40)), ((320, 640), (80, 160)), ((4000, 8), (160, 1))])
def test_large_cells_of_an_atlas_are_scaled(size, cell, tmp_path):
    """Images of a thousand pixels, or many pairs, are no reason for a run to end: a WebP has at most 16,383 a side."""
    columns = [Panel(str(value), flat(value, 255 - value, height=size[0], width=size[1])) for value in (20, 120, 220)]
    assert write_atlas(columns, tmp_path / "a.webp") == cell
    pixels = atlas(tmp_path / "a.webp")
    assert pixels.shape == (2 * cell[0], 3 * cell[1], 3)
    if cell[1] > 1:
        centres = pixels[cell[0] // 2 :: cell[0], cell[1] // 2 :: cell[1], 0]
        assert abs(centres - [[20, 120, 220], [235, 135, 35]]).max() <= 6


def test_rgb_statistics_are_imagenets():
    assert channel_statistics(3)[0] == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("method", "labels", "titles"),
    [
        (methods.multi_decoder(4, 2), ["decoder 1", "decoder 2"], ["decoder 1: reconstruction"]),
        (methods.explicit_residual(4, 4), ["pair 1", "pair 2"], ["pair 1: main", "pair 1: residual", "pair 1: sum"]),
        (methods.coarse_to_fine(4, 2), ["pair 1"], ["coarse", "fine", "sum"]),
        (methods.fine_to_coarse(4, 2), ["pair 1"], ["coarse", "fine", "sum"]),
    ],
    ids=lambda value: value.name if isinstance(value, methods.Method) else None,
)
def test_every_method_shows_its_whole_images(method, labels, titles):
    """Fixed parts are a pair too, the coarse one first whichever decoder predicts it; an explicit residual is shown
    once.
    """
    images, masks, truth, options = scene()
    predictions = [torch.zeros_like(truth) for _ in method.taps]
    for term in method.reconstructions:
        predictions[term.decoders[0] - 1] = truth
    shown = compose(*masks, predictions, method.reconstructions, **options)
    assert [term.label for term in shown.terms] == labels
    assert [panel.title for panel in panels(shown)][2:5][: len(titles)] == titles
    for term in shown.terms:
        torch.testing.assert_close(term.total, images, atol=1e-4, rtol=1e-3)
        if term.residual is not None:
            assert (term.residual == 0.5).all()
