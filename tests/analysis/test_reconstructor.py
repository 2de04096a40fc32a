"""Reconstructions are the model's own, of the masks that were asked for, at any size."""

import pytest
import torch
from tiny_reconstructions import cells, noise, write_run

from mirl.analysis.reconstructor import Reconstructor
from mirl.data.loading import spread
from mirl.data.transforms import normalise
from mirl.errors import UserError
from mirl.models.patches import gather, patchify
from mirl.objectives.pixels import to_pixels
from mirl.tasks.pretrain import PICTURED
from mirl.tasks.weights import load_autoencoder
from mirl.training.runs import RunFolder

METHODS = [{"method": "mae", "segments": None}, *({"segments": count} for count in (1, 2, 4, 6))]
METHODS[3]["model"] = "vit_48x4_4"  # six blocks do not divide into four segments


def name(method):
    return f"{method.get('method', 'mirl')}_{method['segments']}"


# What is masked


def test_a_random_mask_hides_what_training_hides_and_repeats_itself(model):
    mask = model.random_mask(seed=5)
    assert mask.shape == (4, 4) and mask.dtype == torch.bool and int(mask.sum()) == 12
    assert torch.equal(mask, model.random_mask(seed=5))
    assert not torch.equal(mask, model.random_mask(seed=6))
    for ratio, masked in ((0.5, 8), (0.9, 15), (0.06, 1), (0.1, 2)):
        assert int(model.random_mask(ratio).sum()) == masked


def test_a_block_hides_the_patches_whose_centre_is_in_it(model):
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[1:3, 1:3] = True
    assert torch.equal(model.block_mask([0.25, 0.25, 0.75, 0.75]), expected)
    assert torch.equal(model.block_mask([0.2, 0.3, 0.7, 0.8]), expected)
    expected[:] = False
    expected[0, 2:] = True
    assert torch.equal(model.block_mask((0, 0.5, 0.25, 1)), expected)


def test_a_drawn_mask_hides_patches_of_which_half_is_drawn(model):
    drawn = torch.zeros(32, 32, dtype=torch.bool)
    drawn[:8, :4] = True  # half of the first patch
    drawn[8:16, 8:11] = True  # less than half of another
    drawn[24:, 16:24] = True
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[0, 0] = expected[3, 2] = True
    assert torch.equal(model.drawn_mask(drawn), expected)
    twice = drawn.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(model.drawn_mask(twice), expected)
    # of another form it is cropped as an image is
    wide = torch.cat([torch.ones(64, 32, dtype=torch.bool), twice, torch.ones(64, 32, dtype=torch.bool)], 1)
    assert torch.equal(model.drawn_mask(wide), expected)


@pytest.mark.parametrize("kind", ["random", "block", "drawn"])
def test_masked_and_pasted_pictures_follow_the_mask_patch_by_patch(kind, model):
    drawn = torch.zeros(32, 32, dtype=torch.bool)
    drawn[4:20, 6:30] = True
    hidden = {
        "random": model.random_mask(0.4), "block": model.block_mask([0, 0.5, 1, 1]), "drawn": model.drawn_mask(drawn)
    }[kind]  # fmt: skip
    images = noise(2, 3, 32, 32)
    shown = model(images, hidden.expand(2, -1, -1))
    flags = hidden.flatten()
    assert torch.equal(cells(shown.hidden)[0].bool().all(-1), flags)
    assert torch.equal(cells(shown.hidden)[0].bool().any(-1), flags)
    assert (cells(shown.masked)[:, flags] == 0.5).all()
    assert torch.equal(cells(shown.masked)[:, ~flags], cells(shown.original)[:, ~flags])
    for term in shown.terms:
        assert torch.equal(cells(term.pasted)[:, ~flags], cells(shown.original)[:, ~flags])
        assert torch.equal(cells(term.pasted)[:, flags], cells(term.total)[:, flags])
        assert (cells(term.pasted)[:, flags] != cells(shown.original)[:, flags]).any(-1).all()
    torch.testing.assert_close(shown.original, images / 255, atol=1e-6, rtol=1e-6)


def test_each_image_may_have_its_own_mask(model):
    images = noise(3, 3, 32, 32)
    hidden = torch.stack([model.random_mask(0.5, seed) for seed in range(3)])
    together = model(images, hidden)
    for i in range(3):
        alone = model(images[i : i + 1], hidden[i : i + 1])
        torch.testing.assert_close(together.terms[2].total[i], alone.terms[2].total[0], atol=1e-5, rtol=1e-5)


# What the model makes of it


