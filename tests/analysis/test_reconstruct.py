"""What `mirl reconstruct` shows, reads and writes; what it cannot do is said in one line."""

import shutil
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image
from tiny_reconstructions import cells, noise, write_images, write_run

import mirl
from mirl.analysis import reconstruct as module
from mirl.analysis.reconstruct import Reconstructor, draw, read_images, reconstruct
from mirl.cli import main
from mirl.data.decode import read_image
from mirl.data.transforms import fixed_view
from mirl.errors import UserError
from mirl.formats import official_mae
from mirl.formats.renaming import join
from mirl.tasks.weights import load_autoencoder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("reconstruct") / "photos")


def said(error):
    """Return what a user is told, which is one line."""
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("channels", [1, 5])
def test_grey_images_and_arrays_of_five_channels(channels, tmp_path):
    photos = write_images(tmp_path / "data", count=4, channels=channels)
    write_run(tmp_path / "run", channels=channels, data=str(tmp_path / "data"), batch_size=2)
    shown = reconstruct(str(tmp_path / "run"), [str(photos[0])], out=str(tmp_path / "a.png"))
    assert shown.terms[0].pasted.shape == (1, channels, 32, 32)
    read, _ = read_images("", [str(photos[0])], Reconstructor(str(tmp_path / "run")))
    torch.testing.assert_close(shown.original[0], read[0] / 255, atol=1e-6, rtol=1e-6)
    assert reconstruct(str(tmp_path / "run")).original.shape == (2, channels, 32, 32)


def test_images_of_any_size_are_scaled_and_cropped(run, tmp_path):
    for height, width in ((9, 200), (64, 64), (300, 40)):
        (path,) = write_images(tmp_path / f"{height}", count=1, size=(height, width))
        shown = reconstruct(run, [path], out=tmp_path / "a.png")  # paths as good as text
        pixels = read_image(path)
        torch.testing.assert_close(shown.original[0], fixed_view(pixels, (32, 32)) / 255, atol=1e-6, rtol=1e-6)


def test_a_run_its_file_and_an_unfinished_run_give_the_same(tiny, tmp_path):
    """The last checkpoint of a finished run holds what its autoencoder.safetensors does."""
    run = mirl.pretrain(**tiny | {"epochs": 1}, out=tmp_path / "run")
    finished = reconstruct(str(run), seed=3)
    path = str(run / "autoencoder.safetensors")
    with pytest.raises(UserError, match="no run folder with images of its own; give --images") as caught:
        reconstruct(path, out=str(tmp_path / "a.png"))
    assert "\n" not in str(caught.value)
    (photo,) = write_images(tmp_path / "photos", count=1)
    of_run, of_file = (reconstruct(name, [str(photo)], out=str(tmp_path / "a.png")) for name in (str(run), path))
    assert torch.equal(of_run.terms[0].total, of_file.terms[0].total)
    (run / "autoencoder.safetensors").unlink()
    shutil.rmtree(run / "encoder")
    unfinished = reconstruct(str(run), seed=3)
    assert torch.equal(unfinished.terms[0].total, finished.terms[0].total)
    assert (run / "reconstructions" / "run.png").exists()


# Pictures and files


def test_pictures_are_png_and_pdf(run, photos, tmp_path, monkeypatch):
    for name in ("a.png", "b.PDF", "new/folder/c.png"):
        reconstruct(run, [str(photos[0])], out=str(tmp_path / name))
    for name in ("a.png", "new/folder/c.png"):
        with Image.open(tmp_path / name) as image:
            image.load()
            assert image.format == "PNG" and min(image.size) > 200
    assert (tmp_path / "b.PDF").read_bytes().startswith(b"%PDF")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.PDF", "new"]
    monkeypatch.chdir(run)
    reconstruct(".", [str(photos[0])])
    with Image.open(f"{run}/reconstructions/run.png") as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("size", [(32, 32), (8, 128), (128, 8)])
