"""`mirl app`: mask an image by hand in the browser and see what each pair of decoders makes of it.

The page is Gradio's, served on this machine alone: nothing is loaded from or sent to any other. A session of the page
keeps its image as the model sees it, so that images of any number of channels can be shown.
Symbols: c channels, h and w pixels of the model's image, gh and gw rows and columns of patches.
"""

import html
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mirl.analysis.reconstruct import Reconstructor, columns_of, read_images, titles_of
from mirl.data.decode import BadImage, read_image
from mirl.data.transforms import fixed_view
from mirl.errors import UserError
from mirl.tasks.settings.reconstruction import AppOptions
from mirl.training.reconstructions import label, to_rgb
from mirl.training.runs import console

HOST = "127.0.0.1"
CANVAS, PICTURE = 400, 300  # pixels that the longer side is to have about; smaller images are enlarged by whole factors
PAINT = "#808080"  # the grey of masked patches
BRUSH = 0.8  # radius in sides of a patch: wherever it dabs at least one patch is masked, in a patch's middle that alone

Mask = Literal["random", "painted"]
Drawing = dict[str, Any] | None  # Gradio's: `background` and `layers`, uint8 [height, width, RGBA]

LEGEND = {
    "main component": "what the shallow decoder predicts",
    "residual": "what the deep decoder adds, around grey",
    "coarse part": "what the decoder of the image's coarse part predicts",
    "fine part": "what the decoder of its fine part predicts, around grey",
    "sum": "both together; the loss sees its masked patches only",
    "reconstruction": "what the decoder predicts; the loss sees its masked patches only",
    "with the visible patches": "the same, with the visible patches of the image itself",
}
# Labels above pictures, not on them; small images crisp; no tools that have nothing to choose from.
CSS = """
.gradio-container { max-width: 1500px !important; }
footer, #canvas button[title="Color"] { display: none !important; }
#file .upload-container { min-height: 110px; }
#chosen .grid-wrap { min-height: 0; padding: 0; }
#chosen .grid-container { padding: 0; }
#pictures .block, #chosen { border-width: 0 !important; overflow: visible !important; }
:is(#pictures, #chosen) [data-testid="block-label"] {
    position: static; border: none; padding: 0 0 4px; background: none;
}
:is(#pictures, #chosen) [data-testid="block-label"] span { display: none; }
#pictures :is(.image-container, .image-container > button, .image-frame) { width: 100%; }
#pictures img { width: 100%; height: auto; border-radius: 4px; image-rendering: pixelated; }
#pictures .icon-button-wrapper { opacity: 0; }
#pictures .block:is(:hover, :focus-within) .icon-button-wrapper { opacity: 1; }
"""


def app(run: str, **options: Any) -> None:
    """Mask images by hand in the browser and see each pair's prediction; ends with Ctrl-C.

    Takes the fields of `mirl.AppOptions`, e.g. `mirl.app("runs/a", port=8000)`.

    Raises:
        UserError: if Gradio is not installed, `run` holds no decoders, or the port is taken.
        KeyboardInterrupt: at Ctrl-C, once the page is closed.
    """
    given = AppOptions(run=run, **options)
    try:
        import gradio as gr
    except ImportError as error:
        raise UserError("mirl app needs gradio; run pip install 'mirl[app]'") from error
    model = Reconstructor(given.run, image_size=given.image_size)
    try:
        examples = read_images(given.run, None, model)[0]
    except UserError as error:
        examples = []
        console.print(f"no examples: {str(error).partition('; ')[0]}", markup=False)
    with _folder_of_its_own():
        page = build(model, examples)
        font = gr.themes.Base(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
        try:
            _, address, _ = page.launch(
                server_name=HOST, server_port=given.port, share=False, ssr_mode=False, mcp_server=False, pwa=False,
                enable_monitoring=False, run_history=False, footer_links=[], quiet=True, inbrowser=given.open_browser,
                prevent_thread_lock=True, theme=font, css=CSS,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"no page can be served at {HOST}:{given.port or 7860}; choose another --port") from error
        console.print(f"the page is {address} · Ctrl-C ends it", markup=False)
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)


@contextmanager
def _folder_of_its_own() -> Iterator[None]:
    """Let Gradio keep uploads and pictures in a folder that ends with the page."""
    name = "GRADIO_TEMP_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(prefix="mirl-app-", ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            os.environ.pop(name) if before is None else os.environ.update({name: before})


