"""Weights come back from every format as they went in; what a format cannot hold, or holds wrongly, is one line."""

import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from tiny_classes import PATTERNS
from tiny_runs import assert_one_line, assert_same_tensors, command, finish, mistake

import mirl
from mirl.cli import main
from mirl.formats.shapes import Heads
from mirl.models.weights import AutoencoderWeights
from mirl.tasks.convert import convert
from mirl.tasks.destinations import DESTINATIONS
from mirl.tasks.weights import open_checkpoint

WHOLE = ("safetensors", "huggingface_mae")  # formats that keep decoders


def written(folder, to):
    """Return a path in `folder` that suits the format."""
    return folder / f"out{DESTINATIONS[to].suffix}"


# Round trips


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("mirl", "timm"), ("mirl", "huggingface"), ("mirl", "safetensors"), ("mirl", "onnx"), ("mirl", "torch_export"),
        ("mae", "huggingface"), ("mae", "huggingface_mae"), ("mae", "safetensors"),
        ("mean", "timm"), ("mean", "safetensors"),
        ("cls", "timm"), ("cls", "huggingface"), ("cls", "safetensors"), ("cls", "onnx"), ("cls", "torch_export"),
    ],
)  # fmt: skip
def test_there_and_back_is_the_identity(runs, tmp_path, name, to):
    run, there, back = str(runs(name)), written(tmp_path, to), tmp_path / "back.safetensors"
    conversion = convert(run, str(there), to)
    assert conversion.path == there and conversion.source_difference is None
    assert conversion.difference < 1e-5 and conversion.scale > 0.01
    assert convert(str(there), str(back), "safetensors").difference < 1e-5
    expected, found = open_checkpoint(run, decoders=to in WHOLE), open_checkpoint(str(back))
    assert_same_tensors(found.state, expected.state)
    assert isinstance(found, AutoencoderWeights) == (to in WHOLE and name in ("mirl", "mae"))
    if isinstance(found, AutoencoderWeights):
        # ViTMAE tells the form, and the decoders' heads even where the run left them to choice.
        names = found.settings.keys() - {"decoder_heads"} if to == "huggingface_mae" else expected.settings.keys()
        assert {name: found.settings[name] for name in names} == {name: expected.settings[name] for name in names}
    else:
        for part in ("architecture", "arguments", "mean", "deviation", "classes"):
            assert getattr(found, part) == getattr(expected, part), part
        assert found.classes == (tuple(sorted(PATTERNS)) if name in ("mean", "cls") else ())


@pytest.mark.parametrize("to", ["timm", "huggingface"])
def test_a_whole_autoencoder_gives_its_encoder(runs, tmp_path, to):
    """From the file that has the decoders, as from the run."""
    convert(f"{runs('mirl')}/autoencoder.safetensors", str(written(tmp_path, to)), to)
    found = open_checkpoint(str(written(tmp_path, to)))
    assert_same_tensors(found.state, open_checkpoint(str(runs("mirl"))).state)


@pytest.mark.parametrize(
    ("name", "to", "message"),
    [
        ("mirl", "huggingface_mae", "holds what --method mae trains, and these weights are of mirl; give --to hugg"),
        ("mean", "huggingface", "reads the class token, and this classifier the mean over patches: open its encoder/"),
        ("mean", "huggingface_mae", "has no decoder; give the run folder of mirl pretrain --method mae"),
        ("cls", "huggingface_mae", "has no decoder; give the run folder of mirl pretrain --method mae"),
    ],
)
def test_what_a_format_cannot_hold_is_one_line_and_writes_nothing(runs, tmp_path, name, to, message):
    assert message in mistake(convert, str(runs(name)), str(tmp_path / "out"), to)
    assert list(tmp_path.iterdir()) == []


def test_the_command_converts_quietly_and_says_what_it_checked(runs, tmp_path):
    out = tmp_path / "vit"
    code, output, errors = finish(command({}, str(runs("cls")), str(out), "--to=huggingface", task="convert"))
    assert (code, errors) == (0, "")
    assert re.search(r"source .*: vit_ti_4, 32x32 px, patches of 8x8, 4 classes, 1.8 M numbers", output)
    assert re.search(r"checked .* as huggingface against the source: largest difference \d", output)
    found, expected = open_checkpoint(str(out)), open_checkpoint(str(runs("cls")))
    assert_same_tensors(found.state, expected.state)


def test_the_public_name_is_the_function():
    """Whatever modules are loaded by now."""
    assert mirl.convert is convert


# The destination


def test_what_is_there_is_kept_unless_overwritten(runs, tmp_path):
    run, out = str(runs("mirl")), tmp_path / "out"
    convert(run, str(out), "timm")
    (out / "mine.txt").write_text("dear")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert mistake(convert, run, str(out), "timm").startswith(f"{out} exists; add --overwrite, or give another")
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    convert(str(runs("mean")), str(out), "timm", overwrite=True)
    assert not (out / "mine.txt").exists() and open_checkpoint(str(out)).classes
    file = tmp_path / "out.safetensors"
    file.write_text("dear")
    assert "exists; add --overwrite" in mistake(convert, run, str(file), "safetensors")
    assert file.read_text() == "dear"
    convert(run, str(file), "safetensors", overwrite=True)
    assert isinstance(open_checkpoint(str(file)), AutoencoderWeights)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.safetensors"}