@pytest.mark.parametrize("target", ["normalised", "raw"])
@pytest.mark.parametrize("method", METHODS, ids=name)
def test_reconstructions_are_the_models_and_what_pre_training_draws(method, target, tmp_path, monkeypatch):
    """On a run's own masks: the picture of `PretrainTask`, and the predictions of the loaded autoencoder."""
    task = write_run(tmp_path / "run", **method, target=target)
    drawn = {}
    monkeypatch.setattr("mirl.tasks.pretrain.draw", lambda columns, *_: drawn.update({c.title: c for c in columns}))
    run = RunFolder(tmp_path / "run", resume=True, overwrite=False)
    with torch.inference_mode():
        task.draw(run, None, 0, 0.0)
    run.close()
    batch = spread(task.held_out, PICTURED)
    hidden = torch.zeros(PICTURED, 16, dtype=torch.bool).scatter_(1, batch.masked, True).view(-1, 4, 4)
    shown = Reconstructor(str(tmp_path / "run"))(batch.images, hidden)

    autoencoder = load_autoencoder(str(tmp_path / "run"))
    assert [term.decoders for term in shown.terms] == [term.decoders for term in task.method.terms]
    patches = patchify(normalise(batch.images, 3), (8, 8))
    with torch.inference_mode():
        predictions = autoencoder(patches, batch.visible, batch.masked)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406] * 64), torch.tensor([0.229, 0.224, 0.225] * 64)
    true = gather(patches, batch.masked)
    for number, term in enumerate(shown.terms, start=1):
        title = f"pair {number}: " if len(shown.terms) > 1 else ""
        title += "sum" if len(term.decoders) == 2 else "reconstruction"
        torch.testing.assert_close(term.pasted, drawn[title].images, atol=1e-5, rtol=1e-4)
        parts = [predictions[decoder - 1] for decoder in term.decoders]
        total = gather(cells(term.total), batch.masked)
        torch.testing.assert_close(total, to_pixels(sum(parts), true, target) * deviation + mean, atol=1e-5, rtol=1e-4)
        if len(parts) == 2:
            main = gather(cells(term.main), batch.masked)
            torch.testing.assert_close(main, to_pixels(parts[0], true, target) * deviation + mean, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(term.main + term.residual - 0.5, term.total, atol=1e-5, rtol=1e-4)
        else:
            assert term.main is None and term.residual is None


@pytest.mark.parametrize("method", METHODS[::2], ids=name)
def test_another_image_size_has_resampled_positions(method, tmp_path):
    task = write_run(tmp_path / "run", **method)
    run, images = str(tmp_path / "run"), noise(1, 3, 48, 64)
    model = Reconstructor(run, image_size=(48, 64))
    assert (model.grid, model.image_size) == ((6, 8), (48, 64))
    assert model.model.encoder.pos_embed.shape == (1, 49, 48)
    assert model.model.positions.shape == (48, 32)
    hidden = model.random_mask()
    shown = model(images, hidden[None])
    assert shown.original.shape == (1, 3, 48, 64) and int(hidden.sum()) == 36
    assert all(bool(term.total.isfinite().all()) for term in shown.terms)
    # The class token's place is no place of the image: it stays.
    torch.testing.assert_close(model.model.encoder.pos_embed[:, 0], task.model.encoder.pos_embed[:, 0])


@pytest.mark.parametrize("image_size", [32, (32, 32)])
def test_the_trained_image_size_changes_nothing(image_size, model, run):
    images, hidden = noise(1, 3, 32, 32), model.random_mask()[None]
    same = Reconstructor(run, image_size=image_size)(images, hidden)
    for one, other in zip(model(images, hidden).terms, same.terms, strict=True):
        assert torch.equal(one.total, other.total)


def test_images_and_masks_of_another_form_are_refused(tmp_path):
    write_run(tmp_path / "run", **METHODS[2])
    model = Reconstructor(str(tmp_path / "run"))
    images = torch.zeros(2, model.channels, *model.image_size, dtype=torch.uint8)
    hidden = torch.stack([model.random_mask(0.5, seed) for seed in (0, 1)])
    unequal = torch.stack([model.random_mask(share) for share in (0.5, 0.25)])
    for given, mask, message in [
        (images.float(), hidden, "images are torch.float32"),
        (images[..., :-1], hidden, "give torch.uint8"),
        (images, hidden[:1], "give torch.uint8"),
        (images, hidden[:, :-1], "masks are torch.bool"),
        (images, hidden.float(), "masks are torch.float32"),
        (images, unequal, "as many in each image"),
        (images, torch.ones_like(hidden), "hide some patches, not all"),
        (images, torch.zeros_like(hidden), "hide some patches, not all"),
    ]:
        with pytest.raises(UserError, match=message):
            model(given, mask)
