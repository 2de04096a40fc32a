"""The page in a real browser, from a file: drawn, still, quiet, for mouse, finger and keyboard, in both schemes."""

import re
import shutil
from itertools import pairwise

import pytest
from playwright.sync_api import expect, sync_playwright
from written_runs import TITLES, write_detector, write_results, write_run, write_segmenter

from mirl.reports.page import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH (apt install chromium)")
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
DARK = {"color_scheme": "dark"}
# Sums what moved without being asked, and keeps Bokeh's canvases, which stand in shadow trees, within reach.
OBSERVE = """
window.shifted = 0;
new PerformanceObserver((list) => { for (const entry of list.getEntries()) window.shifted += entry.value; })
  .observe({ type: "layout-shift", buffered: true });
window.within = (root, wanted) => [...root.querySelectorAll("*")].flatMap((element) =>
  [...(element.matches(wanted) ? [element] : []), ...(element.shadowRoot ? within(element.shadowRoot, wanted) : [])]);
window.pixels = (chart) => within(chart, "canvas").flatMap((canvas) =>
  [...new Uint32Array(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer)]);
window.drawn = (chart) => pixels(chart).filter((pixel) => pixel !== 0).length;
window.colours = (chart) => [...new Set(pixels(chart).filter((pixel) => pixel >>> 24 === 255))];
"""


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Open a page that has to be quiet: no error, no request but for the file itself."""
    contexts, noise = [], []

    def open_page(path, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)  # a busy machine may be slow
        page.on("console", lambda message: noise.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("request", lambda r: noise.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
        page.add_init_script(OBSERVE)
        page.goto(f"file://{path}")
        page.wait_for_selector("body[data-drawn]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert noise == []


@pytest.fixture(scope="module")
def single(rich, tmp_path_factory):
    return report([str(rich)], out=str(tmp_path_factory.mktemp("single") / "page.html"))


@pytest.fixture(scope="module")
def compared(rich, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    mae = write_run(folder / "mae $x @y {z} <b>", method="mae", seed=1, titles=[*TITLES[:2], "reconstruction"])
    write_results(mae)
    return report([str(rich), str(mae)], out=str(folder / "page.html"))


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return write_detector(tmp_path_factory.mktemp("detector") / "run")


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    return write_segmenter(tmp_path_factory.mktemp("segmenter") / "run")


def until(page, expression):
    """Wait until a JavaScript expression holds; the page lets nobody else evaluate one."""
    for _ in range(100):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"still not: {expression}")


def sources(page, gallery=0):
    return page.locator(".gallery").nth(gallery).locator(".panels img").evaluate_all("all => all.map(i => i.src)")


@pytest.mark.parametrize(
    "which, options",
    [
        *(("single", {}), ("single", PHONE), ("single", DARK), ("compared", {}), ("compared", PHONE), ("real", {})),
        *(("detector", {}), ("detector", PHONE), ("segmenter", PHONE)),
    ],
)
def test_everything_is_drawn_and_nothing_moves(visit, request, tmp_path, which, options):
    found = request.getfixturevalue(which)
    path = found if found.suffix == ".html" else report([str(found)], out=str(tmp_path / "page.html"))
    page = visit(path, **options)
    charts = page.locator(".chart")
    assert charts.count() >= 10
    assert min(charts.evaluate_all("charts => charts.map(drawn)")) > 500
    assert charts.evaluate_all("charts => charts.filter(c => c.getAttribute('role') !== 'img' || !c.ariaLabel)") == []
    page.mouse.wheel(0, 20_000)
    page.wait_for_timeout(300)
    assert page.evaluate("shifted") < 0.02
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    images = page.locator("img").evaluate_all(
        "all => all.map(i => [i.complete && i.naturalWidth > 0, i.alt.length > 0, i.width > 0 && i.height > 0])"
    )
    assert images and all(all(image) for image in images)


def test_sections_can_be_reached(visit, single):
    page = visit(single)
    for link in page.locator("nav a").all():
        link.click()
        heading = page.locator(link.get_attribute("href")).locator("h2")
        assert heading.count() == 1
        expect(heading).to_be_in_viewport()
    until(page, "document.querySelector('nav a.here').hash === '#incidents'")
    levels = page.locator("h1, h2, h3").evaluate_all("all => all.map(h => Number(h.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1 and max(b - a for a, b in pairwise(levels)) <= 1


def test_the_time_slider(visit, single):
    page = visit(single)
    slider, output = page.get_by_label("Time in training"), page.locator(".gallery output")
    last = sources(page)
    assert output.inner_text() == "epoch 4, step 40"
    slider.focus()
    page.keyboard.press("ArrowLeft")
    middle = sources(page)
    assert output.inner_text() == "epoch 2, step 20"
    assert middle[:2] == last[:2] and all(a != b for a, b in zip(middle[2:], last[2:], strict=True))
    page.keyboard.press("Home")
    assert output.inner_text() == "epoch 0, step 0" and sources(page)[2] not in (middle[2], last[2])
    assert page.locator(".panels img").nth(2).get_attribute("alt") == "image 1, main of pair 1 at epoch 0, step 0"
    page.get_by_label("Play").click()
    until(page, "document.querySelector('.gallery output').textContent === 'epoch 4, step 40'")
    assert sources(page) == last


def test_the_image_and_the_pair_can_be_chosen(visit, single):
    page = visit(single)
    first = sources(page)
    page.get_by_role("button", name="image 2").press("Enter")
    second = sources(page)
    assert all(a != b for a, b in zip(first, second, strict=True))
    page.locator(".gallery").get_by_role("button", name="pair 2").click()
    assert sources(page)[:2] == second[:2] and sources(page)[2:] != second[2:]
    assert page.locator(".gallery [aria-pressed=true]").all_inner_texts() == ["", "pair 2"]
    assert page.locator(".panels figcaption").all_inner_texts() == ["original", "masked", "main", "residual", "sum"]


def test_runs_show_the_same_image(visit, compared):
    page = visit(compared)
    before = sources(page, 0), sources(page, 1)
    page.locator(".gallery").nth(1).get_by_role("button", name="image 3").click()
    assert all(sources(page, i)[0] != before[i][0] for i in (0, 1))
    assert [len(found) for found in before] == [5, 3]


def test_a_line_can_be_hidden(visit, single):
    page = visit(single)
    chart = page.locator("#chart_loss")
    card = page.locator("figure", has=chart)
    before = chart.evaluate("drawn")
    button = card.get_by_role("button", name="training")
    button.click()
    until(page, f"drawn(document.querySelector('#chart_loss')) < {before} - 100")
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    until(page, f"Math.abs(drawn(document.querySelector('#chart_loss')) - {before}) < 50")


def test_values_under_the_mouse(visit, compared):
    page = visit(compared)
    chart = page.locator("#chart_blocks_rank")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + box["height"] / 2)
    until(page, "within(document, '.bk-Tooltip').length > 0")
    text = page.evaluate(
        "within(document, '.bk-Tooltip').flatMap(t => within(t.shadowRoot, 'div')).map(d => d.textContent)"
    )
    assert any(re.search(r"^block \d\s*mae \$x @y \{z\} <b> 1\d\.\d+\s*epoch 4", line) for line in text), text


def test_the_wheel_and_the_finger_scroll_the_page(visit, single):
    page = visit(single)
    box = page.locator("#chart_loss").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.wheel(0, 200)
    until(page, "scrollY >= 199")
    action = "chart => getComputedStyle(within(chart, '.bk-events')[0]).touchAction"
    assert page.locator("#chart_loss").evaluate(action) != "auto"  # a mouse draws the box of a zoom
    assert visit(single, **PHONE).locator("#chart_loss").evaluate(action) == "auto"


def test_the_scheme_changes_page_and_charts(visit, single):
    page = visit(single, color_scheme="light")
    chart = page.locator("#chart_loss")
    background = "() => getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background), set(chart.evaluate("colours"))
    page.emulate_media(color_scheme="dark")
    until(page, f"({background})() !== '{light[0]}'")
    page.wait_for_timeout(300)
    dark = page.evaluate(background), set(chart.evaluate("colours"))
    fresh = set(visit(single, **DARK).locator("#chart_loss").evaluate("colours"))
    assert light[1] - dark[1] and dark[1] - light[1]
    assert dark[1] == fresh  # what is repainted equals what is painted


def test_code_can_be_copied(visit, single):
    page = visit(single)
    page.locator("#options .copy").click()
    until(page, "/Copied|Selected/.test(document.querySelector('#options .copy').textContent)")
