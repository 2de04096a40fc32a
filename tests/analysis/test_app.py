"""The page does what its controls say, in a real browser too, and neither loads from nor sends to anywhere else."""

import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_reconstructions import write_images, write_run
from tiny_runs import ENVIRONMENT

from mirl.analysis import app as module
from mirl.analysis.app import app, build, open_file, pictures, take, update
from mirl.analysis.reconstruct import Reconstructor
from mirl.cli import main
from mirl.data.decode import read_image
from mirl.data.transforms import fixed_view
from mirl.errors import UserError

gr = pytest.importorskip("gradio", reason="gradio, an optional dependency, is not installed")
COMMAND = str(Path(sys.executable).with_name("mirl"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two pairs on 32 px, 16 patches, that holds two images out; made once, not to be changed."""
    folder = tmp_path_factory.mktemp("app") / "run"
    write_run(folder, model="vit_48x4_4", segments=4)
    return str(folder)


@pytest.fixture
def model(run):
    return Reconstructor(run)


@pytest.fixture
def layout():
    """Return a function that builds a page and gives its components; Gradio leaves event loops to the collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield lambda *given: list(build(*given).blocks.values())
        gc.collect()


def noise(*shape):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def painting(*boxes, side=384):
    """Return what Gradio gives of a canvas on which boxes (top, left, bottom, right) are painted, in patches of 16."""
    layer = np.zeros((side, side, 4), np.uint8)
    for top, left, bottom, right in boxes:
        layer[top * side // 4 : bottom * side // 4, left * side // 4 : right * side // 4] = (128, 128, 128, 255)
    return {"background": np.zeros_like(layer), "layers": [layer], "composite": layer}


def grey(picture):
    """Return bool [4, 4]: which patches of a picture [h, w, 3] are the grey of masked ones."""
    side = len(picture) // 4
    return (picture.reshape(4, side, 4, side, 3) == 128).all((1, 3, 4))


NOTHING = {"background": None, "layers": [], "composite": None}


# What the controls do


def test_pictures_are_the_reconstructors_enlarged_without_blur(model):
    image, hidden = noise(3, 32, 32), model.random_mask()
    shown = pictures(model, image, hidden)
    assert len(shown) == 1 + 2 * 4
    assert all(picture.dtype == np.uint8 and picture.shape == (9 * 32, 9 * 32, 3) for picture in shown)
    expected = model(image[None], hidden[None])
    whole = [expected.masked]
    for term in expected.terms:
        whole += [term.main, term.residual, term.total, term.pasted]
    for picture, true in zip(shown, whole, strict=True):
        pixels = (true[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        assert (picture.reshape(32, 9, 32, 9, 3) == pixels[:, None, :, None]).all()
    assert np.array_equal(grey(shown[0]), hidden.numpy())


def test_a_random_mask_is_that_of_mirl_reconstruct(model):
    image = noise(3, 32, 32)
    *shown, how, line = update(model, image, "random", 0.5, 3, None)
    assert (how, line) == ("random", "8 of 16 patches masked")
    assert np.array_equal(grey(shown[0]), model.random_mask(0.5, 3).numpy())
    fewer, other = (update(model, image, "random", *given, None) for given in ((0.25, 3), (0.5, 4)))
    assert fewer[-1] == "4 of 16 patches masked"
    assert not np.array_equal(fewer[0], shown[0]) and not np.array_equal(other[0], shown[0])


def test_paint_masks_the_patches_it_covers(model):
    image, drawing = noise(3, 32, 32), painting((0, 0, 1, 1), (1, 2, 3, 4))
    *shown, how, line = update(model, image, "random", 0.5, 0, drawing, now="painted")
    expected = np.zeros((4, 4), bool)
    expected[0, 0] = expected[1:3, 2:] = True
    assert (how, line) == ("painted", "5 of 16 patches masked")
    assert np.array_equal(grey(shown[0]), expected)
    # the ratio and the seed take over when they are moved, and paint is still there when it is chosen again
    assert update(model, image, how, 0.5, 0, drawing, now="random")[-2:] == ["random", "8 of 16 patches masked"]
    assert update(model, image, "painted", 0.5, 0, drawing)[-2:] == ["painted", "5 of 16 patches masked"]


def test_a_new_image_on_which_nothing_is_painted_does_not_choose_paint(model):
    for drawing in (None, NOTHING, painting()):
        assert update(model, noise(3, 32, 32), "random", 0.5, 0, drawing, now="painted")[-2] == "random"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ((None, "random", 0.5, 0, None), "drop an image to begin"),
        ((noise(3, 32, 32), "painted", 0.5, 0, painting((0, 0, 4, 4))), "the mask hides 16 of 16 patches"),
        ((noise(3, 32, 32), "painted", 0.5, 0, painting()), "the mask hides 0 of 16 patches"),
        ((noise(3, 32, 32), "painted", 0.5, 0, NOTHING), "the mask hides 0 of 16 patches"),
        ((noise(3, 32, 32), "painted", 0.5, 0, None), "the mask hides 0 of 16 patches"),
        ((noise(3, 32, 32), "random", 0.99, 0, None), "leaves 0 of 16 patches visible"),
        ((noise(3, 32, 32), "random", 0.5, -1, None), "--seed -1 is not allowed"),
    ],
)
def test_a_mistake_is_said_and_the_pictures_stay(given, reason, model):
    *shown, how, line = update(model, *given)
    assert shown == [gr.skip()] * (1 + 2 * 4) and how == given[1]
    assert reason in line and "\n" not in line


def test_emptied_numbers_are_the_runs_own(model):
    assert update(model, noise(3, 32, 32), "random", None, None, None)[-1] == "12 of 16 patches masked"


def test_files_are_opened_as_the_model_sees_them(model, tmp_path):
    (path,) = write_images(tmp_path, count=1, size=(50, 90))
    image, canvas = open_file(model, str(path))
    assert torch.equal(image, fixed_view(read_image(path), (32, 32)))
    assert canvas["layers"] == [] and canvas["background"].shape == (12 * 32, 12 * 32, 3)
    assert np.array_equal(canvas["background"][::12, ::12], image.permute(1, 2, 0).numpy())


def test_a_bad_file_is_warned_of_and_changes_nothing(model, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(gr, "Warning", said.append)
    path = tmp_path / "<b>.png"
    path.write_bytes(b"no picture")
    assert open_file(model, str(path)) == (gr.skip(), gr.skip())
    assert said == ["&lt;b&gt;.png is not an image"]


@pytest.mark.parametrize("channels", [1, 5])
def test_other_channels_are_shown_by_the_first_or_the_first_three(channels, layout, tmp_path):
    (path,) = write_images(tmp_path / "data", count=1, channels=channels)
    write_images(tmp_path / "data", count=3, channels=channels)
    write_run(tmp_path / "run", channels=channels, data=str(tmp_path / "data"), batch_size=2)
    model = Reconstructor(str(tmp_path / "run"))
    image, canvas = open_file(model, str(path))
    assert image.shape == (channels, 32, 32) and canvas["background"].shape == (384, 384, 3)
    *shown, _, line = update(model, image, "random", 0.5, 0, None)
    assert line == "8 of 16 patches masked" and len(shown) == 5
    assert any(isinstance(block, gr.ImageEditor) for block in layout(model, [image]))


@pytest.mark.parametrize("options", [{"method": "mae", "segments": None}, {"segments": 1}, {"image_size": [16, 48]}])
def test_pages_of_other_methods_and_sizes(options, layout, tmp_path):
    task = write_run(tmp_path / "run", **options)
    model = Reconstructor(str(tmp_path / "run"))
    image = noise(3, *model.image_size)
    shown = pictures(model, image, model.random_mask())
    labels = [block.label for block in layout(model, []) if isinstance(block, gr.Image)]
    parts = ["main component", "residual", "sum"] if len(task.method.taps) > 1 else ["reconstruction"]
    assert labels == ["what the encoder sees", *parts, "with the visible patches"] and len(shown) == len(labels)
    height, width = model.image_size
    assert {picture.shape[0] / picture.shape[1] for picture in shown} == {height / width}
    assert take(model, image)[1]["background"].shape[0] * width == take(model, image)[1]["background"].shape[1] * height


def test_a_dab_of_the_brush_masks_one_patch_in_its_middle_and_never_none(model):
    y, x = np.mgrid[:384, :384] + 0.5
    radius = module.BRUSH * 96
    for row, column in ((144, 144), (192, 192), (96, 144), (150, 183), (0.5, 0.5)):
        dab = (y - row) ** 2 + (x - column) ** 2 <= radius**2
        masked = int(model.drawn_mask(torch.from_numpy(dab)).sum())
        assert masked == 1 if (row, column) == (144, 144) else masked >= 1


# The command


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--port", "0"], "--port 0 is not allowed; give 1 to 65535"),
        (["--image_size", "33"], "patches of 8x8 do not tile an image of 33x33"),
    ],
)
def test_a_mistake_of_the_command_is_one_line(arguments, reason, run, capsys):
    assert main(["app", run, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mirl app: error: ") and reason in line


def test_without_gradio_the_command_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=re.escape("mirl app needs gradio; run pip install 'mirl[app]'")):
        app(run)


@contextmanager
def served(run, *arguments):
    """Start `mirl app` as users do; yields the process and its address."""
    environment = ENVIRONMENT | {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    process = subprocess.Popen(
        [COMMAND, "app", run, "--open_browser", "false", *arguments], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        # A shell lets what it starts in the background, tests too, ignore Ctrl-C.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        printed = ""
        while not (address := re.search(r"the page is (\S+)", printed)):
            line = process.stdout.readline()
            assert line, f"mirl app ended: {printed}"
            printed += line
        yield process, address[1]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def browser():
    """Return a function that opens a page and lists what it asks of others and complains of."""
    sync_playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").sync_playwright
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

        def visit(address, width=1280, height=900):
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(120_000)  # a busy machine may be slow
            elsewhere, complaints = [], []

            def only_here(route):
                if route.request.url.startswith((address, "data:", "blob:")):
                    return route.continue_()
                elsewhere.append(route.request.url)
                return route.abort()

            page.route("**/*", only_here)
            page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.goto(address)
            return page, elsewhere, complaints

        yield visit
        browser.close()


def test_the_page_in_a_browser(run, browser, tmp_path):
    """Loads, opens a file, follows the slider, the button and the brush, warns of a bad file; Ctrl-C ends it."""
    (photo,) = write_images(tmp_path, count=1, size=(64, 64))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with served(run) as (process, address):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
        page, elsewhere, complaints = browser(address)
        message = page.locator("#message")

        def shown():
            return page.locator("#pictures img").evaluate_all("all => all.map(image => image.src)")

        def until(line):
            """Wait for the line below the canvas; return the pictures, all of which are others than before."""
            message.get_by_text(line, exact=True).wait_for()
            page.wait_for_function(
                "before => { const now = [...document.querySelectorAll('#pictures img')];"
                "return now.length == 9 && now.every((image, i) => image.src != before[i] && image.complete"
                " && image.naturalWidth == 288) }",
                arg=until.before,
            )  # fmt: skip
            until.before = shown()

        until.before = []
        until("12 of 16 patches masked")
        titles = page.locator("#pictures label").all_inner_texts()
        assert [title.strip() for title in titles] == ["what the encoder sees"] + 2 * [
            "main component", "residual", "sum", "with the visible patches"
        ]  # fmt: skip
        assert page.locator("#chosen img").count() == 6  # those that the run held out

        page.locator("#file input[type=file]").set_input_files(photo)
        until("12 of 16 patches masked")
        for ratio in ("0.6", "0.5"):  # as one that is dragged, which says more than once where it is
            page.get_by_role("slider").first.fill(ratio)
        until("8 of 16 patches masked")
        page.get_by_role("button", name="another random mask").click()
        page.wait_for_function(
            "before => document.querySelector('#pictures img').src != before[0]", arg=until.before
        )  # fmt: skip
        until.before = shown()

        box = page.locator("#canvas canvas").first.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + 2, y + 2, steps=3)
        page.mouse.up()
        until("4 of 16 patches masked")  # where four patches meet
        assert page.get_by_label("painted", exact=True).is_checked()

        page.locator("#canvas button[title='Clear canvas']").click()
        message.get_by_text("the mask hides 0 of 16 patches; hide some, not all").wait_for()
        page.get_by_label("random", exact=True).click()
        until("8 of 16 patches masked")

        page.locator("#file button[aria-label=Clear], #file button[aria-label=Remove]").first.click()
        page.locator("#file input[type=file]").set_input_files(tmp_path / "bad.png")
        page.get_by_text("bad.png is not an image").wait_for()
        assert message.get_by_text("8 of 16 patches masked", exact=True).is_visible() and shown() == until.before
        assert elsewhere == [] and complaints == []

        small, elsewhere, complaints = browser(address, 390, 844)
        small.locator("#message").get_by_text("12 of 16 patches masked").wait_for()
        assert small.evaluate("document.documentElement.scrollWidth") <= 390
        assert elsewhere == [] and complaints == []

        port = address.rpartition(":")[2].strip("/")
        second = subprocess.run(
            [COMMAND, "app", run, "--open_browser", "false", "--port", port], env=ENVIRONMENT, text=True,
            capture_output=True, timeout=200,
        )  # fmt: skip
        assert second.returncode == 2
        assert second.stderr.splitlines() == [
            f"mirl app: error: no page can be served at 127.0.0.1:{port}; choose another --port"
        ]

        folders = {path.name for path in Path(os.environ.get("TMPDIR", "/tmp")).glob("mirl-app-*")}
        process.send_signal(signal.SIGINT)
        try:
            output, _ = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # Python then says what each thread is doing
            pytest.fail(f"Ctrl-C did not end it: {process.communicate()[0]}")
        assert process.returncode == 128 + signal.SIGINT, output
        assert "Traceback" not in output
        left = {path.name for path in Path(os.environ.get("TMPDIR", "/tmp")).glob("mirl-app-*")}
        assert folders - left  # uploads and pictures are gone
