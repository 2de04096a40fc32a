"""Weights come back from every format as they went in; what a format cannot hold, or holds wrongly, is one line."""

import json
import re
import shutil
import socket
import subprocess
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
import transformers
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf
from tiny_classes import PATTERNS, PLAIN
from tiny_runs import COMMAND, ENVIRONMENT, assert_one_line, command, finish, rows

import mirl
from mirl.cli import main
from mirl.errors import UserError
from mirl.formats.shapes import Heads
from mirl.models.weights import AutoencoderWeights
from mirl.tasks.card import run_of
from mirl.tasks.convert import convert
from mirl.tasks.destinations import DESTINATIONS
from mirl.tasks.weights import open_checkpoint

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
WHOLE = ("safetensors", "huggingface_mae")  # formats that keep decoders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("converted")


@pytest.fixture
def runs(tiny, finished, classified, patterns, folder):
    """Return a function from a name to a finished run; each is made once, not to be changed."""

    def run(name):
        path = folder / name
        if name in ("mirl", "mean"):
            return finished if name == "mirl" else classified
        if name == "mae" and not path.exists():
            mirl.pretrain(**tiny | {"epochs": 1, "method": "mae"}, out=path)
        if name == "normed" and not path.exists():
            mirl.pretrain(**tiny | {"epochs": 1, "weight_norm": True}, out=path)
        if name == "cls" and not path.exists():
            mirl.finetune(weights=str(finished), data=patterns, **PLAIN | {"epochs": 1, "pool": "cls"}, out=path)
        return path

    return run


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the encoder of the finished run, that may be changed."""
    return shutil.copytree(finished / "encoder", tmp_path / "copy")


def mistake(function, *arguments, **options):
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(folder, to):
    """Return a path in `folder` that suits the format."""
    return folder / f"out{DESTINATIONS[to].suffix}"


def assert_same_tensors(left, right):
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def scores(model, images=IMAGES):
    with torch.no_grad():
        return model.eval()(images)


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


def test_an_encoder_may_be_converted_onto_itself(copy):
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


# Other people's readers


@pytest.fixture
def no_bars():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.mark.parametrize("converted", [False, True])
def test_transformers_opens_what_timm_opens(runs, tmp_path, no_bars, converted):
    """A run's encoder/ as it is, and `--to timm`."""
    folders = {name: runs(name) / "encoder" for name in ("mirl", "mean", "cls")}
    for name in folders if converted else ():
        folders[name] = convert(str(runs(name)), str(tmp_path / name), "timm").path
    encoder = transformers.AutoModel.from_pretrained(folders["mirl"]).eval()
    with torch.no_grad():
        torch.testing.assert_close(encoder(IMAGES).pooler_output, scores(mirl.load_encoder(str(runs("mirl")))))
    for name in ("mean", "cls"):
        classifier = transformers.AutoModelForImageClassification.from_pretrained(folders[name]).eval()
        expected = timm.create_model(f"local-dir:{folders[name]}", pretrained=True)
        with torch.no_grad():
            torch.testing.assert_close(classifier(IMAGES).logits, scores(expected))
        assert [classifier.config.id2label[i] for i in range(4)] == sorted(PATTERNS)


def test_huggingfaces_classifier_scores_as_the_run_and_knows_its_input(runs, tmp_path, no_bars):
    convert(str(runs("cls")), str(tmp_path / "vit"), "huggingface")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "vit").eval()
    assert type(model).__name__ == "ViTForImageClassification"
    with torch.no_grad():
        found = model(IMAGES).logits
    torch.testing.assert_close(found, scores(timm.create_model(f"local-dir:{runs('cls')}/encoder", pretrained=True)))
    assert model.config.label2id == {name: i for i, name in enumerate(sorted(PATTERNS))}
    said = json.loads((tmp_path / "vit" / "preprocessor_config.json").read_text())
    assert (said["size"], said["image_mean"]) == ({"height": 32, "width": 32}, [0.485, 0.456, 0.406])