def test_names_and_titles_lie_beside_the_images_not_on_them(size, run, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(module, "Figure", lambda **options: figures.append(Figure(**options)) or figures[0])
    model = Reconstructor(run, image_size=size)
    shown = model(noise(2, 3, *size), model.random_mask(0.5).expand(2, -1, -1))
    draw(shown, [f"{'$WIDE_NAME_' * 9}{i}.jpeg" for i in range(2)], tmp_path / "a.png", "a title")
    places = [axes for axes in figures[0].axes if axes.images]
    assert len(places) == 2 * (2 + 3 * 4)
    texts = [part for axes in figures[0].axes for part in (axes.xaxis.label, axes.yaxis.label, axes.title)]
    texts = [figures[0]._suptitle, *(text for text in texts if text.get_text())]
    assert len(texts) == 1 + 6 + 2 * (1 + 3)
    boxes = [text.get_window_extent() for text in texts] + [axes.get_window_extent() for axes in places]
    for a, b in combinations(boxes, 2):
        shared = Bbox.intersection(a, b)
        assert shared is None or min(shared.width, shared.height) < 1.5
    assert all(figures[0].bbox.x0 <= box.x0 and box.x1 <= figures[0].bbox.x1 for box in boxes)


def test_a_picture_of_many_large_pairs_is_drawn(model, tmp_path, monkeypatch):
    """What draws it stops at 65,536 dots, which 16 tall images of many pairs are beyond."""
    monkeypatch.setattr(module, "DOTS", 900)
    shown = model(noise(2, 3, 32, 32), model.random_mask().expand(2, -1, -1))
    draw(replace(shown, terms=shown.terms * 3), list("ab"), tmp_path / "a.png", "a title")
    with Image.open(tmp_path / "a.png") as image:
        assert 700 < max(image.size) <= 900


def test_without_images_some_of_those_held_out_are_shown(tmp_path, capsys):
    task = write_run(tmp_path / "shapes", data="shapes:1000")
    shown = reconstruct(str(tmp_path / "shapes"), seed=1)
    expected = torch.stack([task.source.read(int(index)) for index in task.held_out.members])
    expected = torch.stack([fixed_view(image, (32, 32)) for image in expected]) / 255
    assert len(shown.original) == module.HELD_OUT
    for image in shown.original:
        assert (image - expected).abs().amax(dim=(1, 2, 3)).min() < 1e-5
    assert f"saved {tmp_path}/shapes/reconstructions/shapes.png" in capsys.readouterr().out


def test_seeds_are_of_the_mask_of_each_image(run, photos, model, monkeypatch):
    monkeypatch.setattr(module, "draw", lambda *_: None)
    images = [str(path) for path in photos]
    first, again, later = (reconstruct(run, images, seed=seed, out=f"{run}/a.png") for seed in (4, 4, 5))
    assert torch.equal(first.hidden, again.hidden)
    assert torch.equal(first.hidden[1:], later.hidden[:-1])
    assert torch.equal(cells(first.hidden)[0].bool().all(-1).view(4, 4), model.random_mask(seed=4))


def test_a_mask_picture_is_white_where_it_masks(run, photos, tmp_path):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    shown = reconstruct(run, [str(photos[0])], mask=str(tmp_path / "mask.png"), out=str(tmp_path / "a.png"))
    assert shown.hidden[..., :16, :].all() and not shown.hidden[..., 16:, :].any()


# Mistakes


def test_one_broken_image_is_named_and_left_out(run, photos, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    shown = reconstruct(run, [str(tmp_path / "broken.png"), str(photos[0])], out=str(tmp_path / "a.png"))
    assert len(shown.original) == 1
    assert f"left out {tmp_path}/broken.png: is not an image" in capsys.readouterr().out


def test_more_than_sixteen_images_are_thinned_out(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "draw", lambda *_: None)
    write_images(tmp_path / "many", count=20, size=(32, 32))
    assert len(reconstruct(run, [str(tmp_path / "many")], out=str(tmp_path / "a.png")).original) == 16
    assert "showing 16 of 20 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"images": []}, "--images names none; give image files or folders"),
        ({"images": ["{tmp}/none.png"]}, "none.png' does not exist"),
        ({"images": ["{tmp}/broken"]}, "none of the images can be read, e.g. .*is not an image; give others"),
        ({"images": ["{tmp}/empty"]}, "has no images"),
        ({"out": "{tmp}/a.jpg"}, "a.jpg is neither .png nor .pdf; give one of them"),
        ({"out": "{tmp}/broken/0.png/a.png"}, "cannot write .*a.png: .*; choose another --out"),
        ({"block": [0, 0, 0.5, 0.5], "mask_ratio": 0.5}, "--mask_ratio, --block and --mask exclude each other"),
        ({"block": [0, 0, 0.5, 0.5], "mask": "m.png"}, "--mask_ratio, --block and --mask exclude each other"),
        ({"block": [0.5, 0, 0.2, 1]}, "--block .* is not allowed; give top, left, bottom, right in 0..1"),
        ({"block": [0, 0, 2, 1]}, "--block .* is not allowed; give top, left, bottom, right in 0..1"),
        ({"block": [0, 0, 1]}, "--block .* is not allowed; give top, left, bottom, right in 0..1"),
        ({"block": [0, 0, float("nan"), 1]}, "--block .* is not allowed; give top, left, bottom, right in 0..1"),
        ({"block": [0, 0, 1, 1]}, "the mask hides 16 of 16 patches; hide some, not all"),
        ({"block": [0, 0, 0.01, 0.01]}, "the mask hides 0 of 16 patches; hide some, not all"),
        ({"mask": "{tmp}/black.png"}, "the mask hides 0 of 16 patches"),
        ({"mask": "{tmp}/white.png"}, "the mask hides 16 of 16 patches"),
        ({"mask": "{tmp}/broken/0.png"}, "--mask .*0.png is not an image; give a picture in which white is masked"),
        ({"mask": "{tmp}/none.png"}, "--mask .*none.png is missing; give a picture"),
        ({"mask_ratio": 0.99}, "mask ratio 0.99 leaves 0 of 16 patches visible; choose"),
        ({"mask_ratio": 1.5}, "--mask_ratio 1.5 is not allowed; give more than 0 and less than 1"),
        ({"mask_ratio": float("nan")}, "--mask_ratio nan is not allowed; give more than 0 and less than 1"),
        ({"seed": -1}, "--seed -1 is not allowed; give 0 to"),
        ({"image_size": 36}, "patches of 8x8 do not tile an image of 36x36; choose --image_size"),
        ({"image_size": (0, 32)}, "must be positive"),
    ],
)
def test_a_mistake_is_said_in_one_line(options, reason, run, photos, tmp_path):
    for folder in ("broken", "empty"):
        (tmp_path / folder).mkdir()
    for number in range(3):
        (tmp_path / "broken" / f"{number}.png").write_bytes(b"no picture")
    for name in ("black", "white"):
        Image.new("L", (20, 20), name).save(tmp_path / f"{name}.png")

    def filled(value):
        return value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value

    given = {"images": [str(photos[0])], "out": str(tmp_path / "a.png")} | options
    given = {k: [filled(v) for v in value] if isinstance(value, list) else filled(value) for k, value in given.items()}
    with pytest.raises(UserError, match=reason) as caught:
        reconstruct(run, **given)
    said(caught)
    assert not (tmp_path / "a.png").exists()