def test_a_folder_of_other_things_is_never_replaced(runs, tmp_path):
    """Such as the run itself."""
    run = shutil.copytree(runs("mirl"), tmp_path / "run")
    message = mistake(convert, str(run), str(run), "timm", overwrite=True)
    assert message == f"{run} is not a model's folder, and --overwrite would delete it; give another destination"
    assert (run / "autoencoder.safetensors").exists() and (run / "checkpoints").exists()


def test_an_encoder_may_be_converted_onto_itself(finished, tmp_path):
    copy = shutil.copytree(finished / "encoder", tmp_path / "copy")
    expected = open_checkpoint(str(copy)).state
    convert(str(copy), str(copy), "timm", overwrite=True)
    assert_same_tensors(open_checkpoint(str(copy)).state, expected)


def test_a_neighbour_of_a_similar_name_is_kept(runs, tmp_path):
    for name in ("new-out", "out.tmp"):
        (tmp_path / name).mkdir()
    convert(str(runs("mirl")), str(tmp_path / "out"), "timm")
    assert {path.name for path in tmp_path.iterdir()} == {"new-out", "out", "out.tmp"}


@pytest.mark.parametrize(("to", "suffix"), [(to, kind.suffix) for to, kind in DESTINATIONS.items() if kind.suffix])
def test_another_ending_is_one_line(runs, tmp_path, to, suffix):
    message = mistake(convert, str(runs("mirl")), str(tmp_path / "out.bin"), to)
    assert message == f"--to {to} writes a file; give a destination that ends in {suffix}"


@pytest.mark.parametrize("to", ["timm", "huggingface", "safetensors", "onnx", "torch_export"])
def test_a_place_that_cannot_be_written_is_one_line(runs, tmp_path, to):
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", "/proc"):
        message = mistake(convert, str(runs("mirl")), f"{place}/out{DESTINATIONS[to].suffix}", to)
        assert re.search(f"cannot write {place}/out.*; give another destination", message)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_missing_source_is_one_line(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert_one_line(2, capsys.readouterr().err, "nowhere' is neither a file, a folder nor the name of a timm model")
    assert list(tmp_path.iterdir()) == []


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("to", "error"),
    [
        ("timm", FULL), ("huggingface", FULL), ("safetensors", FULL), ("onnx", FULL), ("torch_export", FULL),
        ("safetensors", SafetensorError("I/O error: No space left on device")), ("safetensors", KeyboardInterrupt()),
    ],
    ids=repr,
)  # fmt: skip
def test_a_conversion_that_fails_half_way_leaves_what_was_there(runs, tmp_path, monkeypatch, to, error):
    out = written(tmp_path, to)
    kept = out / "config.json" if to in ("timm", "huggingface") else out
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("dear")
    if kept != out:
        (out / "model.safetensors").touch()

    def half(_, path, *rest, **more):
        with open(path, "w") as file:
            file.write("half")
        raise error

    def no_card(path, text):
        raise error

    monkeypatch.setattr("mirl.training.checkpoints.save_file", half)
    monkeypatch.setattr("torch.onnx.ONNXProgram.save", half)
    monkeypatch.setattr("torch.export.save", half)
    monkeypatch.setattr("pathlib.Path.write_text", no_card)  # a folder's last file
    with pytest.raises(BaseException) as caught:
        convert(str(runs("mirl")), str(out), to, overwrite=True)
    monkeypatch.undo()
    if isinstance(error, KeyboardInterrupt):
        assert caught.value is error
    else:
        assert re.fullmatch(f"cannot write {out}: .*No space left.*; give another destination", str(caught.value))
    assert list(tmp_path.iterdir()) == [out] and kept.read_text() == "dear"
    assert kept == out or sorted(out.iterdir()) == [kept, out / "model.safetensors"]


# Both sides are compared


@pytest.mark.parametrize("to", ["huggingface", "safetensors"])
def test_a_file_that_differs_is_reported(runs, tmp_path, monkeypatch, to):
    def damaged(tensors, path, metadata):
        (name,) = [name for name in tensors if re.search(r"(layer|blocks)\.2\..*(fc1|intermediate\.dense)\.bias", name)]
        save_file(tensors | {name: tensors[name] + 0.01}, path, metadata=metadata)

    monkeypatch.setattr("mirl.training.checkpoints.save_file", damaged)
    message = mistake(convert, str(runs("mirl")), str(written(tmp_path, to)), to)
    assert re.search(rf"and what was written as {to} differ by \d\.\de-\d\d in outputs of up to \d", message)
    assert list(tmp_path.glob("out*")) == [] == list(tmp_path.glob(".unfinished*"))


