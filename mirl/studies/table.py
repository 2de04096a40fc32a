"""A study's results as Markdown: a table for each panel, as in the paper, and one of all encoders."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from mirl.studies.definition import Cell, Panel
from mirl.studies.results import Found, Result
from mirl.training.runs import duration


@dataclass(frozen=True)
class Summary:
    """A figure over seeds: its mean and the `low`est and `high`est, of `count` seeds."""

    mean: float
    low: float
    high: float
    count: int

    def text(self, seeds: int, digits: int = 1) -> str:
        """Write mean ± half the range, and the number of seeds where it is not all `seeds`."""
        spread = f" ± {(self.high - self.low) / 2:.{digits}f}" if self.count > 1 else ""
        return f"{self.mean:.{digits}f}{spread}" + (f" ({self.count} of {seeds} seeds)" if self.count < seeds else "")


def summarise(values: Sequence[float]) -> Summary | None:
    """Summarise a figure over seeds; None if there is none."""
    return Summary(mean(values), min(values), max(values), len(values)) if values else None


def at(found: Found, panel: Panel, method: str, value: int) -> list[Cell]:
    """Return the cells of all seeds at `value` of a panel's axis.

    Those of a truncated MAE that lacks no block are MAE's, if the panel has it.
    """
    if found.study.truncates(method) and not panel.cell(method, value, 0).replaced:
        options = found.study.methods
        method = next((other for other in panel.methods if options[other].get("method") == "mae"), method)
    cells = [panel.cell(method, value, seed) for seed in found.study.seeds]
    return [cell for cell in cells if cell in found.cells]


def write_table(found: Found) -> str:
    """Return the tables of a study, with what is missing named in them."""
    study, done = found.study, len(found.done)
    lines = [
        f"# {study.title}",
        "",
        f"`mirl study {study.name}`: {done} of {len(found.cells)} cells are finished"
        + (f", {len(found.other)} have a result of another definition" if found.other else "")
        + f". Top-1 in %, mean over {len(study.seeds)} seeds ± half their range" * (len(study.seeds) > 1)
        + f".{_about(list(found.done.values()))}",
    ]
    for panel in study.panels:
        lines += ["", f"## {panel.title} ({panel.mirrors})", "", *_panel(found, panel)]
    if encoders := _encoders(found):
        lines += ["", "## All encoders", "", *encoders]
    return "\n".join(lines) + "\n"


def _about(results: Sequence[Result]) -> str:
    if not results:
        return ""
    margin, tested = max(result.margin for result in results), results[0].tested
    devices = ", ".join(sorted({result.device for result in results}))
    return f" {tested} test images leave up to ± {margin:.1f} open beside that (95 %). Run on {devices}."


def _panel(found: Found, panel: Panel) -> list[str]:
    study = found.study
    columns = {"depth": "depth {}", "replaced": "{} replaced", "method": "depth {}"}[panel.axis]
    heading = "fine-tuned" + (f", depth {panel.depths[0]}" if panel.axis == "replaced" else "")
    rows = [[heading, *(columns.format(value) for value in panel.values)]]
    for method in panel.methods:
        row = [method]
        for value in panel.values:
            cells = at(found, panel, method, value)
            summary = summarise([result.top1 for result in found.of(cells)])
            other = " (of another definition)" if found.other.intersection(cells) else ""
            row.append((summary.text(len(study.seeds)) if summary else "missing" if cells else "-") + other)
        rows.append(row)
    return _markdown(rows)


def _encoders(found: Found) -> list[str]:
    """Return a row for each pre-trained encoder: what was measured besides fine-tuning, and the time."""
    seeds = len(found.study.seeds)
    grouped: dict[tuple[str, int, int], list[Result]] = {}
    for cell, result in found.done.items():
        if "probe" in result.results:
            grouped.setdefault((cell.method, cell.depth, cell.replaced), []).append(result)
    rows = [["encoder", "depth", "held-out loss", "linear probe", "k-NN", "time of a cell"]]
    for (method, depth, cut), results in grouped.items():
        losses = summarise([float(result.results["held_out_loss"]) for result in results])
        reads = [summarise([100 * float(r.results[name]["top1"]) for r in results]) for name in ("probe", "knn")]
        assert losses
        time = duration(mean(sum(result.seconds.values()) for result in results))
        name = f"{method}, without the last {cut}" if cut else method
        rows.append([name, str(depth), losses.text(seeds, 3), *(s.text(seeds) for s in reads if s), time])
    return _markdown(rows) if grouped else []


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    def line(values: Iterable[str]) -> str:
        return f"| {' | '.join(values)} |"

    return [line(rows[0]), line("---" for _ in rows[0]), *map(line, rows[1:])]