def test_weights_without_decoders_say_which_file_is_needed(run, tmp_path):
    needed = "holds an encoder without decoders; give the run folder of mirl pretrain, its autoencoder.safetensors"
    shutil.copytree(run, tmp_path / "finetuned")
    (tmp_path / "finetuned" / "autoencoder.safetensors").unlink()
    for weights in (f"{run}/encoder", str(tmp_path / "finetuned")):
        with pytest.raises(UserError, match=needed) as caught:
            reconstruct(weights)
        said(caught)


def test_a_run_without_weights_or_images_of_its_own(run, photos, tmp_path):
    shutil.copytree(run, tmp_path / "begun", ignore=shutil.ignore_patterns("encoder", "*.safetensors"))
    with pytest.raises(UserError, match="begun holds no encoder yet; finish it with mirl pretrain --out") as caught:
        reconstruct(str(tmp_path / "begun"))
    said(caught)
    write_images(tmp_path / "data")
    write_run(tmp_path / "run", data=str(tmp_path / "data"), batch_size=2)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(UserError, match="the images of .*run are not to be had: .*does not exist.*--images") as caught:
        reconstruct(str(tmp_path / "run"))
    assert "--data" not in said(caught)
    assert len(reconstruct(str(tmp_path / "run"), [str(photos[0])]).original) == 1
    with pytest.raises(UserError, match="neither a file, a folder nor the name of a timm model") as caught:
        reconstruct(str(tmp_path / "none"))
    said(caught)