def test_a_file_of_not_a_number_is_reported(runs, tmp_path, monkeypatch):
    def damaged(tensors, path, metadata):
        spoiled = {name: value * torch.nan if name.endswith("norm.bias") else value for name, value in tensors.items()}
        save_file(spoiled, path, metadata=metadata)

    monkeypatch.setattr("mirl.training.checkpoints.save_file", damaged)
    message = mistake(convert, str(runs("mirl")), str(tmp_path / "out.safetensors"), "safetensors")
    assert "differ by nan" in message


def test_the_official_checkpoint_is_compared_with_its_own_tensors(golden, tmp_path):
    source, out = str(golden / "checkpoint-official.pd"), tmp_path / "out.safetensors"
    conversion = convert(source, str(out), "safetensors", heads=4, decoder_heads=4)
    assert conversion.source_difference < 1e-5 and conversion.difference < 1e-5
    expected, found = open_checkpoint(source, heads=Heads(4, 4), decoders=True), open_checkpoint(str(out))
    assert_same_tensors(found.state, expected.state)
    assert found.settings == expected.settings


def test_other_taps_than_the_official_checkpoints_give_another_model(golden, tmp_path):
    source = str(golden / "checkpoint-official.pd")
    outputs = []
    for taps in ([2, 4, 6, 8, 10, 12], [1, 4, 6, 8, 10, 12]):
        out = tmp_path / f"{taps}.safetensors"
        convert(source, str(out), "safetensors", heads=4, decoder_heads=4, taps=taps)
        model = mirl.load_autoencoder(str(out))
        order = torch.arange(64)[None]
        with torch.no_grad():
            torch.manual_seed(0)
            outputs.append(model(torch.randn(1, 64, 48), order[:, :16], order[:, 16:])[0])
    assert not torch.allclose(*outputs, atol=1e-3)


@pytest.mark.parametrize("arguments", [{}, {"img_size": 96, "num_classes": 0}], ids=str)
def test_a_folder_that_timm_wrote_is_converted(tmp_path, arguments):
    """It tells only what differs from the architecture's own form."""
    model = timm.create_model("test_vit2", **arguments)
    save_for_hf(model, str(tmp_path / "timm"), model_args=arguments, safe_serialization=True)
    convert(str(tmp_path / "timm"), str(tmp_path / "back.safetensors"), "safetensors")
    found = open_checkpoint(str(tmp_path / "back.safetensors"))
    assert_same_tensors(found.state, model.state_dict())
    assert found.name == "vit_64x2_8" and found.image_size == ((96, 96) if arguments else (160, 160))


# Folding


def test_folded_predictions_are_equal_and_plain(runs, tmp_path):
    run, out = str(runs("normed")), tmp_path / "out.safetensors"
    assert convert(run, str(out), "safetensors", fold_weight_norm=True).difference < 1e-5
    before, after = mirl.load_autoencoder(run), mirl.load_autoencoder(str(out))
    assert any("parametrizations" in name for name in before.state_dict())
    assert not any("parametrizations" in name for name in after.state_dict())
    assert open_checkpoint(str(out)).settings["weight_norm"] is False
    order = torch.arange(16)[None]
    with torch.no_grad():
        inputs = (torch.randn(1, 16, 192), order[:, :4], order[:, 4:])
        for left, right in zip(before(*inputs), after(*inputs), strict=True):
            torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-5)
            assert left.std() > 0.01


@pytest.mark.parametrize(("name", "to"), [("mirl", "safetensors"), ("mean", "timm")])
def test_where_there_is_nothing_to_fold_folding_is_one_line(runs, tmp_path, name, to):
    message = mistake(convert, str(runs(name)), str(written(tmp_path, to)), to, fold_weight_norm=True)
    assert message == "there are no weight-normalised predictions to fold; leave out --fold_weight_norm"
    assert list(tmp_path.iterdir()) == []


# Sources of other makes


def test_half_precision_becomes_whole(runs, tmp_path):
    folder = Path(shutil.copytree(Path(runs("mirl")) / "encoder", tmp_path / "half"))
    state = {name: value.half() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors")
    assert convert(str(folder), str(tmp_path / "out"), "huggingface").difference < 1e-5
    found = open_checkpoint(str(tmp_path / "out")).state
    assert_same_tensors(found, {name: value.float() for name, value in state.items()})


@pytest.mark.parametrize("classes", [0, 3])
def test_timms_own_class_token_models_fit_hugging_face(tmp_path, classes):
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=classes)
    save_for_hf(model, str(tmp_path / "timm"), model_args={"depth": 2, "img_size": 32}, safe_serialization=True)
    found = convert(str(tmp_path / "timm"), str(tmp_path / "out"), "huggingface")
    assert found.difference < 1e-5 < found.scale
    expected = ("0", "1", "2") if classes else ()
    assert open_checkpoint(str(tmp_path / "out")).classes == expected