# The hub


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's interface that an upload of small files uses; it keeps what was sent."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, self.headers["Authorization"], body))
        answer = {}
        if self.path == "/api/repos/create":
            answer = {"url": f"{self.server.address}/owner/name"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer["files"] = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"{self.server.address}/owner/name/commit/{'0' * 40}", "commitOid": "0" * 40}
        self.answer(self.server.status, answer)

    def do_GET(self):
        self.answer(self.server.status if self.server.status != 200 else 404, {})

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address, server.received, server.status = f"http://127.0.0.1:{server.server_port}", [], 200
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def upload(runs, tmp_path):
    """Return a function that runs `mirl convert` with --push_to_hub owner/name, against a hub at an address."""

    def run(address, *more, to="huggingface"):
        environment = ENVIRONMENT | {
            "HF_ENDPOINT": address, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(tmp_path),
            "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        arguments = ["convert", str(runs("mirl")), str(tmp_path / "out"), f"--to={to}", "--push_to_hub=owner/name"]
        done = subprocess.run([COMMAND, *arguments, *more], env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.parametrize(
    ("more", "visibility", "to"), [((), "private", "huggingface"), (("--public",), "public", "timm")]
)
def test_the_folder_is_uploaded_as_it_is(hub, upload, tmp_path, more, visibility, to):
    code, output, errors = upload(hub.address, *more, to=to)
    assert code == 0 and "Traceback" not in errors, errors
    assert f"uploaded {hub.address}/owner/name" in output
    assert {authorization for _, authorization, _ in hub.received} == {"Bearer hf_test"}
    sent = {path.split("?")[0]: body for path, _, body in hub.received}
    create = json.loads(sent["/api/repos/create"])
    assert (create["organization"], create["name"]) == ("owner", "name")
    assert create.get("visibility", "private" if create.get("private") else "public") == visibility
    lines = [json.loads(line) for line in sent["/api/models/owner/name/commit/main"].splitlines()]
    files = {line["value"]["path"]: b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
    expected = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert files == expected and {"README.md", "config.json", "model.safetensors"} <= files.keys()


def test_a_hub_that_refuses_is_one_line_and_the_folder_is_kept(hub, upload, tmp_path):
    hub.status = 401
    code, _, errors = upload(hub.address)
    assert_one_line(
        code, errors, r"cannot upload to owner/name \(.*401.*\); .*/out is written; log in with hf auth login"
    )
    assert open_checkpoint(str(tmp_path / "out")).depth == 4
    assert {path for path, _, _ in hub.received} == {"/api/repos/create"}


def test_a_hub_that_cannot_be_reached_is_one_line_and_the_folder_is_kept(upload, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        code, _, errors = upload(f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert_one_line(code, errors, r"cannot upload to owner/name \(.*refused\); .*/out is written")
    assert open_checkpoint(str(tmp_path / "out")).depth == 4


def test_a_file_is_not_uploaded(runs, tmp_path):
    message = mistake(convert, str(runs("mirl")), str(tmp_path / "a.onnx"), "onnx", push_to_hub="owner/name")
    assert message == "--push_to_hub uploads a folder; give --to timm, huggingface, huggingface_mae"
    assert list(tmp_path.iterdir()) == []


# The card


def card(folder):
    """Return the front matter of README.md, its table and its text."""
    text = (folder / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    table = dict(re.findall(r"^\| (\w+) \| (.+) \|$", body, re.M))
    return yaml.safe_load(header), table, text


def test_the_card_tells_recipe_and_losses(runs, tmp_path):
    run = runs("mirl")
    convert(str(run), str(tmp_path / "vit"), "huggingface")
    first, *_, last = rows(run, "held_out")
    losses = f"{first['loss']:.4g} before training, {last['loss']:.4g} after {last['step']} steps"
    assert first["loss"] != last["loss"]
    for folder, library in ((run / "encoder", "timm"), (tmp_path / "vit", "transformers")):
        header, table, text = card(folder)
        assert header["library_name"] == library and header["pipeline_tag"] == "image-feature-extraction"
        saved = yaml.safe_load((run / "config.yaml").read_text())
        assert (table["method"], table["epochs"], table["batch_size"]) == ("mirl", "1", "16")
        for name in ("base_lr", "mask_ratio", "seed", "schedule", "weight_decay"):
            assert table[name] == str(saved[name])
        assert losses in text


def test_the_card_of_a_classifier_tells_its_accuracy_and_no_path(runs, tmp_path, patterns):
    convert(str(runs("cls")), str(tmp_path / "vit"), "huggingface")
    for run, folder in (("mean", runs("mean") / "encoder"), ("cls", tmp_path / "vit")):
        header, table, text = card(folder)
        result = json.loads((runs(run) / "results.json").read_text())["weights"]
        assert header["pipeline_tag"] == "image-classification" and all(
            f"{i}. `{name}`" in text for i, name in enumerate(sorted(PATTERNS))
        )
        assert f"Top-1 accuracy (weights): {result['top1']:.2%}" in text
        assert table["data"] == "patterns" and str(patterns) not in text and "/tmp" not in text


def test_the_card_of_weights_without_a_run_says_so(copy, tmp_path):
    lonely = shutil.copytree(copy, tmp_path / "alone" / "a" / "encoder")
    convert(str(lonely), str(tmp_path / "out"), "timm")
    assert "Not known: these weights came without the folder of their run." in card(tmp_path / "out")[2]


# Loading in Python


@pytest.mark.parametrize("size", [(48, 64), (16, 32)])
def test_other_image_sizes_resample_positions_as_timm_does(finished, size):
    positions = load_file(finished / "encoder" / "model.safetensors")["pos_embed"]
    model = mirl.load_encoder(str(finished), image_size=size)
    expected = resample_abs_pos_embed(positions, [side // 8 for side in size], [4, 4], num_prefix_tokens=1)
    assert torch.equal(model.pos_embed, expected) and expected.shape != positions.shape
    assert scores(model, torch.zeros(1, 3, *size)).shape == (1, 192)


def test_at_the_trained_size_it_is_timms_model(finished, classified):
    for run in (finished, classified):
        model = mirl.load_encoder(str(run))
        expected = timm.create_model(f"local-dir:{run / 'encoder'}", pretrained=True)
        assert torch.equal(scores(model), scores(expected)) and not model.training
        assert model.pretrained_cfg["mean"] == tuple(expected.pretrained_cfg["mean"])


def test_arguments_of_timm_change_the_encoder(finished):
    headed, short = mirl.load_encoder(str(finished), num_classes=10), mirl.load_encoder(str(finished), depth=2)
    assert scores(headed).shape == (2, 10) and len(short.blocks) == 2
    state = load_file(finished / "encoder" / "model.safetensors")
    assert_same_tensors({k: v for k, v in headed.state_dict().items() if not k.startswith("head.")}, state)
    tokens = mirl.load_encoder(str(finished), global_pool="")
    assert scores(tokens).shape == (2, 17, 192)
    torch.testing.assert_close(scores(tokens)[:, 1:].mean(dim=1), scores(mirl.load_encoder(str(finished))))


def test_an_autoencoder_is_the_runs_and_a_classifier_is_none(runs):
    model = mirl.load_autoencoder(str(runs("mirl")))
    assert_same_tensors(model.state_dict(), load_file(runs("mirl") / "autoencoder.safetensors"))
    assert len(model.decoders) == 2 and not model.training
    for path in (runs("mean"), runs("mirl") / "encoder"):
        message = mistake(mirl.load_autoencoder, str(path))
        assert message.startswith(f"{path} holds an encoder without decoders; give the run folder")


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


def test_what_merely_lies_in_a_run_is_not_of_it(runs):
    run = Path(runs("mirl"))
    assert run_of(run) == run_of(run / "encoder") == run_of(run / "encoder" / "model.safetensors") == run.resolve()
    assert run_of(run / "autoencoder.safetensors") == run.resolve()
    assert [run_of(path) for path in (run / "other.pth", run / "pictures", run / "encoder" / "config.json")] == [
        None
    ] * 3
