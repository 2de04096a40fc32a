// What the page does: draw the charts in the colours of the scheme, show reconstructions, copy code.
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)").matches;

function colours() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(["text", "muted", "grid"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

function paint(plot) {
  const { text, muted, grid } = colours();
  for (const model of plot.references()) {
    if (model.type.endsWith("Axis")) model.setv({ axis_label_text_color: muted, major_label_text_color: muted });
    if (model.type === "Grid" && model.grid_line_color !== null) model.grid_line_color = grid;
    if (model.type === "BoxAnnotation") model.setv({ line_color: text, fill_color: muted });
  }
}

async function draw(place) {
  const item = data.charts[place.dataset.chart];
  const [view] = await Bokeh.embed.embed_item(item, place.id);
  const plot = view.model;
  paint(plot);
  dark.addEventListener("change", () => paint(plot));
  // A finger that moves over a chart scrolls the page.
  if (touch) for (const tool of plot.toolbar.tools) if (tool.type === "BoxZoomTool") tool.active = false;
  for (const button of place.parentElement.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", shown);
      for (const line of plot.renderers) if (line.name === button.dataset.label) line.visible = shown;
    });
  }
  place.dataset.drawn = "";
}

function show(gallery, found) {
  const { image, pair, moment } = gallery.state;
  const [name, titles] = found.pairs[pair];
  const before = found.pairs.slice(0, pair).reduce((sum, [, others]) => sum + others.length, 0);
  const sources = [...found.fixed[image], ...found.cells[moment][image].slice(before, before + titles.length)];
  const [step, epoch] = found.moments[moment];
  const when = `epoch ${+epoch.toPrecision(4)}, step ${step.toLocaleString("en")}`;
  gallery.element.querySelectorAll(".panels figure").forEach((figure, place) => {
    const title = ["original", "masked", ...titles][place];
    const picture = figure.querySelector("img");
    picture.src = sources[place];
    picture.alt = `image ${image + 1}, ${title}${place > 1 ? `${name ? ` of ${name}` : ""} at ${when}` : ""}`;
    figure.querySelector("figcaption").textContent = title;
  });
  gallery.element.querySelector("output").textContent = when;
  for (const [kind, chosen] of [["image", image], ["pair", pair]]) {
    for (const button of gallery.element.querySelectorAll(`[data-${kind}]`)) {
      button.setAttribute("aria-pressed", Number(button.dataset[kind]) === chosen);
    }
  }
}

const galleries = [...document.querySelectorAll(".gallery")].map((element, place) => {
  const found = data.galleries[place];
  return { element, found, state: { image: 0, pair: 0, moment: found.moments.length - 1 } };
});

// Runs that are compared show the same image and, where they have it, the same pair.
function choose(change) {
  for (const gallery of galleries) {
    const { found, state } = gallery;
    const wanted = { ...state, ...change };
    wanted.image = Math.min(wanted.image, found.fixed.length - 1);
    wanted.pair = Math.min(wanted.pair, found.pairs.length - 1);
    gallery.state = wanted;
    show(gallery, found);
  }
}

for (const gallery of galleries) {
  const { element, found } = gallery;
  element.querySelectorAll(".thumbs img").forEach((picture, image) => { picture.src = found.fixed[image][0]; });
  for (const kind of ["image", "pair"]) {
    for (const button of element.querySelectorAll(`[data-${kind}]`)) {
      button.addEventListener("click", () => choose({ [kind]: Number(button.dataset[kind]) }));
    }
  }
  const slider = element.querySelector("input");
  const play = element.querySelector(".play");
  show(gallery, found);
  if (!slider) continue;
  const go = (moment) => { slider.value = moment; gallery.state.moment = Number(slider.value); show(gallery, found); };
  let timer = 0;
  const stop = () => { clearInterval(timer); timer = 0; play.setAttribute("aria-pressed", false); };
  slider.addEventListener("input", () => { stop(); go(slider.value); });
  play.addEventListener("click", () => {
    if (timer) return stop();
    play.setAttribute("aria-pressed", true);
    go(gallery.state.moment < found.moments.length - 1 ? gallery.state.moment : 0);
    timer = setInterval(() => (gallery.state.moment < found.moments.length - 1 ? go(gallery.state.moment + 1) : stop()), 700);
  });
}

for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code); // where a file may not write to the clipboard, Ctrl-C does
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

// The navigation tells where the reader is: what was asked for, or what has been scrolled to.
const links = [...document.querySelectorAll("nav a")];
const here = (anchor) => { for (const link of links) link.classList.toggle("here", link.hash === `#${anchor}`); };
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) here(entry.target.id);
}, { rootMargin: "-20% 0px -75%" });
document.querySelectorAll("section").forEach((section) => seen.observe(section));
for (const link of links) link.addEventListener("click", () => setTimeout(() => here(link.hash.slice(1)), 100));

(async () => { for (const place of document.querySelectorAll(".chart")) await draw(place); document.body.dataset.drawn = ""; })();