def test_the_command(run, photos, tmp_path, capsys):
    out = tmp_path / "a.pdf"
    arguments = ["reconstruct", run, "--images", *map(str, photos[:2]), str(photos[0].parent)]
    assert main([*arguments, "--block", "0.25", "0.25", "0.75", "0.75", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"%PDF")
    assert main([*arguments, "--mask_ratio", "0.5", "--image_size", "[48,64]", "--out", str(tmp_path / "b.png")]) == 0
    capsys.readouterr()
    assert main([*arguments, "--block", "0.25", "0.25"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors == ["mirl reconstruct: error: --block [0.25, 0.25] is not allowed; give top, left, bottom, right "
                      "in 0..1"]  # fmt: skip


def test_official_mirl_checkpoints(golden, photos, tmp_path, monkeypatch):
    """The tiny one's heads are told by no tensor, so it is converted first; a real one's are known by its width."""
    path = str(golden / "checkpoint-official.pd")
    with pytest.raises(UserError, match="does not tell the heads of a width of 48") as caught:
        reconstruct(path, [str(photos[0])])
    said(caught)
    mirl.convert(path, str(tmp_path / "tiny.safetensors"), to="safetensors", heads=4, decoder_heads=4)
    shown = reconstruct(str(tmp_path / "tiny.safetensors"), [str(photos[0])], out=str(tmp_path / "a.png"))
    assert len(shown.terms) == 3 and shown.original.shape == (1, 3, 32, 32)
    monkeypatch.setattr("mirl.formats.official_mirl.ENCODER_HEADS", {48: 4})
    monkeypatch.setattr("mirl.formats.official_mirl.DECODER_HEADS", {32: 4})
    direct = reconstruct(path, [str(photos[0])], out=str(tmp_path / "a.png"))
    torch.testing.assert_close(direct.terms[2].total, shown.terms[2].total, atol=1e-5, rtol=1e-5)


def test_official_mae_checkpoints(photos, tmp_path, monkeypatch):
    """A run of MAE under the official file's names gives what the run gives."""
    write_run(tmp_path / "run", method="mae", segments=None)
    model = load_autoencoder(str(tmp_path / "run"))
    torch.save({"model": join(model.state_dict(), official_mae.names_of(model))}, tmp_path / "mae.pth")
    monkeypatch.setattr(official_mae, "ENCODER_HEADS", {48: 4})
    monkeypatch.setattr(official_mae, "DECODER_HEADS", {32: 1})
    official, ours = (
        reconstruct(str(tmp_path / name), [str(photos[0])], out=str(tmp_path / "a.png")) for name in ("mae.pth", "run")
    )
    torch.testing.assert_close(official.terms[0].total, ours.terms[0].total, atol=1e-5, rtol=1e-5)


def test_images_that_came_since_the_run_are_warned_of(tiny, tmp_path, capsys):
    photos = tmp_path / "photos"
    first, *_ = write_images(photos, 20)
    run = mirl.pretrain(**tiny | {"data": str(photos), "epochs": 1, "batch_size": 8}, out=tmp_path / "run")
    reconstruct(str(run))
    assert "warning" not in capsys.readouterr().out
    shutil.copy(first, photos / "another.png")
    reconstruct(str(run))
    assert "the run began with 20 images and there are 21 now" in capsys.readouterr().out
