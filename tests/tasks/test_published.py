"""What is made of a run for others: their readers open it, the hub gets it, its card tells of it, Python loads it."""

import json
import re
import shutil
import socket
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import transformers
import yaml
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from tiny_classes import PATTERNS
from tiny_runs import assert_one_line, assert_same_tensors, mistake, rows

import mirl
from mirl.cli import main
from mirl.tasks.card import model_card, run_of
from mirl.tasks.convert import convert
from mirl.tasks.weights import open_checkpoint

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def scores(model, images=IMAGES):
    with torch.no_grad():
        return model.eval()(images)


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
def upload(runs, tmp_path, monkeypatch, capsys):
    """Return a function that runs `mirl convert` with --push_to_hub owner/name, against a hub at an address."""

    def run(address, *more, to="huggingface"):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
        for name, value in (("HF_TOKEN", "hf_test"), ("NO_PROXY", "127.0.0.1")):
            monkeypatch.setenv(name, value)
        arguments = [str(runs("mirl")), str(tmp_path / "out"), f"--to={to}", "--push_to_hub=owner/name", *more]
        capsys.readouterr()
        return main(["convert", *arguments]), *capsys.readouterr()

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


def test_the_card_of_weights_without_a_run_says_so(finished, tmp_path):
    lonely = shutil.copytree(finished / "encoder", tmp_path / "alone" / "a" / "encoder")
    convert(str(lonely), str(tmp_path / "out"), "timm")
    assert "Not known: these weights came without the folder of their run." in card(tmp_path / "out")[2]


def test_what_is_damaged_beside_the_weights_is_left_out(runs, tmp_path):
    run = shutil.copytree(runs("mirl"), tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "held_out", "steps": {"a": 1}')  # cut short behind an inner end
    (run / "config.yaml").write_text("a: [1")
    (run / "results.json").write_text("{")
    text = model_card(open_checkpoint(str(run)), run, "timm")
    assert "## Training\n\nNot known" in text and f"after {rows(runs('mirl'), 'held_out')[-1]['step']} steps" in text
    (run / "results.json").write_text('{"weights": {"top1": 0.5}}')  # without its interval
    assert "Top-1" not in model_card(open_checkpoint(str(run)), run, "timm")


def test_what_merely_lies_in_a_run_is_not_of_it(runs):
    run = Path(runs("mirl"))
    assert run_of(run) == run_of(run / "encoder") == run_of(run / "encoder" / "model.safetensors") == run.resolve()
    assert run_of(run / "autoencoder.safetensors") == run.resolve()
    assert [run_of(path) for path in (run / "other.pth", run / "pictures", run / "encoder" / "config.json")] == [
        None
    ] * 3


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
