"""`mirl report`: one run, or several compared, as one page of HTML that needs no network and no other file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mirl.reports.charts import draw, library
from mirl.reports.contents import Run, read_runs
from mirl.reports.options import ReportOptions
from mirl.reports.panels import galleries
from mirl.reports.sections import Section, reconstructions, sections
from mirl.reports.tables import ARROW, about, key_figures, side_by_side, status
from mirl.training.files import atomic, check_writable, writing
from mirl.training.runs import console

LIMIT = 4_900_000  # bytes of the page
HERE = Path(__file__).parent


def report(runs: Sequence[str | Path] | str | Path, *, out: str | Path | None = ReportOptions.out) -> Path:
    """Write a page that shows a run, or compares several: curves, pictures, blocks, results.

    Takes the fields of `mirl.ReportOptions`, e.g. `mirl.report(["runs/a", "runs/b"], out="both.html")`.

    Raises:
        UserError: if a folder holds no run, or the file cannot be written.
    """
    found = read_runs([runs] if isinstance(runs, str | Path) else runs)
    default = found[0].folder / "report.html" if len(found) == 1 else Path("comparison.html")
    path = Path(out).expanduser() if out else default
    check_writable(path)
    _write(found, path)
    console.print(f"saved {path}", markup=False)
    return path


def write_report(folder: Path) -> Path:
    """Write the report of the run in `folder` to its report.html."""
    return _write(read_runs([folder]), folder / "report.html")


def _write(runs: Sequence[Run], path: Path) -> Path:
    text = page(runs)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return path


def page(runs: Sequence[Run]) -> str:
    """Return the page as HTML; reconstructions get what everything else leaves of its limit."""
    parts = sections(runs)
    charts = {chart.name: draw(chart) for part in parts for chart in part.charts}
    head = _head(runs) | {"bokeh": Markup(library()) if charts else ""}
    text = _render(parts, charts, head)
    if not any(run.rows["pictures"] for run in runs):
        return text
    pictures = reconstructions(runs, galleries(runs, LIMIT - len(text.encode())))
    return _render([pictures if part.anchor == pictures.anchor else part for part in parts], charts, head)


def _head(runs: Sequence[Run]) -> dict[str, Any]:
    """Return what the page begins with: of one run its key figures, of several a table of them."""
    if len(runs) > 1:
        title = " and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
        compared = side_by_side(runs)
        arrows = any(ARROW in cell for row in compared.rows for cell in row)
        return {"title": title, "several": True, "arrows": arrows, "compared": compared}
    (run,) = runs
    figures = key_figures(run)
    arrows = any(ARROW in value for value in figures.values())
    words = {"status": status(run), "about": about(run), "figures": figures, "arrows": arrows}
    return {"title": run.name, "several": False, "finished": run.finished, **words}


def _render(parts: Sequence[Section], charts: Mapping[str, str], head: Mapping[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    own = {name: Markup((HERE / f"page.{name}").read_text()) for name in ("css", "js")}
    return environment.get_template("page.html").render(parts=parts, data=Markup(_data(parts, charts)), **own, **head)


def _data(parts: Sequence[Section], charts: Mapping[str, str]) -> str:
    """Return what the page's script draws, as JSON that cannot end the element it stands in."""
    shown = json.dumps([asdict(gallery) for part in parts for gallery in part.galleries])
    drawn = ",".join(f"{json.dumps(name)}:{chart}" for name, chart in charts.items())
    return f'{{"galleries":{shown},"charts":{{{drawn}}}}}'.replace("<", "\\u003c")