def build(model: Reconstructor, examples: Sequence[Tensor]) -> Any:
    """Build the page, a `gradio.Blocks`.

    Args:
        examples: uint8 [c, h, w] of the model's image size, to choose from; the first is shown at the start.
    """
    import gradio as gr

    (height, width), (gh, gw) = model.image_size, model.grid
    factor = _factor(model, CANVAS)
    brush = round(BRUSH * max(model.patch_size) * factor)
    first = examples[0] if examples else None

    def choose(event: gr.SelectData) -> tuple[Any, ...]:
        return take(model, examples[event.index])

    with gr.Blocks(title=f"mirl · {model.name}", analytics_enabled=False) as page:
        gr.Markdown(f"## {model.name} · {model.method.name} · {height}×{width} px, {gh}×{gw} patches")
        image = gr.State(first)
        with gr.Row():
            file = gr.File(label="image", elem_id="file", scale=2, min_width=300)
            chosen = gr.Gallery(
                [to_rgb(example / 255).numpy() for example in examples], label="images that the run held out",
                elem_id="chosen", columns=6, scale=3, min_width=300, allow_preview=False, format="png",
                object_fit="contain", buttons=[], visible=bool(examples),
            )  # fmt: skip
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                canvas = gr.ImageEditor(
                    None if first is None else take(model, first)[1], label="paint what is masked", sources=(),
                    transforms=(), layers=False, buttons=[], format="png", elem_id="canvas", placeholder="no image yet",
                    canvas_size=(width * factor, height * factor), height=f"min({height * factor + 60}px, 100vw)",
                    brush=gr.Brush(default_size=brush, colors=[PAINT], color_mode="fixed"),
                    eraser=gr.Eraser(default_size=brush),
                )  # fmt: skip
                message = gr.Markdown(elem_id="message")
                how = gr.Radio(["random", "painted"], value="random", label="mask")
                ratio = gr.Slider(0.01, 0.99, model.mask_ratio, step=0.01, label="share of patches masked at random")
                with gr.Row():
                    seed = gr.Number(0, label="seed", precision=0, minimum=0, min_width=80)
                    another = gr.Button("another random mask", min_width=160)
            with gr.Column(scale=3, min_width=300, elem_id="pictures"):
                places = _places(gr, model)
        told, shown = [image, how, ratio, seed, canvas], [*places, how, message]
        live: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
        random, painted = (partial(update, model, now=mask) for mask in ("random", "painted"))
        page.load(partial(update, model), told, shown, show_progress="hidden")
        how.input(partial(update, model), told, shown, **live)
        canvas.input(painted, told, shown, **live)
        canvas.clear(lambda image: None if image is None else take(model, image)[1], image, canvas)
        ratio.input(random, told, shown, **live)
        seed.input(random, told, shown, **live)
        another.click(lambda value: (value or 0) + 1, seed, seed, show_progress="hidden").then(
            random, told, shown, **live
        )
        for opened in (
            file.upload(partial(open_file, model), file, [image, canvas], show_progress="hidden"),
            chosen.select(choose, None, [image, canvas], show_progress="hidden"),
        ):
            opened.then(random, told, shown, show_progress="hidden")
    return page


def take(model: Reconstructor, image: Tensor) -> tuple[Tensor, Drawing]:
    """Return uint8 `image` [c, h, w] for the session, and what the canvas shows of it, without paint."""
    return image, {"background": _picture(model, image / 255, CANVAS), "layers": [], "composite": None}


def open_file(model: Reconstructor, path: str) -> tuple[Any, Any]:
    """Return what `take` does of a file, or warn of a bad one and change nothing."""
    import gradio as gr

    try:
        return take(model, fixed_view(read_image(path, model.channels), model.image_size))
    except BadImage as error:
        gr.Warning(html.escape(f"{Path(path).name} {error.reason}"))
        return gr.skip(), gr.skip()


def update(
    model: Reconstructor, image: Tensor | None, how: Mask, ratio: float | None, seed: int | None, drawing: Drawing,
    now: Mask | None = None,
) -> list[Any]:  # fmt: skip
    """Return the pictures, which mask they show, and a line about it; pictures stay as they are where it says why.

    Args:
        image: uint8 [c, h, w]; how: the mask that was shown; now: the one that is to be.
    """
    import gradio as gr

    painted = _painted(drawing)
    if now != "painted" or painted.any():  # the canvas also tells of a new image, on which nothing is painted
        how = now or how
    try:
        if image is None:
            raise UserError("drop an image to begin")
        hidden = model.drawn_mask(painted) if how == "painted" else model.random_mask(ratio, seed or 0)
        line = f"{int(hidden.sum())} of {hidden.numel()} patches masked"
        return [*pictures(model, image, hidden), how, line]
    except UserError as error:
        return [*(gr.skip() for _ in range(1 + sum(map(len, map(titles_of, model.terms))))), how, f"**{error}**"]


def pictures(model: Reconstructor, image: Tensor, hidden: Tensor) -> list[np.ndarray]:
    """Return what the encoder sees of uint8 `image` [c, h, w] where `hidden` [gh, gw] is masked, and each term's."""
    shown = model(image[None], hidden[None])
    images = [shown.masked, *(column for term in shown.terms for column in columns_of(term).values())]
    return [_picture(model, image[0], PICTURE) for image in images]


def _painted(drawing: Drawing) -> Tensor:
    """Return bool [height, width], True where the canvas is painted."""
    layers = [layer[..., 3] > 127 for layer in (drawing or {}).get("layers", ())]
    return torch.from_numpy(np.any(layers, axis=0)) if layers else torch.zeros(1, 1, dtype=torch.bool)


def _places(gr: Any, model: Reconstructor) -> list[Any]:
    """Lay out an image for each that `pictures` gives, in its order."""
    options: dict[str, Any] = {
        "format": "png", "interactive": False, "buttons": ["download", "fullscreen"], "min_width": 140,
    }  # fmt: skip
    with gr.Row():
        places = [gr.Image(label="what the encoder sees", **options)]
        gr.Markdown("\n".join(f"- **{title}**: {LEGEND[title]}" for title in titles_of(model.terms[0])))
    for term in model.terms:
        if len(model.terms) > 1:
            blocks = " and ".join(str(model.method.taps[decoder - 1]) for decoder in term.decoders)
            gr.Markdown(f"**{label(term.decoders)}** · after blocks {blocks}")
        with gr.Row():
            places += [gr.Image(label=title, **options) for title in titles_of(term)]
    return places


def _picture(model: Reconstructor, image: Tensor, side: int) -> np.ndarray:
    """Return uint8 [height, width, 3] of `image` [c, h, w] in 0..1, enlarged where it is small."""
    factor = _factor(model, side)
    return to_rgb(image).numpy().repeat(factor, axis=0).repeat(factor, axis=1)


def _factor(model: Reconstructor, side: int) -> int:
    return max(1, round(side / max(model.image_size)))
